"""Training and measuring one run of the comparison."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import jiwer
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)
from transformers.utils import logging

from benchmarks.timing import machine
from peft_clsr import (
    CLSRConfig,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    PlainCollator,
    cache_teacher_states,
    gate_means,
    pack_utterances,
    prepare_dataset,
    scale_expert,
    set_audio_context,
    transcribe,
)
from peft_clsr.cli.joined import JoinedRecordings, transcribe_joined
from peft_clsr.data.labels import MAX_LABEL_LENGTH
from peft_clsr.data.rows import RowReader
from peft_clsr.evaluation.normalization import normalize_text
from peft_clsr.whisper import context_seconds

from .errors import evaluation_of
from .folds import GRID_LANGUAGES, WINDOWS, parts
from .methods import ALL_LANGUAGES, BASE, EXPERTS, FINETUNED, HELD_OUT, LORA, ZERO_SHOT
from .runs import Run, held_out_teacher, teacher_run
from .speech import FULL_CONTEXT, LANGUAGES, OUT_OF_DOMAIN, UNTOUCHED_LANGUAGES
from .store import COSTS, Result, ResultStore, is_measured, without_nan, write_bytes

MAX_NEW_TOKENS = 64  # bounds the time lost on a model that repeats itself
MAX_NEW_TOKENS_OF_LONG = 160  # of the second round, whose longest reference has 131
OTHER_RECORDINGS = 4  # of another language, compared bit by bit with the unchanged student
EVAL_BATCH = 25
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Setup:
    """
    What all runs of a command share.

    Args:
        student (`str`): Whisper to train: folder or Hub id.
        data_dir (`Path`): The recordings, as `speech` writes them.
        store (`ResultStore`): Takes results and weights.
        precision (`str`): "bfloat16" (training by autocast) or "float32".
        threads (`int`): Threads of a run.
        max_utterances (`int`, *optional*): Use only the first utterances of each split.
    """

    student: str
    data_dir: Path
    store: ResultStore
    precision: str
    threads: int
    max_utterances: int | None


def execute(run: Run, setup: Setup, splits: Sequence[str] | None = None) -> str:
    """
    Train and measure a run, and write its results. One that has been validated is measured further from its weights.

    Validation is for choices: a run of the second round has it only if it was a candidate. A run that has results but
    no weights is trained again, and keeps its results.

    Args:
        run (`Run`): The run.
        setup (`Setup`): Of the command.
        splits (`Sequence[str]`, *optional*): The splits to measure, beside validation. By default all of its round.

    Returns:
        `str`: A line about it.
    """
    known = setup.store.read(run)
    if known is not None and is_measured(known) and not setup.store.weights(run).exists():
        return train_alone(run, setup)
    splits = ["test", OUT_OF_DOMAIN] + ["joined"] * (run.fold >= 0) if splits is None else list(splits)
    if run.fold < 0 or (known is not None and "validation" in known["evaluations"]):
        splits.insert(0, "validation")  # again if it was trained again: choices follow from the row that is kept
    return _measure_and_write(run, setup, *_loaded_or_trained(run, setup), splits)


def train_alone(run: Run, setup: Setup) -> str:
    """Train a run for its weights, and measure nothing: `execute` goes on from there. Returns a line about it."""
    result, *_ = _trained(run, setup)
    if setup.store.read(run) is not None:  # nothing of it is left to measure
        setup.store.trained_file(run).unlink(missing_ok=True)
    return f"{run.name}: trained ({result['seconds']:.0f} s)"


def validate(run: Run, setup: Setup) -> str:
    """Train a run and measure it in validation alone, for a choice; write its results. Returns a line about it."""
    return _measure_and_write(run, setup, *_loaded_or_trained(run, setup), splits=["validation"])


def _loaded_or_trained(run: Run, setup: Setup) -> tuple[Result, nn.Module, Any]:
    """`load_run` where there are results and weights, else `_trained`."""
    if setup.store.read(run) is not None and setup.store.weights(run).exists():
        return load_run(run, setup, run.audio_seconds)
    return _trained(run, setup)


def _trained(run: Run, setup: Setup) -> tuple[Result, nn.Module, Any]:
    """
    Train a run, and write its weights; if a command was stopped while it measured the run, load them.

    A run that keeps a share of what another one trained has no weights of its own.

    Returns:
        `tuple`: Results without evaluations, the model and its processor.
    """
    if run.scale != 1:
        whole = replace(run, scale=1.0)
        result, model, processor = _loaded_or_trained(whole, setup)
        if setup.store.read(whole) is not None:  # nothing of it is left to measure
            setup.store.trained_file(whole).unlink(missing_ok=True)
        costs = {name: result[name] for name in COSTS if name in result} | {"seconds": 0.0}
        return {**_new_result(run, setup), **costs}, scaled(model, run, setup), processor
    prepare_process(setup, run.seed)
    started = time.monotonic()
    processor = WhisperProcessor.from_pretrained(setup.student)
    if run.audio_seconds < FULL_CONTEXT:
        set_audio_context(None, processor, run.audio_seconds)
    model = build_model(run, setup, run.audio_seconds).to(DEVICE)
    weights, trained = setup.store.weights(run), setup.store.trained_file(run)
    if weights.exists() and trained.exists():
        load_weights(model, weights)
        return json.loads(trained.read_text(encoding="utf-8")), model, processor
    result = _new_result(run, setup)
    if run.method != ZERO_SHOT:
        result |= train(run, setup, model, processor)
        save_weights(model, weights)
    result["seconds"] = time.monotonic() - started
    if run.method != ZERO_SHOT:
        write_bytes(trained, json.dumps(without_nan(result)).encode())
    return result, model, processor


def _new_result(run: Run, setup: Setup) -> Result:
    settings = asdict(run) | {"student": setup.store.student, "precision": setup.precision}
    return {"settings": settings, "machine": machine(setup.precision), "evaluations": {}, "gates": {}}


def _measure_and_write(
    run: Run, setup: Setup, result: Result, model: nn.Module, processor: Any, splits: Sequence[str]
) -> str:
    """Measures the splits that the results lack."""
    started = time.monotonic()
    splits = [split for split in splits if split not in result["evaluations"]]
    evaluations, gates = measure(run, setup, model, processor, splits)
    result["evaluations"] |= evaluations
    result["gates"] |= gates
    if "test" in splits and run.fold >= 0 and run.language != ALL_LANGUAGES:
        result["others_untouched"] = others_untouched(run, setup, model, processor)
    result["seconds"] = round(result["seconds"] + time.monotonic() - started, 1)
    setup.store.write(run, result)
    setup.store.trained_file(run).unlink(missing_ok=True)
    rates = ", ".join(f"{split} {rates['wer']:.1%}" for split, rates in result["evaluations"].items())
    return f"{run.name}: WER {rates} ({result['seconds']:.0f} s)"


def prepare_process(setup: Setup, seed: int) -> None:
    """Sets the seed and the threads, and hides progress bars and warnings."""
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(setup.threads)
    set_seed(seed)


# ------------------------------------------------------------------------------------------------ models and speech


def build_model(run: Run, setup: Setup, seconds: float) -> nn.Module:
    """The model to train, with its audio context cut to `seconds`."""
    model = WhisperForConditionalGeneration.from_pretrained(setup.student, dtype=torch.float32)
    if seconds < FULL_CONTEXT:
        set_audio_context(model, None, seconds)
    model.model.encoder.embed_positions.requires_grad_(False)  # fixed sinusoids in OpenAI's Whisper
    if run.spec_augment:
        model.config.update({"apply_spec_augment": True, "mask_feature_prob": 0.05})
    if run.decoder_layers is not None:
        decoder = model.model.decoder
        kept = torch.linspace(0, len(decoder.layers) - 1, run.decoder_layers).round().int().tolist()
        decoder.layers = nn.ModuleList([decoder.layers[index] for index in kept])
        for index, layer in enumerate(decoder.layers):  # its place in the cache of keys and values
            layer.self_attn.layer_idx = layer.encoder_attn.layer_idx = index
        model.config.decoder_layers = model.config.num_hidden_layers = run.decoder_layers
    if run.method == LORA:
        targets = ["fc1", "fc2"]
        return get_peft_model(
            model, LoraConfig(r=run.rank, lora_alpha=run.rank, lora_dropout=0.05, target_modules=targets)
        )
    if run.method in EXPERTS:
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
    """Writes the parameters that were trained."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    save_file(trained, path)


