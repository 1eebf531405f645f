"""Experts of the reference implementation, converted: same logits, and nothing of a hostile file is run."""

import pickle

import pytest
import torch
from naver import checkpoint_of
from peft import AutoPeftModel, PeftModel
from safetensors.torch import load_file
from torch import nn

from peft_clsr import CLSRConfig, convert_naver_expert


class ReferenceFFN(nn.Module):
    """The FFN of the reference implementation in evaluation, token by token: gate, hard rule, one of two paths."""

    def __init__(self, layer, tensors, prefix, language):
        super().__init__()
        self.shared = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)
        parts = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
        self.expert = [tensors[f"{prefix}.proj.{language}.{part}"].float() for part in parts]
        self.gate_in = [tensors[f"{prefix}.gate_in.{language}.{part}"].float() for part in ("weight", "bias")]
        self.gate_out = tensors[f"{prefix}.gate_out.{language}.weight"].float()
        self.activation = layer.activation_fn
        self.choices = []

    def forward(self, hidden_states):
        result = torch.empty_like(hidden_states)
        for index in torch.cartesian_prod(*map(torch.arange, hidden_states.shape[:-1])).tolist():
            x = hidden_states[tuple(index)]
            hidden = torch.relu(self.gate_in[0] @ x + self.gate_in[1])
            to_expert = (self.gate_out @ hidden).item() >= 0
            self.choices.append(to_expert)
            w1, b1, w2, b2 = self.expert if to_expert else self.shared
            result[tuple(index)] = w2 @ self.activation(w1 @ x + b1) + b2
        return result


def reference(model, tensors, language="catalan"):
    """`model` with the reference's FFNs in the places of its own."""
    ffns = []
    for side in ("encoder", "decoder"):
        for index, layer in enumerate(getattr(model.model, side).layers):
            ffns.append(ReferenceFFN(layer, tensors, f"model.{side}.layers.{index}.ffn_clsr", language))
            layer.fc1, layer.activation_fn, layer.fc2 = ffns[-1], nn.Identity(), nn.Identity()
    return model, ffns


@torch.no_grad()
def logits_of(model, inputs):
    return model.eval()(**inputs).logits


