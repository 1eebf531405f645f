"""
Export a language expert to CTranslate2: freeze its routing, convert, and check the result in faster-whisper.

    python examples/export_ctranslate2.py --base openai/whisper-base --adapter runs/ca/ca --language ca \
        --dataset my_recordings --output_dir exports/ca

`--adapter` is the folder of an adapter, or a repository of languages on the Hub. The dataset is given as for
train_distilwhisper.py; its split decides what is frozen, and all error rates are measured on it. `output_dir` gets two
folders: `whisper`, for transformers, and `ctranslate2`, for faster-whisper. All of it is in docs/export.md.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ctranslate2.converters import TransformersConverter
from faster_whisper import WhisperModel
from peft import PeftModel
from tqdm import tqdm
from train_distilwhisper import ScriptArguments, load_recordings
from transformers import HfArgumentParser, WhisperForConditionalGeneration, WhisperProcessor

from peft_clsr import (
    CLSRConfig,
    FrozenRouting,
    adapter_of_language,
    error_rates,
    freeze_routing,
    language_code,
    load_language,
    prepare_dataset,
    read_audio,
    set_audio_context,
    transcribe,
)

PROMPT_TOKENS = 4
MAX_NEW_TOKENS = 224  # faster-whisper allows the decoder's 448 positions, of which CTranslate2 takes half


@dataclass
class ExportArguments:
    """What to export, and what to measure it on."""

    base: str = field(metadata={"help": "The Whisper that the adapter was trained on: Hub id or folder."})
    adapter: str = field(metadata={"help": "Folder of the adapter, or a repository of languages on the Hub."})
    language: str = field(metadata={"help": "Code or English name of the language."})
    dataset: str = field(metadata={"help": "Hub id, or a folder with test/metadata.csv."})
    output_dir: str = field(metadata={"help": "Folder to make."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration on the Hub (ca_es)."})
    split: str = field(default="test", metadata={"help": "Split to use."})
    audio_column: str = field(default="audio", metadata={"help": "Column of the audio (Hub datasets)."})
    text_column: str = field(default="transcription", metadata={"help": "Column of the transcripts."})
    max_samples: int | None = field(default=None, metadata={"help": "Use the first so many only."})
    threshold: float = field(default=0.95, metadata={"help": "Share of tokens at which a module is decided."})
    undecided: str = field(
        default="loss",
        metadata={"help": "What becomes of other modules: by their 'loss', by 'majority', or 'routed'."},
    )
    full_context: bool = field(
        default=False, metadata={"help": "Give the model its 30 s back, where the adapter was trained at less."}
    )
    max_new_tokens: int = field(default=200, metadata={"help": "Longest transcript in tokens, at most 224."})
    batch_size: int = field(default=8, metadata={"help": "Utterances at a time."})
    quantization: str = field(default="float32", metadata={"help": "Of CTranslate2: float32, float16, int8, ..."})


class ShortContextWhisper(WhisperModel):
    """faster-whisper for a model whose context was cut: it pads all features to 30 s, which such a model refuses."""

    def encode(self, features: np.ndarray) -> Any:
        return super().encode(features[..., : self.feature_extractor.nb_max_frames])


def main() -> None:
    parser = HfArgumentParser(ExportArguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    (arguments,) = parser.parse_args_into_dataclasses()
    try:
        status = export(arguments)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    sys.exit(status)


def export(arguments: ExportArguments) -> int:
    """Freeze, convert, check, and print what was found; returns the exit status, 1 where a module is left routed."""
    code = language_code(arguments.language)
    output_dir = Path(arguments.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"--output_dir {output_dir} is not an empty folder: give another one, or remove it")
    if not 1 <= arguments.max_new_tokens <= MAX_NEW_TOKENS:
        raise ValueError(
            f"--max_new_tokens is {arguments.max_new_tokens}, expected 1 to {MAX_NEW_TOKENS}, what CTranslate2 allows"
        )
    raw = load_recordings(
        ScriptArguments(
            student=arguments.base,
            dataset=arguments.dataset,
            languages=[code],
            audio_column=arguments.audio_column,
            text_column=arguments.text_column,
        ),
        code,
        arguments.dataset_config,
        arguments.split,
        arguments.max_samples,
    )
    model = load_model(arguments, code)
    adapter_of_language(model.peft_config, code)  # raises here, not after features were computed
    processor = WhisperProcessor.from_pretrained(arguments.base)
    seconds = model.config.max_source_positions / 50
    set_audio_context(None, processor, seconds)
    columns = {"audio_column": arguments.audio_column, "text_column": arguments.text_column}
    dataset, _ = prepare_dataset(raw, processor, code, **columns)

    frozen = freeze_routing(
        model,
        code,
        dataset=dataset,
        processor=processor,
        threshold=arguments.threshold,
        undecided=arguments.undecided,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(modules_table(frozen) + "\n")
    rows = [("with the expert, routed", frozen.before), ("frozen", frozen.after)]
    left = list(frozen.decisions.values()).count("routed")
    if left:
        print(rates_table(rows))
        print(
            f"{left} of {len(frozen.decisions)} modules are left routed, which CTranslate2 does not know; nothing was "
            "written. --undecided loss decides them all"
        )
        return 1

    whisper_dir, converted_dir = output_dir / "whisper", output_dir / "ctranslate2"
    frozen.model.save_pretrained(whisper_dir)
    processor.save_pretrained(whisper_dir)
    processor.feature_extractor.save_pretrained(whisper_dir)  # faster-whisper reads the context and mel bins there
    converter = TransformersConverter(str(whisper_dir), copy_files=["tokenizer.json", "preprocessor_config.json"])
    converter.convert(str(converted_dir), quantization=arguments.quantization)

    again = WhisperForConditionalGeneration.from_pretrained(whisper_dir, dtype=torch.float32)
    heard = transcribe(
        again, processor, dataset, code, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens
    )
    audio = [read_audio(one, 16000) for one in raw.select(dataset["index"])[arguments.audio_column]]
    converted = hear(converted_dir, code, audio, arguments.max_new_tokens)
    rates = error_rates(converted, dataset["text"], language=code)[code]
    rows.append((f"frozen, faster-whisper {arguments.quantization}", rates))
    print(rates_table(rows))
    equal = sum(one == other for one, other in zip(converted, heard, strict=True))
    print(f"{equal} of {len(heard)} transcripts of faster-whisper are those of transformers, to the letter")
    print(f"for transformers: {whisper_dir}; for faster-whisper: {converted_dir}, context {seconds:g} s")
    return 0


def load_model(arguments: ExportArguments, code: str) -> PeftModel:
    """The base model with the adapter, in float32."""
    base = WhisperForConditionalGeneration.from_pretrained(arguments.base, dtype=torch.float32)
    if not Path(arguments.adapter).is_dir():
        if arguments.full_context:
            raise ValueError("--full_context needs the adapter in a folder: download it, and give the folder")
        return load_language(base, arguments.adapter, code)
    config = CLSRConfig.from_pretrained(arguments.adapter)
    if arguments.full_context:
        config.max_audio_seconds = None
    return PeftModel.from_pretrained(base, arguments.adapter, adapter_name=config.language or code, config=config)


def hear(folder: Path, code: str, audio: list[np.ndarray], max_new_tokens: int) -> list[str]:
    """What faster-whisper hears in recordings [samples] of 16 kHz, greedily as `transcribe` does."""
    whisper = ShortContextWhisper(str(folder))
    texts = []
    for samples in tqdm(audio, desc="faster-whisper", unit="utt"):
        # faster-whisper pads features, with zeros; transformers pads the audio, with silence, as in training.
        samples = np.pad(samples, (0, max(0, whisper.feature_extractor.n_samples - len(samples))))
        segments, _ = whisper.transcribe(
            samples,
            language=code,
            beam_size=1,
            temperature=0,  # one attempt, whatever the thresholds below say of it
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
            condition_on_previous_text=False,
            without_timestamps=True,
            max_new_tokens=2 * max_new_tokens - PROMPT_TOKENS,  # CTranslate2 halves what it is told, with the prompt
        )
        texts.append("".join(segment.text for segment in segments).strip())
    return texts


def modules_table(frozen: FrozenRouting) -> str:
    """What each module became, and why, as a Markdown table."""
    lines = ["| module | to the expert, % | of padding, % | became |", "|---|---|---|---|"]
    for key, share in frozen.shares.items():
        padding = f"{100 * frozen.padding_shares[key]:.1f}" if key in frozen.padding_shares else ""
        lines.append(f"| {key} | {100 * share:.1f} | {padding} | {frozen.decisions[key]} |")
    return "\n".join(lines)


def rates_table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Error rates in percent, as a Markdown table."""
    lines = ["| model | WER % | CER % |", "|---|---|---|"]
    lines += [f"| {name} | {100 * rates['wer']:.1f} | {100 * rates['cer']:.1f} |" for name, rates in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
