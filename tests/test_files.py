"""Small files: read with a limit, written completely or not at all."""

import re
import unicodedata
from pathlib import Path

import pytest

from peft_clsr.files import (
    MAX_JSON_BYTES,
    check_output_folder,
    copy_file,
    existing_path,
    read_json,
    to_json,
    unfinished_path,
    write_text,
)


def test_text_is_written_with_its_folders_and_replaces_what_is_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\n")
    write_text(path, "zwei ä\n")
    assert path.read_bytes() == "zwei ä\n".encode() and [one.name for one in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["a" * 251, "я" * 124 + "aaa"], ids=["Latin", "Cyrillic"])
def test_a_file_of_the_longest_name_is_written_by_way_of_a_shorter_one(tmp_path, name):
    path = tmp_path / f"{name}.txt"
    write_text(unfinished_path(path), "one")
    unfinished_path(path).replace(path)
    assert path.read_text() == "one"
    copy_file(Path(__file__), path)
    assert path.read_bytes() == Path(__file__).read_bytes() and list(tmp_path.iterdir()) == [path]
    assert unfinished_path(path) != unfinished_path(tmp_path / f"{name[:-1]}b.txt")
    assert unfinished_path(tmp_path / "a.txt") == tmp_path / "a.txt.part"


def test_json_has_null_for_what_is_not_finite():
    value = {"é": [float("nan"), (float("inf"), 1.5)], "a": {"b": -float("inf")}}
    assert to_json(value, indent=None, sort_keys=True) == '{"a": {"b": null}, "é": [null, [null, 1.5]]}\n'
    assert to_json({"é": 1}, ensure_ascii=True) == '{\n  "\\u00e9": 1\n}\n'


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 10**5, "cannot be read as JSON"),
        (b"9" * 10**5, "cannot be read as JSON"),
        (b" " * MAX_JSON_BYTES + b"1", "is larger than 4194304 bytes"),
    ],
    ids=["cut", "no UTF-8", "nested", "long integer", "large"],
)
def test_bad_json_is_an_error_that_names_the_file(tmp_path, content, error):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json {error}"):
        read_json(path)
    path.write_bytes(b'{"a": [1]}')
    assert read_json(path) == {"a": [1]}


def test_a_copy_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")

    def full(source, target):
        Path(target).write_text("n")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(OSError, match="no space left"):
            copy_file(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    copy_file(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old").read_text() == "new"


def test_a_folder_that_cannot_be_written_is_named_and_nothing_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_output_folder(tmp_path / "new" / "deep", "--output_dir")
    with pytest.raises(ValueError, match=r"--output_dir \S*file is a file, expected a folder"):
        check_output_folder(tmp_path / "file", "--output_dir")
    with pytest.raises(ValueError, match=r"file/out would be in \S*file, which is a file"):
        check_output_folder(tmp_path / "file" / "out", "--output_dir")
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(ValueError, match=rf"you may not write to {re.escape(str(tmp_path))}"):
        check_output_folder(tmp_path / "new" / "deep", "--output_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("on_disk", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_path_is_found_in_its_other_unicode_form(tmp_path, on_disk, asked):
    file = tmp_path / unicodedata.normalize(on_disk, "Städte") / unicodedata.normalize(on_disk, "Zürich.csv")
    write_text(file, "")
    for folder in (on_disk, asked):
        path = tmp_path / unicodedata.normalize(folder, "Städte") / unicodedata.normalize(asked, "Zürich.csv")
        assert existing_path(str(path)) == file
    assert existing_path(file) == file and existing_path(file.parent / "other ü") == file.parent / "other ü"
    assert existing_path("ü\0") == Path("ü\0")
