"""Checks of an adapter's `adapter_config.json`."""

from __future__ import annotations

import math
import re
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftType

from ..files import MAX_JSON_BYTES, read_json
from ..tuner.adapter_names import short_repr
from ..tuner.config import CLSRConfig

# In a file that is too large or broken to be parsed.
_CLSR_TEXT = re.compile(rb'"peft_type"\s*:\s*"CLSR"')
# Patterns that cannot backtrack for long: one character, class or `.` at a time, and groups of literal alternatives.
_SIMPLE_PATTERN = re.compile(
    r"(?:[\w-]|\\\.|\.[*+]?|(?:\\d|\[[\w-]+\])[*+]?|\((?:\?:)?(?:[\w-]|\\\.)+(?:\|(?:[\w-]|\\\.)+)*\))+"
)
_MODULE_NAME = re.compile(r"[\w.-]+")


def read_config(path: str | Path) -> Any:
    """
    Read an `adapter_config.json`, and check it if it is that of a CLSR adapter.

    Returns:
        The parsed JSON. Configs of other PEFT methods are returned unchecked.

    Raises:
        ValueError: the file is larger than 4 MiB, is no JSON or is nested too deeply; or it is a CLSR config, and a
            value has the wrong type or is a regular expression that could match for hours.
    """
    attributes = read_json(path)
    if is_clsr(attributes):
        for name, hint in typing.get_type_hints(CLSRConfig).items():
            if name in attributes and not _has_type(attributes[name], hint):
                raise ValueError(
                    f"{name} in {path} is {short_repr(attributes[name])}, expected "
                    f"{getattr(hint, '__name__', hint)}: do not load this adapter, or write its config again"
                )
        _check_patterns(attributes, path)
    return attributes


def is_clsr(attributes: Any) -> bool:
    """True for the parsed config of a CLSR adapter."""
    return isinstance(attributes, dict) and attributes.get("peft_type") == PeftType.CLSR


def is_clsr_file(path: str | Path) -> bool:
    """
    True for the config file of a CLSR adapter, read without parsing more than 4 MiB.

    A file that is larger, or that is no JSON, counts as CLSR if its first 4 MiB have the text `"peft_type": "CLSR"`.
    """
    try:
        return is_clsr(read_json(path))
    except ValueError:
        with open(path, "rb") as file:
            return _CLSR_TEXT.search(file.read(MAX_JSON_BYTES)) is not None


def _has_type(value: Any, hint: Any) -> bool:
    """True if a JSON value has the type of a config field, and is of ordinary size."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, argument) for argument in arguments)
    if origin is list:
        return isinstance(value, list) and all(_has_type(item, arguments[0]) for item in value)
    if hint is dict:  # auto_mapping
        return isinstance(value, dict) and all(_has_type(item, str | None) for item in value.values())
    if hint is bool or hint is types.NoneType:
        return isinstance(value, hint)
    if hint is float and isinstance(value, float):
        return math.isfinite(value)
    if hint in (int, float):
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    return isinstance(value, str) and (hint is str or issubclass(hint, Enum)) and len(value) <= 4096


def _check_patterns(attributes: dict[str, Any], path: str | Path) -> None:
    """Raise a `ValueError` for a regular expression that could match for hours. Each is matched with every module."""
    for name in ("target_modules", "output_modules", "exclude_modules"):
        pattern = attributes.get(name)
        if isinstance(pattern, str) and not _is_simple(pattern):
            raise ValueError(
                f"{name} in {path} is the regular expression {short_repr(pattern)}, expected at most three "
                "repetitions, each of one character, and three groups of different literal alternatives, as in "
                r"'.*\.(encoder|decoder)\.layers\.\d+\.fc1' (others may take hours to match): name the modules in "
                "a list"
            )
    for name in ("modules_to_save", "layers_pattern"):  # PEFT builds regular expressions from them
        value = attributes.get(name) or []
        for pattern in [value] if isinstance(value, str) else value:
            if not _MODULE_NAME.fullmatch(pattern) or len(pattern) > 1000:
                raise ValueError(f"{name} in {path} has {short_repr(pattern)}, expected names of modules")


def _is_simple(pattern: str) -> bool:
    """True for a regular expression that always matches fast."""
    groups = [group.removeprefix("?:").split("|") for group in re.findall(r"\(([^)]*)\)", pattern)]
    return bool(
        len(pattern) <= 1000
        and _SIMPLE_PATTERN.fullmatch(pattern)
        and len(re.findall(r"[*+]", pattern)) <= 3
        and len(groups) <= 3
        and all(len(set(group)) == len(group) for group in groups)
    )
