"""Formats of a frozen expert: freeze its routing, recover what that costs, write, and check the result."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import WhisperForConditionalGeneration

from ..export.ctranslate2 import convert, save_whisper, transcribe_with_faster_whisper
from ..export.freeze import FrozenRouting, freeze_routing
from ..export.lora import lora_rank
from ..tuner.config import CLSRConfig
from .export_inputs import ExportInputs, load_inputs
from .export_recover import load_windows, recover
from .table import markdown_table

Rows = list[tuple[str, dict[str, Any]]]  # of the table of error rates


def export(arguments: argparse.Namespace) -> int:
    """Freeze, recover, write, check, and print the results. Returns the exit status, 1 if a module stays routed."""
    check, write = _FORMATS[arguments.format]
    if not 0.5 < arguments.threshold <= 1:
        raise ValueError(f"--threshold is {arguments.threshold}, expected above 0.5 and at most 1")
    if arguments.recover_steps < 0:
        raise ValueError(f"--recover_steps is {arguments.recover_steps}, expected at least 0; 0 trains nothing")
    if not arguments.recover_learning_rate > 0:
        raise ValueError(f"--recover_learning_rate is {arguments.recover_learning_rate}, expected above 0")
    inputs = load_inputs(arguments, check)
    windows = load_windows(inputs) if arguments.recover_steps else None  # what is wrong with them is known now

    frozen = _freeze(inputs, inputs.model)
    print(_modules_table(frozen) + "\n")
    rows: Rows = [("with the expert, routed", frozen.before), ("frozen", frozen.after)]
    routed = list(frozen.decisions.values()).count("routed")
    if routed:
        print(inputs.rates_table(rows))
        print(
            f"{routed} of {len(frozen.decisions)} modules are left routed, which --format {arguments.format} cannot "
            "hold; nothing was written. --undecided loss decides them all"
        )
        return 1
    if windows is not None:
        student = frozen.student(inputs.model)
        recover(inputs, student, windows)
        frozen = _freeze(inputs, student)
        rows.append((f"frozen, after {arguments.recover_steps} steps", frozen.after))
    lines = write(inputs, frozen, rows)
    print(inputs.rates_table(rows))
    print("\n".join(lines))
    return 0


def _freeze(inputs: ExportInputs, model: PeftModel) -> FrozenRouting:
    return freeze_routing(
        model,
        inputs.code,
        dataset=inputs.dataset,
        processor=inputs.processor,
        threshold=inputs.arguments.threshold,
        undecided=inputs.arguments.undecided,
        **inputs.limits,
    )


def _modules_table(frozen: FrozenRouting) -> str:
    """Each module's share of tokens for the expert, and its decision, as a Markdown table."""
    rows = []
    for key, share in frozen.shares.items():
        padding = f"{100 * frozen.padding_shares[key]:.1f}" if key in frozen.padding_shares else ""
        rows.append([key, f"{100 * share:.1f}", padding, frozen.decisions[key]])
    return markdown_table(["module", "to the expert, %", "of padding, %", "became"], rows)


# Each format has two functions. The first raises a ValueError for what the format cannot be, of the arguments and the
# model, before anything is computed. The second writes, adds rows to the table, and returns lines to print below it.


def _check_ctranslate2(arguments: argparse.Namespace, model: PeftModel, config: CLSRConfig) -> None:
    from ctranslate2.specs import model_spec

    known = model_spec.ACCEPTED_MODEL_TYPES
    if arguments.quantization not in known:
        raise ValueError(f"--quantization is {arguments.quantization!r}, expected one of {', '.join(known)}")


def _write_ctranslate2(inputs: ExportInputs, frozen: FrozenRouting, rows: Rows) -> list[str]:
    quantization, output_dir = inputs.arguments.quantization, inputs.arguments.output_dir
    whisper_dir, converted_dir = output_dir / "whisper", output_dir / "ctranslate2"
    save_whisper(frozen.model, inputs.processor, whisper_dir)
    convert(whisper_dir, converted_dir, quantization)
    saved = WhisperForConditionalGeneration.from_pretrained(whisper_dir, dtype=torch.float32)
    expected = inputs.transcribe(saved)
    converted = transcribe_with_faster_whisper(
        converted_dir, inputs.prompt, inputs.waveforms(), inputs.arguments.max_new_tokens
    )
    rows.append((f"frozen, faster-whisper {quantization}", inputs.rates(converted)))
    return [
        _count_equal(converted, expected, "faster-whisper", "transformers"),
        f"for transformers: {whisper_dir}; for faster-whisper: {converted_dir}, context {inputs.seconds:g} s",
    ]


def _check_lora(arguments: argparse.Namespace, model: PeftModel, config: CLSRConfig) -> None:
    tuner: Any = model.base_model
    rank = lora_rank(config, tuner.routing.full_positions is not None, arguments.lora_rank)
    if config.expert_rank is None and rank > model.config.d_model:  # a low-rank expert is a LoRA of any rank
        raise ValueError(
            f"--lora_rank is {arguments.lora_rank}, expected at most the full rank, {model.config.d_model}"
        )


def _write_lora(inputs: ExportInputs, frozen: FrozenRouting, rows: Rows) -> list[str]:
    output_dir = inputs.arguments.output_dir
    whisper_dir, lora_dir = output_dir / "whisper", output_dir / "lora"
    error = frozen.save_as_lora(lora_dir, inputs.arguments.lora_rank)  # refuses before anything is written
    save_whisper(frozen.model, inputs.processor, whisper_dir)
    base = WhisperForConditionalGeneration.from_pretrained(inputs.arguments.base, dtype=torch.float32)
    heard = inputs.transcribe(PeftModel.from_pretrained(base, lora_dir))
    rows.append(("base with the LoRA", inputs.rates(heard)))
    lines = [_count_equal(heard, inputs.transcribe(frozen.model), "the LoRA", "the frozen model")]
    if error:
        lines.append(f"relative error of the LoRA's weights: {error:.3f}")
    if inputs.config.expert_rank is None or inputs.config.modules_to_save:
        lines.append("the LoRA holds biases or further modules, which PEFT loads, and vLLM does not")
    lines.append(f"for transformers: {whisper_dir}; for PEFT, on {inputs.arguments.base}: {lora_dir}")
    return lines


def _count_equal(transcripts: list[str], expected: list[str], ours: str, theirs: str) -> str:
    equal = sum(text == other for text, other in zip(transcripts, expected, strict=True))
    return f"{equal} of {len(expected)} transcripts of {ours} equal those of {theirs}"


_Check = Callable[[argparse.Namespace, PeftModel, CLSRConfig], None]
_Write = Callable[[ExportInputs, FrozenRouting, Rows], list[str]]
_FORMATS: dict[str, tuple[_Check, _Write]] = {
    "ctranslate2": (_check_ctranslate2, _write_ctranslate2),
    "lora": (_check_lora, _write_lora),
}
