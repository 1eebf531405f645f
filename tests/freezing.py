"""Shared by tests of exports: Whispers whose gates decide as told, recordings, and what a call could change."""

import copy

import datasets
import numpy as np
import torch

from peft_clsr import CLSRLayer

MODULES = [f"model.{side}.layers.{layer}.fc1" for side in ("encoder", "decoder") for layer in (0, 1)]
EXPERT, SHARED, MIXED = "expert", "shared", "mixed"
GATES_SEED = 59  # one that gives mixed gates shares well inside of (0.05, 0.95)
TEXTS = ["bon dia", "una flor", "el gat"]


def recordings(texts=TEXTS):
    """Noise of unequal lengths up to a second, with transcripts."""
    generator = np.random.default_rng(0)
    items = [
        {"audio": {"array": generator.normal(0, 0.1, 16000 - 3000 * i), "sampling_rate": 16000}, "transcription": text}
        for i, text in enumerate(texts)
    ]
    return datasets.Dataset.from_list(items)


@torch.no_grad()
def set_gates(model, gates):
    """Random experts for all adapters, and gates that are constant or decide by what they see."""
    generator, gate_generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(GATES_SEED)
    directions = {key: torch.randn(1, 16, generator=gate_generator) for key in MODULES}
    for key, layer in model.get_base_model().named_modules():
        if not isinstance(layer, CLSRLayer):
            continue
        for name in ("clsr_expert", "clsr_expert_A", "clsr_expert_B"):
            for parameter in getattr(layer, name).parameters():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for name, gate_in in layer.clsr_gate_in.items():
            gate_out = layer.clsr_gate_out[name]
            if gates[key] == MIXED:
                gate_in.weight.copy_(torch.cat([directions[key], -directions[key]] * 4))  # 4 times x along it
                gate_out.weight.copy_(torch.tensor([[1.0, -1] * 4]))
            else:
                gate_in.weight.zero_()
                gate_in.bias.fill_(1)
                gate_out.weight.fill_(1 if gates[key] == EXPERT else -1)


@torch.no_grad()
def logits_of(model, dataset, dtype=torch.float32):
    features = dataset["input_features"][:].to(dtype)
    return model(input_features=features, decoder_input_ids=torch.tensor([[257, 259, 97, 98]] * len(features))).logits


def state_of(model):
    """All that a call could change: weights, hooks' numbers, modes, what is active, configs."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "trained": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
        "active": {
            name: (module.active_adapters, module.disable_adapters)
            for name, module in model.named_modules()
            if isinstance(module, CLSRLayer)
        },
        "configs": copy.deepcopy(model.peft_config),
        "config": model.config.to_dict(),
        "name": model.get_base_model().name_or_path,
    }


def assert_same_state(model, before):
    after = state_of(model)
    weights = before.pop("weights")
    assert after["weights"].keys() == weights.keys()
    assert all(torch.equal(after["weights"][name], tensor) for name, tensor in weights.items())
    for name, value in before.items():
        assert after[name] == value, name
