"""The documentation site: the reference is complete, and links to files of the repository lead somewhere."""

import re
import types
from pathlib import Path

import pytest

import peft_clsr

griffe = pytest.importorskip("griffe")

from docs.extensions.command_page import PAGE, on_page_markdown
from docs.extensions.docstrings import to_markdown
from peft_clsr.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "examples", "peft_clsr", "tests", "benchmarks")
TEXTS = [path for path in ROOT.iterdir() if path.suffix in (".md", ".cfg", ".cff", ".yml") or path.name == "Makefile"]
TEXTS += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py", ".yaml")]
HOSTS = r"https://(?:github\.com/peft-clsr/peft_clsr/(tree|blob)|raw\.githubusercontent\.com/peft-clsr/peft_clsr)"
LINK = re.compile(HOSTS + r"/main/([\w./-]*\w)")
MENTION = re.compile(r"(?<![\w/.-])(docs/[\w./-]+\.md)")


def test_every_public_name_is_in_the_reference_once():
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^        - (\w+)$", page, re.MULTILINE)) == peft_clsr.__all__


def missing_files(text):
    """Links and mentions of a text that lead to no file, or to a folder as `blob` or a file as `tree`."""
    links = {
        match[0]
        for match in LINK.finditer(text)
        if not ((ROOT / match[2]).is_dir() if match[1] == "tree" else (ROOT / match[2]).is_file())
    }
    return links | {match[1] for match in MENTION.finditer(text) if not (ROOT / match[1]).is_file()}


def test_links_to_files_of_the_repository_lead_somewhere():
    found = {path.relative_to(ROOT).as_posix(): missing_files(path.read_text(encoding="utf-8")) for path in TEXTS}
    found.pop(Path(__file__).relative_to(ROOT).as_posix())
    assert not {name: missing for name, missing in found.items() if missing}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("[x](https://github.com/peft-clsr/peft_clsr/blob/main/docs/none.md#a)", "docs/none.md"),
        ("https://raw.githubusercontent.com/peft-clsr/peft_clsr/main/docs/none.svg)", "main/docs/none.svg"),
        ("https://github.com/peft-clsr/peft_clsr/tree/main/none.", "tree/main/none"),
        ("https://github.com/peft-clsr/peft_clsr/blob/main/docs", "blob/main/docs"),
        ('see docs/none.md, "A heading"', "docs/none.md"),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text, missing):
    (found,) = missing_files(text)
    assert missing in found


def test_docstrings_become_markdown_with_plain_types_and_links():
    docstring = """\
Load, see [`CLSRConfig`] and [`private`].

Args:
    dataset (`str` or `Path`, *optional*, defaults to `"a (b)"`): As of [`CLSRModel.route_samples`].
    args ([`CLSRConfig`]):
        With a (`x`): [`~peft.PeftModel`].

Returns:
    [`CLSRModel`]: `x`: y.
"""
    assert (
        to_markdown(docstring, {"CLSRConfig", "CLSRModel"})
        == """\
Load, see [`CLSRConfig`][peft_clsr.CLSRConfig] and `private`.

Args:
    dataset (str | Path): As of [`CLSRModel.route_samples`][peft_clsr.CLSRModel.route_samples].
    args (CLSRConfig):
        With a (`x`): `PeftModel`.

Returns:
    CLSRModel: `x`: y.
"""
    )


def test_the_page_of_the_command_shows_all_its_options():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri=PAGE))
    markdown = on_page_markdown("# Command", page=page)
    assert [line for line in markdown.splitlines() if line.startswith("## ")] == [f"## {name}" for name in COMMANDS]
    assert "--create_pr" in markdown and "--lr_scheduler_type" in markdown
    page.file.src_uri = "index.md"
    assert on_page_markdown("# Start", page=page) == "# Start"
