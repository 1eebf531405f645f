"""Finds the code blocks of a Markdown page and runs them in order, as a reader would."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

RUN = {"python": [sys.executable], "bash": ["bash", "-e"]}
SHOWN = {"text", "yaml", "csv", "json", "js", "html", "dockerfile", "ini", "toml", "diff", "bibtex"}
EXCUSE = re.compile(r"<!-- not run: (?P<reason>\S.*?) -->", re.DOTALL)
TIMEOUT = 900  # seconds a block may take: many on a busy machine
LOG_LINES = 60  # shown of a block that fails


class BlockError(Exception):
    """A block failed, or the page leaves open what to do with it. The message names the page and the line."""


@dataclass
class Block:
    language: str
    source: str
    line: int  # of its first line of code, from 1
    excuse: str | None = None


def find_blocks(text: str, name: str) -> list[Block]:
    """
    Returns the fenced blocks of a page, also those that Markdown extensions indent (tabs, admonitions).

    Args:
        text (`str`): The page.
        name (`str`): Its name in errors.

    Raises:
        BlockError: if blocks have no language or an unknown one, or an excuse has no reason or no block below it.
    """
    blocks: list[Block] = []
    faults: list[str] = []
    _read(text, 0, blocks, faults, name)
    if faults:
        raise BlockError("\n".join(faults))
    return blocks


def _read(text, offset, blocks, faults, name):
    excuse = None
    for token in MarkdownIt("commonmark").parse(text):
        line = offset + token.map[0] + 1 if token.map else None
        if excuse and not (token.type == "fence" and token.info in RUN):
            faults.append(f"{name}:{line}: an excuse (not run) stands above no python or bash block")
        if token.type == "fence":
            if token.info not in {*RUN, *SHOWN}:
                known = ", ".join([*RUN, *sorted(SHOWN)])
                faults.append(f"{name}:{line}: a block of language {token.info!r}, expected one of {known}")
            blocks.append(Block(token.info, token.content, line + 1, excuse))
        elif token.type == "code_block" and "```" in token.content:
            _read(token.content, line - 1, blocks, faults, name)
        elif token.type == "inline" and re.search(r"^\s*```", token.content, re.MULTILINE):
            faults.append(f"{name}:{line}: a fence inside a paragraph; put an empty line before it")
        excuse = None
        if token.type == "html_block" and "not run" in token.content:
            match = EXCUSE.fullmatch(token.content.strip())
            if match is None:
                faults.append(f"{name}:{line}: {token.content.strip()!r}, expected <!-- not run: REASON -->")
            excuse = match and match["reason"]
    if excuse:
        faults.append(f"{name}: the page ends with an excuse (not run) without a block")


def run_blocks(blocks: list[Block], name: str, folder: Path, logs: Path, environment: dict[str, str]) -> None:
    """
    Runs the python and bash blocks without excuse, each in a fresh process, in one folder.

    Processes that a block starts in the background live until the last block ends.

    Args:
        blocks (`list[Block]`): What [`find_blocks`] returned.
        name (`str`): The page's name in errors.
        folder (`Path`): Where they run.
        logs (`Path`): A folder for scripts and what they print.
        environment (`dict[str, str]`): All environment variables.

    Raises:
        BlockError: at the first block that fails, with the block and the end of what it printed.
    """
    logs.mkdir(parents=True)
    groups = []
    try:
        for block in blocks:
            if block.language in RUN and block.excuse is None:
                _run(block, name, folder, logs, environment, groups)
    finally:
        for group in groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _run(block, name, folder, logs, environment, groups):
    script = logs / f"line{block.line}.{'py' if block.language == 'python' else 'sh'}"
    # Its lines have the numbers that they have on the page, so errors name those.
    script.write_text("\n" * (block.line - 1) + block.source, encoding="utf-8")
    log = script.with_suffix(".log")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*RUN[block.language], str(script)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        groups.append(process.pid)
        try:
            status = process.wait(TIMEOUT)
            how = f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            how = status = f"did not end within {TIMEOUT} s"
    if status != 0:
        printed = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        shown = textwrap.indent(block.source, "    ")
        raise BlockError(f"{name}:{block.line}: the {block.language} block {how}:\n{shown}\n" + "\n".join(printed))
