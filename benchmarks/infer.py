"""
Time inference: plain Whisper, CLSR with 0, 50 and 100 % of tokens sent to the expert, LoRA, and both paths computed.

    make bench-infer
    python -m benchmarks.infer --model openai/whisper-base --adapters runs/demo-ro/ro --rounds 20 --output results.json

All models share the base's weights. Each round runs every method once, in random order, so that other load on the
machine affects all alike; compare the ratios to the base within a round. Experts are copies of the shared FFNs, so all
methods but trained adapters generate the same tokens on either path. "Both paths" computes the shared FFN and the
expert for every token, as the reference implementation of the method does.

A dataset is a folder with OGG recordings in `test/`.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import WhisperForConditionalGeneration, WhisperProcessor
from transformers.utils import logging

from peft_clsr import CLSRConfig, CLSRLayer, read_audio
from peft_clsr.files import to_json
from peft_clsr.tuner.layer import InputLinear

from .timing import MILLION, add_clock_argument, check_bound, format_bound, format_ratio, machine, ratio, time_steps

BASE, LORA, BOTH = "base", "LoRA, rank 32", "both paths, 50 %"
FULL, LOW_RANK, LANGUAGES = "CLSR, {}", "CLSR, rank 32, {}", "CLSR, 8 languages, 50 %"
SHARES = {"0 %": 0.0, "50 %": 0.5, "100 %": 1.0}
CODES = ["ro", "ca", "bg", "el", "be", "uk", "cs", "sk"]
ENCODER, GENERATION = "encoder", "generation"
# Expected maximum of the ratio to the base's time, for methods with one language.
AT_MOST = {ENCODER: 1.03, GENERATION: 1.08}


@dataclass
class Method:
    model: nn.Module
    languages: str | list[str] = "ro"  # language of the batch, or of each sample

    @torch.inference_mode()
    def encode(self, features: torch.Tensor) -> torch.Tensor:
        encoder = self.model.get_encoder()
        if isinstance(self.languages, str):
            return encoder(features).last_hidden_state
        with self.model.base_model.route_samples(self.languages[: len(features)]):
            return encoder(features).last_hidden_state

    @torch.inference_mode()
    def generate(self, features: torch.Tensor, new_tokens: int) -> torch.Tensor:
        languages = self.languages if isinstance(self.languages, str) else self.languages[: len(features)]
        options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        options["force_unique_generate_call"] = True  # or a timestamp token would start another window
        return self.model.generate(input_features=features, language=languages, task="transcribe", **options)


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that shares its weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@torch.inference_mode()
def set_gate_shares(model: PeftModel, share: float, inputs: dict[str, torch.Tensor]) -> None:
    """
    Set the gates of the active adapter so that each sends this share of its tokens to the expert: those on one side of
    a plane. Experts must be copies of the shared FFNs, so that later inputs are those seen here.
    """

    def set_gate(module: InputLinear, args: tuple[torch.Tensor]) -> None:
        (name,) = module.active_adapters
        gate_in, gate_out = module.clsr_gate_in[name], module.clsr_gate_out[name]
        x = args[0].flatten(0, -2).float()
        direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x)
        heights = x @ direction
        # Two hidden units of the gate give, after ReLU, a token's height above the plane and its depth below it.
        nn.init.zeros_(gate_out.weight)
        for unit, side in enumerate((1.0, -1.0)):
            gate_in.weight[unit], gate_in.bias[unit] = side * direction, -side * heights.quantile(1 - share)
            gate_out.weight[0, unit] = side if 0 < share < 1 else 2 * share - 1

    modules = [module for module in model.modules() if isinstance(module, InputLinear)]
    hooks = [module.register_forward_pre_hook(set_gate) for module in modules]
    model(**inputs)
    for hook in hooks:
        hook.remove()


def gate_share(method: Method, features: torch.Tensor) -> float | None:
    """The share of the encoder's tokens that go to the expert. `None` for methods without gates."""
    if not any(isinstance(module, CLSRLayer) for module in method.model.modules()):
        return None
    with method.model.base_model.record_gates() as gates:
        method.encode(features)
    return torch.stack([values.mean() for values in gates.values()]).mean().item()


