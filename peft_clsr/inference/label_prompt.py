"""The language and the task that labels begin with."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def prompt_of_labels(
    labels: torch.Tensor, lang_to_id: Mapping[str, int], task_to_id: Mapping[str, int]
) -> tuple[list[str] | None, str | None]:
    """
    Read the prompts of labels: `<|startoftranscript|><|ca|><|transcribe|>`, also without the first token.

    Args:
        labels (`torch.Tensor`): int64 [samples, tokens].
        lang_to_id (`Mapping[str, int]`): Ids of the language tokens, from the generation config.
        task_to_id (`Mapping[str, int]`): Ids of the task tokens, from the generation config.

    Returns:
        `tuple`: the language token of each sample, such as "<|ca|>", or `None` if any sample has none; and the task,
        or `None` if samples have none or several.
    """
    languages = {token_id: token for token, token_id in lang_to_id.items()}
    tasks = {token_id: task for task, token_id in task_to_id.items()}
    starts = labels[:, :3].tolist()
    of_samples: list[str] = []
    for start in starts:
        language = next((languages[token] for token in start[:2] if token in languages), None)
        if language is None:
            return None, None
        of_samples.append(language)
    found = {next((tasks[token] for token in start if token in tasks), None) for start in starts}
    return of_samples, found.pop() if len(found) == 1 else None
