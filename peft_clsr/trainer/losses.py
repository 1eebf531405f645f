"""Loss mathematics, as plain functions of tensors. Sums, so that a trainer can divide by the tokens of all batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

KD_LOSSES = ("js", "kl")


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """
    Cross-entropy, summed over the label positions that are not -100.

    Args:
        logits (`torch.Tensor`): [batch, tokens, vocabulary]
        labels (`torch.Tensor`): int64 [batch, tokens]
        label_smoothing (`float`, *optional*, defaults to 0.0): The share of probability spread over the vocabulary.

    Returns:
        `torch.Tensor`: scalar, in nats.
    """
    return F.cross_entropy(
        _full_precision(logits).flatten(0, 1),
        labels.flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def distillation_sum(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    kind: str = "js",
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    Divergence of the next-token distributions p (teacher) and q (student), summed over label positions not -100, times
    `temperature²`, which keeps gradients of one size (Hinton et al., 2015).

    "js", Jensen-Shannon: `0.5 KL(p‖m) + 0.5 KL(q‖m)`, `m = (p + q) / 2` (Ferraz et al., 2024, eq. 6); "kl": `KL(p‖q)`.

    Args:
        student_logits (`torch.Tensor`): [batch, tokens, vocabulary]
        teacher_logits (`torch.Tensor`): [batch, tokens, vocabulary]
        labels (`torch.Tensor`): int64 [batch, tokens]
        kind (`str`, *optional*, defaults to `"js"`): "js" or "kl".
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits of both.

    Returns:
        `torch.Tensor`: scalar, in nats; "js" is at most `log 2` a token at temperature 1.

    Raises:
        ValueError: an unknown `kind`.
    """
    if kind not in KD_LOSSES:
        raise ValueError(f"distillation loss {kind!r} is not known; expected one of {', '.join(KD_LOSSES)}")
    kept = labels != -100
    log_q = (_full_precision(student_logits[kept]) / temperature).log_softmax(dim=-1)
    log_p = (_full_precision(teacher_logits[kept]) / temperature).log_softmax(dim=-1)
    if kind == "kl":
        divergence = _kl_sum(log_p, log_q)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        divergence = 0.5 * (_kl_sum(log_p, log_m) + _kl_sum(log_q, log_m))
    return divergence * temperature**2


def _kl_sum(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q), summed."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
