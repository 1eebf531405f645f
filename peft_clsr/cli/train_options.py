"""Options of `peft-clsr train`: their defaults, help texts and checks. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

import argparse
import logging
import os
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from transformers import HfArgumentParser

if TYPE_CHECKING:
    from ..distillation.arguments import DistillationTrainingArguments

PROMPT_TOKENS = 4  # <|startoftranscript|><|ca|><|transcribe|><|notimestamps|>
logger = logging.getLogger(__name__)


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """Models, recordings and the folder of results."""

    _argument_group_name = "model and data"

    student: str = field(metadata={"help": "Whisper to improve: Hub id or folder."})
    dataset: str = field(metadata={"help": "Hub id or folder, see above."})
    languages: list[str] = field(metadata={"help": "Tags or English names; an expert for each."})
    prompt_language: list[str] | None = _option(
        None, "Whisper language in the prompt, for languages it lacks: one, or one per language."
    )
    teacher: str | None = _option(None, "Larger Whisper to learn from: Hub id or folder.")
    teacher_cache: str | None = _option(None, "Folder for the teacher's states: it then runs only once.")
    warm_start: str | None = _option(
        None, "Start from this expert, FOLDER_OR_REPO[:language], of the same rank: me/experts:pt."
    )
    dataset_config: list[str] | None = _option(
        None, "Hub configuration or subfolder (ca_es): one, or one per language."
    )
    dataset_revision: str | None = _option(
        None, "Branch, tag or commit on the Hub; refs/convert/parquet if the dataset is a script."
    )
    train_split: str = _option("train", "Split to train on.")
    validation_split: str | None = _option(None, "Split that chooses the best checkpoint: validation.")
    eval_split: str = _option("test", "Held-out split to measure on, once.")
    eval_dataset: str | None = _option(None, "Dataset to measure on; by default --dataset.")
    eval_config: list[str] | None = _option(None, "Its configuration; by default --dataset_config.")
    eval_revision: str | None = _option(None, "Its revision; by default --dataset_revision.")
    eval_audio_column: str | None = _option(None, "Its column of the audio; by default --audio_column.")
    eval_text_column: str | None = _option(None, "Its column of the transcripts; by default --text_column.")
    audio_column: str = _option("audio", "Column of the audio (Hub datasets).")
    file_column: str | None = _option(None, "Column of file names in a table. By default file_name, or path.")
    text_column: str = _option("transcription", "Column of the transcripts.")
    max_train_samples: int | None = _option(None, "Use only the first so many recordings to train on.")
    most_upvoted: int | None = _option(None, "Train on so many recordings with most up_votes (Common Voice).")
    max_eval_samples: int | None = _option(None, "Use only the first so many recordings to measure on.")
    pack: bool = _option(True, "Join recordings to windows of 30 s to train on.")
    timestamps: float = _option(0.5, "Share of windows with timestamps.")
    single: float = _option(0.1, "Share of windows of one recording.")
    previous_text: float = _option(0.1, "Share of windows that follow another one's text.")
    no_speech: float = _option(0.0, "Share of windows without speech: rows without text, or generated noise.")
    max_audio_seconds: int | None = _option(None, "Cut the context, for tiny machines; nothing is packed then.")
    long_audio: Literal["drop", "cut"] = _option(
        "drop", "Drop recordings longer than the context, or cut their end (not packed)."
    )
    allow_dropped: bool = _option(False, "Train even if over a tenth of the recordings cannot be used.")
    max_new_tokens: int | None = _option(
        None, "Longest transcript when measuring, in tokens. By default as many as the decoder allows."
    )
    preprocessing_workers: int | None = _option(None, "Number of processes that compute features.")
    keep_checkpoints: bool = _option(False, "Keep the checkpoints of finished languages.")
    overwrite: bool = _option(False, "Replace other results in output_dir.")


@dataclass
class ExpertArguments:
    """The expert and its gates, with the defaults of [`CLSRConfig`]."""

    _argument_group_name = "expert (defaults for some hundred recordings; paper's: examples/recipes/paper.yaml)"

    expert_rank: str = field(
        default="32",
        metadata={"help": "Rank of the low-rank expert; 'full': a full copy of each FFN.", "metavar": "N"},
    )
    straight_through: bool = _option(True, "Gates are 0 or 1 in training too.")
    gate_budget: float = _option(1.0, "Share of tokens for the expert.")
    skip_gate_prob: float = _option(0.0, "Share of steps that skip an expert.")
    expert_dropout: float = _option(0.0, "Dropout of the expert.")
    gate_dim: int = _option(64, "Hidden size of the gate.")
    gate_dropout: float = _option(0.1, "Dropout on the gate's input, in [0, 1).")
    gate_noise: float = _option(0.0, "Highest standard deviation of the noise on gate logits.")
    budget_weight: float = _option(1.0, "Weight of the budget loss, at least 0.")
    translate_with_shared_decoder: bool = _option(False, "The decoder takes the shared FFNs when translating.")
    exclude_modules: str | None = _option(None, "Modules without expert, as a regular expression: '.*encoder.*'.")


@dataclass
class LoraArguments:
    """PEFT's LoRA on the same projections (fc1, fc2) instead of an expert, to compare with."""

    _argument_group_name = "LoRA on fc1 and fc2, to compare with"

    lora_rank: int | None = _option(None, "Train LoRA of this rank instead of an expert.")
    lora_alpha: int | None = _option(None, "LoRA's alpha; by default its rank.")
    lora_dropout: float = _option(0.05, "LoRA's dropout, in [0, 1).")


