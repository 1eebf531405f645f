"""The folder of a run: `results.json`, with the settings and a row for each language."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_text

RESULTS_NAME = "results.json"


def open_results(
    output_dir: Path, settings: dict[str, Any], languages: Sequence[str], overwrite: bool
) -> dict[str, Any]:
    """
    Read the results of earlier runs with the same settings.

    Returns:
        `dict`: `{"settings": {...}, "languages": {code: row}}`.

    Raises:
        ValueError: `output_dir` is a file, has results of other settings, or adapters of unknown settings.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; expected a folder, which need not exist")
    if not (output_dir / RESULTS_NAME).exists():
        for language in languages:
            if (output_dir / language / "adapter_config.json").exists() and not overwrite:
                raise ValueError(
                    f"{output_dir / language} has an adapter of unknown settings: choose another --output_dir, or "
                    "give --overwrite to replace it"
                )
        return {"settings": settings, "languages": {}}

    results = read_results(output_dir)
    old_settings, rows = results["settings"], results["languages"]
    differences = ", ".join(
        f"{key} {old_settings.get(key)!r} there, {settings.get(key)!r} here"
        for key in sorted({**old_settings, **settings})
        if old_settings.get(key) != settings.get(key)
    )
    if not differences:
        if overwrite:
            results["languages"] = {key: row for key, row in rows.items() if key not in languages}
        return results
    if overwrite:
        return {"settings": settings, "languages": {}}
    raise ValueError(
        f"{output_dir} has results of other settings ({differences}): choose another --output_dir, or give "
        "--overwrite to replace them"
    )


def read_results(output_dir: Path) -> dict[str, Any]:
    """
    Read `results.json` of a run.

    Raises:
        ValueError: there is none, or `peft-clsr train` did not write it.
    """
    path = output_dir / RESULTS_NAME
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(results["settings"], dict) or not isinstance(results["languages"], dict):
            raise ValueError("settings and languages are no objects")
    except FileNotFoundError as error:
        raise ValueError(f"{output_dir} has no {RESULTS_NAME}: give the --output_dir of a run") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by peft-clsr train ({error}): choose another --output_dir"
        ) from error
    return results


def write_results(results: Mapping[str, Any], output_dir: Path) -> None:
    text = json.dumps(results, indent=2, ensure_ascii=False, sort_keys=True)
    write_text(output_dir / RESULTS_NAME, text + "\n")
