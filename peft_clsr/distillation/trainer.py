"""The distillation trainer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.utils import CONFIG_NAME
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler
from transformers import Seq2SeqTrainer
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..data.sampler import LanguageBatchIterable, LanguageBatchSampler
from ..languages import adapter_of_language
from ..tuner.adapter_names import adapter_folder
from ..tuner.layer import CLSRLayer
from .arguments import DistillationTrainingArguments
from .callbacks import EpochCallback, GateScheduleCallback
from .losses import Teaching, chunked_losses
from .output_layer import output_layer, replaced_output_layer
from .publishing import LanguagePublisher
from .teachers.cache import TeacherStates
from .teachers.teacher import TEACHER_INPUTS, Teacher


class DistillationTrainer(LanguagePublisher, Seq2SeqTrainer):
    """
    Trains CLSR adapters with labels, a frozen teacher and the gate budget (Ferraz et al., ICASSP 2024):
    `ce_weight · CE + budget_weight · L_budget + kd_weight · KD`.

    All parts are those of a whole optimizer step, however many batches and processes it is made of: CE and KD are
    means over its label tokens, and L_budget is `|mean(g) - gate_budget|` over its routed tokens, of each language by
    itself where there are several, weighted by their tokens. Padding counts nowhere. Logits are made in chunks of
    positions and never stand in memory as a whole.

    Beside `loss`, training logs `ce_loss`, `kd_loss`, `budget_loss` (all without their weights) and `gate_mean`;
    evaluation, with hard gates, gives the same with its prefix, over all tokens of the dataset (on several processes,
    examples that fill the last batch up count twice, as in Trainer's own loss).

    A dataset of several languages (in the column `language_column`) trains the adapter of each on its own examples
    alone, in batches of one language. Adapters are found by name or by the `language` of their config.

    Args:
        model ([`~peft.PeftModel`]): A Whisper with CLSR adapters: the student.
        args ([`DistillationTrainingArguments`]): Arguments.
        teacher_model ([`~transformers.PreTrainedModel`] or [`TeacherStates`], *optional*):
            Any other Whisper, also inside a `PeftModel`; `model` itself, whose shared FFNs alone then teach, without a
            second copy in memory; or what `cache_teacher_states` stored of a teacher, with its dataset as
            `train_dataset`. A teacher is frozen, put into evaluation mode and moved to the student's device, unless it
            was loaded with a `device_map`. Without one, `kd_loss` is 0.
        teacher_processor (`WhisperProcessor`, *optional*):
            The teacher's, where its vocabulary is not the student's (large-v3): distillation is then over the tokens
            that both have, found by their strings; `processing_class` must be the student's. Where it hears other
            features, give it to the collator or to `prepare_dataset` too.
        kwargs: Further arguments of `Seq2SeqTrainer`: `train_dataset`, `eval_dataset`, `data_collator`, ...

    Raises:
        TypeError: `args` is of another class.
        ValueError:
            the model has no CLSR adapter; a `compute_loss_func` is given; the teacher does not fit; the training
            dataset is empty, lacks the language column, or holds a language that has no adapter; several GPUs without
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
        self._trained_adapters = _trained_adapters(model, kwargs.get("train_dataset"), args.language_column)
        self._set_trainable(model)
        super().__init__(model=model, args=args, **kwargs)
        # Makes Trainer count the label tokens of a step and give the number to compute_loss.
        self.model_accepts_loss_kwargs = True
        if not any(isinstance(callback, GateScheduleCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(GateScheduleCallback())
        if self._teacher is not None:
            if self._teacher.is_student and self.is_fsdp_enabled:
                raise ValueError("under FSDP the student's base cannot run by itself: load the teacher a second time")
            self._teacher.to(self.accelerator.device)
        self._training_sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._evaluation_sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._batches_of_step: list[dict[str, Any]] = []
        self._gates_of_step: torch.Tensor | None = None
        self._adapters_of_step: set[str] = set()

    # ------------------------------------------------------------------ languages

    @property
    def _tuner(self) -> Any:
        return self.accelerator.unwrap_model(self.model).base_model

    def _set_trainable(self, model: PeftModel) -> None:
        """Train the adapters of the dataset's languages, and no others; PEFT trains the active one."""
        if self._trained_adapters:
            others = [name for name in model.peft_config if name not in self._trained_adapters]
            model.set_requires_grad(others, requires_grad=False)
            model.set_requires_grad(self._trained_adapters, requires_grad=True)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_checkpoint(*args, **kwargs)
        self._set_trainable(self.accelerator.unwrap_model(self.model))

    def _adapter_names(self, inputs: dict[str, Any], labels: torch.Tensor) -> list[str]:
        """The adapter of each example of a batch; takes the languages out of `inputs`."""
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
        grouped = args.train_sampling_strategy == "group_by_length"
        if dataset is None or (len(self._trained_adapters) < 2 and not (grouped and has_length(dataset))):
            return super().get_train_dataloader()
        if not has_length(dataset):
            batches = LanguageBatchIterable(
                dataset, self._train_batch_size, args.language_column, args.world_size, args.process_index
            )
            workers = args.dataloader_num_workers
            return DataLoader(_Passes(batches), batch_size=None, collate_fn=self.data_collator, num_workers=workers)
        sampler = LanguageBatchSampler(
            _column(dataset, args.language_column) or ["all"] * len(dataset),
            self._train_batch_size,
            temperature=args.language_temperature,
            num_replicas=args.world_size,
            lengths=self._lengths(dataset) if grouped else None,
            shuffle=args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        self._follow_epochs(sampler)
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
        """Lengths to group by: the column that the arguments name, or else numbers of labels (features are equal)."""
        lengths, labels = _column(dataset, self.args.length_column_name), _column(dataset, "labels")
        if lengths is None and labels is None:
            raise ValueError(
                f"the dataset has neither {self.args.length_column_name!r} (length_column_name) nor 'labels' to group "
                "by their length: prepare it with prepare_dataset, or add the column"
            )
        return [len(row) for row in labels] if lengths is None else lengths

    def _follow_epochs(self, sampler: Any) -> None:
        self.remove_callback(EpochCallback)  # of an earlier call of train()
        self.add_callback(EpochCallback(sampler))

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
        The loss of a batch, as its share of the loss of an optimizer step.

        Args:
            model (`nn.Module`): The student.
            inputs (`dict`): `input_features`, `labels` and what else the model takes; `language`, `teacher_states`,
                `teacher_input_features` and `teacher_labels` as the collator makes them.
            return_outputs (`bool`, *optional*, defaults to `False`): Whether to return the model's outputs too.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Label tokens of all batches (and processes) of the step; those of this batch by default.

        Raises:
            ValueError: `inputs` have no labels.
        """
        _check_labels(inputs)
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        adapter_names = self._adapter_names(inputs, labels)
        is_step = model.training and num_items_in_batch is not None  # else the batch is for itself
        num_items, processes = (labels != -100).sum(), 1
        if is_step:
            num_items = torch.as_tensor(num_items_in_batch)
            self._adapters_of_step.update(adapter_names)
            if self.args.average_tokens_across_devices:  # gradients are averaged over processes, tokens were added
                processes = self.accelerator.num_processes // self.get_tp_size()
        num_items = num_items.clamp(min=1)
        of_teacher = {name: inputs.pop(name, None) for name in TEACHER_INPUTS}
        teaching = None
        if self._teacher is not None:
            with self.accelerator.autocast():
                teaching = self._teacher.teaching(inputs["input_features"], labels, model.training, **of_teacher)
        losses: list[tuple[torch.Tensor, ...]] = []

        def output(hidden_states: torch.Tensor, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            losses.append(self._losses(hidden_states, labels, teaching, model.training))
            return logits_of(hidden_states) if return_outputs else losses[0][0]

        outputs = self._run_student(model, inputs, labels, adapter_names, output)
        weighted_sum, ce_sum, kd_sum = losses[0]

        gates = self._gates_by_adapter(adapter_names)
        if not is_step:
            of_step = gates.detach()
        elif self._gates_of_step is not None:
            of_step = self._gates_of_step
        else:
            of_step = self._over_processes(gates.detach())
        budget_losses = self._budget_losses(gates, of_step)
        weights = self._of_configs("budget_weight", budget_losses)
        loss = processes * (weighted_sum / num_items + (weights * budget_losses).sum().to(weighted_sum.device))

        sums = self._training_sums if model.training else self._evaluation_sums
        if model.training:
            sums["ce_loss"] += processes * ce_sum / num_items
            sums["kd_loss"] += processes * kd_sum / num_items
            batches = getattr(self, "current_gradient_accumulation_steps", 1)
            # Without a budget to hold, batches are not counted beforehand, and each is the whole for itself.
            whole = 1 if self._gates_of_step is not None else batches
            sums["budget_loss"] += processes * budget_losses.detach().sum() / whole
            sums["steps"] += 1 / batches
        else:
            sums["ce_sum"] += ce_sum
            sums["kd_sum"] += kd_sum
            sums["labels"] += num_items
            sums["taught"] += num_items * (teaching is not None)
        sums["gates"] += gates.detach()
        return (loss, outputs) if return_outputs else loss

    def _run_student(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        adapter_names: list[str],
        output: Callable[..., torch.Tensor],
    ) -> Any:
        """
        The student's outputs, whose `logits` are what `output` makes of decoder states [batch, tokens, hidden] and the
        function that would make logits of them.
        """
        whisper = self.model.get_base_model()
        if "decoder_input_ids" not in inputs:
            config = whisper.config
            start = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
            inputs = {**inputs, "decoder_input_ids": start}
        # A copy: SpecAugment masks in place, and the next pass over an accumulated step hears the same tensor.
        features = inputs["input_features"].to(whisper.dtype, copy=True)
        inputs = {**inputs, "input_features": features}
        with (
            self._tuner.route_samples(adapter_names, labels),
            replaced_output_layer(self.model, lambda hidden_states: output(hidden_states, logits_of)) as logits_of,
        ):
            return model(**inputs)

    def _losses(
        self, hidden_states: torch.Tensor, labels: torch.Tensor, teaching: Teaching | None, is_training: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """CE and KD, weighted and each by itself, summed over the label positions of decoder states."""
        layer = output_layer(self.model)
        weight, bias = dequantize_module_weight(layer), layer.bias
        if teaching is not None and teaching.output_layer is None:  # the student's own base teaches
            teaching = replace(teaching, output_layer=partial(F.linear, weight=weight, bias=bias))
        kept = labels != -100
        return chunked_losses(
            hidden_states[kept],
            weight,
            bias,
            labels[kept],
            teaching,
            ce_weight=self.args.ce_weight,
            kd_weight=self.args.kd_weight,
            label_smoothing=self.args.label_smoothing_factor if is_training else 0.0,
            kind=self.args.kd_loss,
            temperature=self.args.temperature,
        )

    # ------------------------------------------------------------------ the gate budget of a whole step

    def _gates_by_adapter(self, adapter_names: list[str]) -> torch.Tensor:
        """Of the last forward, float32 [2, adapters]: the sum of the gate values, and the number of routed tokens."""
        adapters, routing = list(self._tuner.peft_config), self._tuner.routing
        if routing.gate_sums is None:
            return torch.zeros(2, len(adapters), device=self.accelerator.device)
        of_samples = torch.stack([routing.gate_sums, routing.gate_counts])  # [2, batch]
        index = torch.tensor([adapters.index(name) for name in adapter_names], device=of_samples.device)
        return of_samples.new_zeros(2, len(adapters)).index_add(1, index, of_samples)

    def _of_configs(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A number of each adapter's config, [adapters]."""
        return like.new_tensor([getattr(config, name) for config in self._tuner.peft_config.values()])

    def _budget_losses(self, gates: torch.Tensor, of_step: torch.Tensor) -> torch.Tensor:
        """
        The share of a batch in each adapter's `|mean(g) - b|` of the step, weighted by its share of the routed tokens.

        With the side that the step's mean is on known, the absolute value is linear, and shares add up exactly.

        Args:
            gates (`torch.Tensor`): [2, adapters], sums and counts of the batch.
            of_step (`torch.Tensor`): [2, adapters], the same of all batches of the step, on all processes.

        Returns:
            `torch.Tensor`: [adapters], with the graph of `gates`.
        """
        budgets = self._of_configs("gate_budget", gates)
        sums, counts = of_step
        sides = (sums / counts.clamp(min=1) - budgets).sign()
        return sides * (gates[0] - budgets * gates[1]) / counts.sum().clamp(min=1)

    def _over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, "sum") if self.args.average_tokens_across_devices else value

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        has_budget = any(config.budget_weight for config in self._tuner.peft_config.values())
        self._batches_of_step = list(batches) if len(batches) > 1 and has_budget else []
        return batches, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, torch.Tensor | Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        _check_labels(inputs)
        if self._batches_of_step:
            # Which side of the budget an accumulated step is on must be known before its first backward pass.
            model.train()
            self._gates_of_step = self._count_gates(model, self._batches_of_step)
            self._batches_of_step = []
        adapter_names = self._adapter_names(dict(inputs), inputs["labels"])
        # Through the backward pass too, in which gradient checkpointing runs the forward again.
        with self._tuner.route_samples(adapter_names):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients:
            self._gates_of_step = None
            self._keep_absent_languages()
        return loss

    @torch.no_grad()
    def _count_gates(self, model: nn.Module, batches: list[dict[str, Any]]) -> torch.Tensor:
        """Sums and counts of the gates [2, adapters] that the batches of a step will have: the same randomness."""
        total = torch.zeros((), device=self.accelerator.device)
        with _restored_randomness(self.accelerator.device), self.compute_loss_context_manager():
            for batch in batches:
                inputs = dict(self._prepare_inputs(batch))
                labels = inputs.pop("labels")
                adapter_names = self._adapter_names(inputs, labels)
                inputs = {name: value for name, value in inputs.items() if name not in TEACHER_INPUTS}
                self._run_student(model, inputs, labels, adapter_names, lambda states, _: states.new_zeros(()))
                total = total + self._gates_by_adapter(adapter_names)
        return self._over_processes(total)

    def _keep_absent_languages(self) -> None:
        """
        Take the gradients of adapters that no process trained in this step: they are zeros, with which momentum and
        weight decay would move the weights all the same. Without other processes they have none.
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

    def _take(self, sums: dict[str, torch.Tensor | float], reduction: str) -> dict[str, torch.Tensor]:
        """What `sums` gathered, reduced over all processes; empties `sums`."""
        device = self.accelerator.device
        totals = {name: torch.as_tensor(value, dtype=torch.float32, device=device) for name, value in sums.items()}
        sums.clear()
        return {name: total.cpu() for name, total in self.accelerator.reduce(totals, reduction=reduction).items()}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._training_sums.clear()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self._take(self._training_sums, "mean")
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
        heard = {name: inputs[name] for name in ("input_features", "attention_mask", "language") if name in inputs}
        adapter_names = self._adapter_names(dict(inputs), inputs["labels"])
        with self._tuner.route_samples(adapter_names):
            _, tokens, _ = super().prediction_step(model, heard, False, ignore_keys=ignore_keys, **gen_kwargs)
        return loss, tokens, inputs["labels"]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._evaluation_sums.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        totals = self._take(self._evaluation_sums, "sum")
        if totals:
            labels, gates = totals["labels"].clamp(min=1), totals["gates"]
            budget_losses = self._budget_losses(gates, gates)
            parts = {
                "ce_loss": totals["ce_sum"] / labels,
                "budget_loss": budget_losses.sum(),
                "gate_mean": gates[0].sum() / gates[1].sum().clamp(min=1),
            }
            parts["loss"] = self.args.ce_weight * parts["ce_loss"]
            parts["loss"] = parts["loss"] + (self._of_configs("budget_weight", budget_losses) * budget_losses).sum()
            if totals["taught"] == totals["labels"] or self._teacher is None:
                parts["kd_loss"] = totals["kd_sum"] / labels
                parts["loss"] = parts["loss"] + self.args.kd_weight * parts["kd_loss"]
            output.metrics.update({f"{metric_key_prefix}_{name}": part.item() for name, part in parts.items()})
        return output

    def _load_best_model(self) -> None:
        # Trainer looks for the weights in the checkpoint itself, which is where PEFT puts an adapter "default" only.
        checkpoint = Path(self.state.best_model_checkpoint)
        folders = {name: adapter_folder(checkpoint, name) for name in self.model.peft_config}
        folders = {name: folder for name, folder in folders.items() if (folder / CONFIG_NAME).is_file()}
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or not folders:
            super()._load_best_model()
            return
        for name, folder in folders.items():
            self.model.load_adapter(str(folder), name, is_trainable=True)
        self._set_trainable(self.model)


class _Passes(IterableDataset):
    """
    Pass after pass over batches without a length. Trainer takes such data for one epoch of all steps: to it, a resumed
    run is one that skips batches, through as many passes as they came from.
    """

    def __init__(self, batches: LanguageBatchIterable) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        for epoch in count():
            self.batches.set_epoch(epoch)
            yield from self.batches


def _check_labels(inputs: dict[str, Any]) -> None:
    if inputs.get("labels") is None:
        raise ValueError(f"the batch has no 'labels', only {', '.join(inputs)}: check the collator")


def _column(dataset: Any, name: str) -> list[Any] | None:
    """A column of a dataset, or `None` where it has no such column."""
    if hasattr(dataset, "column_names"):
        return list(dataset.with_format(None)[name]) if name in dataset.column_names else None
    return [row[name] for row in dataset] if name in dataset[0] else None


def _trained_adapters(model: PeftModel, dataset: Any, language_column: str) -> list[str]:
    """The adapters of the languages that a training dataset has; empty where it is for the active adapter alone."""
    adapters = model.peft_config
    if dataset is None:
        return []
    if not has_length(dataset):
        names = list(adapters) if len(adapters) > 1 else []  # any of them may come
    elif len(dataset) == 0:
        raise ValueError("the training dataset is empty: check the split, and what was dropped in preparing it")
    else:
        languages = _column(dataset, language_column)
        if languages is None and len(adapters) > 1:
            raise ValueError(
                f"the training dataset has no column {language_column!r}, which tells which of the adapters "
                f"{', '.join(adapters)} each example is for: add it, or name it in language_column"
            )
        names = [adapter_of_language(adapters, language) for language in dict.fromkeys(languages or [])]
    names = list(dict.fromkeys(names))
    if len(names) > 1 and any(adapters[name].modules_to_save for name in names):
        raise ValueError(
            f"modules_to_save follow the active adapter, not the language of a batch: train {', '.join(names)} one "
            "after the other, or without modules_to_save"
        )
    return names


@contextmanager
def _restored_randomness(device: torch.device) -> Iterator[None]:
    """The generators of torch and numpy (SpecAugment's) are afterwards as they were before the block."""
    state = np.random.get_state()
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        np.random.set_state(state)