class TrainOptions(NamedTuple):
    """All options, checked. `lora` is `None` unless LoRA is trained."""

    data: DataArguments
    expert: ExpertArguments
    lora: LoraArguments | None
    training: DistillationTrainingArguments

    @property
    def output_dir(self) -> Path:
        return Path(str(self.training.output_dir))


# The most used arguments of transformers' trainer: our default, or None for the trainer's own, and help text.
_TRAINING = {
    "output_dir": (None, "Folder for results and adapters."),
    "learning_rate": (2e-3, "Highest learning rate."),
    "num_train_epochs": (3.0, "Passes over the recordings."),
    "max_steps": (-1, "Stop after so many steps."),
    "per_device_train_batch_size": (1, "Windows, or recordings, per batch and device."),
    "gradient_accumulation_steps": (1, "Batches per step."),
    "per_device_eval_batch_size": (8, "Recordings transcribed at a time."),
    "warmup_steps": (0.1, "Steps of warm-up; below 1, their share."),
    "adam_beta2": (0.98, "Adam's second decay rate."),
    "label_smoothing_factor": (0.0, "Of the cross-entropy; the paper's: 0.1."),
    "kd_weight": (32.0, "Weight of distillation; the paper's: 2."),
    "bf16": (False, "Train in bfloat16 mixed precision."),
    "seed": (42, "Random seed."),
    "logging_steps": (10, "Steps between logged losses."),
    "logging_first_step": (True, "Log the loss of the first step."),
    "save_steps": (100, "Steps between checkpoints."),
    "save_total_limit": (2, "Checkpoints that are kept at a time."),
    "resume_from_checkpoint": (None, "'true': continue an unfinished run."),
}
TRAINING_DEFAULTS = {name: default for name, (default, _) in _TRAINING.items() if default is not None}
# Options of the other groups that the short help leaves out.
_RARE = (
    "prompt_language dataset_revision train_split eval_split eval_dataset eval_config eval_revision eval_audio_column "
    "eval_text_column audio_column max_train_samples most_upvoted max_eval_samples "
    "long_audio timestamps single previous_text no_speech "
    "allow_dropped max_new_tokens preprocessing_workers gate_dim gate_dropout gate_noise budget_weight "
    "translate_with_shared_decoder "
    "exclude_modules lora_alpha lora_dropout per_device_eval_batch_size adam_beta2 logging_steps logging_first_step "
    "save_steps save_total_limit "
    "warm_start"
).split()

_DESCRIPTION = """\
Train language experts for a Whisper: measure, train, measure again, show a
table. The dataset is a Hub id, a table, or a folder of one of these kinds:
- train/metadata.csv and test/metadata.csv, or one metadata.csv: columns
  file_name (relative to the csv), transcription, language if there are several;
- recordings with a text file each, such as 0.wav and 0.txt;
- Common Voice: train.tsv, test.tsv and clips/, or mdc:ID (--text_column sentence);
- files that datasets.load_dataset reads, such as Parquet.
"{language}" in --dataset is the language's code; in --dataset_config it is the
language as you wrote it."""


def make_train_parser(prog: str, everything: bool) -> HfArgumentParser:
    """The parser: of the most used options, for the short help, or of all, with those of transformers' trainer."""
    kinds: list[Any] = [DataArguments, ExpertArguments, LoraArguments]
    usage = f"{prog} --student ID --dataset ID --languages CODE [CODE ...] --output_dir FOLDER [options]"
    texts = {"prog": prog, "usage": usage, "description": _DESCRIPTION}
    if everything:
        from ..distillation.arguments import DistillationTrainingArguments

        kinds.append(DistillationTrainingArguments)
        parser = HfArgumentParser(kinds, **texts)
        parser.set_defaults(**TRAINING_DEFAULTS)
    else:
        parser = HfArgumentParser(kinds, **texts)
        group = parser.add_argument_group("training (--help-all: all arguments of transformers' trainer)")
        for name, (default, _) in _TRAINING.items():
            if isinstance(default, bool):
                group.add_argument(f"--{name}", default=default, nargs="?", const=True)
            else:
                group.add_argument(f"--{name}", default=default, type=str if default is None else type(default))
    for action in parser._actions:
        if action.dest in _TRAINING:
            action.help = _TRAINING[action.dest][1]
        # "--no_x" is "--x false".
        is_negation = action.option_strings[0] == f"--no_{action.dest}"
        if is_negation or (not everything and action.dest in _RARE):
            action.help = argparse.SUPPRESS
    return parser


