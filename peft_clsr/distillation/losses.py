"""Losses as plain functions of tensors. They are sums, so that a trainer can divide by the tokens of all batches.

`cross_entropy_sum` and `distillation_sum` take logits. `chunked_losses` takes decoder states and computes both losses
chunk by chunk, so that the logits of a whole batch are never in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

KD_LOSSES = ("js", "kl")


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """
    Cross-entropy, summed over the label positions that are not -100.

    Args:
        logits (`torch.Tensor`): [..., tokens, vocabulary]
        labels (`torch.Tensor`): int64 [..., tokens]
        label_smoothing (`float`, *optional*, defaults to 0.0): Share of probability spread over the vocabulary.

    Returns:
        `torch.Tensor`: scalar, in nats.
    """
    return F.cross_entropy(
        _full_precision(logits).flatten(0, -2),
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
    Divergence of the next-token distributions p (teacher) and q (student), summed over the label positions that are
    not -100.

    The sum is multiplied by `temperature²`, so that gradients keep their size (Hinton et al., 2015).

    "js", Jensen-Shannon: `0.5 KL(p‖m) + 0.5 KL(q‖m)`, `m = (p + q) / 2` (Ferraz et al., 2024, eq. 6); "kl": `KL(p‖q)`.

    Args:
        student_logits (`torch.Tensor`): [..., tokens, vocabulary]
        teacher_logits (`torch.Tensor`): [..., tokens, vocabulary]. It gets no gradient.
        labels (`torch.Tensor`): int64 [..., tokens]
        kind (`str`, *optional*, defaults to `"js"`): "js" or "kl".
        temperature (`float`, *optional*, defaults to 1.0): Divides the logits of both.

    Returns:
        `torch.Tensor`: scalar, in nats; "js" is at most `log 2` a token at temperature 1.

    Raises:
        ValueError: an unknown `kind`.
    """
    kept = labels != -100
    return _divergence_sum(student_logits[kept], teacher_logits[kept], kind, temperature)


@dataclass
class TeacherTargets:
    """
    The teacher's targets for distillation at the label positions of a batch.

    Args:
        hidden_states (`torch.Tensor`): [positions, teacher hidden], the teacher's last decoder states.
        output_layer (`Callable`):
            Computes logits [n, teacher vocabulary] from states [n, teacher hidden]. For a module, states are cast to
            the dtype of its parameters; a plain function gets them as they are.
        student_ids (`torch.Tensor`, *optional*):
            int64 [common], the columns of the student's logits that are compared. By default all, in their order.
        teacher_ids (`torch.Tensor`, *optional*): int64 [common], the same tokens' columns of the teacher's logits.
        mask (`torch.Tensor`, *optional*): bool [positions], True where there is distillation. By default everywhere.
    """

    hidden_states: torch.Tensor
    output_layer: Callable[[torch.Tensor], torch.Tensor]
    student_ids: torch.Tensor | None = None
    teacher_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@torch.compiler.disable
