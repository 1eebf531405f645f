"""Checks that a Whisper can be told the language of a recording."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from .languages.groups import related_languages

# What `generate` needs to be told a language and a task, and to give timestamps.
_LANGUAGE_SETTINGS = ("lang_to_id", "task_to_id", "no_timestamps_token_id")
_ENGLISH_VOCABULARY = 51864  # of OpenAI's models for English only; the others have more
_SIZES = {384: "tiny", 512: "base", 768: "small", 1024: "medium", 1280: "large-v2"}  # by d_model


def check_model_languages(model: nn.Module) -> None:
    """
    Check that a loaded Whisper can be told a language. Models that are no Whisper pass.

    Raises:
        ValueError: as [`check_languages`].
    """
    config, generation_config = getattr(model, "config", None), getattr(model, "generation_config", None)
    if generation_config is not None and getattr(config, "model_type", None) == "whisper":
        check_languages(config, generation_config, f"the model {getattr(config, 'name_or_path', '')}".rstrip())


def check_prompt_language(model: nn.Module, config: Any) -> None:
    """
    Check that a loaded Whisper has the token of an adapter's prompt. Other models pass.

    Args:
        model (`nn.Module`): The base model.
        config (`CLSRConfig`): The adapter's.

    Raises:
        ValueError: it has none, such as "yue" in Whisper v1 and v2.
    """
    known = getattr(getattr(model, "generation_config", None), "lang_to_id", None)
    token = f"<|{config.prompt_language}|>"
    if config.prompt_language is None or not known or token in known:
        return
    others = [code for code in related_languages(config.prompt_language) if f"<|{code}|>" in known]
    hint = f", such as {others[0]!r}" if others else ""
    raise ValueError(
        f"prompt_language is {config.prompt_language!r}, and this Whisper has no token {token}: set prompt_language "
        f"of {config.language!r} to a language that it knows{hint}, or take a Whisper that has the token (large-v3)"
    )


def check_languages(config: Any, generation_config: Any, owner: str, source: str | None = None) -> None:
    """
    Check that a Whisper can be told a language.

    Args:
        config (`WhisperConfig`): The model's.
        generation_config (`GenerationConfig`): The model's.
        owner (`str`): The model, for the message.
        source (`str`, *optional*): The model's folder or repository, if it is not loaded yet.

    Raises:
        ValueError: the model knows English only, or its generation config does not have the languages.
    """
    is_multilingual = getattr(generation_config, "is_multilingual", config.vocab_size != _ENGLISH_VOCABULARY)
    if not is_multilingual:
        raise ValueError(
            f"{owner} knows English only, expected a multilingual Whisper: one without '.en' in its name, such as "
            "openai/whisper-small"
        )
    missing = [name for name in _LANGUAGE_SETTINGS if getattr(generation_config, name, None) is None]
    if not missing:
        return
    current = f'GenerationConfig.from_pretrained("{_official_name(config)}")'
    folder = source if source is not None and os.path.isdir(source) else "FOLDER"
    save = f"""save the current one in it: python -c 'from transformers import GenerationConfig; {current}"""
    save += f""".save_pretrained("{folder}")'"""
    if source is None:
        remedy = f"take the current one: model.generation_config = transformers.{current}"
    elif folder == source:
        remedy = save
    else:
        remedy = f"download it, hf download {source} --local-dir FOLDER, {save}, and give the folder"
    raise ValueError(
        f"{owner} is a multilingual Whisper with an outdated generation config, which lacks the languages "
        f"({', '.join(missing)}); {remedy}"
    )


def _official_name(config: Any) -> str:
    """OpenAI's model of the same size, whose generation config fits."""
    size = _SIZES.get(config.d_model, "small")
    if config.num_mel_bins == 128:
        size = "large-v3" if config.decoder_layers > 4 else "large-v3-turbo"
    return f"openai/whisper-{size}"
