"""One run of the comparison: what it is, its training, and its measurement."""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import jiwer
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer
from transformers.utils import logging

from benchmarks.comparison.grid import ALL_LANGUAGES, BASE, FINETUNED, FULL, LORA, ROUTED, ZERO_SHOT
from benchmarks.comparison.speech import AUDIO_SECONDS, LANGUAGES, OUT_OF_DOMAIN, UNTOUCHED_LANGUAGES
from benchmarks.comparison.store import RUNS_NAME, collect, key_of, read_store, run_name
from benchmarks.timing import machine
from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    PlainCollator,
    cache_teacher_states,
    gate_means,
    prepare_dataset,
    set_audio_context,
    transcribe,
)
from peft_clsr.files import write_text

FULL_CONTEXT = 30.0  # seconds
MAX_NEW_TOKENS = 64  # bounds the time lost on a model that repeats itself
EVAL_BATCH = 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Run:
    """The settings of a run; see `DistillationTrainingArguments`, `CLSRConfig` and `LoraConfig`."""

    method: str
    language: str
    seed: int = 0
    teacher: str | None = None
    learning_rate: float | None = None
    rank: int | None = None
    train_size: int = 400
    epochs: int = 3
    batch_size: int = 8
    audio_seconds: float = AUDIO_SECONDS
    label_smoothing: float = 0.1
    kd_loss: str = "js"
    kd_weight: float = 2.0
    gate_budget: float = 0.5
    budget_weight: float = 1.0
    skip_gate_prob: float = 0.2
    gate_noise: float = 5.0
    expert_dropout: float = 0.3
    straight_through: bool = False
    decoder_layers: int | None = None  # kept of the student's; all by default
    max_steps: int = -1

    @property
    def name(self) -> str:
        """The name of its folder: language, method, teacher, seed, and a hash of the other settings."""
        return run_name(asdict(self))


def teacher_run(max_steps: int = -1) -> Run:
    """The run whose result is the teacher "finetuned"."""
    return Run(FULL, ALL_LANGUAGES, learning_rate=5e-5, max_steps=max_steps)


@dataclass(frozen=True)
class Workspace:
    """
    The folders of a comparison, and how to compute.

    Finished runs are in the table in `results_dir`. New runs are in `work_dir`, which git ignores, one folder a run,
    until `collect` adds them to the table.
    """

    student: str
    data_dir: Path
    results_dir: Path
    work_dir: Path
    precision: str
    threads: int
    max_utterances: int | None

    @property
    def runs_dir(self) -> Path:
        """The folder of the new runs."""
        return self.work_dir / Path(self.student).name

    def results(self, run: Run) -> Path:
        """The file with the results of a new run."""
        return self.runs_dir / run.name / "results.json"

    def weights(self, run: Run) -> Path:
        """The file with the trained weights of a run."""
        return self.runs_dir / f"{run.name}.safetensors"

    def read(self, run: Run) -> dict[str, Any] | None:
        """
        The results of a run, or `None` if it has not been done.

        Raises:
            ValueError: the table is of another student.
        """
        student = Path(self.student).name
        path = self.results(run)
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
        row = _read_table(self.results_dir, _modified(self.results_dir)).get(key_of({"settings": asdict(run)}))
        if row is not None and row["settings"]["student"] != student:
            raise ValueError(
                f"{self.results_dir} has runs of the student {row['settings']['student']!r}, not {student!r}: give "
                "each student a --results_dir"
            )
        return row

    def write(self, run: Run, row: dict[str, Any]) -> None:
        write_text(self.results(run), json.dumps(row, sort_keys=True, allow_nan=False) + "\n")

    def collect(self) -> int:
        """Add the new runs to the table. Returns its number of runs."""
        return collect(self.runs_dir, self.results_dir)


@functools.lru_cache(maxsize=1)
def _read_table(folder: Path, modified: int) -> dict[Any, dict[str, Any]]:
    return read_store(folder)


def _modified(folder: Path) -> int:
    path = folder / RUNS_NAME
    return path.stat().st_mtime_ns if path.exists() else 0


def execute(run: Run, workspace: Workspace) -> str:
    """Train and measure a run, and write its results. Returns a line about it."""
    begin(workspace, run.seed)
    started = time.monotonic()
    processor = WhisperProcessor.from_pretrained(workspace.student)
    if run.audio_seconds < FULL_CONTEXT:
        set_audio_context(None, processor, run.audio_seconds)
    model = build_model(run, workspace, run.audio_seconds).to(DEVICE)
    row: dict[str, Any] = {
        "settings": asdict(run) | {"student": Path(workspace.student).name, "precision": workspace.precision},
        "machine": machine(workspace.precision),
    }
    if run.method != ZERO_SHOT:
        row |= train(run, workspace, model, processor)
        save_weights(model, workspace.weights(run))
    row["evaluations"], row["gates"] = measure(run, workspace, model, processor)
    row["seconds"] = round(time.monotonic() - started, 1)
    workspace.write(run, row)
    rates = ", ".join(f"{split} {rates['wer']:.1%}" for split, rates in row["evaluations"].items())
    return f"{run.name}: WER {rates} ({row['seconds']:.0f} s)"


