"""The distillation trainer."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput

from .arguments import DistillationTrainingArguments
from .callbacks import GateScheduleCallback
from .losses import cross_entropy_sum, distillation_sum


class DistillationTrainer(Seq2SeqTrainer):
    """
    Trains a CLSR adapter with labels, a frozen teacher's logits and the gate budget (Ferraz et al., ICASSP 2024):
    `ce_weight · CE + budget_weight · L_budget + kd_weight · KD`.

    CE and KD are means over the label tokens of a whole optimizer step, however many batches and processes it is made
    of; padding (-100) counts in neither. Beside `loss`, training logs `ce_loss`, `kd_loss`, `budget_loss` (all without
    their weights) and `gate_mean`; evaluation, with hard gates, gives the same with its prefix, over all tokens of the
    dataset.

    Args:
        model ([`~peft.PeftModel`]): A Whisper with an active CLSR adapter: the student.
        args ([`DistillationTrainingArguments`]): Arguments.
        teacher_model ([`~transformers.PreTrainedModel`], *optional*):
            A larger Whisper with the student's vocabulary and features. It is frozen, put into evaluation mode and
            moved to the student's device, unless it was loaded with a `device_map`. Without one, `kd_loss` is 0.
        kwargs: Further arguments of `Seq2SeqTrainer`: `train_dataset`, `eval_dataset`, `data_collator`, ...

    Raises:
        ValueError:
            the model has no CLSR adapter; the teacher has another vocabulary or other features, or is the student's
            own base model; several GPUs without `accelerate launch`.

    Example:

    ```py
    >>> args = DistillationTrainingArguments(output_dir="runs/ca", learning_rate=5e-4, num_train_epochs=3)
    >>> trainer = DistillationTrainer(
    ...     model=model, args=args, teacher_model=teacher, train_dataset=dataset, data_collator=collator
    ... )
    >>> trainer.train()
    ```
    """

    # compute_loss divides by the label tokens and batches of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: DistillationTrainingArguments,
        teacher_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(getattr(model, "base_model", None), "budget_loss"):
            raise ValueError(
                f"the model is a {type(model).__name__} without a CLSR adapter: wrap it with "
                "get_peft_model(model, CLSRConfig(...)) first"
            )
        if teacher_model is not None:
            _check_teacher(model, teacher_model)
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would split batches by nn.DataParallel; run one "
                "process a GPU with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        super().__init__(model=model, args=args, **kwargs)
        # Makes Trainer count the label tokens of a step and give the number to compute_loss.
        self.model_accepts_loss_kwargs = True
        if not any(isinstance(callback, GateScheduleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(GateScheduleCallback())
        self.teacher_model = teacher_model
        if teacher_model is not None:
            teacher_model.requires_grad_(False).eval()
            if getattr(teacher_model, "hf_device_map", None) is None:
                teacher_model.to(self.accelerator.device)
        self._training_sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._evaluation_sums: dict[str, torch.Tensor | float] = defaultdict(float)

    @property
    def _tuner(self) -> Any:
        return self.accelerator.unwrap_model(self.model).base_model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        The loss of a batch, as its share of the loss of an optimizer step.

        Args:
            model (`nn.Module`): The student.
            inputs (`dict`): `input_features`, `labels` and what else the model takes.
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the model's outputs too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Label tokens of all batches (and processes) of the step; those of this batch by default.

        Raises:
            ValueError: `inputs` have no labels.
        """
        if inputs.get("labels") is None:
            raise ValueError(f"the batch has no 'labels', only {', '.join(inputs)}: check the collator")
        labels = inputs["labels"]
        outputs = model(**inputs)
        ce_sum = cross_entropy_sum(outputs.logits, labels, self.args.label_smoothing_factor if model.training else 0.0)
        kd_sum = self._distillation_sum(outputs.logits, inputs)
        budget_loss, gate_mean = self._tuner.budget_loss(), self._tuner.gate_mean()

        tokens = (labels != -100).sum()
        if num_items_in_batch is None or not model.training:  # evaluation counts one batch
            num_items, parts = tokens.clamp(min=1), 1
        else:
            num_items, parts = num_items_in_batch, self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:  # gradients are averaged over the processes, tokens were added
                num_items = num_items / (self.accelerator.num_processes // self.get_tp_size())
        config = self._tuner.peft_config[self._tuner.active_adapters[0]]
        loss = (
            self.args.ce_weight * ce_sum / num_items
            + self.args.kd_weight * kd_sum / num_items
            + config.budget_weight * budget_loss.to(ce_sum.device) / parts
        )

        if model.training:
            sums, scale, weight = self._training_sums, num_items, 1 / parts
        else:
            sums, scale, weight = self._evaluation_sums, 1, tokens
        sums["ce_loss"] += ce_sum.detach() / scale
        sums["kd_loss"] += kd_sum.detach() / scale
        sums["budget_loss"] += budget_loss.detach() * weight
        sums["gate_mean"] += gate_mean * weight
        sums["weight"] += weight
        return (loss, outputs) if return_outputs else loss

    def _distillation_sum(self, student_logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if self.teacher_model is None:
            return student_logits.new_zeros(())
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_model(**inputs).logits
        return distillation_sum(
            student_logits,
            teacher_logits.to(student_logits.device),
            inputs["labels"],
            kind=self.args.kd_loss,
            temperature=self.args.temperature,
        )

    def _means(self, sums: dict[str, torch.Tensor | float], reduction: str) -> dict[str, float]:
        """Means of what `sums` gathered, over all processes; empties `sums`."""
        names = list(sums)
        if not names:
            return {}
        device = self.accelerator.device
        values = torch.stack([torch.as_tensor(sums[name], dtype=torch.float32, device=device) for name in names])
        totals = dict(zip(names, self.accelerator.reduce(values, reduction=reduction).tolist(), strict=True))
        sums.clear()
        weight = totals.pop("weight") or 1.0
        return {name: total / weight for name, total in totals.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({name: round(mean, 6) for name, mean in self._means(self._training_sums, "mean").items()})
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys, **gen_kwargs)
        if self.args.predict_with_generate and not prediction_loss_only and inputs.get("labels") is not None:
            # Seq2SeqTrainer generates and then takes the model's own loss, without distillation.
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs))
            step = (loss.detach(), *step[1:])
        return step

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluation_sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name, mean in self._means(self._evaluation_sums, "sum").items():
            output.metrics[f"{metric_key_prefix}_{name}"] = mean
        return output


def _check_teacher(model: nn.Module, teacher: PreTrainedModel) -> None:
    """Raise a `ValueError` where the teacher's logits could not be compared with the student's."""
    if teacher is model or teacher is model.base_model.model:
        raise ValueError("the teacher is the student's own model, which training changes: load it a second time")
    for name, meaning, remedy in (
        ("vocab_size", "a vocabulary of", "their next-token distributions cannot be compared"),
        ("num_mel_bins", "a number of mel bins of", "it cannot hear the student's features"),
    ):
        ours, theirs = getattr(model.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ValueError(
                f"the teacher has {meaning} {theirs}, the student of {ours}: {remedy}. Take a teacher of the "
                "student's generation, such as whisper-large-v2 for whisper-base, -small and -medium (large-v3 and "
                "turbo differ)"
            )
