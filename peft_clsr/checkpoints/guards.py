"""
Guards around the loaders of PEFT and transformers: they check a CLSR adapter before it is loaded.

PEFT 0.20 and 0.21 and transformers 5.6 to 5.24 add an adapter of the config's sizes to the model, and then read its
weights. A failure there leaves a changed model. They read `adapter_model.bin`, a pickle, if there is no safetensors
file, and overwrite tensors of the base model. They have no hook before that. So this file, and no other, wraps their
functions. Adapters of other methods pass through unchanged:

- `PeftConfigMixin.from_json_file`: reads each config;
- `PeftModel.from_pretrained`, `PeftModel.load_adapter` and transformers' `PeftAdapterMixin.load_adapter`, which
  `from_pretrained(adapter_folder)` calls: the whole folder is checked, on a copy of the model without data;
- `load_peft_weights` in the module of `hotswap_adapter` (which may have been imported by name before us): the folder
is
  checked; `hotswap.py` checks that it fits the model;
- `torch_load`, with which `load_peft_weights` reads pickles: refused.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, hotswap, save_and_load
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import extract_commit_hash

from ..tuner.adapter_names import check_adapter_name, check_subfolder
from ..tuner.config import CLSRConfig
from .checks import check_adapter_folder, check_weights, check_weights_for
from .config_checks import is_clsr, read_config

_is_checked: ContextVar[bool] = ContextVar("peft_clsr_is_checked", default=False)  # inside a guarded loader


def register_guards() -> None:
    """Wrap the functions named above. Call it once."""
    PeftConfigMixin.from_json_file = classmethod(_checked_config(PeftConfigMixin.from_json_file.__func__))
    PeftModel.from_pretrained = classmethod(_guarded(PeftModel.from_pretrained.__func__, _check_from_pretrained))
    PeftModel.load_adapter = _guarded(PeftModel.load_adapter, _check_load_adapter)
    PeftAdapterMixin.load_adapter = _guarded(PeftAdapterMixin.load_adapter, _check_transformers)
    hotswap.load_peft_weights = _guarded(hotswap.load_peft_weights, _check_hotswap)
    save_and_load.torch_load = _no_pickle(save_and_load.torch_load)


def _guarded(load: Callable, check: Callable[[dict[str, Any]], None]) -> Callable:
    """Return `load` with a check of its arguments first, which may change them."""
    signature = inspect.signature(load)

    @functools.wraps(load)
    def checked(*args, **kwargs):
        if _is_checked.get():  # PeftModel.from_pretrained calls load_adapter
            return load(*args, **kwargs)
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        check(call.arguments)
        token = _is_checked.set(True)
        try:
            return load(*call.args, **call.kwargs)
        finally:
            _is_checked.reset(token)

    return checked


def _check_from_pretrained(arguments: dict[str, Any]) -> None:
    config = arguments["config"]
    folder = _adapter_folder(arguments, "kwargs", None if config is None else config.peft_type)
    if folder is not None:
        check_adapter_name(arguments["adapter_name"])
        # A mapping renames the tensors on their way to the model.
        _check(folder, config, None if arguments["key_mapping"] else arguments["model"])


def _check_load_adapter(arguments: dict[str, Any]) -> None:
    model, name = arguments["self"], arguments["adapter_name"]
    loaded = model.peft_config.get(name)
    folder = _adapter_folder(arguments, "kwargs", None if loaded is None else loaded.peft_type)
    if folder is None:
        return
    check_adapter_name(name)
    if loaded is not None:  # PEFT writes over its weights, and does not look at the folder's config
        check_weights_for(folder, model, name)
    else:
        _check(folder, None, None if arguments["key_mapping"] else model)


def _check_hotswap(arguments: dict[str, Any]) -> None:
    folder = _adapter_folder(arguments, "hf_hub_download_kwargs", None)
    if folder is not None:
        check_adapter_folder(folder)


def _check_transformers(arguments: dict[str, Any]) -> None:
    load_config, kwargs = arguments.get("load_config"), arguments["kwargs"]
    config, model_id = arguments["peft_config"], arguments["peft_model_id"]
    model_id = model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    if arguments["adapter_state_dict"] is not None or model_id is None:
        return  # no file is read
    download = dict(kwargs.get("download_kwargs") or getattr(load_config, "download_kwargs", None) or {})
    download |= arguments.get("adapter_kwargs") or {}
    found = {"model_id": model_id, "kwargs": download}
    folder = _adapter_folder(found, "kwargs", getattr(config, "peft_type", None))
    if folder is None:
        return
    if kwargs.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False:
        raise ValueError(f"use_safetensors=False would read a pickle for the CLSR adapter in {folder}: leave it out")
    name = arguments["adapter_name"] or "default"
    check_adapter_name(name)
    model = arguments["self"]
    _check(folder, config, None if name in (getattr(model, "peft_config", None) or {}) else model)
    if found["model_id"] != model_id:
        arguments["peft_model_id"] = found["model_id"]
        arguments["adapter_kwargs"] = {**(arguments.get("adapter_kwargs") or {}), "subfolder": "", "revision": None}


def _check(folder: Path, config: CLSRConfig | None, model: nn.Module | None) -> None:
    """Check an adapter with the caller's config, or with that of the folder."""
    if config is None:
        check_adapter_folder(folder, model)
    else:
        check_weights(folder, config, model)