def begin(workspace: Workspace, seed: int) -> None:
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(workspace.threads)
    set_seed(seed)


# ------------------------------------------------------------------------------------------------ models and speech


def build_model(run: Run, workspace: Workspace, seconds: float) -> nn.Module:
    """The model to train, on a context of so many seconds."""
    model = WhisperForConditionalGeneration.from_pretrained(workspace.student, dtype=torch.float32)
    if seconds < FULL_CONTEXT:
        set_audio_context(model, None, seconds)
    model.model.encoder.embed_positions.requires_grad_(False)  # sinusoids, which OpenAI's Whisper does not train
    if run.decoder_layers is not None:
        decoder = model.model.decoder
        kept = torch.linspace(0, len(decoder.layers) - 1, run.decoder_layers).round().int().tolist()
        decoder.layers = nn.ModuleList([decoder.layers[index] for index in kept])
        for index, layer in enumerate(decoder.layers):  # by which they find their keys and values in the cache
            layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = index
        model.config.decoder_layers = model.config.num_hidden_layers = run.decoder_layers
    if run.method == LORA:
        lora = LoraConfig(r=run.rank, lora_alpha=run.rank, lora_dropout=0.05, target_modules=["fc1", "fc2"])
        return get_peft_model(model, lora)
    if run.method in ROUTED:
        config = CLSRConfig(
            language=run.language,
            expert_rank=run.rank,
            gate_budget=run.gate_budget,
            budget_weight=run.budget_weight,
            skip_gate_prob=run.skip_gate_prob,
            gate_noise=run.gate_noise,
            expert_dropout=run.expert_dropout,
            straight_through=run.straight_through,
        )
        return get_peft_model(model, config, adapter_name=run.language)
    return model


