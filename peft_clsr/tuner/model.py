"""Puts the layers into a model, and switches the whole model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_target_module_exists
from torch import nn

from ..whisper import check_audio_context, cut_positions, set_positions
from .adapter_names import BASE, check_adapter_name, check_one_adapter
from .architectures import FFN_PROJECTIONS
from .config import CLSRConfig
from .layer import MERGE_ERROR, CLSRLayer, InputLinear, OutputLinear
from .route import FFNRoute, RoutingState
from .samples import use_adapter_per_sample


class CLSRModel(BaseTuner):
    """
    Conditional language-specific routing: each frozen feed-forward network (FFN) gets a trainable expert, and a gate
    decides for each token which of the two to use (Ferraz et al., "Multilingual DistilWhisper", ICASSP 2024).

    In training both paths are computed and blended by the gate value. In evaluation each token takes one path. In
    training with labels, `budget_weight` times the budget loss is added to the model's loss.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to be adapted: any Whisper, or another model with FFNs.
        config ([`CLSRConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter: the language code.
        low_cpu_mem_usage (`bool`, `optional`, defaults to `False`):
            Create empty adapter weights on meta device. Useful to speed up the loading process.

    Example:

    ```py
    >>> from transformers import WhisperForConditionalGeneration
    >>> from peft import get_peft_model
    >>> from peft_clsr import CLSRConfig

    >>> whisper = WhisperForConditionalGeneration.from_pretrained("openai/whisper-base")
    >>> model = get_peft_model(whisper, CLSRConfig(language="ca"), adapter_name="ca")
    >>> model.print_trainable_parameters()
    ```
    """

    prefix: str = "clsr_"
    tuner_layer_cls = CLSRLayer
    target_module_mapping = {model_type: list(names) for model_type, (names, _) in FFN_PROJECTIONS.items()}

    def _pre_injection_hook(self, model: nn.Module, config: CLSRConfig, adapter_name: str) -> None:
        # transformers' own `add_adapter` may have added layers before.
        layers = (module for module in model.modules() if isinstance(module, CLSRLayer))
        self.routing = next((layer.route.routing for layer in layers), None) or RoutingState()

    def _post_injection_hook(self, model: nn.Module, config: CLSRConfig, adapter_name: str) -> None:
        self.routing.attach(model)
        # Trainer assumes that any model with **kwargs divides its loss by the label tokens of all accumulated batches,
        # and then does not divide by the number of batches. Whisper and the budget loss ignore that number. Without
        # this line, k accumulated batches would give k times the gradient.
        model.accepts_loss_kwargs = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_adapter_name(adapter_name)  # the name becomes a folder when the adapter is saved
        _check_name_differs_from_modules(model, adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        seconds = self.peft_config[adapter_name].max_audio_seconds
        if seconds is not None:  # not in _post_injection_hook, which PEFT calls only for the first adapter
            table = cut_positions(model, seconds)
            if table is not None:
                self.routing.full_positions = table
                configs = self.peft_config.items()
                others = [name for name, config in configs if getattr(config, "max_audio_seconds", 0) is None]
                if others:
                    _warn_of_context(others, seconds, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(
            *args, **kwargs
        )  # PEFT 0.20 calls `model.forward`, without the hooks that add the budget loss

    def _prepare_adapter_config(self, peft_config: CLSRConfig, model_config: dict) -> CLSRConfig:
        if peft_config.target_modules is None and peft_config.output_modules is None:
            model_type = model_config.get("model_type")
            if model_type not in FFN_PROJECTIONS:
                raise ValueError(
                    f"the FFN of model type {model_type!r} is not known (known: "
                    f"{', '.join(sorted(FFN_PROJECTIONS))}): name its input projections in `target_modules` and its "
                    "output projections in `output_modules`"
                )
            inputs, outputs = FFN_PROJECTIONS[model_type]
            peft_config.target_modules, peft_config.output_modules = set(inputs), set(outputs)
        for given, missing in (("target_modules", "output_modules"), ("output_modules", "target_modules")):
            if getattr(peft_config, missing) is None:
                raise ValueError(
                    f"{given} is {getattr(peft_config, given)} but {missing} is not given: an FFN is routed as a "
                    "whole, so name both its input and its output projections, or neither of them"
                )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: CLSRConfig, key: str):
        return check_target_module_exists(peft_config, key) or _matches_output(peft_config, key)

    def _prepare_model(self, peft_config: CLSRConfig, model: nn.Module) -> None:
        """Check that the config fits the model and matches every FFN as a whole. PEFT calls this before any change."""
        if peft_config.task_type is not None and getattr(model, "main_input_name", None) == "input_features":
            raise ValueError(
                f"task_type is {peft_config.task_type!r}, with which PEFT passes input_ids to the model; a "
                f"{type(model).__name__} takes input_features: leave task_type out"
            )
        self._share_context(peft_config, model)
        self._check_ffns(peft_config, model)

    def _share_context(self, peft_config: CLSRConfig, model: nn.Module) -> None:
        """Give a new adapter without a context the context of the model's adapters, and check that it fits."""
        # Adapters of other methods have no context.
        others = {
            name: config
            for name, config in self.peft_config.items()
            if config is not peft_config and isinstance(config, CLSRConfig)
        }
        if peft_config.max_audio_seconds is None:
            cut = {name: config.max_audio_seconds for name, config in others.items() if config.max_audio_seconds}
            if cut:
                other_name, peft_config.max_audio_seconds = next(iter(cut.items()))
                if peft_config.inference_mode:  # it was trained at another context, and is being loaded
                    names = [name for name, config in self.peft_config.items() if config is peft_config]
                    _warn_of_context(names, peft_config.max_audio_seconds, other_name)
        if peft_config.max_audio_seconds is not None:
            check_audio_context(model, peft_config.max_audio_seconds, others)

    def _check_ffns(self, peft_config: CLSRConfig, model: nn.Module) -> None:
        """Check that each matched FFN has its input projections and one output projection, of fitting sizes."""
        inputs: dict[str, list[nn.Linear]] = {}
        outputs: dict[str, list[nn.Linear]] = {}
        adapted = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for key, module in model.named_modules():
            if not key or key.startswith(adapted) or not self._check_target_module_exists(peft_config, key):
                continue
            base_layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if not isinstance(base_layer, nn.Linear):
                raise TypeError(
                    f"module {key!r} is a {type(base_layer).__name__}, expected torch.nn.Linear: name the projections "
                    "of the FFN in target_modules and output_modules"
                )
            projections = outputs if _matches_output(peft_config, key) else inputs
            projections.setdefault(key.rpartition(".")[0], []).append(base_layer)

        for parent in {**inputs, **outputs}:
            ffn_inputs, ffn_outputs = inputs.get(parent, []), outputs.get(parent, [])
            where = f"in module {parent!r}" if parent else "at the top of the model"
            if not ffn_inputs or len(ffn_outputs) != 1:
                raise ValueError(
                    f"{where}, target_modules match {len(ffn_inputs)} and output_modules match {len(ffn_outputs)} "
                    "modules; an FFN has at least one input projection and exactly one output projection, side by "
                    f"side. Make target_modules={peft_config.target_modules} and "
                    f"output_modules={peft_config.output_modules} (and exclude_modules, layers_to_transform) match "
                    "both or neither"
                )
            if any(projection.out_features != ffn_outputs[0].in_features for projection in ffn_inputs):
                raise ValueError(
                    f"{where}, the input projections give {[projection.out_features for projection in ffn_inputs]} "
                    f"features and the output projection takes {ffn_outputs[0].in_features}; they must be equal, as "
                    "only elementwise operations may be between them"
                )

    def _create_and_replace(
        self,
        peft_config: CLSRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        is_output = bool(_matches_output(peft_config, current_key))
        if isinstance(target, CLSRLayer) and isinstance(target, OutputLinear) != is_output:
            raise ValueError(
                f"module {current_key!r} is an {'in' if is_output else 'out'}put projection of the adapters that "
                "the model has; a further adapter must use it alike"
            )
        # accelerate keeps the weights of an offloaded base on the meta device between forwards.
        with align_module_device(getattr(target, "base_layer", target)):
            if isinstance(target, CLSRLayer):
                target.update_layer(adapter_name, peft_config)
                return
            new_module = self._create_new_module(peft_config, adapter_name, target, parent, current_key, is_output)
            if adapter_name not in self.active_adapters:
                # adding an additional adapter: it is not automatically trainable
                new_module.requires_grad_(False)
            self._replace_module(parent, target_name, new_module, target)

    def _create_new_module(
        self,
        peft_config: CLSRConfig,
        adapter_name: str,
        target: nn.Module,
        parent: nn.Module,
        current_key: str,
        is_output: bool,
    ) -> InputLinear | OutputLinear:
        siblings = [module for module in parent.children() if isinstance(module, CLSRLayer)]
        route = siblings[0].route if siblings else FFNRoute(self.routing, name=current_key)
        if is_output:
            return OutputLinear(target, adapter_name, peft_config, route)
        owns_gate = not any(module.owns_gate for module in siblings)
        if owns_gate:
            route.name = current_key
        return InputLinear(target, adapter_name, peft_config, route, owns_gate)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        # How PEFT passes `adapter_names` of a batch of several adapters, in forward and in generate.
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        main_input = kwargs.get(getattr(self.model, "main_input_name", "input_ids"))
        tensors = (value for value in (*args, main_input, *kwargs.values()) if isinstance(value, torch.Tensor))
        batch = next(tensors, None)
        if batch is not None and len(batch) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(batch)} respectively."
            )
        with self.route_samples(adapter_names):
            yield

    @contextmanager
    def route_samples(self, adapter_names: list[str], labels: torch.Tensor | None = None) -> Iterator[None]:
        """
        In the block, route each sample of a batch by its own adapter. The active adapter does not change.

        In training mode, all samples must have the same adapter: a batch has one language there.

        Args:
            adapter_names (`list[str]`): [batch], "__base__" for only the shared FFNs.
            labels (`torch.Tensor`, *optional*):
                [batch, tokens], -100 for padding: the decoder tokens that count in the gate budget, if the forward
                gets decoder inputs instead of labels.
        """
        with use_adapter_per_sample(self.model, self.routing, adapter_names, labels):
            yield

    @property
    def route_by_language(self) -> bool:
        """
        If `True`, the default, Whisper's `generate` routes each sample by the adapter of its language, or by only the
        shared FFNs if there is none. If `False`, it routes all samples by the active adapter.

        `adapter_names` given to `generate` come before both. `forward` always uses the active adapter.
        """
        return self.routing.route_by_language

    @route_by_language.setter
    def route_by_language(self, value: bool) -> None:
        self.routing.route_by_language = bool(value)

    def offload(self, adapter_names: str | list[str] | None = None) -> None:
        """
        Move experts and gates to the CPU, to have more languages than the accelerator's memory holds.

        Each adapter moves back, layer by layer, when a forward first uses it, and stays. A compiled model is compiled
        again then. Call this after `model.to(device)`, which moves everything. On the CPU, nothing moves.

        Args:
            adapter_names (`str` or `list[str]`, *optional*): Adapters to move; by default all but the active one.

        Raises:
            ValueError: the model has no adapter of that name.

        Example:

        ```py
        >>> model.base_model.offload()
        >>> model.generate(input_features=features, language="uk")  # moves "uk" back
        ```
        """
        if adapter_names is None:
            adapter_names = [name for name in self.peft_config if name not in self.active_adapters]
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapters {unknown} are not on the model, which has {sorted(self.peft_config)}")
        for layer in self.model.modules():
            if isinstance(layer, CLSRLayer):
                for name in names:
                    layer.offload(name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        check_one_adapter(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not any(getattr(config, "max_audio_seconds", None) for config in self.peft_config.values()):
            self._restore_context()

    def _restore_context(self) -> None:
        """Restore the context that the model had before an adapter cut it."""
        if self.routing.full_positions is not None:
            set_positions(self.model, self.routing.full_positions)
            self.routing.full_positions = None

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_ERROR)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        self._restore_context()
        self.routing.detach(model)
        model.__dict__.pop("accepts_loss_kwargs", None)
        return model

    def budget_loss(self) -> torch.Tensor:
        """
        Return `|mean(g) - gate_budget|` of the last forward in training mode or with labels.

        The mean is over the gate values of all tokens of all routed modules, encoder and decoder together, without
        padding. `attention_mask` selects encoder tokens, `labels` (or `decoder_attention_mask`) decoder tokens. A
        skipped gate counts as zeros.

        Returns:
            `torch.Tensor`: scalar float32, with its graph in training.

        Raises:
            RuntimeError: there was no such forward, or the adapter was off.
        """
        return self._of_last_forward(self.routing.budget_loss)

    def gate_mean(self) -> torch.Tensor:
        """Return the mean of the gate values in [`budget_loss`]: scalar float32 in [0, 1], without graph."""
        total = self._of_last_forward(self.routing.gate_sums).detach().sum()
        return total / self.routing.gate_counts.sum().clamp(min=1)

    @staticmethod
    def _of_last_forward(value: torch.Tensor | None) -> torch.Tensor:
        if value is None:
            raise RuntimeError(
                "the last forward stored no gate values: call the model first, with an active CLSR adapter, in "
                "training mode or with labels"
            )
        return value

    def set_gate_progress(self, progress: float) -> None:
        """
        Set the progress of training, which decides the noise on gate logits. The noise rises from 0 to `gate_noise`.
        For straight-through gates it falls from `gate_noise` to 0 in the first half. Without this call there is none.

        Args:
            progress (`float`): In [0, 1]; 0 at the start. [`GateScheduleCallback`] calls this in each step.

        Raises:
            ValueError: `progress` is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"gate progress is {progress}, expected in [0, 1]: give step / number of training steps")
        self.routing.gate_progress = float(progress)

    @contextmanager
    def record_gates(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Record the gate values of the latest call of each routed module.

        Yields:
            `dict[str, torch.Tensor]`: name of the module (such as "model.encoder.layers.0.fc1") to float32 [batch,
            tokens] (the leading dimensions of the FFN's input): in [0, 1] in training, 0 or 1 in evaluation, padding
            included. Forwards inside the block fill it.

        Example:

        ```py
        >>> with model.base_model.record_gates() as gates:
        ...     model(input_features=features, labels=labels)
        >>> gates["model.encoder.layers.0.fc1"].mean()
        ```
        """
        outer, self.routing.recorded = self.routing.recorded, {}
        try:
            yield self.routing.recorded
        finally:
            self.routing.recorded = outer


def _check_name_differs_from_modules(model: nn.Module, adapter_name: str) -> None:
    """
    Check that no module of the model has the adapter's name. PEFT 0.20 and 0.21 assign a weight to an adapter whose
    name is a part of the weight's name, and leave it out when they save another adapter. With an adapter "encoder",
    all others would lose half of their weights.
    """
    layers = [key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    inside = tuple(f"{key}." for key in layers)
    parts = {"weight", "bias", "base_layer", "modules_to_save", *CLSRLayer.adapter_layer_names}
    parts |= {part for key, _ in model.named_modules() if not key.startswith(inside) for part in key.split(".")}
    if adapter_name in parts:
        raise ValueError(
            f"adapter name {adapter_name!r} is a part of the names of the model's own modules, so PEFT would lose "
            "weights of other adapters when it saves them: take a language code, such as 'ca' or 'pt-BR'"
        )


def _warn_of_context(names: list[str], seconds: float, adapter_name: str) -> None:
    warnings.warn(
        f"adapters {names} were not made for the audio context of {seconds:g} s that adapter {adapter_name!r} has, "
        "and all adapters on a model share one, as does the base: keep those of other contexts on models of their own",
        stacklevel=2,
    )


def _matches_output(peft_config: CLSRConfig, key: str):
    """True if `key` is an output projection, by PEFT's rules for `target_modules`."""
    outputs = copy.copy(peft_config)
    outputs.target_modules = peft_config.output_modules
    return check_target_module_exists(outputs, key)
