"""The folder of a teacher cache: a teacher, and its states in shards of rows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import tqdm
from safetensors.torch import load_file, save
from torch import nn
from transformers import WhisperProcessor

from ...data.teacher_columns import STATES_COLUMN
from ...extras import require
from ...files import read_json, to_json
from .forward import linear_layer, teacher_decoder_states, teacher_output_layer
from .inputs import HASH_COLUMN, PreparedRows, TeacherBatch
from .windows import PlannedWindows

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 1

_REMEDY = "give another cache_dir, or delete this one"


def read_header(folder: Path) -> dict[str, Any]:
    """The content of teacher.json of a cache. Raises a `ValueError` if there is none."""
    try:
        return read_json(folder / "teacher" / "teacher.json")
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no teacher states: make them with cache_teacher_states") from None


class Shard(NamedTuple):
    """A file, and the rows whose states it holds."""

    path: Path
    rows: range


class CacheFolder:
    """
    A cache folder. It has `teacher/` (teacher.json, output_layer.safetensors and processor/), and shards such as
    states-00000-of-00012.arrow with the columns `teacher_states` and `fed`, the hash of the teacher's inputs. Each is
    written under a name that ends in ".tmp", and renamed when it is complete.
    """

    def __init__(self, folder: Path, rows: PreparedRows | PlannedWindows, key: str | None = None) -> None:
        self.folder, self.rows = folder, rows
        header, settings = read_header(folder), rows.settings
        windows = header.get("windows", {})
        kinds = ["packed windows" if one else "a prepared dataset" for one in (windows, settings)]
        for what, found, expected in (
            ("of format version", header["version"], FORMAT_VERSION),
            ("of another teacher, of hash", header["teacher"], key or header["teacher"]),
            ("of", *kinds),
            *((f"of packed windows whose {name} is", windows.get(name), value) for name, value in settings.items()),
            ("of another dataset, of length", header["examples"], len(rows)),
        ):
            if found != expected:
                raise ValueError(f"the cache in {folder} is {what} {found}, expected {expected}: {_REMEDY}")
        starts = range(0, len(rows), header["shard_size"])
        self.shards = [
            Shard(
                folder / f"states-{number:05d}-of-{len(starts):05d}.arrow",
                range(start, min(start + starts.step, len(rows))),
            )
            for number, start in enumerate(starts)
        ]

    @property
    def num_cached(self) -> int:
        """Examples in complete shards."""
        return sum(len(shard.rows) for shard in self.shards if shard.path.exists())

    def check(self, shards: list[Shard]) -> None:
        """Raise a `ValueError` if these shards were computed from other inputs than the dataset's."""
        for shard in tqdm(shards, desc="checking teacher states", unit="shard", leave=False, disable=not shards):
            problem = self.rows.problem(shard.rows, _read(shard), self._read_all)
            if problem is not None:
                raise ValueError(f"the cache in {self.folder} is of {problem}: {_REMEDY}")

    def _read_all(self) -> list[datasets.Dataset]:
        return [_read(shard) for shard in self.shards if shard.path.exists()]

    def write(self, shards: list[Shard], teacher: nn.Module, batch_size: int) -> None:
        """Run the teacher on the rows of these shards, and write them."""
        import pyarrow as pa  # installed with datasets

        datasets = require("datasets")
        columns = {STATES_COLUMN: datasets.List(datasets.Value("float16"))}
        for name, kind in self.rows.marks.items():
            columns[name] = datasets.Value(kind) if name == HASH_COLUMN else datasets.List(datasets.Value(kind))
        schema = datasets.Features(columns).arrow_schema
        total = sum(len(shard.rows) for shard in shards)
        with tqdm(total=total, desc="teacher states", unit="example") as progress:
            for shard in shards:
                temporary = shard.path.with_suffix(".tmp")
                try:
                    with open(temporary, "wb") as file:
                        with pa.ipc.new_stream(file, schema) as writer:
                            for batch in self.rows.batches(shard.rows, batch_size):
                                states = [state.flatten().numpy() for state in self._states(batch, teacher)]
                                writer.write_batch(pa.record_batch([states, *batch.marks.values()], schema))
                                progress.update(len(batch.rows))
                        file.flush()
                        os.fsync(file.fileno())
                    temporary.rename(shard.path)
                except OSError as error:
                    raise OSError(
                        f"{error}: the cache in {self.folder} is usable up to its last complete shard, it holds the "
                        f"states of {self.num_cached} of {len(self.rows)} examples. Make room on the disk and call "
                        "cache_teacher_states again, which resumes it"
                    ) from error
                finally:
                    temporary.unlink(missing_ok=True)

    def _states(self, batch: TeacherBatch, teacher: Any) -> Iterator[torch.Tensor]:
        """The teacher's states of each example, float16 [tokens, hidden]."""
        start, size = teacher.config.decoder_start_token_id, teacher.config.vocab_size
        # As in the collator: the model itself prepends the start token.
        labels = [ids[1:] if len(ids) and ids[0] == start else ids for ids in batch.labels]
        for row, ids in zip(batch.rows, labels, strict=True):
            if len(ids) == 0 or ids.max() >= size:
                raise ValueError(
                    f"{self.rows.name(row)} has the labels {ids.tolist()}, expected at least one, all below "
                    f"{size} (the teacher's vocabulary): prepare_dataset(..., teacher_processor=...) maps them"
                )
        after_prompts = [
            torch.cat([torch.full_like(prompt, -100), ids]) for prompt, ids in zip(batch.prompts, labels, strict=True)
        ]
        padded = nn.utils.rnn.pad_sequence(after_prompts, batch_first=True, padding_value=-100)
        inputs = None if not any(map(len, batch.prompts)) else _decoder_inputs(batch.prompts, labels, teacher.config)
        outputs = teacher_decoder_states(teacher, torch.stack(batch.features), padded, inputs).half()
        for row, prompt, ids, output in zip(batch.rows, batch.prompts, labels, outputs, strict=True):
            state = output[len(prompt) : len(prompt) + len(ids)]
            if not state.isfinite().all():
                raise ValueError(
                    f"the teacher's states of {self.rows.name(row)} are not finite in float16 (NaN, infinity or "
                    "above 65,504): check that example, and the teacher's precision (the range of bfloat16 and "
                    "float32 is larger)"
                )
            yield state

    def states(self) -> datasets.Dataset:
        """The states and marks of all rows. The cache must be complete."""
        return require("datasets").concatenate_datasets(self._read_all())

    def output_layer(self) -> nn.Linear:
        """The teacher's output layer."""
        tensors = load_file(self.folder / "teacher" / "output_layer.safetensors")
        return linear_layer(tensors["weight"], tensors.get("bias"))

    def processor(self) -> Any:
        """The teacher's processor."""
        return WhisperProcessor.from_pretrained(self.folder / "teacher" / "processor")


