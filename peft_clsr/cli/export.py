"""`peft-clsr export`: freeze the routing of an expert, convert it to CTranslate2, and check it in faster-whisper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import markdown_table, rate_cells

if TYPE_CHECKING:
    from peft import PeftModel

    from ..export.freeze import FrozenRouting

DESCRIPTION = "export an expert to CTranslate2: freeze its routing, convert, check in faster-whisper"

_EPILOG = """\
The recordings decide what each module becomes, and all error rates are measured on them. output_dir gets two folders:
whisper, for transformers, and ctranslate2, for faster-whisper. If a module stays routed, nothing is written, and the
exit status is 1.

example:
  peft-clsr export --base openai/whisper-base --adapter runs/ca/ca --language ca --dataset my_recordings \\
      --output_dir exports/ca
"""


def make_parser(prog: str, everything: bool = False) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument_group("model and recordings").add_argument
    add("--base", required=True, help="the Whisper that the adapter was trained on: Hub id or folder")
    add("--adapter", required=True, help="an adapter folder, or a repository of languages on the Hub")
    add("--language", required=True, help="tag or English name of the language")
    add("--dataset", required=True, help="Hub id, or a folder, as for train")
    add("--dataset_config", help="configuration on the Hub (ca_es), or subfolder")
    add("--split", default="test", help="split to use")
    add("--audio_column", default="audio", help="column of the audio (Hub datasets)")
    add("--file_column", help="column of file names in a table; by default file_name, or path")
    add("--text_column", default="transcription", help="column of the transcripts")
    add("--max_samples", type=int, help="use only the first so many")
    add = parser.add_argument_group("freezing").add_argument
    add("--threshold", type=float, default=0.95, help="share of tokens that decides a module")
    add(
        "--undecided",
        choices=["loss", "majority", "routed"],
        default="loss",
        help="what other modules become: by their 'loss', by the 'majority' of their tokens, or 'routed' as before",
    )
    add("--full_context", action="store_true", help="restore the 30 s of an adapter trained at a shorter context")
    add("--max_new_tokens", type=int, default=200, help="longest transcript in tokens, at most 224")
    add("--batch_size", type=int, default=8, help="utterances at a time")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, type=Path, help="folder to create")
    add("--quantization", default="float32", help="CTranslate2's: float32, float16, int8, ...")
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    arguments = parser.parse_args(argv)
    import logging

    from ..extras import require

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("peft_clsr.data").setLevel(logging.INFO)  # says which rows are used
    try:
        for name in ("av", "datasets", "jiwer", "soundfile", "ctranslate2", "faster_whisper"):
            require(name)
        return _export(arguments)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {error}\n")


def _export(arguments: argparse.Namespace) -> int:
    """Freeze, convert, check, and print the results. Returns the exit status, 1 if a module stays routed."""
    import torch
    from ctranslate2.specs import model_spec
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from ..checkpoints.checks import check_adapter_folder
    from ..data.audio import read_audio
    from ..data.dataset import prepare_dataset
    from ..data.tables import load_recordings
    from ..evaluation.error_rates import error_rates
    from ..evaluation.transcripts import transcribe
    from ..export.ctranslate2 import MAX_NEW_TOKENS, save_and_convert, transcribe_with_faster_whisper
    from ..export.freeze import freeze_routing
    from ..files import check_output_folder
    from ..languages.adapters import adapter_of_language
    from ..languages.tags import language_tag, prompt_code
    from ..sources import check_source, check_whisper
    from ..whisper import POSITIONS_PER_SECOND, set_audio_context

    code = language_tag(arguments.language)
    output_dir = arguments.output_dir
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir} is not an empty folder: give another one, or remove it")
    check_output_folder(output_dir, "--output_dir")
    if not 0.5 < arguments.threshold <= 1:
        raise ValueError(f"--threshold is {arguments.threshold}, expected above 0.5 and at most 1")
    for name in ("batch_size", "max_samples"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    known = model_spec.ACCEPTED_MODEL_TYPES
    if arguments.quantization not in known:
        raise ValueError(f"--quantization is {arguments.quantization!r}, expected one of {', '.join(known)}")
    if not 1 <= arguments.max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(
            f"--max_new_tokens is {arguments.max_new_tokens}, expected 1 to {MAX_NEW_TOKENS}, CTranslate2's limit"
        )
    check_whisper(arguments.base, "--base")
    check_source(arguments.adapter, "--adapter", "an adapter")
    check_source(arguments.dataset.replace("{language}", code), "--dataset", "a dataset", is_dataset=True)
    if Path(arguments.adapter).is_dir():
        try:
            check_adapter_folder(arguments.adapter)
        except ValueError as error:
            raise ValueError(f"--adapter {arguments.adapter} cannot be used: {error}") from error
    raw = load_recordings(
        arguments.dataset,
        code,
        arguments.split,
        config=arguments.dataset_config,
        audio_column=arguments.audio_column,
        text_column=arguments.text_column,
        file_column=arguments.file_column,
        limit=arguments.max_samples,
    )
    model = _load_model(arguments, code)
    config = model.peft_config[adapter_of_language(model.peft_config, code)]  # raises before features are computed
    prompt = config.prompt_language or prompt_code(code)
    processor = WhisperProcessor.from_pretrained(arguments.base)
    seconds = model.config.max_source_positions / POSITIONS_PER_SECOND
    set_audio_context(None, processor, seconds)
    columns = {"audio_column": arguments.audio_column, "text_column": arguments.text_column}
    dataset, _ = prepare_dataset(raw, processor, code, prompt_language=prompt, **columns)

    limits = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    frozen = freeze_routing(
        model,
        code,
        dataset=dataset,
        processor=processor,
        threshold=arguments.threshold,
        undecided=arguments.undecided,
        **limits,
    )
    print(_modules_table(frozen) + "\n")
    rows = [("with the expert, routed", frozen.before), ("frozen", frozen.after)]
    routed = list(frozen.decisions.values()).count("routed")
    if routed:
        print(_rates_table(rows, code))
        print(
            f"{routed} of {len(frozen.decisions)} modules are left routed, which CTranslate2 cannot run; nothing was "
            "written. --undecided loss decides them all"
        )
        return 1

    whisper_dir, converted_dir = save_and_convert(frozen.model, processor, output_dir, arguments.quantization)
    saved = WhisperForConditionalGeneration.from_pretrained(whisper_dir, dtype=torch.float32)
    expected = transcribe(saved, processor, dataset, prompt, **limits)
    waveforms = [read_audio(audio, 16000) for audio in raw.select(dataset["index"])[arguments.audio_column]]
    converted = transcribe_with_faster_whisper(converted_dir, prompt, waveforms, arguments.max_new_tokens)
    rates = error_rates(converted, dataset["text"], language=code)[code]
    rows.append((f"frozen, faster-whisper {arguments.quantization}", rates))
    print(_rates_table(rows, code))
    equal = sum(text == expected_text for text, expected_text in zip(converted, expected, strict=True))
    print(f"{equal} of {len(expected)} transcripts of faster-whisper equal those of transformers")
    print(f"for transformers: {whisper_dir}; for faster-whisper: {converted_dir}, context {seconds:g} s")
    return 0


def _load_model(arguments: argparse.Namespace, code: str) -> PeftModel:
    """The base model with the adapter, in float32."""
    import torch
    from peft import PeftModel
    from transformers import WhisperForConditionalGeneration

    from ..hub.pull import load_language
    from ..tuner.config import CLSRConfig

    base = WhisperForConditionalGeneration.from_pretrained(arguments.base, dtype=torch.float32)
    if not Path(arguments.adapter).is_dir():
        if arguments.full_context:
            raise ValueError("--full_context needs the adapter in a folder: download it, and give the folder")
        return load_language(base, arguments.adapter, code)
    config = CLSRConfig.from_pretrained(arguments.adapter)
    if arguments.full_context:
        config.max_audio_seconds = None
    return PeftModel.from_pretrained(base, arguments.adapter, adapter_name=config.language or code, config=config)


def _modules_table(frozen: FrozenRouting) -> str:
    """Each module's share of tokens for the expert, and its decision, as a Markdown table."""
    rows = []
    for key, share in frozen.shares.items():
        padding = f"{100 * frozen.padding_shares[key]:.1f}" if key in frozen.padding_shares else ""
        rows.append([key, f"{100 * share:.1f}", padding, frozen.decisions[key]])
    return markdown_table(["module", "to the expert, %", "of padding, %", "became"], rows)


def _rates_table(rows: list[tuple[str, dict[str, Any]]], code: str) -> str:
    """Error rates in percent, as a Markdown table."""
    cells = [[name, *rate_cells(rates, code)] for name, rates in rows]
    return markdown_table(["model", "WER %", "CER %"], cells)