def chunked_losses(
    hidden_states: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor | None,
    labels: torch.Tensor,
    targets: TeacherTargets | None = None,
    *,
    ce_weight: float = 1.0,
    kd_weight: float = 1.0,
    label_smoothing: float = 0.0,
    kind: str = "js",
    temperature: float = 1.0,
    # Fastest on a CPU with Whisper's vocabulary, at 240 MB. Smaller chunks read the weights more often. From 162
    # positions on, float32 [chunk, vocabulary] is above 32 MiB, and malloc maps it anew each time.
    chunk_size: int = 128,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Compute `ce_weight · CE + kd_weight · KD` from decoder states, in chunks of positions.

    CE is the `cross_entropy_sum` and KD the `distillation_sum` of the logits
    `hidden_states · output_weightᵀ + output_bias`. Only the logits of one chunk are in memory. The forward pass also
    computes the gradients, chunk by chunk, unless gradients are off; `backward` only scales them. If vocabularies
    differ, both distributions are normalized over the common tokens.

    Args:
        hidden_states (`torch.Tensor`): [positions, hidden], the student's, where labels are not -100.
        output_weight (`torch.Tensor`): [vocabulary, hidden]
        output_bias (`torch.Tensor` or `None`): [vocabulary]
        labels (`torch.Tensor`): int64 [positions], none of them -100.
        targets ([`TeacherTargets`], *optional*): Without them, or with `kd_weight` 0, there is no distillation.
        ce_weight (`float`, *optional*, defaults to 1.0): Weight of the cross-entropy.
        kd_weight (`float`, *optional*, defaults to 1.0): Weight of the distillation loss.
        label_smoothing (`float`, *optional*, defaults to 0.0): As in `cross_entropy_sum`.
        kind (`str`, *optional*, defaults to `"js"`): As in `distillation_sum`.
        temperature (`float`, *optional*, defaults to 1.0): As in `distillation_sum`.
        chunk_size (`int`, *optional*, defaults to 128): Positions in a chunk.

    Returns:
        `tuple` of three scalar `torch.Tensor`: the weighted sum, CE and KD, all summed over positions. Only the
        weighted sum has a gradient.

    Raises:
        ValueError: an unknown `kind`; inputs with different numbers of positions.
    """
    counts = {"hidden_states": len(hidden_states), "labels": len(labels)}
    if targets is not None:
        counts["targets.hidden_states"] = len(targets.hidden_states)
        if targets.mask is not None:
            counts["targets.mask"] = len(targets.mask)
    if len(set(counts.values())) > 1:
        described = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"the numbers of positions differ: {described}. Pick the same label positions of each")

    def chunk_sums(logits: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ce_sum = cross_entropy_sum(logits, labels[chunk], label_smoothing)
        if targets is None or kd_weight == 0:
            return ce_sum, logits.new_zeros(())
        student_logits, teacher_logits = _compared_logits(logits, targets, chunk)
        return ce_sum, _divergence_sum(student_logits, teacher_logits, kind, temperature)

    with_gradients = torch.is_grad_enabled()  # inside an autograd function it is always False
    return _ChunkedLosses.apply(
        hidden_states, output_weight, output_bias, chunk_sums, ce_weight, kd_weight, chunk_size, with_gradients
    )


class _ChunkedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        output_weight: torch.Tensor,
        output_bias: torch.Tensor | None,
        chunk_sums: Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]],
        ce_weight: float,
        kd_weight: float,
        chunk_size: int,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        leaves = [
            _leaf(tensor, is_wanted)
            for tensor, is_wanted in zip((hidden_states, output_weight, output_bias), wanted, strict=True)
        ]
        hidden_states, output_weight, output_bias = leaves
        ce_sum = hidden_states.new_zeros((), dtype=_at_least_float32(hidden_states.dtype))
        kd_sum = ce_sum.clone()
        with torch.set_grad_enabled(any(wanted)):
            # Cast once: autocast does not cache frozen weights and would cast them for each chunk.
            weight, bias = _autocast(output_weight), _autocast(output_bias)
            for start in range(0, len(hidden_states), chunk_size):
                chunk = slice(start, start + chunk_size)
                ce, kd = chunk_sums(_full_precision(F.linear(hidden_states[chunk], weight, bias)), chunk)
                if any(wanted):
                    (ce_weight * ce + kd_weight * kd).backward()
                ce_sum += ce.detach()
                kd_sum += kd.detach()
        ctx.save_for_backward(*(None if leaf is None else leaf.grad for leaf in leaves))
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return ce_weight * ce_sum + kd_weight * kd_sum, ce_sum, kd_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        gradients = (None if gradient is None else gradient * loss_gradient for gradient in ctx.saved_tensors)
        return *gradients, None, None, None, None, None


def _leaf(tensor: torch.Tensor | None, with_gradient: bool) -> torch.Tensor | None:
    """The tensor detached from the caller's graph, with zeros as its gradient."""
    if tensor is None:
        return None
    leaf = tensor.detach().requires_grad_(with_gradient)
    leaf.grad = torch.zeros_like(leaf) if with_gradient else None
    return leaf


def _compared_logits(
    student_logits: torch.Tensor, targets: TeacherTargets, chunk: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's logits of a chunk, [masked positions, common tokens], on the student's device."""
    device = student_logits.device
    states = targets.hidden_states[chunk]
    if targets.mask is not None:
        # Selected, not multiplied by 0: the states of other positions may be NaN.
        rows = targets.mask[chunk].nonzero().squeeze(-1)
        states = states.index_select(0, rows.to(states.device))
        student_logits = student_logits.index_select(0, rows.to(device))
    if targets.student_ids is not None:
        student_logits = student_logits.index_select(-1, targets.student_ids.to(device))
    with torch.no_grad():
        if isinstance(targets.output_layer, nn.Module):
            dtypes = (parameter.dtype for parameter in targets.output_layer.parameters())
            states = states.to(next((dtype for dtype in dtypes if dtype.is_floating_point), states.dtype))
        teacher_logits = targets.output_layer(states)
        if targets.teacher_ids is not None:
            teacher_logits = teacher_logits.index_select(-1, targets.teacher_ids.to(teacher_logits.device))
    return student_logits, teacher_logits.to(device)


def _divergence_sum(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, kind: str, temperature: float
) -> torch.Tensor:
    if kind not in KD_LOSSES:
        raise ValueError(f"distillation loss {kind!r} is not known; expected one of {', '.join(KD_LOSSES)}")
    log_q = (_full_precision(student_logits) / temperature).log_softmax(dim=-1)
    with torch.no_grad():
        log_p = (_full_precision(teacher_logits) / temperature).log_softmax(dim=-1)
    if kind == "kl":
        divergence = _kl_sum(log_p, log_q)
    else:
        with torch.no_grad():  # the gradient through m is zero: -sum((p + q) / 2m dm) = -sum(dm) = 0
            log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
            teacher_part = _kl_sum(log_p, log_m)
        divergence = 0.5 * (teacher_part + _kl_sum(log_q, log_m))
    return divergence * temperature**2


def _kl_sum(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p‖q), summed."""
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _full_precision(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(_at_least_float32(logits.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocast(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The weight in the dtype of the running autocast, if there is one."""
    if tensor is None or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
