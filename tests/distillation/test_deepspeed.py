"""DeepSpeed is refused where it cannot train. `tests/scripts/train_distributed.py --zero_stage 2` trains with it."""

import pytest

from peft_clsr.distillation.deepspeed import check_deepspeed


def test_what_deepspeed_cannot_train_is_refused_with_the_remedy():
    check_deepspeed(2, ["ca"])
    with pytest.raises(ValueError, match="all processes must call the same modules.*use ZeRO-2, or train"):
        check_deepspeed(3, ["ca"])
    with pytest.raises(ValueError, match="momentum moves their weights: train ca, uk one after the other, or train"):
        check_deepspeed(2, ["ca", "uk"])
