"""Transcribes recordings of any length and language, in batches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from tqdm import tqdm
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor, WhisperTokenizer

from ..data.pauses import cut_at_pauses
from ..languages.adapters import adapter_languages, inference_adapter
from ..multilingual import check_model_languages
from ..whisper import FRAMES_PER_POSITION, POSITIONS_PER_SECOND
from .gaps import warn_of_gaps
from .generation import clsr_adapters, language_and_prompt, warn_of_unused_adapter
from .recordings import header_seconds, read_recordings
from .sampling import seeded_sampling
from .subtitles import Transcript
from .windows import each_window

logger = logging.getLogger(__name__)


def transcribe_files(
    model: WhisperForConditionalGeneration | PeftModel,
    processor: WhisperProcessor,
    paths: Sequence[str | Path],
    languages: Sequence[str | None] | None = None,
    *,
    candidates: Sequence[str] = (),
    route_by_prompt_language: bool = False,
    task: str = "transcribe",
    batch_size: int = 8,
    num_beams: int = 1,
    vad: bool = False,
    show_progress: bool = True,
    warn: Callable[[str], None] = logger.warning,
    on_window: Callable[[Path, Transcript], None] | None = None,
) -> Iterator[tuple[Path, Transcript]]:
    """
    Transcribe recordings of any length, the longest first.

    Each recording takes the expert of its language, or the base model if there is none. Whisper's own rules divide
    long recordings into windows. A window whose text repeats itself is decoded again with sampling. The same recording
    always gives the same text.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model, in evaluation mode.
        processor (`WhisperProcessor`): Its processor.
        paths (`Sequence[str | Path]`): Recordings.
        languages (`Sequence[str]`, *optional*): The tag of each. `None`, also for a single one, detects it.
        candidates (`Sequence[str]`, *optional*): Languages to detect among. By default all of Whisper's.
        route_by_prompt_language (`bool`, *optional*, defaults to `False`):
            A detected language without an expert takes the only one with this `prompt_language`, if there is one.
        task (`str`, *optional*, defaults to `"transcribe"`): "transcribe" or "translate" (to English).
        batch_size (`int`, *optional*, defaults to 8): Recordings at a time.
        num_beams (`int`, *optional*, defaults to 1): Beams of the search.
        vad (`bool`, *optional*, defaults to `False`):
            Hear only the parts with speech that [`cut_at_pauses`] finds, so that no text is invented in silence. Each
            part is at most as long as the context. Needs the extra `vad`.
        show_progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
        warn (`Callable`, *optional*): Gets a message for each recording that is unreadable or truncated, or that has
            sound without text (without `vad`). By default it is logged.
        on_window (`Callable`, *optional*): Gets a recording and its transcript so far, after each window. The end of
            the last segment may still change.

    Yields:
        `tuple[Path, Transcript]`: each readable recording and its transcript.

    Raises:
        ValueError: the model cannot be told a language, or `candidates` sound alike: they have one `prompt_language`.
        ModuleNotFoundError: silero-vad is not installed, with `vad`.

    Example:

    ```py
    >>> for path, transcript in transcribe_files(model, processor, ["a.ogg", "b.wav"], ["ca", None]):
    ...     print(path, transcript.language, transcript.text)
    ```
    """
    check_model_languages(model)
    rate = processor.feature_extractor.sampling_rate
    recordings = [
        (Path(path), language, header_seconds(path))
        for path, language in zip(paths, languages or [None] * len(paths), strict=True)
    ]
    # With the longest first, batches are even, and a lack of memory shows at once.
    recordings.sort(key=lambda recording: recording[2], reverse=True)
    total = round(sum(seconds for _, _, seconds in recordings))
    with tqdm(total=total, desc="audio", unit="s", disable=not show_progress) as progress:
        for start in range(0, len(recordings), batch_size):
            batch = [(path, language) for path, language, _ in recordings[start : start + batch_size]]
            readable = list(read_recordings(batch, rate, warn))
            if not readable:
                continue
            transcribe_batch = partial(transcribe_speech, batch_size=batch_size) if vad else transcribe_waveforms
            transcripts = transcribe_batch(
                model,
                processor,
                [waveform for _, _, waveform in readable],
                [language for _, language, _ in readable],
                candidates=candidates,
                route_by_prompt_language=route_by_prompt_language,
                task=task,
                num_beams=num_beams,
                progress=progress,
                on_window=None if on_window is None else _by_path([path for path, _, _ in readable], on_window),
            )
            for (path, _, waveform), transcript in zip(readable, transcripts, strict=True):
                if not vad:
                    warn_of_gaps(path, transcript, waveform, rate, warn)
                yield path, transcript


def _by_path(
    paths: Sequence[Path], on_window: Callable[[Path, Transcript], None]
) -> Callable[[int, Transcript], None]:
    return lambda index, transcript: on_window(paths[index], transcript)


@torch.inference_mode()
def transcribe_waveforms(
    model: WhisperForConditionalGeneration | PeftModel,
    processor: WhisperProcessor,
    waveforms: Sequence[np.ndarray],
    languages: Sequence[str | None],
    *,
    candidates: Sequence[str] = (),
    route_by_prompt_language: bool = False,
    task: str = "transcribe",
    num_beams: int = 1,
    prompt: str = "",
    temperature: float = 0.0,
    progress: tqdm | None = None,
    on_window: Callable[[int, Transcript], None] | None = None,
) -> list[Transcript]:
    """
    Transcribe one batch of waveforms. See [`transcribe_files`].

    Args:
        waveforms (`Sequence[np.ndarray]`): float32 [samples] at the processor's rate, of any lengths.
        prompt (`str`, *optional*):
            Text that stands before each window, as if it had been said: names and spellings to expect. Its last
            tokens count, up to half of the decoder's positions.
        temperature (`float`, *optional*, defaults to 0.0):
            Where sampling starts, from 0 (greedy) to 1. A window whose text repeats itself is decoded again, 0.2
            higher each time, up to 1.
        progress (`tqdm`, *optional*): Is updated with the seconds of finished audio.
        on_window (`Callable`, *optional*): Gets the position of a waveform and its transcript so far, after each
            window.
    """
    check_model_languages(model)
    extractor = processor.feature_extractor
    features, mask = make_features(waveforms, extractor, audio_context(model))
    features, mask = features.to(model.device, model.dtype), mask.to(model.device)
    seconds = [len(waveform) / extractor.sampling_rate for waveform in waveforms]
    if None in languages:
        detected = detect_languages(model, features, candidates, route_by_prompt_language)
        languages = [given or tag for given, tag in zip(languages, detected, strict=True)]
    progress = tqdm(disable=True) if progress is None else progress
    before = progress.n

    def update_progress(frames: torch.Tensor) -> None:  # [recordings, 2]: finished frames of each, and all frames
        finished = frames[:, 0] * extractor.hop_length / extractor.sampling_rate
        progress.update(before + int(finished.minimum(torch.tensor(seconds)).sum()) - progress.n)

    adapters = clsr_adapters(model)

    def transcript(index: int, segments: Sequence[dict[str, Any]]) -> Transcript:  # segments with text
        adapter = inference_adapter(adapters, languages[index], active=None)
        return Transcript(languages[index], adapter, seconds[index], order_segments(segments, seconds[index]))

    heard: list[list[dict[str, Any]]] = [[] for _ in waveforms]

    def add_window(index: int, segments: Sequence[dict[str, Any]]) -> None:
        heard[index] += decode_segments(segments, processor.tokenizer)
        if on_window is not None:
            on_window(index, transcript(index, heard[index]))

    codes = languages
    if not adapters:  # Whisper's own `generate` knows no dialects
        tokens = model.generation_config.lang_to_id
        codes = [language_and_prompt(language, tokens, adapters, None)[1] for language in languages]
    prompt_ids = _prompt_ids(model, processor.tokenizer, prompt) if prompt.strip() else None
    # The same recording gives the same text, also when it is sampled.
    with seeded_sampling(), nullcontext() if on_window is None else each_window(add_window):
        outputs = model.generate(
            input_features=features,
            attention_mask=mask,
            language=codes,
            task=task,
            return_timestamps=True,
            return_segments=True,
            num_beams=num_beams,
            prompt_ids=prompt_ids,
            # A window whose text repeats itself is decoded again, sampling at ever higher temperatures.
            temperature=tuple(np.arange(temperature, 1.0 + 1e-6, 0.2).round(6).tolist()),
            compression_ratio_threshold=1.35,
            monitor_progress=update_progress,
        )
    progress.update(before + round(sum(seconds)) - progress.n)
    return [
        transcript(index, decode_segments(segments, processor.tokenizer))
        for index, segments in enumerate(outputs["segments"])
    ]


def _prompt_ids(model: torch.nn.Module, tokenizer: WhisperTokenizer, prompt: str) -> torch.Tensor:
    """The tokens of a prompt, [tokens], of which Whisper takes the last. Raises a `ValueError` for special tokens."""
    tokens = tokenizer.get_prompt_ids(prompt, return_tensors="pt")
    kept = model.config.max_target_positions // 2 - 1
    return torch.cat([tokens[:1], tokens[1:][-kept:]]).to(model.device)


def transcribe_speech(
    model: WhisperForConditionalGeneration | PeftModel,
    processor: WhisperProcessor,
    waveforms: Sequence[np.ndarray],
    languages: Sequence[str | None],
    *,
    candidates: Sequence[str] = (),
    route_by_prompt_language: bool = False,
    batch_size: int = 8,
    progress: tqdm | None = None,
    on_window: Callable[[int, Transcript], None] | None = None,
    **settings: Any,
) -> list[Transcript]:
    """
    Transcribe the parts with speech of some waveforms, see [`cut_at_pauses`]. The rest is as [`transcribe_waveforms`].

    The language is detected in the first part with speech, or at the start if there is no speech.

    Args:
        batch_size (`int`, *optional*, defaults to 8): Parts at a time.
    """
    check_model_languages(model)
    rate = processor.feature_extractor.sampling_rate
    cuts = [cut_at_pauses(waveform, rate, audio_context(model)) for waveform in waveforms]
    parts = [
        (index, start, waveform[round(start * rate) : round(end * rate)])
        for index, (waveform, cut) in enumerate(zip(waveforms, cuts, strict=True))
        for start, end in cut
    ]
    if None in languages:
        first_parts = {index: part for index, _, part in reversed(parts)}
        samples = round(audio_context(model) * rate)
        heard = [first_parts.get(index, waveform[:samples]) for index, waveform in enumerate(waveforms)]
        languages = with_detected_languages(model, processor, heard, languages, candidates, route_by_prompt_language)
    adapters = clsr_adapters(model)
    transcripts = [
        Transcript(language, inference_adapter(adapters, language, active=None), len(waveform) / rate, [])
        for waveform, language in zip(waveforms, languages, strict=True)
    ]
    progress = tqdm(disable=True) if progress is None else progress
    total = progress.n + round(sum(transcript.seconds for transcript in transcripts))
    for first in range(0, len(parts), batch_size):
        batch = parts[first : first + batch_size]
        results = transcribe_waveforms(
            model, processor, [part for _, _, part in batch], [languages[index] for index, _, _ in batch], **settings
        )
        for (index, start, part), result in zip(batch, results, strict=True):
            for segment in result.segments:
                times = {name: start + segment[name] for name in ("start", "end")}
                transcripts[index].segments.append(segment | times)
            if on_window is not None:
                on_window(index, transcripts[index])
            progress.update(min(round(len(part) / rate), total - progress.n))
    progress.update(total - progress.n)
    return transcripts


def audio_context(model: torch.nn.Module) -> float:
    """Seconds that a model hears at once."""
    return model.config.max_source_positions / POSITIONS_PER_SECOND


def with_detected_languages(
    model: torch.nn.Module,
    processor: WhisperProcessor,
    waveforms: Sequence[np.ndarray],
    languages: Sequence[str | None],
    candidates: Sequence[str] = (),
    route_by_prompt_language: bool = False,
) -> list[str]:
    """
    Detect the languages that are not given, `None`.

    Args:
        waveforms (`Sequence[np.ndarray]`): float32 [samples] at the processor's rate. Their start is heard.
        languages (`Sequence[str]`): The tag of each, or `None`.

    The rest is as in [`detect_languages`].
    """
    features, _ = make_features(waveforms, processor.feature_extractor, audio_context(model))
    features = features.to(model.device, model.dtype)
    with torch.inference_mode():
        detected = detect_languages(model, features, candidates, route_by_prompt_language)
    return [given or code for given, code in zip(languages, detected, strict=True)]


def make_features(
    waveforms: Sequence[np.ndarray], extractor: WhisperFeatureExtractor, context: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compute the features of recordings of any lengths, each padded with silence at least to the context.

    Args:
        waveforms (`Sequence[np.ndarray]`): float32 [samples].
        extractor (`WhisperFeatureExtractor`): The processor's.
        context (`float`): The model's, in seconds.

    Returns:
        `tuple`: features, float32 [recordings, mels, frames], and their mask, int64 [recordings, frames].
    """
    samples = round(context * extractor.sampling_rate)
    # One by one, as the intermediate arrays for an hour of audio take a gigabyte.
    each = [
        extractor(
            waveform, sampling_rate=extractor.sampling_rate, max_length=samples, truncation=False, return_tensors="pt"
        ).input_features[0]
        for waveform in waveforms
    ]
    lengths = torch.tensor([one.shape[-1] for one in each])
    longest = int(lengths.max())
    features = torch.stack([F.pad(one, (0, longest - one.shape[-1])) for one in each])
    return features, (torch.arange(longest) < lengths[:, None]).long()


