"""
Whisper's `generate`, with each sample routed by its language.

The decoder's prompt of a sample holds its language token, whether the language was given, set in the generation config
or detected. Whisper may run a part of a batch again (for audio longer than the context, timestamps, several
temperatures), and the prompts stay with their samples. So the prompt tells which adapter a sample takes.

transformers has no hook at which the prompts are known before the encoder runs. Therefore this module, and no other,
wraps three functions. They do nothing for models without CLSR layers:

- `WhisperGenerationMixin.generate`: starts and ends the routing, and accepts more spellings of a language;
- `WhisperGenerationMixin.detect_language`: detects by the base model, because an expert knows one language;
- `GenerationMixin.generate`: Whisper's `generate` calls it with the prompts of the samples that it runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from ..languages import inference_adapter, language_code
from ..tuner.adapter_names import BASE
from ..tuner.layer import CLSRLayer
from ..tuner.route import RoutingState
from ..tuner.samples import use_adapter_per_sample
from ..whisper import FRAMES_PER_POSITION, POSITIONS_PER_SECOND

# The running call of Whisper's `generate`.
_current_call: ContextVar[PromptRouting | None] = ContextVar("peft_clsr_current_call", default=None)


def register_language_routing() -> None:
    """Wrap the three functions named above; once."""
    WhisperGenerationMixin.generate = _with_language_routing(WhisperGenerationMixin.generate)
    WhisperGenerationMixin.detect_language = _detected_by_base(WhisperGenerationMixin.detect_language)
    GenerationMixin.generate = _with_prompt_routing(GenerationMixin.generate)


class PromptRouting:
    """
    Routes the samples of one call of Whisper's `generate` by the languages in their prompts.

    Args:
        model (`WhisperForConditionalGeneration`): The base model, with CLSR layers.
        routing (`RoutingState`): The state of the model.
        tokens (`dict[str, int]`): Ids of the language tokens, such as `{"<|ca|>": 50270}`.
    """

    def __init__(self, model: nn.Module, routing: RoutingState, tokens: dict[str, int]) -> None:
        self.model, self.routing = model, routing
        self.start_token = model.generation_config.decoder_start_token_id
        self.languages = {token_id: token[2:-2] for token, token_id in tokens.items()}
        with routing.calls.lock:  # no adapter is added meanwhile
            layers = [module for module in model.modules() if isinstance(module, CLSRLayer)]
        self.adapters = {name: config for layer in layers for name, config in layer.clsr_config.items()}
        # With transformers' own adapters, one of another method may be active too.
        self.active = next((name for name in layers[0].active_adapters if name in self.adapters), None)
        self.adapter_of = functools.cache(self._adapter_of)
        self.prompt_names: list[str] | None = None  # the adapter of each sample, as read from the prompts
        self.call = ExitStack()
        self.current_samples = ExitStack()  # holds `use_adapter_per_sample` of the samples that run now

    def __enter__(self) -> None:
        self.token = _current_call.set(self)
        self.call.enter_context(self.routing.calls.enter(adapter_names=None))  # not those of an enclosing call

    def __exit__(self, *exception: Any) -> None:
        self.current_samples.close()
        self.call.close()
        _current_call.reset(self.token)

    def set_prompts(self, prompts: torch.Tensor) -> None:
        """Route the samples that run next by their decoder prompts [samples, tokens]."""
        self.current_samples.close()
        languages = [self._language_of(prompt) for prompt in prompts.tolist()]
        if any(languages):
            names = [self.adapter_of(language) for language in languages]
            self.current_samples.enter_context(use_adapter_per_sample(self.model, self.routing, names))
        self.prompt_names = self.routing.adapter_names

    def _language_of(self, prompt: list[int]) -> str | None:
        """The language whose token follows the last start token. Text before that is earlier transcript."""
        starts = [index for index, token in enumerate(prompt[:-1]) if token == self.start_token]
        return self.languages.get(prompt[starts[-1] + 1]) if starts else None

    def _adapter_of(self, language: str | None) -> str:
        if language is None:
            return self.active or BASE
        return inference_adapter(self.adapters, language, self.active) or BASE


def _with_language_routing(generate: Callable) -> Callable:
    """Wrap Whisper's `generate`."""
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def generate_by_language(self, *args: Any, **kwargs: Any) -> Any:
        routing = _routing_state(self)
        if routing is None:
            return generate(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        # Unset fields fall back to the model's generation config.
        configs = (call.arguments.get("generation_config"), self.generation_config)
        tokens = next((config.lang_to_id for config in configs if getattr(config, "lang_to_id", None)), None)
        if tokens is None:  # the model knows English only
            return generate(self, *args, **kwargs)
        _check_audio_length(self, routing, call.arguments)
        languages = (call.arguments.get("language"), *(getattr(config, "language", None) for config in configs))
        language = next((language for language in languages if language is not None), None)
        if language is not None:
            call.arguments["language"] = _whisper_languages(language, tokens)
        if not _is_routed_by_language(routing):
            return generate(*call.args, **call.kwargs)
        with PromptRouting(self, routing, tokens):
            return generate(*call.args, **call.kwargs)

    return generate_by_language


def _detected_by_base(detect_language: Callable) -> Callable:
    """Wrap Whisper's `detect_language`."""

    @functools.wraps(detect_language)
    def detect_language_by_base(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        routing = _routing_state(self)
        if routing is None or not _is_routed_by_language(routing):
            return detect_language(self, *args, **kwargs)
        with use_adapter_per_sample(self, routing, [BASE]):
            return detect_language(self, *args, **kwargs)

    return detect_language_by_base


def _with_prompt_routing(generate: Callable) -> Callable:
    """Wrap the `generate` of all models."""

    @functools.wraps(generate)
    def generate_by_prompt(self, *args: Any, **kwargs: Any) -> Any:
        routing = _routing_state(self)
        call = None if routing is None else _running_call(routing)
        prompts = kwargs.get("decoder_input_ids")
        if call is not None and prompts is not None:
            call.set_prompts(prompts)
        return generate(self, *args, **kwargs)

    return generate_by_prompt


def _routing_state(model: nn.Module) -> RoutingState | None:
    return getattr(model, "clsr_routing", None)


def _running_call(routing: RoutingState) -> PromptRouting | None:
    """The running call of `generate`, if it is one of this model: an assistant model makes calls of its own inside."""
    call = _current_call.get()
    return call if call is not None and call.routing is routing else None


def _is_routed_by_language(routing: RoutingState) -> bool:
    """True if `route_by_language` is on, and no `adapter_names` are set but those read from the prompts."""
    call = _running_call(routing)
    prompt_names = None if call is None else call.prompt_names
    return routing.route_by_language and routing.adapter_names is prompt_names


def _check_audio_length(model: nn.Module, routing: RoutingState, arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` if features exceed a context that an adapter cut. Whisper's error would say "over 30 s"."""
    features, context = arguments.get("input_features"), model.config.max_source_positions
    frames = FRAMES_PER_POSITION * context
    timestamps = arguments.get("return_timestamps") or getattr(model.generation_config, "return_timestamps", None)
    if routing.full_positions is None or features is None or timestamps or features.shape[-1] <= frames:
        return
    seconds = context / POSITIONS_PER_SECOND
    raise ValueError(
        f"the features have {features.shape[-1]} frames, and the model's context is {frames}, {seconds:g} s, to "
        f"which an adapter cut it: cut the processor too, set_audio_context(None, processor, {seconds:g}), or give "
        "return_timestamps=True to transcribe longer audio in windows of the context"
    )


def _whisper_languages(language: str | list[str], tokens: dict[str, int]) -> str | list[str]:
    """Languages as Whisper's own `generate` takes them. A token that the model knows is kept."""
    if isinstance(language, (list, tuple)):
        return [_whisper_languages(name, tokens) for name in language]
    return language if language in tokens or language is None else language_code(language)
