"""
Whisper's `generate`, with each sample routed by its language.

The decoder's prompt of a sample holds its language token, whether the language was given, set in the generation config
or detected. Whisper may run a part of a batch again (for audio longer than the context, timestamps, several
temperatures), and the prompts stay with their samples. So the prompt tells which adapter a sample takes.

Several languages of a call may have the same token in their prompts, such as "ca" and "ca-valencia". Then each of the
others gets the token of a language that the call does not use, until the prompts are known; see `LanguageTokens`.

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
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from ..languages.adapters import (
    adapter_languages,
    adapter_prompts,
    adapters_with_prompt,
    inference_adapter,
)
from ..languages.tags import language_tag, own_prompt_code
from ..tuner.adapter_names import BASE
from ..tuner.broader import first_time, warn_of_broader_adapters
from ..tuner.layer import CLSRLayer
from ..tuner.route import RoutingState
from ..tuner.samples import shared_decoder_samples, use_adapter_per_sample
from ..whisper import FRAMES_PER_POSITION, POSITIONS_PER_SECOND
from .label_prompt import prompt_of_labels
from .language_tokens import LanguageTokens
from .sampling import draw_by_recording

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
        adapters (`dict[str, CLSRConfig]`): Its adapters, by name.
        active (`str`, *optional*): The name of the active one.
        tokens ([`LanguageTokens`]): The tokens of the call's languages.
        by_prompt_language (`bool`): A detected language without an adapter takes the one with this prompt.
        source (`str`, *optional*): Where the languages are from, if the caller gave none.
    """

    def __init__(
        self,
        model: nn.Module,
        routing: RoutingState,
        adapters: dict[str, Any],
        active: str | None,
        tokens: LanguageTokens,
        by_prompt_language: bool,
        source: str | None,
    ) -> None:
        self.model, self.routing, self.tokens = model, routing, tokens
        self.adapters, self.active = adapters, active
        self.start_token = model.generation_config.decoder_start_token_id
        self.by_prompt_language = by_prompt_language
        self.adapter_of = functools.cache(self._adapter_of)
        self.source = source
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

    def set_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        """
        Route the samples that run next by their decoder prompts [samples, tokens].

        Returns:
            `torch.Tensor`: the prompts for the model, as languages may have stood for others.
        """
        self.current_samples.close()
        places = [self._language_place(prompt) for prompt in prompts.tolist()]
        tokens = [None if place is None else int(prompts[sample, place]) for sample, place in enumerate(places)]
        languages = [None if token is None else self.tokens.languages.get(token) for token in tokens]
        if any(languages):
            names = [self.adapter_of(language) for language in languages]
            if self.source is not None:
                _warn_of_unused_adapter(
                    self.model,
                    self.routing,
                    self.adapters,
                    self.active,
                    languages,
                    self.source,
                    self.by_prompt_language,
                )
            self.current_samples.enter_context(use_adapter_per_sample(self.model, self.routing, names))
        self.prompt_names = self.routing.adapter_names
        prompts = prompts.clone()
        for sample, (place, token) in enumerate(zip(places, tokens, strict=True)):
            if place is not None and token is not None:
                prompts[sample, place] = self.tokens.replace(token)
        return prompts

    def _language_place(self, prompt: list[int]) -> int | None:
        """The place after the last start token. Text before that is earlier transcript."""
        starts = [index for index, token in enumerate(prompt[:-1]) if token == self.start_token]
        return starts[-1] + 1 if starts else None

    def _adapter_of(self, language: str | None) -> str:
        if language is None:
            return self.active or BASE
        return inference_adapter(self.adapters, language, self.active, self.by_prompt_language) or BASE


def _with_language_routing(generate: Callable) -> Callable:
    """Wrap Whisper's `generate`."""
    signature = inspect.signature(generate)

    @functools.wraps(generate)
    def generate_by_language(self, *args: Any, **kwargs: Any) -> Any:
        routing = _routing_state(self)
        if routing is None:
            return generate(self, *args, **kwargs)
        by_prompt_language = kwargs.pop("route_by_prompt_language", None) or False
        call = signature.bind(self, *args, **kwargs)
        # Unset fields fall back to the model's generation config.
        configs = (call.arguments.get("generation_config"), self.generation_config)
        tokens = next((config.lang_to_id for config in configs if getattr(config, "lang_to_id", None)), None)
        if tokens is None:  # the model knows English only
            return generate(self, *args, **kwargs)
        _check_audio_length(self, routing, call.arguments)
        languages = (call.arguments.get("language"), *(getattr(config, "language", None) for config in configs))
        language = next((language for language in languages if language is not None), None)
        adapters, active = _adapters(self, routing)
        source = None
        if language is None and _take_language_of_labels(call.arguments, configs, tokens):
            source = "the labels are in"
            language = [_language_of_label(token, adapters, active) for token in call.arguments["language"]]
        given = language if isinstance(language, (list, tuple)) else [language]
        prompts = {name: language_and_prompt(name, tokens, adapters, active) for name in given if name is not None}
        is_routed = _is_routed_by_language(routing)
        language_tokens = LanguageTokens(tokens, dict(prompts.values()))
        if prompts:
            pairs = [prompts.get(name, (None, None)) for name in given]
            names = language_tokens.names([tag for tag, _ in pairs]) if is_routed else [code for _, code in pairs]
            call.arguments["language"] = names[0] if isinstance(language, str) else names
        if not is_routed:
            return generate(*call.args, **call.kwargs)
        chosen = {tag: inference_adapter(adapters, tag, active) for tag, _ in prompts.values()}
        warn_of_broader_adapters(routing, adapters, chosen)
        by_prompt_language = by_prompt_language and not prompts  # a language that is given was not detected
        with PromptRouting(self, routing, adapters, active, language_tokens, by_prompt_language, source):
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
            kwargs["decoder_input_ids"] = call.set_prompts(prompts)
        config, features = kwargs.get("generation_config"), args[0] if args else None
        if getattr(config, "do_sample", False) and features is not None:  # a window of Whisper's `generate`
            processors = kwargs.get("logits_processor")
            kwargs["generation_config"], kwargs["logits_processor"] = draw_by_recording(config, processors, features)
        with nullcontext() if routing is None or prompts is None else _translation(self, routing, prompts):
            return generate(self, *args, **kwargs)

    return generate_by_prompt


