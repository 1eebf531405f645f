"""Two processes under `accelerate launch` (gloo, on the CPU)."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "scripts" / "train_distributed.py"


def train(output, processes, batch_size, skip_gate_prob):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--num_processes", str(processes), "--dynamo_backend", "no", "--main_process_port", "0"]
    # On processors, accelerate starts several processes by MPI, or else as if there were GPUs.
    command += ["--multi_gpu"] if processes > 1 else ["--cpu"]
    command += [SCRIPT, output, str(batch_size), str(skip_gate_prob)]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    with safe_open(output, "pt") as file:
        assert file.metadata()["processes"] == str(processes)
    return load_file(output)


def test_two_processes_give_the_weights_of_one_with_twice_the_batch(tmp_path):
    """CE and KD are means over the label tokens of both, of which the processes have unequal numbers."""
    one, two = train(tmp_path / "one", 1, 4, 0.0), train(tmp_path / "two", 2, 2, 0.0)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6, rtol=1e-5)


def test_skipped_gates_need_no_search_for_unused_parameters(tmp_path):
    weights = train(tmp_path / "two", 2, 2, 0.9)
    assert all(tensor.isfinite().all() for tensor in weights.values())
