"""From a dataset of recordings and transcripts to features and labels, with every dropped item named and counted."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..languages import language_code
from .audio import EmptyAudioError, audio_name, read_audio

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# The decoder of every Whisper has this many positions.
MAX_LABEL_LENGTH = 448

_KEPT = "kept"
_CUT = "cut"  # kept as well
_OUTCOMES = (_KEPT, "unreadable", "empty", "too_long", _CUT, "labels_too_long", "no_text")


def encode_labels(tokenizer: Any, text: str, language: str, task: str = "transcribe") -> list[int]:
    """
    The labels of a transcript: `<|language|><|task|><|notimestamps|> text<|endoftext|>`.

    The text gets one leading space, as OpenAI's tokenizer encodes transcripts (" word" and "word" are different
    tokens). `<|startoftranscript|>` is left out: the model puts it in front when it shifts the labels right.

    Args:
        tokenizer (`WhisperTokenizer`): A multilingual Whisper tokenizer.
        text (`str`): The transcript.
        language (`str`): Name or code, "catalan" or "ca".
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".

    Returns:
        `list[int]`: token ids.

    Raises:
        ValueError: unknown language or task, or one that the tokenizer has no token for.
    """
    if task not in ("transcribe", "translate"):
        raise ValueError(f"task {task!r} is unknown: expected 'transcribe' or 'translate'")
    prompt = [f"<|{language_code(language)}|>", f"<|{task}|>", "<|notimestamps|>"]
    prompt_ids = tokenizer.convert_tokens_to_ids(prompt)
    for token, token_id in zip(prompt, prompt_ids, strict=True):
        # An unknown token silently becomes <|endoftext|>, Whisper's unknown token.
        if token_id is None or token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no token {token}: use a multilingual Whisper that knows it")
    text_ids = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids
    return [*prompt_ids, *text_ids, tokenizer.eos_token_id]


def prepare_dataset(
    dataset: datasets.Dataset,
    processor: Any,
    language: str,
    *,
    audio_column: str = "audio",
    text_column: str = "transcription",
    task: str = "transcribe",
    long_audio: Literal["drop", "cut"] = "drop",
    max_label_length: int = MAX_LABEL_LENGTH,
    num_proc: int | None = None,
    desc: str = "features",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """
    Compute log-mel features and labels of a dataset, with a progress bar.

    Items that cannot be used are dropped: each is named in a warning and counted. The context is the processor's
    (`set_audio_context` cuts it).

    Args:
        dataset (`datasets.Dataset`): Recordings and transcripts of one language.
        processor (`WhisperProcessor`): Its feature extractor and tokenizer are used.
        language (`str`): Name or code of the language, "catalan" or "ca".
        audio_column (`str`, *optional*, defaults to `"audio"`):
            Column of audio: an `Audio` feature, paths, or dicts as in `read_audio`.
        text_column (`str`, *optional*, defaults to `"transcription"`): Column of transcripts.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate".
        long_audio (`str`, *optional*, defaults to `"drop"`):
            "drop" or "cut" audio longer than the context. A cut item keeps its whole transcript.
        max_label_length (`int`, *optional*, defaults to 448): Longest labels, in tokens; longer ones are dropped.
        num_proc (`int`, *optional*): Processes to use.
        desc (`str`, *optional*, defaults to `"features"`): Name of the progress bar.

    Returns:
        `(datasets.Dataset, dict[str, int])`: The dataset, in torch format, has the columns `input_features`
        float32 [mels, frames], `attention_mask` int [frames] (1 where there is audio, 0 in the padding), `labels`
        [tokens] (see `encode_labels`), `text`, `language` (the code) and `index` (the row in `dataset`). The counts
        are "kept" (cut ones included), "unreadable", "empty", "too_long", "cut", "labels_too_long" and "no_text".

    Raises:
        ValueError: a column is missing, an argument is unknown, or no item is left.
    """
    import datasets

    if long_audio not in ("drop", "cut"):
        raise ValueError(f"long_audio {long_audio!r} is unknown: expected 'drop' or 'cut'")
    for argument, column in (("audio_column", audio_column), ("text_column", text_column)):
        if column not in dataset.column_names:
            raise ValueError(
                f"the dataset has no column {column!r}; it has {', '.join(map(repr, dataset.column_names))}. "
                f"Set {argument} (--{argument}) to one of them"
            )
    kind = getattr(dataset.features[text_column], "dtype", None)
    if kind not in ("string", "large_string"):
        raise ValueError(
            f"column {text_column!r} holds {kind or dataset.features[text_column]}; expected text (string)"
        )
    language = language_code(language)
    encode_labels(processor.tokenizer, "", language, task)  # a bad language or task fails here, not in a worker

    extractor = processor.feature_extractor
    audio_feature = dataset.features[audio_column]
    if isinstance(audio_feature, datasets.Audio) or getattr(audio_feature, "dtype", None) == "string":
        # Not decoded by datasets: that needs FFmpeg's libraries, and one bad file would end the whole map.
        dataset = dataset.cast_column(audio_column, datasets.Audio(decode=False))
    features = datasets.Features(
        {
            "input_features": datasets.Array2D((extractor.feature_size, extractor.nb_max_frames), "float32"),
            "attention_mask": datasets.List(datasets.Value("int8"), length=extractor.nb_max_frames),
            "labels": datasets.List(datasets.Value("int64")),
            "text": datasets.Value("string"),
            "language": datasets.Value("string"),
            "index": datasets.Value("int64"),
            "outcome": datasets.Value("string"),
            "problem": datasets.Value("string"),
        }
    )
    prepared = dataset.with_format(None).map(
        partial(
            _prepare_example,
            processor=processor,
            language=language,
            task=task,
            audio_column=audio_column,
            text_column=text_column,
            long_audio=long_audio,
            max_label_length=max_label_length,
        ),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=features,
        num_proc=num_proc,
        writer_batch_size=32,  # an item of 30 s is 1 MB; the default of 1,000 would hold 1 GB
        desc=desc,
    )

    counts = dict.fromkeys(_OUTCOMES, 0)
    kept = []
    outcomes = prepared.select_columns(["outcome", "problem"])
    for index, (outcome, problem) in enumerate(zip(outcomes["outcome"], outcomes["problem"], strict=True)):
        counts[outcome] += 1
        if outcome in (_KEPT, _CUT):
            kept.append(index)
        if problem:
            logger.warning("%s: %s", "cut" if outcome == _CUT else "dropped", problem)
    counts[_KEPT] += counts[_CUT]
    if not kept:
        dropped = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
        raise ValueError(
            f"no item of the {len(prepared)} in the dataset can be used ({dropped or 'the dataset is empty'}); "
            "the warnings above name them"
        )
    prepared = prepared.remove_columns(["outcome", "problem"])
    if len(kept) < len(prepared):
        prepared = prepared.select(kept)
    return prepared.with_format("torch"), counts


def _prepare_example(
    example: dict[str, Any],
    index: int,
    *,
    processor: Any,
    language: str,
    task: str,
    audio_column: str,
    text_column: str,
    long_audio: str,
    max_label_length: int,
) -> dict[str, Any]:
    """One row of `prepare_dataset`, with its outcome; rows to drop get zeros, as Arrow wants the fixed shape."""
    extractor = processor.feature_extractor
    name = f"item {index}, {audio_name(example[audio_column])}"
    row = {
        "input_features": np.zeros((extractor.feature_size, extractor.nb_max_frames), dtype=np.float32),
        "attention_mask": np.zeros(extractor.nb_max_frames, dtype=np.int8),
        "labels": [],
        "text": example[text_column],
        "language": language,
        "index": index,
        "outcome": _KEPT,
        "problem": "",
    }
    if not (example[text_column] or "").strip():
        return {**row, "outcome": "no_text", "problem": f"{name}: no text in column {text_column!r}"}
    labels = encode_labels(processor.tokenizer, example[text_column], language, task)
    if len(labels) > max_label_length:
        problem = f"{name}: labels of {len(labels)} tokens, longer than {max_label_length}"
        return {**row, "outcome": "labels_too_long", "problem": problem}
    try:
        samples = read_audio(example[audio_column], extractor.sampling_rate)
    except EmptyAudioError as error:
        return {**row, "outcome": "empty", "problem": f"item {index}: {error}"}
    except ValueError as error:
        return {**row, "outcome": "unreadable", "problem": f"item {index}: {error}"}
    if len(samples) > extractor.n_samples:
        seconds, context = len(samples) / extractor.sampling_rate, extractor.n_samples / extractor.sampling_rate
        row["problem"] = f"{name}: {seconds:.1f} s of audio, longer than the context of {context:g} s"
        if long_audio == "drop":
            return {**row, "outcome": "too_long"}
        row["outcome"] = _CUT
        samples = samples[: extractor.n_samples]
    inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="np")
    row["input_features"] = inputs["input_features"][0]
    row["attention_mask"] = inputs["attention_mask"][0].astype(np.int8)
    row["labels"] = labels
    return row
