"""Checks of an adapter's `adapter_model.safetensors`."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..tuner.adapter_names import short_repr
from ..tuner.config import CLSRConfig

MAX_HEADER_BYTES = 16 * 2**20  # whisper-large has 100 kB
PREFIX = "base_model.model."

_ADAPTER_KEY = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+)\.clsr_(?P<part>gate_in|gate_out|expert|expert_A|expert_B)\.(?P<kind>weight|bias)"
)


def weights_path(folder: Path) -> Path:
    """The safetensors file in an adapter's folder. Raises a `ValueError` if there is none, or only a pickle."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        found = f"only {WEIGHTS_NAME}, a pickle, which can run code" if (folder / WEIGHTS_NAME).exists() else "none"
        raise ValueError(
            f"the weights of the CLSR adapter in {folder} are expected in {SAFETENSORS_WEIGHTS_NAME}, but there is "
            f"{found}: ask its author to save it again with save_pretrained()"
        )
    return path


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """
    Shapes of the tensors in a safetensors file, by name.

    Raises:
        ValueError: the file is truncated or damaged, or a tensor is not floating point.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if not 0 < header_size <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{path} has {size} bytes and a header of {header_size}, expected at most {MAX_HEADER_BYTES} and no more "
            "than the file has: it is truncated or no safetensors file, get it again"
        )
    shapes = {}
    try:  # safetensors checks the header: sizes, and offsets without holes or overlaps up to the end of the file
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():
                view = file.get_slice(name)
                if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"tensor {short_repr(name)} in {path} is of type {view.get_dtype()}, expected floating point "
                        "(F64, F32, F16, BF16): do not load this adapter"
                    )
                shapes[name] = torch.Size(view.get_shape())
    except (SafetensorError, OverflowError) as error:
        raise ValueError(f"{path} is no valid safetensors file ({error}): get it again") from error
    return shapes


def check_finite(path: Path) -> None:
    """Raise a `ValueError` if a tensor in a safetensors file has NaN or infinite values."""
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():
            if not file.get_tensor(name).isfinite().all():
                raise ValueError(
                    f"tensor {name!r} in {path} has values that are NaN or infinite: do not load this adapter"
                )


def check_parts(shapes: dict[str, torch.Size], config: CLSRConfig, path: Path) -> None:
    """
    Check, without a model, that a file has one gate and the expert of each FFN, of fitting sizes, and nothing else.

    Raises:
        ValueError: a tensor is missing, has another shape, or belongs to neither a gate, an expert nor
            `modules_to_save`.
    """
    ffns: dict[str, dict[str, dict[str, torch.Size]]] = {}  # parent → projection → "expert.weight" → shape
    for key, shape in shapes.items():
        match = _ADAPTER_KEY.fullmatch(key)
        if match:
            parent, _, projection = match["module"].rpartition(".")
            parts = ffns.setdefault(parent, {}).setdefault(projection, {})
            parts[f"{match['part']}.{match['kind']}"] = shape
        elif not any(f"{name}." in key for name in config.modules_to_save or ()):  # PEFT matches ends of names too
            # PEFT would overwrite the base model's tensor of that name.
            raise ValueError(
                f"tensor {short_repr(key)} in {path} is neither of a gate nor of an expert, nor of "
                f"modules_to_save={config.modules_to_save}: an adapter brings no weights of the base model, do not "
                "load it"
            )
    if not ffns:
        raise ValueError(f"{path} has neither gates nor experts: do not load it")
    for parent, projections in ffns.items():
        if not _is_ffn(projections, config):
            found = {name: {part: tuple(s) for part, s in parts.items()} for name, parts in projections.items()}
            raise ValueError(
                f"the tensors for {parent!r} in {path} are not the expert and the gate of an FFN with "
                f"gate_dim={config.gate_dim} and expert_rank={config.expert_rank}, as the config has it: "
                f"{short_repr(found)}. Do not load this adapter"
            )


def _is_ffn(projections: dict[str, dict[str, torch.Size]], config: CLSRConfig) -> bool:
    """True if the tensors of some projections make up one gate and one expert. Shapes are by projection and part."""
    gate_dim, rank = config.gate_dim, config.expert_rank
    gates = [name for name, parts in projections.items() if any(part.startswith("gate") for part in parts)]
    if len(gates) != 1:
        return False
    sizes = {}  # (out, in) of each projection
    for name, parts in projections.items():
        first, last = ("expert.weight",) * 2 if rank is None else ("expert_B.weight", "expert_A.weight")
        if any(len(parts.get(part, ())) != 2 for part in (first, last)):
            return False
        out_features, in_features = sizes[name] = parts[first][0], parts[last][1]
        expected = {"expert.weight": (out_features, in_features)}
        if rank is not None:
            expected = {"expert_A.weight": (rank, in_features), "expert_B.weight": (out_features, rank)}
        elif "expert.bias" in parts:
            expected["expert.bias"] = (out_features,)
        if name in gates:
            gate = {"gate_in.weight": (gate_dim, in_features), "gate_in.bias": (gate_dim,)}
            expected |= gate | {"gate_out.weight": (1, gate_dim)}
        if parts != expected:
            return False
    # The gate is on an input projection. All input projections have one size, and one output projection follows.
    gated = sizes.pop(gates[0])
    return any(
        output[1] == gated[0] and all(size == gated for other, size in sizes.items() if other != name)
        for name, output in sizes.items()
    )


def check_shapes(shapes: dict[str, torch.Size], expected: dict[str, torch.Size], path: Path) -> None:
    """Raise a `ValueError` if names or shapes of the tensors in a file are not the expected ones."""
    for key in chain(shapes, expected):
        found, wanted = shapes.get(key), expected.get(key)
        if found != wanted:
            found, wanted = (list(shape) if shape is not None else "nothing" for shape in (found, wanted))
            raise ValueError(
                f"tensor {short_repr(key)} in {path} has the shape {found}, expected {wanted}: the adapter does not "
                "fit the model; take the base model that it was trained for, and its own config"
            )
