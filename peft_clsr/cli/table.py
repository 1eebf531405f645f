"""Markdown tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLUMNS = ["language", "utterances", "model", "WER %", "CER %", "trained parameters", "gate mean"]


def run_table(results: Mapping[str, Any], languages: Sequence[str]) -> str:
    """WER and CER before and after training, in percent, as a Markdown table."""
    return format_table(_COLUMNS, [row for language in languages for row in _rows(results, language)])


def comparison_table(runs: Mapping[Path, Mapping[str, Any]]) -> str:
    """The results of several runs, in percent, as a Markdown table. Equal rows of base and teacher come once."""
    rows: list[list[str]] = []
    languages = sorted({language for results in runs.values() for language in results["languages"]})
    for language in languages:
        for folder, results in runs.items():
            for row in _rows(results, language) if language in results["languages"] else []:
                is_trained = row[2].startswith("with")
                row = [*row, str(folder) if is_trained else ""]
                if row not in rows:
                    rows.append(row)
    return format_table([*_COLUMNS, "run"], rows)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in [header, rule, *rows]
    )


def _rows(results: Mapping[str, Any], language: str) -> list[list[str]]:
    row = results["languages"][language]
    context = row.get("max_audio_seconds", results["settings"].get("max_audio_seconds"))
    at_context = f", {context:g} s context" if context else ""
    names = {
        "base_full_context": "base, 30 s context",
        "base": f"base{at_context}",
        "teacher": "teacher",
        "expert": f"with expert{at_context}",
        "lora": f"with LoRA{at_context}",
    }
    parameters = f"{row['trainable_parameters'] / 1e6:.2f} M ({row['trainable_share']:.1%})"
    rows = []
    for key, name in names.items():
        if key in row:
            rates = row[key]
            trained = ["", ""]
            if key in ("expert", "lora"):
                trained = [parameters, f"{row['gate_mean']:.2f}" if "gate_mean" in row else ""]
            rates_in_percent = [f"{100 * rates['wer']:.1f}", f"{100 * rates['cer']:.1f}"]
            rows.append([language, str(rates["utterances"]), name, *rates_in_percent, *trained])
    return rows
