"""Facts about Whisper's encoder, and its context: the length of audio that one forward pass takes."""

from __future__ import annotations

import numbers
from typing import Any, Literal

import torch
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

# The encoder's second convolution has stride 2, and a mel frame is 10 ms: one position is 2 frames, 20 ms.
FRAMES_PER_POSITION = 2
POSITIONS_PER_SECOND = 50


def module_side(name: str) -> Literal["encoder", "decoder"] | None:
    """The side of a module by its name: "decoder" for "model.decoder.layers.0.fc1", `None` if the name has neither."""
    return next((part for part in name.split(".") if part in ("encoder", "decoder")), None)


def position_mask(frame_mask: torch.Tensor) -> torch.Tensor:
    """
    Mask of encoder positions from a mask of mel frames.

    Args:
        frame_mask (`torch.Tensor`): [batch, frames], 1 for audio and 0 for padding.

    Returns:
        `torch.Tensor`: [batch, positions], of the same dtype.
    """
    return frame_mask[:, ::FRAMES_PER_POSITION]


def context_seconds(feature_extractor: Any) -> float:
    """The length of audio, in seconds, to which a `WhisperFeatureExtractor` pads or cuts."""
    return feature_extractor.n_samples / feature_extractor.sampling_rate


def set_audio_context(model: nn.Module | None, processor: Any | None, seconds: float) -> None:
    """
    Shorten the context of a Whisper in place: the length of audio that one forward pass takes.

    Whisper's encoder has no padding mask. It pads every input with silence to 30 s, pays for 30 s, and refuses other
    lengths. For short utterances, a context that just holds them makes training several times cheaper. Convolutions
    and attention take any length. Only the table of (fixed, sinusoidal) positions and the length checks depend on
    30 s, so no new weights are needed. But the model was trained on full contexts, and may ramble past the end of
    speech until it is fine-tuned at the shorter one. Model and processor must agree, so pass both.
    `CLSRConfig(max_audio_seconds=...)` does the same for the model, and saves the number with the adapter.

    Args:
        model (`nn.Module` or `None`): A Whisper model of transformers, or a `PeftModel` around one.
        processor (`WhisperProcessor` or `None`): The processor whose feature extractor pads to the context.
        seconds (`float`):
            The new context in seconds, in (0, current context]: a multiple of 0.02 (one encoder position), and an
            integer if a processor is given. A context cannot grow: load the model again.

    Raises:
        ValueError:
            `seconds` is no number, or out of range; there is neither a model nor a processor; the model is no Whisper,
            its positions are not in memory, or it has an adapter of another `max_audio_seconds`. Nothing has changed
            then.
    """
    if model is None and processor is None:
        raise ValueError("set_audio_context got neither a model nor a processor: give at least one of them")
    if not isinstance(seconds, numbers.Real) or isinstance(seconds, bool):
        hint = (
            "; None in max_audio_seconds means the model's own context: leave the call out" if seconds is None else ""
        )
        raise ValueError(f"the audio context is {seconds!r}, expected a number of seconds, such as 10{hint}")
    if model is not None:
        check_audio_context(model, seconds, getattr(model, "peft_config", {}))
    if processor is not None:
        extractor = processor.feature_extractor
        _check_seconds(seconds, context_seconds(extractor), "processor")
        if not float(seconds).is_integer():
            # A loaded extractor computes n_samples = chunk_length * rate, and cannot pad to a float.
            raise ValueError(
                f"a processor's audio context must be whole seconds, or it could not be loaded; got {seconds} s"
            )

    if model is not None:
        cut_positions(model, seconds)
    if processor is not None:
        extractor.chunk_length = int(seconds)
        extractor.n_samples = extractor.chunk_length * extractor.sampling_rate
        extractor.nb_max_frames = extractor.n_samples // extractor.hop_length


def check_audio_context(model: nn.Module, seconds: float, adapters: dict[str, Any]) -> None:
    """
    Check that `cut_positions` can cut the context of `model` to `seconds`, and that no adapter has another context.

    Args:
        model (`nn.Module`): A Whisper, or a model around one.
        seconds (`float`): The new context.
        adapters (`dict[str, PeftConfig]`): Configs of the adapters on the model, by name.

    Raises:
        ValueError: as [`set_audio_context`].
    """
    encoder = _encoder(model)
    if encoder is None:
        raise ValueError(
            f"an audio context of {seconds} s was asked of a {type(model).__name__}, which is no Whisper and has "
            "no max_source_positions to cut: leave max_audio_seconds out"
        )
    for name, config in adapters.items():
        configured = getattr(config, "max_audio_seconds", None)
        if configured is not None and _positions(configured) != _positions(seconds):
            raise ValueError(
                f"an audio context of {seconds} s is not that of the model's adapter {name!r}, whose "
                f"max_audio_seconds is {configured}; adapters on one model share its context: delete that adapter "
                "first, or take another copy of the base model"
            )
    _check_seconds(seconds, encoder.config.max_source_positions / POSITIONS_PER_SECOND, "model")
    table = encoder.embed_positions.weight
    if table.is_meta and len(table) != _positions(seconds):
        raise ValueError(
            f"the model's context cannot be cut to {seconds} s: its table of positions is on the meta device, not "
            "loaded or offloaded to the CPU or the disk. Keep model.encoder.embed_positions on a device in the "
            "device_map"
        )


def cut_positions(model: nn.Module, seconds: float) -> torch.Tensor | None:
    """
    Cut the context of a Whisper. Call `check_audio_context` first.

    Returns:
        `torch.Tensor` or `None`: the old table of positions [positions, hidden], for `set_positions`; `None` if the
        context was `seconds` already.
    """
    table, positions = _encoder(model).embed_positions.weight.data, _positions(seconds)
    if len(table) == positions:
        return None
    set_positions(model, table[:positions].clone())
    return table


def set_positions(model: nn.Module, table: torch.Tensor) -> None:
    """Replace the table of positions [positions, hidden] of a Whisper, and so its context."""
    encoder = _encoder(model)
    embedding = encoder.embed_positions
    # No new parameter: PEFT's low_cpu_mem_usage turns each newly registered one into a meta tensor.
    embedding.weight.data = table.to(embedding.weight.device, embedding.weight.dtype)
    embedding.num_embeddings = len(table)  # the encoder reads its number of positions here
    encoder.max_source_positions = len(table)
    # Usually these are one object, but a loaded encoder may have its own.
    for config in (encoder.config, getattr(model, "config", encoder.config)):
        config.max_source_positions = len(table)


def _encoder(model: nn.Module) -> WhisperEncoder | None:
    return next((module for module in model.modules() if isinstance(module, WhisperEncoder)), None)


def _positions(seconds: float) -> int:
    return round(seconds * POSITIONS_PER_SECOND)


def _check_seconds(seconds: float, current: float, owner: str) -> None:
    if not 0 < seconds <= current:
        raise ValueError(
            f"an audio context of {seconds} s is outside (0, {current:g}], where {current:g} s is the {owner}'s "
            "current context; a context can only be cut (load the model and processor again for a longer one)"
        )
    positions = seconds * POSITIONS_PER_SECOND
    if _positions(seconds) < 1 or abs(positions - _positions(seconds)) > 1e-6:
        raise ValueError(
            f"an audio context of {seconds} s is no multiple of 0.02 s, the length of an encoder position"
        )
