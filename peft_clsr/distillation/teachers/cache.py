"""Cache of a teacher's decoder states for a whole dataset, on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from peft.utils import infer_device
from safetensors.torch import load_file, save
from torch import nn
from transformers import WhisperProcessor

from ...data.teacher_columns import STATES_COLUMN
from ...evaluation.mode import evaluation_mode
from ...extras import require
from ...files import read_json, to_json
from .forward import linear_layer, teacher_decoder_states, teacher_hash, teacher_output_layer
from .inputs import TeacherBatch, check_dataset, check_teacher, flatten_indices, input_hashes, teacher_batches

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 1
HASH_COLUMN = "fed"  # hash of the teacher's inputs, in each row of a shard

_REMEDY = "give another cache_dir, or delete this one"


@dataclass
class TeacherStates:
    """
    A teacher's cached decoder states, with its output layer and processor: all that distillation needs of it.

    Args:
        dataset (`datasets.Dataset`):
            The prepared dataset with the additional column `teacher_states`, see [`unflatten_states`].
        output_layer (`nn.Linear`): Frozen, from states to the teacher's logits.
        processor (`WhisperProcessor`): The teacher's processor.
    """

    dataset: datasets.Dataset
    output_layer: nn.Linear
    processor: Any

    @property
    def hidden_size(self) -> int:
        return self.output_layer.in_features


def cache_teacher_states(
    dataset: datasets.Dataset,
    teacher: nn.Module,
    processor: Any,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 8,
    shard_size: int = 1000,
) -> TeacherStates:
    """
    Run a teacher over a prepared dataset once, and save its decoder states in float16.

    A call resumes after the last complete shard if an earlier one was killed or the disk was full. A complete cache is
    opened without running the teacher. Under `accelerate launch`, each process computes its share of the shards. If
    the dataset was shuffled, split or filtered, `datasets` first writes it in its new order.

    Args:
        dataset (`datasets.Dataset`):
            From `prepare_dataset`. The teacher gets `teacher_input_features` and `teacher_labels` if they are there,
            and else `input_features` and `labels`.
        teacher (`nn.Module`):
            A Whisper, or a `PeftModel` around one. It runs in evaluation mode. If it is on the CPU (without a
            `device_map`), it is moved to the accelerator, if there is one, and stays there.
        processor (`WhisperProcessor`): The teacher's processor. It is saved with the states.
        cache_dir (`str` or `os.PathLike`): The cache's folder: one for each dataset and teacher.
        batch_size (`int`, *optional*, defaults to 8): Examples per forward pass.
        shard_size (`int`, *optional*, defaults to 1000): Examples per file. A resumed cache keeps its first size.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`.
        ValueError:
            the dataset is empty, not prepared, or not for this teacher; `processor` is not the teacher's; `cache_dir`
            has other files, or the states of another teacher, of other examples, or in another order (it is not
            changed); the teacher's states of an example are not finite in float16 (complete shards are kept).
        OSError: the disk is full, or fails (complete shards are kept).
    """
    folder, process = Path(cache_dir), _process()
    check_dataset(dataset)
    check_teacher(teacher, dataset, processor)
    key = teacher_hash(teacher)
    with evaluation_mode(teacher):
        with process.main_process_first():
            dataset = flatten_indices(dataset)
            if process.is_main_process and not (folder / "teacher").exists():
                _create(folder, teacher, processor, key, len(dataset), shard_size)
        cache = _Cache(folder, dataset, key)
        shards = cache.shards[process.process_index :: process.num_processes]
        missing = [shard for shard in shards if not shard.path.exists()]
        cache.check([shard for shard in shards if shard not in missing])
        if missing:
            if next(teacher.parameters()).device.type == "cpu" and getattr(teacher, "hf_device_map", None) is None:
                teacher.to(process.device)
            cache.write(missing, teacher, batch_size)
    process.wait_for_everyone()
    return cache.open()


def load_teacher_states(dataset: datasets.Dataset, cache_dir: str | os.PathLike) -> TeacherStates:
    """
    Open a complete cache of [`cache_teacher_states`] without its teacher.

    Args:
        dataset (`datasets.Dataset`): The prepared dataset: the same examples in the same order.
        cache_dir (`str` or `os.PathLike`): The cache's folder.

    Raises:
        TypeError: `dataset` is no `datasets.Dataset`.
        ValueError: `cache_dir` has no cache, an incomplete one, or that of another dataset.
    """
    process = _process()
    check_dataset(dataset)
    with process.main_process_first():
        dataset = flatten_indices(dataset)
    cache = _Cache(Path(cache_dir), dataset)
    if cache.num_cached < len(dataset):
        raise ValueError(
            f"the cache in {cache_dir} is not complete, it holds the states of {cache.num_cached} of {len(dataset)} "
            "examples: call cache_teacher_states with the teacher, which resumes it"
        )
    cache.check(cache.shards[process.process_index :: process.num_processes])
    return cache.open()


class _Shard(NamedTuple):
    path: Path
    rows: range


class _Cache:
    """
    A cache folder. It has `teacher/` (teacher.json, output_layer.safetensors and processor/), and shards such as
    states-00000-of-00012.arrow with the columns `teacher_states` and `fed`, the hash of the teacher's inputs. Each is
    written under a name that ends in ".tmp", and renamed when it is complete.
    """

    def __init__(self, folder: Path, dataset: datasets.Dataset, key: str | None = None) -> None:
        self.folder, self.dataset = folder, dataset
        try:
            header = read_json(folder / "teacher" / "teacher.json")
        except FileNotFoundError:
            raise ValueError(f"{folder} holds no teacher states: make them with cache_teacher_states") from None
        for what, found, expected in (
            ("of format version", header["version"], FORMAT_VERSION),
            ("of another teacher, of hash", header["teacher"], key or header["teacher"]),
            ("of another dataset, of length", header["examples"], len(dataset)),
        ):
            if found != expected:
                raise ValueError(f"the cache in {folder} is {what} {found}, expected {expected}: {_REMEDY}")
        starts = range(0, len(dataset), header["shard_size"])
        self.shards = [
            _Shard(
                folder / f"states-{number:05d}-of-{len(starts):05d}.arrow",
                range(start, min(start + starts.step, len(dataset))),
            )
            for number, start in enumerate(starts)
        ]

    @property
    def num_cached(self) -> int:
        """Examples in complete shards."""
        return sum(len(shard.rows) for shard in self.shards if shard.path.exists())

    def check(self, shards: list[_Shard]) -> None:
        """Raise a `ValueError` if these shards were computed from other inputs than the dataset's."""
        for shard in tqdm(shards, desc="checking teacher states", unit="shard", leave=False, disable=not shards):
            cached, expected = _read(shard)[HASH_COLUMN][:], input_hashes(self.dataset, shard.rows)
            if cached == expected:
                continue
            row = next(row for row, *pair in zip(shard.rows, cached, expected, strict=True) if pair[0] != pair[1])
            in_dataset = input_hashes(self.dataset, range(len(self.dataset)))
            in_cache = {digest for other in self.shards if other.path.exists() for digest in _read(other)[HASH_COLUMN]}
            is_reordered = in_cache.issubset(in_dataset)
            what = "the dataset's examples in another order" if is_reordered else "other examples than the dataset's"
            raise ValueError(f"the cache in {self.folder} is of {what}, first at row {row}: {_REMEDY}")

    def write(self, shards: list[_Shard], teacher: nn.Module, batch_size: int) -> None:
        """Run the teacher on the rows of these shards, and write them."""
        import pyarrow as pa  # installed with datasets

        datasets = require("datasets")
        columns = {STATES_COLUMN: datasets.List(datasets.Value("float16")), HASH_COLUMN: datasets.Value("string")}
        schema = datasets.Features(columns).arrow_schema
        total = sum(len(shard.rows) for shard in shards)
        with tqdm(total=total, desc="teacher states", unit="example") as progress:
            for shard in shards:
                temporary = shard.path.with_suffix(".tmp")
                try:
                    with open(temporary, "wb") as file:
                        with pa.ipc.new_stream(file, schema) as writer:
                            for batch in teacher_batches(self.dataset, shard.rows, batch_size):
                                states = [state.flatten().numpy() for state in self._states(batch, teacher)]
                                writer.write_batch(pa.record_batch([states, batch.hashes], schema))
                                progress.update(len(batch.rows))
                        file.flush()
                        os.fsync(file.fileno())
                    temporary.rename(shard.path)
                except OSError as error:
                    raise OSError(
                        f"{error}: the cache in {self.folder} is usable up to its last complete shard, it holds the "
                        f"states of {self.num_cached} of {len(self.dataset)} examples. Make room on the disk and call "
                        "cache_teacher_states again, which resumes it"
                    ) from error
                finally:
                    temporary.unlink(missing_ok=True)

    def _states(self, batch: TeacherBatch, teacher: nn.Module) -> Iterator[torch.Tensor]:
        """The teacher's states of each example, float16 [tokens, hidden]."""
        start, size = teacher.config.decoder_start_token_id, teacher.config.vocab_size
        # As in the collator: the model itself prepends the start token.
        labels = [ids[1:] if len(ids) and ids[0] == start else ids for ids in batch.labels]
        for row, ids in zip(batch.rows, labels, strict=True):
            if len(ids) == 0 or ids.max() >= size:
                raise ValueError(
                    f"{self._example_name(row)} has the labels {ids.tolist()}, expected at least one, all below "
                    f"{size} (the teacher's vocabulary): prepare_dataset(..., teacher_processor=...) maps them"
                )
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        states = teacher_decoder_states(teacher, torch.stack(batch.features), padded).half()
        for row, ids, state in zip(batch.rows, labels, states, strict=True):
            if not state[: len(ids)].isfinite().all():
                raise ValueError(
                    f"the teacher's states of {self._example_name(row)} are not finite in float16 (NaN, infinity or "
                    "above 65,504): check that example, and the teacher's precision (the range of bfloat16 and "
                    "float32 is larger)"
                )
            yield state[: len(ids)]

    def _example_name(self, row: int) -> str:
        text = f" ({self.dataset['text'][row]!r})" if "text" in self.dataset.column_names else ""
        return f"example {row}{text}"

    def open(self) -> TeacherStates:
        """Join the states to the dataset. The cache must be complete."""
        datasets = require("datasets")
        states = datasets.concatenate_datasets([_read(shard) for shard in self.shards]).select_columns(STATES_COLUMN)
        dataset = datasets.concatenate_datasets([self.dataset, states], axis=1, split=self.dataset.split)
        formatting = self.dataset.format
        dataset.set_format(**{**formatting, "columns": [*formatting["columns"], STATES_COLUMN]})
        tensors = load_file(self.folder / "teacher" / "output_layer.safetensors")
        return TeacherStates(
            dataset=dataset,
            output_layer=linear_layer(tensors["weight"], tensors.get("bias")),
            processor=WhisperProcessor.from_pretrained(self.folder / "teacher" / "processor"),
        )


def _create(folder: Path, teacher: nn.Module, processor: Any, key: str, num_examples: int, shard_size: int) -> None:
    """Create a new cache without shards."""
    others = [path.name for path in folder.iterdir() if path.suffix != ".tmp"] if folder.exists() else []
    if others:
        raise ValueError(f"{folder} holds no teacher states but other files, such as {others[0]!r}: {_REMEDY}")
    temporary = folder / "teacher.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    layer = teacher_output_layer(teacher)
    header = {"version": FORMAT_VERSION, "teacher": key, "hidden_size": layer.in_features}
    header |= {"examples": num_examples, "shard_size": shard_size}
    (temporary / "teacher.json").write_text(to_json(header), encoding="utf-8")
    (temporary / "output_layer.safetensors").write_bytes(save(layer.state_dict()))
    processor.save_pretrained(temporary / "processor")
    temporary.rename(folder / "teacher")


def _read(shard: _Shard) -> datasets.Dataset:
    return require("datasets").Dataset.from_file(str(shard.path))


def _process() -> PartialState:
    # Without an accelerator, accelerate finds the other processes only with cpu=True.
    return PartialState(cpu=infer_device() == "cpu")