def save_weights(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """
    Put what `save_weights` wrote into a model.

    Raises:
        ValueError: it is not there, or of another model.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing, to train its run again remove the run's results.json")
    trained = load_file(path)
    if not set(trained) <= set(model.state_dict()):
        raise ValueError(f"{path} is of another model")
    model.load_state_dict(trained, strict=False)


def load_run(run: Run, workspace: Workspace, seconds: float) -> tuple[dict[str, Any], nn.Module, Any]:
    """
    What a run left: its results, and its model and processor on a context of so many seconds.

    Raises:
        ValueError: the run has no results or no weights yet, or its weights are of another model.
    """
    results = workspace.read(run)
    if results is None:
        raise ValueError(f"{workspace.results(run)} is missing: run the group 'main' first")
    begin(workspace, run.seed)
    processor = WhisperProcessor.from_pretrained(workspace.student)
    if seconds < FULL_CONTEXT:
        set_audio_context(None, processor, seconds)
    model = build_model(run, workspace, seconds).to(DEVICE)
    if run.method != ZERO_SHOT:
        load_weights(model, workspace.weights(run))
    return results, model, processor


def load_split(
    workspace: Workspace, language: str, split: str, processor: Any, size: int | None = None, **kwargs: Any
) -> datasets.Dataset:
    """The first `size` utterances of a split, prepared, with their `translation`s."""
    folder = workspace.data_dir / language / split
    table = datasets.Dataset.from_csv(str(folder / "metadata.csv"), keep_default_na=False)
    limits = [limit for limit in (size, workspace.max_utterances) if limit is not None]
    table = table.select(range(min([len(table), *limits])))
    table = table.add_column("audio", [str(folder / name) for name in table["file_name"]])
    prepared, _ = prepare_dataset(table, processor, **kwargs)
    if len(prepared) != len(table):
        raise ValueError(f"{len(table) - len(prepared)} utterances of {folder} cannot be used: make it anew")
    return prepared.add_column("translation", table["translation"])


# ----------------------------------------------------------------------------------------------------------- training


def train(run: Run, workspace: Workspace, model: nn.Module, processor: Any) -> dict[str, Any]:
    """Train the model. Returns what is to be known about that."""
    teacher, teacher_processor = load_teacher(run, workspace)
    columns = {} if teacher is None else {"teacher_processor": teacher_processor}
    languages = LANGUAGES if run.language == ALL_LANGUAGES else [run.language]
    train_set = datasets.concatenate_datasets(
        [load_split(workspace, language, "train", processor, run.train_size, **columns) for language in languages]
    )
    with tempfile.TemporaryDirectory() as folder:
        if teacher is not None:
            teacher = cache_teacher_states(train_set, teacher, teacher_processor, Path(folder) / "states")
            train_set = teacher.dataset
        settings = {
            "output_dir": folder,
            "seed": run.seed,
            "learning_rate": run.learning_rate,
            "num_train_epochs": run.epochs,
            "max_steps": run.max_steps,
            "per_device_train_batch_size": run.batch_size,
            "warmup_steps": 0.1,
            "adam_beta2": 0.98,
            "label_smoothing_factor": run.label_smoothing,
            "bf16": workspace.precision == "bfloat16",
            "use_cpu": DEVICE == "cpu",
            "dataloader_pin_memory": DEVICE != "cpu",
            "remove_unused_columns": False,
            "save_strategy": "no",
            "logging_steps": 25,
            "report_to": "none",
            "disable_tqdm": True,
        }
        collator = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=columns.get("teacher_processor"))
        if run.method in ROUTED:
            trainer = DistillationTrainer(
                model=model,
                args=DistillationTrainingArguments(**settings, kd_loss=run.kd_loss, kd_weight=run.kd_weight),
                teacher_model=teacher,
                teacher_processor=columns.get("teacher_processor"),
                train_dataset=train_set,
                data_collator=collator,
                processing_class=processor,
            )
        else:
            trainer = Seq2SeqTrainer(
                model=model,
                args=Seq2SeqTrainingArguments(**settings),
                train_dataset=train_set,
                data_collator=PlainCollator(collator, model.config),
            )
        trained = trainer.train()
    return {
        "train_utterances": len(train_set),
        "train_steps": trainer.state.global_step,
        "train_seconds": round(trained.metrics["train_runtime"], 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def load_teacher(run: Run, workspace: Workspace) -> tuple[nn.Module | None, Any]:
    """The run's teacher and its processor, on the student's context if it was trained on that, else on 30 s."""
    if run.teacher is None:
        return None, None
    seconds = run.audio_seconds if run.teacher == FINETUNED else FULL_CONTEXT
    name = workspace.student if run.teacher in (FINETUNED, BASE) else run.teacher
    teacher = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(name)
    if run.teacher == FINETUNED:
        load_weights(teacher, workspace.weights(teacher_run(run.max_steps)))
    if seconds < FULL_CONTEXT:
        set_audio_context(teacher, processor, seconds)
    return teacher.to(DEVICE, torch.bfloat16 if workspace.precision == "bfloat16" else torch.float32), processor


# -------------------------------------------------------------------------------------------------------- measurement


def measure(
    run: Run, workspace: Workspace, model: nn.Module, processor: Any
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Errors by split, and mean gates by split and module; of the run on all languages, by language and split."""
    if run.audio_seconds == FULL_CONTEXT and workspace.precision == "bfloat16":
        model.to(torch.bfloat16)
    evaluations, gates = {}, {}
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
    for language in LANGUAGES if run.language == ALL_LANGUAGES else [run.language]:
        for split in ("validation", "test", OUT_OF_DOMAIN):
            dataset = load_split(workspace, language, split, processor)
            key = f"{language} {split}" if run.language == ALL_LANGUAGES else split
            heard = transcribe(
                model, processor, dataset, language, batch_size=EVAL_BATCH, max_new_tokens=MAX_NEW_TOKENS
            )
            evaluations[key] = count_errors(heard, dataset["text"])
            if run.method in ROUTED:
                means = gate_means(model, dataset, collator, batch_size=EVAL_BATCH)
                gates[key] = {name: round(mean, 4) for name, mean in means.items()}
    return evaluations, gates


def count_errors(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """
    Error rates as in `peft_clsr.evaluation.error_rates`, and their parts.

    Returns:
        `dict`: "wer" and "cer", fractions, and "utterances", for each [substitutions, deletions, insertions, words,
        character errors, characters].
    """
    normalize = BasicTextNormalizer(remove_diacritics=False)
    utterances = []
    for prediction, reference in zip(predictions, references, strict=True):
        spoken, heard = normalize(reference).strip(), normalize(prediction).strip()
        words, characters = jiwer.process_words(spoken, heard), jiwer.process_characters(spoken, heard)
        errors = (words.substitutions, words.deletions, words.insertions)
        character_errors = characters.substitutions + characters.deletions + characters.insertions
        utterances.append([*errors, len(spoken.split()), character_errors, len(spoken)])
    totals = [sum(column) for column in zip(*utterances, strict=True)]
    return {"wer": sum(totals[:3]) / totals[3], "cer": totals[4] / totals[5], "utterances": utterances}


def measure_untouched(run: Run, workspace: Workspace) -> str:
    """
    Measure what the run's training was not about, at 30 s: other languages, and translation to English. Adds it to the
    run's results.

    Raises:
        ValueError: as `load_run`.
    """
    import sacrebleu

    results, model, processor = load_run(run, workspace, FULL_CONTEXT)
    if workspace.precision == "bfloat16":
        model.to(torch.bfloat16)
    settings = {"batch_size": EVAL_BATCH, "max_new_tokens": MAX_NEW_TOKENS}
    row = {}
    for language in (*UNTOUCHED_LANGUAGES, run.language):
        dataset = load_split(workspace, language, "test", processor)
        key = language if language in UNTOUCHED_LANGUAGES else f"{language} at 30 s"
        row[key] = count_errors(transcribe(model, processor, dataset, language, **settings), dataset["text"])
        if language != "en":
            heard = transcribe(model, processor, dataset, language, task="translate", **settings)
            row[f"translate-{language}"] = {
                "chrF": sacrebleu.corpus_chrf(heard, [dataset["translation"]]).score,
                "bleu": sacrebleu.corpus_bleu(heard, [dataset["translation"]], lowercase=True).score,
            }
    workspace.write(run, results | {"untouched": row})
    return f"{run.name}: untouched measured"
