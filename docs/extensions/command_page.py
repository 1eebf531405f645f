"""Appends the command's own `--help-all` to its page of the reference."""

import contextlib
import io
import os

from peft_clsr.cli import main
from peft_clsr.cli.main import COMMANDS

PAGE = "reference/command.md"


def on_page_markdown(markdown, *, page, **kwargs):
    """A hook of MkDocs: the Markdown of a page before it is rendered."""
    if page.file.src_uri != PAGE:
        return markdown
    sections = [f"## {name}\n\n```text\n{help_all(name)}```\n" for name in COMMANDS]
    return "\n".join([markdown, *sections])


def help_all(command):
    """`str`: what `peft-clsr COMMAND --help-all` prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main([command, "--help-all"])
    return printed.getvalue()
