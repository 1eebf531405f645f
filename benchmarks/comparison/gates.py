"""What the gates of a trained run do: how sure they are, and what its weights are worth without them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.comparison.experiment import (
    EVAL_BATCH,
    MAX_NEW_TOKENS,
    Run,
    Workspace,
    count_errors,
    load_run,
    load_split,
)
from benchmarks.comparison.speech import OUT_OF_DOMAIN
from peft_clsr import DataCollatorSpeechSeq2SeqWithPadding, evaluation_mode, transcribe
from peft_clsr.whisper import module_side, position_mask


def measure_gates(run: Run, workspace: Workspace) -> str:
    """
    Measure the gates of a routed run on the splits test and out_of_domain, and add to its results:
    - "gate_logits": by module, mean and standard deviation over the tokens of the test split;
    - "without_gates": the errors by split where all tokens take the expert, and where chance gives it half of them.

    Raises:
        ValueError: as `load_run`.
    """
    results, model, processor = load_run(run, workspace, run.audio_seconds)
    gates = {name: module for name, module in model.named_modules() if name.endswith(f"clsr_gate_out.{run.language}")}
    datasets = {split: load_split(workspace, run.language, split, processor) for split in ("test", OUT_OF_DOMAIN)}
    logits = gate_logits(model, gates, datasets["test"], DataCollatorSpeechSeq2SeqWithPadding(processor))

    without_gates: dict[str, dict[str, Any]] = {}
    for name, replacement in (("all to the expert", torch.zeros_like), ("half at random", torch.randn_like)):
        hooks = [
            gate.register_forward_hook(lambda module, args, output, replacement=replacement: replacement(output))
            for gate in gates.values()
        ]
        without_gates[name] = {}
        for split, dataset in datasets.items():
            heard = transcribe(
                model, processor, dataset, run.language, batch_size=EVAL_BATCH, max_new_tokens=MAX_NEW_TOKENS
            )
            without_gates[name][split] = count_errors(heard, dataset["text"])
        for hook in hooks:
            hook.remove()
    workspace.write(run, results | {"gate_logits": logits, "without_gates": without_gates})
    rates = ", ".join(f"{name} {rates['test']['wer']:.1%}" for name, rates in without_gates.items())
    return f"{run.name}: WER test {results['evaluations']['test']['wer']:.1%}, {rates}"


@torch.inference_mode()
def gate_logits(model: nn.Module, gates: dict[str, nn.Module], dataset: Any, collator: Any) -> dict[str, Any]:
    """Mean and standard deviation of each gate's logits over a dataset, teacher-forced, padding left out."""
    values: dict[str, list[torch.Tensor]] = defaultdict(list)
    masks: dict[str, torch.Tensor] = {}
    device = next(model.parameters()).device

    def keep(name: str, output: torch.Tensor) -> None:
        values[name].append(output.squeeze(-1)[masks[module_side(name)]])

    hooks = [
        gate.register_forward_hook(lambda module, args, output, name=name: keep(name, output))
        for name, gate in gates.items()
    ]
    with evaluation_mode(model):
        for batch in DataLoader(dataset, batch_size=EVAL_BATCH, collate_fn=collator):
            batch = {name: batch[name].to(device) for name in ("input_features", "attention_mask", "labels")}
            masks["decoder"] = batch["labels"] != -100
            masks["encoder"] = position_mask(batch["attention_mask"]).bool()
            model(input_features=batch["input_features"], labels=batch["labels"])
    for hook in hooks:
        hook.remove()
    tokens = {name: torch.cat(parts) for name, parts in values.items()}
    return {
        name.removeprefix("base_model.model.").rpartition(".clsr_gate_out")[0]: {
            "mean": round(logits.mean().item(), 4),
            "std": round(logits.std().item(), 4),
        }
        for name, logits in tokens.items()
    }
