"""Timing of benchmarks: interleaved steps, ratios within a round, bounds on ratios, and the machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

MILLION = 1e6


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count CPU time, not wall time: for a CPU shared with others, with OMP_NUM_THREADS=1",
    )


def time_steps(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    desc: str = "rounds",
) -> dict[str, list[float]]:
    """
    Time steps, each once a round in random order, so that other load on the machine affects all alike.

    Args:
        steps (`dict[str, Callable]`): Steps by name.
        rounds (`int`): Number of rounds.
        clock (`Callable`, *optional*): Returns seconds.
        desc (`str`, *optional*): Title of the progress bar.

    Returns:
        `dict[str, list[float]]`: Seconds by name, in the order of rounds.
    """
    seconds = {name: [] for name in steps}
    order = random.Random(0)
    for number in tqdm(range(rounds), desc=desc, unit="round", leave=False):
        for name in order.sample(list(steps), len(steps)):
            torch.manual_seed(number)  # all steps draw the same, such as skipped modules
            synchronize()
            start = clock()
            steps[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return seconds


def synchronize() -> None:
    """Waits for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> dict[str, float]:
    """Median and quartiles over rounds of the ratio of a step's time to the time of `reference`."""
    quartiles = np.quantile(np.divide(seconds[name], seconds[reference]), [0.25, 0.5, 0.75])
    return dict(zip(("lower", "median", "upper"), quartiles.tolist(), strict=True))


def format_ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['lower']:.2f} to {value['upper']:.2f})"


def check_bound(measured: float, method: str, reference: str, at_most: float) -> dict[str, Any]:
    """Compares a measured ratio of two methods with the expected maximum."""
    return {
        "method": method,
        "reference": reference,
        "ratio": measured,
        "at_most": at_most,
        "holds": measured <= at_most,
    }


def format_bound(bound: dict[str, Any]) -> str:
    where = f", {bound['workload']}" if "workload" in bound else ""
    verdict = "holds" if bound["holds"] else "DOES NOT HOLD"
    limit = f"at most {bound['at_most']} expected"
    return f"{bound['method']} to {bound['reference']}{where}: {bound['ratio']:.2f}, {limit}: {verdict}"


def machine(precision: str) -> dict[str, Any]:
    """Device, precision, cores, threads and versions of packages."""
    packages = ("torch", "transformers", "peft", "accelerate")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "precision": precision,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
