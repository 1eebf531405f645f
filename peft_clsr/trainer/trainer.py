"""The distillation trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
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
    of; padding (-100) counts in neither. The budget loss of a step is the mean of its batches', weighted by routed
    tokens, which is that of one large batch as long as the batches' gate means lie on one side of the budget. Beside
    `loss`, training logs `ce_loss`, `kd_loss`, `budget_loss` (all without their weights) and `gate_mean`; evaluation,
    with hard gates, gives the same with its prefix, over all tokens of the dataset.

    Args:
        model ([`~peft.PeftModel`]): A Whisper with an active CLSR adapter: the student.
        args ([`DistillationTrainingArguments`]): Arguments.
        teacher_model ([`~transformers.PreTrainedModel`], *optional*):
            A larger Whisper with the student's vocabulary and features. It is frozen, put into evaluation mode and
            moved to the student's device, unless it was loaded with a `device_map`. Without one, `kd_loss` is 0.
        kwargs: Further arguments of `Seq2SeqTrainer`: `train_dataset`, `eval_dataset`, `data_collator`, ...

    Raises:
        TypeError: `args` is of another class.
        ValueError:
            the model has no CLSR adapter; a `compute_loss_func` is given; the teacher has another vocabulary or other
            features, or is the student's own base model; several GPUs without `accelerate launch`.

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
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}, expected DistillationTrainingArguments")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the distillation loss: use Seq2SeqTrainer with it")
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
        budget_loss = self._tuner.budget_loss()
        config = self._tuner.peft_config[self._tuner.active_adapters[0]]
        gate_sum, gate_count = self._tuner.routing.gate_sum, self._tuner.routing.gate_count
        if num_items_in_batch is None or not model.training:  # in evaluation, a batch is for itself
            num_items, routed_share = (labels != -100).sum().clamp(min=1), 1.0
        else:
            num_items = num_items_in_batch
            routed_share = self._routed_tokens(inputs) / self._routed_tokens_in_step
            if self.args.average_tokens_across_devices:  # gradients are averaged over processes, tokens were added
                processes = self.accelerator.num_processes // self.get_tp_size()
                num_items, routed_share = num_items / processes, routed_share * processes
        loss = (
            self.args.ce_weight * ce_sum / num_items
            + self.args.kd_weight * kd_sum / num_items
            + config.budget_weight * routed_share * budget_loss.to(ce_sum.device)
        )

        if model.training:
            sums = self._training_sums
            sums["ce_loss"] += ce_sum.detach() / num_items
            sums["kd_loss"] += kd_sum.detach() / num_items
            sums["budget_loss"] += routed_share * budget_loss.detach()
            sums["gate_mean"] += routed_share * gate_sum / gate_count.clamp(min=1)
            sums["steps"] += 1 / self.current_gradient_accumulation_steps
        else:
            sums = self._evaluation_sums
            sums["ce_sum"] += ce_sum.detach()
            sums["kd_sum"] += kd_sum.detach()
            sums["labels"] += (labels != -100).sum()
            sums["gate_sum"] += gate_sum
            sums["gate_count"] += gate_count
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if num_items_in_batch is not None:
            routed = torch.as_tensor(sum(self._routed_tokens(batch) for batch in batches), device=device)
            if self.args.average_tokens_across_devices:
                routed = self.accelerator.reduce(routed, reduction="sum")
            self._routed_tokens_in_step = routed.clamp(min=1)
        return batches, num_items_in_batch

    def _routed_tokens(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tokens of a batch that pass a gate, those of each module counted."""
        mask, features = batch.get("attention_mask"), batch["input_features"]
        if mask is None:
            encoder_tokens = torch.as_tensor(features.shape[0] * (features.shape[-1] // 2))
        else:
            encoder_tokens = mask[:, ::2].sum()  # the encoder's second convolution has stride 2
        decoder_tokens = (batch["labels"] != -100).sum()
        encoder_modules, decoder_modules = self._tuner.routed_modules()
        return (encoder_modules * encoder_tokens.to(decoder_tokens.device) + decoder_modules * decoder_tokens).float()

    def _distillation_sum(self, student_logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        if self.teacher_model is None:
            return student_logits.new_zeros(())
        dtype = self.teacher_model.dtype
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
        with torch.no_grad(), self.accelerator.autocast():
            teacher_logits = self.teacher_model(**inputs).logits
        return distillation_sum(
            student_logits,
            teacher_logits.to(student_logits.device),
            inputs["labels"],
            kind=self.args.kd_loss,
            temperature=self.args.temperature,
        )

    def _take(self, sums: dict[str, torch.Tensor | float], reduction: str) -> dict[str, float]:
        """What `sums` gathered, reduced over all processes; empties `sums`."""
        names, device = list(sums), self.accelerator.device
        if not names:
            return {}
        values = torch.stack([torch.as_tensor(sums[name], dtype=torch.float32, device=device) for name in names])
        sums.clear()
        return dict(zip(names, self.accelerator.reduce(values, reduction=reduction).tolist(), strict=True))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._training_sums.clear()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._take(self._training_sums, "mean")
            steps = totals.pop("steps", 1.0)
            logs.update({name: round(total / steps, 6) for name, total in totals.items()})
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
        totals = self._take(self._evaluation_sums, "sum")
        if totals:
            config = self._tuner.peft_config[self._tuner.active_adapters[0]]
            labels, gate_count = max(totals["labels"], 1.0), max(totals["gate_count"], 1.0)
            parts = {"ce_loss": totals["ce_sum"] / labels, "kd_loss": totals["kd_sum"] / labels}
            parts["gate_mean"] = totals["gate_sum"] / gate_count
            parts["budget_loss"] = abs(parts["gate_mean"] - config.gate_budget)
            parts["loss"] = (
                self.args.ce_weight * parts["ce_loss"]
                + self.args.kd_weight * parts["kd_loss"]
                + config.budget_weight * parts["budget_loss"]
            )
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in parts.items()})
        return output

    def _load_best_model(self) -> None:
        # Trainer looks for the weights in the checkpoint itself, which is where PEFT puts an adapter "default" only.
        checkpoint = Path(self.state.best_model_checkpoint)
        folders = [(name, checkpoint / name) for name in self.model.peft_config if (checkpoint / name).is_dir()]
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not folders:
            super()._load_best_model()
            return
        for name, folder in folders:
            self.model.load_adapter(str(folder), name, is_trainable=True)


def _check_teacher(model: nn.Module, teacher: PreTrainedModel) -> None:
    """Raise a `ValueError` where the teacher's logits could not be compared with the student's."""
    if teacher is model or teacher is model.base_model.model:
        raise ValueError("the teacher is the student's own model, which training changes: load it a second time")
    generation = (
        "Take a teacher of the student's generation, such as whisper-large-v2 for whisper-base, -small and -medium "
        "(large-v3 and turbo differ)"
    )
    for name, meaning, effect, remedy in (
        ("vocab_size", "a vocabulary of", "their next-token distributions cannot be compared", generation),
        ("num_mel_bins", "a number of mel bins of", "it cannot hear the student's features", generation),
        (
            "max_source_positions",
            "an audio context (in positions of 20 ms) of",
            "it cannot hear the student's features",
            "Cut both alike, with set_audio_context(teacher, None, seconds)",
        ),
    ):
        ours, theirs = getattr(model.config, name, None), getattr(teacher.config, name, None)
        if ours != theirs:
            raise ValueError(f"the teacher has {meaning} {theirs}, the student of {ours}: {effect}. {remedy}")
