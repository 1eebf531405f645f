"""Checks that a base model is the one an adapter was trained on, by its name and a hash of one shared FFN."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..files import read_json, sha256_of
from ..tuner.layer import CLSRLayer

RECORD_NAME = "language.json"  # beside the adapter; hub/record.py writes it

# Users load a checkpoint in different precisions. Rounding float32 gives the same float16 and bfloat16 for everyone,
# but float16 and bfloat16 cannot be computed from each other.
_HASHED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def ffn_identity(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    """
    Hash one shared FFN of the base model, to recognize the model later.

    It is the last FFN that the adapter routes, because fine-tuning often leaves the encoder unchanged.

    Args:
        model (`PeftModel`): A model with the adapter.
        adapter_name (`str`): The adapter's name.

    Returns:
        `dict`: `{"module": name in the base model, "sha256": {dtype: hex digest}}`, for the weight's dtype and those
        that follow from it. There are no digests for a weight that is quantized, sharded or not in memory.
    """
    module = [
        name
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, CLSRLayer) and adapter_name in layer.clsr_config
    ][-1]
    return {"module": module, "sha256": _weight_hashes(model.get_base_model(), module)}


def check_base_model(
    model: nn.Module, base_model_name_or_path: str | None, identity: Mapping[str, Any] | None, adapter: str
) -> None:
    """
    Raise an error for an adapter that was trained on another base model.

    Names must be equal, unless one of them is a folder and the hashes are equal. Hashes must be equal wherever they
    can be compared.

    Args:
        model (`nn.Module`): The base model, or a `PeftModel` around it.
        base_model_name_or_path (`str`, *optional*): The name in the adapter's config.
        identity (`Mapping`, *optional*): The result of [`ffn_identity`] in the adapter's record.
        adapter (`str`): The adapter's name for the error message.

    Raises:
        ValueError: the base model differs. The message says how, and how to load the adapter nevertheless.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name, wanted = getattr(base, "name_or_path", None), base_model_name_or_path
    remedy = (
        f"load the base model {wanted!r}, or pass allow_other_base=True if you know that the experts suit this one"
        if wanted
        else "load the base model that they were trained on, or pass allow_other_base=True"
    )
    is_same = _same_weights(base, identity or {})
    if is_same is False:
        raise ValueError(
            f"{adapter} was trained on another base model: the shared FFN {identity['module']!r} of {wanted!r} there "
            f"and of {name!r} here have different weights; {remedy}"
        )
    if not name or not wanted or name == wanted or _is_same_folder(name, wanted):
        return
    if is_same and not (is_hub_id(name) and is_hub_id(wanted)):
        return
    raise ValueError(f"{adapter} was trained on the base model {wanted!r}, and this model is {name!r}; {remedy}")


def warn_of_other_base(model: nn.Module, base_model_name_or_path: str | None, folder: Path) -> None:
    """
    Warn once if an adapter seems to be trained on another base model of the same shapes.

    The record beside the adapter has a hash of the base model's weights. Without it, only names are compared: two
    repositories by their ids, a folder by its last part, as it may be a copy.

    Args:
        model (`nn.Module`): The base model, or a `PeftModel` around it.
        base_model_name_or_path (`str`, *optional*): The name in the adapter's config.
        folder (`Path`): The adapter's folder.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name, wanted = getattr(base, "name_or_path", None), base_model_name_or_path
    is_same = _same_weights(base, _recorded_identity(folder))
    if is_same or (is_same is None and (not name or not wanted or _may_be_same(name, wanted))):
        return
    why = "their weights differ" if is_same is False else "only the shapes of the weights are known to fit"
    warnings.warn(
        f"the adapter in {folder} was trained on the base model {wanted!r}, and this model is {name!r}: {why}. "
        f"On another model, transcripts get worse: load the adapter on {wanted!r}",
        stacklevel=2,
    )


def _recorded_identity(folder: Path) -> dict[str, Any]:
    """The result of [`ffn_identity`] in the record beside an adapter; empty if there is none of these weights."""
    try:
        record = read_json(folder / RECORD_NAME)
        is_of_weights = record["weights_sha256"] == sha256_of(folder / SAFETENSORS_WEIGHTS_NAME)
        return dict(record["base_ffn"]) if is_of_weights else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_same_folder(name: str, wanted: str) -> bool:
    return os.path.isdir(name) and os.path.isdir(wanted) and os.path.samefile(name, wanted)


def _may_be_same(name: str, wanted: str) -> bool:
    """True if two names can be of the same model. If one of them is a folder, only the last parts count."""
    if is_hub_id(name) and is_hub_id(wanted):
        return name == wanted
    return _last_part(name) == _last_part(wanted)


def _last_part(name: str) -> str:
    parts = name.replace("\\", "/").rstrip("/").split("/")
    cached = next((part for part in parts if part.startswith("models--")), None)  # the cache of the Hub
    return cached.split("--")[-1] if cached else parts[-1]


def is_hub_id(name: str | None) -> bool:
    """True for the name of a repository on the Hub, such as "openai/whisper-small"; False for a local folder."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return not os.path.isdir(name)


def _same_weights(base: nn.Module, identity: Mapping[str, Any]) -> bool | None:
    """True if `base` has the hash in `identity`; `None` if the two cannot be compared."""
    hashes = identity.get("sha256")
    if not hashes:
        return None
    try:
        own = _weight_hashes(base, identity.get("module", ""))
    except AttributeError:  # there is no such module, or it has no weight
        return False
    for dtype, digest in own.items():  # the weight's own dtype comes first
        if dtype in hashes:
            return digest == hashes[dtype]
    return None


@torch.no_grad()
def _weight_hashes(base: nn.Module, module: str) -> dict[str, str]:
    """Hashes of a module's weight by dtype, as in [`ffn_identity`]."""
    layer = base.get_submodule(module)
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    with align_module_device(layer):
        weight = layer.weight.detach()
        dtype = str(weight.dtype).removeprefix("torch.")
        if type(weight) is not torch.Tensor or weight.is_meta or not weight.numel() or dtype not in _HASHED_DTYPES:
            return {}
        names = list(_HASHED_DTYPES) if dtype == "float32" else [dtype]
        weights = {name: weight.to("cpu", _HASHED_DTYPES[name]).contiguous() for name in names}
    return {
        name: hashlib.sha256(weight.view(torch.uint8).numpy().data).hexdigest() for name, weight in weights.items()
    }
