"""`peft-clsr train`: train the experts of some languages, one after the other, and show a table."""

from __future__ import annotations

import argparse
import logging
import os
from typing import TYPE_CHECKING, Any

from .train_options import TrainOptions, check_options, expert_config, make_train_parser

if TYPE_CHECKING:
    from ..hub.warm_start import SavedExpert
    from .train_splits import Configs

logger = logging.getLogger(__name__)

DESCRIPTION = "train language experts: measure, train, measure again"


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    return make_train_parser(prog, everything)


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    from ..extras import require

    for module in ("av", "datasets", "jiwer", "soundfile", "soxr"):  # before the work, not after it
        require(module)
    import torch

    from .run_folder import CONFIG_KEYS, open_results
    from .train_data import check_recordings, language_configs, prompt_codes
    from .train_splits import Configs

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        # Everything that can be wrong with the options, before anything is loaded or written.
        from ..languages.tags import language_tag
        from ..sources import check_source, check_whisper

        # Without it, transformers refuses --bf16 where there is no GPU.
        parser.set_defaults(use_cpu=not torch.accelerator.is_available())
        *parsed, unknown = parser.parse_args_into_dataclasses(argv, True, look_for_args_file=False)
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        data, expert, lora, training = parsed
        spellings = {language_tag(language): language for language in data.languages}
        prompts = prompt_codes(data)
        data.languages = list(spellings)
        options = check_options(data, expert, lora, training)
        if training.process_index == 0:
            logging.getLogger("peft_clsr").setLevel(logging.INFO)
        configs = language_configs(data, spellings)
        check_whisper(data.student, "--student", prompts)
        if data.teacher is not None:
            check_whisper(data.teacher, "--teacher", prompts)
        for language in data.languages:
            for option in ("dataset", "eval_dataset"):
                name = getattr(data, option)
                if name is not None:
                    check_source(name.replace("{language}", language), f"--{option}", "a dataset", is_dataset=True)
        results = _of_main_process(open_results(options))
        _check_disks(options)
        for language, config in zip(data.languages, configs, strict=True):
            row = results["languages"].get(language) or results["unfinished"].get(language, {})
            earlier = Configs(*(row.get(name, getattr(config, part)) for name, part in CONFIG_KEYS.items()))
            if earlier != config:
                before, now = (" and ".join(map(repr, dict.fromkeys(of))) for of in (earlier, config))
                raise ValueError(
                    f"{options.output_dir} holds a training of {language} on {before}, not {now}: "
                    "choose another --output_dir, or give --overwrite to replace it"
                )
        untrained = [index for index, code in enumerate(data.languages) if code not in results["languages"]]
        source = _expert_to_start_from(options) if untrained else None
        check_recordings(
            options, [data.languages[index] for index in untrained], [configs[index] for index in untrained]
        )
        _train_all(options, configs, results, source)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def _of_main_process(results: dict[str, Any]) -> dict[str, Any]:
    """The results that the main process has read: other machines may not see its disk."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([results])[0] if PartialState().num_processes > 1 else results


def _check_disks(options: TrainOptions) -> None:
    """
    Warn if machines do not share the output folder, and checkpoints are only in that of the first.

    Raises:
        ValueError: they do, and each machine would write the same checkpoints there.
    """
    from accelerate import PartialState

    from ..distillation.disks import processes_on_disk

    process, is_saved_by_each = PartialState(), options.training.save_on_each_node
    local = int(os.environ.get("LOCAL_WORLD_SIZE", process.num_processes))  # on this machine
    peers = processes_on_disk(options.output_dir, process)
    if is_saved_by_each and len(peers) > local:
        raise ValueError(
            f"--save_on_each_node is for machines with disks of their own, but they share {options.output_dir}, where "
            "each would write the same checkpoints: leave it out"
        )
    if process.is_main_process and not is_saved_by_each and len(peers) < process.num_processes:
        logger.warning(
            f"the machines do not share {options.output_dir}: results and checkpoints are on the disk of the first. "
            "To resume after an interruption, give a folder that all see, or --save_on_each_node true"
        )


def _expert_to_start_from(options: TrainOptions) -> SavedExpert | None:
    """The expert that `--warm_start` names, with the sizes of the new ones."""
    if options.data.warm_start is None:
        return None
    from ..hub.warm_start import check_sizes, find_expert
    from ..sources import split_adapter_source
    from ..tuner.config import CLSRConfig

    place, language = split_adapter_source(options.data.warm_start)
    source = find_expert(place, language, option="--warm_start")
    new = CLSRConfig(**expert_config(options.expert))
    check_sizes(options.data.languages[0], new, source.config, source.name)
    return source


def _train_all(
    options: TrainOptions, configs: list[Configs], results: dict[str, Any], source: SavedExpert | None
) -> None:
    """Train the languages that have no results yet, and print the table."""
    from accelerate import PartialState

    from .run_folder import remove_checkpoints, write_results
    from .table import RESULTS_HEADER, markdown_table, results_rows
    from .train_data import report
    from .train_language import train_language

    data, training = options.data, options.training
    for language, config in zip(data.languages, configs, strict=True):
        if language in results["languages"]:
            report(
                training,
                f"{language}: trained before with these settings, see {options.output_dir} (again: --overwrite)",
            )
            continue
        results["languages"][language] = train_language(language, config, options, results, source)
        results["unfinished"].pop(language, None)
        PartialState().wait_for_everyone()  # all have written their part of the last checkpoint
        if training.process_index == 0:
            write_results(results, options.output_dir)
        if training.should_save and not data.keep_checkpoints:
            remove_checkpoints(options.output_dir, language)
    rows = [row for language in data.languages for row in results_rows(results, language)]
    report(training, markdown_table(RESULTS_HEADER, rows))
    report(training, f"results and adapters: {options.output_dir}")
