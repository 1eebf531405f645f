"""Checks of what users name: a model, an adapter or a dataset, in a folder here or on the Hub."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from .files import read_json

_ADAPTER_CONFIG = "adapter_config.json"
_COLLECTIVE = "mdc:"


def collective_id(name: str) -> str | None:
    """
    The ID in "mdc:ID", the name of a dataset of Mozilla Data Collective; `None` for another name.

    Raises:
        ValueError: there is no ID in it.
    """
    if not name.startswith(_COLLECTIVE):
        return None
    identifier = name.removeprefix(_COLLECTIVE)
    if not re.fullmatch(r"[\w-]+", identifier, re.ASCII):
        raise ValueError(
            f"{name!r} names no dataset of Mozilla Data Collective: expected mdc:ID, with the last part of the "
            "address of the dataset's page, https://mozilladatacollective.com/datasets/ID"
        )
    return identifier


def is_local_dataset(name: str) -> bool:
    """True for a dataset that is not read from the Hub: a folder or table here, or "mdc:ID"."""
    return os.path.exists(name) or collective_id(name) is not None


def check_source(name: str, option: str, expected: str, is_dataset: bool = False) -> None:
    """
    Check that a name can be that of a folder here or of a repository on the Hub. The Hub is not asked.

    Args:
        name (`str`): What the user gave.
        option (`str`): Where, such as "--dataset"; for the message.
        expected (`str`): What it should be, such as "a dataset"; for the message.
        is_dataset (`bool`, *optional*): A table is right, too, and "mdc:ID" of Mozilla Data Collective.

    Raises:
        ValueError: it can be neither.
    """
    if os.path.isdir(name) or (is_dataset and os.path.isfile(name)):
        return
    if is_dataset and collective_id(name) is not None:
        return
    if os.path.isfile(name):
        raise ValueError(f"{option} {name} is a file, expected {expected}: a folder, or a repository on the Hub")
    looks_local = name.startswith((".", "~", os.sep)) or name.endswith((os.sep, "/")) or "\\" in name
    try:
        validate_repo_id(name)
    except HFValidationError:
        looks_local = True
    if looks_local:
        raise ValueError(
            f"{option} {name!r} does not exist, expected {expected}: a folder"
            f"{' or a table' if is_dataset else ''}{did_you_mean(name)}"
        )


def split_adapter_source(text: str) -> tuple[str, str | None]:
    """
    Split FOLDER_OR_REPO[:language] into the folder or repository and the language.

    A folder that exists is taken as it is. The colon of a Windows drive is none that splits.

    Raises:
        ValueError: nothing stands before or after the colon.
    """
    source, colon, language = text.rpartition(":")
    is_path = any(separator in language for separator in "/\\")
    is_drive = len(source) == 1 and source.isalpha()
    if os.path.isdir(text) or not colon or is_path or is_drive:
        return text, None
    if not source or not language:
        raise ValueError(f"{text!r} is not FOLDER_OR_REPO[:language], such as 'me/experts:pt' or 'runs/experts:pt'")
    return source, language


def did_you_mean(name: str) -> str:
    """A remark about an existing path that is similar to `name`; "" if there is none."""
    if name.startswith("~"):
        return f"; '~' is for the shell only, write {os.path.expanduser(name)!r}"
    path = Path(name)
    missing = next((part for part in [*reversed(path.parents), path] if not part.exists()), path)
    try:
        present = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        return ""
    nearest = difflib.get_close_matches(missing.name, present, n=1)
    return f"; did you mean {str(missing.parent / nearest[0] / path.relative_to(missing))!r}?" if nearest else ""


def check_whisper(name: str, option: str, languages: Collection[str] = ()) -> None:
    """
    Check, from its small files, that a name is that of a Whisper for several languages.

    Args:
        name (`str`): A folder, or a repository on the Hub.
        option (`str`): Where the user gave it, such as "--student"; for the message.
        languages (`Collection[str]`, *optional*): Codes of the languages that it must know.

    Raises:
        ValueError: there is no such model; it is an adapter; it is no Whisper, or one for English only; its generation
            config is outdated; or it does not know a language.
    """
    from transformers import AutoConfig, GenerationConfig  # they import torch, and so does the next

    from .multilingual import check_languages

    check_source(name, option, "a Whisper")
    _refuse_adapter(Path(name), option)
    try:
        config = AutoConfig.from_pretrained(name)
    except (ValueError, OSError) as error:
        nothing = "" if os.path.isdir(name) else f"it is no folder here{did_you_mean(name)}; on the Hub: "
        raise ValueError(f"{option} {name} cannot be used: {nothing}{error}") from error
    if config.model_type != "whisper":
        raise ValueError(f"{option} {name} cannot be used: it is a {config.model_type}, expected a Whisper")
    try:
        generation_config = GenerationConfig.from_pretrained(name)
    except OSError:  # there is none
        generation_config = GenerationConfig()
    check_languages(config, generation_config, f"{option} {name}", source=name)
    known = getattr(generation_config, "lang_to_id", {})
    unknown = sorted(code for code in languages if f"<|{code}|>" not in known)
    if unknown:
        raise ValueError(
            f"{option} {name} has no token for the language {', '.join(unknown)}: take a Whisper that has"
        )


def _refuse_adapter(folder: Path, option: str) -> None:
    """Raise a `ValueError` if a folder has adapters, and no model."""
    if (folder / "config.json").is_file():
        return
    configs = [*folder.glob(_ADAPTER_CONFIG), *sorted(folder.glob(f"*/{_ADAPTER_CONFIG}"))]
    if not configs:
        return
    try:
        base = read_json(configs[0]).get("base_model_name_or_path") or "the base model"
    except (ValueError, AttributeError):
        base = "the base model"
    adapters = f" and --adapters {folder}" if option == "--model" else ""
    adapters = f" and --adapter {folder}" if option == "--base" else adapters
    kind = "an adapter" if configs[0].parent == folder else "a folder of adapters"
    raise ValueError(
        f"{option} {folder} is {kind}, expected a whole Whisper: give {option} {base}{adapters}, the model that the "
        "adapter was trained on"
    )
