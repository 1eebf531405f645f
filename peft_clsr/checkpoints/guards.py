"""
Guards: functions of PEFT and transformers that load and save adapters, wrapped to check CLSR adapters first.

PEFT 0.20 and 0.21 and transformers 5.6 to 5.24 put an adapter of the config's sizes on the model before they read its
weights, so an error in the weights leaves a changed model. They read the pickle `adapter_model.bin` if there is no
safetensors file, and overwrite tensors of the base model by name. They have no hook that runs earlier, so this module
wraps their functions. Adapters of other methods are passed on unchanged.

- `PeftConfigMixin.from_json_file` reads every config of PEFT. CLSR configs are checked.
- `PeftModel.from_pretrained`, `PeftModel.load_adapter` and transformers' `PeftAdapterMixin.load_adapter` (called by
  transformers' `from_pretrained(adapter_folder)`): the whole folder is checked, on a copy of the model without data.
- `load_peft_weights`, as `hotswap_adapter` calls it: the folder is checked, and `hotswap.py` checks that it fits the
  model. `hotswap_adapter` itself may have been imported by name before this module.
- `torch_load` is called by `load_peft_weights` alone, for pickles.
- `PeftModel.save_pretrained` and transformers' `PreTrainedModel.save_pretrained`, which trainers call too: weights
  that are not finite, and pickles, are refused before anything is written.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, hotswap, save_and_load
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import extract_commit_hash

from ..tuner.adapter_names import check_adapter_name, check_subfolder
from ..tuner.config import CLSRConfig
from .base_model import warn_of_other_base
from .checks import check_adapter_folder, check_weights, check_weights_for
from .configs import is_clsr, is_clsr_file, read_config
from .saving import check_save_of_peft, check_save_of_transformers

_in_guarded_call: ContextVar[bool] = ContextVar("peft_clsr_in_guarded_call", default=False)


def register_guards() -> None:
    """Wrap the functions named above. Call it once."""
    PeftConfigMixin.from_json_file = classmethod(_guard_config(PeftConfigMixin.from_json_file.__func__))
    PeftModel.from_pretrained = classmethod(_guard(PeftModel.from_pretrained.__func__, _check_from_pretrained))
    PeftModel.load_adapter = _guard(PeftModel.load_adapter, _check_load_adapter)
    PeftAdapterMixin.load_adapter = _guard(PeftAdapterMixin.load_adapter, _check_transformers)
    hotswap.load_peft_weights = _guard(hotswap.load_peft_weights, _check_hotswap)
    save_and_load.torch_load = _guard_pickle(save_and_load.torch_load)
    PeftModel.save_pretrained = _guard(PeftModel.save_pretrained, check_save_of_peft)
    PreTrainedModel.save_pretrained = _guard(PreTrainedModel.save_pretrained, check_save_of_transformers)


@contextmanager
def already_checked() -> Iterator[None]:
    """Do not check again what the functions named above load in this block."""
    token = _in_guarded_call.set(True)
    try:
        yield
    finally:
        _in_guarded_call.reset(token)


def _guard(function: Callable, check: Callable[[dict[str, Any]], None]) -> Callable:
    """`function`, which first calls `check` with its arguments by name. `check` may change them."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        if _in_guarded_call.get():  # PeftModel.from_pretrained calls load_adapter
            return function(*args, **kwargs)
        try:
            call = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # raises the error of wrong arguments itself
        call.apply_defaults()
        check(call.arguments)
        with already_checked():
            return function(*call.args, **call.kwargs)

    return guarded


def _check_from_pretrained(arguments: dict[str, Any]) -> None:
    config = arguments["config"]
    if config is not None and not isinstance(config, PeftConfig):
        return  # PEFT refuses it
    folder = _clsr_folder(arguments, "kwargs", None if config is None else config.peft_type)
    if folder is not None:
        check_adapter_name(arguments["adapter_name"])
        # A key mapping renames the tensors after they are read.
        _check_folder(folder, config, None if arguments["key_mapping"] else arguments["model"])