def build_methods(
    base: WhisperForConditionalGeneration, adapters: list[str], inputs: dict[str, torch.Tensor]
) -> dict[str, Method]:
    """The methods to time, by name."""

    def clsr(share: float, names: list[str], **config: Any) -> PeftModel:
        model = get_peft_model(sharing_weights(base), CLSRConfig.paper(**config), names[0])
        for name in names:
            if name != names[0]:
                model.add_adapter(name, CLSRConfig.paper(**config))
            model.set_adapter(name)
            set_gate_shares(model.eval(), share, inputs)
        return model

    methods = {BASE: Method(base)}
    for label, rank in ((FULL, None), (LOW_RANK, 32)):
        for share, value in SHARES.items():
            methods[label.format(share)] = Method(clsr(value, CODES[:1], expert_rank=rank))
    methods[LANGUAGES] = Method(clsr(0.5, CODES), CODES)
    for folder in adapters:
        config = CLSRConfig.from_pretrained(folder)
        config.max_audio_seconds = None  # all methods have the same context here
        language = config.language or Path(folder).name
        model = PeftModel.from_pretrained(sharing_weights(base), folder, language, config=config)
        methods[f"CLSR, trained, {folder}"] = Method(model.eval(), language)
    lora = LoraConfig(r=32, target_modules=["fc1", "fc2"])
    methods[LORA] = Method(get_peft_model(sharing_weights(base), lora).eval())
    # In training mode a layer computes both paths. Only CLSR layers are in this mode, and nothing random is left.
    methods[BOTH] = Method(clsr(0.5, CODES[:1], gate_dropout=0.0, skip_gate_prob=0.0, expert_dropout=0.0))
    for module in methods[BOTH].model.modules():
        if isinstance(module, CLSRLayer):
            module.train()
    return methods


def seconds_of(run: Callable[[], Any], times: int = 5) -> float:
    """The median time of a run, in seconds."""
    return float(np.median(time_steps({"run": run}, times)["run"]))


def measure_languages(method: Method, features: torch.Tensor) -> dict[str, float]:
    """The cost of many languages on one model, in bytes and seconds."""
    model, code = method.model, CODES[-1]
    alone = Method(model, [code] * len(features))

    def use_after_offload() -> None:
        model.base_model.offload(code)
        alone.encode(features)

    def size(name: str) -> int:
        return sum(
            p.numel() * p.element_size() for key, p in model.named_parameters() if (".clsr_" in key) == (name != BASE)
        )

    return {
        "languages": len(CODES),
        "base_bytes": size(BASE),
        "adapter_bytes": size(LANGUAGES) // len(CODES),
        "set_adapter_seconds": seconds_of(lambda: model.set_adapter(code)),
        "encoder_seconds": seconds_of(lambda: alone.encode(features)),
        "encoder_after_offload_seconds": seconds_of(use_after_offload),
    }


def format_results(results: dict[str, Any]) -> str:
    """Tables in Markdown."""
    workloads = list(results["methods"][BASE]["workloads"])
    lines = [
        ", ".join(f"{name} {value}" for name, value in (results["machine"] | results["settings"]).items()),
        "",
        f"| method | to the expert | {' | '.join(workloads)} |",
        "|---|---|" + "---|" * len(workloads),
    ]
    for name, row in results["methods"].items():
        share = "" if row["expert_share"] is None else f"{row['expert_share']:.0%}"
        cells = [
            f"{row['workloads'][workload]['seconds']:.2f} s"
            if name == BASE
            else format_ratio(row["workloads"][workload])
            for workload in workloads
        ]
        lines.append(f"| {name} | {share} | {' | '.join(cells)} |")
    if results["languages"] is not None:
        there = results["languages"]
        base, adapter = (there[name] / MILLION for name in ("base_bytes", "adapter_bytes"))
        lines += [
            "",
            f"{there['languages']} languages: the base {base:,.0f} MB, once, and {adapter:,.0f} MB each; set_adapter "
            f"{1e3 * there['set_adapter_seconds']:.1f} ms; one recording through the encoder "
            f"{there['encoder_seconds']:.3f} s, right after offload {there['encoder_after_offload_seconds']:.3f} s",
        ]
    broken = [bound for bound in results["bounds"] if not bound["holds"]]
    lines += [
        "",
        f"{len(results['bounds']) - len(broken)} of {len(results['bounds'])} bounds hold",
        *map(format_bound, broken),
    ]
    return "\n".join(lines)


