"""Shared by tests of all rooms: settings without randomness, random adapters, noise."""

import socket

import numpy as np
import torch
from peft import get_peft_model

from peft_clsr import CLSRConfig

# No dropout, skipping or noise in training.
QUIET = {"gate_dropout": 0.0, "expert_dropout": 0.0, "skip_gate_prob": 0.0, "gate_noise": 0.0}
SMALL = {**QUIET, "gate_dim": 8}


def clsr(base, adapters=("ca",), **config):
    """Adapters of `SMALL` on a base model, as they start."""
    torch.manual_seed(0)  # the gate's first projection starts at random
    model = get_peft_model(base, CLSRConfig.paper(**{**SMALL, **config}), adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, CLSRConfig.paper(**{**SMALL, **config}))
    return model


@torch.no_grad()
def randomize(model, adapter=None, *, seed=5, scale=0.1, gate_scale=None):
    """Moves gates and experts of an adapter, or of all, away from their start, the shared FFN."""
    generator = torch.Generator().manual_seed(seed)
    moved = False
    for name, parameter in model.named_parameters():
        if "clsr_" in name and (adapter is None or f".{adapter}." in f"{name}."):
            deviation = gate_scale if gate_scale is not None and "gate" in name else scale
            parameter.add_((torch.randn(parameter.shape, generator=generator) * deviation).to(parameter.dtype))
            moved = True
    assert moved, f"there is no adapter {adapter!r} to move"
    return model


def random_clsr(base, *adapters, **config):
    """Adapters of `SMALL` with different random weights, in evaluation mode."""
    model = clsr(base, adapters, **config)
    for adapter in adapters:
        randomize(model, adapter, seed=sum(map(ord, adapter)), scale=0.3)
    return model.eval()


@torch.no_grad()
def logits_of(model, inputs, adapter=None):
    """Logits of a forward pass, after a switch to `adapter` if one is named."""
    if adapter is not None:
        model.set_adapter(adapter)
    return model(**inputs).logits


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def noise(seconds, rate=16000, seed=0):
    """White noise, float32 [samples]."""
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * rate)).astype(np.float32)


def syllables(seconds, rate=16000, seed=0):
    """Pulses of a gliding pitch through three formants, which silero-vad takes for speech. float32 [samples]."""
    from scipy.signal import lfilter

    generator = np.random.default_rng(seed)
    sounds = []
    while sum(map(len, sounds)) < seconds * rate:
        length = round(generator.uniform(0.12, 0.25) * rate)
        pitch = np.linspace(generator.uniform(110, 150), generator.uniform(90, 130), length)
        sound = np.diff(np.floor(np.cumsum(pitch) / rate), prepend=0) + 0.01 * generator.standard_normal(length)
        for formant, width in ((generator.uniform(300, 800), 80), (generator.uniform(900, 2200), 100), (2600, 150)):
            radius = np.exp(-np.pi * width / rate)
            sound = lfilter([1], [1, -2 * radius * np.cos(2 * np.pi * formant / rate), radius**2], sound)
        sound *= np.hanning(length)
        sounds += [0.3 * sound / np.abs(sound).max(), np.zeros(round(0.03 * rate))]
    return np.concatenate(sounds)[: round(seconds * rate)].astype(np.float32)


def write_container(path, samples, rate, codec, *, channels=2, video=False, **options):
    """
    Writes sound with PyAV, in the container that the file's ending names.

    Args:
        samples (`np.ndarray`): float32 [samples], the same for each channel.
        video (`bool`): Add a video track of the same length. Without `codec`, it is silent.
        options: Such as `{"movflags": "faststart"}`.
    """
    import av

    layout = "mono" if channels == 1 else "stereo"
    with av.open(str(path), "w", options=options) as container:
        sound = codec and container.add_stream(codec, rate=rate, layout=layout)
        if video:
            picture = container.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 16
            picture.pix_fmt = "yuv420p"
            for _ in range(round(10 * len(samples) / rate)):
                frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), dtype=np.uint8), format="rgb24")
                container.mux(picture.encode(frame))
            container.mux(picture.encode())
        if codec:
            context = sound.codec_context
            if not context.is_open:
                context.open()
            frame = av.AudioFrame.from_ndarray(np.stack([samples] * channels), format="fltp", layout=layout)
            frame.sample_rate = rate
            resampler = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or None)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(sound.encode(part))
            container.mux(sound.encode())
