"""The disks of a run on several machines."""

from __future__ import annotations

import uuid
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object


def processes_on_disk(folder: Path, process: PartialState) -> list[int]:
    """
    Find the processes that see the same folder as this one, in the order of their indices.

    All processes must call this. On each machine, one process writes a probe into the folder, and deletes it.

    Args:
        folder (`Path`): It is made, if it is not there and there are several processes.
        process (`PartialState`): This process.

    Returns:
        `list[int]`: Indices of processes, this one's among them.

    Raises:
        OSError: the folder cannot be made or written.
    """
    if process.num_processes == 1:
        return [process.process_index]
    token = broadcast_object_list([uuid.uuid4().hex])[0]
    probe = folder / f"process-{process.process_index}-{token}.tmp"
    if process.is_local_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    process.wait_for_everyone()
    seen = sorted(path.name for path in folder.glob(f"process-*-{token}.tmp"))
    everyone = gather_object([seen])  # after which all have looked
    probe.unlink(missing_ok=True)
    return [index for index, others in enumerate(everyone) if others == seen]
