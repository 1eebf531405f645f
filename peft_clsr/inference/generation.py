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
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from ..languages import adapter_languages, inference_adapter, language_code
from ..tuner.adapter_names import BASE
from ..tuner.layer import CLSRLayer
from ..tuner.route import RoutingState
from ..tuner.samples import use_adapter_per_sample
from ..whisper import FRAMES_PER_POSITION, POSITIONS_PER_SECOND
from .label_prompt import prompt_of_labels
from .sampling import own_draws

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
        self.adapters, self.active = _adapters(model, routing)
        self.adapter_of = functools.cache(self._adapter_of)
        self.source: str | None = None  # of the languages, if the caller gave none
        self.prompt_names: list[str] | None = None  # the adapter of each sample, as read from the prompts
        self.call = ExitStack()
        self.current_samples = ExitStack()  # holds `use_adapter_per_sample` of the samples that run now

    def __enter__(self) -> PromptRouting:
        self.token = _current_call.set(self)
        self.call.enter_context(self.routing.calls.enter(adapter_names=None))  # not those of an enclosing call
        return self

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
            if self.source is not None:
                _warn_of_unused_adapter(self.model, self.routing, self.adapters, self.active, languages, self.source)
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
        source = None
        if language is not None:
            call.arguments["language"] = _whisper_languages(language, tokens)
        elif _take_language_of_labels(call.arguments, configs, tokens):
            source = "the labels are in"
        if not _is_routed_by_language(routing):
            return generate(*call.args, **call.kwargs)
        with PromptRouting(self, routing, tokens) as prompt_routing:
            prompt_routing.source = source
            return generate(*call.args, **call.kwargs)

    return generate_by_language


def _detected_by_base(detect_language: Callable) -> Callable:
    """Wrap Whisper's `detect_language`."""

    @functools.wraps(detect_language)
    def detect_language_by_base(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        routing = _routing_state(self)
        if routing is None or not _is_routed_by_language(routing):
            return detect_language(self, *args, **kwargs)
        call = _running_call(routing)
        if call is not None:
            call.source = "detected"
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
        is_sampling = getattr(kwargs.get("generation_config"), "do_sample", False)
        with own_draws(self.device) if is_sampling else nullcontext():
            return generate(self, *args, **kwargs)

    return generate_by_prompt


def warn_of_unused_adapter(model: nn.Module, languages: Iterable[str]) -> None:
    """
    Warn once of each detected language that has no adapter, if there is an active one, for another language.

    Args:
        model (`nn.Module`): Any model; one without CLSR layers has nothing to warn of.
        languages (`Iterable[str]`): Codes of detected languages.
    """
    routing = _routing_state(model)
    if routing is not None and _is_routed_by_language(routing):
        _warn_of_unused_adapter(model, routing, *_adapters(model, routing), languages, "detected")


def _warn_of_unused_adapter(
    model: nn.Module,
    routing: RoutingState,
    adapters: dict[str, Any],
    active: str | None,
    languages: Iterable[str | None],
    source: str,
) -> None:
    if active is None or _is_disabled(model):
        return
    own = adapter_languages(adapters)[active]
    served_by_base = {code for code in set(languages) if code and not inference_adapter(adapters, code, active)}
    with routing.calls.lock:  # once, also in several threads
        news = served_by_base - routing.warned_of
        routing.warned_of |= news
    for language in sorted(news):
        warnings.warn(
            f"generate got no language, and {source} {language!r}, which has no adapter. So the base model answers, "
            f"not the active adapter {active!r} (the model has adapters for {', '.join(map(repr, adapters))}). If the "
            f'audio is in {own!r}, pass language="{own}": to generate, in generate_kwargs of a pipeline, or to a '
            f'trainer with model.generation_config.language = "{own}". To use {active!r} for all languages, set '
            "model.base_model.route_by_language = False",
            stacklevel=2,
        )


def _adapters(model: nn.Module, routing: RoutingState) -> tuple[dict[str, Any], str | None]:
    """The configs of the CLSR adapters by name, and the name of the active one."""
    with routing.calls.lock:  # no adapter is added meanwhile
        layers = [module for module in model.modules() if isinstance(module, CLSRLayer)]
    adapters = {name: config for layer in layers for name, config in layer.clsr_config.items()}
    # With transformers' own adapters, one of another method may be active too.
    return adapters, next((name for name in layers[0].active_adapters if name in adapters), None)


def _is_disabled(model: nn.Module) -> bool:
    return next(module.disable_adapters for module in model.modules() if isinstance(module, CLSRLayer))


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


def _take_language_of_labels(arguments: dict[str, Any], configs: tuple, tokens: dict[str, int]) -> bool:
    """
    Set the language, and the task if none is given, to those of the labels. True if the labels have a language.

    Seq2SeqTrainer passes labels to `generate`, which otherwise ignores them.
    """
    labels = arguments.get("kwargs", {}).get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        return False
    tasks = next((config.task_to_id for config in configs if getattr(config, "task_to_id", None)), {})
    languages, task = prompt_of_labels(labels, tokens, tasks)
    if languages is None:
        return False
    arguments["language"] = languages
    if arguments.get("task") is None and all(getattr(config, "task", None) is None for config in configs):
        arguments["task"] = task
    return True


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