SIZES = {
    "small": {},
    "encoder and decoder differ": {
        "encoder_layers": 3,
        "decoder_layers": 1,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 40,
    },
    "wider": {"d_model": 24, "encoder_ffn_dim": 24, "decoder_ffn_dim": 8},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("gate_dim", [1, 64])
def test_converted_expert_has_the_logits_of_the_original(tiny_whisper, inputs, tmp_path, sizes, gate_dim):
    base = tiny_whisper(init_std=0.2, **sizes)
    tensors = checkpoint_of(base, gate_dim=gate_dim)
    torch.save(tensors, tmp_path / "expert.catalan.bin")
    original, ffns = reference(tiny_whisper(init_std=0.2, **sizes), tensors)
    expected = logits_of(original, inputs)
    to_expert = sum(sum(ffn.choices) for ffn in ffns) / sum(len(ffn.choices) for ffn in ffns)
    assert 0.02 < to_expert < 0.98  # both paths are taken
    assert (expected - logits_of(base, inputs)).abs().max() > 0.1

    folder = convert_naver_expert(tmp_path / "expert.catalan.bin", tmp_path / "ca", language="ca")
    model = PeftModel.from_pretrained(base, folder, adapter_name="ca")
    assert (logits_of(model, inputs) - expected).abs().max() <= 1e-5
    config = model.peft_config["ca"]
    assert (config.language, config.gate_dim, config.expert_rank) == ("ca", gate_dim, None)
    assert config.base_model_name_or_path == "openai/whisper-small"


def test_the_folder_is_an_adapter_as_peft_saves_it(tiny_whisper, inputs, tmp_path):
    base = tiny_whisper(init_std=0.2)
    base.save_pretrained(tmp_path / "base")
    torch.save(checkpoint_of(base), tmp_path / "expert.bin")
    folder = convert_naver_expert(
        tmp_path / "expert.bin", tmp_path / "ca", base_model_name_or_path=tmp_path.joinpath("base").as_posix()
    )
    model = AutoPeftModel.from_pretrained(folder, adapter_name="ca")
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "again")
    saved, again = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "again" / "ca"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)
    native = tiny_whisper(init_std=0.2)
    native.load_adapter(str(folder))
    assert torch.equal(logits_of(native, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_kept_and_double_is_not(tiny_whisper, inputs, tmp_path, dtype):
    base = tiny_whisper(init_std=0.2)
    tensors = {key: tensor.to(dtype) for key, tensor in checkpoint_of(base).items()}
    torch.save(tensors, tmp_path / "expert.bin")
    original, _ = reference(tiny_whisper(init_std=0.2), tensors)
    folder = convert_naver_expert(tmp_path / "expert.bin", tmp_path / "ca")
    kept = torch.float32 if dtype == torch.float64 else dtype
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {kept}
    model = PeftModel.from_pretrained(base, folder)
    assert (logits_of(model, inputs) - logits_of(original, inputs)).abs().max() <= 1e-5


# ---------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("name", "language", "code"),
    [
        ("catalan", None, "ca"),
        ("catalan", "Catalan", "ca"),
        ("haitian creole", None, "ht"),
        ("spanish", "castilian", "es"),  # an alias: the keys have Whisper's own name
    ],
)
def test_the_language_is_that_of_the_keys(tiny_whisper, tmp_path, name, language, code):
    torch.save(checkpoint_of(tiny_whisper(), language=name), tmp_path / "expert.bin")
    folder = convert_naver_expert(tmp_path / "expert.bin", tmp_path / "out", language)
    assert CLSRConfig.from_pretrained(str(folder)).language == code


def test_one_of_several_languages_is_taken_by_its_name(tiny_whisper, tmp_path):
    catalan, galician = (
        checkpoint_of(tiny_whisper(), language=name, seed=len(name)) for name in ("catalan", "galician")
    )
    torch.save(catalan | galician, tmp_path / "expert.bin")
    with pytest.raises(ValueError, match=r"\['catalan', 'galician'\]: name one"):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "gl")
    folder = convert_naver_expert(tmp_path / "expert.bin", tmp_path / "gl", "gl")
    saved = load_file(folder / "adapter_model.safetensors")
    key = "layers.1.ffn_clsr.proj.galician.fc2.weight"
    expected = galician[f"model.decoder.{key}"]
    assert torch.equal(saved["base_model.model.model.decoder.layers.1.fc2.clsr_expert.weight"], expected)


# ---------------------------------------------------------------- what is refused


def drop(key):
    return lambda tensors: tensors.pop(f"model.{key}")


def put(key, tensor):
    return lambda tensors: tensors.update({key: tensor})