def _check_load_adapter(arguments: dict[str, Any]) -> None:
    model, name = arguments["self"], arguments["adapter_name"]
    loaded = model.peft_config.get(name)
    folder = _clsr_folder(arguments, "kwargs", None if loaded is None else loaded.peft_type)
    if folder is None:
        return
    check_adapter_name(name)
    if loaded is not None:  # PEFT overwrites its weights, and does not read the folder's config
        check_weights_for(folder, model, name)
    else:
        _check_folder(folder, None, None if arguments["key_mapping"] else model)


def _check_hotswap(arguments: dict[str, Any]) -> None:
    folder = _clsr_folder(arguments, "hf_hub_download_kwargs", None)
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
    folder = _clsr_folder(found, "kwargs", getattr(config, "peft_type", None))
    if folder is None:
        return
    if kwargs.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False:
        raise ValueError(f"use_safetensors=False would read a pickle for the CLSR adapter in {folder}: leave it out")
    name = arguments["adapter_name"] or "default"
    check_adapter_name(name)
    model = arguments["self"]
    _check_folder(folder, config, None if name in (getattr(model, "peft_config", None) or {}) else model)
    if found["model_id"] != model_id:
        arguments["peft_model_id"] = found["model_id"]
        arguments["adapter_kwargs"] = {**(arguments.get("adapter_kwargs") or {}), "subfolder": "", "revision": None}


def _check_folder(folder: Path, config: CLSRConfig | None, model: nn.Module | None) -> None:
    """Check an adapter with the caller's config, or with the folder's if there is none."""
    if config is None:
        config = check_adapter_folder(folder, model)
    else:
        check_weights(folder, config, model)
    if model is not None:
        warn_of_other_base(model, config.base_model_name_or_path, folder)


def _clsr_folder(arguments: dict[str, Any], hub_kwargs: str, peft_type: str | None) -> Path | None:
    """
    The local folder of the CLSR adapter to be loaded.

    An adapter on the Hub is downloaded, and its folder replaces the repository in `arguments`. So a later commit
    cannot come between the check and the loading.

    Args:
        arguments (`dict[str, Any]`): `model_id`, and options of `hf_hub_download` in the dict named by `hub_kwargs`.
        hub_kwargs (`str`): Name of the dict in `arguments`.
        peft_type (`str`, *optional*): The adapter's type, if it is known without its config.

    Returns:
        `Path` or `None`: `None` for adapters of other types, and for what is not found, whose error is left to PEFT.
    """
    if peft_type not in (None, PeftType.CLSR) or not isinstance(arguments["model_id"], (str, os.PathLike)):
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
    if peft_type is None and not is_clsr_file(folder / CONFIG_NAME):
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
            f"the cache and the Hub cannot be reached), and pickles are not read: {error}"
        ) from error
    arguments["model_id"] = str(folder)
    arguments[hub_kwargs] = {key: value for key, value in kwargs.items() if key not in known}
    return folder


def _guard_config(from_json_file: Callable) -> Callable:
    """`from_json_file` of PEFT's configs, which checks CLSR configs before they are parsed."""

    @functools.wraps(from_json_file)
    def guarded(cls, path_json_file, **kwargs):
        is_checked = issubclass(cls, CLSRConfig) or is_clsr_file(path_json_file)
        if is_checked:
            read_config(path_json_file)
        attributes = from_json_file(cls, path_json_file, **kwargs)
        if is_clsr(attributes) and not is_checked:
            read_config(path_json_file)  # raises: only PEFT could read it, as it is larger than 4 MiB or not UTF-8
        return attributes

    return guarded


def _guard_pickle(torch_load: Callable) -> Callable:
    """PEFT's `torch_load`, which refuses the pickle of a CLSR adapter."""

    @functools.wraps(torch_load)
    def guarded(*args, **kwargs):
        path = args[0] if args else kwargs.get("f")
        config = Path(os.path.dirname(path), CONFIG_NAME) if isinstance(path, (str, os.PathLike)) else None
        if config is not None and config.is_file() and is_clsr_file(config):
            raise ValueError(
                f"{path} is a pickle, which can run code: weights of a CLSR adapter are read from "
                f"{SAFETENSORS_WEIGHTS_NAME} only. Ask its author to save it again with save_pretrained()"
            )
        return torch_load(*args, **kwargs)

    return guarded
