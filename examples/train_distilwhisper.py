"""
Train language experts for a Whisper: measure the base model, train, measure again, show a table.

    python examples/train_distilwhisper.py --student openai/whisper-base --teacher openai/whisper-large-v2 \
        --dataset my-org/my-speech --dataset_config ca --languages ca --output_dir runs/ca

    python examples/train_distilwhisper.py --student openai/whisper-small --dataset my_recordings --languages ca uk \
        --text_column transcription --output_dir runs/mine

A dataset is a Hub id, or a folder:
- with `train/metadata.csv` and `test/metadata.csv` (columns `file_name`, relative to the csv, and `transcription`;
  with a column `language`, each language takes its own rows),
- with `train.tsv`, `test.tsv` and `clips/`, as in an archive of Common Voice (`--text_column sentence`),
- or of what `datasets.load_dataset` reads, such as Parquet files.

`{language}` stands for the code of the language in turn in `--dataset`, and for the language as you wrote it in
`--dataset_config`: `--languages ca_es uk_ua --dataset google/fleurs --dataset_config {language}`. In a folder, a
configuration is a folder. All options: `--help`; the settings of the paper: `recipes/`.
"""

from __future__ import annotations

import copy
import csv
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor, set_seed
from transformers.models.whisper.modeling_whisper import shift_tokens_right
from transformers.trainer_utils import get_last_checkpoint

from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    cache_teacher_states,
    error_rates,
    gate_means,
    language_code,
    make_compute_metrics,
    plot_gate_means,
    prepare_dataset,
    set_audio_context,
    transcribe,
)

# The branch where the Hub keeps what it made of a dataset: a folder for each configuration, and none of its own.
CONVERTED = "refs/convert/parquet"


