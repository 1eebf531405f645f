"""Says once which dialects take the expert of their language."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..languages.adapters import adapter_languages, is_for_broader_language
from .route import RoutingState


def warn_of_broader_adapters(
    routing: RoutingState, adapters: Mapping[str, Any], names: Mapping[str, str | None]
) -> None:
    """
    Warn of languages that take the adapter of a broader one, each once for a model.

    Args:
        routing (`RoutingState`): The state of the model.
        adapters (`Mapping[str, CLSRConfig]`): Its adapters.
        names (`Mapping[str, str]`): Language to its adapter; `None` for the base model.
    """
    broader = {tag: name for tag, name in names.items() if name and is_for_broader_language(adapters, name, tag)}
    for language in first_time(routing, broader):
        name = broader[language]
        warnings.warn(
            f"there is no adapter for {language!r}, so {name!r} takes it, which is for "
            f"{adapter_languages(adapters)[name]!r}",
            stacklevel=3,
        )


def first_time(routing: RoutingState, languages: Iterable[str]) -> list[str]:
    """Those of some languages that nobody was warned of yet."""
    with routing.calls.lock:  # once, also in several threads
        news = set(languages) - routing.warned_of
        routing.warned_of |= news
    return sorted(news)
