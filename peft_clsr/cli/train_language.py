"""Trains and measures one language for `peft-clsr train`."""

from __future__ import annotations

import copy
import math
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration, WhisperProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..data.audio import audio_seconds
from ..data.collator import DataCollatorSpeechSeq2SeqWithPadding
from ..data.dataset import prepare_dataset, without_decoding
from ..data.plain_batch import PlainCollator
from ..data.tables import load_recordings
from ..distillation.arguments import DistillationTrainingArguments
from ..distillation.teachers.cache import TeacherStates, cache_teacher_states
from ..distillation.trainer import DistillationTrainer
from ..evaluation.error_rates import error_rates, make_compute_metrics
from ..evaluation.gates import gate_means
from ..evaluation.plots import plot_gate_means
from ..evaluation.transcripts import transcribe
from ..hub.card import write_folder_card
from ..hub.push import describe_adapter
from ..tuner.config import CLSRConfig
from ..whisper import context_seconds, set_audio_context
from .train_options import LoraOptions, MoreRecordingOptions, RecordingOptions


@dataclass
class TrainingPlan:
    """The checked options of a run."""

    recordings: RecordingOptions
    more_recordings: MoreRecordingOptions
    expert_settings: dict[str, Any]
    lora: LoraOptions | None
    training: DistillationTrainingArguments
    dataset_configs: dict[str, str | None]  # by language code

    @property
    def languages(self) -> list[str]:
        return list(self.dataset_configs)

    @property
    def overwrite(self) -> bool:
        return self.more_recordings.overwrite

    @property
    def output_dir(self) -> Path:
        return Path(self.training.output_dir)


def train_language(language: str, plan: TrainingPlan) -> dict[str, Any]:
    """
    Measure the base model, train, and measure again.

    Args:
        language (`str`): Whisper's code.
        plan (`TrainingPlan`): The checked options.

    Returns:
        `dict`: the row of `results.json`.
    """
    set_seed(plan.training.seed)
    started = time.monotonic()
    data = _LanguageData(language, plan)
    row: dict[str, Any] = {"dataset_config": plan.dataset_configs[language]}
    row |= {"train_items": data.train_counts, "eval_items": data.eval_counts}

    model = WhisperForConditionalGeneration.from_pretrained(plan.recordings.student, dtype=torch.float32)
    model.to(plan.training.device)
    if data.seconds is None:
        row["base"] = data.measure(model, "base model")
    else:
        row["max_audio_seconds"] = data.seconds
        row["base_full_context"] = data.measure_full_context(
            model, data.full_processor, "base model at its full context"
        )
        set_audio_context(model, None, data.seconds)
        row["base"] = data.measure(model, f"base model at {data.seconds} s")

    teacher = None
    if plan.recordings.teacher is not None:
        teacher = _load_teacher(plan)
        full_processor = WhisperProcessor.from_pretrained(plan.recordings.teacher)
        row["teacher"] = data.measure_full_context(teacher, full_processor, "teacher")
        teacher = _prepare_teacher(teacher, data, plan)

    model = _add_adapter(model, language, data.seconds, plan)
    trainable, total = model.get_nb_trainable_parameters()
    row |= {"trainable_parameters": trainable, "trainable_share": trainable / total}
    trainer = _make_trainer(model, teacher, data, plan)
    checkpoints = Path(trainer.args.output_dir)
    resume = None
    if plan.training.resume_from_checkpoint and checkpoints.is_dir():
        resume = get_last_checkpoint(str(checkpoints))
    trained = trainer.train(resume_from_checkpoint=resume)
    row["train_seconds"] = round(trained.metrics["train_runtime"], 1)
    row["train_steps"] = trainer.state.global_step

    # Save first, as plots and cards may fail.
    is_main = plan.training.process_index == 0
    if is_main:
        model.save_pretrained(str(plan.output_dir if plan.lora is None else plan.output_dir / language))
    if plan.lora is None:
        row["expert"] = data.measure(model, "with the expert")
        means = gate_means(model, data.eval_set, data.collator, batch_size=plan.training.per_device_eval_batch_size)
        row["gate_means"] = {name: round(mean, 4) for name, mean in means.items()}
        row["gate_mean"] = sum(means.values()) / len(means)
        if is_main:
            title = f"{plan.recordings.student}, {language}"
            plot_gate_means(means, plan.output_dir / f"gates-{language}.png", title=title)
            _write_card(model, language, row, means, plan)
    else:
        row["lora"] = data.measure(model, "with LoRA")
    if is_main and not plan.more_recordings.keep_checkpoints:
        _remove_checkpoints(checkpoints)
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


