"""
The command `peft-clsr`. Each command is a module with `DESCRIPTION`, `make_parser` and `run`.

Modules import torch, PEFT and the rest of the package only in `run`, so that `--help` answers quickly.
"""

from .main import main

__all__ = ["main"]
