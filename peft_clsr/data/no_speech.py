"""Windows without speech: which there are, and what is heard in them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_DIGITAL = 0.2  # share of generated windows that are all zeros
_LEVELS = (-80.0, -20.0)  # dB of full scale, root mean square
_MAX_EXPONENT = 2.0  # power falls with frequency to this power: 0 white, 1 pink, 2 brown noise


class NoSpeech:
    """
    Windows without speech, of recordings without speech in turn, or of generated silence and noise.

    Each language has the same share, and one window at least. The number of windows is the same in each epoch.

    Args:
        clips (`Sequence[int]`): Rows of recordings without speech. Without any, silence and noise are generated.
        languages (`Sequence[str]`): The language of each window with speech.
        share (`float`): Share of all windows that have no speech, in [0, 1).
        max_seconds (`float`): Longest window. Of a longer recording, another part is heard in each epoch.
        seed (`Any`): Seed of all draws.
        earlier (`Mapping[str, int]`, *optional*):
            Windows with speech earlier in a stream, by language. The share is that of the whole stream.

    Attributes:
        languages (`list[str]`): The language of each window.
    """

    def __init__(
        self,
        clips: Sequence[int],
        languages: Sequence[str],
        share: float,
        max_seconds: float,
        seed: object,
        earlier: Mapping[str, int] | None = None,
    ) -> None:
        def number(with_speech: int) -> int:
            return max(round(share / (1 - share) * with_speech), 1) if share and with_speech else 0

        before = Counter(earlier)
        self._clips, self._max_seconds, self._seed = list(clips), max_seconds, seed
        self.languages = [
            language
            for language, count in Counter(languages).items()
            for _ in range(number(before[language] + count) - number(before[language]))
        ]

    def samples(self, index: int, epoch: int, read: Callable[[int], np.ndarray], sampling_rate: int) -> np.ndarray:
        """
        The sound of a window.

        Args:
            index (`int`): The window.
            epoch (`int`): The epoch, which decides the recording, or the noise.
            read (`Callable[[int], np.ndarray]`): Reads the recording of a row.
            sampling_rate (`int`): In Hz.

        Returns:
            `np.ndarray`: float32 [samples].
        """
        draws = random.Random(f"{self._seed} {epoch} no speech {index}")
        longest = round(self._max_seconds * sampling_rate)
        if not self._clips:
            return _noise(draws, draws.randint(min(sampling_rate, longest), longest))
        samples = read(self._clips[(epoch * len(self.languages) + index) % len(self._clips)])
        start = draws.randint(0, max(len(samples) - longest, 0))
        return samples[start : start + longest]


def _noise(draws: random.Random, length: int) -> np.ndarray:
    """Digital silence, or noise of a drawn level and color. float32 [length]."""
    if draws.random() < _DIGITAL:
        return np.zeros(length, dtype=np.float32)
    exponent, level = draws.uniform(0, _MAX_EXPONENT), draws.uniform(*_LEVELS)
    generator = np.random.default_rng(draws.getrandbits(64))
    spectrum = np.fft.rfft(generator.standard_normal(length))
    spectrum /= np.maximum(np.arange(len(spectrum)), 1) ** (exponent / 2)
    samples = np.fft.irfft(spectrum, length)
    samples *= 10 ** (level / 20) / np.sqrt(np.mean(samples**2))
    return samples.clip(-1, 1).astype(np.float32)
