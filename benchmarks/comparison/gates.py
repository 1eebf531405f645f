"""Gates of trained runs: their logits, and the error rates of the same weights without them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding, evaluation_mode, transcribe

from .experiment import EVAL_BATCH, MAX_NEW_TOKENS, Setup, count_errors, load_run, load_split
from .runs import Run
from .speech import OUT_OF_DOMAIN


def measure_gates(run: Run, setup: Setup) -> str:
    """
    Measure the gates of a routed run on the splits "test" and "out_of_domain", and add to its results:
    - "gate_logits": mean and standard deviation over the tokens of the test split, by module;
    - "without_gates": errors by split with all tokens sent to the expert, and with a random half of them.

    Raises:
        ValueError: see `load_run`.
    """
    results, model, processor = load_run(run, setup, run.audio_seconds)
    gates = {name: module for name, module in model.named_modules() if name.endswith(f"clsr_gate_out.{run.language}")}
    datasets = {split: load_split(setup, run.language, split, processor) for split in ("test", OUT_OF_DOMAIN)}
    logits = gate_logits(model, gates, datasets["test"], DataCollatorSpeechSeq2SeqWithPadding(processor))

    without_gates: dict[str, dict[str, Any]] = {}
    for name, replacement in (("all to the expert", torch.zeros_like), ("half at random", torch.randn_like)):
        hooks = [
            gate.register_forward_hook(lambda module, args, output, replacement=replacement: replacement(output))
            for gate in gates.values()
        ]
        without_gates[name] = {}
        for split, dataset in datasets.items():
            transcripts = transcribe(
                model, processor, dataset, run.language, batch_size=EVAL_BATCH, max_new_tokens=MAX_NEW_TOKENS
            )
            without_gates[name][split] = count_errors(transcripts, dataset["text"], run.language)
        for hook in hooks:
            hook.remove()
    setup.store.write(run, results | {"gate_logits": logits, "without_gates": without_gates})
    rates = ", ".join(f"{name} {rates['test']['wer']:.1%}" for name, rates in without_gates.items())
    return f"{run.name}: WER test {results['evaluations']['test']['wer']:.1%}, {rates}"


@torch.inference_mode()
def gate_logits(model: nn.Module, gates: dict[str, nn.Module], dataset: Any, collator: Any) -> dict[str, Any]:
    """Mean and standard deviation of each gate's logits over a dataset, with teacher forcing and without padding."""
    kept: dict[str, list[torch.Tensor]] = defaultdict(list)
    masks: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device

    def keep(name: str, output: torch.Tensor) -> None:
        kept[name].append(output.squeeze(-1)[masks["decoder" if "decoder" in name else "encoder"]])

    hooks = [
        gate.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, gate in gates.items()
    ]
    with evaluation_mode(model):
        for batch in DataLoader(dataset, batch_size=EVAL_BATCH, collate_fn=collator):
            batch = {name: batch[name].to(device) for name in ("input_features", "attention_mask", "labels")}
            masks["decoder"] = batch["labels"] != -100
            masks["encoder"] = batch["attention_mask"][:, ::2].bool()  # the second convolution has stride 2
            model(input_features=batch["input_features"], labels=batch["labels"])
    for hook in hooks:
        hook.remove()
    tokens = {name: torch.cat(parts) for name, parts in kept.items()}
    return {
        name.removeprefix("base_model.model.").rpartition(".clsr_gate_out")[0]: {
            "mean": round(logits.mean().item(), 4),
            "std": round(logits.std().item(), 4),
        }
        for name, logits in tokens.items()
    }
