"""The training of one language: measure the base model, train, measure again, save."""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    TrainerCallback,
    TrainerState,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)

from ..data.collator import DataCollatorSpeechSeq2SeqWithPadding
from ..data.labels import has_timestamps
from ..data.plain_batch import PlainCollator
from ..data.rows import without_decoding
from ..distillation.callbacks import EpochCallback
from ..distillation.resumption import last_checkpoint
from ..distillation.teachers.cache import cache_teacher_states
from ..distillation.trainer import DistillationTrainer
from ..evaluation.error_rates import check_scorable, error_rates, format_rates
from ..evaluation.gates import gate_means
from ..evaluation.metrics import make_compute_metrics
from ..evaluation.transcripts import transcribe
from ..files import copy_file
from ..hub.card import write_folder_card
from ..hub.push import save_language, save_weights
from ..hub.record import PLOT_NAME
from ..hub.warm_start import SavedExpert, check_fit, start_from
from ..tuner.config import CLSRConfig
from ..whisper import set_audio_context
from .joined import format_times, measure_joined
from .run_folder import CONFIG_KEYS, checkpoints_folder, remove_checkpoints, write_results
from .train_data import cut_context, packs, prepare, prompt_of, report
from .train_options import TrainOptions, expert_config
from .train_packed import pack_held_out, pack_recordings, planned_epochs
from .train_splits import Configs, load_splits

logger = logging.getLogger(__name__)


def train_language(
    language: str,
    configs: Configs,
    options: TrainOptions,
    results: dict[str, Any],
    source: SavedExpert | None = None,
) -> dict[str, Any]:
    """
    Train the expert (or LoRA) of one language, and save it in the output folder.

    Args:
        language (`str`): The tag.
        configs ([`Configs`]): Its configurations on the Hub, or subfolders.
        options (`TrainOptions`): All options.
        results (`dict`): The results so far, as `open_results` returned them.
        source (`SavedExpert`, *optional*): The expert to start from.

    Returns:
        `dict`: the row of results: counts of recordings, error rates, parameters, gate means and times in seconds.

    Raises:
        ValueError: data or models cannot be used.
        OSError: a model cannot be loaded.
    """
    set_seed(options.training.seed)
    return _LanguageTraining(language, configs, options, results, source).run()


class _RecordSettings(TrainerCallback):
    """After the first step, before any checkpoint: writes the settings of the run, and removes what it overwrites."""

    def __init__(
        self, language: str, configs: dict[str, str | None], options: TrainOptions, results: dict[str, Any]
    ) -> None:
        self.language, self.configs, self.options, self.results = language, configs, options, results

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.language in self.results["unfinished"]:
            return
        output_dir, data = self.options.output_dir, self.options.data
        self.results["unfinished"][self.language] = self.configs
        if data.overwrite and args.should_save:
            for language in data.languages:
                if language not in self.results["languages"]:
                    remove_checkpoints(output_dir, language)
        if args.process_index == 0:
            write_results(self.results, output_dir)
        PartialState().wait_for_everyone()  # no process writes a checkpoint before