def load_weights(model: nn.Module, path: Path) -> None:
    """
    Load weights that `save_weights` wrote.

    Raises:
        ValueError: the file is missing, or belongs to another model.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing: to train its run again, remove the run's row, if any, from runs.csv")
    trained = load_file(path)
    if not set(trained) <= set(model.state_dict()):
        raise ValueError(f"{path} is of another model")
    model.load_state_dict(trained, strict=False)


@torch.no_grad()
def scaled(model: nn.Module, run: Run, setup: Setup) -> nn.Module:
    """The model with the share `run.scale` of what was trained."""
    if run.method in EXPERTS:
        scale_expert(model, run.language, run.scale)
    elif run.method == LORA:
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(run.scale)
    else:
        student = WhisperForConditionalGeneration.from_pretrained(setup.student, dtype=torch.float32).to(DEVICE)
        for weight, start in zip(model.parameters(), student.parameters(), strict=True):
            weight.lerp_(start, 1 - run.scale)
    return model


def load_run(run: Run, setup: Setup, seconds: float) -> tuple[Result, nn.Module, Any]:
    """
    Load a trained run.

    Returns:
        `tuple`: Its results, its model and its processor, both with the audio context cut to `seconds`.

    Raises:
        ValueError: the run has no results or no weights yet, or its weights belong to another model.
    """
    results = setup.store.read(run)
    if results is None:
        raise ValueError(f"{run.name} has no results in {setup.store.table_dir}: run the group 'main' first")
    prepare_process(setup, run.seed)
    processor = WhisperProcessor.from_pretrained(setup.student)
    if seconds < FULL_CONTEXT:
        set_audio_context(None, processor, seconds)
    model = build_model(run, setup, seconds).to(DEVICE)
    if run.method != ZERO_SHOT:
        load_weights(model, setup.store.weights(run))
    return results, model, processor


def read_split(
    setup: Setup, language: str, split: str, size: int | None = None, fold: int = -1, start: int = 0
) -> datasets.Dataset:
    """Recordings of a split, `size` from `start` on: undecoded "audio", "transcription", "language", "translation"."""
    tables = []
    for name, kept in parts(split, fold) if fold >= 0 else [(split, slice(None))]:
        folder = setup.data_dir / language / name
        table = datasets.Dataset.from_csv(str(folder / "metadata.csv"), keep_default_na=False)
        table = table.add_column("audio", [str(folder / file) for file in table["file_name"]])
        tables.append(table.select(range(len(table))[kept]))
    table = datasets.concatenate_datasets(tables)
    table = table.select(range(start, len(table)))
    limits = [limit for limit in (size, setup.max_utterances) if limit is not None]
    return table.select(range(min([len(table), *limits])))


def load_split(
    setup: Setup, language: str, split: str, processor: Any, size: int | None = None, fold: int = -1, **kwargs: Any
) -> datasets.Dataset:
    """
    The recordings of `read_split` as features and labels, with a column "translation".

    Raises:
        ValueError: an utterance cannot be used, see `prepare_dataset`.
    """
    table = read_split(setup, language, split, size, fold)
    prepared, _ = prepare_dataset(table, processor, **kwargs)
    if len(prepared) != len(table):
        raise ValueError(
            f"{len(table) - len(prepared)} utterances of {setup.data_dir / language / split} cannot be used: make "
            "the folder again"
        )
    return prepared.add_column("translation", table["translation"])


def languages_of(run: Run) -> Sequence[str]:
    """The languages that a run is trained and measured on."""
    if run.language != ALL_LANGUAGES:
        return [run.language]
    return LANGUAGES if run.fold < 0 else GRID_LANGUAGES


# ----------------------------------------------------------------------------------------------------------- training


def train(run: Run, setup: Setup, model: nn.Module, processor: Any) -> dict[str, Any]:
    """Trains the model. Returns the training's cost and log."""
    teacher, teacher_processor = load_teacher(run, setup)
    columns = {} if teacher is None else {"teacher_processor": teacher_processor}
    train_set, utterances = training_set(run, setup, processor, **columns)
    with tempfile.TemporaryDirectory() as folder:
        if teacher is not None:
            epochs = {} if run.fold < 0 else {"epochs": run.epochs}  # windows are drawn anew in each epoch
            teacher = cache_teacher_states(train_set, teacher, teacher_processor, Path(folder) / "states", **epochs)
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
            "bf16": setup.precision == "bfloat16",
            "use_cpu": DEVICE == "cpu",
            "dataloader_pin_memory": DEVICE != "cpu",
            "remove_unused_columns": False,
            "save_strategy": "no",
            "logging_steps": 25,
            "report_to": "none",
            "disable_tqdm": True,
        }
        collator = DataCollatorSpeechSeq2SeqWithPadding(processor, teacher_processor=columns.get("teacher_processor"))
        if run.method in EXPERTS:
            trainer = DistillationTrainer(
                model=model,
                args=DistillationTrainingArguments(**settings, kd_loss=run.kd_loss, kd_weight=run.kd_weight),
                teacher_model=teacher,
                teacher_processor=columns.get("teacher_processor"),
                train_dataset=train_set,
                data_collator=collator,
                processing_class=processor,
            )
            if run.kd_decay:
                trainer.add_callback(KDDecay(run.kd_weight))
        else:
            trainer = Seq2SeqTrainer(
                model=model,
                args=Seq2SeqTrainingArguments(**settings),
                train_dataset=train_set,
                data_collator=PlainCollator(collator, model.config),
            )
        trained = trainer.train()
    return {
        "train_utterances": utterances,
        "train_steps": trainer.state.global_step,
        "train_seconds": round(trained.metrics["train_runtime"], 1),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def training_set(run: Run, setup: Setup, processor: Any, **columns: Any) -> tuple[Any, int]:
    """The examples of a training: utterances, or windows of the second round. And the number of utterances."""
    languages = languages_of(run)
    if run.fold < 0:
        prepared = datasets.concatenate_datasets(
            [load_split(setup, language, "train", processor, run.train_size, **columns) for language in languages]
        )
        return prepared, len(prepared)
    rows = datasets.concatenate_datasets(
        [read_split(setup, language, "train", run.train_size, run.fold, run.train_from) for language in languages]
    ).select_columns(["audio", "transcription", "language"])
    seconds = context_seconds(processor.feature_extractor)
    windows = pack_utterances(rows, processor, seed=run.seed, max_seconds=seconds, **WINDOWS, **columns)
    return windows, len(rows)


class KDDecay(TrainerCallback):
    """The weight of the distillation falls linearly to 0 over the training."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.kd_weight = self.weight * (1 - state.global_step / state.max_steps)


def load_teacher(run: Run, setup: Setup) -> tuple[nn.Module | None, Any]:
    """
    The run's teacher and its processor, `None` for runs without one.

    The teacher "finetuned" has the student's audio context, on which it was trained; others have 30 s.

    Raises:
        ValueError: the teacher has no weights here, or weights of another model.
    """
    if run.teacher is None:
        return None, None
    dtype = torch.bfloat16 if setup.precision == "bfloat16" else torch.float32
    if run.teacher == HELD_OUT:
        made = held_out_teacher(run)
        teacher = build_model(made, setup, FULL_CONTEXT)
        load_weights(teacher, setup.store.weights(made))
        return teacher.merge_and_unload().to(DEVICE, dtype), WhisperProcessor.from_pretrained(setup.student)
    seconds = run.audio_seconds if run.teacher == FINETUNED else FULL_CONTEXT
    name = setup.student if run.teacher in (FINETUNED, BASE) else run.teacher
    teacher = WhisperForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    processor = WhisperProcessor.from_pretrained(name)
    if run.teacher == FINETUNED:
        load_weights(teacher, setup.store.weights(teacher_run(run.max_steps, run.fold)))
    if seconds < FULL_CONTEXT:
        set_audio_context(teacher, processor, seconds)
    return teacher.to(DEVICE, dtype), processor


# -------------------------------------------------------------------------------------------------------- measurement


def measure(
    run: Run, setup: Setup, model: nn.Module, processor: Any, splits: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """
    Evaluate a model on splits: "validation", "test", "out_of_domain", "joined".

    Returns:
        `tuple`: Evaluations (see `errors.evaluation_of`) and mean gates by module, both by split, such as "test". For
        the run on all languages, splits are "ro test", "bg test", ...
    """
    if run.audio_seconds == FULL_CONTEXT and setup.precision == "bfloat16":
        model.to(torch.bfloat16)
    evaluations, gates = {}, {}
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor)
    tokens = MAX_NEW_TOKENS if run.fold < 0 else MAX_NEW_TOKENS_OF_LONG
    for language in languages_of(run):
        for split in splits:
            key = f"{language} {split}" if run.language == ALL_LANGUAGES else split
            if split == "joined":
                evaluations[key] = measure_joined(run, setup, model, processor, language)
                continue
            dataset = load_split(setup, language, split, processor, fold=run.fold)
            transcripts = transcribe(model, processor, dataset, language, batch_size=EVAL_BATCH, max_new_tokens=tokens)
            evaluations[key] = count_errors(transcripts, dataset["text"], language)
            if run.method in EXPERTS and (run.fold < 0 or split == "validation"):  # takes as long as transcribing
                means = gate_means(model, dataset, collator, batch_size=EVAL_BATCH)
                gates[key] = {name: round(mean, 4) for name, mean in means.items()}
    return evaluations, gates


def measure_joined(run: Run, setup: Setup, model: nn.Module, processor: Any, language: str) -> dict[str, Any]:
    """The errors on the fold's test recordings, joined to recordings of a minute as `peft-clsr train` does."""
    joined = joined_recordings(run, setup, processor, language)
    transcripts = transcribe_joined(model, processor, joined, language, EVAL_BATCH, f"{language} joined")
    return count_errors([transcript.text for transcript in transcripts], joined.texts, language)


def joined_recordings(run: Run, setup: Setup, processor: Any, language: str) -> JoinedRecordings:
    """The test recordings of a run's fold, joined to recordings of a minute."""
    rows = read_split(setup, language, "test", fold=run.fold)
    reader = RowReader.of(
        rows,
        tokenizer=processor.tokenizer,
        language=language,
        task="transcribe",
        audio_column="audio",
        text_column="transcription",
        language_column="language",
        max_label_length=MAX_LABEL_LENGTH,
    )
    return JoinedRecordings(rows, reader)


def others_untouched(run: Run, setup: Setup, model: nn.Module, processor: Any) -> bool:
    """`is_untouched` in the first language that is not the run's."""
    language = next(other for other in GRID_LANGUAGES if other != run.language)
    return is_untouched(
        setup, model, load_split(setup, language, "test", processor, OTHER_RECORDINGS, run.fold), language
    )


def is_untouched(setup: Setup, model: nn.Module, rows: datasets.Dataset, language: str) -> bool:
    """True if a language's logits and tokens are those of the unchanged student, bit by bit."""
    features = torch.as_tensor(rows.with_format("numpy")["input_features"][:], device=DEVICE, dtype=model.dtype)
    base = WhisperForConditionalGeneration.from_pretrained(setup.student, dtype=model.dtype).to(DEVICE)
    settings = {"max_new_tokens": 32, "return_dict_in_generate": True, "output_logits": True}
    settings |= {"language": language, "task": "transcribe"}
    theirs, ours = (each.eval().generate(features, **settings) for each in (base, model))
    return torch.equal(theirs.sequences, ours.sequences) and all(
        torch.equal(one, other) for one, other in zip(theirs.logits, ours.logits, strict=True)
    )


def count_errors(predictions: Sequence[str], references: Sequence[str], language: str) -> dict[str, Any]:
    """
    Count the errors of each utterance in a language. Texts are normalized as in `peft_clsr.error_rates`.

    Returns:
        `dict`: "wer", "cer" and "utterances", see `errors.evaluation_of`.
    """
    utterances = []
    for prediction, reference in zip(predictions, references, strict=True):
        reference, prediction = normalize_text(reference, language), normalize_text(prediction, language)
        words = jiwer.process_words(reference, prediction)
        characters = jiwer.process_characters(reference, prediction)
        errors = (words.substitutions, words.deletions, words.insertions)
        character_errors = characters.substitutions + characters.deletions + characters.insertions
        utterances.append([*errors, len(reference.split()), character_errors, len(reference)])
    return evaluation_of(utterances)


def measure_untouched(run: Run, setup: Setup) -> str:
    """
    Measure other languages, and translation into English, at 30 s of context, and add that to the run's results.

    Raises:
        ValueError: see `load_run`.
    """
    import sacrebleu

    results, model, processor = load_run(run, setup, FULL_CONTEXT)
    if setup.precision == "bfloat16":
        model.to(torch.bfloat16)
    settings = {"batch_size": EVAL_BATCH, "max_new_tokens": MAX_NEW_TOKENS}
    untouched: dict[str, Any] = {}
    for language in (*UNTOUCHED_LANGUAGES, run.language):
        dataset = load_split(setup, language, "test", processor)
        key = language if language in UNTOUCHED_LANGUAGES else f"{language} at 30 s"
        transcripts = transcribe(model, processor, dataset, language, **settings)
        untouched[key] = count_errors(transcripts, dataset["text"], language)
        if language != "en":
            transcripts = transcribe(model, processor, dataset, language, task="translate", **settings)
            untouched[f"translate-{language}"] = {
                "chrF": sacrebleu.corpus_chrf(transcripts, [dataset["translation"]]).score,
                "bleu": sacrebleu.corpus_bleu(transcripts, [dataset["translation"]], lowercase=True).score,
            }
    setup.store.write(run, results | {"untouched": untouched})
    return f"{run.name}: untouched measured"