class _LanguageData:
    """The recordings of a language, as features for the student, and measurements on them."""

    def __init__(self, language: str, plan: TrainingPlan) -> None:
        self.language, self.plan = language, plan
        options, more = plan.recordings, plan.more_recordings
        config = plan.dataset_configs[language]
        with plan.training.main_process_first(desc="recordings"):
            self.raw_train, self.raw_eval = (
                load_recordings(
                    options.dataset,
                    language,
                    split,
                    config=config,
                    revision=more.dataset_revision,
                    audio_column=more.audio_column,
                    limit=limit,
                )
                for split, limit in (
                    (more.train_split, more.max_train_samples),
                    (more.eval_split, more.max_eval_samples),
                )
            )
        self.processor = WhisperProcessor.from_pretrained(options.student)
        self.full_processor = WhisperProcessor.from_pretrained(options.student)
        self.teacher_processor = None
        if options.teacher is not None:
            self.teacher_processor = WhisperProcessor.from_pretrained(options.teacher)
        self.seconds = self._choose_context()  # None: the student's full context
        if self.seconds is not None:
            set_audio_context(None, self.processor, self.seconds)
            if self.teacher_processor is not None:
                set_audio_context(None, self.teacher_processor, self.seconds)
        self.train_set, self.train_counts = self._prepare(
            self.raw_train, "training", self.processor, self.teacher_processor
        )
        self.eval_set, self.eval_counts = self._prepare(
            self.raw_eval, "evaluation", self.processor, self.teacher_processor
        )

    def _choose_context(self) -> int | None:
        """The context in seconds, or `None` for the full one."""
        given = self.plan.recordings.max_audio_seconds
        if given is not None:
            return given or None  # 0: the full one
        full = context_seconds(self.full_processor.feature_extractor)
        column = self.plan.more_recordings.audio_column
        lengths = [
            seconds
            for dataset in (self.raw_train, self.raw_eval)
            if column in dataset.column_names
            for audio in without_decoding(dataset, column)[column]
            if (seconds := audio_seconds(audio)) is not None and seconds <= full
        ]
        if not lengths or math.ceil(max(lengths)) >= full:
            return None
        chosen = max(1, math.ceil(max(lengths)))
        print(
            f"{self.language}: audio context of {chosen} s, for the longest recording of {max(lengths):.1f} s "
            "(--max_audio_seconds changes it, 0 keeps the model's)"
        )
        return chosen

    def _prepare(
        self,
        raw: datasets.Dataset,
        name: str,
        processor: WhisperProcessor,
        teacher_processor: WhisperProcessor | None = None,
    ) -> tuple[datasets.Dataset, dict[str, int]]:
        more = self.plan.more_recordings
        with self.plan.training.main_process_first(desc="features"):  # other processes find them on disk
            prepared, counts = prepare_dataset(
                raw,
                processor,
                self.language,
                teacher_processor=teacher_processor,
                audio_column=more.audio_column,
                text_column=self.plan.recordings.text_column,
                long_audio=more.long_audio,
                num_proc=more.preprocessing_workers,
                desc=f"{self.language}: features, {name}",
            )
        print(f"{self.language}, {name}: " + ", ".join(f"{count} {key}" for key, count in counts.items() if count))
        return prepared, counts

    def measure(self, model: nn.Module, name: str) -> dict[str, float]:
        """Error rates on the evaluation set at the student's context."""
        return self._measure(model, self.processor, self.eval_set, name)

    def measure_full_context(self, model: nn.Module, processor: WhisperProcessor, name: str) -> dict[str, float]:
        """Error rates on the same utterances at the full context of `processor`."""
        dataset, _ = self._prepare(self.raw_eval.select(self.eval_set["index"]), f"evaluation, {name}", processor)
        return self._measure(model, processor, dataset, name)

    def _measure(
        self, model: nn.Module, processor: WhisperProcessor, dataset: datasets.Dataset, name: str
    ) -> dict[str, float]:
        transcripts = transcribe(
            model,
            processor,
            dataset,
            self.language,
            batch_size=self.plan.training.per_device_eval_batch_size,
            max_new_tokens=self.plan.more_recordings.max_new_tokens,
            desc=f"{self.language}: {name}",
        )
        rates = error_rates(transcripts, dataset["text"], language=self.language)[self.language]
        print(f"{self.language}, {name}: WER {rates['wer']:.1%}, CER {rates['cer']:.1%}")
        return rates

    @cached_property
    def collator(self) -> DataCollatorSpeechSeq2SeqWithPadding:
        return DataCollatorSpeechSeq2SeqWithPadding(
            self.processor,
            language=self.language,
            language_column=self.plan.training.language_column,
            teacher_processor=self.teacher_processor,
        )


