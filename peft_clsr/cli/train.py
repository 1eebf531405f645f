"""`peft-clsr train`: measure the base model, train an expert, measure again, show a table; for each language."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .help import HelpFormatter
from .train_options import (
    ExpertOptions,
    LoraOptions,
    MainTrainingOptions,
    MoreExpertOptions,
    MoreRecordingOptions,
    RecordingOptions,
)

if TYPE_CHECKING:
    from ..distillation.arguments import DistillationTrainingArguments
    from .train_language import TrainingPlan

DESCRIPTION = "train language experts: measure the base model, train, measure again, show a table"

_EPILOG = """\
examples:
  peft-clsr train --student openai/whisper-base --dataset my_recordings --languages ca --output_dir runs/ca
  peft-clsr train --student openai/whisper-small --teacher openai/whisper-large-v2 --dataset google/fleurs \\
      --dataset_config {language} --dataset_revision refs/convert/parquet --languages ca_es uk_ua \\
      --output_dir runs/fleurs
  accelerate launch -m peft_clsr train ...

my_recordings has train/metadata.csv and test/metadata.csv with the columns file_name and transcription; with a column
language, each language takes its own rows. {language} stands for the code in --dataset, and for the language as you
wrote it in --dataset_config.
"""
_MAIN = (RecordingOptions, ExpertOptions, MainTrainingOptions)
_ALL = (RecordingOptions, MoreRecordingOptions, ExpertOptions, MoreExpertOptions, LoraOptions)
# Options that do not affect the results.
_NOT_SETTINGS = {
    "output_dir",
    "overwrite",
    "languages",
    "dataset_config",
    "preprocessing_workers",
    "resume_from_checkpoint",
    "teacher_cache",
    "keep_checkpoints",
}


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    from transformers import HfArgumentParser  # without torch

    settings = {"prog": prog, "description": DESCRIPTION, "epilog": _EPILOG, "formatter_class": HelpFormatter}
    if not everything:
        return HfArgumentParser(
            _MAIN, usage=f"{prog} --student ... --dataset ... --languages ... [options]", **settings
        )
    from ..distillation.arguments import DistillationTrainingArguments

    parser = HfArgumentParser((*_ALL, DistillationTrainingArguments), **settings)
    defaults = {item.name: item.default for item in fields(MainTrainingOptions) if item.default is not MISSING}
    parser.set_defaults(**defaults)
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from ..extras import require
    from .run_folder import open_results, write_results
    from .table import run_table

    try:
        # Check all arguments before anything is loaded or written.
        for name in ("datasets", "jiwer", "soundfile", "matplotlib"):
            require(name)
        *options, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        output_dir = Path(training.output_dir)
        plan = _make_plan(options, training)
        results = open_results(output_dir, _settings(options, training), plan.languages, plan.overwrite)
        _check_dataset_configs(results, plan, output_dir)
    except (ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")
    from .train_language import train_language

    is_main = training.process_index == 0
    for language in plan.languages:
        if language in results["languages"]:
            print(f"{language}: trained before with these settings, see {output_dir} (--overwrite trains again)")
            continue
        try:
            results["languages"][language] = train_language(language, plan)
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        if is_main:
            write_results(results, output_dir)
    if is_main:
        print(run_table(results, plan.languages))
        print(f"results and adapters: {output_dir}")
    return 0


def _make_plan(options: Sequence[Any], training: DistillationTrainingArguments) -> TrainingPlan:
    """Check the options, and put them together."""
    from ..languages import language_code
    from ..tuner.config import CLSRConfig
    from .train_language import TrainingPlan

    recordings, more_recordings, expert, more_expert, lora = options
    spellings = {language_code(language): language for language in recordings.languages}
    expert_settings = {**asdict(expert), **asdict(more_expert), "expert_rank": _expert_rank(expert.expert_rank)}
    CLSRConfig(**expert_settings)
    if recordings.teacher_cache is not None and recordings.teacher is None:
        raise ValueError("--teacher_cache stores the states of a teacher: give a --teacher, or leave it out")
    if training.resume_from_checkpoint not in (None, "true", "True"):
        raise ValueError(
            f"--resume_from_checkpoint is {training.resume_from_checkpoint!r}, expected 'true': each language "
            "continues from the last checkpoint in its own folder under --output_dir"
        )
    _check_lora(lora, recordings, expert, more_expert)
    return TrainingPlan(
        recordings=recordings,
        more_recordings=more_recordings,
        expert_settings=expert_settings,
        lora=None if lora.lora_rank is None else lora,
        training=training,
        dataset_configs=_dataset_configs(more_recordings.dataset_config, spellings),
    )


def _expert_rank(value: str) -> int | None:
    if value == "full":
        return None
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--expert_rank is {value!r}, expected a number, or 'full' for a full copy") from None


def _dataset_configs(configs: list[str] | None, spellings: Mapping[str, str]) -> dict[str, str | None]:
    """The configuration of the dataset for each language code. `{language}` is the user's spelling."""
    configs = configs or [None]
    if len(configs) == 1:
        configs = configs * len(spellings)
    if len(configs) != len(spellings):
        raise ValueError(
            f"{len(configs)} values of --dataset_config for {len(spellings)} languages: give one each, in their "
            "order, or one for all"
        )
    return {
        code: config and config.replace("{language}", spelling)
        for config, (code, spelling) in zip(configs, spellings.items(), strict=True)
    }