def prompts_of_candidates(model: torch.nn.Module, candidates: Sequence[str]) -> dict[str, str]:
    """
    Find the tag of each candidate of [`detect_languages`], by Whisper's code of the language in its prompt.

    Raises:
        ValueError: two candidates have the same code.
    """
    heard_as: dict[str, str] = {}
    for language in candidates:
        tag, code = language_and_prompt(language, model.generation_config.lang_to_id, clsr_adapters(model), None)
        if heard_as.setdefault(code, tag) != tag:
            raise ValueError(
                f"{heard_as[code]!r} and {tag!r} are both heard as {code!r}, so detection cannot tell them apart: "
                "give the language of each recording in a table"
            )
    return heard_as


def detect_languages(
    model: torch.nn.Module,
    features: torch.Tensor,
    candidates: Sequence[str] = (),
    route_by_prompt_language: bool = False,
) -> list[str]:
    """
    Detect the language at the start of each recording with the base model, which hears Whisper's languages only.

    Args:
        model (`WhisperForConditionalGeneration` or `PeftModel`): The model.
        features (`torch.Tensor`): float32 [recordings, mels, frames].
        candidates (`Sequence[str]`, *optional*): Languages to detect among: each is heard as its `prompt_language`. By
            default all of Whisper's.
        route_by_prompt_language (`bool`, *optional*, defaults to `False`): As in [`transcribe_files`].

    Returns:
        `list[str]`: tags.

    Raises:
        ValueError: `candidates` have the same `prompt_language`.
    """
    config = copy.copy(model.generation_config)
    adapters = clsr_adapters(model)
    heard_as = prompts_of_candidates(model, candidates)
    if heard_as:
        config.lang_to_id = {token: config.lang_to_id[token] for token in (f"<|{code}|>" for code in heard_as)}
    frames = model.config.max_source_positions * FRAMES_PER_POSITION
    ids = model.detect_language(features, generation_config=config, num_segment_frames=frames)
    codes = {token_id: token[2:-2] for token, token_id in config.lang_to_id.items()}
    languages = [heard_as.get(codes[token_id], codes[token_id]) for token_id in ids.tolist()]
    warn_of_unused_adapter(model, languages, route_by_prompt_language)
    if not route_by_prompt_language:
        return languages
    names = [inference_adapter(adapters, language, None, by_prompt_language=True) for language in languages]
    tags = adapter_languages(adapters)
    return [tag if name is None else tags[name] or tag for name, tag in zip(names, languages, strict=True)]


def decode_segments(segments: Sequence[dict[str, Any]], tokenizer: WhisperTokenizer) -> list[dict[str, Any]]:
    """The start and end, in seconds, and the text of segments from Whisper's `generate`."""
    return [
        {
            "start": float(segment["start"]),
            "end": float(segment["end"]),
            "text": tokenizer.decode(segment["tokens"], skip_special_tokens=True),
        }
        for segment in segments
    ]


def order_segments(segments: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """
    Put segments in order, without overlap, and within the recording.

    Args:
        segments (`Sequence[dict]`): All segments of one recording so far, with "start", "end" and "text".
        seconds (`float`): Length of the recording.
    """
    result: list[dict[str, Any]] = []
    limit = seconds
    # From the last to the first: Whisper rounds ends up, past the end of the recording and the start of its next
    # window.
    for segment in reversed(segments):
        text = segment["text"]
        start, end = (min(segment[name], limit) for name in ("start", "end"))
        if not text.strip():
            continue
        if start < end:
            result.append({"start": start, "end": end, "text": text})
            limit = start
        elif result:  # it has no time of its own
            result[-1]["text"] = text + result[-1]["text"]
        # otherwise Whisper invented it in the silence after the end
    return result[::-1]