def _decoder_inputs(prompts: list[torch.Tensor], labels: list[torch.Tensor], config: Any) -> torch.Tensor:
    """int64 [batch, tokens]: prompt, start token, and all labels but the last."""
    start, padding = torch.tensor([config.decoder_start_token_id]), config.pad_token_id
    inputs = [torch.cat([prompt, start, ids[:-1]]) for prompt, ids in zip(prompts, labels, strict=True)]
    padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=padding)
    return padded.masked_fill(padded == -100, padding)  # tokens that the teacher lacks


def create_folder(
    folder: Path, teacher: nn.Module, processor: Any, key: str, rows: PreparedRows | PlannedWindows, shard_size: int
) -> None:
    """Create a new cache without shards."""
    others = [path.name for path in folder.iterdir() if path.suffix != ".tmp"] if folder.exists() else []
    if others:
        raise ValueError(f"{folder} holds no teacher states but other files, such as {others[0]!r}: {_REMEDY}")
    temporary = folder / "teacher.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    layer = teacher_output_layer(teacher)
    header = {"version": FORMAT_VERSION, "teacher": key, "hidden_size": layer.in_features}
    header |= {"examples": len(rows), "shard_size": shard_size}
    header |= {"windows": rows.settings} if rows.settings else {}
    (temporary / "teacher.json").write_text(to_json(header), encoding="utf-8")
    (temporary / "output_layer.safetensors").write_bytes(save(layer.state_dict()))
    processor.save_pretrained(temporary / "processor")
    temporary.rename(folder / "teacher")


def _read(shard: Shard) -> datasets.Dataset:
    return require("datasets").Dataset.from_file(str(shard.path))
