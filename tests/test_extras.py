"""A missing optional dependency is named with the extra that installs it."""

import sys

import numpy as np
import pytest

from peft_clsr import cut_at_pauses, error_rates, plot_gate_means, read_audio
from peft_clsr.extras import require


@pytest.mark.parametrize(
    ("module", "extra", "use"),
    [
        ("jiwer", "train", lambda: error_rates(["a"], ["a"])),
        ("matplotlib", "plots", lambda: plot_gate_means({"model.encoder.layers.0.fc1": 0.5}, "any.png")),
        ("soundfile", "train", lambda: read_audio(__file__)),
        ("silero_vad", "vad", lambda: cut_at_pauses(np.zeros(16000, dtype=np.float32))),
        ("ctranslate2", "export", lambda: require("ctranslate2.converters")),
        ("fastapi", "serve", lambda: require("fastapi")),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, module, extra, use):
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module} is not installed: pip install 'peft_clsr\[{extra}\]'"):
        use()


def test_a_module_that_an_installed_extra_lacks_is_not_blamed_on_the_extra(monkeypatch, tmp_path):
    (tmp_path / "pysubs2.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.delitem(sys.modules, "pysubs2", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_module_that_is_nowhere'"):
        require("pysubs2")
