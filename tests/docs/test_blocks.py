"""The code blocks of README, docs and examples run as they stand."""

import os
import re
import time
from pathlib import Path

import psutil
import pytest
from doc_blocks import BlockError, find_blocks, run_blocks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
MACHINE_PATH = re.compile(rb"(?<![\w.])/(?:home|root|work|Users|tmp(?!/ray))/\w+")  # Ray always writes to /tmp/ray


@pytest.mark.parametrize("name", NAMES)
def test_page(name, request, tmp_path):
    try:
        blocks = find_blocks((ROOT / name).read_text(encoding="utf-8"), name)
        if any(block.language in ("python", "bash") and block.excuse is None for block in blocks):
            folder, environment = request.getfixturevalue("page_world")
            run_blocks(blocks, name, folder, tmp_path / "logs", environment)
    except BlockError as error:
        pytest.fail(str(error), pytrace=False)


def test_no_page_has_a_path_of_a_machine():
    found = [
        f"{path.relative_to(ROOT)}: {match[0].decode()}"
        for path in sorted((ROOT / "docs").rglob("*"))
        if path.is_file() and path.parent.name != "__pycache__"
        for match in MACHINE_PATH.finditer(path.read_bytes())
    ]
    assert not found


FAILS = """\
Text.

```bash
echo one >file
```

=== "Tab"

    ```python
    from pathlib import Path

    assert Path("file").read_text() == "two\\n"
    ```

```bash
touch never
```
"""


def test_a_failing_block_is_named_with_its_line_and_what_it_printed(tmp_path):
    with pytest.raises(BlockError) as error:
        run_blocks(find_blocks(FAILS, "a.md"), "a.md", tmp_path, tmp_path / "logs", dict(os.environ))
    message = str(error.value)
    assert message.startswith("a.md:10: the python block failed with exit status 1:\n    from pathlib import Path\n")
    assert 'line 12, in <module>\n    assert Path("file").read_text() == "two\\n"' in message
    assert (tmp_path / "file").exists() and not (tmp_path / "never").exists()


def test_bash_stops_at_the_first_command_that_fails(tmp_path):
    blocks = find_blocks("```bash\nfalse\ntouch never\n```\n", "a.md")
    with pytest.raises(BlockError, match="a.md:2: the bash block failed with exit status 1"):
        run_blocks(blocks, "a.md", tmp_path, tmp_path / "logs", dict(os.environ))
    assert not (tmp_path / "never").exists()


def test_what_a_block_starts_in_the_background_ends_with_the_page(tmp_path):
    page = "```bash\n(sleep 60; touch never) & echo $! >pid\n```\n```bash\nkill -0 $(cat pid)\n```\n"
    run_blocks(find_blocks(page, "a.md"), "a.md", tmp_path, tmp_path / "logs", dict(os.environ))
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):  # a signal takes a moment
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} lives on")


def test_an_excused_block_is_not_run(tmp_path):
    page = "<!-- not run: needs a GPU -->\n```bash\nfalse\n```\n```text\nfalse\n```\n"
    blocks = find_blocks(page, "a.md")
    assert [(block.language, block.excuse, block.line) for block in blocks] == [
        ("bash", "needs a GPU", 3),
        ("text", None, 6),
    ]
    run_blocks(blocks, "a.md", tmp_path, tmp_path / "logs", dict(os.environ))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("x\n\n```\ny\n```\n", "a.md:3: a block of language '', expected one of python, bash, "),
        ("```sh\ny\n```\n", "a.md:1: a block of language 'sh'"),
        ("```python title=a\ny\n```\n", "a.md:1: a block of language 'python title=a'"),
        ("<!-- not run -->\n```bash\ny\n```\n", "a.md:1: '<!-- not run -->', expected <!-- not run: REASON -->"),
        ("<!-- not run: -->\n```bash\ny\n```\n", "a.md:1: '<!-- not run: -->'"),
        ("<!-- not run: slow -->\n\nText.\n\n```bash\ny\n```\n", "a.md:3: an excuse"),
        ("<!-- not run: slow -->\n```text\ny\n```\n", "a.md:2: an excuse"),
        ("<!-- not run: slow -->\n", "a.md: the page ends with an excuse"),
        ("!!! note\n    ```bash\n    y\n    ```\n", "a.md:1: a fence inside a paragraph"),
    ],
)
def test_a_block_that_would_be_passed_over_is_an_error(page, message):
    with pytest.raises(BlockError, match=re.escape(message)):
        find_blocks(page, "a.md")
