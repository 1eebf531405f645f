"""The model card of a repository of languages. It is generated from the folders, between two markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from .base_model import is_hub_id
from .record import PLOT_NAME, HubLanguage, read_languages

README = "README.md"
START = "<!-- peft_clsr: written by the library; what stands outside of these two markers is kept -->"
END = "<!-- peft_clsr: end -->"

# In the card that PEFT writes.
_PEFT_TEMPLATE = "[More Information Needed]"

# The Hub expects codes of ISO 639. Whisper's differ here.
_ISO_CODES = {"jw": "jv"}
_OUR_METRIC = re.compile(r"(WER|CER) \([^()]*\)")


def language_card(languages: Sequence[HubLanguage], repo_id: str, existing: str | None = None) -> str:
    """
    Generate the card, as Markdown with its metadata.

    Args:
        languages (`Sequence[HubLanguage]`): All languages of the repository.
        repo_id (`str`): The repository, for the snippet.
        existing (`str`, *optional*):
            The present card. Text outside of the markers is kept, and so is metadata by others.

    Raises:
        ValueError: the metadata of the existing card cannot be read.
    """
    if existing is None:
        existing = f"---\n{{}}\n---\n# {repo_id.rpartition('/')[2]}\n\n"
    try:
        card = ModelCard(existing)
    except Exception as error:  # of YAML, or of the results in it
        raise ValueError(f"the metadata at the top of README.md cannot be read, correct it first: {error}") from error
    _set_metadata(card, languages, repo_id)
    newline = "\r\n" if "\r\n" in card.text else "\n"
    block = "\n".join([START, *_body(languages, repo_id), END]).replace("\n", newline)
    # Take the last start marker. If somebody deleted an end marker, their text must stay.
    start = card.text.rfind(START)
    end = card.text.find(END, start)
    if start >= 0 and end >= 0:
        card.text = card.text[:start] + block + card.text[end + len(END) :]
    else:
        card.text = card.text.rstrip() + newline * 2 + block + newline
    return str(card)


def write_folder_cards(directory: Path, repo_id: str) -> None:
    """
    Write the card of the languages in a folder, and in each language's folder a card of it alone.

    PEFT writes an empty template there whenever it saves. Other text outside of the markers is kept.

    Args:
        directory (`Path`): A folder as [`read_languages`] reads it.
        repo_id (`str`): The repository to which it may be pushed, for the snippets.
    """
    languages = read_languages(directory)
    _write_card(directory / README, languages, repo_id)
    for language in languages:
        if language.subfolder:
            plot_is_beside = replace(language, subfolder="")
            _write_card(directory / language.subfolder / README, [plot_is_beside], repo_id)


def _write_card(path: Path, languages: Sequence[HubLanguage], repo_id: str) -> None:
    existing = path.read_bytes().decode("utf-8") if path.is_file() else None
    if existing is not None and START not in existing and _PEFT_TEMPLATE in existing:
        existing = None
    path.write_bytes(language_card(languages, repo_id, existing).encode("utf-8"))


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
        "routing, [arXiv 2311.01070](https://arxiv.org/abs/2311.01070)). The base model is not changed.",
        "",
        "## Languages",
        "",
        "| language | folder | base model | expert | size | test set | WER % (base) | CER % (base) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for language in languages:
        expert = "full" if language.rank is None else f"rank {language.rank}"
        size = "" if language.size is None else f"{language.size / 1e6:.1f} MB"
        base = language.base_model if is_hub_id(language.base_model) else ""  # no local paths
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
        lines += ["", "## How often each layer uses the expert"]
    for language in plotted:
        path = f"{language.subfolder}/{PLOT_NAME}".lstrip("/")
        lines += ["", f"![{language.name}: mean gate by layer]({path})"]
    return lines


def _percent(rates: Mapping[str, Any], metric: str) -> str:
    """A rate, and the base model's in parentheses, if they are known."""
    rate, base = rates.get(metric), rates.get(f"base_{metric}")
    own = "" if rate is None else f"{100 * rate:.1f}"
    return own if base is None else f"{own} ({100 * base:.1f})".strip()


def _snippet(languages: Sequence[HubLanguage], repo_id: str) -> list[str]:
    """Code that runs as it is, with the first language. Strings from others become literals."""
    if not languages:
        return ["There is no language here yet."]
    language = languages[0]
    base = language.base_model if is_hub_id(language.base_model) else "the base model"
    seconds = language.max_audio_seconds
    names = "load_language, set_audio_context" if seconds else "load_language"
    cut = [f"set_audio_context(None, processor, {seconds!r})"] if seconds else []
    return [
        "```python",
        "import numpy as np",
        "import torch",
        "from transformers import WhisperForConditionalGeneration, WhisperProcessor",
        f"from peft_clsr import {names}",
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
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _cell(value: object) -> str:
    """Text that cannot break the table or the markers."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
