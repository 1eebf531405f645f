"""Sampling that depends on the recording alone, not on its batch or on other threads."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

_TOP_K = 50  # of transformers, for configs that name none
_is_seeded: ContextVar[bool] = ContextVar("peft_clsr_seeded_sampling", default=False)


@contextmanager
def seeded_sampling() -> Iterator[None]:
    """Within this context, `generate` samples the same text for the same features. No global generator is used."""
    token = _is_seeded.set(True)
    try:
        yield
    finally:
        _is_seeded.reset(token)


class SampledTokens(LogitsProcessor):
    """
    Draws a token for each sample, and lets greedy search take it.

    transformers draws for all samples of a batch from one generator, so what a sample gets depends on the others. Here
    each has a generator, with a seed from its features.

    Args:
        config (`GenerationConfig`): Gives temperature and `top_k`.
        features (`torch.Tensor`): The input of the encoder, [samples, mels, frames].
    """

    def __init__(self, config: GenerationConfig, features: torch.Tensor) -> None:
        self.warpers = LogitsProcessorList(
            [TemperatureLogitsWarper(config.temperature), TopKLogitsWarper(config.top_k or _TOP_K)]
        )
        seeds = [zlib.crc32(sample.numpy().tobytes()) for sample in features.float().cpu()]
        self.generators = [torch.Generator(features.device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:  # type: ignore[override]
        """Scores [samples, tokens] in which only the drawn token of each sample is possible."""
        probabilities = self.warpers(input_ids, scores).float().softmax(-1)
        drawn = [
            torch.multinomial(sample, 1, generator=generator)
            for sample, generator in zip(probabilities, self.generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter(-1, torch.stack(drawn), 0.0)


def draw_by_recording(
    config: GenerationConfig, processors: LogitsProcessorList | None, features: torch.Tensor
) -> tuple[GenerationConfig, LogitsProcessorList | None]:
    """
    Return the config and the logits processors with which `generate` samples in [`seeded_sampling`].

    Args:
        config (`GenerationConfig`): Of a call that samples.
        processors (`LogitsProcessorList`, *optional*): Of the call.
        features (`torch.Tensor`): The input of the encoder, [samples, mels, frames].

    Returns:
        `tuple`: outside of [`seeded_sampling`], the same.
    """
    if not _is_seeded.get():
        return config, processors
    sampled = SampledTokens(config, features)
    config = copy.copy(config)
    config.do_sample, config.temperature = False, 1.0
    return config, LogitsProcessorList([*(processors or []), sampled])