class _LanguageTraining:
    def __init__(
        self,
        language: str,
        configs: Configs,
        options: TrainOptions,
        results: dict[str, Any],
        source: SavedExpert | None,
    ) -> None:
        self.language = language
        self.source = source
        self.prompt = prompt_of(options.data, language)
        self.options = options
        self.results = results
        self.row: dict[str, Any] = {key: getattr(configs, part) for key, part in CONFIG_KEYS.items()}
        data, training = options.data, options.training
        with training.main_process_first(desc="recordings"):
            self.recordings = load_splits(data, language, configs)
        self.processor = WhisperProcessor.from_pretrained(data.student)
        self.seconds = cut_context(data, self.processor)  # None leaves it as it is
        self.is_packed = packs(data, self.processor)
        self.teacher_processor = None if data.teacher is None else WhisperProcessor.from_pretrained(data.teacher)

    def run(self) -> dict[str, Any]:
        started = time.monotonic()
        # The order matters for reproducible results: measuring draws random numbers, and so does a new adapter.
        model = WhisperForConditionalGeneration.from_pretrained(self.options.data.student, dtype=torch.float32)
        model.to(self.options.training.device)
        if self.source is not None:
            check_fit(model, self.language, self._config(), self.source)
        self._prepare()
        self._measure_base(model)
        model = self._add_adapter(model)
        trainer = self._trainer(model, self._load_teacher())
        self._train(trainer)
        self._measure_trained(model, trainer)
        self.row["seconds"] = round(time.monotonic() - started, 1)
        return self.row

    def _prepare(self) -> None:
        if self.seconds is not None:
            set_audio_context(None, self.processor, self.seconds)
            if self.teacher_processor is not None:
                set_audio_context(None, self.teacher_processor, self.seconds)
        self.eval_set, self.row["eval_items"] = prepare(
            self.recordings.test, self.processor, self.language, "evaluation", self.options
        )
        check_scorable(self.eval_set["text"], self.language)  # of what can be used, unlike in load_splits()
        self.validation_set = None
        if self.recordings.validation is not None:
            validation = self.recordings.validation, self.processor, self.language, "validation"
            prepared = prepare(*validation, self.options, self.teacher_processor)
            self.validation_set, self.row["validation_items"] = prepared
            check_scorable(self.validation_set["text"], self.language)
        train = self.recordings.train, self.processor, self.language
        if self.is_packed:
            packed = pack_recordings(*train, self.options, self.teacher_processor)
            self.train_set, self.row["train_items"] = packed
        else:
            prepared = prepare(*train, "training", self.options, self.teacher_processor)
            self.train_set, self.row["train_items"] = prepared
        self.held_out = without_decoding(
            self.recordings.test.select(self.eval_set["index"]), self.options.data.audio_column
        )

    def _measure_base(self, model: nn.Module) -> None:
        """Measure the base model at its own context and, if that is cut, at the cut one: on the same recordings."""
        if self.seconds is None:
            self.row["base"] = self._measure(model, "base model")
            self._measure_joined(model, "base", "base model")
            return
        full_processor = WhisperProcessor.from_pretrained(self.options.data.student)
        full_set = self._full_context_set(full_processor, "evaluation at 30 s")
        self.row["base_full_context"] = self._measure(model, "base model at its full context", full_set)
        set_audio_context(model, None, self.seconds)
        self.row["base"] = self._measure(model, f"base model at {self.seconds} s")

    def _full_context_set(self, processor: WhisperProcessor, name: str) -> Any:
        return prepare(self.held_out, processor, self.language, name, self.options)[0]

    def _measure(self, model: nn.Module, name: str, dataset: Any = None, processor: Any = None) -> dict[str, float]:
        dataset = self.eval_set if dataset is None else dataset
        transcripts = transcribe(
            model,
            processor or self.processor,
            dataset,
            self._spoken(model),
            batch_size=self.options.training.per_device_eval_batch_size,
            max_new_tokens=self.options.data.max_new_tokens,
            desc=f"{self.language}: {name}",
        )
        rates = error_rates(transcripts, dataset["text"], language=self.language)[self.language]
        report(self.options.training, f"{self.language}, {name}: {format_rates(rates)}")
        return rates

    def _spoken(self, model: nn.Module) -> str:
        """The language for `generate`. Only a model with experts knows one that Whisper does not."""
        return self.language if isinstance(model, PeftModel) and self.options.lora is None else self.prompt

    def _measure_joined(self, model: nn.Module, key: str, name: str, processor: Any = None) -> None:
        """Measure a model of the whole context on the same recordings, joined to some of about a minute."""
        if self.seconds is not None or not has_timestamps(self.processor.tokenizer):
            return  # without timestamps, Whisper hears one window alone
        processor, name = processor or self.processor, f"{name}, joined recordings"
        rates = measure_joined(model, processor, self.held_out, self.language, self._spoken(model), self.options, name)
        report(self.options.training, f"{self.language}, {name}: {format_rates(rates)}; {format_times(rates)}")
        self.row[f"{key}_joined"] = rates

    def _config(self) -> CLSRConfig:
        settings = expert_config(self.options.expert)
        names = {"language": self.language, "prompt_language": self.prompt}
        return CLSRConfig(**names, max_audio_seconds=self.seconds, **settings)

    def _add_adapter(self, model: nn.Module) -> PeftModel:
        lora, expert = self.options.lora, self.options.expert
        if lora is None:
            model = get_peft_model(model, self._config(), adapter_name=self.language)
            if self.source is not None:
                start_from(model, self.language, self.source)
        else:
            config = LoraConfig(
                r=lora.lora_rank,
                lora_alpha=lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha,
                lora_dropout=lora.lora_dropout,
                target_modules=["fc1", "fc2"],
                exclude_modules=expert.exclude_modules,
            )
            # Named "default": transformers' Trainer finds the best checkpoint of no other adapter.
            model = get_peft_model(model, config)
        trainable, total = model.get_nb_trainable_parameters()
        self.row |= {"trainable_parameters": trainable, "trainable_share": trainable / total}
        return model

    def _load_teacher(self) -> Any:
        """The teacher, or its cached states. It is measured at its own context, and teaches at the student's."""
        data, training = self.options.data, self.options.training
        if data.teacher is None:
            return None
        precision = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        teacher = WhisperForConditionalGeneration.from_pretrained(data.teacher, dtype=precision)
        teacher.to(training.device)
        processor = WhisperProcessor.from_pretrained(data.teacher)
        dataset = self._full_context_set(processor, "evaluation of the teacher")
        self.row["teacher"] = self._measure(teacher, "teacher", dataset, processor)
        self._measure_joined(teacher, "teacher", "teacher", processor)
        if self.seconds is not None:
            set_audio_context(teacher, None, self.seconds)
        if data.teacher_cache is None:
            return teacher
        folder = Path(data.teacher_cache) / self.language
        epochs = planned_epochs(training, len(self.train_set)) if self.is_packed else None
        states = cache_teacher_states(self.train_set, teacher, self.teacher_processor, folder, epochs=epochs)
        self.train_set = states.dataset
        return states

    def _trainer(self, model: PeftModel, teacher: Any) -> Seq2SeqTrainer:
        training = copy.copy(self.options.training)
        training.output_dir = str(checkpoints_folder(self.options.output_dir, self.language))
        training.dataloader_pin_memory = training.dataloader_pin_memory and training.device.type != "cpu"
        collator = DataCollatorSpeechSeq2SeqWithPadding(
            self.processor,
            language=self.language,
            language_column=training.language_column,
            teacher_processor=self.teacher_processor,
        )
        common = {
            "model": model,
            "args": training,
            "train_dataset": self.train_set,
            "eval_dataset": self.validation_set,
            "processing_class": self.processor,
            "compute_metrics": make_compute_metrics(self.processor, [self.language] * len(self.validation_set))
            if self.validation_set is not None and training.predict_with_generate
            else None,
        }
        if self.options.lora is None:
            return DistillationTrainer(
                **common,
                data_collator=collator,
                teacher_model=teacher,
                teacher_processor=self.teacher_processor,
            )
        model.generation_config.language = self.prompt  # for evaluation by generation
        common["data_collator"] = PlainCollator(collator, model.config)
        return Seq2SeqTrainer(**common, callbacks=[EpochCallback(self.train_set)])

    def _train(self, trainer: Seq2SeqTrainer) -> None:
        checkpoint = None
        if trainer.args.resume_from_checkpoint:
            checkpoint = last_checkpoint(trainer.args.output_dir, trainer.accelerator.state)
        configs = {key: self.row[key] for key in CONFIG_KEYS}
        trainer.add_callback(_RecordSettings(self.language, configs, self.options, self.results))
        try:
            trained = trainer.train(resume_from_checkpoint=checkpoint)
        except BaseException as error:  # an interruption by the keyboard, too
            if trainer.state.global_step > 0:
                self._save_weights(trainer)
                logger.warning(
                    f"{self.language}: the training stopped after {trainer.state.global_step} of "
                    f"{trainer.state.max_steps} steps ({type(error).__name__}); the adapter of then is in "
                    f"{self.options.output_dir / self.language} (--resume_from_checkpoint true goes on at the last "
                    "checkpoint, if one was saved)"
                )
            raise
        self._save_weights(trainer)  # before anything else can fail
        self.row["train_seconds"] = round(trained.metrics["train_runtime"], 1)
        self.row["train_steps"] = trainer.state.global_step
        if self.validation_set is not None:
            self._report_best(trainer)

    def _report_best(self, trainer: Seq2SeqTrainer) -> None:
        """Say which checkpoint is taken."""
        state, metric = trainer.state, str(trainer.args.metric_for_best_model).removeprefix("eval_")
        if state.best_global_step is None or state.best_metric is None:
            return
        self.row["best"] = {"step": state.best_global_step, metric: state.best_metric}
        value = f"{state.best_metric:.4f}" if metric.endswith("loss") else f"{state.best_metric:.1%}"
        report(
            self.options.training,
            f"{self.language}: the best of {len(_evaluations(state))} checkpoints is that of step "
            f"{state.best_global_step} of {state.global_step}, with {metric} {value} on the validation recordings",
        )

    def _save_weights(self, trainer: Seq2SeqTrainer) -> None:
        """Save the adapter."""
        if trainer.args.process_index > 0:
            return
        model, output_dir = trainer.accelerator.unwrap_model(trainer.model), self.options.output_dir
        if self.options.lora is None:
            save_weights(model, output_dir, self.language)
        else:
            model.save_pretrained(str(output_dir / self.language))

    def _measure_trained(self, model: PeftModel, trainer: Seq2SeqTrainer) -> None:
        if self.options.lora is not None:
            self.row["lora"] = self._measure(model, "with LoRA")
            self._measure_joined(model, "lora", "with LoRA")
            return
        self.row["expert"] = self._measure(model, "with the expert")
        self._measure_joined(model, "expert", "with the expert")
        gate_set, batch_size = self.eval_set, trainer.args.per_device_eval_batch_size
        if self.is_packed:  # as in training, and quicker
            gate_set = pack_held_out(self.held_out, self.processor, self.language, self.options)
        # Without teacher: these rows have no features for it.
        collator = DataCollatorSpeechSeq2SeqWithPadding(self.processor, language=self.language)
        means = gate_means(model, gate_set, collator, batch_size=batch_size)
        self.row["gate_means"] = {name: round(mean, 4) for name, mean in means.items()}
        self.row["gate_mean"] = sum(means.values()) / len(means)
        if trainer.args.process_index == 0:
            try:
                self._save_expert(model, means)
            except Exception as error:
                logger.warning(
                    f"{self.language}: the adapter and its results are saved, but not its model card "
                    f"({type(error).__name__}: {error}). Mend that, and call peft_clsr.save_language()"
                )

    def _save_expert(self, model: PeftModel, means: dict[str, float]) -> None:
        """Save the adapter with its results and a model card, as [`push_folder`] publishes them."""
        data = self.options.data
        base, expert = self.row.get("base_full_context", self.row["base"]), self.row["expert"]
        rates = {"wer": expert["wer"], "cer": expert["cer"], "base_wer": base["wer"], "base_cer": base["cer"]}
        rates |= {"utterances": expert["utterances"], "split": data.eval_split}
        if self.row["eval_config"]:
            rates["config"] = self.row["eval_config"]
        name = (data.eval_dataset or data.dataset).replace("{language}", self.language)
        test_set = Path(name).resolve().name if Path(name).exists() else name  # no path of this machine
        folder = save_language(
            model,
            self.options.output_dir,
            self.language,
            metrics={test_set: rates},
            training_args=self.options.training,
            gate_means=means,
        )
        if (folder / PLOT_NAME).is_file():
            copy_file(folder / PLOT_NAME, self.options.output_dir / f"gates-{self.language}.png")
        write_folder_card(self.options.output_dir)


def _evaluations(state: TrainerState) -> list[dict[str, float]]:
    return [log for log in state.log_history if "eval_loss" in log]