def check_bounds(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Checks that every method with one language is about as fast as the base, and faster than LoRA."""
    bounds = []
    for name, row in results["methods"].items():
        if not name.startswith("CLSR") or name == LANGUAGES:
            continue
        for workload, at_most in ((key, AT_MOST[key.split(",")[0]]) for key in row["workloads"]):
            for reference, limit in ((BASE, at_most), (LORA, 1.0)):
                value = row["workloads"][workload]["median" if reference == BASE else "to_lora"]
                bounds.append({"workload": workload, **check_bound(value, name, reference, limit)})
    return bounds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default=".cache/whisper-base", help="Whisper: folder or Hub id")
    parser.add_argument("--dataset", default=".cache/tuxpaint-ro", help="folder of recordings")
    parser.add_argument("--adapters", nargs="*", default=[], help="folders of trained adapters to time as well")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="recordings at a time, 8 at most")
    parser.add_argument("--new_tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each method")
    parser.add_argument("--workloads", nargs="+", default=[ENCODER, GENERATION], choices=[ENCODER, GENERATION])
    parser.add_argument("--methods", nargs="+", help="only the base, LoRA and methods that contain one of these words")
    parser.add_argument(
        "--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", help="dtype of all weights"
    )
    parser.add_argument("--compile", action="store_true", help="compile the forward of encoder and decoder")
    add_clock_argument(parser)
    parser.add_argument("--output", type=Path, default=Path("results/infer.json"), help="where results are written")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, arguments.dtype)

    processor = WhisperProcessor.from_pretrained(arguments.model)
    base = WhisperForConditionalGeneration.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    files = sorted(Path(arguments.dataset, "test").glob("*.ogg"))[: max(arguments.batch_sizes)]
    if len(files) < max(arguments.batch_sizes):
        raise SystemExit(f"{arguments.dataset}/test has {len(files)} OGG files, --batch_sizes asks for more")
    audio = [read_audio(file) for file in files]
    features = processor(audio, sampling_rate=16_000, return_tensors="pt").input_features.to(device, dtype)
    tokens = torch.randint(0, 50_000, (len(features), arguments.new_tokens), device=device)
    methods = build_methods(base, arguments.adapters, {"input_features": features, "decoder_input_ids": tokens})
    if arguments.methods:
        wanted = (BASE, LORA, *arguments.methods)
        methods = {name: method for name, method in methods.items() if any(word in name for word in wanted)}
    shares = {name: gate_share(method, features) for name, method in methods.items()}
    if arguments.compile:
        for method in methods.values():
            for module in (method.model.get_encoder(), method.model.get_decoder()):
                module.compile(fullgraph=True)

    workloads: dict[str, Callable[[Method], Any]] = {}
    if ENCODER in arguments.workloads:
        workloads[f"{ENCODER}, batch {len(features)}"] = lambda method: method.encode(features)
    if GENERATION in arguments.workloads:
        for size in sorted(arguments.batch_sizes):
            workloads[f"{GENERATION}, batch {size}"] = lambda method, size=size: method.generate(
                features[:size], arguments.new_tokens
            )
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = {name: {"expert_share": shares[name], "workloads": {}} for name in methods}
    for workload, run in workloads.items():
        steps = {name: lambda method=method, run=run: run(method) for name, method in methods.items()}
        time_steps(steps, 1, desc="warm-up")
        seconds = time_steps(steps, arguments.rounds, clock, desc=workload)
        for name, row in rows.items():
            row["workloads"][workload] = {
                "seconds": float(np.median(seconds[name])),
                **ratio(seconds, name, BASE),
                "to_lora": ratio(seconds, name, LORA)["median"],
                "all_seconds": seconds[name],
            }

    results = {
        "machine": machine(arguments.dtype),
        "settings": {
            "model": arguments.model,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "clock": "CPU time" if arguments.cpu_time else "wall",
            "compiled": arguments.compile,
        },
        "methods": rows,
        "languages": measure_languages(methods[LANGUAGES], features[:1]) if LANGUAGES in methods else None,
    }
    results["bounds"] = check_bounds(results)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(to_json(results), encoding="utf-8")
    print(format_results(results))
    print(f"results: {arguments.output}")


if __name__ == "__main__":
    main()
