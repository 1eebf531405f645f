"""The trainer's evaluation: each utterance by the adapter of its language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Seq2SeqTrainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from ..evaluation.metrics import ErrorRateMetrics
from ..inference.label_prompt import prompt_of_labels
from ..languages.adapters import adapter_languages, adapter_of_language
from .batches import dataset_column
from .logged_sums import LoggedSums
from .step_budget import StepBudget, gate_mean


class EvaluatingTrainer(Seq2SeqTrainer):
    """A trainer of CLSR adapters that evaluates with its losses, and by generation. [`DistillationTrainer`] trains."""

    args: Any
    model: Any
    _tuner: Any
    _budget: StepBudget
    _evaluation_sums: LoggedSums
    _teacher: Any
    _trained_adapters: list[str]
    _adapter_names: Callable[[dict[str, Any], torch.Tensor], list[str]]

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Trainer would group by len(input_features), which is the number of mel bins.
        return SequentialSampler(eval_dataset) if has_length(eval_dataset) else None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        if not prediction_loss_only and not self.args.predict_with_generate:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            batch_loss: Any = self.compute_loss(model, inputs)
            loss = batch_loss.detach()
        if prediction_loss_only:
            return loss, None, None
        adapter_names = self._adapter_names(dict(inputs), inputs["labels"])
        names = ("input_features", "attention_mask", "language")
        generation_inputs = {name: inputs[name] for name in names if name in inputs}
        given = gen_kwargs or getattr(self, "_gen_kwargs", {})
        generation_inputs |= self._generation_prompt(inputs["labels"], adapter_names)
        generation_inputs = {name: value for name, value in generation_inputs.items() if name not in given}
        with self._tuner.route_samples(adapter_names):
            _, tokens, _ = super().prediction_step(
                model, generation_inputs, False, ignore_keys=ignore_keys, **gen_kwargs
            )
        return loss, tokens, inputs["labels"]

    def _generation_prompt(self, labels: torch.Tensor, adapter_names: list[str]) -> dict[str, Any]:
        """The language and task of a batch for `generate`: those of the labels, else the language of the adapter."""
        config = self.model.generation_config
        lang_to_id = getattr(config, "lang_to_id", None)
        if not lang_to_id:  # the model knows English only
            return {}
        prompt = prompt_of_labels(labels, lang_to_id, getattr(config, "task_to_id", None) or {})
        languages: list[str | None] | None = None if prompt[0] is None else [*prompt[0]]
        task = prompt[1]
        if languages is None and getattr(config, "language", None) is None:
            known = adapter_languages(self._tuner.peft_config)
            languages = [known[name] for name in adapter_names]
        if languages is None or None in languages:
            return {}
        return {"language": languages} | ({} if task is None or getattr(config, "task", None) else {"task": task})

    def _adapter_languages(self, dataset: Any) -> list[str] | None:
        """The language of the adapter of each example; `None` if it cannot be known beforehand."""
        adapters = self._tuner.peft_config
        if not has_length(dataset) or not len(dataset):
            return None
        languages = dataset_column(dataset, self.args.language_column)
        if languages is None and len(adapters) == 1:
            languages = [*adapters] * len(dataset)
        if languages is None:
            return None
        known = adapter_languages(adapters)
        own = {language: known[adapter_of_language(adapters, language)] for language in set(languages)}
        named = [tag for tag in map(own.__getitem__, languages) if tag is not None]
        return named if len(named) == len(languages) else None

    def evaluation_loop(
        self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self._evaluation_sums.clear()
        if isinstance(self.compute_metrics, ErrorRateMetrics):
            self.compute_metrics.adapter_languages = self._adapter_languages(dataloader.dataset)
        kwargs["metric_key_prefix"] = metric_key_prefix
        output: Any = super().evaluation_loop(dataloader, *args, **kwargs)
        totals = self._evaluation_sums.take(self.accelerator, "sum")
        if totals:
            num_labels, gates = totals["labels"].clamp(min=1), totals["gates"]
            budget_losses = self._budget.losses(gates, is_whole_step=True)
            parts = {
                "ce_loss": totals["ce_sum"] / num_labels,
                "budget_loss": budget_losses.sum(),
                "gate_mean": gate_mean(gates),
            }
            parts["loss"] = self.args.ce_weight * parts["ce_loss"]
            parts["loss"] = parts["loss"] + self._budget.weighted_sum(budget_losses)
            if totals["labels_with_targets"] == totals["labels"] or self._teacher is None:
                parts["kd_loss"] = totals["kd_sum"] / num_labels
                parts["loss"] = parts["loss"] + self.args.kd_weight * parts["kd_loss"]
            output.metrics.update({f"{metric_key_prefix}_{name}": part.item() for name, part in parts.items()})
        return output
