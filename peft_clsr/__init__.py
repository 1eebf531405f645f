"""Conditional language-specific routing (CLSR) experts for Whisper, as a plugin of Hugging Face PEFT."""

import sys
from pathlib import Path

import lazy_loader

__version__ = "0.1.0"

# The public names are listed in __init__.pyi. Each is imported at its first use.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _is_command() -> bool:
    """
    True in `peft-clsr` and `python -m peft_clsr`, which register CLSR only for work: `--help` needs no torch.

    Also in the processes that they start.
    """
    arguments = getattr(sys, "argv", None) or [""]  # an embedded Python has none
    program = Path(arguments[0])  # not "peft-clsr.py", which is a user's script
    is_module = sys.orig_argv[1:3] == ["-m", __name__] or program == Path(__file__).with_name("__main__.py")
    return program.name in ("peft-clsr", "peft-clsr.exe") or is_module


if not _is_command():
    from .registration import register

    register()
    del register
