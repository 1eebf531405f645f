"""Arguments of the distillation trainer."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments

from .losses import KD_LOSSES


@dataclass
class DistillationTrainingArguments(Seq2SeqTrainingArguments):
    """
    Arguments of [`DistillationTrainer`]: those of `Seq2SeqTrainingArguments` and the ones below.

    The loss is `ce_weight · CE + budget_weight · L_budget + kd_weight · KD`, with `budget_weight` from the adapter's
    [`CLSRConfig`]. `label_smoothing_factor` smooths CE (the paper's reference implementation uses 0.1).

    Args:
        kd_loss (`str`, *optional*, defaults to `"js"`):
            Divergence between teacher and student: "js" (Jensen-Shannon) or "kl" (KL(teacher‖student)).
        kd_weight (`float`, *optional*, defaults to 2.0): Weight of the distillation loss, at least 0.
        ce_weight (`float`, *optional*, defaults to 1.0): Weight of the cross-entropy, at least 0.
        temperature (`float`, *optional*, defaults to 1.0): Divisor of the teacher's and student's logits, above 0.
        language_column (`str`, *optional*, defaults to `"language"`): The dataset's column of languages.
        language_temperature (`float`, *optional*, defaults to 1.0):
            Balances several languages, see [`LanguageBatchSampler`]. With 1 every example comes once an epoch, with
            `inf` every language as often as the largest. At least 1.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            As in `TrainingArguments`, where the default `True` would remove the collator's inputs.

    Raises:
        ValueError: a value outside of the range above.
    """

    _argument_group_name = "training"  # for the help of HfArgumentParser

    kd_loss: str = field(default="js", metadata={"help": "Divergence between teacher and student: 'js' or 'kl'."})
    kd_weight: float = field(default=2.0, metadata={"help": "Weight of the distillation loss, at least 0."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy, at least 0."})
    temperature: float = field(
        default=1.0, metadata={"help": "Divisor of the teacher's and student's logits, above 0."}
    )
    language_column: str = field(default="language", metadata={"help": "The dataset's column of languages."})
    language_temperature: float = field(
        default=1.0, metadata={"help": "Balances several languages: 1 not at all, inf fully."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Remove columns that the model's forward does not take."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.kd_loss not in KD_LOSSES:
            raise ValueError(f"kd_loss is {self.kd_loss!r}, expected one of {', '.join(KD_LOSSES)}")
        for name in ("kd_weight", "ce_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0 (0 turns that part off)")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, expected above 0 (1 leaves the logits as they are)")
        if not self.language_temperature >= 1:
            raise ValueError(
                f"language_temperature is {self.language_temperature}, expected at least 1 (1 takes every example "
                "once)"
            )
