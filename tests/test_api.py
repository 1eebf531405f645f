"""The public API: one flat list of names, imported at first use; what importing the package does and does not do."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_clsr

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])


def run_python(code, **environment):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there_and_has_a_docstring():
    assert peft_clsr.__all__ == sorted(peft_clsr.__all__) and len(peft_clsr.__all__) > 30
    assert set(peft_clsr.__all__) <= set(dir(peft_clsr))
    for name in peft_clsr.__all__:
        assert getattr(peft_clsr, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        peft_clsr.nothing_of_that_name  # noqa: B018


def test_the_fixed_names_are_public():
    fixed = {"CLSRConfig", "CLSRModel", "CLSRLayer", "DistillationTrainer", "DistillationTrainingArguments"}
    fixed |= {"GateScheduleCallback", "DataCollatorSpeechSeq2SeqWithPadding", "LanguageBatchSampler"}
    assert fixed <= set(peft_clsr.__all__)


def test_importing_registers_the_method_and_loads_no_extra():
    loaded = run_python(
        "import sys, peft_clsr; from peft import PeftType; print(PeftType.CLSR.value)\n"
        "names = ['datasets', 'jiwer', 'pandas', 'matplotlib', 'pysubs2', 'ctranslate2', 'faster_whisper']\n"
        "names += ['peft_clsr.distillation', 'peft_clsr.hub', 'peft_clsr.data']\n"
        "print([name for name in names if name in sys.modules])"
    )
    assert loaded.splitlines() == ["CLSR", "[]"]


def test_importing_twice_and_everything_is_harmless():
    code = (
        "import importlib, peft_clsr; importlib.reload(peft_clsr)\n"
        "from peft_clsr import *\n"
        "import pickle; config = pickle.loads(pickle.dumps(CLSRConfig.paper(language='ca'))); print(config.language)"
    )
    assert run_python(code) == "ca"


@pytest.mark.parametrize("argv", ["[]", "['peft-clsr.py']"])
def test_a_program_of_any_name_registers_the_method(argv):
    code = f"import sys; sys.argv = {argv}; import peft_clsr; from peft import PeftType; print(PeftType.CLSR.value)"
    assert run_python(code) == "CLSR"


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_import_from_the_package_itself(path):
    for block in python_blocks(path):
        for line in re.findall(r"^\s*(?:from|import) +peft_clsr\S*.*$", block, flags=re.MULTILINE):
            assert re.match(r"\s*(from peft_clsr import|import peft_clsr\b(?!\.))", line), line
        for name in re.findall(r"from peft_clsr import ([^(\n]+)$", block, flags=re.MULTILINE):
            assert {part.split("#")[0].strip() for part in name.split(",")} <= {*peft_clsr.__all__, ""}


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/**/*.py")), ids=lambda path: path.name)
def test_examples_import_from_the_package_itself(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("peft_clsr.") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_clsr"):
            assert node.module == "peft_clsr" and {alias.name for alias in node.names} <= set(peft_clsr.__all__)
