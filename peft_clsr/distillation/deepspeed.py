"""Says what DeepSpeed cannot train."""

from __future__ import annotations

_REMEDY = "train with FSDP2 (accelerate launch --use_fsdp --fsdp_version 2), which has the weights of one process"


def check_deepspeed(zero_stage: int, adapters: list[str]) -> None:
    """
    Check that DeepSpeed can train some adapters.

    Args:
        zero_stage (`int`): Stage of ZeRO, 0 to 3.
        adapters (`list[str]`): Names of the adapters to train.

    Raises:
        ValueError: it cannot.
    """
    if zero_stage == 3:
        raise ValueError(
            "under ZeRO-3 all processes must call the same modules, as each call gathers weights, but gates choose "
            f"different ones on each process: use ZeRO-2, or {_REMEDY}"
        )
    if len(adapters) > 1:
        raise ValueError(
            "DeepSpeed makes the optimizer's step in the backward pass, with gradients of zero for languages that no "
            f"process had, so that momentum moves their weights: train {', '.join(adapters)} one after the other, or "
            f"{_REMEDY}"
        )
