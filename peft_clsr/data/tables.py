"""Recordings and transcripts from tables, folders and the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..languages.tags import language_tag
from ..sources import collective_id, did_you_mean, is_local_dataset
from .collective import fetch_collective
from .language_rows import dataset_of_language, table_of_language, write_tags
from .layouts import read_layout, read_texts_beside
from .rows import OTHER_TEXT_COLUMN, PLACE_COLUMN, TEXT_COLUMN
from .segments import START_COLUMN
from .split import PARTS, MissingSplitError, split_by_text, split_segments
from .table_files import FILE_COLUMNS, read_recordings
from .table_reader import Table, log_once

if TYPE_CHECKING:
    import datasets

# The Hub's branch with its Parquet conversion of a dataset: a folder for each configuration.
CONVERTED_REVISION = "refs/convert/parquet"


def read_table(path: str | Path, language: str | None = None) -> list[tuple[Path, dict[str, str]]]:
    """
    Read a table of recordings: csv, tsv or jsonl.

    Args:
        path (`str` or `Path`):
            A table whose column `file_name` is relative to its folder, or a tsv of Common Voice, whose column `path`
            is relative to the folder `clips` beside it.
        language (`str`, *optional*): Tag of the language of its text, if the file may be not in UTF-8.

    Returns:
        `list[tuple[Path, dict[str, str]]]`: for each row, the path of the recording and the cells by column. All cells
        are text, as a transcript may be "null" or "12". The column `language` has standard tags.

    Raises:
        ValueError:
            There is no row, no column of paths, a row that does not fit, a recording that comes twice, a language that
            is neither a tag nor a name, or an unknown encoding. The message has the file and the line.
        OSError: the file cannot be opened.

    Example:

    ```py
    >>> read_table("recordings/train/metadata.csv")[0]
    (PosixPath('recordings/train/0.wav'), {'file_name': '0.wav', 'transcription': 'Bon dia', 'language': 'ca'})
    ```
    """
    table = read_recordings(Path(path), language)
    write_tags(table)
    return list(zip(table.files, table.rows, strict=True))


def load_recordings(
    dataset: str | Path,
    language: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    audio_column: str = "audio",
    text_column: str = "transcription",
    file_column: str | None = None,
    languages: Collection[str] = (),
    limit: int | None = None,
    transcribed: bool = True,
) -> datasets.Dataset:
    """
    Load recordings and transcripts of one language, from a folder or from the Hub, for [`prepare_dataset`].

    Args:
        dataset (`str` or `Path`):
            A folder with tables (`metadata.csv`, `train/metadata.csv`, `train.csv`, as tsv or jsonl too), a folder of
            recordings with a text file each (`talk.txt`, or with times `talk.srt`, `talk.vtt` or `talk.TextGrid`), a
            table, a folder or Hub id that `datasets.load_dataset` reads, or "mdc:ID", a dataset of Mozilla Data
            Collective such as Common Voice (see [`fetch_collective`]).
            `{language}` in it stands for the language's tag. See docs/how-to/recordings.md, "Your own recordings".
        language (`str`): As in [`language_tag`]. A column `language`, in any source, gives only the rows of this
            language, and those of its dialects: "ca-valencia" for "ca".
        split (`str`):
            "train", "test", or another name of a folder, table or split. If a folder has no splits, "train",
            "validation" and "test" are split off by text, see [`split_by_text`].
        config (`str`, *optional*): Configuration on the Hub, or a subfolder.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column of the audio. A table gets this column, with the paths of its recordings.
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts, in any case.
        file_column (`str`, *optional*):
            Column of file names in a table, in any case. By default `file_name`, else `path`, else `audio_column`.
        languages (`Collection[str]`, *optional*):
            Further languages that are loaded from this dataset. Their rows are not taken for a broader language, nor
            reported as unused.
        limit (`int`, *optional*): Load only the first rows.
        transcribed (`bool`, *optional*, defaults to `True`):
            `False`: transcripts may lack, as for [`pseudo_label`]. A table without a column of them is not split.

    Returns:
        `datasets.Dataset`: one row a recording, with the columns of the table or dataset. With the columns `start` and
        `end` (seconds, or "00:01:02.500"), one row a segment of a recording.

    Raises:
        ValueError:
            There is no such dataset or split, or no row of the language, or a table cannot be read: the message has
            the file and the line. Or there is a `revision` of a dataset that is not on the Hub.

    Example:

    ```py
    >>> recordings = load_recordings("my_recordings", "ca", "train")
    >>> train_set, counts = prepare_dataset(recordings, processor, "ca")
    ```
    """
    code, loaded_codes = language_tag(language), [language_tag(other) for other in languages]
    name = str(dataset).replace("{language}", code)
    if revision is not None and is_local_dataset(name):
        raise ValueError(
            f"revision is {revision!r}, a branch, tag or commit on the Hub, but the dataset {name!r} is not read from "
            "the Hub: leave the revision out (--dataset_revision, --eval_revision)"
        )
    if collective_id(name) is not None:
        name = str(fetch_collective(name))
    folder = Path(name, config or "")
    file_columns = (*FILE_COLUMNS, audio_column) if file_column is None else (file_column,)
    found = None
    for source in (folder, folder / "data"):
        found = found or read_layout(source, split, code, text_column, file_columns)
    if found is None:
        loaded = _load_dataset(name, folder, config, split, revision)
        if loaded is None:  # audio files on the Hub
            from huggingface_hub import snapshot_download

            copy = snapshot_download(name, repo_type="dataset", revision=revision)
            return load_recordings(
                copy,
                code,
                split,
                config=config,
                audio_column=audio_column,
                text_column=text_column,
                file_column=file_column,
                languages=languages,
                limit=limit,
                transcribed=transcribed,
            )
        loaded = dataset_of_language(_without_decoding(loaded), code, f"{folder}, {split}", loaded_codes)
        return loaded if limit is None else loaded.select(range(min(limit, len(loaded))))
    table, is_whole = found
    table = table_of_language(table, code, loaded_codes)
    has_texts = table.rename(text_column, OTHER_TEXT_COLUMN if text_column == TEXT_COLUMN else None)
    number = len(table.rows)
    table = read_texts_beside(table, text_column, code)
    if not table.rows:
        raise ValueError(
            f"{table.path}: no recording of split {split!r} is left, because the files with times beside all {number} "
            f"have no text: write the texts into them, or into the column {text_column!r} of the table"
        )
    has_texts = has_texts or text_column in table.columns
    if is_whole and (has_texts or transcribed):
        if not has_texts:
            raise ValueError(
                f"{table.path} has no column {text_column!r}, but {', '.join(table.columns)}: set text_column "
                "(--text_column) to one of them"
            )
        table = _split_off(table, code, text_column, split)
    if has_texts and transcribed:
        _report_missing_texts(table, text_column)
    return _table_dataset(table, audio_column, limit)


def _split_off(table: Table, code: str, text_column: str, split: str) -> Table:
    """One of the parts that a table without splits is split into."""
    if split not in PARTS:
        raise ValueError(
            f"{table.path} says no splits, so it is split into {', '.join(PARTS)}: set the split {split!r} "
            "(--train_split, --eval_split, --validation_split) to one of these"
        )
    texts = [row[text_column] for row in table.rows]
    how = "text, each sentence in one part"
    try:
        if START_COLUMN in table.columns:
            parts, how = split_segments(table.files, [row[START_COLUMN] for row in table.rows], texts)
        else:
            parts = split_by_text(texts)
    except ValueError as error:
        raise ValueError(f"{table.path}, {code}: {error}") from error
    sizes = ", ".join(f"{parts.count(part)} {part}" for part in PARTS)
    log_once(
        f"{table.path}, {code}: nothing says which recordings are held out, so they are split by {how}: {sizes} "
        "(a column 'split' makes other parts)"
    )
    return table.select([row for row, part in enumerate(parts) if part == split])


def _report_missing_texts(table: Table, text_column: str) -> None:
    missing = [row for row, cells in enumerate(table.rows) if not cells[text_column].strip()]
    if missing:
        places = ", ".join(table.place(row) for row in missing[:3]) + (", ..." if len(missing) > 3 else "")
        log_once(
            f"{len(missing)} of {len(table.rows)} rows have no {text_column}, and are used only as recordings "
            f"without speech (no_speech): {places}"
        )


def _load_dataset(
    name: str, folder: Path, config: str | None, split: str, revision: str | None
) -> datasets.Dataset | None:
    """A split of what `datasets` reads: a folder, or a dataset on the Hub; `None` for audio files on the Hub."""
    datasets = require("datasets")
    source: dict[str, Any] = {"path": name, "name": config}
    if folder.is_dir():
        source = {"path": str(folder)}
    elif revision == CONVERTED_REVISION:
        source = {"path": name, "data_dir": config}
    try:
        return datasets.load_dataset(**source, split=split, revision=revision)
    # A RuntimeError: the dataset is a script, which datasets 4 and later do not run. An ImportError: torchcodec.
    except (datasets.exceptions.DatasetsError, ImportError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(error) if cause is error else f"{str(error).rstrip('.')}: {cause}"
        hint = ""
        if isinstance(error, RuntimeError):
            hint = f"; if it is a script, try another revision, --dataset_revision {CONVERTED_REVISION}"
        if "torchcodec" in reason:  # datasets needs it for audio files; our own layouts do not
            if not folder.is_dir():
                return None
            hint = "; these audio files have neither a table that is read here nor a text file each"
        elif any(folder.glob("*.xls*")) or any(folder.glob("*.ods")):
            hint = "; a workbook is not read: save its sheet as 'CSV UTF-8' in the folder"
        elif "Unknown split" in reason:
            hint = "; parts of a split are splits, too: --train_split 'train[:90%]' --eval_split 'train[90%:]'"
        kind = MissingSplitError if "Unknown split" in reason else ValueError
        where = ""
        if not folder.exists():
            where = f"there is no folder or table {name!r} here{did_you_mean(name) or '.'} On the Hub: "
        raise kind(
            f"{where}no split {split!r} of dataset {str(folder)!r} ({reason}): expected a table metadata.csv in the "
            f"folder, a folder with {split}/metadata.csv, one with {split}.tsv and clips/, recordings with a text "
            "file each, or a dataset that datasets.load_dataset reads, here or on the Hub; check the names of the "
            f"dataset, its configuration (--dataset_config) and its splits (--train_split, --eval_split){hint}"
        ) from error


def _without_decoding(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with audio as files: read_audio decodes them, without torchcodec."""
    audio = require("datasets").Audio
    for column, feature in dataset.features.items():
        if isinstance(feature, audio) and feature.decode:
            dataset = dataset.cast_column(column, audio(decode=False))
    return dataset


def _table_dataset(table: Table, audio_column: str, limit: int | None) -> datasets.Dataset:
    """The rows of a table, with the paths of their recordings."""
    datasets = require("datasets")
    # prepare_dataset looks at the files itself. A `map` of the user's own is cached until a row changes.
    has_times = START_COLUMN in table.columns
    cells = [
        {
            **row,
            audio_column: str(file),
            "modified": _time_of_change(file),
            **({PLACE_COLUMN: table.place(number)} if has_times else {}),
        }
        for number, (file, row) in enumerate(zip(table.files[:limit], table.rows[:limit], strict=True))
    ]
    # A generator's rows are on disk, and so are the features made from them. from_list would keep both in memory.
    # datasets hashes the arguments: a text at once, a list of rows cell by cell, which would take longer than reading.
    return datasets.Dataset.from_generator(
        _each_row,
        features=datasets.Features({name: datasets.Value("string") for name in cells[0]}),
        gen_kwargs={"rows": json.dumps(cells)},
    )


def _time_of_change(file: Path) -> str:
    try:
        return str(os.stat(file).st_mtime_ns)
    except (OSError, ValueError):
        return ""


def _each_row(rows: str) -> Iterator[dict[str, str]]:
    yield from json.loads(rows)
