"""Checks of an adapter folder before anything of it reaches a model."""

from __future__ import annotations

import copy
import re
import reprlib
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import read_json
from ..tuner.config import CLSRConfig
from .config_checks import read_config

MAX_HEADER_BYTES = 16 * 2**20  # whisper-large has 100 kB
PREFIX = "base_model.model."

_ADAPTER_KEY = re.compile(
    re.escape(PREFIX)
    + r"(?P<module>.+)\.clsr_(?P<part>gate_in|gate_out|expert|expert_A|expert_B)\.(?P<kind>weight|bias)"
)
_short = reprlib.Repr()  # of values in errors, which may be megabytes
_short.maxstring = _short.maxother = 200


def check_adapter_folder(folder: str | Path, model: nn.Module | None = None) -> CLSRConfig:
    """
    Check a CLSR adapter before it is loaded: its config, and that its weights match the config.

    Every loader calls this itself ([`~peft.PeftModel.from_pretrained`], `load_adapter`, ...).

    Args:
        folder (`str` or `Path`): A folder with `adapter_config.json` and `adapter_model.safetensors`.
        model (`torch.nn.Module`, *optional*):
            The model for the adapter, a [`~peft.PeftModel`] or a base model. It is not changed.

    Returns:
        `CLSRConfig`: the adapter's.

    Raises:
        ValueError: the folder is no CLSR adapter, or one that must not be loaded. The message gives the reason.
    """
    config = _config_of(Path(folder))
    check_weights(folder, config, model)
    return config


def check_weights(folder: str | Path, config: CLSRConfig, model: nn.Module | None = None) -> None:
    """Raise a `ValueError` if the weights in a folder do not match `config`, or the adapter does not fit `model`."""
    path = weights_of(Path(folder))
    shapes = _shapes_in(path)
    _check_parts(shapes, config, path)
    if model is not None:
        _compare(shapes, _shapes_on_copy(model, config), path)
    _check_finite(path)


def check_weights_for(folder: str | Path, model: nn.Module, adapter_name: str) -> None:
    """Raise a `ValueError` if the weights in a folder cannot replace those of an adapter of `model`."""
    path = weights_of(Path(folder))
    _compare(_shapes_in(path), _adapter_shapes(model, adapter_name), path)
    _check_finite(path)


def weights_of(folder: Path) -> Path:
    """Return the weights file of a folder. Raise a `ValueError` if there is none, or only a pickle."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        found = f"only {WEIGHTS_NAME}, a pickle, which can run code" if (folder / WEIGHTS_NAME).exists() else "none"
        raise ValueError(
            f"the weights of the CLSR adapter in {folder} are expected in {SAFETENSORS_WEIGHTS_NAME}, but there is "
            f"{found}: ask its author to save it again with save_pretrained()"
        )
    return path


def _config_of(folder: Path) -> CLSRConfig:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}: give the folder of one adapter, such as 'experts/ca'")
    if read_config(path) is None:
        config = read_json(path)
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"peft_type in {path} is {_short.repr(found)}, expected 'CLSR': load it with PEFT")
    return CLSRConfig.from_pretrained(str(folder))


def _shapes_in(path: Path) -> dict[str, torch.Size]:
    """The shapes of the tensors in a file, by name."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if not 0 < header_size <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(
            f"{path} has {size} bytes and a header of {header_size}, expected at most {MAX_HEADER_BYTES} and no more "
            "than the file's size: it is truncated or no safetensors file, get it again"
        )
    shapes = {}
    try:  # safetensors checks the header: offsets without gaps or overlaps, sizes, the end of the file
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():
                view = file.get_slice(name)
                if view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(
                        f"tensor {_short.repr(name)} in {path} is of type {view.get_dtype()}, expected floating point "
                        "(F64, F32, F16, BF16): do not load this adapter"
                    )
                shapes[name] = torch.Size(view.get_shape())
    except (SafetensorError, OverflowError) as error:
        raise ValueError(f"{path} is no valid safetensors file ({error}): get it again") from error
    return shapes


def _check_finite(path: Path) -> None:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():
            if not file.get_tensor(name).isfinite().all():
                raise ValueError(
                    f"tensor {name!r} in {path} has values that are NaN or infinite: do not load this adapter"
                )


