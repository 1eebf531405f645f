"""
Transcribes with the graphs of an exported expert, without PyTorch.

faster-whisper reads, divides and scores; ONNX Runtime takes the place of its CTranslate2 model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..extras import require
from ..files import read_json
from .exported import DECODER, ENCODER, ExportedExpert
from .subtitles import Transcript
from .token_rules import TokenRules

_RATE = 16_000  # Hz


class OnnxWhisper:
    """
    A Whisper with one language's expert, in ONNX Runtime.

    Args:
        expert (`ExportedExpert`): The folder.
        precision (`str`, *optional*, defaults to `"float32"`): "float32", "float16" or "int8".
        threads (`int`, *optional*): Of a graph; by default one for each core.
    """

    def __init__(self, expert: ExportedExpert, precision: str = "float32", threads: int | None = None) -> None:
        self.expert = expert
        self._config = read_json(expert.folder / "generation_config.json")
        graphs = [expert.graph(name, precision) for name in (ENCODER, DECODER)]
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        sessions = [runtime.InferenceSession(str(path), options) for path in graphs]
        self._whisper = _faster_whisper_class()(str(expert.folder), _Graphs(*sessions))

    def transcribe(
        self,
        waveform: np.ndarray,
        *,
        task: str = "transcribe",
        vad: bool = False,
        on_segment: Callable[[Transcript], None] | None = None,
        **settings: Any,
    ) -> Transcript:
        """
        Transcribe a recording of any length.

        Args:
            waveform (`np.ndarray`): float32 [samples] of 16 kHz.
            task (`str`, *optional*, defaults to `"transcribe"`): Or "translate", into English.
            vad (`bool`, *optional*, defaults to `False`): Hear only speech, by faster-whisper's copy of silero-vad.
            on_segment (`Callable`, *optional*): Gets the transcript so far, after each segment.
            **settings: Others of faster-whisper's `WhisperModel.transcribe`.

        Raises:
            ValueError: a setting asks for beams or for a penalty of repetitions, which this decoding does not have.
        """
        settings = {
            "beam_size": 1,
            "condition_on_previous_text": False,
            "suppress_tokens": self._config.get("suppress_tokens") or [],
            "suppress_blank": bool(self._config.get("begin_suppress_tokens")),
        } | settings
        segments, _ = self._whisper.transcribe(
            waveform, language=self.expert.prompt_language, task=task, vad_filter=vad, **settings
        )
        transcript = Transcript(self.expert.language, self.expert.language, len(waveform) / _RATE, [])
        for segment in segments:
            transcript.segments.append({"start": segment.start, "end": segment.end, "text": segment.text})
            if on_segment is not None:
                on_segment(transcript)
        return transcript


@dataclass(frozen=True)
class _Result:
    """The transcript of a window, with the fields of CTranslate2's `WhisperGenerationResult`."""

    sequences_ids: list[list[int]]
    scores: list[float]
    no_speech_prob: float


