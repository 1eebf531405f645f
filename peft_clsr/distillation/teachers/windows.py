"""Windows of packed utterances with cached teacher states: those of the next epochs are fixed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ...data.packing import PackedUtterances
from ...data.teacher_columns import STATES_COLUMN
from .inputs import HASH_COLUMN, TeacherBatch, hash_tensors

if TYPE_CHECKING:
    import datasets

_SOUND_COLUMN = "sound"  # mean of each mel bin
# Features are computed anew in each epoch, and the same audio differs by 1e-6 on another CPU or with other threads.
_SOUND_TOLERANCE = 1e-4


class PlannedWindows:
    """
    The windows of the next epochs as rows, those of one epoch after the other.

    The marks of a row are a hash of its labels and prompt, and the mean of each mel bin.

    Args:
        packed ([`PackedUtterances`]): The windows.
        epochs (`int`): Number of epochs, from the first.
    """

    marks = {HASH_COLUMN: "string", _SOUND_COLUMN: "float32"}

    def __init__(self, packed: PackedUtterances, epochs: int) -> None:
        self.packed, self.epochs = packed, epochs

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all rows depend on."""
        return {**self.packed.settings(), "epochs": self.epochs}

    def __len__(self) -> int:
        return self.epochs * len(self.packed)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.packed.window(*divmod(row, len(self.packed)))

    def name(self, row: int) -> str:
        epoch, window = divmod(row, len(self.packed))
        return f"window {window} of epoch {epoch}"

    def batches(self, rows: range, batch_size: int) -> Iterator[TeacherBatch]:
        for start in range(0, len(rows), batch_size):
            batch_rows = rows[start : start + batch_size]
            inputs = [_teacher_inputs(self[row]) for row in batch_rows]
            features, labels, prompts = ([*column] for column in zip(*inputs, strict=True))
            hashes, sounds = zip(*(_marks(*one) for one in inputs), strict=True)
            yield TeacherBatch(
                batch_rows,
                features,
                labels,
                prompts,
                {HASH_COLUMN: [*hashes], _SOUND_COLUMN: [sound.numpy() for sound in sounds]},
            )

    def problem(
        self, rows: range, shard: datasets.Dataset, shards: Callable[[], list[datasets.Dataset]]
    ) -> str | None:
        """Say whether a shard is of other inputs, by its first row. Training checks each row that it takes."""
        return self.difference(rows.start, self[rows.start], shard[0])

    def difference(self, row: int, window: dict[str, Any], cached: dict[str, Any]) -> str | None:
        """Say whether cached states, with their marks, are of another window than that of a row."""
        digest, sound = _marks(*_teacher_inputs(window))
        if digest != cached[HASH_COLUMN]:
            return f"another text at {self.name(row)}"
        then = torch.as_tensor(cached[_SOUND_COLUMN], dtype=torch.float32)
        if then.shape != sound.shape or (then - sound).abs().max() > _SOUND_TOLERANCE:
            return f"other audio at {self.name(row)}"
        return None

    def with_states(self, states: datasets.Dataset) -> WindowsWithStates:
        return WindowsWithStates(self, states.with_format("torch"))


class WindowsWithStates(Dataset):
    """
    Windows of packed utterances, with `teacher_states`, in the epochs whose states are cached.

    Args:
        windows ([`PlannedWindows`]): The windows.
        states (`datasets.Dataset`): Marks and states of each, in torch format.

    Attributes:
        languages (`list[str]`): The language of each window.
        num_epochs (`int`): Epochs that have states.
    """

    def __init__(self, windows: PlannedWindows, states: datasets.Dataset) -> None:
        self._windows, self._states = windows, states
        self.languages = windows.packed.languages
        self.num_epochs = windows.epochs
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # with the workers of a DataLoader

    @property
    def column_names(self) -> list[str]:
        return [*self[0]]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the windows. Raises a `ValueError` for an epoch without states."""
        if epoch >= self.num_epochs:
            raise ValueError(
                f"the teacher's states are cached for {self.num_epochs} epochs, and epoch {epoch + 1} was asked for: "
                "train no longer, or cache more epochs (epochs=) in another cache_dir"
            )
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._windows.packed)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """
        Compute a window, and read its `teacher_states`.

        Raises:
            ValueError: the states are of other labels or other audio.
        """
        row = int(self._epoch) * len(self) + range(len(self))[index]
        window, cached = self._windows[row], self._states[row]
        difference = self._windows.difference(row, window, cached)
        if difference is not None:
            raise ValueError(
                f"the teacher's states were cached with {difference}: the recordings or transcripts have changed "
                "since; cache them again in another cache_dir"
            )
        return {**window, STATES_COLUMN: cached[STATES_COLUMN]}


def _teacher_inputs(window: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The teacher's features [mels, frames], labels [tokens] and prompt [tokens], empty without one."""

    def get(name: str) -> Any:
        return window.get(f"teacher_{name}", window.get(name, ()))

    features = torch.as_tensor(get("input_features"), dtype=torch.float32)
    labels, prompt = (torch.as_tensor(get(name), dtype=torch.long) for name in ("labels", "prompt_ids"))
    return features, labels, prompt


def _marks(features: torch.Tensor, labels: torch.Tensor, prompt: torch.Tensor) -> tuple[str, torch.Tensor]:
    return hash_tensors(labels, prompt), features.mean(dim=-1)
