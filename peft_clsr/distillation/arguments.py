"""Arguments of the distillation trainer."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field

import torch
from transformers import Seq2SeqTrainingArguments

from .losses import KD_LOSSES

_ERROR_RATE = re.compile(r"(eval_)?(error_rate|[wc]er(_\w+)?)")


def has_bfloat16_instructions() -> bool:
    """False if the CPU is an x86-64 one without bfloat16 instructions. True also where torch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.6
        return True
    found = torch.cpu.get_capabilities()
    return found["architecture"] != "x86_64" or found["avx512_bf16"] or found["amx_bf16"]


@dataclass
class DistillationTrainingArguments(Seq2SeqTrainingArguments):
    """
    Arguments of [`DistillationTrainer`], in addition to those of `Seq2SeqTrainingArguments`.

    The loss is `ce_weight · CE + budget_weight · L_budget + kd_weight · KD`, with `budget_weight` from the adapter's
    [`CLSRConfig`]. `label_smoothing_factor` smooths CE (the paper's reference implementation uses 0.1).

    Args:
        kd_loss (`str`, *optional*, defaults to `"js"`):
            Divergence between teacher and student: "js" (Jensen-Shannon) or "kl" (KL(teacher‖student)).
        kd_weight (`float`, *optional*, defaults to 32.0):
            Weight of the distillation loss, at least 0. The paper's is 2; validation chose 32 for a teacher of
            other recordings than its student's (docs/how-to/teachers.md).
        ce_weight (`float`, *optional*, defaults to 1.0): Weight of the cross-entropy, at least 0.
        temperature (`float`, *optional*, defaults to 1.0): Divides teacher's and student's logits; above 0.
        language_column (`str`, *optional*, defaults to `"language"`):
            Column of the dataset with each example's language.
        language_temperature (`float`, *optional*, defaults to 1.0):
            Sampling temperature of several languages, at least 1, see [`LanguageBatchSampler`]. At 1, an epoch has
            every example once. At `inf`, it has as many examples of each language as of the largest. It has no effect
            on a stream, and if one adapter is trained.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            As in `TrainingArguments`, where it is `True`. That would remove columns that the collator needs.
        greater_is_better (`bool`, *optional*):
            As in `TrainingArguments`, but `False` by default for the rates of [`make_compute_metrics`], such as
            "error_rate" and "wer_ca".

    Raises:
        ValueError: a value outside the range above.
    """

    _argument_group_name = "training"  # in the help of HfArgumentParser

    kd_loss: str = field(default="js", metadata={"help": "Divergence between teacher and student: 'js' or 'kl'."})
    kd_weight: float = field(default=32.0, metadata={"help": "Weight of the distillation loss, at least 0."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy, at least 0."})
    temperature: float = field(default=1.0, metadata={"help": "Divides teacher's and student's logits; above 0."})
    language_column: str = field(
        default="language", metadata={"help": "Column of the dataset with each example's language."}
    )
    language_temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature of several languages: 1 as in the data, inf all alike."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that the model's forward does not take."}
    )

    def __post_init__(self):
        # transformers would keep the worst weights.
        if self.greater_is_better is None and _ERROR_RATE.fullmatch(self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()
        if self.bf16 and self.use_cpu and not has_bfloat16_instructions():
            warnings.warn(
                "bf16 is set, but this CPU has no bfloat16 instructions: a step can take 25 times as long as in "
                "float32. Leave bf16 out",
                stacklevel=3,
            )
        if self.kd_loss not in KD_LOSSES:
            raise ValueError(f"kd_loss is {self.kd_loss!r}, expected one of {', '.join(KD_LOSSES)}")
        for name in ("kd_weight", "ce_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 (0 turns that loss off)")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected above 0 (1 does not change the logits)")
        if not self.language_temperature >= 1:
            raise ValueError(
                f"language_temperature is {self.language_temperature}, expected at least 1 (1 samples every "
                "example once)"
            )
