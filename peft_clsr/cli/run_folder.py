"""The folder of a training run: `results.json` with its settings and its languages, and its checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..files import check_output_folder, to_json, write_text
from .train_options import DataArguments, ExpertArguments, TrainOptions, expert_config

RESULTS = "results.json"
# Keys in the row of a language, and the part of its `Configs` that they hold.
CONFIG_KEYS = {"dataset_config": "dataset", "eval_config": "test"}
# These do not affect results, or stand in the row of their language.
_NO_SETTINGS = {"output_dir", "overwrite", "keep_checkpoints", "languages", "dataset_config", "eval_config"}
_NO_SETTINGS |= {"allow_dropped", "preprocessing_workers", "resume_from_checkpoint", "teacher_cache"}
_NO_SETTINGS |= {"save_on_each_node", "save_steps", "save_strategy", "save_total_limit", "use_cpu"}


def settings_of(options: TrainOptions) -> dict[str, Any]:
    """The options that affect results; of the trainer's arguments, those that differ from transformers' defaults."""
    from ..distillation.arguments import DistillationTrainingArguments

    data, expert, lora, training = options
    # Making arguments sets up the processes of the run anew, with the device that these name.
    plain = DistillationTrainingArguments(output_dir=training.output_dir, use_cpu=training.use_cpu)
    changed = {
        item.name: getattr(training, item.name)
        for item in fields(training)
        if item.init and item.name not in _NO_SETTINGS and getattr(training, item.name) != getattr(plain, item.name)
    }
    settings = {key: value for key, value in asdict(data).items() if key not in _NO_SETTINGS}
    settings |= expert_config(expert) if lora is None else {"exclude_modules": expert.exclude_modules, **asdict(lora)}
    return json.loads(json.dumps({**settings, **changed}, default=str, sort_keys=True))


def open_results(options: TrainOptions) -> dict[str, Any]:
    """
    Read the results of an earlier run with the same settings, or start new ones.

    Returns:
        `dict`: "settings"; "languages", row by language code; and "unfinished", configurations by code of those whose
        training has begun.

    Raises:
        ValueError: the folder holds a run of other settings, adapters or checkpoints of unknown ones, or checkpoints
            that would be lost.
    """
    results = _results_of_settings(options)
    # The main process has the settings. Other machines may have checkpoints alone.
    if options.training.process_index == 0 and not options.data.overwrite:
        for language in options.data.languages:
            if language not in results["languages"]:
                _check_checkpoints(language, options, results["unfinished"])
    return results


def _check_checkpoints(language: str, options: TrainOptions, unfinished: dict[str, Any]) -> None:
    """Raise a `ValueError` for checkpoints of a training that is not continued."""
    from ..distillation.resumption import checkpoints

    folder = checkpoints_folder(options.output_dir, language)
    if not checkpoints(folder):
        return
    if language not in unfinished:
        raise ValueError(
            f"{folder} holds checkpoints of unknown settings: choose another --output_dir, or give --overwrite to "
            "remove them"
        )
    if not options.training.resume_from_checkpoint:
        raise ValueError(
            f"{folder} holds checkpoints of a training that was stopped: give --resume_from_checkpoint true to "
            "continue it, or --overwrite to remove them and start anew"
        )


def _results_of_settings(options: TrainOptions) -> dict[str, Any]:
    data, output_dir = options.data, options.output_dir
    settings = settings_of(options)
    check_output_folder(output_dir, "--output_dir")
    path = output_dir / RESULTS
    if not path.exists():
        for language in data.languages:
            if (output_dir / language / "adapter_config.json").exists() and not data.overwrite:
                raise ValueError(
                    f"{output_dir / language} holds an adapter from elsewhere: choose another --output_dir, or give "
                    "--overwrite to replace it"
                )
        return {"settings": settings, "languages": {}, "unfinished": {}}

    earlier = read_results(output_dir)
    # An option that an older version did not have was at its default.
    defaults = {item.name: item.default for kind in (DataArguments, ExpertArguments) for item in fields(kind)}
    missing = settings.keys() & defaults.keys() - earlier["settings"].keys()
    earlier["settings"] |= {name: defaults[name] for name in missing}
    if data.overwrite:
        for language in data.languages:
            earlier["languages"].pop(language, None)
            earlier["unfinished"].pop(language, None)
    differences = ", ".join(
        f"{key} {earlier['settings'].get(key)!r} there, {settings.get(key)!r} here"
        for key in sorted({*earlier["settings"], *settings} - _NO_SETTINGS)
        if earlier["settings"].get(key) != settings.get(key)
    )
    if not differences:
        return {**earlier, "settings": settings}
    if data.overwrite:
        return {"settings": settings, "languages": {}, "unfinished": {}}
    raise ValueError(
        f"{output_dir} holds a run of other settings ({differences}): choose another --output_dir, or give "
        "--overwrite to replace it"
    )


def read_results(output_dir: str | Path) -> dict[str, Any]:
    """
    Read `results.json` of a run.

    Raises:
        ValueError: there is none, or it was not written by `peft-clsr train`.
    """
    path = Path(output_dir) / RESULTS
    if not path.is_file():
        raise ValueError(f"{output_dir} has no {RESULTS}: expected a folder that 'peft-clsr train' wrote")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        parts = {"unfinished": {}, **results}  # older versions wrote no "unfinished"
        return {key: dict(parts[key]) for key in ("settings", "languages", "unfinished")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by 'peft-clsr train' ({error}): choose another folder") from error


def write_results(results: dict[str, Any], output_dir: str | Path) -> None:
    """Write `results.json`."""
    write_text(Path(output_dir) / RESULTS, to_json(results, sort_keys=True))


def describe_unfinished(results: dict[str, Any], output_dir: str | Path) -> str:
    """A sentence about the languages whose training was stopped, or still runs."""
    return (
        f"{output_dir}: the training of {', '.join(results['unfinished'])} is not finished; if it was stopped, give "
        "its command again, with --resume_from_checkpoint true"
    )


def checkpoints_folder(output_dir: str | Path, language: str) -> Path:
    """The folder of a language's checkpoints."""
    return Path(output_dir) / "checkpoints" / language


def remove_checkpoints(output_dir: str | Path, language: str) -> None:
    """Remove the checkpoints of a language. Other files in their folder stay, such as logs."""
    from ..distillation.resumption import checkpoints

    folder = checkpoints_folder(output_dir, language)
    for checkpoint in checkpoints(folder).values():
        shutil.rmtree(checkpoint)
    for empty in (folder, folder.parent):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
