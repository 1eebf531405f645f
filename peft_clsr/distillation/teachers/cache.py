"""Cache of a teacher's decoder states for a whole dataset, on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from peft.utils import infer_device
from torch import nn

from ...data.packing import PackedUtterances
from ...evaluation.mode import evaluation_mode
from ..disks import processes_on_disk
from .forward import teacher_hash
from .inputs import PreparedRows, check_dataset, check_teacher, flatten_indices
from .shards import CacheFolder, create_folder, read_header
from .windows import PlannedWindows, WindowsWithStates

if TYPE_CHECKING:
    import datasets


@dataclass
class TeacherStates:
    """
    A teacher's cached decoder states, with its output layer and processor: all that distillation needs of it.

    Args:
        dataset (`datasets.Dataset` or `WindowsWithStates`):
            The prepared dataset, or the windows of the planned epochs, with the additional column `teacher_states`,
            see [`unflatten_states`].
        output_layer (`nn.Linear`): Frozen, from states to the teacher's logits.
        processor (`WhisperProcessor`): The teacher's processor.
    """

    dataset: datasets.Dataset | WindowsWithStates
    output_layer: nn.Linear
    processor: Any

    @property
    def hidden_size(self) -> int:
        return self.output_layer.in_features


def cache_teacher_states(
    dataset: datasets.Dataset | PackedUtterances,
    teacher: nn.Module,
    processor: Any,
    cache_dir: str | os.PathLike,
    *,
    epochs: int | None = None,
    batch_size: int = 8,
    shard_size: int = 1000,
) -> TeacherStates:
    """
    Run a teacher over a prepared dataset once, and save its decoder states in float16.

    A call resumes after the last complete shard if an earlier one was killed or the disk was full. A complete cache is
    opened without running the teacher. Under `accelerate launch`, each process computes its share of the shards;
    where machines do not share `cache_dir`, each machine computes all of them. If the dataset was shuffled, split or
    filtered, `datasets` first writes it in its new order.

    The windows of [`pack_utterances`] change in each epoch. The cache fixes those of the first `epochs`, and the
    training may have no more. If texts, audio or settings have changed since, the cache is refused.

    Args:
        dataset (`datasets.Dataset` or [`PackedUtterances`]):
            From `prepare_dataset` or `pack_utterances`. The teacher gets `teacher_input_features` and `teacher_labels`
            if they are there, and else `input_features` and `labels`.
        teacher (`nn.Module`):
            A Whisper, or a `PeftModel` around one. It runs in evaluation mode. If it is on the CPU (without a
            `device_map`), it is moved to the accelerator, if there is one, and stays there.
        processor (`WhisperProcessor`): The teacher's processor. It is saved with the states.
        cache_dir (`str` or `os.PathLike`): The cache's folder: one for each dataset and teacher.
        epochs (`int`, *optional*): For packed utterances, and only for them: epochs of the training.
        batch_size (`int`, *optional*, defaults to 8): Examples per forward pass.
        shard_size (`int`, *optional*, defaults to 1000): Examples per file. A resumed cache keeps its first size.

    Raises:
        TypeError: `dataset` is neither a `datasets.Dataset` nor a `PackedUtterances`.
        ValueError:
            `epochs` is missing, below 1, or given for a prepared dataset; the dataset is empty, not prepared, or not
            for this teacher; `processor` is not the teacher's; `cache_dir` has other files, or the states of another
            teacher, of other examples or windows, or in another order (it is not changed); the teacher's states of an
            example are not finite in float16 (complete shards are kept).
        OSError: the disk is full, or fails (complete shards are kept).
    """
    folder, process = Path(cache_dir), _process()
    rows = _rows(dataset, epochs)
    check_teacher(teacher, rows, processor)
    key = teacher_hash(teacher)
    peers = processes_on_disk(folder, process)  # that share the work
    with evaluation_mode(teacher):
        with process.local_main_process_first():
            rows = _flat(rows)
            if process.process_index == peers[0] and not (folder / "teacher").exists():
                create_folder(folder, teacher, processor, key, rows, shard_size)
        cache = CacheFolder(folder, rows, key)
        shards = cache.shards[peers.index(process.process_index) :: len(peers)]
        missing = [shard for shard in shards if not shard.path.exists()]
        cache.check([shard for shard in shards if shard not in missing])
        if missing:
            if next(teacher.parameters()).device.type == "cpu" and getattr(teacher, "hf_device_map", None) is None:
                teacher.to(process.device)
            cache.write(missing, teacher, batch_size)
    process.wait_for_everyone()
    return _open(cache)


def load_teacher_states(dataset: datasets.Dataset | PackedUtterances, cache_dir: str | os.PathLike) -> TeacherStates:
    """
    Open a complete cache of [`cache_teacher_states`] without its teacher.

    Args:
        dataset (`datasets.Dataset` or [`PackedUtterances`]):
            The prepared dataset: the same examples in the same order; or packed utterances of the same settings.
        cache_dir (`str` or `os.PathLike`): The cache's folder.

    Raises:
        TypeError: `dataset` is neither a `datasets.Dataset` nor a `PackedUtterances`.
        ValueError: `cache_dir` has no cache, an incomplete one, or that of another dataset.
    """
    process, folder = _process(), Path(cache_dir)
    rows = _rows(dataset, read_header(folder).get("windows", {}).get("epochs", 1) if _is_packed(dataset) else None)
    with process.local_main_process_first():
        rows = _flat(rows)
    cache = CacheFolder(folder, rows)
    if cache.num_cached < len(rows):
        raise ValueError(
            f"the cache in {cache_dir} is not complete, it holds the states of {cache.num_cached} of {len(rows)} "
            "examples: call cache_teacher_states with the teacher, which resumes it"
        )
    cache.check(cache.shards[process.process_index :: process.num_processes])
    return _open(cache)


def _is_packed(dataset: Any) -> bool:
    return isinstance(dataset, PackedUtterances)


def _rows(dataset: Any, epochs: int | None) -> PreparedRows | PlannedWindows:
    """The rows to cache. Raises a `TypeError` or `ValueError` for what cannot be cached."""
    if not _is_packed(dataset):
        check_dataset(dataset)
        if epochs is not None:
            raise ValueError(
                "epochs is for packed utterances, whose windows change: leave it out for a prepared dataset"
            )
        return PreparedRows(dataset)
    if epochs is None:
        raise ValueError("the windows of packed utterances change in each epoch: give epochs, those of the training")
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}, expected at least 1: the epochs of the training")
    return PlannedWindows(dataset, epochs)


def _flat(rows: PreparedRows | PlannedWindows) -> PreparedRows | PlannedWindows:
    return PreparedRows(flatten_indices(rows.dataset)) if isinstance(rows, PreparedRows) else rows


def _open(cache: CacheFolder) -> TeacherStates:
    return TeacherStates(cache.rows.with_states(cache.states()), cache.output_layer(), cache.processor())


def _process() -> PartialState:
    # Without an accelerator, accelerate finds the other processes only with cpu=True.
    return PartialState(cpu=infer_device() == "cpu")