def _adapter_folder(arguments: dict[str, Any], hub_kwargs: str, peft_type: str | None) -> Path | None:
    """
    Return the local folder of the CLSR adapter to load, or `None` if the adapter is of another type or not found. PEFT
    then gives a better error.

    An adapter on the Hub is downloaded, and its folder replaces the repository in `arguments`. So a later commit
    cannot come between check and loading.

    Args:
        arguments (`dict[str, Any]`): `model_id`, and options of `hf_hub_download` in the dict named by `hub_kwargs`.
        hub_kwargs (`str`): Name of the dict in `arguments`.
        peft_type (`str`, *optional*): The adapter's type, if it is known without its config.
    """
    if peft_type not in (None, PeftType.CLSR):
        return None
    model_id, kwargs = os.fspath(arguments["model_id"]), arguments[hub_kwargs]
    known = inspect.signature(hf_hub_download).parameters
    options = {key: value for key, value in kwargs.items() if key in known}
    subfolder = options.get("subfolder") or ""
    folder = Path(model_id, subfolder)
    names = [CONFIG_NAME] if peft_type is None else [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME]
    is_local = any((folder / name).is_file() for name in names)
    if not is_local:
        try:
            folder = Path(hf_hub_download(model_id, CONFIG_NAME, **options)).parent
        except Exception:
            return None
    if peft_type is None and read_config(folder / CONFIG_NAME) is None:
        return None
    check_subfolder(subfolder)
    if is_local:
        return folder
    options["revision"] = extract_commit_hash(str(folder / CONFIG_NAME), None) or options.get("revision")
    try:
        hf_hub_download(model_id, SAFETENSORS_WEIGHTS_NAME, **options)
    except EntryNotFoundError as error:
        raise ValueError(
            f"the CLSR adapter {subfolder or ''!r} of {model_id!r} has no {SAFETENSORS_WEIGHTS_NAME} (or it is not in "
            f"the cache and the Hub is not reached), and pickles are not read: {error}"
        ) from error
    arguments["model_id"] = str(folder)
    arguments[hub_kwargs] = {key: value for key, value in kwargs.items() if key not in known}
    return folder


def _checked_config(from_json_file: Callable) -> Callable:
    @functools.wraps(from_json_file)
    def checked(cls, path_json_file, **kwargs):
        checked_config = read_config(path_json_file)
        config = from_json_file(cls, path_json_file, **kwargs)
        if checked_config is None and is_clsr(config):  # hidden by its size or by escapes
            raise ValueError(f"{path_json_file} is too large for the config of a CLSR adapter: do not load it")
        return config

    return checked


def _no_pickle(torch_load: Callable) -> Callable:
    @functools.wraps(torch_load)
    def checked(path, *args, **kwargs):
        config = Path(path).with_name(CONFIG_NAME) if isinstance(path, (str, os.PathLike)) else None
        if config is not None and config.is_file() and read_config(config) is not None:
            raise ValueError(
                f"{path} is a pickle, which can run code: weights of a CLSR adapter are read from "
                f"{SAFETENSORS_WEIGHTS_NAME} only. Ask its author to save it again with save_pretrained()"
            )
        return torch_load(path, *args, **kwargs)

    return checked