def _load_teacher(plan: TrainingPlan) -> WhisperForConditionalGeneration:
    training = plan.training
    precision = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    teacher = WhisperForConditionalGeneration.from_pretrained(plan.recordings.teacher, dtype=precision)
    return teacher.to(training.device)


def _prepare_teacher(
    teacher: WhisperForConditionalGeneration, data: _LanguageData, plan: TrainingPlan
) -> WhisperForConditionalGeneration | TeacherStates:
    """The teacher at the student's context, or its cached states. Then the training set has the states, too."""
    if data.seconds is not None:
        set_audio_context(teacher, None, data.seconds)
    if plan.recordings.teacher_cache is None:
        return teacher
    folder = Path(plan.recordings.teacher_cache) / data.language
    states = cache_teacher_states(data.train_set, teacher, data.teacher_processor, folder)
    data.train_set = states.dataset
    return states


def _add_adapter(model: nn.Module, language: str, seconds: int | None, plan: TrainingPlan) -> PeftModel:
    if plan.lora is None:
        config = CLSRConfig(language=language, max_audio_seconds=seconds, **plan.expert_settings)
        return get_peft_model(model, config, adapter_name=language)
    config = LoraConfig(
        r=plan.lora.lora_rank,
        lora_alpha=plan.lora.lora_alpha,
        lora_dropout=plan.lora.lora_dropout,
        target_modules=["fc1", "fc2"],
        exclude_modules=plan.expert_settings["exclude_modules"],
    )
    return get_peft_model(model, config)  # named "default", the only one whose best checkpoint Trainer finds


def _make_trainer(
    model: PeftModel, teacher: nn.Module | TeacherStates | None, data: _LanguageData, plan: TrainingPlan
) -> Seq2SeqTrainer:
    args = copy.copy(plan.training)
    args.output_dir = str(plan.output_dir / "checkpoints" / data.language)
    args.dataloader_pin_memory = args.dataloader_pin_memory and args.device.type != "cpu"
    common = {
        "model": model,
        "args": args,
        "train_dataset": data.train_set,
        "eval_dataset": data.eval_set,
        "processing_class": data.processor,
        "compute_metrics": make_compute_metrics(data.processor) if args.predict_with_generate else None,
    }
    if plan.lora is None:
        return DistillationTrainer(
            **common,
            data_collator=data.collator,
            teacher_model=teacher,
            teacher_processor=data.teacher_processor,
        )
    model.generation_config.language = data.language  # for evaluation by generation
    return Seq2SeqTrainer(**common, data_collator=PlainCollator(data.collator, model.config))


def _write_card(
    model: PeftModel, language: str, row: dict[str, Any], means: dict[str, float], plan: TrainingPlan
) -> None:
    """Describe the adapter beside its weights, and write our model card in the place of PEFT's empty one."""
    rates = {name: row["expert"][name] for name in ("wer", "cer") if math.isfinite(row["expert"][name])}
    base = row.get("base_full_context", row["base"])
    rates |= {f"base_{name}": base[name] for name in ("wer", "cer") if math.isfinite(base[name])}
    dataset = plan.recordings.dataset
    results = {
        Path(dataset).name if Path(dataset).is_dir() else dataset: {
            **rates,
            "utterances": row["expert"]["utterances"],
            "split": plan.more_recordings.eval_split,
        }
    }
    describe_adapter(
        model,
        language,
        plan.output_dir / language,
        results=results,
        training_args=plan.training,
        gate_means=means,
    )
    write_folder_card(plan.output_dir)


def _remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template
    for parent in (folder, folder.parent):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