def _check_parts(shapes: dict[str, torch.Size], config: CLSRConfig, path: Path) -> None:
    """Check without a model that each FFN has one gate and its experts, of fitting sizes, and nothing else."""
    ffns: dict[str, dict[str, dict[str, torch.Size]]] = {}  # parent → projection → "expert.weight" → shape
    for key, shape in shapes.items():
        match = _ADAPTER_KEY.fullmatch(key)
        if match:
            parent, _, projection = match["module"].rpartition(".")
            parts = ffns.setdefault(parent, {}).setdefault(projection, {})
            parts[f"{match['part']}.{match['kind']}"] = shape
        elif not any(
            f"{name}." in key for name in config.modules_to_save or ()
        ):  # matches ends of names, as PEFT does
            # PEFT would write it over the base model's tensor of that name.
            raise ValueError(
                f"tensor {_short.repr(key)} in {path} is neither of a gate nor of an expert, nor of "
                f"modules_to_save={config.modules_to_save}: an adapter has no weights of the base model, do not "
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
                f"{_short.repr(found)}. Do not load this adapter"
            )


def _is_ffn(projections: dict[str, dict[str, torch.Size]], config: CLSRConfig) -> bool:
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
    # The gate's projection is an input. Other inputs have its size, and one output projection takes its features.
    input_size = sizes.pop(gates[0])
    return any(
        output_size[1] == input_size[0] and all(size == input_size for other, size in sizes.items() if other != name)
        for name, output_size in sizes.items()
    )


def _compare(shapes: dict[str, torch.Size], expected: dict[str, torch.Size], path: Path) -> None:
    for key in chain(shapes, expected):
        found, wanted = shapes.get(key), expected.get(key)
        if found != wanted:
            found, wanted = (list(shape) if shape is not None else "nothing" for shape in (found, wanted))
            raise ValueError(
                f"tensor {_short.repr(key)} in {path} has the shape {found}, expected {wanted}: the adapter does not "
                "fit the model; take the base model that it was trained for, and its own config"
            )


def _shapes_on_copy(model: nn.Module, config: CLSRConfig) -> dict[str, torch.Size]:
    """
    The names and shapes in the weights file of an adapter of `config` on `model`.

    PEFT itself adds the adapter to a copy of the model without data. So everything that it would refuse is refused
    here, before the model changes.
    """
    name = "adapter"
    while name in (getattr(model, "peft_config", None) or {}):
        name += "_"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real loading repeats them
            model_copy = _copy_without_data(model)
            if isinstance(model_copy, PeftModel):
                model_copy.add_adapter(name, copy.deepcopy(config), low_cpu_mem_usage=True)
            else:
                inject_adapter_in_model(copy.deepcopy(config), model_copy, name, low_cpu_mem_usage=True)
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the adapter cannot be put on a {type(model).__name__} ({type(error).__name__}: {error}): take the base "
            "model that it was trained for"
        ) from error
    return _adapter_shapes(model_copy, name)


def _adapter_shapes(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    """The names and shapes in the weights file of a model's adapter."""
    of_adapter = re.compile(rf"\.(clsr_\w+)\.{re.escape(adapter_name)}\.(?=\w+$)")
    state_dict = model.state_dict()
    shapes = {of_adapter.sub(r".\1.", key): t.shape for key, t in state_dict.items() if of_adapter.search(key)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):  # modules_to_save
            weights = {key.removeprefix(f"{name}."): t for key, t in state_dict.items() if key.startswith(f"{name}.")}
            saved = module.adapter_state_dict(adapter_name, weights)
            shapes.update({f"{name}.{key}": tensor.shape for key, tensor in saved.items()})
    return {PREFIX + key.removeprefix(PREFIX): shape for key, shape in shapes.items()}


def _copy_without_data(model: nn.Module) -> nn.Module:
    """A copy of a model with its weights on the meta device. It takes no memory and shares nothing with the model."""
    memo: dict[int, Any] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if "embed_positions" in name:
            continue  # small; cutting the context needs its data
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    for module in model.modules():
        if hasattr(module, "_hf_hook"):  # accelerate's hook holds the weights of an offloaded base
            memo[id(module._hf_hook)] = None
    return copy.deepcopy(model, memo)
