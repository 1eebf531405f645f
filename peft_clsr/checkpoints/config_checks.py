"""Checks of an `adapter_config.json` before it is used."""

from __future__ import annotations

import math
import re
import reprlib
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from ..files import read_json
from ..tuner.config import CLSRConfig

# Patterns that cannot backtrack for long: single characters, classes or `.`, and groups of literal alternatives.
_SIMPLE_PATTERN = re.compile(
    r"(?:[\w-]|\\\.|\.[*+]?|(?:\\d|\[[\w-]+\])[*+]?|\((?:\?:)?(?:[\w-]|\\\.)+(?:\|(?:[\w-]|\\\.)+)*\))+"
)
_MODULE_NAME = re.compile(r"[\w.-]+")
# Decides if a file that cannot be read as JSON is a config of ours.
_CLSR_MARKER = re.compile(rb'"peft_type"\s*:\s*"CLSR"')

_short = reprlib.Repr()  # values in errors may be megabytes
_short.maxstring = _short.maxother = 200


def read_config(path: str | Path) -> dict[str, Any] | None:
    """
    Read and check the `adapter_config.json` of a CLSR adapter.

    Returns:
        `dict[str, Any]`: the config, or `None` if it is one of another PEFT method. PEFT reads these without checks.

    Raises:
        ValueError: the config of a CLSR adapter is larger than 4 MiB, is no JSON, is nested too deeply, has a value of
            another type than its field, or a regular expression that could take hours.
    """
    try:
        config = read_json(path)
    except ValueError:
        if _CLSR_MARKER.search(Path(path).read_bytes()):
            raise
        return None
    if not is_clsr(config):
        return None
    for name, hint in typing.get_type_hints(CLSRConfig).items():
        if name in config and not _fits(config[name], hint):
            raise ValueError(
                f"{name} in {path} is {_short.repr(config[name])}, expected {getattr(hint, '__name__', hint)}: do not "
                "load this adapter, or write its config again"
            )
    _check_patterns(config, path)
    return config


def is_clsr(config: Any) -> bool:
    """True if `config`, from an `adapter_config.json`, is of a CLSR adapter."""
    return isinstance(config, dict) and config.get("peft_type") == "CLSR"


def _fits(value: Any, hint: Any) -> bool:
    """True if a JSON value has the type of a field of the config."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if hint is dict:  # auto_mapping
        return isinstance(value, dict) and all(_fits(item, str | None) for item in value.values())
    if hint is bool or hint is types.NoneType:
        return isinstance(value, hint)
    if hint is float and isinstance(value, float):
        return math.isfinite(value)
    if hint in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(value, str) and (hint is str or issubclass(hint, Enum)) and len(value) <= 4096


def _check_patterns(attributes: dict[str, Any], path: str | Path) -> None:
    """Refuse regular expressions that could take hours. Those of a config are matched with every module."""
    for name in ("target_modules", "output_modules", "exclude_modules"):
        pattern = attributes.get(name)
        if isinstance(pattern, str):
            groups = [group.removeprefix("?:").split("|") for group in re.findall(r"\(([^)]*)\)", pattern)]
            is_simple = (
                len(pattern) <= 1000
                and _SIMPLE_PATTERN.fullmatch(pattern)
                and len(re.findall(r"[*+]", pattern)) <= 3
                and len(groups) <= 3
                and all(len(set(group)) == len(group) for group in groups)
            )
            if not is_simple:
                raise ValueError(
                    f"{name} in {path} is the regular expression {_short.repr(pattern)}, expected at most three "
                    "repetitions, each of one character, and three groups of different literal alternatives, as in "
                    r"'.*\.(encoder|decoder)\.layers\.\d+\.fc1' (others may take hours to match): name the modules in "
                    "a list"
                )
    for name in ("modules_to_save", "layers_pattern"):  # PEFT puts them into regular expressions
        value = attributes.get(name) or []
        for pattern in [value] if isinstance(value, str) else value:
            if not _MODULE_NAME.fullmatch(pattern) or len(pattern) > 1000:
                raise ValueError(f"{name} in {path} has {_short.repr(pattern)}, expected names of modules")
