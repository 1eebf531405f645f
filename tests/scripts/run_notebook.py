"""
Run examples/your_language.ipynb on a few real recordings, and publish its expert to a Hub on the loopback.

    python tests/scripts/run_notebook.py --cache_dir .cache --output_dir runs/smoke/notebook
"""

import argparse
import csv
import os
import shutil
import sys
from itertools import islice
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import TOKENS, HubServer

# Runs in the notebook, after its last cell.
CHECKS = """\
import urllib.request

from safetensors.torch import load_file

assert list(rates.index) == ["Whisper", "with the expert"] and list(rates) == ["wer", "cer"]
assert 0 < rates.loc["Whisper", "wer"] < 1, rates
weights = load_file(Path(output, tag, "adapter_model.safetensors"))
assert any(weight.any() for name, weight in weights.items() if "clsr_expert_B" in name)  # zero before training
assert 0 <= min(result["gate_means"].values()) <= max(result["gate_means"].values()) <= 1
assert b"Whisper, without and with a language expert" in urllib.request.urlopen(page.local_url).read()
"""


def copy_recordings(source: Path, target: Path, count: int) -> None:
    """Copy the first recordings of a split, without a split of their own: the notebook's command makes one."""
    target.mkdir(parents=True)
    with open(source / "metadata.csv", encoding="utf-8", newline="") as file:
        rows = list(islice(csv.DictReader(file), count))
    for row in rows:
        shutil.copyfile(source / row["file_name"], target / row["file_name"])
        (target / row["file_name"]).with_suffix(".txt").write_text(row["transcription"], encoding="utf-8")


def read_notebook(path: Path, parameters: dict[str, str | int]) -> nbformat.NotebookNode:
    """Read the notebook. A cell of other parameters follows its own; the checks come last."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    filled = [cell.id for cell in codes if cell.outputs or cell.execution_count is not None]
    assert not filled, f"cells {filled} have outputs: strip them before they are committed"
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    unknown = [name for name in parameters if f"{name} = " not in notebook.cells[index].source]
    assert not unknown, f"the notebook has no parameters {unknown}"
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache_dir", type=Path, required=True, help="folder of `make fetch`")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to work in; replaced")
    arguments = parser.parse_args()
    cache, folder = arguments.cache_dir.resolve(), arguments.output_dir.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    copy_recordings(cache / "tuxpaint-ro/train", folder / "recordings", 16)
    parameters = {"recordings": "recordings", "model": str(cache / "whisper-base"), "max_steps": 2}
    notebook = read_notebook(ROOT / "examples/your_language.ipynb", {**parameters, "repo_id": "me/experts"})
    with HubServer(TOKENS) as hub:
        hub_settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_mine", "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {**hub_settings, "HF_HOME": str(folder / "hub"), "GRADIO_ANALYTICS_ENABLED": "0"}
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
        try:
            client.execute()
        finally:
            nbformat.write(notebook, folder / "your_language.ipynb")
        pushed = set(hub.files("me/experts"))
    assert {"README.md", "ro/adapter_model.safetensors", "ro/gate_means.png"} <= pushed, pushed
    print(f"the notebook ran: {folder / 'your_language.ipynb'}")


if __name__ == "__main__":
    main()
