"""The distillation trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Seq2SeqTrainer
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data.sampler import LanguageBatchIterable, LanguageBatchSampler
from ..languages import adapter_of_language
from ..tuner.adapter_names import adapter_folder
from ..tuner.layer import CLSRLayer
from .arguments import DistillationTrainingArguments
from .callbacks import EpochCallback, GateScheduleCallback
from .language_batches import EndlessBatches, adapters_of_dataset, dataset_column
from .loss_sums import LossSums
from .losses import TeacherTargets, chunked_losses
from .output_layer import output_layer, replaced_output_layer
from .publishing import LanguagePublisher
from .step_budget import StepBudget
from .teachers.cache import TeacherStates
from .teachers.teacher import TEACHER_INPUTS, Teacher


class DistillationTrainer(LanguagePublisher, Seq2SeqTrainer):
    """
    Trains CLSR adapters with labels, a frozen teacher and the gate budget (Ferraz et al., ICASSP 2024):
    `ce_weight · CE + budget_weight · L_budget + kd_weight · KD`.

    Each part is that of a whole optimizer step, however many batches and processes it has. CE and KD are means over
    its label tokens. L_budget is `|mean(g) - gate_budget|` over its routed tokens. With several languages, each has
    its own L_budget, weighted by its tokens. Padding never counts. Logits are computed in chunks of positions, so the
    logits of a batch are never in memory together.

    Beside `loss`, training logs `ce_loss`, `kd_loss`, `budget_loss` (without their weights) and `gate_mean`.
    Evaluation uses hard gates and returns the same values with its prefix, over all tokens of the dataset. On several
    processes, the examples that fill the last batch count twice, as in Trainer's own loss.

    If the dataset has several languages (in the column `language_column`), each adapter trains only on the examples of
    its language, in batches of one language. An adapter is found by its name or by the `language` of its config.

    Args:
        model ([`~peft.PeftModel`]): The student: a Whisper with CLSR adapters.
        args ([`DistillationTrainingArguments`]): Arguments.
        teacher_model ([`~transformers.PreTrainedModel`] or [`TeacherStates`], *optional*):
            Any other Whisper, also inside a `PeftModel`; or `model` itself, whose shared FFNs then teach, without a
            second copy in memory; or the result of [`cache_teacher_states`], with its dataset as `train_dataset`. A
            teacher is frozen, put into evaluation mode and moved to the student's device, unless it was loaded with a
            `device_map`. Without a teacher, `kd_loss` is 0.
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's, if its vocabulary is not the student's (large-v3). Distillation is then over the common
            tokens, found by their strings, and `processing_class` must be the student's processor. If the teacher
            needs other features, pass its processor to the collator or to [`prepare_dataset`], too.
        kwargs: Further arguments of `Seq2SeqTrainer`: `train_dataset`, `eval_dataset`, `data_collator`, ...

    Raises:
        TypeError: `args` is of another class.
        ValueError:
            The model has no CLSR adapter; a `compute_loss_func` is given; the teacher does not fit; the training
            dataset is empty, lacks the language column, or has a language without an adapter; several GPUs without
            `accelerate launch`.

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
        teacher_model: nn.Module | TeacherStates | None = None,
        teacher_processor: Any | None = None,
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
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs are visible to one process, which would split batches by nn.DataParallel; run one "
                "process a GPU with `accelerate launch`, or show one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.teacher_model = teacher_model
        self._teacher = None
        if teacher_model is not None and args.kd_weight > 0:
            self._teacher = Teacher(teacher_model, model, kwargs.get("processing_class"), teacher_processor)
        self._trained_adapters = adapters_of_dataset(model, kwargs.get("train_dataset"), args.language_column)
        self._set_trainable(model)
        super().__init__(model=model, args=args, **kwargs)
        # Makes Trainer count the label tokens of a step and pass the number to compute_loss.
        self.model_accepts_loss_kwargs = True
        if not any(isinstance(callback, GateScheduleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(GateScheduleCallback())
        if self._teacher is not None:
            if self._teacher.is_student and self.is_fsdp_enabled:
                raise ValueError("under FSDP the student's base cannot run by itself: load the teacher a second time")
            self._teacher.to(self.accelerator.device)
        self._budget = StepBudget(self._tuner, self.accelerator, args.average_tokens_across_devices)
        self._training_sums = LossSums(self.accelerator)
        self._evaluation_sums = LossSums(self.accelerator)
        self._batches_to_count: list[dict[str, Any]] = []
        self._adapters_of_step: set[str] = set()

    # ------------------------------------------------------------------ languages

    @property
    def _tuner(self) -> Any:
        return self.accelerator.unwrap_model(self.model).base_model

    def _set_trainable(self, model: PeftModel) -> None:
        """Train the adapters of the dataset's languages, and no others. PEFT trains the active one."""
        if self._trained_adapters:
            others = [name for name in model.peft_config if name not in self._trained_adapters]
            model.set_requires_grad(others, requires_grad=False)
            model.set_requires_grad(self._trained_adapters, requires_grad=True)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._set_trainable(self.accelerator.unwrap_model(self.model))

    def _pop_adapter_names(self, inputs: dict[str, Any], labels: torch.Tensor) -> list[str]:
        """The adapter of each example of a batch. Removes the languages from `inputs`."""
        languages = inputs.pop("language", None)
        if languages is None and len(self._trained_adapters) > 1:
            raise ValueError(
                f"the batch has no 'language', and there are the adapters {', '.join(self._trained_adapters)} to "
                "train: let the collator pass it on (its language_column is the dataset's column)"
            )
        if languages is None:
            return [*self._trained_adapters, *self._tuner.active_adapters][:1] * len(labels)
        return [adapter_of_language(self._tuner.peft_config, language) for language in languages]

    def get_train_dataloader(self) -> DataLoader:
        dataset, args = self.train_dataset, self.args
        is_grouped = args.train_sampling_strategy == "group_by_length"
        if dataset is None or (len(self._trained_adapters) < 2 and not (is_grouped and has_length(dataset))):
            return super().get_train_dataloader()
        if not has_length(dataset):
            batches = LanguageBatchIterable(
                dataset, self._train_batch_size, args.language_column, args.world_size, args.process_index
            )
            workers = args.dataloader_num_workers
            return DataLoader(
                EndlessBatches(batches), batch_size=None, collate_fn=self.data_collator, num_workers=workers
            )
        sampler = LanguageBatchSampler(
            dataset_column(dataset, args.language_column) or ["all"] * len(dataset),
            self._train_batch_size,
            temperature=args.language_temperature,
            num_replicas=args.world_size,
            lengths=self._lengths(dataset) if is_grouped else None,
            shuffle=args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        self.remove_callback(EpochCallback)  # of an earlier call of train()
        self.add_callback(EpochCallback(sampler))
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
        )
        return self.accelerator.prepare(loader)

    def _lengths(self, dataset: Any) -> list[int]:
        """Lengths to group by: the column `length_column_name`, or numbers of labels. Features are equally long."""
        lengths = dataset_column(dataset, self.args.length_column_name)
        labels = dataset_column(dataset, "labels")
        if lengths is None and labels is None:
            raise ValueError(
                f"the dataset has neither {self.args.length_column_name!r} (length_column_name) nor 'labels' to group "
                "by their length: prepare it with prepare_dataset, or add the column"
            )
        return [len(row) for row in labels] if lengths is None else lengths

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Trainer would group evaluation by the length of the features, which is the number of mel bins.
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    # ------------------------------------------------------------------ the loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        Compute the share of a batch in the loss of its optimizer step.

        Args:
            model (`nn.Module`): The student.
            inputs (`dict`): `input_features`, `labels` and further inputs of the model; `language`, `teacher_states`,
                `teacher_input_features` and `teacher_labels` from the collator.
            return_outputs (`bool`, *optional*, defaults to `False`): Return the model's outputs, too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Label tokens of all batches (and processes) of the step. By default those of this batch.

        Raises:
            ValueError: `inputs` have no labels.
        """
        _check_labels(inputs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        adapter_names = self._pop_adapter_names(inputs, labels)
        is_step = model.training and num_items_in_batch is not None  # otherwise the batch stands alone
        num_labels, processes = (labels != -100).sum(), 1
        if is_step:
            num_labels = torch.as_tensor(num_items_in_batch)
            self._adapters_of_step.update(adapter_names)
            if self.args.average_tokens_across_devices:  # gradients are averaged over processes, tokens were added
                processes = self.accelerator.num_processes // self.get_tp_size()
        num_labels = num_labels.clamp(min=1)
        targets = self._teacher_targets(inputs, labels, model.training)
        losses: list[tuple[torch.Tensor, ...]] = []

        def output(hidden_states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            losses.append(self._losses(hidden_states, labels, targets, model.training))
            return logits_of(hidden_states) if return_outputs else losses[0][0]

        outputs = self._run_student(model, inputs, labels, adapter_names, output)
        weighted_sum, ce_sum, kd_sum = losses[0]
        gate_counts = self._budget.counts_of_last_forward(adapter_names)
        weighted_budget, budget_loss = self._budget.weighted_loss(gate_counts, is_step)
        loss = processes * (weighted_sum / num_labels + weighted_budget.to(weighted_sum.device))

        if model.training:
            batches = getattr(self, "current_gradient_accumulation_steps", 1)
            self._training_sums.add(
                ce_loss=processes * ce_sum / num_labels,
                kd_loss=processes * kd_sum / num_labels,
                # Gates that were not counted beforehand give a budget loss of each batch alone.
                budget_loss=processes * budget_loss / (1 if self._budget.is_counted else batches),
                steps=1 / batches,
                gates=gate_counts.detach(),
            )
        else:
            taught = num_labels * (targets is not None)
            self._evaluation_sums.add(
                ce_sum=ce_sum, kd_sum=kd_sum, labels=num_labels, taught=taught, gates=gate_counts.detach()
            )
        return (loss, outputs) if return_outputs else loss

    def _teacher_targets(
        self, inputs: dict[str, Any], labels: torch.Tensor, is_training: bool
    ) -> TeacherTargets | None:
        """The teacher's targets for a batch. Removes its inputs from `inputs`."""
        teacher_inputs = {name: inputs.pop(name, None) for name in TEACHER_INPUTS}
        if self._teacher is None:
            return None
        with self.accelerator.autocast():
            return self._teacher.targets(inputs["input_features"], labels, is_training, **teacher_inputs)

    def _run_student(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        adapter_names: list[str],
        output: Callable[..., torch.Tensor],
    ) -> Any:
        """
        Run the student with `output` instead of its output layer.

        Args:
            output (`Callable`): Gets the decoder states [batch, tokens, hidden], and a function from these to logits.

        Returns:
            The outputs of the model, with the result of `output` as `logits`.
        """
        whisper = self.model.get_base_model()
        if "decoder_input_ids" not in inputs:
            config = whisper.config
            start = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
            inputs = {**inputs, "decoder_input_ids": start}
        # SpecAugment masks in place, and accumulated batches run a second time with the same tensor.
        features = inputs["input_features"].to(whisper.dtype, copy=True)
        inputs = {**inputs, "input_features": features}
        with (
            self._tuner.route_samples(adapter_names, labels),
            replaced_output_layer(self.model, lambda hidden_states: output(hidden_states, logits_of)) as logits_of,
        ):
            return model(**inputs)

    def _losses(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, targets: TeacherTargets | None, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The weighted sum of CE and KD, CE, and KD, summed over the label positions of decoder states."""
        layer = output_layer(self.model)
        weight, bias = dequantize_module_weight(layer), layer.bias
        if targets is not None and targets.output_layer is None:  # the student's own base teaches
            targets = replace(targets, output_layer=partial(F.linear, weight=weight, bias=bias))
        is_label = labels != -100
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

    # ------------------------------------------------------------------ a training step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        has_budget = any(config.budget_weight for config in self._tuner.peft_config.values())
        self._batches_to_count = list(batches) if len(batches) > 1 and has_budget else []
        return batches, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        _check_labels(inputs)
        if self._batches_to_count:
            model.train()
            self._budget.start_step(self._count_gates(model, self._batches_to_count))
            self._batches_to_count = []
        adapter_names = self._pop_adapter_names(dict(inputs), inputs["labels"])
        # Also in the backward pass, where gradient checkpointing runs the forward again.
        with self._tuner.route_samples(adapter_names):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._budget.end_step()
            self._drop_gradients_of_absent_languages()
        return loss

    @torch.no_grad()
    def _count_gates(self, model: nn.Module, batches: list[dict[str, Any]]) -> torch.Tensor:
        """The gate counts [2, adapters] that the batches of a step will have, with the same random numbers."""
        total = torch.zeros((), device=self.accelerator.device)
        with _restored_randomness(self.accelerator.device), self.compute_loss_context_manager():
            for batch in batches:
                inputs = dict(self._prepare_inputs(batch))
                labels = inputs.pop("labels")
                adapter_names = self._pop_adapter_names(inputs, labels)
                inputs = {name: value for name, value in inputs.items() if name not in TEACHER_INPUTS}
                self._run_student(model, inputs, labels, adapter_names, lambda states, _: states.new_zeros(()))
                total = total + self._budget.counts_of_last_forward(adapter_names)
        return total

    def _drop_gradients_of_absent_languages(self) -> None:
        """
        Set the gradients of adapters that no process trained in this step to `None`. They are zeros, with which
        momentum and weight decay would still move the weights. On one process they are `None` already.
        """
        adapters, trained = list(self._tuner.peft_config), self._adapters_of_step
        self._adapters_of_step = set()
        if self.accelerator.num_processes == 1 or len(self._trained_adapters) < 2:
            return
        present = torch.tensor([name in trained for name in adapters], device=self.accelerator.device)
        present = self.accelerator.reduce(present.float(), "sum")
        absent = [name for name, count in zip(adapters, present.tolist(), strict=True) if not count]
        for layer in self._tuner.modules():
            if isinstance(layer, CLSRLayer):
                for parameter in layer.adapter_parameters(absent):
                    parameter.grad = None

    # ------------------------------------------------------------------ logs and evaluation

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._training_sums.clear()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._training_sums.reduce("mean")
            if totals:
                gate_sums, gate_counts = totals.pop("gates")
                steps = totals.pop("steps")
                parts = {name: total / steps for name, total in totals.items()}
                parts["gate_mean"] = gate_sums.sum() / gate_counts.sum().clamp(min=1)
                logs.update({name: round(part.item(), 6) for name, part in parts.items()})
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        if not prediction_loss_only and not self.args.predict_with_generate:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
        if prediction_loss_only:
            return loss, None, None
        student_inputs = ("input_features", "attention_mask", "language")
        student_inputs = {name: inputs[name] for name in student_inputs if name in inputs}
        adapter_names = self._pop_adapter_names(dict(inputs), inputs["labels"])
        with self._tuner.route_samples(adapter_names):
            _, tokens, _ = super().prediction_step(model, student_inputs, False, ignore_keys=ignore_keys, **gen_kwargs)
        return loss, tokens, inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluation_sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals = self._evaluation_sums.reduce("sum")
        if totals:
            labels, gates = totals["labels"].clamp(min=1), totals["gates"]
            budget_losses = self._budget.losses(gates, gates)
            weighted_budget = (self._budget.config_values("budget_weight", budget_losses) * budget_losses).sum()
            parts = {
                "ce_loss": totals["ce_sum"] / labels,
                "budget_loss": budget_losses.sum(),
                "gate_mean": gates[0].sum() / gates[1].sum().clamp(min=1),
            }
            parts["loss"] = self.args.ce_weight * parts["ce_loss"] + weighted_budget
            if totals["taught"] == totals["labels"] or self._teacher is None:
                parts["kd_loss"] = totals["kd_sum"] / labels
                parts["loss"] = parts["loss"] + self.args.kd_weight * parts["kd_loss"]
            output.metrics.update({f"{metric_key_prefix}_{name}": part.item() for name, part in parts.items()})
        return output

    def _load_best_model(self) -> None:
        # Trainer looks for weights in the checkpoint folder, where PEFT saves only an adapter named "default".
        checkpoint = Path(self.state.best_model_checkpoint)
        folders = {name: adapter_folder(checkpoint, name) for name in self.model.peft_config}
        folders = {name: folder for name, folder in folders.items() if (folder / CONFIG_NAME).is_file()}
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not folders:
            super()._load_best_model()
            return
        for name, folder in folders.items():
            self.model.load_adapter(str(folder), name, is_trainable=True)
        self._set_trainable(self.model)


def _check_labels(inputs: dict[str, Any]) -> None:
    if inputs.get("labels") is None:
        raise ValueError(f"the batch has no 'labels', only {', '.join(inputs)}: check the collator")


@contextmanager
def _restored_randomness(device: torch.device) -> Iterator[None]:
    """After the block, restore the random generators of torch and numpy (SpecAugment uses numpy's)."""
    state = np.random.get_state()
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(state)