BIAS = "model.decoder.layers.1.ffn_clsr.proj.catalan.fc2.bias"
WRONG = {
    "a missing tensor": (drop("encoder.layers.1.ffn_clsr.gate_out.catalan.weight"), "lacks .'gate_out.weight'"),
    "a missing layer": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "encoder.layers.0" in key],
        r"encoder's layers \[1\], expected all from 0",
    ),
    "a missing side": (
        lambda tensors: [tensors.pop(key) for key in list(tensors) if "decoder" in key],
        r"decoder's layers \[\]",
    ),
    "no tensors": (lambda tensors: tensors.clear(), "expected a dict of tensors"),
    "a key of the base": (put("model.encoder.conv1.weight", torch.ones(2)), "conv1.weight' in .* none of an expert"),
    "a gate with an output bias": (
        put("model.encoder.layers.0.ffn_clsr.gate_out.catalan.bias", torch.ones(1)),
        "gate_out.catalan.bias' in .* none of an expert",
    ),
    "a key that is a number": (put(3, torch.ones(2)), "holds 3: Tensor"),
    "a value that is no tensor": (put(BIAS, "ones"), "fc2.bias': str"),
    "another size in one layer": (
        put(BIAS, torch.ones(17)),
        r"proj.fc2.bias of .*decoder.layers.1.* \[17\], expected \[16\]",
    ),
    "wrong dimensions": (put(BIAS, torch.ones(1, 16)), r"\[1, 16\], expected \[16\]"),
    "a gate without dimensions": (
        put("model.encoder.layers.0.ffn_clsr.gate_in.catalan.weight", torch.tensor(1.0)),
        "expected matrices",
    ),
    "integers": (put(BIAS, torch.ones(16, dtype=torch.int64)), "torch.int64, expected floating point"),
    "NaN": (put(BIAS, torch.full((16,), torch.nan)), "fc2.bias of .* NaN or infinite"),
    "infinity": (put(BIAS, torch.full((16,), torch.inf)), "NaN or infinite"),
    "a sparse tensor": (put(BIAS, torch.ones(16).to_sparse()), "not a plain one"),
    "a tensor that repeats one number": (put(BIAS, torch.ones(1).expand(16)), "not a plain one"),
}


@pytest.mark.parametrize(("change", "error"), WRONG.values(), ids=WRONG)
def test_wrong_checkpoints_are_refused_and_nothing_is_written(tiny_whisper, tmp_path, change, error):
    tensors = checkpoint_of(tiny_whisper())
    change(tensors)
    torch.save(tensors, tmp_path / "expert.bin")
    with pytest.raises(ValueError, match=error):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "out" / "ca")
    assert [path.name for path in tmp_path.iterdir()] == ["expert.bin"]


@pytest.mark.parametrize(
    ("name", "language", "error"),
    [
        ("catalan", "gl", r"no 'galician' \(language='gl'\) but \['catalan'\]"),
        ("catalan", "catalann", "did you mean 'catalan'"),
        ("klingon", None, "'klingon' is not a Whisper language"),
    ],
)
def test_languages_that_the_file_or_whisper_has_not(tiny_whisper, tmp_path, name, language, error):
    torch.save(checkpoint_of(tiny_whisper(), language=name), tmp_path / "expert.bin")
    with pytest.raises(ValueError, match=error):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "out", language)


class Exploit:
    """What it is unpickled to: a file that is written."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_pickle_runs_nothing(tiny_whisper, tmp_path, save):
    canary = tmp_path / "canary"
    tensors = checkpoint_of(tiny_whisper())
    tensors[BIAS] = Exploit(canary)
    save(tensors, tmp_path / "expert.bin")
    with pytest.raises(ValueError, match="nothing in it was run"):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Exploit(canary)))  # the exploit works
    assert canary.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no checkpoint", b"\x80\x02}q\x00."])
def test_files_that_are_no_checkpoint(tmp_path, content):
    (tmp_path / "expert.bin").write_bytes(content)
    with pytest.raises(ValueError, match="Expected an expert.<language>.bin"):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_naver_expert(tmp_path / "nowhere", tmp_path / "out")


def test_an_output_folder_with_content_stays_as_it_is(tiny_whisper, tmp_path):
    torch.save(checkpoint_of(tiny_whisper()), tmp_path / "expert.bin")
    folder = tmp_path / "ca"
    folder.mkdir()
    convert_naver_expert(tmp_path / "expert.bin", folder)  # an empty one is taken
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode  # as readable as any
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_naver_expert(tmp_path / "expert.bin", folder)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "expert.bin")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failure_while_writing_leaves_nothing(tiny_whisper, tmp_path, monkeypatch):
    torch.save(checkpoint_of(tiny_whisper()), tmp_path / "expert.bin")

    def full_disk(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("peft_clsr.checkpoints.convert_naver.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        convert_naver_expert(tmp_path / "expert.bin", tmp_path / "ca")
    assert [path.name for path in tmp_path.iterdir()] == ["expert.bin"]
