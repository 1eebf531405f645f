"""Names of adapters, and the folders that they are saved in."""

from __future__ import annotations

import reprlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch import nn

# PEFT's name for the base model in a list of adapter names.
BASE = "__base__"
MAX_NAME_LENGTH = 64

# Windows: a device's name, with any extension. https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{device}{digit}" for device in ("COM", "LPT") for digit in "0123456789¹²³"
}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200


def short_repr(value: object) -> str:
    """`repr(value)` for error messages, cut where it is long: a value from a file may have megabytes."""
    return _repr.repr(value)


def adapter_folder(directory: Path, adapter_name: str) -> Path:
    """The folder in which PEFT saves an adapter: `directory` for "default", else `directory / adapter_name`."""
    return directory if adapter_name == "default" else directory / adapter_name


def check_adapter_name(name: str) -> None:
    """
    Check that an adapter's name can name a folder on every operating system, and a module.

    Args:
        name (`str`): Such as "ca", "pt-BR" or "ca_valencia".

    Raises:
        ValueError: `name` is empty or longer than 64 characters; has a dot, a path separator, a control character or
            one that Windows forbids; is reserved on Windows; or is an attribute of `torch.nn.ModuleDict`.
    """
    _check_folder_name(name, "adapter name")
    if "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter name {name!r} cannot be a module's name, which has no dot and is none of a module's attributes: "
            "take a language code, such as 'ca' or 'pt-BR'"
        )


def check_subfolder(subfolder: str) -> None:
    """
    Check that a subfolder lies inside its repository or folder.

    Args:
        subfolder (`str`): Such as "ca" or "experts/ca"; "" for none.

    Raises:
        ValueError: it is absolute, or a part of it is ".." or cannot name a folder.
    """
    if not isinstance(subfolder, str) or PurePosixPath(subfolder).is_absolute():
        raise ValueError(f"subfolder {subfolder!r} is not a relative path: give one such as 'ca' or 'experts/ca'")
    for part in PurePosixPath(subfolder).parts:
        _check_folder_name(part, f"subfolder {subfolder!r}: part")


def _check_folder_name(name: str, what: str) -> None:
    """Raise a `ValueError` if `name` cannot name one folder on every operating system."""
    if not isinstance(name, str) or not name:
        fault = "is empty" if name == "" else "is not a string"
    elif len(name) > MAX_NAME_LENGTH:
        fault = f"has {len(name)} characters, expected at most {MAX_NAME_LENGTH}"
    elif name in (".", ".."):
        fault = "leaves its folder"
    elif not name.isprintable() or set(name) & set('/\\:*?"<>|'):  # control characters, NUL, lone surrogates
        fault = "has a separator or a character that some systems forbid in a folder's name"
    elif name != name.strip(" ") or name.endswith("."):
        fault = "begins or ends with a space, or ends with a dot, which Windows cuts off"
    elif PureWindowsPath(name).name.split(".")[0].rstrip(" ").upper() in _RESERVED:
        fault = "is a device on Windows"
    else:
        return
    raise ValueError(f"{what} {short_repr(name)} {fault}: take a language code, such as 'ca' or 'pt-BR'")
