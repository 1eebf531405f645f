"""Loads a base model with the experts of the languages that are needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from ..checkpoints.configs import is_clsr, read_config
from ..hub.pull import list_languages, load_language
from ..hub.record import HubLanguage, read_languages
from ..languages.tags import closest_tags, own_prompt_code
from ..sources import check_source, check_whisper


def load_with_experts(
    model_name: str,
    sources: Sequence[str],
    languages: Collection[str | None],
    dtype: torch.dtype = torch.float32,
    option: str = "--model",
) -> tuple[WhisperForConditionalGeneration | PeftModel, WhisperProcessor]:
    """
    Load a Whisper with the experts of some languages, and its processor.

    Args:
        model_name (`str`): The base model: Hub id or folder.
        sources (`Sequence[str]`): As in [`choose_experts`].
        languages (`Collection[str]`): Tags of the languages that the recordings have. `None`: also any other.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): That of base model and experts.
        option (`str`, *optional*, defaults to `"--model"`): Where the user gave the model; for messages.

    Raises:
        ValueError: model or experts cannot be loaded or do not fit, or the model does not know a language that has no
            expert.
    """
    tags = {language for language in languages if language is not None}
    check_whisper(model_name, option)
    experts = choose_experts(sources, set() if None in languages else tags)
    check_whisper(model_name, option, _prompts(tags, [language for _, language in experts]))
    model: WhisperForConditionalGeneration | PeftModel
    model, processor = load_base(model_name, dtype, option)
    for source, language in experts:
        model = load_expert(model, source, language)
    return model, processor


def load_base(
    model_name: str, dtype: torch.dtype = torch.float32, option: str = "--model"
) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """
    Load a Whisper and its processor. Arguments are as in [`load_with_experts`].

    Raises:
        ValueError: they cannot be loaded.
    """
    try:
        model = WhisperForConditionalGeneration.from_pretrained(model_name, dtype=dtype)
        return model, WhisperProcessor.from_pretrained(model_name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{option} {model_name} cannot be used: {error}") from error


def load_expert(model: WhisperForConditionalGeneration | PeftModel, source: str, language: HubLanguage) -> PeftModel:
    """
    Load one expert on a model, in the precision of the model.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The base model, or one with other experts.
        source (`str`): The folder or repository of [`choose_experts`].
        language (`HubLanguage`): The expert.

    Returns:
        `PeftModel`: the model itself, or one around the base model. The adapter's name is [`expert_name`].

    Raises:
        ValueError: it cannot be loaded, or does not fit.
    """
    name = expert_name(language)
    if not Path(source).is_dir():
        return load_language(model, source, name, autocast_adapter_dtype=False)
    folder = str(Path(source, language.subfolder))
    if isinstance(model, PeftModel):
        model.load_adapter(folder, name, autocast_adapter_dtype=False)
        return model
    return PeftModel.from_pretrained(model, folder, adapter_name=name, autocast_adapter_dtype=False)


def expert_name(language: HubLanguage) -> str:
    """The name that an expert has as an adapter."""
    return language.subfolder or language.code


def _prompts(tags: Collection[str], experts: Sequence[HubLanguage]) -> set[str]:
    """Whisper's codes of the languages in the prompts. Raises a `ValueError` if there is none for a language."""
    codes = set()
    for tag in tags:
        closest = closest_tags(tag, [expert.code for expert in experts])
        expert = next((expert for expert in experts if expert.code in closest), None)
        code = own_prompt_code(tag) if expert is None else expert.prompt_language
        if code is None:
            raise ValueError(
                f"Whisper does not know the language {tag!r}, and --adapters has no expert for it: give its expert, "
                "or --language with the Whisper language to transcribe it as"
            )
        codes.add(code)
    return codes


def choose_experts(sources: Sequence[str], languages: Collection[str]) -> list[tuple[str, HubLanguage]]:
    """
    Choose the experts of languages in folders and repositories.

    Args:
        sources (`Sequence[str]`): Adapter folders, folders with one folder a language, and repositories.
        languages (`Collection[str]`): Tags. Empty for all.

    Returns:
        `list`: the experts, each with its source.

    Raises:
        ValueError:
            A source has no adapters or cannot be reached; there is none for the languages, or several for one; they
            have different contexts, or a cut context and a language without expert.
    """
    by_language: dict[str, list[tuple[str, HubLanguage]]] = {}
    for source in sources:
        check_source(source, "--adapters", "adapters")
        try:
            found = read_languages(Path(source)) if Path(source).is_dir() else list_languages(source)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"--adapters {source} is neither a folder here nor a repository that can be read on the Hub: {error}"
            ) from error
        if not found:
            raise ValueError(f"--adapters {source} holds no adapter of a language: {_what_it_is(Path(source))}")
        for language in found:
            by_language.setdefault(language.code, []).append((source, language))
    wanted = {found for tag in languages for found in closest_tags(tag, by_language)}
    chosen = {code: entries for code, entries in by_language.items() if not languages or code in wanted}
    if sources and not chosen:
        raise ValueError(
            f"none of the adapters is for {', '.join(sorted(languages))}: they are for "
            f"{', '.join(sorted(by_language))}. Leave --adapters out to transcribe with the base model"
        )
    for code, entries in chosen.items():
        if len(entries) > 1:
            folders = ", ".join(str(Path(source, language.subfolder)) for source, language in entries)
            raise ValueError(f"several adapters are for {code}: {folders}. Give one of them")
    experts = [entries[0] for entries in chosen.values()]
    _check_contexts(experts, languages)
    return experts


def _what_it_is(folder: Path) -> str:
    """Says what a folder without adapters of languages holds instead, and where to give it."""
    for path in sorted([*folder.glob(CONFIG_NAME), *folder.glob(f"*/{CONFIG_NAME}")]):
        config = read_config(path)
        if not is_clsr(config):
            kind = config.get("peft_type") if isinstance(config, dict) else None
            return (
                f"{path.parent} is an adapter of the method {kind}. Merge it into its base model, "
                f"peft.PeftModel.from_pretrained(whisper, {str(path.parent)!r}).merge_and_unload(), save that with "
                "save_pretrained, and give its folder as --model"
            )
        return f'{path} names no language, and {path.parent.name!r} is none: write \'"language": "ca"\' into it'
    if (folder / "config.json").is_file():
        return "it is a whole model: give it as --model"
    return "expected an adapter_config.json with a language, in it or in a folder a language"


def _check_contexts(experts: Sequence[tuple[str, HubLanguage]], languages: Collection[str]) -> None:
    contexts = {language.code: language.max_audio_seconds for _, language in experts}
    if len(set(contexts.values())) > 1:
        raise ValueError(
            "adapters on one model share its context, and these have different ones: "
            + ", ".join(f"{code} {f'{seconds:g} s' if seconds else 'all'}" for code, seconds in contexts.items())
            + ". Give those of one context, and only recordings of their languages: a separate folder or table"
        )
    seconds = next(iter(contexts.values()), None)
    missing = sorted(tag for tag in languages if not closest_tags(tag, contexts))
    if seconds and (missing or not languages):
        raise ValueError(
            f"the adapters cut the model's context to {seconds:g} s, at which the base model is no use: "
            + (f"transcribe {', '.join(missing)} without them" if missing else "name the languages with --language")
            + f" (there are adapters for {', '.join(sorted(contexts))})"
        )