def _translation(model: nn.Module, routing: RoutingState, prompts: torch.Tensor) -> AbstractContextManager:
    """Within this context, decoders of samples that translate take the shared FFNs, if their adapter says so."""
    adapters, active = _adapters(model, routing)
    names = routing.adapter_names or [active] * len(prompts)
    if len(names) != len(prompts):
        return nullcontext()  # the forward raises, with the remedy
    return routing.calls.enter(shared_decoder=shared_decoder_samples(model, adapters, names, prompts))


def warn_of_unused_adapter(model: nn.Module, languages: Iterable[str], by_prompt_language: bool = False) -> None:
    """
    Warn once of each detected language that has no adapter, if there is an active one, for another language.

    Args:
        model (`nn.Module`): Any model; one without CLSR layers has nothing to warn of.
        languages (`Iterable[str]`): Codes of detected languages.
        by_prompt_language (`bool`): As `route_by_prompt_language` of `generate`.
    """
    routing = _routing_state(model)
    if routing is not None and _is_routed_by_language(routing):
        adapters, active = _adapters(model, routing)
        _warn_of_unused_adapter(model, routing, adapters, active, languages, "detected", by_prompt_language)


def _warn_of_unused_adapter(
    model: nn.Module,
    routing: RoutingState,
    adapters: dict[str, Any],
    active: str | None,
    languages: Iterable[str | None],
    source: str,
    by_prompt_language: bool,
) -> None:
    if active is None or _is_disabled(model):
        return
    own = adapter_languages(adapters)[active]
    served_by_base = {
        code for code in set(languages) if code and not inference_adapter(adapters, code, active, by_prompt_language)
    }
    for language in first_time(routing, served_by_base):
        prompted = adapters_with_prompt(adapters, language)
        hint = ""
        if len(prompted) == 1 and not by_prompt_language:
            hint = f" To let {prompted[0]!r} take what is heard as {language!r}, pass route_by_prompt_language=True."
        elif prompted:
            hint = f" It is the prompt_language of {', '.join(map(repr, prompted))}: pass the language to choose one."
        warnings.warn(
            f"generate got no language, and {source} {language!r}, which has no adapter. So the base model answers, "
            f"not the active adapter {active!r} (the model has adapters for {', '.join(map(repr, adapters))}).{hint} "
            f'If the audio is in {own!r}, pass language="{own}": to generate, in generate_kwargs of a pipeline, or to '
            f'a trainer with model.generation_config.language = "{own}". To use {active!r} for all languages, set '
            "model.base_model.route_by_language = False",
            stacklevel=2,
        )


def clsr_adapters(model: nn.Module) -> dict[str, Any]:
    """The configs of a model's CLSR adapters by name; empty for any other model."""
    routing = _routing_state(model)
    return {} if routing is None else _adapters(model, routing)[0]


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


def _language_of_label(token: str, adapters: dict[str, Any], active: str | None) -> str:
    """The language of labels with a language token: that of the active adapter, if the token is of its prompt."""
    if active is not None and adapter_prompts(adapters)[active] == token[2:-2]:
        return adapter_languages(adapters)[active] or token
    return token


def language_and_prompt(
    name: str, tokens: dict[str, int], adapters: dict[str, Any], active: str | None
) -> tuple[str, str]:
    """
    The tag of a language that the caller gave, and the code of the language in its prompt.

    Args:
        name (`str`): As in [`language_tag`], or a token of the model.
        tokens (`dict[str, int]`): Ids of the model's language tokens.
        adapters (`dict[str, CLSRConfig]`): The model's, by name.
        active (`str`, *optional*): The name of the active adapter.

    Raises:
        ValueError: no adapter is for the language, and Whisper does not know it; or several are.
    """
    tag = name[2:-2] if name in tokens else language_tag(name)
    adapter = inference_adapter(adapters, tag, active)
    code = None if adapter is None else adapter_prompts(adapters)[adapter]
    if code is None and f"<|{tag}|>" in tokens:
        code = tag
    code = code or own_prompt_code(tag)
    if code is None:
        raise ValueError(
            f"language {name!r} has no adapter on the model (adapters: {', '.join(adapters)}), and Whisper does not "
            "know it: load its adapter, or name a Whisper language to transcribe it as"
        )
    return tag, code
