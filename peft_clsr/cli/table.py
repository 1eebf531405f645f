"""Tables in Markdown, error rates in them, and the table of training results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RESULTS_HEADER = ["language", "utterances", "model", "WER %", "CER %", "trained parameters", "gate mean"]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, rule, *rows]
    )


def rate_cells(rates: Mapping[str, float], language: str) -> list[str]:
    """
    WER and CER in percent, for two columns of a table.

    CER is in bold where it is the rate to read, in languages without spaces between words.
    """
    from ..evaluation.normalization import leading_rate

    wer, cer = (f"{100 * rates[name]:.1f}" for name in ("wer", "cer"))
    return [wer, f"**{cer}**" if leading_rate(language) == "cer" else cer]


def results_rows(results: dict[str, Any], language: str) -> list[list[str]]:
    """
    The rows of one language, with WER and CER in percent: the teacher as top line, the base model, what was trained.

    Args:
        results (`dict`): As `results.json` has it.
        language (`str`): A code in `results["languages"]`.

    Returns:
        `list[list[str]]`: one cell for each column of `RESULTS_HEADER`.
    """
    row = results["languages"][language]
    # The context is named only if it was cut. The base model is then measured at both, and nothing is joined.
    cut = f", {results['settings']['max_audio_seconds']} s context" if "base_full_context" in row else ""
    parameters = f"{row['trainable_parameters'] / 1e6:.2f} M ({row['trainable_share']:.1%})"
    gate_mean = f"{row['gate_mean']:.2f}" if "gate_mean" in row else ""
    names = {
        "teacher": ("teacher, 30 s context" if cut else "teacher", "", ""),  # the top line
        "base_full_context": ("base, 30 s context", "", ""),
        "base": (f"base{cut}", "", ""),
        "expert": (f"with expert{cut}", parameters, gate_mean),
        "lora": (f"with LoRA{cut}", parameters, gate_mean),
    }
    for key in [name for name in names if f"{name}_joined" in row]:
        names[f"{key}_joined"] = (f"{names[key][0]}, joined to about a minute", "", "")
    return [
        [language, str(row[key]["utterances"]), name, *rate_cells(row[key], language), *more]
        for key, (name, *more) in names.items()
        if key in row
    ]
