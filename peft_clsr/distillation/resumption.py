"""Finds the checkpoint to resume a training from, on one machine or several."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"  # the last file of a checkpoint that the main process writes


def checkpoints(folder: str | Path) -> dict[int, Path]:
    """The checkpoints in the `output_dir` of a `Trainer`, by step. Other folders are left out, such as copies."""
    paths = {path.name.removeprefix("checkpoint-"): path for path in Path(folder).glob("checkpoint-*")}
    return {int(step): path for step, path in paths.items() if step.isdecimal() and path.is_dir()}


def last_checkpoint(folder: str | Path, process: PartialState) -> str | None:
    """
    Find the last checkpoint of a `Trainer` that each process can resume from; `None` if there is none.

    All processes must call this. A checkpoint that was not finished, because a process was killed while it was saved,
    is left out, with a warning.

    Args:
        folder (`str` or `Path`): The trainer's `output_dir`.
        process (`PartialState`): This process.

    Raises:
        ValueError: on each process, if there are checkpoints, but none that the disks of all machines have.
    """
    steps = checkpoints(folder)
    readable = {step for step, path in steps.items() if (path / _STATE).is_file()}
    name = f"rng_state_{process.process_index}.pth" if process.num_processes > 1 else "rng_state.pth"
    whole = {step for step in readable if zipfile.is_zipfile(steps[step] / name)}  # torch.save writes zip files
    everyone = gather_object([(readable, whole)]) if process.num_processes > 1 else [(readable, whole)]
    readable_by_all = set.intersection(*(one for one, _ in everyone))
    whole_of_all = set.intersection(*(one for _, one in everyone))
    if not readable_by_all:
        without = [index for index, (one, _) in enumerate(everyone) if not one]
        if len(without) < len(everyone):
            raise ValueError(
                f"the processes {', '.join(map(str, without)) or 'of all machines'} do not see the checkpoints of the "
                f"others in {folder}: use a folder that all machines share, or copy the last checkpoint to each, and "
                "train with save_on_each_node=True"
            )
        return None
    step = max(whole_of_all or readable_by_all)
    if process.process_index == 0 and step < max(steps):
        logger.warning(f"checkpoint-{max(steps)} in {folder} is not complete: the training resumes from step {step}")
    if process.process_index == 0 and not whole_of_all:
        logger.warning(
            f"{steps[step]} has no random state for each of {process.num_processes} processes (it was saved by "
            "another number of them, or as a model only): the training resumes, but not with the noise and batches "
            "that it would have had without a stop"
        )
    return str(steps[step])
