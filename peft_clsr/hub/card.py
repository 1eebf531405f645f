"""The model card of a repository or folder of languages. Our part of it stands between two markers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..checkpoints.base_model import is_hub_id
from ..files import write_text
from ..languages.tags import whisper_code
from ..whisper import module_side
from .record import PLOT_NAME, HubLanguage, read_languages

README = "README.md"
START = "<!-- peft_clsr: written by the library; what stands outside of these two markers is kept -->"
END = "<!-- peft_clsr: end -->"

# A heading of the empty template that PEFT writes wherever it saves.
_PEFT_TEMPLATE = "# Model Card for Model ID"
# The Hub expects codes of ISO 639, without region or variant. These of Whisper are none.
_ISO_CODES = {"jw": "jv"}
_OUR_METRIC = re.compile(r"(WER|CER) \([^()]*\)")


def write_folder_card(directory: str | Path) -> None:
    """
    Write the model card `README.md` of a folder of languages, or of the folder of one adapter.

    An existing card keeps its text outside the markers. PEFT's empty template is replaced, in subfolders too.

    Args:
        directory (`str` or `Path`): A folder that [`save_language`] or `save_pretrained` saved adapters in.

    Raises:
        ValueError: the folder has no adapter of a language, or the metadata of its card cannot be read.
    """
    directory = Path(directory)
    languages = read_languages(directory)
    if not languages:
        raise ValueError(f"{directory} holds no adapter of a language: save one there with save_language()")
    text = read_card(directory)
    existing = None if text is None or _is_template(text) else text
    write_text(directory / README, language_card(languages, directory.resolve().name, existing, is_local=True))
    for language in languages:
        text = read_card(directory / language.subfolder)
        if text is not None and _is_template(text):
            write_folder_card(directory / language.subfolder)


def read_card(folder: Path) -> str | None:
    """The text of `README.md` in a folder, with its newlines as they are; `None` if there is none."""
    path = folder / README
    return path.read_bytes().decode("utf-8-sig") if path.is_file() else None


def _is_template(text: str) -> bool:
    """True for PEFT's empty template."""
    return _PEFT_TEMPLATE in text and START not in text


def language_card(
    languages: Sequence[HubLanguage], repo_id: str, existing: str | None = None, *, is_local: bool = False
) -> str:
    """
    Make the card of some languages.

    Args:
        languages (`Sequence[HubLanguage]`): All languages of the repository or folder.
        repo_id (`str`): The repository or folder, for the title and the code example.
        existing (`str`, *optional*):
            The present card. Text outside the markers is kept, and metadata that others wrote.
        is_local (`bool`, *optional*, defaults to `False`): `repo_id` is a folder's name: the example loads from there.

    Returns:
        `str`: Markdown with metadata.

    Raises:
        ValueError: the metadata of the existing card cannot be read.
    """
    if existing is None:
        existing = f"---\n{{}}\n---\n# {repo_id.rpartition('/')[2]}\n\n"
    try:
        card = ModelCard(existing)
    except Exception as error:  # YAML's, or that of results in it
        raise ValueError(f"the metadata at the top of README.md cannot be read, correct it first: {error}") from error
    _set_metadata(card, languages, repo_id)
    newline = "\r\n" if "\r\n" in card.text else "\n"
    block = "\n".join([START, *_body(languages, repo_id, is_local), END]).replace("\n", newline)
    # The last start marker: an earlier one may have lost its end marker, and other people's text follows it.
    start = card.text.rfind(START)
    end = card.text.find(END, start)
    if start >= 0 and end >= 0:
        card.text = card.text[:start] + block + card.text[end + len(END) :]
    else:
        card.text = card.text.rstrip() + newline * 2 + block + newline
    return str(card)


def _set_metadata(card: ModelCard, languages: Sequence[HubLanguage], repo_id: str) -> None:
    data = card.data
    subtags = [language.code.partition("-")[0] for language in languages]
    codes = [_ISO_CODES.get(subtag, subtag) for subtag in subtags]
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
            # The Hub merges results of equal dataset, configuration and split.
            dataset_config=rates.get("config", language.code),
            dataset_split=rates.get("split"),
            metric_type=metric,
            metric_name=f"{metric.upper()} ({language.subfolder or language.code})",
            metric_value=round(100 * rates[metric], 2),
        )
        for test_set, rates in language.results.items()
        for metric in (("cer", "wer") if language.rate == "cer" else ("wer", "cer"))
        if metric in rates
    ]