def _check_dataset_configs(results: Mapping[str, Any], plan: TrainingPlan, output_dir: Path) -> None:
    """Raise a `ValueError` if a language has results on another configuration of the dataset."""
    for language, config in plan.dataset_configs.items():
        old_config = results["languages"].get(language, {}).get("dataset_config", config)
        if old_config != config:
            raise ValueError(
                f"{output_dir} has results of {language} on {old_config!r}, not {config!r}: choose another "
                "--output_dir, or give --overwrite to replace them"
            )


def _check_lora(
    lora: LoraOptions, recordings: RecordingOptions, expert: ExpertOptions, more_expert: MoreExpertOptions
) -> None:
    if lora.lora_rank is None:
        return
    if lora.lora_rank < 1:
        raise ValueError(f"--lora_rank is {lora.lora_rank}, expected at least 1; leave it out for an expert")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora_dropout is {lora.lora_dropout}, expected a probability in [0, 1)")
    changed = [
        item.name for one in (expert, more_expert) for item in fields(one) if getattr(one, item.name) != item.default
    ]
    unused = ["teacher"] * (recordings.teacher is not None) + [name for name in changed if name != "exclude_modules"]
    if unused:
        raise ValueError(
            f"--lora_rank trains LoRA instead of an expert, so {', '.join(f'--{name}' for name in unused)} would do "
            "nothing: leave out the one or the other"
        )


def _settings(options: Sequence[Any], training: DistillationTrainingArguments) -> dict[str, Any]:
    """The settings that affect the results: options of data and method, and changed training arguments."""
    from ..distillation.arguments import DistillationTrainingArguments

    recordings, more_recordings, expert, more_expert, lora = options
    defaults = DistillationTrainingArguments(output_dir=training.output_dir)
    changed = {
        item.name: getattr(training, item.name)
        for item in fields(training)
        if item.init and getattr(training, item.name) != getattr(defaults, item.name)
    }
    settings = {**asdict(recordings), **asdict(more_recordings)}
    if lora.lora_rank is None:
        settings |= {**asdict(expert), **asdict(more_expert), "expert_rank": _expert_rank(expert.expert_rank)}
    else:
        settings |= {"exclude_modules": more_expert.exclude_modules, **asdict(lora)}
    settings = {name: value for name, value in {**settings, **changed}.items() if name not in _NOT_SETTINGS}
    return json.loads(json.dumps(settings, default=str, sort_keys=True))
