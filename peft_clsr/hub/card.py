"""The model card of a repository of languages: made of what stands in its folders, between two markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .base_model import is_hub_id
from .record import PLOT_NAME, HubLanguage

START = "<!-- peft_clsr: written by the library; what stands outside of these two markers is kept -->"
END = "<!-- peft_clsr: end -->"

# Whisper's code where it is not that of ISO 639, which the Hub asks for.
_ISO_CODES = {"jw": "jv"}
_OUR_METRIC = re.compile(r"(WER|CER) \([^()]*\)")


def language_card(languages: Sequence[HubLanguage], repo_id: str, existing: str | None = None) -> str:
    """
    The card, as Markdown with its metadata.

    Args:
        languages (`Sequence[HubLanguage]`): All languages of the repository.
        repo_id (`str`): The repository, for the snippet.
        existing (`str`, *optional*):
            The card as it is. What stands outside of the markers is kept, as is metadata that others wrote.

    Raises:
        ValueError: the metadata of the existing card cannot be read.
    """
    if existing is None:
        existing = f"---\n{{}}\n---\n# {repo_id.rpartition('/')[2]}\n\n"
    try:
        card = ModelCard(existing)
    except Exception as error:  # of YAML, or of the results in it
        raise ValueError(f"the metadata at the top of README.md cannot be read, mend it first: {error}") from error
    _set_metadata(card, languages, repo_id)
    newline = "\r\n" if "\r\n" in card.text else "\n"
    block = "\n".join([START, *_body(languages, repo_id), END]).replace("\n", newline)
    # The last start: a marker whose partner somebody deleted must not take text of theirs with it.
    start = card.text.rfind(START)
    end = card.text.find(END, start)
    if start >= 0 and end >= 0:
        card.text = card.text[:start] + block + card.text[end + len(END) :]
    else:
        card.text = card.text.rstrip() + newline * 2 + block + newline
    return str(card)


def _set_metadata(card: ModelCard, languages: Sequence[HubLanguage], repo_id: str) -> None:
    data = card.data
    codes = [_ISO_CODES.get(language.code, language.code) for language in languages]
    bases = [language.base_model for language in languages if is_hub_id(language.base_model)]
    data.language = sorted({*codes, *_as_list(data.language)})
    data.base_model = sorted({*bases, *_as_list(data.base_model)}) or None
    if data.base_model and len(data.base_model) == 1:
        data.base_model = data.base_model[0]
    data.library_name = "peft"
    data.pipeline_tag = data.pipeline_tag or "automatic-speech-recognition"
    data.tags = sorted({"clsr", *_as_list(data.tags)})
    others = [result for result in data.eval_results or [] if not _OUR_METRIC.fullmatch(str(result.metric_name or ""))]
    data.eval_results = others + [result for language in languages for result in _eval_results(language)] or None
    if data.eval_results:
        data.model_name = data.model_name or repo_id.rpartition("/")[2]


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _eval_results(language: HubLanguage) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="automatic-speech-recognition",
            dataset_type=test_set,
            dataset_name=test_set,
            # The Hub's format joins results of equal dataset, configuration and split.
            dataset_config=rates.get("config", language.code),
            dataset_split=rates.get("split"),
            metric_type=metric,
            metric_name=f"{metric.upper()} ({language.subfolder or language.code})",
            metric_value=round(100 * rates[metric], 2),
        )
        for test_set, rates in language.results.items()
        for metric in ("wer", "cer")
        if metric in rates
    ]


def _body(languages: Sequence[HubLanguage], repo_id: str) -> list[str]:
    lines = [
        "Language experts for Whisper, one folder a language, trained with peft_clsr (conditional language-specific",
        "routing, [arXiv 2311.01070](https://arxiv.org/abs/2311.01070)). The base model stays as it is.",
        "",
        "## Languages",
        "",
        "| language | folder | base model | expert | size | test set | WER % (base) | CER % (base) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for language in languages:
        expert = "full" if language.rank is None else f"rank {language.rank}"
        size = "" if language.size is None else f"{language.size / 1e6:.1f} MB"
        base = language.base_model if is_hub_id(language.base_model) else ""  # no paths of somebody's machine
        row = [f"{language.name} ({language.code})", language.subfolder, base, expert, size]
        for test_set, rates in language.results.items() or [("", {})]:
            details = [str(rates[key]) for key in ("config", "split") if key in rates]
            details += [f"{rates['utterances']} utterances"] if "utterances" in rates else []
            name = f"{test_set} ({', '.join(details)})" if details else test_set
            errors = [_percent(rates, metric) for metric in ("wer", "cer")]
            lines.append("| " + " | ".join(_cell(cell) for cell in [*row, name, *errors]) + " |")
    lines += ["", "## Use", "", *_snippet(languages, repo_id)]
    trained = [language for language in languages if language.training]
    if trained:
        lines += ["", "## Training"]
    for language in trained:
        values = ", ".join(f"`{_cell(name)}` {_cell(value)}" for name, value in language.training.items())
        lines += ["", f"{language.name} ({language.code}): {values}"]
    plotted = [language for language in languages if language.has_plot]
    if plotted:
        lines += ["", "## How often each layer asks the expert"]
    for language in plotted:
        path = f"{language.subfolder}/{PLOT_NAME}".lstrip("/")
        lines += ["", f"![{language.name}: mean gate by layer]({path})"]
    return lines


def _percent(rates: Mapping[str, Any], metric: str) -> str:
    """A rate, and that of the base model in parentheses, as far as they are known."""
    rate, base = rates.get(metric), rates.get(f"base_{metric}")
    own = "" if rate is None else f"{100 * rate:.1f}"
    return own if base is None else f"{own} ({100 * base:.1f})".strip()


def _snippet(languages: Sequence[HubLanguage], repo_id: str) -> list[str]:
    """Code that runs as it is, with the first language; strings of others go in as literals."""
    if not languages:
        return ["There is no language here yet."]
    language = languages[0]
    base = language.base_model if is_hub_id(language.base_model) else "the base model"
    seconds = language.max_audio_seconds
    context = ["from peft_clsr import set_audio_context"] if seconds else []
    cut = [f"set_audio_context(None, processor, {seconds!r})"] if seconds else []
    return [
        "```python",
        "import numpy as np",
        "import torch",
        *context,
        "from peft_clsr import load_language",
        "from transformers import WhisperForConditionalGeneration, WhisperProcessor",
        "",
        f"base = {_literal(base)}",
        "processor = WhisperProcessor.from_pretrained(base)",
        *cut,
        "whisper = WhisperForConditionalGeneration.from_pretrained(base, dtype=torch.float32)",
        f"model = load_language(whisper, {_literal(repo_id)}, {_literal(language.subfolder or language.code)}).eval()",
        "",
        "audio = np.zeros(16_000, dtype=np.float32)  # your recording: mono, 16 kHz",
        'features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features',
        f'tokens = model.generate(input_features=features, language={_literal(language.code)}, task="transcribe")',
        "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
        "```",
    ]


def _literal(text: str) -> str:
    """A string as Python has it in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _cell(value: object) -> str:
    """Text that breaks neither the table nor the markers."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
