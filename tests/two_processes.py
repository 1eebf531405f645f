"""Two processes that work together (gloo, on the CPU), as `accelerate launch` starts them, but within a second.

They are copies of a process that has imported what takes seconds, and has done nothing else. Copies of the tests' own
process could not train: autograd refuses it once that has.
"""

import multiprocessing
import os
import socket

from torch.multiprocessing import start_processes

multiprocessing.set_forkserver_preload(
    ["datasets", "peft_clsr.distillation.trainer", "transformers.models.whisper.modeling_whisper"]
)


def run_in_two_processes(function, *arguments, machines=1):
    """Calls a function of a module in two processes, as on one machine or on two; raises what one of them raises."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment["LOCAL_WORLD_SIZE"] = str(2 // machines)
    start_processes(_call, (environment, function, arguments), nprocs=2, start_method="forkserver")


def _call(rank, environment, function, arguments):
    local_rank = rank % int(environment["LOCAL_WORLD_SIZE"])
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(local_rank))
    function(*arguments)
