"""An adapter that is loaded through PEFT on another base model of the same shapes is named, and a copy is not."""

import json
import os
import warnings

import pytest
from helpers import clsr
from peft import PeftConfig, PeftModel

from peft_clsr import CLSRConfig, save_language


@pytest.fixture
def whisper(tiny_whisper):
    def build(name, seed=0):
        model = tiny_whisper(seed=seed)
        model.name_or_path = model.config.name_or_path = str(name)
        return model

    return build


def warned(load):
    """Our warnings while `load` runs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    return [str(warning.message) for warning in caught if "was trained on the base model" in str(warning.message)]


def load(base, folder):
    return lambda: PeftModel.from_pretrained(base, folder, adapter_name="ca")


@pytest.mark.parametrize("by", ["from_pretrained", "load_adapter", "transformers"])
def test_an_adapter_of_another_base_model_is_named_by_every_way_of_loading(whisper, tmp_path, by):
    clsr(whisper("openai/whisper-base")).save_pretrained(tmp_path)
    other = whisper("me/whisper-base-finetuned", seed=1)
    ways = {
        "from_pretrained": load(other, tmp_path / "ca"),
        "load_adapter": lambda: clsr(other, ("uk",)).load_adapter(tmp_path / "ca", "ca"),
        "transformers": lambda: other.load_adapter(str(tmp_path / "ca"), "ca"),
    }
    (message,) = warned(ways[by])
    assert "the base model 'openai/whisper-base', and this model is 'me/whisper-base-finetuned'" in message
    assert "load the adapter on 'openai/whisper-base'" in message


@pytest.mark.parametrize(
    "name",
    [
        "openai/whisper-base",
        "/data/whisper-base",
        "./whisper-base/",
        "",
        "/cache/models--openai--whisper-base/snapshots/1f",
    ],
)
def test_the_same_base_model_or_a_copy_of_it_is_not_named(whisper, tmp_path, name):
    clsr(whisper("openai/whisper-base")).save_pretrained(tmp_path)
    assert warned(load(whisper(name), tmp_path / "ca")) == []


def test_the_recorded_hash_decides_where_there_is_one(whisper, tmp_path):
    save_language(clsr(whisper("openai/whisper-base"), language="ca"), tmp_path, "ca")
    assert warned(load(whisper("/data/model"), tmp_path / "ca")) == []
    for name in ("/data/whisper-base", "openai/whisper-base"):
        (message,) = warned(load(whisper(name, seed=1), tmp_path / "ca"))
        assert "their weights differ" in message
    # A record of other weights says nothing about these.
    record = tmp_path / "ca" / "language.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "weights_sha256": "0"}))
    assert warned(load(whisper("/data/whisper-base", seed=1), tmp_path / "ca")) == []


def test_a_relative_path_of_the_base_model_is_saved_as_an_absolute_one(whisper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whisper("").save_pretrained("base")
    model = clsr(whisper("./base"))
    model.save_pretrained("adapters")
    assert PeftConfig.from_pretrained("adapters/ca").base_model_name_or_path == os.path.join(tmp_path, "base")
    assert model.peft_config["ca"].base_model_name_or_path == "./base"
    assert warned(load(whisper("./base"), "adapters/ca")) == []
    for name in ("openai/whisper-base", "./gone", None):
        assert CLSRConfig.paper(base_model_name_or_path=name).to_dict()["base_model_name_or_path"] == name
