"""Names of adapters, and the folders that they are saved in."""

from __future__ import annotations

import reprlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch import nn

# PEFT's name for the base model in a list of adapter names.
BASE = "__base__"
MAX_NAME_LENGTH = 64

# Devices on Windows, with any extension. https://learn.microsoft.com/windows/win32/fileio/naming-a-file
_RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"} | {
    f"{device}{digit}" for device in ("COM", "LPT") for digit in "0123456789¹²³"
}

_short = reprlib.Repr()  # values in errors may be megabytes
_short.maxstring = _short.maxother = 200


def adapter_folder(directory: Path, adapter_name: str) -> Path:
    """The folder in which PEFT saves an adapter: `directory` itself for "default", else the folder of its name."""
    return directory if adapter_name == "default" else directory / adapter_name


def check_adapter_name(name: str) -> None:
    """
    Check that an adapter's name is valid as the name of a folder on every system, and of a module.

    Args:
        name (`str`): Such as "ca", "pt-BR" or "ca_valencia".

    Raises:
        ValueError: `name` is empty or longer than 64 characters; has a dot, a path separator, a control character or
            a character that Windows forbids; is reserved on Windows; or is a method of `torch.nn.ModuleDict`.
    """
    _check_part(name, "adapter name")
    if "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter name {name!r} cannot be the name of a module: it has a dot or is an attribute of every module. "
            "Take a language code, such as 'ca' or 'pt-BR'"
        )


def check_subfolder(subfolder: str) -> None:
    """
    Check that a subfolder stays inside its repository or folder.

    Args:
        subfolder (`str`): Such as "ca" or "experts/ca"; "" for none.

    Raises:
        ValueError: it is absolute, or a part of it is ".." or not valid as the name of a folder.
    """
    if not isinstance(subfolder, str) or PurePosixPath(subfolder).is_absolute():
        raise ValueError(f"subfolder {subfolder!r} is not a relative path: give one such as 'ca' or 'experts/ca'")
    for part in PurePosixPath(subfolder).parts:
        _check_part(part, f"subfolder {subfolder!r}: part")


def _check_part(part: str, what: str) -> None:
    """Raise a `ValueError` if `part` is not valid as the name of a folder on every system."""
    if not isinstance(part, str) or not part:
        fault = "is empty" if part == "" else "is not a string"
    elif len(part) > MAX_NAME_LENGTH:
        fault = f"has {len(part)} characters, expected at most {MAX_NAME_LENGTH}"
    elif part in (".", ".."):
        fault = "leaves its folder"
    elif not part.isprintable() or set(part) & set('/\\:*?"<>|'):  # control characters, NUL, lone surrogates
        fault = "has a separator or a character that not every system allows in the name of a folder"
    elif part != part.strip(" ") or part.endswith("."):
        fault = "begins or ends with a space, or ends with a dot, which Windows cuts off"
    elif PureWindowsPath(part).name.split(".")[0].rstrip(" ").upper() in _RESERVED:
        fault = "is a device on Windows"
    else:
        return
    raise ValueError(f"{what} {_short.repr(part)} {fault}: take a language code, such as 'ca' or 'pt-BR'")
