"""A bad CLSR adapter is refused by every door before anything of it reaches the model, and no pickle is read."""

import copy
import json
import os
import pickle
import struct
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    load_peft_weights,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from peft_clsr import CLSRConfig, check_adapter_folder
from peft_clsr.checkpoints.configs import is_clsr, read_config
from peft_clsr.tuner.adapter_names import check_adapter_name, check_subfolder

SIZES = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
SETTINGS = {"gate_dim": 4, "language": "ca", "init_weights": False}
GATE = "base_model.model.model.encoder.layers.0.fc1.clsr_gate_in.weight"


class Exploit:
    """What it is unpickled to: a file that is written."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.fixture
def base(tiny_whisper):
    return lambda **sizes: tiny_whisper(**SIZES | sizes)


@pytest.fixture
def folder(base, tmp_path):
    """A good adapter."""
    get_peft_model(base(), CLSRConfig.paper(**SETTINGS), adapter_name="ca").save_pretrained(tmp_path / "experts")
    return tmp_path / "experts" / "ca"


def with_adapters(base):
    model = get_peft_model(base, CLSRConfig.paper(**SETTINGS), adapter_name="ca")
    model.add_adapter("uk", CLSRConfig.paper(**SETTINGS))
    return model


def with_native_adapter(base):
    inject_adapter_in_model(CLSRConfig.paper(**SETTINGS), base, "ca")
    base._hf_peft_config_loaded = True  # as transformers' add_adapter, which in 5.24 wants a PEFT that is not out
    return base


# Each door: the model that it takes, and how an adapter comes in.
DOORS = {
    "check_adapter_folder": (with_adapters, lambda model, folder: check_adapter_folder(folder, model)),
    "PeftModel.from_pretrained": (lambda base: base, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "PeftModel.from_pretrained, low memory": (
        lambda base: base,
        lambda model, folder: PeftModel.from_pretrained(
            model, folder.parent, subfolder=folder.name, adapter_name="ro", low_cpu_mem_usage=True, is_trainable=True
        ),
    ),
    "load_adapter": (with_adapters, lambda model, folder: model.load_adapter(folder, "ro", is_trainable=True)),
    "transformers": (lambda base: base, lambda model, folder: model.load_adapter(str(folder))),
    "transformers, further": (
        with_native_adapter,
        lambda model, folder: model.load_adapter(str(folder), "ro", is_trainable=True),
    ),
    "hotswap_adapter": (
        with_adapters,
        lambda model, folder: hotswap_adapter(model, str(folder), adapter_name="ca", torch_device="cpu"),
    ),
}
OVER_AN_ADAPTER = {
    "load_adapter over an adapter": (with_adapters, lambda model, folder: model.load_adapter(folder, "ca")),
}


def snapshot(model):
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "tensors": {name: (tensor, tensor.detach().clone()) for name, tensor in tensors.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": {name: (module, module.training) for name, module in model.named_modules()},
        "hooks": len(model._forward_hooks) + len(model._forward_pre_hooks),
        "adapters": {name: config.to_dict() for name, config in (getattr(model, "peft_config", None) or {}).items()},
        "active": [
            (name, module.active_adapters)
            for name, module in model.named_modules()
            if hasattr(module, "_active_adapter")
        ],
        "active adapter": getattr(model, "active_adapter", None) if isinstance(model, PeftModel) else None,
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "config": model.config.to_dict(),
    }


def assert_same(before, model):
    after = snapshot(model)
    for name, (tensor, value) in before.pop("tensors").items():
        assert after["tensors"][name][0] is tensor and torch.equal(tensor, value), name
    del after["tensors"]
    assert before == after


@contextmanager
def unchanged(model):
    before = snapshot(model)
    generator = torch.get_rng_state()
    yield
    assert_same(before, model)
    assert torch.equal(torch.get_rng_state(), generator)


# ---------------------------------------------------------------- good adapters


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"expert_rank": 2},
        {"modules_to_save": ["layer_norm"]},
        {"exclude_modules": r".*encoder.*"},
        {"target_modules": r".*\.layers\.\d+\.(fc1)", "output_modules": ["fc2"]},
        {"max_audio_seconds": 0.5},
    ],
)
def test_good_adapters_pass_and_the_model_stays_as_it_is(base, tmp_path, config):
    config = CLSRConfig.paper(**SETTINGS | config)
    get_peft_model(base(), config, adapter_name="ca").save_pretrained(tmp_path)
    for model in (None, base(), get_peft_model(base(), copy.deepcopy(config), adapter_name="uk")):
        with unchanged(model) if model is not None else contextmanager(lambda: (yield))():
            checked = check_adapter_folder(tmp_path / "ca", model)
        assert (checked.language, checked.gate_dim) == ("ca", 4)
        assert checked.expert_rank == config.expert_rank


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_type_passes(base, folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    check_adapter_folder(folder, base())


@pytest.mark.parametrize("door", DOORS | OVER_AN_ADAPTER)
def test_good_adapters_come_in_by_every_door(base, folder, door):
    prepare, load = (DOORS | OVER_AN_ADAPTER)[door]
    model = prepare(base())
    load(model, folder)
    values = [tensor.sum().item() for tensor in load_file(folder / "adapter_model.safetensors").values()]
    loaded = [p.sum().item() for name, p in model.named_parameters() if "clsr_" in name]
    if door != "check_adapter_folder":
        assert set(values) <= set(loaded)


def test_an_adapter_that_only_the_hub_has_is_loaded_at_the_commit_that_was_checked(
    base, folder, tmp_path, monkeypatch
):
    repository, commit = tmp_path / "cache" / "models--us--experts", "0123456789abcdef" * 2 + "01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    os.rename(folder, repository / "snapshots" / commit / "ca")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    read = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.safe_load_file", lambda path, **kw: read.append(path) or load_file(path)
    )
    options = {"subfolder": "ca", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = PeftModel.from_pretrained(base(), "us/experts", adapter_name="ca", **options)
    model.load_adapter("us/experts", "uk", **options)
    model.load_adapter("us/experts", "uk", **options)
    hotswap_adapter(model, "us/experts", adapter_name="ca", torch_device="cpu", **options)
    native = base()
    native.load_adapter("us/experts", adapter_kwargs=options)
    expected = repository / "snapshots" / commit / "ca" / "adapter_model.safetensors"
    assert list(map(Path, read)) == [expected] * 4

    expected.rename(expected.with_name("adapter_model.bin"))
    for load in (model.load_adapter, lambda *args, **kw: PeftModel.from_pretrained(base(), *args, **kw)):
        with pytest.raises(ValueError, match="no adapter_model.safetensors"):
            load("us/experts", "ro", **options)
    for load in (
        lambda: model.load_adapter("us/experts", "uk", **options),
        lambda: native.load_adapter("us/experts", "ro", adapter_kwargs=options),
    ):
        with unchanged(model), unchanged(native), pytest.raises(ValueError, match="no adapter_model.safetensors"):
            load()


def test_adapters_of_other_methods_load_as_ever(base, tmp_path):
    get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "adapter_model.bin")
    weights.unlink()
    model = PeftModel.from_pretrained(base(), tmp_path, adapter_name="NUL")  # a name that is not ours to judge
    assert model.active_adapters == ["NUL"]
    assert load_peft_weights(str(tmp_path))


# ---------------------------------------------------------------- bad folders


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def change_header(folder, change):
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    change(header)
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])


def change_bytes(folder, change, name="adapter_model.safetensors"):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def set_tensor(key, value):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({key: value}))


def fill(value):
    return lambda folder: change_tensors(folder, lambda tensors: tensors[GATE].view(-1)[3:4].fill_(value))


def only_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({GATE: Exploit(folder / "canary")}, folder / "adapter_model.bin")


BAD_WEIGHTS = {
    "only a pickle": (only_pickle, "only adapter_model.bin, a pickle"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is none"),
    "an empty file": (lambda folder: change_bytes(folder, lambda content: b""), "0 bytes and a header of 0"),
    "truncated data": (lambda folder: change_bytes(folder, lambda content: content[:-1]), "no valid safetensors file"),
    "truncated header": (lambda folder: change_bytes(folder, lambda content: content[:50]), "truncated"),
    "data at the end": (
        lambda folder: change_bytes(folder, lambda content: content + b"\0"),
        "no valid safetensors file",
    ),
    "a header of 2^63 bytes": (
        lambda folder: change_bytes(folder, lambda content: struct.pack("<Q", 2**63) + content[8:]),
        "header of 9223372036854775808, expected at most 16777216",
    ),
    "a header of 20 MB": (
        lambda folder: change_bytes(folder, lambda content: struct.pack("<Q", 2 * 10**7) + b" " * (3 * 10**7)),
        "header of 20000000, expected at most 16777216",
    ),
    "offsets outside": (
        lambda folder: change_header(folder, lambda header: header[GATE].update(data_offsets=[0, 2**40])),
        "no valid safetensors file",
    ),
    "offsets that overlap": (
        lambda folder: change_header(folder, lambda header: header[GATE].update(data_offsets=[4, 132])),
        "no valid safetensors file",
    ),
    "a shape that overflows": (
        lambda folder: change_header(folder, lambda header: header[GATE].update(shape=[2**62, 2**62])),
        "no valid safetensors file",
    ),
    "a nested header": (
        lambda folder: change_header(
            folder, lambda header: header.update(__metadata__=json.loads("[" * 500 + "]" * 500))
        ),
        "no valid safetensors file",
    ),
    "integers": (
        lambda folder: change_header(folder, lambda header: header[GATE].update(dtype="I32")),
        "of type I32, expected floating point",
    ),
    "8-bit floats": (set_tensor(GATE, torch.zeros(4, 8).to(torch.float8_e4m3fn)), "of type F8_E4M3"),
    "NaN": (fill(torch.nan), "gate_in.weight' in .* NaN or infinite"),
    "infinity": (fill(-torch.inf), "gate_in.weight' in .* NaN or infinite"),
    "another shape": (set_tensor(GATE, torch.zeros(8, 4)), "layers.0.*gate_in.weight"),
    "other dimensions": (set_tensor(GATE, torch.zeros(32)), "layers.0.*gate_in.weight"),
    "a missing tensor": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.pop(GATE)),
        "encoder.layers.0",
    ),
    "a layer too many": (
        lambda folder: change_tensors(
            folder,
            lambda tensors: tensors.update(
                {key.replace("layers.0", "layers.1"): t.clone() for key, t in tensors.items()}
            ),
        ),
        "layers.1.fc1.* expected nothing|do not fit adapter 'ca'",
    ),
    "a layer too few": (
        lambda folder: change_tensors(
            folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if "decoder" in key]
        ),
        "decoder.layers.0.* has the shape nothing|do not fit adapter 'ca'",
    ),
    "a weight of the base model": (
        set_tensor("base_model.model.model.encoder.conv1.weight", torch.zeros(8, 80, 3)),
        "encoder.conv1.weight.*(no weights of the base model|expected nothing)",
    ),
    "a weight without a prefix": (set_tensor("proj_out.weight", torch.zeros(8)), "proj_out.weight"),
}
BAD_CONFIGS = {
    "another gate": ({"gate_dim": 5}, "gate_dim=5"),
    "a huge gate": ({"gate_dim": 2**40}, "gate_dim in .* 1099511627776, expected int"),
    "a low rank that is none": ({"expert_rank": 2}, "expert_rank=2"),
    "a string for a number": ({"gate_dim": "4"}, "gate_dim in .* '4', expected int"),
    "a boolean for a number": ({"gate_dim": True}, "gate_dim in .* True, expected int"),
    "a number for a boolean": ({"init_weights": 1}, "init_weights in .* 1, expected bool"),
    "NaN for a probability": ({"gate_dropout": float("nan")}, "gate_dropout in .* nan, expected float"),
    "a probability above 1": ({"gate_dropout": 1.5}, "gate_dropout is 1.5"),
    "a list of numbers": ({"target_modules": [1, 2]}, "target_modules"),
    "no language": ({"language": "../ca"}, "'../ca' is neither a language tag"),
    "modules that are not there": ({"target_modules": ["fc7"]}, "has the shape|match"),
    "no module at all": ({"target_modules": ["a"], "output_modules": ["b"]}, "Target modules|No modules|nothing"),
    "a regular expression that takes hours": ({"exclude_modules": r"(.|\w|[a-z])*!"}, "may take hours"),
    "another that takes hours": ({"target_modules": "(a|a)" * 30 + "!"}, "may take hours"),
    "a module that takes hours": ({"modules_to_save": ["(.*)*!"]}, "expected names of modules"),
    "the whole model to save": ({"modules_to_save": ["model"]}, "No modules were targeted|expected nothing"),
    "a context that does not fit": ({"max_audio_seconds": 0.333}, "0.333"),
    "a mapping of modules": ({"auto_mapping": {"base_model_class": ["os"]}}, "auto_mapping"),
}
BOMBS = {
    "nesting": ('{"peft_type": "CLSR", "language": ' + "[" * 10**6, "cannot be read as JSON"),
    "nesting in a value": (
        '{"peft_type": "CLSR", "language": ' + '{"a":' * 10**5 + "1" + "}" * 10**5 + "}",
        "cannot be read as JSON",
    ),
    "an integer of 10^5 digits": (
        '{"peft_type": "CLSR", "gate_dim": ' + "9" * 10**5 + "}",
        "cannot be read as JSON",
    ),
    "5 MB": ('{"peft_type": "CLSR", "language": "' + "c" * 5 * 10**6 + '"}', "larger than 4194304 bytes"),
    "5 MB that hide their method": (
        r'{"peft_typ\u0065": "CLSR", "language": "' + "c" * 5 * 10**6 + '"}',
        "larger than 4194304 bytes",
    ),
    "no JSON": ('"peft_type": "CLSR", gate_dim: 4', "cannot be read as JSON"),
}
NO_METHOD = {"nesting": "[" * 10**6, "no JSON": "gate_dim: 4", "no object": "[]", "nothing": "", "no type": "{}"}
CONFIG_DOORS = {name: door for name, door in DOORS.items() if name != "hotswap_adapter"}


@pytest.mark.parametrize("fault", BAD_WEIGHTS)
@pytest.mark.parametrize("door", DOORS | OVER_AN_ADAPTER)
def test_bad_weights_are_refused_by_every_door_and_the_model_stays_as_it_is(base, folder, door, fault):
    prepare, load = (DOORS | OVER_AN_ADAPTER)[door]
    change, error = BAD_WEIGHTS[fault]
    model = prepare(base())
    change(folder)
    with unchanged(model), pytest.raises((ValueError, RuntimeError) if "hotswap" in door else ValueError, match=error):
        load(model, folder)
    assert not (folder / "canary").exists()


@pytest.mark.parametrize("fault", BAD_CONFIGS)
@pytest.mark.parametrize("door", CONFIG_DOORS)
def test_bad_configs_are_refused_by_every_door_and_the_model_stays_as_it_is(base, folder, door, fault):
    prepare, load = DOORS[door]
    values, error = BAD_CONFIGS[fault]
    model = prepare(base())
    change_config(folder, **values)
    with unchanged(model), pytest.raises(ValueError, match=error):
        load(model, folder)


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("door", DOORS)
def test_bombs_for_the_parser_are_refused_by_every_door(base, folder, door, bomb):
    prepare, load = DOORS[door]
    text, error = BOMBS[bomb]
    model = prepare(base())
    (folder / "adapter_config.json").write_text(text)
    with unchanged(model), pytest.raises(ValueError, match=error):
        load(model, folder)
    for read in (PeftConfig, CLSRConfig, AutoPeftModel):
        with pytest.raises(ValueError, match=error):
            read.from_pretrained(folder)


@pytest.mark.parametrize("text", NO_METHOD.values(), ids=NO_METHOD)
@pytest.mark.parametrize("door", DOORS)
def test_configs_of_no_known_method_are_refused_by_every_door(base, folder, door, text):
    """PEFT refuses them, whatever its error: they may be of any method. Where CLSR is expected, our error is clear."""
    prepare, load = DOORS[door]
    model = prepare(base())
    (folder / "adapter_config.json").write_text(text)
    with unchanged(model), pytest.raises((ValueError, RecursionError, TypeError, KeyError)):
        load(model, folder)
    if not text.endswith(("]", "}")):
        with pytest.raises(ValueError, match="cannot be read as JSON"):
            CLSRConfig.from_pretrained(folder)


def test_an_adapter_of_another_base_is_refused(base, folder):
    for sizes in ({"encoder_layers": 2}, {"decoder_ffn_dim": 16}, {"d_model": 16}):
        for prepare, load in DOORS.values():
            model = prepare(base(**sizes))
            with unchanged(model), pytest.raises((ValueError, RuntimeError), match="does not fit|do not fit"):
                load(model, folder)


def test_a_config_of_the_caller_is_checked_against_the_weights_too(base, folder):
    model = base()
    with unchanged(model), pytest.raises(ValueError, match="not the expert and the gate of an FFN with gate_dim=8"):
        PeftModel.from_pretrained(model, folder, config=CLSRConfig.paper(**SETTINGS | {"gate_dim": 8}))
    with unchanged(model), pytest.raises(ValueError, match="not the expert and the gate of an FFN with gate_dim=8"):
        model.load_adapter(str(folder), peft_config=CLSRConfig.paper(**SETTINGS | {"gate_dim": 8}))


# ---------------------------------------------------------------- pickles


@pytest.mark.parametrize("door", DOORS | OVER_AN_ADAPTER)
def test_no_door_reads_a_pickle(base, folder, door, monkeypatch):
    prepare, load = (DOORS | OVER_AN_ADAPTER)[door]
    model = prepare(base())
    torch.save({GATE: Exploit(folder / "canary")}, folder / "adapter_model.bin")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    load(model, folder)  # the safetensors beside it
    (folder / "adapter_model.safetensors").unlink()
    model = prepare(base())
    with unchanged(model), pytest.raises(ValueError, match="only adapter_model.bin, a pickle"):
        load(model, folder)
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        load_peft_weights(str(folder))
    assert not (folder / "canary").exists()


def test_the_exploit_works(tmp_path):
    torch.save({GATE: Exploit(tmp_path / "canary")}, tmp_path / "adapter_model.bin")
    torch.load(tmp_path / "adapter_model.bin", weights_only=False)
    assert (tmp_path / "canary").exists()
    assert pickle.loads(pickle.dumps(Exploit(tmp_path / "again"))) is None and (tmp_path / "again").exists()


def test_a_base_is_not_loaded_with_an_adapter_that_is_a_pickle(base, tmp_path, monkeypatch):
    base().save_pretrained(tmp_path / "base")
    whisper = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base")
    get_peft_model(whisper, CLSRConfig.paper(**SETTINGS)).save_pretrained(tmp_path / "adapter")
    torch.save({}, tmp_path / "adapter" / "adapter_model.bin")
    for load in (WhisperForConditionalGeneration.from_pretrained, AutoPeftModel.from_pretrained):
        load(tmp_path / "adapter")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    with pytest.raises(ValueError, match="use_safetensors=False would read a pickle"):
        whisper.load_adapter(str(tmp_path / "adapter"), "ca", use_safetensors=False)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    for load in (WhisperForConditionalGeneration.from_pretrained, AutoPeftModel.from_pretrained):
        with pytest.raises(ValueError, match="only adapter_model.bin, a pickle"):
            load(tmp_path / "adapter")


# ---------------------------------------------------------------- names

GOOD_NAMES = ["ca", "pt-BR", "ca_valencia", "default", "català", "українська", "C", "console", "com10", "a" * 64]
BAD_NAMES = {
    "": "is empty",
    "..": "leaves its folder",
    "../ca": "separator",
    "/ca": "separator",
    "a/b": "separator",
    "a\\b": "separator",
    "C:": "separator",
    "ca\0": "separator",
    "ca\n": "separator",
    "ca\u202e": "separator",
    "ca\ud800": "separator",
    "ca*": "separator",
    " ca": "space",
    "ca ": "space",
    "NUL": "device on Windows",
    "con": "device on Windows",
    "Com1": "device on Windows",
    "LPT³": "device on Windows",
    "a" * 65: "65 characters",
    "v1.0": "has no dot",
    "keys": "none of a module's attributes",
    "training": "none of a module's attributes",
    "forward": "none of a module's attributes",
}


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_usable_names(base, name):
    check_adapter_name(name)
    check_subfolder(f"experts/{name}")
    assert get_peft_model(base(), CLSRConfig.paper(**SETTINGS), adapter_name=name).active_adapters == [name]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_unusable_names_are_refused_for_new_and_loaded_adapters(base, folder, name):
    with pytest.raises(ValueError, match=BAD_NAMES[name]):
        check_adapter_name(name)
    plain, adapted, native = base(), with_adapters(base()), with_native_adapter(base())
    with unchanged(plain), pytest.raises(ValueError, match=BAD_NAMES[name]):
        PeftModel.from_pretrained(plain, folder, adapter_name=name)
    with unchanged(adapted), pytest.raises(ValueError, match=BAD_NAMES[name]):
        adapted.load_adapter(folder, name)
    if name:  # both are "default" there
        with unchanged(native), pytest.raises(ValueError, match=BAD_NAMES[name]):
            native.load_adapter(str(folder), name)
    with unchanged(plain), pytest.raises(ValueError, match=BAD_NAMES[name]):
        get_peft_model(plain, CLSRConfig.paper(**SETTINGS), adapter_name=name)


@pytest.mark.parametrize(
    "subfolder", ["../ca", "/ca", "ca/../../other", "a\\b", "ca\0", "experts/NUL.txt", "ca.", None]
)
def test_subfolders_that_leave_the_folder_are_refused(base, folder, subfolder):
    with pytest.raises(ValueError, match="subfolder"):
        check_subfolder(subfolder)


def test_a_subfolder_beside_the_folder_is_not_loaded(base, folder):
    (folder.parent / "inside").mkdir()
    model = with_adapters(base())
    for load in (model.load_adapter, lambda *args, **kwargs: PeftModel.from_pretrained(model, *args, **kwargs)):
        for subfolder in ("../ca", str(folder)):
            with unchanged(model), pytest.raises(ValueError, match="subfolder"):
                load(folder.parent / "inside", "ro", subfolder=subfolder)
    model.load_adapter(folder.parent.parent, "ro", subfolder="experts/ca")


@pytest.mark.parametrize(
    ("pattern", "is_good"),
    [
        (r".*\.(encoder|decoder)\.layers\.\d+\.fc1", True),
        (r"model\.decoder\.layers\.[0-3]\.fc1", True),
        (r".*encoder.*", True),
        (r".*.*.*.*", False),
        (r"(a+)+", False),
        (r"(a|a)b", False),
        (r"(\w+)\1", False),
        (r"a{1,1000}", False),
        (r"(?=.*).*", False),
        (r"[", False),
        ("a" * 1001, False),
    ],
)
def test_regular_expressions_that_are_matched_in_no_time(folder, pattern, is_good):
    change_config(folder, exclude_modules=pattern)
    if is_good:
        read_config(folder / "adapter_config.json")
    else:
        with pytest.raises(ValueError, match="may take hours"):
            read_config(folder / "adapter_config.json")


# ---------------------------------------------------------------- fuzzing

KEYS = ["base_model.model.model.encoder.layers.0.fc1.clsr_expert.weight", "proj_out.weight", "model", "", "\0", GATE]
numbers = st.one_of(st.integers(-(2**70), 2**70), st.integers(-1, 12), st.floats())
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["fc1", "fc2", ".*", "(a+)+$"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
config_keys = st.sampled_from([*CLSRConfig.__dataclass_fields__, "runtime_config", "gate_shape"]).filter(
    lambda key: key != "peft_type"  # of another type, it is not ours
)
mutations = st.lists(
    st.one_of(
        st.tuples(st.just("config value"), config_keys, json_values),
        st.tuples(st.just("config without"), config_keys, st.none()),
        st.tuples(st.just("config bytes"), st.integers(0, 900), st.binary(max_size=3)),
        st.tuples(st.just("tensor name"), st.integers(0, 13), st.sampled_from(KEYS) | st.text(max_size=8)),
        st.tuples(
            st.just("tensor dtype"),
            st.integers(0, 13),
            st.sampled_from(["F32", "F16", "F64", "I8", "BOOL", "F8_E5M2", "X"]),
        ),
        st.tuples(st.just("tensor shape"), st.integers(0, 13), st.lists(numbers, max_size=3)),
        st.tuples(st.just("tensor offsets"), st.integers(0, 13), st.lists(numbers, min_size=1, max_size=3)),
        st.tuples(st.just("tensor entry"), st.integers(0, 13), json_values),
        st.tuples(st.just("tensor without"), st.integers(0, 13), st.none()),
        st.tuples(st.just("header value"), st.sampled_from(["__metadata__", "x"]), json_values),
        st.tuples(st.just("header size"), st.integers(0, 2**64 - 1) | st.integers(0, 5000), st.none()),
        st.tuples(st.just("bytes"), st.integers(0, 6000), st.binary(min_size=1, max_size=8)),
        st.tuples(
            st.just("number"),
            st.integers(0, 900),
            st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"]),
        ),
        st.tuples(st.just("cut"), st.integers(0, 6000), st.none()),
        st.tuples(st.just("more"), st.just(0), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("pickle"), st.booleans(), st.none()),
    ),
    min_size=1,
    max_size=3,
)


def mutate(folder, canary, config_text, weights, mutation):
    """Write the adapter of `config_text` and `weights` into `folder`, changed by each part of `mutation`."""
    config = json.loads(config_text)
    config_bytes = None
    size = struct.unpack("<Q", weights[:8])[0]
    header, data = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    raw, has_weights, has_pickle = [], True, False
    for kind, where, value in mutation:
        names = [name for name in header if name != "__metadata__"]
        name = names[where % len(names)] if kind.startswith("tensor") and names else None
        entry = header.get(name)
        if kind == "config value":
            config[where] = value
        elif kind == "config without":
            config.pop(where, None)
        elif kind == "config bytes":
            config_bytes = (where, value)
        elif kind == "tensor name" and name:
            header[value] = header.pop(name)
        elif kind == "tensor without" and name:
            del header[name]
        elif kind == "tensor entry" and name:
            header[name] = value
        elif kind.startswith("tensor") and isinstance(entry, dict):
            field = {"tensor dtype": "dtype", "tensor shape": "shape", "tensor offsets": "data_offsets"}[kind]
            header[name] = entry | {field: value}
        elif kind == "header value":
            header[where] = value
        elif kind == "pickle":
            has_pickle, has_weights = True, has_weights and where
        else:
            raw.append((kind, where, value))
    text = json.dumps(config).encode()
    if config_bytes:
        text = text[: config_bytes[0]] + config_bytes[1] + text[config_bytes[0] + 1 :]
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + data
    for kind, where, value in raw:
        if kind == "header size":
            content = struct.pack("<Q", where) + content[8:]
        elif kind == "bytes":
            content = content[:where] + value + content[where + len(value) :]
        elif kind == "number":
            start = len(content) - len(data) + where // 4 * 4
            content = content[:start] + value + content[start + 4 :]
        elif kind == "cut":
            content = content[:where]
        elif kind == "more":
            content += value
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "adapter_model.safetensors").write_bytes(content)
    if not has_weights:
        (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").unlink(missing_ok=True)
    if has_pickle:
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Exploit(canary)))


@pytest.mark.filterwarnings("ignore")
def test_thousand_mutated_adapters_crash_nothing(base, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was read"))
    config_text, weights = (
        (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    doors = DOORS | OVER_AN_ADAPTER
    models = {door: prepare(base()) for door, (prepare, _) in doors.items()}
    canary, outcomes = tmp_path / "canary", Counter()

    @settings(
        max_examples=1000,
        derandomize=True,
        database=None,
        deadline=timedelta(seconds=10),  # a hang, not a slow machine
        suppress_health_check=list(HealthCheck),
    )
    @given(mutation=mutations, door=st.sampled_from(sorted(doors)))
    def load_mutated(mutation, door):
        mutate(folder, canary, config_text, weights, mutation)
        try:
            assume(is_clsr(read_config(folder / "adapter_config.json")))
        except ValueError:
            pass
        (prepare, load), model = doors[door], models[door]
        before = snapshot(model)
        try:
            load(model, folder)
        except ValueError:
            assert_same(before, model)
            outcomes["refused"] += 1
        except RuntimeError as error:
            assert door == "hotswap_adapter" and "do not fit adapter" in str(error)
            assert_same(before, model)
            outcomes["refused"] += 1
        else:  # a mutation that means nothing
            outcomes["loaded"] += 1
            assert all(parameter.isfinite().all() for parameter in model.parameters())
            models[door] = prepare(base())
        assert not canary.exists()

    load_mutated()
    assert outcomes["refused"] >= 500 and outcomes["loaded"] >= 50, outcomes
