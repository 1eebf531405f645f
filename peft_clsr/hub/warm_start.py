"""Starts a new expert as a copy of another language's: from a folder, a repository, or the same model."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import nn
from transformers.utils.hub import extract_commit_hash

from ..checkpoints.base_model import check_base_model, warn_of_other_base
from ..checkpoints.checks import check_adapter_folder, shapes_on_copy
from ..checkpoints.weights import check_shapes, read_shapes, weights_path
from ..files import sha256_of
from ..languages.tags import are_equal_tags, language_tag, whisper_code
from ..sources import check_source
from ..tuner.config import CLSRConfig
from .pull import download, small_files
from .record import read_languages, read_record

# Both adapters must have these in common, as the sizes of their weights follow from them.
_SIZES = ("expert_rank", "gate_dim")
_MODULES = (
    "target_modules",
    "output_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


class SavedExpert(NamedTuple):
    """A checked adapter in a folder here, and its name in messages and records: "pt of me/experts"."""

    folder: Path
    config: CLSRConfig
    name: str
    is_from_hub: bool


def warm_start(
    model: nn.Module,
    adapter_name: str,
    source: str | os.PathLike[str],
    language: str | None = None,
    *,
    revision: str | None = None,
    allow_other_base: bool = False,
    token: str | bool | None = None,
) -> None:
    """
    Start an adapter as a copy of another one's experts and gates, such as those of a related language.

    Everything is checked before the model is changed, as when an adapter is loaded. The source is noted in the
    adapter's config as `started_from`, and from there on model cards. Call it before the training: weights that the
    adapter has are replaced.

    Args:
        model (`nn.Module`): A [`~peft.PeftModel`], or a model of transformers with adapters of its own `add_adapter`.
        adapter_name (`str`): The adapter to start. It is on the model already.
        source (`str` or `os.PathLike`):
            The adapter to copy: the name of one on the model, a folder of one or of several languages, or a
            repository on the Hub. A name on the model comes first, then a folder.
        language (`str`, *optional*):
            Which language of a folder or repository: its folder, code or English name. Needed if there are several.
        revision (`str`, *optional*): A branch, tag or commit of the repository; "main" by default.
        allow_other_base (`bool`, *optional*, defaults to `False`):
            Copy even if the source was trained on another base model. Shapes must fit in any case.
        token (`str` or `bool`, *optional*): The token, as for `huggingface_hub`.

    Raises:
        ValueError: the model has no such adapter; the source is not found, is broken, or has several languages; it
            differs in rank, `gate_dim` or modules; or it was trained on another base model.

    Example:

    ```py
    >>> model = get_peft_model(whisper, CLSRConfig(language="gl"), adapter_name="gl")
    >>> warm_start(model, "gl", "me/whisper-small-experts", language="pt")
    ```
    """
    adapters = _adapters(model)
    if isinstance(source, str) and source in adapters:
        _copy_on_model(model, adapter_name, source, language)
        return
    expert = find_expert(source, language, revision=revision, token=token, adapters=adapters)
    config = _config_of(model, adapter_name, expert.config)
    check_fit(model, adapter_name, config, expert, allow_other_base=allow_other_base)
    start_from(model, adapter_name, expert)


def find_expert(
    source: str | os.PathLike[str],
    language: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    adapters: Any = (),
    option: str = "source",
) -> SavedExpert:
    """
    Find an adapter in a folder or repository, download it, and check that it is complete and finite.

    Args:
        source, language, revision, token: As for [`warm_start`].
        adapters (`Iterable[str]`, *optional*): Names on the model, for the message.
        option (`str`, *optional*): Where the user gave the source; for the message.

    Raises:
        ValueError: there is none, or it must not be loaded.
    """
    place = os.fspath(source)
    check_source(place, option, "adapters")
    if os.path.isdir(place):
        folder = Path(place)
        subfolder = _choose(folder, language, place)
        folder, where = folder / subfolder, f"the folder {folder.resolve().name}"
        is_from_hub = False
    else:
        api = HfApi(token=token)
        try:
            snapshot = small_files(api, place, revision)
            subfolder = _choose(snapshot, language, place)
            folder = download(api, place, subfolder, snapshot.name)
        except OSError as error:
            on_model = f"no adapter on the model ({', '.join(adapters)}), " if adapters else ""
            raise ValueError(
                f"{option} {place!r} is {on_model}no folder here and no repository that can be read on the Hub: "
                f"{error}"
            ) from error
        commit = extract_commit_hash(str(folder / CONFIG_NAME), None)
        where = f"{place} (commit {commit[:8]})" if commit else place
        is_from_hub = True
    config = check_adapter_folder(folder)
    return SavedExpert(folder, config, f"{config.language or subfolder or 'an adapter'} of {where}", is_from_hub)


def check_fit(
    model: nn.Module, adapter_name: str, config: CLSRConfig, expert: SavedExpert, *, allow_other_base: bool = False
) -> None:
    """
    Check that an adapter of `config` on `model` can start as a copy of a saved expert. Nothing is changed.

    Args:
        model (`nn.Module`): The base model, or one with adapters.
        adapter_name (`str`): The adapter's name, for messages.
        config (`CLSRConfig`): The adapter's config. The adapter need not be on the model yet.
        expert (`SavedExpert`): The source.
        allow_other_base (`bool`, *optional*): As for [`warm_start`].

    Raises:
        ValueError: they differ in rank, `gate_dim` or modules, or in the base model.
    """
    check_sizes(adapter_name, config, expert.config, expert.name)
    path = weights_path(expert.folder)
    if not allow_other_base:
        identity = read_record(expert.folder, sha256_of(path)).get("base_ffn")
        base = expert.config.base_model_name_or_path
        if expert.is_from_hub or identity:
            check_base_model(model, base, identity, expert.name)
        else:  # as PEFT's loaders of folders: only names are known
            warn_of_other_base(model, base, expert.folder)
    expected = shapes_on_copy(model, config)
    _check_modules(read_shapes(path), expected, adapter_name, config, expert.config, expert.name)
    check_shapes(read_shapes(path), expected, path)
    here, there = (_context(one.max_audio_seconds) for one in (config, expert.config))
    if here != there:
        warnings.warn(
            f"{expert.name} was trained at a context of {there}, and adapter {adapter_name!r} has {here}: it may help "
            "less than with max_audio_seconds as there",
            stacklevel=3,
        )


def check_sizes(adapter_name: str, config: CLSRConfig, source: CLSRConfig, source_name: str) -> None:
    """Raise a `ValueError` if two configs differ in the rank of their experts or in `gate_dim`."""
    for name in _SIZES:
        here, there = getattr(config, name), getattr(source, name)
        if here != there:
            raise ValueError(
                f"{name} is {_value(here)} in adapter {adapter_name!r} and {_value(there)} in {source_name}; an "
                f"expert starts as a copy of one with the same: give the new adapter {name}={there}, or take another "
                "source"
            )


def start_from(model: nn.Module, adapter_name: str, expert: SavedExpert) -> None:
    """Copy a saved expert, which [`check_fit`] has checked, into an adapter of the model, and note the source."""
    _copy(model, adapter_name, load_file(weights_path(expert.folder)), expert.name)


def _copy_on_model(model: nn.Module, adapter_name: str, source: str, language: str | None) -> None:
    """Start an adapter as a copy of another one of the same model."""
    config = _adapters(model)[source]
    if source == adapter_name:
        raise ValueError(f"adapter {adapter_name!r} cannot start as a copy of itself: name another source")
    if not isinstance(config, CLSRConfig):
        raise ValueError(f"adapter {source!r} is of the method {config.peft_type.value}, expected CLSR")
    if language is not None and language != source and not _is_tag(language, config.language):
        raise ValueError(
            f"language is {language!r}, but {source!r} is an adapter on the model, for {config.language or 'any'}: "
            f"leave the language out, or write a folder {source!r} as {os.path.join('.', source)!r}"
        )
    name = f"{config.language or source} of the same model"
    target = _config_of(model, adapter_name, config)
    check_sizes(adapter_name, target, config, name)
    weights = _weights(model, source)
    shapes = {key: tensor.shape for key, tensor in weights.items()}
    expected = {key: tensor.shape for key, tensor in _weights(model, adapter_name).items()}
    _check_modules(shapes, expected, adapter_name, target, config, name)
    check_shapes(shapes, expected, Path(name))
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f"adapter {source!r} has values that are NaN or infinite: take another source")
    _copy(model, adapter_name, weights, name)


@torch.no_grad()
def _copy(model: nn.Module, adapter_name: str, weights: dict[str, torch.Tensor], source_name: str) -> None:
    set_peft_model_state_dict(model, weights, adapter_name)
    _adapters(model)[adapter_name].started_from = source_name


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The configs of a model's adapters, by name."""
    adapters: Any = getattr(model, "peft_config", None)
    return adapters or {}


