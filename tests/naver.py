"""Checkpoints in the layout of the reference implementation."""

import torch


def checkpoint_of(model, language="catalan", gate_dim=6, scale=0.3, seed=0):
    """A random checkpoint in the layout of the reference implementation, of a Whisper's sizes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for side in ("encoder", "decoder"):
        for index, layer in enumerate(getattr(model.model, side).layers):
            hidden_size, ffn_size = layer.fc1.in_features, layer.fc1.out_features
            shapes = {
                f"gate_in.{language}.weight": (gate_dim, hidden_size),
                f"gate_in.{language}.bias": (gate_dim,),
                f"gate_out.{language}.weight": (1, gate_dim),
                f"proj.{language}.fc1.weight": (ffn_size, hidden_size),
                f"proj.{language}.fc1.bias": (ffn_size,),
                f"proj.{language}.fc2.weight": (hidden_size, ffn_size),
                f"proj.{language}.fc2.bias": (hidden_size,),
            }
            for name, shape in shapes.items():
                key = f"model.{side}.layers.{index}.ffn_clsr.{name}"
                tensors[key] = torch.randn(shape, generator=generator) * scale
    return tensors
