"""The tuner: puts CLSR layers into a model, and has the methods that concern the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..multilingual import check_prompt_language
from .adapter_names import BASE, check_adapter_name
from .architectures import FFN_PROJECTIONS
from .audio_context import cut_audio_context, resolve_audio_context, restore_audio_context
from .checkpointing import avoid_reentrant_checkpointing
from .config import CLSRConfig
from .layer import MERGE_ERROR, CLSRLayer, InputLinear, OutputLinear, check_one_adapter
from .matching import check_ffns, is_output_projection, is_projection
from .progress import set_gate_progress
from .route import FFNRoute, RoutingState
from .samples import shared_decoder_samples, use_adapter_per_sample
from .training_checks import TrainingChecks
from .wrapping import is_wrapping


class CLSRModel(BaseTuner):
    """
    Adds a trainable expert beside each frozen feed-forward network (FFN), and a gate.

    The gate chooses between the two for each token: conditional language-specific routing (CLSR; Ferraz et al.,
    "Multilingual DistilWhisper", ICASSP 2024).

    In training both paths are computed and blended by the gate value; in evaluation each token takes one. In training
    with labels, `budget_weight` times the budget loss is added to the model's loss.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt: any Whisper, or another model with FFNs.
        config ([`CLSRConfig`]): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter: the language code.
        low_cpu_mem_usage (`bool`, *optional*, defaults to `False`):
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
        # transformers' own `add_adapter` may have put layers into the model before.
        layers = (module for module in model.modules() if isinstance(module, CLSRLayer))
        self.routing = next((layer.route.routing for layer in layers), None) or RoutingState()

    def _post_injection_hook(self, model: nn.Module, config: CLSRConfig, adapter_name: str) -> None:
        self.routing.attach(model, TrainingChecks(self.routing))
        avoid_reentrant_checkpointing(model)
        self.training = model.training
        # Without this, k accumulated batches would give k times the gradient: Trainer assumes that a model with
        # **kwargs divides its loss by the label tokens of all k batches, and does not divide it by k. Neither Whisper
        # nor the budget loss does so.
        model.accepts_loss_kwargs = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if is_wrapping.get():
            return  # transformers' own `add_adapter` has put the layers into the model
        check_adapter_name(adapter_name)  # saving makes a folder of this name
        _check_adapter_name_is_not_in_model(model, adapter_name)
        layer = next((module for module in model.modules() if isinstance(module, CLSRLayer)), None)
        with nullcontext() if layer is None else layer.route.routing.calls.lock:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            # Not in _post_injection_hook, which PEFT calls for the first adapter only.
            cut_audio_context(model, self.routing, self.peft_config, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)  # PEFT 0.20 calls `model.forward`, without the hook for the budget loss

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
                    "whole, so name both its input and its output projections, or neither"
                )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: CLSRConfig, key: str):
        return is_projection(peft_config, key)

    def _prepare_model(self, peft_config: CLSRConfig, model: nn.Module) -> None:
        """Check that the config fits the model and matches whole FFNs, before anything is changed."""
        if peft_config.task_type is not None and getattr(model, "main_input_name", None) == "input_features":
            raise ValueError(
                f"task_type is {peft_config.task_type!r}, with which PEFT passes input_ids to the model; a "
                f"{type(model).__name__} takes input_features: leave task_type out"
            )
        check_prompt_language(model, peft_config)
        resolve_audio_context(peft_config, model, self.peft_config)
        check_ffns(peft_config, model)

    def _create_and_replace(
        self,
        peft_config: CLSRConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        is_output = bool(is_output_projection(peft_config, current_key))
        if isinstance(target, CLSRLayer) and isinstance(target, OutputLinear) != is_output:
            raise ValueError(
                f"module {current_key!r} is an {'in' if is_output else 'out'}put projection of the adapters that "
                "the model has; a further adapter must use it alike"
            )
        # If accelerate offloads the base to the CPU or disk, its weights are on the meta device between forwards.
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
        # PEFT passes `adapter_names`, one for each sample, in forward and in generate.
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
        Within this context, route each sample of a batch by its own adapter. The active adapter does not change.

        Args:
            adapter_names (`list[str]`): [batch], "__base__" for the shared FFNs alone. In training mode, all must be
                the same, because a batch has one language.
            labels (`torch.Tensor`, *optional*):
                [batch, tokens], -100 for padding. They say which decoder tokens count in the gate budget; needed if
                the forward gets decoder inputs instead of labels. They also say which samples translate, for
                `translate_with_shared_decoder`.

        Raises:
            ValueError: several adapters in training mode.
        """
        shared = None
        if labels is not None:
            shared = shared_decoder_samples(self.model, self.peft_config, adapter_names, labels)
        with use_adapter_per_sample(self.model, self.routing, adapter_names, labels, shared):
            yield

    @property
    def route_by_language(self) -> bool:
        """
        Whether Whisper's `generate` routes each sample by its language; `True` by default. A sample takes the adapter
        of its language, or the shared FFNs alone if there is none. If `False`, all samples take the active adapter.

        `adapter_names` given to `generate` override both. `forward` always uses the active adapter.
        """
        return self.routing.route_by_language

    @route_by_language.setter
    def route_by_language(self, value: bool) -> None:
        self.routing.route_by_language = bool(value)

    def offload(self, adapter_names: str | list[str] | None = None) -> None:
        """
        Move experts and gates to the CPU, to serve more languages than fit into the accelerator's memory.

        The first forward that routes by an adapter loads it back, layer by layer, and it stays loaded. A compiled
        model is then recompiled. Call this after `model.to(device)`, which moves all adapters. On a model that is on
        the CPU, nothing moves.

        Args:
            adapter_names (`str` or `list[str]`, *optional*): The adapters to offload; by default all but the active
                one.

        Raises:
            ValueError: the model has no adapter of that name.

        Example:

        ```py
        >>> model.base_model.offload()
        >>> model.generate(input_features=features, language="uk")  # loads "uk" back
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
        with self.routing.calls.lock:
            super().delete_adapter(adapter_name)
        if not any(getattr(config, "max_audio_seconds", None) for config in self.peft_config.values()):
            restore_audio_context(self.model, self.routing)

    def _check_merge_allowed(self) -> None:
        raise ValueError(MERGE_ERROR)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        restore_audio_context(self.model, self.routing)
        self.routing.detach(model)
        model.__dict__.pop("accepts_loss_kwargs", None)
        return model

    def budget_loss(self) -> torch.Tensor:
        """
        The budget loss `|mean(g) - gate_budget|` of the last forward, which was in training mode or had labels.

        The mean is over the gate values of all tokens of all routed modules, encoder and decoder together. Padding is
        left out, by `attention_mask` in the encoder and by `labels` (or `decoder_attention_mask`) in the decoder. A
        skipped module counts with the gate values that it would have used.

        Returns:
            `torch.Tensor`: scalar float32, with its graph in training.

        Raises:
            RuntimeError: there was no such forward, the adapter was off, or the batch had several adapters.
        """
        return self._require_forward(self.routing.forward_gates.budget_loss)

    def gate_mean(self) -> torch.Tensor:
        """The mean gate value that [`budget_loss`] compares to the budget: scalar float32 in [0, 1], without graph."""
        gates = self.routing.forward_gates
        return self._require_forward(gates.sums).detach().sum() / gates.counts.sum().clamp(min=1)

    @staticmethod
    def _require_forward(value: torch.Tensor | None) -> torch.Tensor:
        if value is None:
            raise RuntimeError(
                "the last forward left no gate values: call the model first, with an active CLSR adapter, in training "
                "mode or with labels"
            )
        return value

    def set_gate_progress(self, progress: float) -> None:
        """
        Set the progress of training, which scales the noise on gate logits.

        The noise rises from 0 to `gate_noise`. For straight-through gates it falls from `gate_noise` to 0 in the first
        half of training. Without this call there is no noise. [`set_gate_progress`] does the same for any model.

        Args:
            progress (`float`): In [0, 1]; 0 at the start.

        Raises:
            ValueError: `progress` is outside [0, 1].
        """
        set_gate_progress(self, progress)

    @contextmanager
    def record_gates(self) -> Iterator[dict[str, torch.Tensor]]:
        """
        Within this context, record the gate values of each routed module's latest call.

        Yields:
            `dict[str, torch.Tensor]`: name of the module (such as "model.encoder.layers.0.fc1") to float32 [batch,
            tokens] (the leading dimensions of the FFN's input): in [0, 1] in training, 0 or 1 in evaluation.
            Padding is included.

        Example:

        ```py
        >>> with model.base_model.record_gates() as gates:
        ...     model(input_features=features, labels=labels)
        >>> gates["model.encoder.layers.0.fc1"].mean()
        ```
        """
        gates: dict[str, torch.Tensor] = {}
        with self.routing.calls.enter(recorded=gates):
            yield gates


def _check_adapter_name_is_not_in_model(model: nn.Module, adapter_name: str) -> None:
    """
    Raise a `ValueError` if an adapter's name is a part of the names of the model's own modules.

    PEFT 0.20 and 0.21 take a weight for an adapter's if its name contains the adapter's name, and leave it out when
    they save another adapter: an adapter named "encoder" would cost all others half of their weights.
    """
    layers = [key for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    in_tuner_layers = tuple(f"{key}." for key in layers)
    parts = {"weight", "bias", "base_layer", "modules_to_save", *CLSRLayer.adapter_layer_names}
    for key, _ in model.named_modules():
        if not key.startswith(in_tuner_layers):
            parts.update(key.split("."))
    if adapter_name in parts:
        raise ValueError(
            f"adapter name {adapter_name!r} is a part of the names of the model's own modules, so PEFT would lose "
            "weights of other adapters in saving: take a language code, such as 'ca' or 'pt-BR'"
        )