def _body(languages: Sequence[HubLanguage], repo_id: str, is_local: bool) -> list[str]:
    lines = [
        "Language experts for Whisper, one folder per language, trained with peft_clsr (conditional language-specific",
        "routing, [arXiv 2311.01070](https://arxiv.org/abs/2311.01070)). The base model is not changed.",
        "",
        "## Languages",
        "",
        "| language | folder | base model | expert | size | test set | WER % (base) | CER % (base) "
        "| gates % (encoder, decoder) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for language in languages:
        expert = "full" if language.rank is None else f"rank {language.rank}"
        size = "" if language.size is None else f"{language.size / 1e6:.1f} MB"
        base = language.base_model if is_hub_id(language.base_model) else "not on the Hub"  # no local paths
        gates = _gates(language.gate_means)
        row = [f"{language.name} ({language.code})", language.subfolder, base, expert, size]
        for test_set, rates in language.results.items() or [("", {})]:
            details = [str(rates[key]) for key in ("config", "split") if key in rates]
            details += [f"{rates['utterances']} utterances"] if "utterances" in rates else []
            name = f"{test_set} ({', '.join(details)})" if details else test_set
            wer, cer = (_percent(rates, metric) for metric in ("wer", "cer"))
            errors = [wer, f"**{cer}**" if cer and language.rate == "cer" else cer]
            lines.append("| " + " | ".join(_cell(cell) for cell in [*row, name, *errors, gates]) + " |")
    if any(language.results for language in languages):
        lines += ["", "Error rates are those with the expert, and in parentheses those of the base model."]
    if any(language.gate_means for language in languages):
        lines += ["", "Gates: the share of tokens that the expert works on, mean over the layers."]
    for language in languages:
        if language.has_plot:
            path = f"{language.subfolder}/{PLOT_NAME}".lstrip("/")
            lines += ["", f"![{language.name}: error rates before and after, and mean gate by layer]({path})"]
        elif language.gate_means:
            lines += ["", f"There is no picture of {language.name} ({language.code}): it needs `peft_clsr[plots]`."]
    by_characters = [f"{language.name} ({language.code})" for language in languages if language.rate == "cer"]
    if by_characters:
        lines += ["", f"No spaces between words, so read CER, in bold: {', '.join(dict.fromkeys(by_characters))}."]
    prompted = [language for language in languages if language.prompt_language != whisper_code(language.code)]
    if prompted:
        pairs = [f"{entry.name} ({entry.code}) by {entry.prompt_language}" for entry in prompted]
        lines += ["", f"In Whisper's prompt, another language's token stands for: {', '.join(dict.fromkeys(pairs))}."]
    lines += ["", "## Use", "", *_snippet(languages, repo_id, is_local)]
    trained = [language for language in languages if language.training or language.started_from]
    if trained:
        lines += ["", "## Training"]
    for language in trained:
        values = [f"`{_cell(name)}` {_cell(value)}" for name, value in language.training.items()]
        if language.started_from:
            values.insert(0, f"started from {_cell(language.started_from)}")
        lines += ["", f"{language.name} ({language.code}): {', '.join(values)}"]
    return lines


def _gates(gate_means: Mapping[str, float]) -> str:
    """The mean gates of encoder and decoder; "" where they are not known."""
    sides: dict[str, list[float]] = {"encoder": [], "decoder": []}
    for name, mean in gate_means.items():
        sides[module_side(name) or "encoder"].append(mean)
    cells = [f"{100 * sum(means) / len(means):.0f}" if means else "-" for means in sides.values()]
    return ", ".join(cells) if gate_means else ""


def _percent(rates: Mapping[str, Any], metric: str) -> str:
    """A rate, and the base model's in parentheses, if known."""
    rate, base = rates.get(metric), rates.get(f"base_{metric}")
    own = "" if rate is None else f"{100 * rate:.1f}"
    return own if base is None else f"{own} ({100 * base:.1f})".strip()


def _snippet(languages: Sequence[HubLanguage], repo_id: str, is_local: bool) -> list[str]:
    """Code that runs without changes, with the first language. Names from outside are literals in it."""
    if not languages:
        return ["There is no language here yet."]
    language = languages[0]
    base = language.base_model if is_hub_id(language.base_model) else "the base model"
    seconds = language.max_audio_seconds
    code = _literal(language.code)
    place = _literal(repo_id) + ("  # the path of this folder" if is_local else "")
    return [
        "```python",
        "import numpy as np",
        f"from peft_clsr import load_with_experts{', set_audio_context' if seconds else ''}",
        "",
        f"experts = {place}",
        f"model, processor = load_with_experts({_literal(base)}, [experts], [{code}])",
        *([f"set_audio_context(None, processor, {seconds!r})"] if seconds else []),
        "",
        "audio = np.zeros(16_000, dtype=np.float32)  # your recording: mono, 16 kHz",
        'features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features',
        f'tokens = model.eval().generate(input_features=features, language={code}, task="transcribe")',
        "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])",
        "```",
    ]


def _literal(text: str) -> str:
    """A Python string literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _cell(value: object) -> str:
    """Text escaped for a table's cell, so that it breaks neither the table nor the markers."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