@dataclass
class ScriptArguments:
    """What to train, and on what."""

    student: str = field(metadata={"help": "Whisper to improve: Hub id or folder."})
    dataset: str = field(
        metadata={"help": "Hub id, or a folder: of train/metadata.csv, of train.tsv and clips/, or of Parquet files."}
    )
    languages: list[str] = field(metadata={"help": "Codes or English names; an expert is trained for each in turn."})
    teacher: str | None = field(default=None, metadata={"help": "Larger Whisper to learn from: Hub id or folder."})
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder for the teacher's states: it runs once, not in every epoch (with --teacher)."},
    )
    dataset_config: list[str] | None = field(
        default=None,
        metadata={"help": "Configuration on the Hub, or subfolder (ca_es): one for each language, or one for all."},
    )
    dataset_revision: str | None = field(
        default=None,
        metadata={"help": f"Branch, tag or commit on the Hub; {CONVERTED} where the dataset is a script."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str = field(default="test", metadata={"help": "Held-out split to measure on."})
    audio_column: str = field(default="audio", metadata={"help": "Column of the audio (Hub datasets)."})
    text_column: str = field(default="transcription", metadata={"help": "Column of the transcripts."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many only."})
    max_audio_seconds: int | None = field(
        default=None,
        metadata={"help": "Cut the model's context of 30 s to so many seconds: cheaper for short utterances."},
    )
    long_audio: str = field(default="drop", metadata={"help": "Audio longer than the context: 'drop' or 'cut'."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest transcript in evaluation, in tokens; what the decoder allows by default."},
    )
    preprocessing_workers: int | None = field(default=None, metadata={"help": "Processes that compute features."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of other settings in output_dir."})


@dataclass
class MethodArguments:
    """The adapter; see `CLSRConfig`."""

    gate_dim: int = 64
    gate_dropout: float = 0.1
    gate_noise: float = 5.0
    skip_gate_prob: float = 0.2
    gate_budget: float = 0.5
    budget_weight: float = 1.0
    expert_dropout: float = 0.3
    straight_through: bool = False
    expert_rank: int | None = field(default=None, metadata={"help": "Low-rank experts of this rank; full by default."})
    exclude_modules: str | None = field(default=None, metadata={"help": "Modules without expert: '.*encoder.*'."})


@dataclass
class LoraArguments:
    """PEFT's LoRA on the same projections (fc1, fc2) instead of an expert, to compare with."""

    lora_rank: int | None = field(default=None, metadata={"help": "Train LoRA of this rank instead of an expert."})
    lora_alpha: int = 64
    lora_dropout: float = 0.05


def main() -> None:
    parser = HfArgumentParser((ScriptArguments, MethodArguments, LoraArguments, DistillationTrainingArguments))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        # Everything that can be wrong with the arguments, before anything is loaded or written.
        script, method, lora, training = parser.parse_args_into_dataclasses()
        spellings = {language_code(language): language for language in script.languages}
        script.languages = list(spellings)
        CLSRConfig(**asdict(method))
        lora = _check_lora(lora, script, method)
        if script.teacher_cache is not None and script.teacher is None:
            raise ValueError("--teacher_cache keeps what a teacher says: give a --teacher, or leave it out")
        configs = _dataset_configs(script, spellings)
        settings = _settings(script, method, lora, training)
        results = _open_results(Path(training.output_dir), settings, script)
        _check_resume(training.resume_from_checkpoint)
        for language, dataset_config in zip(script.languages, configs, strict=True):
            there = results["languages"].get(language, {}).get("dataset_config", dataset_config)
            if there != dataset_config:
                raise ValueError(
                    f"{training.output_dir} holds results of {language} on {there!r}, not {dataset_config!r}: choose "
                    "another --output_dir, or give --overwrite to replace them"
                )
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")

    for language, dataset_config in zip(script.languages, configs, strict=True):
        if language in results["languages"]:
            print(f"{language}: trained before with these settings, see {training.output_dir} (again: --overwrite)")
            continue
        try:
            results["languages"][language] = train_language(language, dataset_config, script, method, lora, training)
        except (ValueError, OSError) as error:
            parser.exit(2, f"error: {error}\n")
        if training.process_index == 0:
            _write_results(results, Path(training.output_dir))
    if training.process_index == 0:
        print(format_table(results, script.languages))
        print(f"results and adapters: {training.output_dir}")


def train_language(
    language: str,
    dataset_config: str | None,
    script: ScriptArguments,
    method: MethodArguments,
    lora: LoraArguments | None,
    training: DistillationTrainingArguments,
) -> dict[str, Any]:
    """Measure, train, measure again; returns the row of results."""
    set_seed(training.seed)
    started = time.monotonic()
    output_dir = Path(training.output_dir)
    with training.main_process_first(desc="recordings"):
        raw_train = load_recordings(script, language, dataset_config, script.train_split, script.max_train_samples)
        raw_eval = load_recordings(script, language, dataset_config, script.eval_split, script.max_eval_samples)

    processor = WhisperProcessor.from_pretrained(script.student)
    full_processor = WhisperProcessor.from_pretrained(script.student)
    model = WhisperForConditionalGeneration.from_pretrained(script.student, dtype=torch.float32)
    model.to(training.device)
    teacher_processor = None if script.teacher is None else WhisperProcessor.from_pretrained(script.teacher)
    if script.max_audio_seconds is not None:
        set_audio_context(None, processor, script.max_audio_seconds)
        if teacher_processor is not None:
            set_audio_context(None, teacher_processor, script.max_audio_seconds)

    def prepare(
        raw: datasets.Dataset, name: str, at: WhisperProcessor, teacher_processor: WhisperProcessor | None = None
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        with training.main_process_first(desc="features"):  # the others find them on the disk
            prepared, counts = prepare_dataset(
                raw,
                at,
                language,
                teacher_processor=teacher_processor,
                audio_column=script.audio_column,
                text_column=script.text_column,
                long_audio=script.long_audio,
                num_proc=script.preprocessing_workers,
                desc=f"{language}: features, {name}",
            )
        print(f"{language}, {name}: " + ", ".join(f"{count} {key}" for key, count in counts.items() if count))
        return prepared, counts

    train_set, train_counts = prepare(raw_train, "training", processor, teacher_processor)
    eval_set, eval_counts = prepare(raw_eval, "evaluation", processor, teacher_processor)

    def measure(model: torch.nn.Module, dataset: datasets.Dataset, name: str) -> dict[str, float]:
        transcripts = transcribe(
            model,
            processor,
            dataset,
            language,
            batch_size=training.per_device_eval_batch_size,
            max_new_tokens=script.max_new_tokens,
            desc=f"{language}: {name}",
        )
        rates = error_rates(transcripts, dataset["text"], language=language)[language]
        print(f"{language}, {name}: WER {rates['wer']:.1%}, CER {rates['cer']:.1%}")
        return rates

    row: dict[str, Any] = {
        "dataset_config": dataset_config,
        "train_items": train_counts,
        "eval_items": eval_counts,
    }
    if script.max_audio_seconds is not None:
        # The same utterances as below, heard as the unchanged model hears them.
        full_set, _ = prepare(raw_eval.select(eval_set["index"]), "evaluation at 30 s", full_processor)
        row["base_full_context"] = measure(model, full_set, "base model at its full context")
        set_audio_context(model, None, script.max_audio_seconds)
        row["base"] = measure(model, eval_set, f"base model at {script.max_audio_seconds} s")
    else:
        row["base"] = measure(model, eval_set, "base model")

    if lora is None:
        config = CLSRConfig(language=language, max_audio_seconds=script.max_audio_seconds, **asdict(method))
        model = get_peft_model(model, config, adapter_name=language)
    else:
        config = LoraConfig(
            r=lora.lora_rank,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=["fc1", "fc2"],
            exclude_modules=method.exclude_modules,
        )
        model = get_peft_model(model, config)  # "default": Trainer finds the best checkpoint of no other
    trainable, total = model.get_nb_trainable_parameters()
    row |= {"trainable_parameters": trainable, "trainable_share": trainable / total}
    teacher = None
    if script.teacher is not None:
        precision = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        teacher = WhisperForConditionalGeneration.from_pretrained(script.teacher, dtype=precision)
        if script.max_audio_seconds is not None:
            set_audio_context(teacher, None, script.max_audio_seconds)
        if script.teacher_cache is not None:
            folder = Path(script.teacher_cache) / language
            teacher = cache_teacher_states(train_set, teacher, teacher_processor, folder)
            train_set = teacher.dataset
    collator = DataCollatorSpeechSeq2SeqWithPadding(
        processor,
        language=language,
        language_column=training.language_column,
        teacher_processor=teacher_processor,
    )
    training = copy.copy(training)
    training.output_dir = str(output_dir / "checkpoints" / language)
    training.dataloader_pin_memory = training.dataloader_pin_memory and training.device.type != "cpu"
    common = {
        "model": model,
        "args": training,
        "train_dataset": train_set,
        "eval_dataset": eval_set,
        "processing_class": processor,
        "compute_metrics": make_compute_metrics(processor) if training.predict_with_generate else None,
    }
    if lora is None:
        trainer = DistillationTrainer(
            **common, data_collator=collator, teacher_model=teacher, teacher_processor=teacher_processor
        )
    else:
        model.generation_config.language = language  # of an evaluation by generation
        trainer = Seq2SeqTrainer(**common, data_collator=partial(_plain_batch, collator, model.config))
    resume = None
    if training.resume_from_checkpoint and Path(training.output_dir).is_dir():
        resume = get_last_checkpoint(training.output_dir)
    trained = trainer.train(resume_from_checkpoint=resume)
    row["train_seconds"] = round(trained.metrics["train_runtime"], 1)
    row["train_steps"] = trainer.state.global_step

    is_main = training.process_index == 0
    if lora is None:
        row["expert"] = measure(model, eval_set, "with the expert")
        means = gate_means(model, eval_set, collator, batch_size=training.per_device_eval_batch_size)
        row["gate_means"] = {name: round(mean, 4) for name, mean in means.items()}
        row["gate_mean"] = sum(means.values()) / len(means)
        if is_main:
            plot_gate_means(means, output_dir / f"gates-{language}.png", title=f"{script.student}, {language}")
    else:
        row["lora"] = measure(model, eval_set, "with LoRA")
    if is_main:
        model.save_pretrained(str(output_dir if lora is None else output_dir / language))
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _plain_batch(collator: Callable[..., dict[str, Any]], config: Any, examples: list[Any]) -> dict[str, Any]:
    """A batch for transformers' own trainer: tensors only, with `decoder_input_ids` [batch, tokens]."""
    batch = {key: value for key, value in collator(examples).items() if key != "language"}
    # To smooth labels, Trainer takes them out of the batch, before Whisper can shift them.
    start = shift_tokens_right(batch["labels"], config.pad_token_id, config.decoder_start_token_id)
    return {**batch, "decoder_input_ids": start}


def load_recordings(
    script: ScriptArguments, language: str, dataset_config: str | None, split: str, limit: int | None
) -> datasets.Dataset:
    """
    Recordings and transcripts of one language, from the Hub or from a folder.

    Raises:
        ValueError: there is no such dataset or split, or no row of the language.
    """
    name = script.dataset.replace("{language}", language)
    folder = Path(name, dataset_config or "")
    tables = {path.parent.name: path for path in folder.glob("*/metadata.csv")}
    tables |= {path.stem: path for path in folder.glob("*.tsv")}
    if split in tables:
        return _read_table(tables[split], script, language, limit)
    if tables:
        raise ValueError(
            f"{folder} has neither {split}/metadata.csv nor {split}.tsv, but has {', '.join(sorted(tables))}: set "
            "--train_split and --eval_split to two of these"
        )
    where: dict[str, Any] = {"path": name, "name": dataset_config}
    if folder.is_dir():
        where = {"path": str(folder)}
    elif script.dataset_revision == CONVERTED:
        where = {"path": name, "data_dir": dataset_config}
    try:
        dataset = datasets.load_dataset(**where, split=split, revision=script.dataset_revision)
    # A RuntimeError: the dataset is a script, which datasets 4 and later do not run.
    except (datasets.exceptions.DatasetsError, ConnectionError, FileNotFoundError, RuntimeError, ValueError) as error:
        hint = f"; of a script, --dataset_revision {CONVERTED} may have the data" * isinstance(error, RuntimeError)
        raise ValueError(
            f"no split {split!r} of dataset {str(folder)!r} ({error}): expected a folder with {split}/metadata.csv, "
            f"one with {split}.tsv and clips/, or what datasets.load_dataset reads, here or on the Hub; check "
            f"--dataset, --dataset_config, --train_split and --eval_split{hint}"
        ) from error
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


def _read_table(table: Path, script: ScriptArguments, language: str, limit: int | None) -> datasets.Dataset:
    """The rows of a language in `train/metadata.csv`, or in Common Voice's `train.tsv`, with their recordings."""
    if table.suffix == ".csv":
        column, folder, dialect = "file_name", table.parent, {}
    else:
        column, folder, dialect = "path", table.parent / "clips", {"sep": "\t", "quoting": csv.QUOTE_NONE}
    # Text stays text: a transcript may well be "null" or "12".
    rows = pd.read_csv(table, dtype=str, keep_default_na=False, **dialect).fillna("")
    if column not in rows or rows.empty:
        raise ValueError(f"{table} has {len(rows)} rows of {', '.join(rows)}; expected some, with a column {column!r}")
    if "language" in rows:
        names = sorted(rows["language"].unique())
        try:
            codes = {name: language_code(name) for name in names}
        except ValueError as error:
            raise ValueError(f"{table}, column 'language': {error}") from error
        rows = rows[rows["language"].map(codes) == language]
        if rows.empty:
            raise ValueError(f"{table} has no row of language {language!r}; it has {names}")
    rows = rows[:limit].copy()
    files = [folder / name for name in rows[column]]
    rows[script.audio_column] = [str(file) for file in files]
    # Features are kept by datasets until a row changes: a recording that was replaced must change its row.
    rows["modified"] = [str(file.stat().st_mtime_ns) if file.is_file() else "" for file in files]
    # A generator's rows are on the disk, and so are the features made of them; from_pandas has both in memory.
    return datasets.Dataset.from_generator(
        _each_row,
        features=datasets.Features({name: datasets.Value("string") for name in rows}),
        gen_kwargs={"rows": rows.to_dict("records")},
    )


def _each_row(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    yield from rows


def _dataset_configs(script: ScriptArguments, spellings: dict[str, str]) -> list[str | None]:
    """The configuration of the dataset for each language, by the user's spelling: FLEURS has "ca_es"."""
    configs = script.dataset_config or [None]
    if len(configs) == 1:
        configs = configs * len(script.languages)
    if len(configs) != len(script.languages):
        raise ValueError(
            f"{len(configs)} values of --dataset_config for {len(script.languages)} languages: give one each, in "
            "their order, or one for all"
        )
    return [
        config and config.replace("{language}", spellings[language])
        for config, language in zip(configs, script.languages, strict=True)
    ]


def _check_lora(lora: LoraArguments, script: ScriptArguments, method: MethodArguments) -> LoraArguments | None:
    """The arguments of LoRA where that is what is trained, or `None`."""
    if lora.lora_rank is None:
        return None
    if lora.lora_rank < 1:
        raise ValueError(f"--lora_rank is {lora.lora_rank}, expected at least 1; leave it out for an expert")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora_dropout is {lora.lora_dropout}, expected a probability in [0, 1)")
    of_expert = [item.name for item in fields(method) if getattr(method, item.name) != item.default]
    of_expert = ["teacher"] * (script.teacher is not None) + of_expert
    idle = [f"--{name}" for name in of_expert if name != "exclude_modules"]
    if idle:
        raise ValueError(
            f"--lora_rank trains LoRA instead of an expert, so {', '.join(idle)} would do nothing: leave out the one "
            "or the other"
        )
    return lora


def _check_resume(value: str | None) -> None:
    if value not in (None, "true", "True"):
        raise ValueError(
            f"--resume_from_checkpoint is {value!r}, expected 'true': each language goes on from the last checkpoint "
            "in its own folder under --output_dir"
        )


def _settings(
    script: ScriptArguments,
    method: MethodArguments,
    lora: LoraArguments | None,
    training: DistillationTrainingArguments,
) -> dict[str, Any]:
    """What decides about the results: what differs from the defaults, apart from the languages and places."""
    beside = {"output_dir", "overwrite", "languages", "dataset_config"}
    beside |= {"preprocessing_workers", "resume_from_checkpoint", "teacher_cache"}
    plain = DistillationTrainingArguments(output_dir=training.output_dir)
    differing = {
        item.name: getattr(training, item.name)
        for item in fields(training)
        if item.init and item.name not in beside and getattr(training, item.name) != getattr(plain, item.name)
    }
    chosen = {key: value for key, value in asdict(script).items() if key not in beside}
    chosen |= asdict(method) if lora is None else {"exclude_modules": method.exclude_modules, **asdict(lora)}
    return json.loads(json.dumps({**chosen, **differing}, default=str, sort_keys=True))


def _open_results(output_dir: Path, settings: dict[str, Any], script: ScriptArguments) -> dict[str, Any]:
    """
    What an earlier run with the same settings left.

    Raises:
        ValueError: `output_dir` holds results of other settings, or adapters of unknown ones.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file; expected a folder, which need not exist")
    path = output_dir / "results.json"
    if not path.exists():
        for language in script.languages:
            if (output_dir / language / "adapter_config.json").exists() and not script.overwrite:
                raise ValueError(
                    f"{output_dir / language} holds an adapter from elsewhere: choose another --output_dir, or give "
                    "--overwrite to replace it"
                )
        return {"settings": settings, "languages": {}}

    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        there, languages = results["settings"], results["languages"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by this script ({error}): choose another --output_dir") from error
    differences = ", ".join(
        f"{key} {there.get(key)!r} there, {settings.get(key)!r} here"
        for key in sorted({**there, **settings})
        if there.get(key) != settings.get(key)
    )
    if not differences:
        if script.overwrite:
            results["languages"] = {key: row for key, row in languages.items() if key not in script.languages}
        return results
    if script.overwrite:
        return {"settings": settings, "languages": {}}
    raise ValueError(
        f"{output_dir} holds results of other settings ({differences}): choose another --output_dir, or give "
        "--overwrite to replace them"
    )


def _write_results(results: dict[str, Any], output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False, sort_keys=True)
    unfinished = output_dir / "results.json.part"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(output_dir / "results.json")


def format_table(results: dict[str, Any], languages: list[str]) -> str:
    """WER and CER before and after, in percent, as a Markdown table."""
    header = ["language", "utterances", "model", "WER %", "CER %", "trained parameters", "gate mean"]
    context = results["settings"]["max_audio_seconds"]
    rows = []
    for language in languages:
        row = results["languages"][language]
        parameters = f"{row['trainable_parameters'] / 1e6:.2f} M ({row['trainable_share']:.1%})"
        names = {
            "base_full_context": "base, 30 s context",
            "base": f"base, {context} s context" if context else "base",
            "expert": f"with expert, {context} s context" if context else "with expert",
            "lora": f"with LoRA, {context} s context" if context else "with LoRA",
        }
        for key, name in names.items():
            if key in row:
                rates = row[key]
                extra = ["", ""]
                if key in ("expert", "lora"):
                    extra = [parameters, f"{row['gate_mean']:.2f}" if "gate_mean" in row else ""]
                rates_in_percent = [f"{100 * rates['wer']:.1f}", f"{100 * rates['cer']:.1f}"]
                rows.append([language, str(rates["utterances"]), name, *rates_in_percent, *extra])
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, rule, *rows]
    )


if __name__ == "__main__":
    sys.exit(main())
