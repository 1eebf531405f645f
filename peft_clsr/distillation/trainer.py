"""The distillation trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import CONFIG_NAME
from torch import nn
from torch.utils.data import DataLoader
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer_utils import has_length

from ..languages.adapters import adapter_of_language
from ..multilingual import check_model_languages
from ..tuner.adapter_names import adapter_folder, short_repr
from ..tuner.broader import warn_of_broader_adapters
from ..tuner.layer import CLSRLayer
from ..tuner.quantized import dequantized_weight
from ..tuner.wrapping import as_peft_model
from .arguments import DistillationTrainingArguments
from .batches import batch_sampler, stream_loader, trained_adapters, warn_of_unused_temperature
from .callbacks import EpochCallback, GateScheduleCallback
from .deepspeed import check_deepspeed
from .evaluation import EvaluatingTrainer
from .finite import FiniteChecks, finite_examples, finite_states, finite_targets
from .logged_sums import LoggedSums
from .losses import TeacherTargets, chunked_losses
from .output_layer import output_layer, replaced_output_layer
from .publishing import LanguagePublisher
from .resumption import last_checkpoint
from .step_budget import StepBudget, gate_mean
from .teachers.cache import TeacherStates
from .teachers.teacher import TEACHER_INPUTS, Teacher


class DistillationTrainer(LanguagePublisher, EvaluatingTrainer):
    """
    Trains CLSR adapters with labels, a frozen teacher and the gate budget (Ferraz et al., ICASSP 2024).

    The loss is `ce_weight · CE + budget_weight · L_budget + kd_weight · KD`. It is that of a whole optimizer step,
    whatever the number of batches and processes. CE and KD are means over the step's label tokens. L_budget is
    `|mean(g) - gate_budget|` over its routed tokens; several languages have one each, weighted by their tokens.
    Padding counts nowhere. Logits are computed in chunks of positions, so the logits of a whole batch are never in
    memory.

    Training logs `loss`, `ce_loss`, `kd_loss`, `budget_loss` (the parts without their weights) and `gate_mean`.
    Evaluation uses hard gates and logs the same with its prefix, over all tokens of the dataset. On several processes,
    the examples that fill up the last batch count twice, as in Trainer's own loss.

    If the dataset has several languages (in the column `language_column`), batches have one language each, and train
    only the adapter of that language. Adapters are found by name or by the `language` of their config.

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            The student: a Whisper with CLSR adapters. One whose adapters were added by transformers' own `add_adapter`
            is wrapped in a `PeftModel`, which shares their weights and saves in PEFT's folders.
        args ([`DistillationTrainingArguments`]): Arguments.
        teacher_model ([`~transformers.PreTrainedModel`] or [`TeacherStates`], *optional*):
            One of: another Whisper, also inside a `PeftModel`; `model` itself, so that its shared FFNs teach without a
            second copy in memory; or the result of `cache_teacher_states`, whose `dataset` is then `train_dataset`.
            The teacher is frozen and put into evaluation mode. It is moved to the student's device, unless it was
            loaded with a `device_map`. Without a teacher, `kd_loss` is 0.
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's processor, needed if its vocabulary differs from the student's (large-v3).
            `processing_class` must then be the student's. Distillation is over the tokens that both vocabularies
            have, matched by their strings. If the teacher takes other features, also give this processor to the
            collator or to `prepare_dataset`.
        kwargs: Further arguments of `Seq2SeqTrainer`: `train_dataset`, `eval_dataset`, `data_collator`, ...

    Raises:
        TypeError: `args` is of another class.
        ValueError:
            the model has no CLSR adapter; a `compute_loss_func` is given; the teacher does not fit; the training
            dataset is empty, lacks the language column, or has a language without an adapter; several GPUs without
            `accelerate launch`; ZeRO-3, or several languages with DeepSpeed. In `train`: a batch, the teacher, the
            student or a gradient is NaN or infinite; the step is not made, so the weights are the last good ones.

    Example:

    ```py
    >>> args = DistillationTrainingArguments(output_dir="runs/ca", learning_rate=5e-4, num_train_epochs=3)
    >>> trainer = DistillationTrainer(
    ...     model=model, args=args, teacher_model=teacher, train_dataset=dataset, data_collator=collator
    ... )
    >>> trainer.train()
    ```
    """

    # Trainer must not divide by the accumulation steps: compute_loss divides by the tokens of the whole step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        args: DistillationTrainingArguments,
        teacher_model: nn.Module | TeacherStates | None = None,
        teacher_processor: Any | None = None,
        **kwargs: Any,
    ) -> None:
        model = as_peft_model(model)
        if not isinstance(args, DistillationTrainingArguments):
            raise TypeError(f"args is a {type(args).__name__}, expected DistillationTrainingArguments")
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the distillation loss: use it with Seq2SeqTrainer")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would split batches with nn.DataParallel: start "
                "one process per GPU with `accelerate launch`, or use one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.teacher_model = teacher_model
        self._teacher = None
        if teacher_model is not None and args.kd_weight > 0:
            self._teacher = Teacher(teacher_model, model, kwargs.get("processing_class"), teacher_processor)
        self._trained_adapters = trained_adapters(model, kwargs.get("train_dataset"), args.language_column)
        self._set_trainable(model)
        super().__init__(model=model, args=args, **kwargs)
        if args.predict_with_generate and getattr(model.generation_config, "is_multilingual", True):
            check_model_languages(model)  # before the training, not at the first evaluation
        # Trainer then counts the label tokens of a step and passes their number to compute_loss.
        self.model_accepts_loss_kwargs = True
        if not any(isinstance(callback, GateScheduleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(GateScheduleCallback())
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.zero_stage, self._trained_adapters)
        if self._teacher is not None:
            if self._teacher.is_student and self.is_fsdp_enabled:
                raise ValueError("under FSDP the student cannot be its own teacher: load a second model as teacher")
            self._teacher.to(self.accelerator.device)
        self._budget = StepBudget(model, self.accelerator, args.average_tokens_across_devices)
        self._training_sums, self._evaluation_sums = LoggedSums(), LoggedSums()
        self._batches_to_count: list[dict[str, Any]] = []  # of an accumulated step, until its gates are counted
        self._adapters_of_step: set[str] = set()
        self._finite = FiniteChecks(self.accelerator)

    # ------------------------------------------------------------------ languages

    @property
    def _tuner(self) -> Any:
        return self.accelerator.unwrap_model(self.model).base_model

    def _set_trainable(self, model: PeftModel) -> None:
        """Train only the adapters of the dataset's languages. Without languages, PEFT trains the active adapter."""
        if self._trained_adapters:
            others = [name for name in model.peft_config if name not in self._trained_adapters]
            model.set_requires_grad(others, requires_grad=False)
            model.set_requires_grad(self._trained_adapters, requires_grad=True)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._set_trainable(self.accelerator.unwrap_model(self.model))

    def _adapter_names(self, inputs: dict[str, Any], labels: torch.Tensor) -> list[str]:
        """The adapter of each example of a batch. Removes the languages from `inputs`."""
        languages = inputs.pop("language", None)
        if languages is None and len(self._trained_adapters) > 1:
            raise ValueError(
                f"the batch has no 'language', and there are the adapters {', '.join(self._trained_adapters)} to "
                "train: set the collator's language_column to the dataset's column"
            )
        if languages is None:
            return [*self._trained_adapters, *self._tuner.active_adapters][:1] * len(labels)
        taken = {language: adapter_of_language(self._tuner.peft_config, language) for language in set(languages)}
        warn_of_broader_adapters(self._tuner.routing, self._tuner.peft_config, taken)
        return [taken[language] for language in languages]

    def get_train_dataloader(self) -> DataLoader:
        dataset, args = self.train_dataset, self.args
        is_grouped = args.train_sampling_strategy == "group_by_length"
        self.remove_callback(EpochCallback)  # of an earlier call of train()
        if dataset is not None and not has_length(dataset):
            # Not prepared by accelerate, which would distribute the batches over processes once more.
            has_languages = len(self._trained_adapters) > 1
            warn_of_unused_temperature(
                args, "a stream: leave it out, and mix the stream with datasets.interleave_datasets"
            )
            return stream_loader(dataset, args, self._train_batch_size, self.data_collator, has_languages)
        if dataset is None or (len(self._trained_adapters) < 2 and not is_grouped):
            self.add_callback(EpochCallback(dataset))
            warn_of_unused_temperature(args, "the training of one adapter: leave it out, or add one for each language")
            return super().get_train_dataloader()
        sampler = batch_sampler(dataset, args, self._train_batch_size)
        self.add_callback(EpochCallback(sampler, dataset))
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    # ------------------------------------------------------------------ the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        The loss of a batch: its share in the loss of the optimizer step.

        Args:
            model (`nn.Module`): The student.
            inputs (`dict`):
                The collator's batch: `input_features`, `labels` and further inputs of the model; `language`,
                `teacher_states`, `teacher_input_features` and `teacher_labels`, if there are any.
            return_outputs (`bool`, *optional*, defaults to `False`): Return the model's outputs, too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Label tokens of all batches (and processes) of the step. By default, the batch is a step of its own.

        Raises:
            ValueError: `inputs` have no labels.
        """
        self._check_labels(inputs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        adapter_names = self._adapter_names(inputs, labels)
        is_whole_step = not model.training or num_items_in_batch is None
        num_labels, processes = (labels != -100).sum(), 1
        if not is_whole_step:
            num_labels = torch.as_tensor(num_items_in_batch)
            self._adapters_of_step.update(adapter_names)
            if self.args.average_tokens_across_devices:  # Trainer sums tokens over processes, but averages gradients
                processes = self.accelerator.num_processes // self.get_tp_size()
        num_labels = num_labels.clamp(min=1)

        flags = self._finite.flags = {}
        for name in ("input_features", "teacher_input_features"):
            if inputs.get(name) is not None:
                flags[name.replace("teacher_", "teacher's ").replace("_", " ")] = finite_examples(inputs[name])
        targets = self._teacher_targets(inputs, labels, model.training)
        if targets is not None:
            flags["teacher's decoder states"] = finite_targets(targets, labels != -100)
        outputs, losses = self._student_losses(model, inputs, labels, adapter_names, targets, return_outputs)
        weighted_sum, ce_sum, kd_sum = losses
        gates = self._budget.batch_gates(adapter_names)
        budget_losses = self._budget.losses(gates, is_whole_step)
        budget_loss = self._budget.weighted_sum(budget_losses).to(weighted_sum.device)
        loss = processes * (weighted_sum / num_labels + budget_loss)
        for name, value in (("cross-entropy", ce_sum), ("distillation loss", kd_sum), ("budget loss", budget_loss)):
            flags[name] = value.detach().isfinite()

        if model.training and self.is_deepspeed_enabled:  # its backward pass makes the optimizer's step, too
            self._finite.end_batch(labels)
            self._finite.end_step(self.state.global_step, self._describe_example)
        if model.training:
            ce_loss, kd_loss = processes * ce_sum / num_labels, processes * kd_sum / num_labels
            self._add_to_training_log(ce_loss, kd_loss, processes * budget_losses.detach().sum(), gates.detach())
        else:
            sums = {"ce_sum": ce_sum, "kd_sum": kd_sum, "labels": num_labels, "gates": gates.detach()}
            self._evaluation_sums.add(**sums, labels_with_targets=num_labels * (targets is not None))
        return (loss, outputs) if return_outputs else loss

    def _check_labels(self, inputs: dict[str, Any]) -> None:
        """Raise a `ValueError` for a batch without labels, or with more of them than the student's decoder takes."""
        labels = inputs.get("labels")
        if labels is None:
            raise ValueError(f"the batch has no 'labels', only {', '.join(inputs)}: check the collator")
        limit = getattr(self._tuner.model.config, "max_target_positions", labels.shape[1])
        if labels.shape[1] > limit:
            lengths = (labels != -100).sum(dim=1)
            example = int(lengths.argmax())
            raise ValueError(
                f"example {example} of the batch has {lengths[example]} label tokens in {labels.shape[1]} positions "
                f"({self._describe_example(labels[example])}), but the student's decoder takes {limit} "
                f"(max_target_positions): drop such examples, with prepare_dataset(..., max_label_length={limit}), or "
                "split their audio and text"
            )

    def _teacher_targets(
        self, inputs: dict[str, Any], labels: torch.Tensor, is_training: bool
    ) -> TeacherTargets | None:
        """The teacher's targets for a batch. Removes the teacher's inputs from `inputs`."""
        teacher_inputs = {name: inputs.pop(name, None) for name in TEACHER_INPUTS}
        if self._teacher is None:
            return None
        with self.accelerator.autocast():
            return self._teacher.targets(
                inputs["input_features"],
                labels,
                is_training,
                decoder_input_ids=inputs.get("decoder_input_ids"),
                **teacher_inputs,
            )

    def _student_losses(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        adapter_names: list[str],
        targets: TeacherTargets | None,
        with_logits: bool,
    ) -> tuple[Any, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The student's outputs, whose `logits` are only computed if asked for, and the sums of `chunked_losses`."""
        losses = []

        def forward(hidden_states: torch.Tensor, to_logits: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            losses.append(self._losses(hidden_states, labels, targets, model.training))
            return to_logits(hidden_states) if with_logits else losses[0][0]

        return self._run_student(model, inputs, labels, adapter_names, forward), losses[0]

    def _run_student(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        adapter_names: list[str],
        output_forward: Callable[[torch.Tensor, Callable], torch.Tensor],
    ) -> Any:
        """
        The student's outputs, with `output_forward` in place of its output layer.

        `output_forward` takes decoder states [batch, tokens, hidden] and the output layer's own forward. It returns
        what becomes `outputs.logits`.
        """
        whisper = self.model.get_base_model()
        if "decoder_input_ids" not in inputs:
            config = whisper.config
            start = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
            inputs = {**inputs, "decoder_input_ids": start}
        # A copy: SpecAugment masks in place, and an accumulated step runs twice on the same features.
        features = inputs["input_features"].to(whisper.dtype, copy=True)
        inputs = {**inputs, "input_features": features}
        with (
            self._tuner.route_samples(adapter_names, labels),
            replaced_output_layer(
                self.model, lambda hidden_states: output_forward(hidden_states, to_logits)
            ) as to_logits,
        ):
            return model(**inputs)

    def _losses(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, targets: TeacherTargets | None, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`chunked_losses` of decoder states [batch, tokens, hidden]."""
        layer = output_layer(self.model)
        weight, bias = dequantized_weight(layer), layer.bias
        if targets is not None and targets.output_layer is None:  # the student is its own teacher
            targets = replace(targets, output_layer=partial(F.linear, weight=weight, bias=bias))
        is_label = labels != -100
        self._finite.flags["student's decoder states"] = finite_states(hidden_states.detach(), is_label)
        return chunked_losses(
            hidden_states[is_label],
            weight,
            bias,
            labels[is_label],
            targets,
            ce_weight=self.args.ce_weight,
            kd_weight=self.args.kd_weight,
            label_smoothing=self.args.label_smoothing_factor if is_training else 0.0,
            kind=self.args.kd_loss,
            temperature=self.args.temperature,
        )

    # ------------------------------------------------------------------ an optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_to_count = list(batches) if len(batches) > 1 and self._budget.has_weight else []
        return batches, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._check_labels(inputs)
        if self._batches_to_count:
            model.train()
            with self.compute_loss_context_manager():
                self._budget.count(self._batches_to_count, partial(self._run_for_gates, model))
            self._batches_to_count = []
        adapter_names = self._adapter_names(dict(inputs), inputs["labels"])
        # Around the backward pass too: gradient checkpointing runs the forward again there.
        with self._tuner.route_samples(adapter_names, inputs["labels"]):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if not self.is_deepspeed_enabled:
            self._finite.end_batch(inputs["labels"])
        if self.accelerator.sync_gradients:
            if not self.is_deepspeed_enabled:
                self._finite.end_step(self.state.global_step, self._describe_example)
            self._budget.end_step()
            self._drop_gradients_of_absent_adapters()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:  # Trainer calls it before each step
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self._finite.check_gradients(grad_norm, self.state.global_step, is_step_made=self.is_deepspeed_enabled)
        return grad_norm

    def _describe_example(self, labels: torch.Tensor) -> str:
        """The text of an example, or its labels [tokens] if there is no tokenizer, for an error message."""
        tokens = labels[labels != -100].tolist()
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if hasattr(tokenizer, "decode"):
            return f"its text is {short_repr(tokenizer.decode(tokens, skip_special_tokens=True))}"
        return f"its labels are {short_repr(tokens)}"

    def _run_for_gates(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Run the student on a batch for its gates alone; returns the adapter of each example."""
        self._check_labels(batch)
        inputs = dict(self._prepare_inputs(batch))
        labels = inputs.pop("labels")
        adapter_names = self._adapter_names(inputs, labels)
        inputs = {name: value for name, value in inputs.items() if name not in TEACHER_INPUTS}
        self._run_student(model, inputs, labels, adapter_names, lambda states, _: states.new_zeros(()))
        return adapter_names

    def _drop_gradients_of_absent_adapters(self) -> None:
        """
        Set the gradients of adapters to `None` that no process trained in this step.

        On several processes they are zeros, and momentum and weight decay would move the weights. On one process they
        are `None` already.
        """
        adapters, trained = list(self._tuner.peft_config), self._adapters_of_step
        self._adapters_of_step = set()
        if self.accelerator.num_processes == 1 or len(self._trained_adapters) < 2:
            return
        counts = torch.tensor([name in trained for name in adapters], device=self.accelerator.device)
        counts = self.accelerator.reduce(counts.float(), "sum")
        absent = [name for name, count in zip(adapters, counts.tolist(), strict=True) if not count]
        for layer in self._tuner.modules():
            if isinstance(layer, CLSRLayer):
                for parameter in layer.adapter_parameters(absent):
                    parameter.grad = None

    # ------------------------------------------------------------------ logs and evaluation

    def _add_to_training_log(
        self, ce_loss: torch.Tensor, kd_loss: torch.Tensor, budget_loss: torch.Tensor, gates: torch.Tensor
    ) -> None:
        """Add a batch's shares in the losses of its step, and its gates [2, adapters]."""
        batches = getattr(self, "current_gradient_accumulation_steps", 1)
        if self._budget.step_gates is None:  # not counted: `budget_loss` is that of the batch, not a share
            budget_loss = budget_loss / batches
        sums = {"ce_loss": ce_loss, "kd_loss": kd_loss, "budget_loss": budget_loss}
        self._training_sums.add(**sums, steps=1 / batches, gates=gates)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does. With `resume_from_checkpoint=True`, see [`last_checkpoint`]."""
        self._training_sums.clear()
        self._finite = FiniteChecks(self.accelerator)
        if resume_from_checkpoint is True:
            found = last_checkpoint(self.args.output_dir, self.accelerator.state)
            resume_from_checkpoint = found or True  # Trainer says that there is none
        return super().train(resume_from_checkpoint, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._training_sums.take(self.accelerator, "mean")
            if totals:
                gates, steps = totals.pop("gates"), totals.pop("steps")
                parts = {name: total / steps for name, total in totals.items()}
                parts["gate_mean"] = gate_mean(gates)
                logs.update({name: round(part.item(), 6) for name, part in parts.items()})
        super().log(logs, start_time)

    def _load_best_model(self) -> None:
        # Trainer looks in the checkpoint's top folder, where PEFT saves only an adapter named "default".
        checkpoint = Path(self.state.best_model_checkpoint)
        folders = {name: adapter_folder(checkpoint, name) for name in self.model.peft_config}
        folders = {name: folder for name, folder in folders.items() if (folder / CONFIG_NAME).is_file()}
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not folders:
            super()._load_best_model()
            return
        for name, folder in folders.items():
            self.model.load_adapter(str(folder), name, is_trainable=True)
        self._set_trainable(self.model)
