"""transformers' exporter: is it there, and without its chatter."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import transformers
from packaging.version import Version


def check_exporter(extra: str) -> None:
    """Raise a `ModuleNotFoundError` for a transformers without the exporter. `extra` installs a newer one."""
    if Version(transformers.__version__) < Version("5.23.0"):
        raise ModuleNotFoundError(
            f"the export needs transformers 5.23 or newer, and {transformers.__version__} is installed: "
            f"pip install 'peft_clsr[{extra}]'"
        )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide what the exporter prints of its progress, and its warnings of operators that Whisper does not have."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of all loggers, as the exporters name some of theirs by files
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