class _Graphs:
    """The interface that faster-whisper uses of a CTranslate2 model, for greedy decoding and sampling."""

    is_multilingual, device = True, "cpu"

    def __init__(self, encoder: Any, decoder: Any) -> None:
        self._encoder, self._decoder = encoder, decoder
        self.frames = encoder.get_inputs()[0].shape[-1]
        types = {"tensor(float16)": np.float16, "tensor(float)": np.float32}
        self._empty = {
            value.name: np.zeros((0, value.shape[1], 0, value.shape[3]), dtype=types[value.type])
            for value in decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        outputs = [value.name for value in decoder.get_outputs()][1:]
        self._cache_names = [name.replace("present.", "past_key_values.") for name in outputs]

    def set_tokenizer(self, tokenizer: Any) -> None:
        """Take the numbers of special tokens from a `tokenizers.Tokenizer`."""
        number = tokenizer.token_to_id
        self._end, self._start = number("<|endoftext|>"), number("<|startoftranscript|>")
        self._no_timestamps = number("<|notimestamps|>")
        names = ("<|nospeech|>", "<|nocaptions|>")
        self._no_speech = next((number(name) for name in names if number(name) is not None), None)
        self._blank = [*tokenizer.encode(" ", add_special_tokens=False).ids, self._end]

    def encode(self, features: np.ndarray) -> np.ndarray:
        """Features float32 [batch, mel bins, frames] to states [batch, positions, width]."""
        return self._encoder.run(None, {"input_features": features})[0]

    def generate(
        self,
        states: np.ndarray,
        prompts: Sequence[Sequence[int]],
        *,
        max_length: int,
        length_penalty: float = 1,
        suppress_blank: bool = True,
        suppress_tokens: Sequence[int] | None = None,
        max_initial_timestamp_index: int = 50,
        num_hypotheses: int = 1,
        sampling_temperature: float = 0,
        beam_size: int = 1,
        repetition_penalty: float = 1,
        no_repeat_ngram_size: int = 0,
        **unused: Any,  # what greedy decoding and sampling from all tokens have no use for
    ) -> list[_Result]:
        """
        Decode one window. See `ctranslate2.models.Whisper.generate`.

        Args:
            states (`np.ndarray`): float [1, positions, width].
            prompts (`Sequence[Sequence[int]]`): One prompt.
            max_length (`int`): Tokens of prompt and prediction.
        """
        for name, value, only in (
            ("beam_size", beam_size, 1),
            ("repetition_penalty", repetition_penalty, 1),
            ("no_repeat_ngram_size", no_repeat_ngram_size, 0),
        ):
            if value != only:
                raise ValueError(f"{name} is {value}, expected {only}: exported graphs are decoded greedily")
        prompt, count = list(prompts[0]), num_hypotheses
        rules = TokenRules(
            self._end,
            self._no_timestamps,
            suppress_tokens or (),
            self._blank if suppress_blank else (),
            self._no_timestamps not in prompt,
            max_initial_timestamp_index,
        )
        generator = np.random.default_rng(0)  # the same recording gives the same text
        rows: list[list[int]] = [[] for _ in range(count)]
        totals, finished = np.zeros(count), [False] * count
        states = np.repeat(states, count, axis=0)
        logits, past = self._step(np.repeat([prompt], count, axis=0), states, self._empty)
        silence = _log_softmax(logits[0, prompt.index(self._start)].astype(np.float32))
        no_speech = 0.0 if self._no_speech is None else float(np.exp(silence[self._no_speech]))
        while True:
            for row, tokens in enumerate(rows):
                if finished[row]:
                    continue
                scores = logits[row, -1].astype(np.float32)
                rules.apply(scores, tokens)
                chances = _log_softmax(scores)
                if sampling_temperature:
                    shares = np.exp(_log_softmax(scores / sampling_temperature)).astype(np.float64)
                    token = int(generator.choice(len(shares), p=shares / shares.sum()))
                else:
                    token = int(scores.argmax())
                totals[row] += chances[token]
                finished[row] = token == self._end
                if not finished[row]:
                    tokens.append(token)
            if all(finished) or len(prompt) + max(map(len, rows)) >= max_length:
                break
            last = [[self._end if done else tokens[-1]] for done, tokens in zip(finished, rows, strict=True)]
            logits, past = self._step(np.array(last), states, past)
        means = [total / max(len(tokens), 1) ** length_penalty for total, tokens in zip(totals, rows, strict=True)]
        order = sorted(range(count), key=lambda row: -means[row])
        return [_Result([rows[row] for row in order], [float(means[row]) for row in order], no_speech)]

    def _step(
        self, tokens: np.ndarray, states: np.ndarray, past: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits [rows, tokens, vocabulary] and the cache after them. The cache of the encoder's states stays."""
        first = past is self._empty
        inputs = {"input_ids": tokens.astype(np.int64), "encoder_hidden_states": states}
        logits, *present = self._decoder.run(None, {**inputs, "use_cache_branch": np.array([not first]), **past})
        found = dict(zip(self._cache_names, present, strict=True))
        return logits, {name: value if first or ".decoder." in name else past[name] for name, value in found.items()}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


@cache
def _faster_whisper_class() -> type:
    base: Any = require("faster_whisper").WhisperModel

    class OnnxModel(base):
        """faster-whisper, with another model than CTranslate2's."""

        def __init__(self, folder: str, graphs: _Graphs) -> None:
            tokenizers, features = require("tokenizers"), require("faster_whisper.feature_extractor")
            self.logger = require("faster_whisper.utils").get_logger()
            self.model = graphs
            self.hf_tokenizer = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
            graphs.set_tokenizer(self.hf_tokenizer)
            self.feat_kwargs = self._get_feature_kwargs(folder)
            self.feature_extractor = features.FeatureExtractor(**self.feat_kwargs)
            self.input_stride = 2
            self.num_samples_per_token = self.feature_extractor.hop_length * self.input_stride
            self.frames_per_second = self.feature_extractor.sampling_rate // self.feature_extractor.hop_length
            self.tokens_per_second = self.feature_extractor.sampling_rate // self.num_samples_per_token
            self.time_precision = 0.02  # seconds
            self.max_length = read_json(f"{folder}/config.json")["max_target_positions"]

        def encode(self, features: np.ndarray) -> np.ndarray:
            """Pad with silence, as in training. faster-whisper pads with zeros, which are not silence."""
            features = np.array(features[..., : self.model.frames], ndmin=3, dtype=np.float32)
            used = np.flatnonzero(features.any(axis=(0, 1)))
            features[..., (used[-1] + 1 if len(used) else 0) :] = features.min()
            return self.model.encode(features)

    return OnnxModel