def check_options(
    data: DataArguments, expert: ExpertArguments, lora: LoraArguments, training: DistillationTrainingArguments
) -> TrainOptions:
    """
    Check what can be checked before anything is loaded.

    Raises:
        ValueError: an option is wrong, or two exclude each other.
    """
    from ..evaluation.normalization import leading_rate
    from ..tuner.config import CLSRConfig

    by_characters = [language for language in data.languages if leading_rate(language) == "cer"]
    if by_characters and str(training.metric_for_best_model).removeprefix("eval_") == "wer":
        logger.warning(
            f"--metric_for_best_model wer takes whole utterances as words in {', '.join(by_characters)}, which put no "
            "spaces between words: give error_rate, which is CER there and WER elsewhere"
        )
    CLSRConfig(**expert_config(expert))
    if data.teacher_cache is not None and data.teacher is None:
        raise ValueError("--teacher_cache keeps the states of a teacher: give a --teacher, or leave it out")
    of_lora = _check_lora(lora, data, expert, training)
    _check_numbers(data, training)
    for name, variable in (("deepspeed", "ACCELERATE_USE_DEEPSPEED"), ("fsdp", "ACCELERATE_USE_FSDP")):
        if getattr(training, name) or os.environ.get(variable, "false").lower() == "true":
            raise ValueError(
                f"{name} divides the model over processes, and this command measures and saves it on one: start it "
                "with accelerate launch --multi_gpu, or train by a script with DistillationTrainer"
            )
    if data.most_upvoted is not None and data.max_train_samples is not None:
        raise ValueError(
            "--most_upvoted and --max_train_samples both say which recordings to train on: leave out one of the two"
        )
    _check_splits(data)
    _report_unused(data, lora, training)
    _choose_by_validation(data, training)
    if expert.exclude_modules is not None:
        try:
            re.compile(expert.exclude_modules)
        except re.error as error:
            raise ValueError(
                f"--exclude_modules {expert.exclude_modules!r} is no regular expression ({error}), expected "
                "one such as '.*encoder.*'"
            ) from error
    if training.resume_from_checkpoint not in (None, "true", "True"):
        raise ValueError(
            f"--resume_from_checkpoint is {training.resume_from_checkpoint!r}, expected 'true': each language goes on "
            "from the last checkpoint in its own folder under --output_dir"
        )
    if data.overwrite and training.resume_from_checkpoint:
        raise ValueError(
            "--overwrite starts anew, and --resume_from_checkpoint true goes on from what is there: leave out one of "
            "the two"
        )
    return TrainOptions(data, expert, of_lora, training)


def _report_unused(data: DataArguments, lora: LoraArguments, training: DistillationTrainingArguments) -> None:
    """Say which options change nothing beside the others."""
    from .train_data import report_unused

    strategy = "epoch" if training.eval_strategy == "no" else training.eval_strategy
    saving = {"save_strategy": strategy, "save_steps": training.eval_steps}  # with a validation split
    overridden = [name for name, value in saving.items() if getattr(training, name) != value]
    for reason, is_so, arguments, names in (
        ("an expert is trained, not LoRA (--lora_rank)", lora.lora_rank is None, lora, ("lora_alpha", "lora_dropout")),
        ("there is no --teacher", data.teacher is None, training, ("kd_weight", "kd_loss", "temperature")),
        ("no evaluation is by steps (--eval_strategy steps)", strategy != "steps", training, ("eval_steps",)),
        ("a checkpoint is saved at each evaluation", data.validation_split is not None, training, overridden),
    ):
        unused = [f"--{name}" for name in names if _is_changed(arguments, name)]
        if is_so:
            report_unused(training, reason, unused)


def _is_changed(arguments: Any, name: str) -> bool:
    """True if an option is not at its default."""
    return getattr(arguments, name) != TRAINING_DEFAULTS.get(name, getattr(type(arguments), name))


