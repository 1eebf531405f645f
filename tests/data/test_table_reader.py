"""Tables as spreadsheets and scripts write them: encodings, delimiters, quotes, lines."""

import logging

import pytest

from peft_clsr.data.encodings import decode_text
from peft_clsr.data.table_reader import log_once, read_cells

HEADER = "file_name,transcription\n"


@pytest.fixture
def read(tmp_path):
    """Writes a table and reads it: (columns, rows of cells, lines)."""

    def call(content, name="metadata.csv", language=None):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        table = read_cells(path, language)
        return table.columns, [list(row.values()) for row in table.rows], list(table.places)

    log_once.cache_clear()
    return call


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("language", "encoding", "text"),
    [
        ("ro", "cp1250", "Bună ziua, îmi place ţara"),
        ("fr", "cp1252", "L’été à l’école, ça coûte 5 €"),
        ("uk", "cp1251", "Добрий день, її ґанок"),
        ("el", "cp1253", "Καλημέρα"),
        ("tr", "cp1254", "İyi akşamlar"),
        ("ja", "cp932", "おはよう"),
        (None, "utf-16", "bună"),
        (None, "utf-16-le", "bună"),
        (None, "utf-16-be", "bună"),
        (None, "utf-8-sig", "bună"),
    ],
)
def test_text_of_windows_is_read_in_the_code_page_of_its_language(read, caplog, language, encoding, text):
    content = f"file_name;transcription\r\na.wav;{text}\r\n".encode(encoding)
    assert read(content, language=language) == (["file_name", "transcription"], [["a.wav", text]], [2])
    # The encoding is said once, with the delimiter and an example, unless it is UTF-8.
    read(content, language=language)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    if encoding == "utf-8-sig":
        assert said == []
    else:
        assert len(said) == 1 and f"is read as {encoding}" in said[0] and "';'" in said[0] and text in said[0]


@pytest.mark.parametrize(
    ("language", "encoding", "text", "named"),
    [
        (None, "cp1252", "été", "line 3 is not utf-8"),
        ("hi", "cp1252", "été", "line 3 is not utf-8"),  # Windows has no code page for it
        ("fr", "mac_roman", "un café, à côté", "nor cp1252, as Windows writes 'fr'"),
        ("pl", "iso-8859-2", "książka", "nor cp1250"),
        ("ru", "koi8-r", "Добрый День", "nor cp1251"),
        ("sr", "cp1251", "добар дан", "may be cp1250 or cp1251"),
    ],
)
def test_text_of_uncertain_encoding_is_refused_with_the_line(language, encoding, text, named):
    with pytest.raises(ValueError, match=f"my.csv cannot be read after line 2: .*{named}.*save it in UTF-8"):
        decode_text(f"a\nb\n{text}\n".encode(encoding), "my.csv", language)


def test_a_nul_byte_is_refused_with_the_line(read):
    with pytest.raises(ValueError, match="metadata.csv.* line 3 has a NUL byte"):
        read(HEADER + "a.wav,da\nb.wav,n\0u\n")


# ---------------------------------------------------------------- csv


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("file_name;text\na.wav;1,5 m\n", ["a.wav", "1,5 m"]),
        ("file_name\ttext\na.wav\tun, doi; trei\n", ["a.wav", "un, doi; trei"]),
        ("sep=;\r\nfile_name;text\r\na.wav;da\r\n", ["a.wav", "da"]),
        (" file_name , text \na.wav,da\n", ["a.wav", "da"]),
        ("file_name;text;;\na.wav;da;;\n", ["a.wav", "da"]),  # a spreadsheet's empty columns
        (",file_name,text\n0,a.wav,da\n", ["a.wav", "da"]),  # the index of pandas
        ("file_name,text\ra.wav,da\r", ["a.wav", "da"]),  # old Mac OS
        ('file_name,text\na.wav,"El a zis ""da"""\n', ["a.wav", 'El a zis "da"']),
        ('file_name\ttext\na.wav\t"Da" a zis\n', ["a.wav", '"Da" a zis']),
    ],
)
def test_a_csv_of_any_program_is_read(read, text, cells):
    assert read(text)[:2] == (["file_name", "text"], [cells])


def test_lines_are_those_of_an_editor_also_below_a_cell_of_several_lines(read):
    _, rows, lines = read(HEADER + '\na.wav,"un\ndoi, trei"\nb.wav,x\u2028y\n')
    assert rows == [["a.wav", "un\ndoi, trei"], ["b.wav", "x\u2028y"]] and lines == [3, 5]
    with pytest.raises(ValueError, match="line 5 has more cells than the 2 columns"):
        read(HEADER + '\na.wav,"un\ndoi, trei"\nb.wav,x,y\n')


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ("a.wav,da\nb.wav,da, nu\n", "line 3 has more cells than the 2 columns: quote text that has ','"),
        ("a.wav,da\nb.wav,bun\na ziua\n", "line 4 has 1 of the 2 cells"),
        ("a.wav,da\r\nb.wav,bun\ra ziua\r\n", "line 3 has a carriage return inside the row"),
        ("a.wav,da\nb.wav,bun\ra ziua\n", "line 3 has a carriage return inside the row"),
        ('a.wav,da\nb.wav,"da\nc.wav,nu\n', "a quote in line 3 or below is not closed"),
        ('a.wav,da\nb.wav,"da\nc.wav,nu\nd.wav,nu"\n', "a quote in line 3 is not closed before the row 'c.wav,nu'"),
        ('a.wav,da\nb.wav,"da\nc.wav,"nu"\n', "a quote in line 3 is not closed, or stands inside a cell"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_line(read, rows, error):
    with pytest.raises(ValueError, match=f"metadata.csv.*{error}"):
        read(HEADER + rows)


def test_a_row_in_a_tsv_is_refused_with_its_line(read):
    with pytest.raises(ValueError, match="train.tsv.* line 2 has a carriage return inside the row"):
        read("path\tsentence\na.mp3\tbun\ra\n", "train.tsv")
    with pytest.raises(ValueError, match="train.tsv, line 3 has 1 of the 2 cells"):
        read("path\tsentence\na.mp3\tbun\nbună ziua\n", "train.tsv")


@pytest.mark.parametrize("header", ["file_name,text,text", "file_name,text, Text", "file_name,TEXT,text"])
def test_a_column_that_is_there_twice_is_refused(read, header):
    with pytest.raises(ValueError, match="metadata.csv, line 1 has the column 'text' twice"):
        read(f"{header}\na.wav,da,nu\n")


# ---------------------------------------------------------------- JSON lines


def test_json_lines_are_read_as_text(read):
    text = '{"file_name": "a.wav", "text": "bună", "seconds": 1.5}\n\n{"text": null, "file_name": "b.wav"}\n'
    assert read(text, "metadata.jsonl") == (
        ["file_name", "text", "seconds"],
        [["a.wav", "bună", "1.5"], ["b.wav", "", ""]],
        [1, 3],
    )


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"file_name":', "line 2 is no JSON: Expecting value"),
        ('["a.wav"]', "line 2 is no JSON object"),
        ('{"text": "a", "text": "b"}', "line 2 has the same name twice"),
    ],
)
def test_a_line_that_is_no_json_object_is_refused(read, line, error):
    with pytest.raises(ValueError, match=f"metadata.jsonl, {error}"):
        read('{"file_name": "a.wav"}\n' + line + "\n", "metadata.jsonl")
