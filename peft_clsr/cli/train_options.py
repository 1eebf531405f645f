"""Options of `peft-clsr train`. This file imports no torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(help: str, default: Any) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass
class RecordingOptions:
    """The models and the recordings."""

    _argument_group_name = "models and recordings"

    student: str = required("Whisper to improve: Hub id or folder.")
    dataset: str = required(
        "Hub id, or a folder: with train/metadata.csv, with train.tsv and clips/, or with Parquet files."
    )
    languages: list[str] = required("Codes or English names. An expert is trained for each, one after the other.")
    teacher: str | None = option("Larger Whisper to learn from: Hub id or folder.", None)
    teacher_cache: str | None = option(
        "Folder for the teacher's states, so that it runs once, not in every epoch (with --teacher).", None
    )
    text_column: str = option("Column of the transcripts.", "transcription")
    max_audio_seconds: int | None = option(
        "Audio context in whole seconds; 0 for the model's 30. Default: as long as the longest recording.",
        None,
    )


@dataclass
class MoreRecordingOptions:
    """Recording options that few people need."""

    _argument_group_name = "more about recordings"

    dataset_config: list[str] | None = option(
        "Configuration on the Hub, or subfolder (ca_es): one for each language, or one for all.", None
    )
    dataset_revision: str | None = option(
        "Branch, tag or commit on the Hub; refs/convert/parquet if the dataset is a script.", None
    )
    train_split: str = option("Split to train on.", "train")
    eval_split: str = option("Held-out split to measure on.", "test")
    audio_column: str = option("Column of the audio (Hub datasets).", "audio")
    max_train_samples: int | None = option("Use only the first so many.", None)
    max_eval_samples: int | None = option("Use only the first so many.", None)
    long_audio: str = option("Audio longer than the context: 'drop' or 'cut'.", "drop")
    max_new_tokens: int | None = option(
        "Longest transcript in evaluation, in tokens. Default: the decoder's limit.", None
    )
    preprocessing_workers: int | None = option("Processes that compute features.", None)
    overwrite: bool = option("Replace results of other settings in output_dir.", False)
    keep_checkpoints: bool = option("Keep the checkpoints of a finished adapter.", False)


@dataclass
class ExpertOptions:
    """The adapter, see `CLSRConfig`. The defaults are those for short trainings in docs/training.md."""

    _argument_group_name = "expert (defaults for some hundred recordings)"

    expert_rank: str = option("Rank of the expert, or 'full' for a full copy of the feed-forward network.", "64")
    straight_through: bool = option("Gates are 0 or 1 in training, too.", True)
    gate_budget: float = option("Share of tokens that should go to the expert, in [0, 1].", 0.75)
    skip_gate_prob: float = option("Probability that a module skips its expert in a training step.", 0.0)
    expert_dropout: float = option("Dropout on the expert's output.", 0.05)


@dataclass
class MoreExpertOptions:
    """Expert options that few people need."""

    _argument_group_name = "more about the expert"

    gate_dim: int = option("Hidden size of the gate.", 64)
    gate_dropout: float = option("Dropout on the gate's input.", 0.1)
    gate_noise: float = option("Standard deviation of the noise on gate logits at its highest.", 5.0)
    budget_weight: float = option("Weight of the budget loss.", 1.0)
    exclude_modules: str | None = option("Modules without expert, as a regular expression: '.*encoder.*'.", None)


@dataclass
class LoraOptions:
    """PEFT's LoRA on fc1 and fc2 instead of an expert, for comparison."""

    _argument_group_name = "LoRA on fc1 and fc2 instead of an expert, for comparison"

    lora_rank: int | None = option("Train LoRA of this rank instead of an expert.", None)
    lora_alpha: int = option("Alpha of LoRA.", 64)
    lora_dropout: float = option("Dropout of LoRA.", 0.05)


@dataclass
class MainTrainingOptions:
    """The most used arguments of `DistillationTrainingArguments`, with the defaults of this command."""

    _argument_group_name = "training"

    output_dir: str = required("Folder for adapters, results.json and plots. It need not exist.")
    learning_rate: float = option("Learning rate at the end of the warm-up.", 2e-3)
    num_train_epochs: float = option("Passes over the recordings.", 3.0)
    max_steps: int = option("Optimizer steps instead of epochs.", -1)
    per_device_train_batch_size: int = option("Recordings in a batch.", 8)
    gradient_accumulation_steps: int = option("Batches in an optimizer step.", 1)
    per_device_eval_batch_size: int = option("Recordings in a batch when measuring.", 8)
    warmup_steps: float = option("Steps of warm-up, or below 1 a share of all steps.", 0.1)
    adam_beta2: float = option("Beta 2 of Adam.", 0.98)
    label_smoothing_factor: float = option("Label smoothing. The paper uses 0.1.", 0.0)
    kd_weight: float = option("Weight of the distillation loss (with --teacher).", 2.0)
    logging_steps: float = option("Log the loss every so many steps.", 10)
    logging_first_step: bool = option("Log the loss of the first step, too.", True)
    bf16: bool = option("bfloat16: half the time where the GPU or CPU has it.", False)
    use_cpu: bool = option("Use no GPU.", False)
    seed: int = option("Random seed.", 42)
    resume_from_checkpoint: str | None = option("'true' continues an interrupted run.", None)