def _check_splits(data: DataArguments) -> None:
    """Raise a `ValueError` if recordings of one split would have two uses."""
    tested = (data.eval_dataset or data.dataset, data.eval_config or data.dataset_config)
    is_one_dataset = tested == (data.dataset, data.dataset_config)
    for one, other, harm in (
        ("train_split", "eval_split", "the expert would be measured on what it was trained on"),
        ("validation_split", "eval_split", "the best checkpoint would be chosen on what it is then measured on"),
        ("train_split", "validation_split", "the best checkpoint would be chosen on what it was trained on"),
    ):
        name = getattr(data, one)
        if name == getattr(data, other) and (is_one_dataset or other != "eval_split"):
            raise ValueError(f"--{one} and --{other} are both {name!r}: {harm}; name another split for one of the two")


def _choose_by_validation(data: DataArguments, training: DistillationTrainingArguments) -> None:
    """
    Let the trainer evaluate on the validation split, after each epoch by default, and end with the best checkpoint.

    Raises:
        ValueError: an evaluation in training, and no split for it; or the strategies do not fit.
    """
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    if data.validation_split is None:
        if training.eval_strategy != "no":
            strategy = IntervalStrategy(training.eval_strategy).value
            raise ValueError(
                f"--eval_strategy {strategy} evaluates in training, and --eval_split is for the end: give "
                "--validation_split validation, which is taken from the training split if there is none"
            )
        return
    if training.eval_strategy == "no":
        training.eval_strategy = IntervalStrategy.EPOCH
    training.save_strategy = SaveStrategy(IntervalStrategy(training.eval_strategy).value)
    if training.eval_strategy == "steps":
        training.save_steps = training.eval_steps = training.eval_steps or training.save_steps
    training.load_best_model_at_end = True
    training.metric_for_best_model = training.metric_for_best_model or "error_rate"
    training.greater_is_better = bool(training.greater_is_better)
    training.predict_with_generate = not training.metric_for_best_model.endswith("loss")
    if data.max_new_tokens is not None and training.generation_max_length is None:
        training.generation_max_length = data.max_new_tokens + PROMPT_TOKENS


def _check_numbers(data: DataArguments, training: DistillationTrainingArguments) -> None:
    """Raise a `ValueError` for a number that cannot be used, whose error would come after the work has begun."""
    at_least_1 = {
        name: getattr(arguments, name)
        for arguments, names in (
            (data, ("max_train_samples", "most_upvoted", "max_eval_samples", "max_new_tokens", "max_audio_seconds")),
            (training, ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")),
        )
        for name in names
    }
    for name, value in at_least_1.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}, expected at least 1")
    for name in ("timestamps", "single", "previous_text"):
        share = getattr(data, name)
        if not 0 <= share <= 1:
            raise ValueError(f"--{name} is {share}, expected a share of windows from 0 to 1")
    if not 0 <= data.no_speech < 1:
        raise ValueError(f"--no_speech is {data.no_speech}, expected a share of windows, at least 0 and below 1")
    if training.ce_weight == 0 and (data.teacher is None or training.kd_weight == 0):
        raise ValueError(
            "--ce_weight is 0, and there is no distillation, so the expert would learn nothing from the recordings: "
            "leave --ce_weight out, or give a --teacher and a --kd_weight above 0"
        )
    for name in ("learning_rate", "num_train_epochs"):
        value = getattr(training, name)
        if not value > 0 and not (name == "num_train_epochs" and training.max_steps > 0):
            raise ValueError(f"--{name} is {value}, expected more than 0")


def expert_config(expert: ExpertArguments) -> dict[str, Any]:
    """
    The arguments of `CLSRConfig`.

    Raises:
        ValueError: the rank is neither a number nor 'full'.
    """
    rank = expert.expert_rank
    if rank != "full" and not rank.removeprefix("-").isdecimal():
        raise ValueError(f"--expert_rank is {rank!r}, expected a number, or 'full' for a full copy of each FFN")
    return {**asdict(expert), "expert_rank": None if rank == "full" else int(rank)}


def _check_lora(
    lora: LoraArguments, data: DataArguments, expert: ExpertArguments, training: DistillationTrainingArguments
) -> LoraArguments | None:
    """The arguments of LoRA if that is what is trained, or `None`."""
    if lora.lora_rank is None:
        return None
    if lora.lora_rank < 1:
        raise ValueError(f"--lora_rank is {lora.lora_rank}, expected at least 1; leave it out for an expert")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora_dropout is {lora.lora_dropout}, expected a probability in [0, 1)")
    of_expert = [item.name for item in fields(expert) if item.name != "exclude_modules"]
    of_loss = ("kd_weight", "kd_loss", "temperature", "ce_weight")
    options: Any = ((data, ("teacher", "warm_start")), (expert, of_expert), (training, of_loss))
    unused = [f"--{name}" for arguments, names in options for name in names if _is_changed(arguments, name)]
    if unused:
        raise ValueError(
            f"--lora_rank trains LoRA instead of an expert, so {', '.join(unused)} would do nothing: leave out one of "
            "the two"
        )
    return lora
