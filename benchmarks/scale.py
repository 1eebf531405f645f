"""
Measure the pieces of docs/explanation/scale.md: a service of many languages on a Whisper of any size.

    python -m benchmarks.scale                        # the shape of whisper-large-v3, random weights: 8 GB of memory
    python -m benchmarks.scale --layers 6 --width 512 --heads 8 --mel_bins 80    # of whisper-base

Weights are random, as time and memory depend on shapes alone. It prints the size of an expert, in files and in memory;
how long a running model takes to load one and to release it; and how long one more token takes a batch of one, two and
so on languages, beside the base model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
from peft import PeftModel, get_peft_model
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from benchmarks.timing import format_ratio, ratio, time_steps
from peft_clsr import CLSRConfig

LANGUAGES = ["ro", "ca", "bg", "el", "be", "uk", "cs", "sk"]
PAST = 100  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the encoder, and of the decoder")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--mel_bins", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32, help="of the experts")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16", help="of the base")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    dtype = getattr(torch, arguments.dtype)
    base = random_whisper(arguments, dtype)
    print(f"base: {size(base) / 1e9:.2f} GB in {arguments.dtype}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_expert(base, arguments.rank, folder)
        files = (folder / LANGUAGES[0] / "adapter_model.safetensors").stat().st_size
        before = size(base)
        precision = {"autocast_adapter_dtype": False}  # that of the base, as in the service
        model = PeftModel.from_pretrained(base, folder / LANGUAGES[0], LANGUAGES[0], **precision).eval()
        print(f"expert of rank {arguments.rank}: {files / 1e6:.0f} MB in a file, ", end="")
        print(f"{(size(model) - before) / 1e6:.0f} MB in memory", flush=True)
        loading, releasing = [], []
        for language in LANGUAGES[1:]:
            copy_expert(folder, language)
            start = time.perf_counter()
            model.load_adapter(folder / language, language, **precision)
            loading.append(time.perf_counter() - start)
        resident = psutil.Process().memory_info().rss
        print(f"loading one into a running model: {np.median(loading):.2f} s (median of {len(loading)})")
        print(f"memory of the process with {len(LANGUAGES)} experts: {resident / 1e9:.2f} GB", flush=True)
        time_tokens(model, arguments, dtype)
        for language in LANGUAGES[1:]:
            start = time.perf_counter()
            model.delete_adapter(language)
            releasing.append(time.perf_counter() - start)
        print(f"releasing one: {np.median(releasing):.3f} s")


def random_whisper(arguments: argparse.Namespace, dtype: torch.dtype) -> WhisperForConditionalGeneration:
    config = WhisperConfig(
        vocab_size=51866,
        num_mel_bins=arguments.mel_bins,
        d_model=arguments.width,
        encoder_layers=arguments.layers,
        decoder_layers=arguments.layers,
        encoder_attention_heads=arguments.heads,
        decoder_attention_heads=arguments.heads,
        encoder_ffn_dim=4 * arguments.width,
        decoder_ffn_dim=4 * arguments.width,
    )
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().uniform_(-0.02, 0.02)
    return model.eval()


def save_expert(base: WhisperForConditionalGeneration, rank: int, folder: Path) -> None:
    """Save an expert of the first language, and take it off the base again."""
    model = get_peft_model(base, CLSRConfig(language=LANGUAGES[0], expert_rank=rank), adapter_name=LANGUAGES[0])
    for name, parameter in model.named_parameters():
        if f".{LANGUAGES[0]}." in name:
            parameter.detach().uniform_(-0.02, 0.02)  # gates decide both ways
    model.save_pretrained(folder)
    model.unload()


def copy_expert(folder: Path, language: str) -> None:
    """Write the expert of the first language again, as that of another one."""
    first, other = folder / LANGUAGES[0], folder / language
    other.mkdir()
    config = (first / "adapter_config.json").read_text(encoding="utf-8")
    config = config.replace(f'"language": "{LANGUAGES[0]}"', f'"language": "{language}"')
    (other / "adapter_config.json").write_text(config, encoding="utf-8")
    (other / "adapter_model.safetensors").symlink_to(first / "adapter_model.safetensors")


def size(model: torch.nn.Module) -> int:
    """Bytes of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


@torch.inference_mode()
def time_tokens(model: PeftModel, arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Print the time of one more token for a batch with one language, and with more of them."""
    batch = len(LANGUAGES)
    states = BaseModelOutput(torch.zeros(batch, 1500, arguments.width, dtype=dtype))
    prompt = torch.full((batch, PAST), 50)
    cache = model.get_base_model()(encoder_outputs=states, decoder_input_ids=prompt).past_key_values
    token = torch.full((batch, 1), 51)

    def step(names: list[str | None]) -> None:
        added = cache.get_seq_length() - PAST
        if added:
            cache.self_attention_cache.crop(-added)
        inputs = {"encoder_outputs": states, "decoder_input_ids": token, "past_key_values": cache}
        model(**inputs, adapter_names=["__base__" if name is None else name for name in names])

    steps = {"base": partial(step, [None] * batch)}
    for count in (1, 2, 4, 8):
        steps[str(count)] = partial(step, [LANGUAGES[index % count] for index in range(batch)])
    for run in steps.values():
        run()
    seconds = time_steps(steps, arguments.rounds)
    print(f"one more token for a batch of {batch}: {1000 * np.median(seconds['base']):.0f} ms on the base")
    for name in list(steps)[1:]:
        print(f"  with experts, languages in the batch: {name}: {format_ratio(ratio(seconds, name, 'base'))}")


if __name__ == "__main__":
    main()