def _weights(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def _config_of(model: nn.Module, adapter_name: str, source: CLSRConfig) -> CLSRConfig:
    """The config of the adapter to start. Raises a `ValueError` that says how to add one, if there is none."""
    adapters = _adapters(model)
    config = adapters.get(adapter_name)
    if isinstance(config, CLSRConfig):
        return config
    settings = {name: getattr(source, name) for name in _SIZES}
    if whisper_code(adapter_name) is None and source.prompt_language is not None:
        settings = {"prompt_language": source.prompt_language, **settings}  # a related language sounds similar
    made = ", ".join(f"{name}={value!r}" for name, value in {"language": adapter_name, **settings}.items())
    made = f"CLSRConfig({made})"
    if config is not None:
        raise ValueError(f"adapter {adapter_name!r} is of the method {config.peft_type.value}, expected CLSR")
    if adapters:
        raise ValueError(
            f"the model has no adapter {adapter_name!r} (it has {', '.join(adapters)}): add it first, with the sizes "
            f"of the source, model.add_adapter({adapter_name!r}, {made})"
        )
    raise ValueError(
        f"the model is a {type(model).__name__} without adapters: add {adapter_name!r} first, with the sizes of the "
        f"source, model = get_peft_model(model, {made}, adapter_name={adapter_name!r})"
    )


def _choose(folder: Path, language: str | None, source: str) -> str:
    """The subfolder of a language in a folder of adapters; "" for the folder itself."""
    if language is None and (folder / CONFIG_NAME).is_file():
        return ""
    languages = read_languages(folder)
    found = languages
    if language is not None:
        found = [entry for entry in languages if entry.subfolder == language]
        found = found or [entry for entry in languages if _is_tag(language, entry.code)]
    if len(found) == 1:
        return found[0].subfolder
    has = ", ".join(f"{entry.subfolder or entry.code} ({entry.name})" for entry in languages) or "no language"
    if language is None:
        raise ValueError(f"{source} has {has}: name the language to start from")
    raise ValueError(f"{source} has {'several folders' if found else 'nothing'} for {language!r}; it has {has}")


def _is_tag(language: str, tag: str | None) -> bool:
    """True if a language, in any spelling, is that of a tag."""
    try:
        return tag is not None and are_equal_tags(language_tag(language), tag)
    except ValueError:
        return False


def _check_modules(
    shapes: dict[str, torch.Size],
    expected: dict[str, torch.Size],
    adapter_name: str,
    config: CLSRConfig,
    source: CLSRConfig,
    source_name: str,
) -> None:
    """Raise a `ValueError` if two adapters are not in the same modules of the model."""
    here, there = ({key.partition(".clsr_")[0] for key in keys} for keys in (expected, shapes))
    if here == there:
        return
    differing = [name for name in _MODULES if _plain(getattr(config, name)) != _plain(getattr(source, name))]
    values = "; ".join(
        f"{name} is {_plain(getattr(config, name))!r} here and {_plain(getattr(source, name))!r} there"
        for name in differing
    )
    raise ValueError(
        f"adapter {adapter_name!r} is in {len(here)} modules and {source_name} in {len(there)}, of which "
        f"{len(here & there)} are the same ({values or 'with the same settings'}): an expert starts as a copy of one "
        "in the same modules of the same base model"
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def _value(value: Any) -> str:
    return "None (a full copy)" if value is None else str(value)


def _context(seconds: float | None) -> str:
    return "all that the model hears" if seconds is None else f"{seconds:g} s"
