"""Languages that Whisper does not know, and dialects, on the Hub."""

import json

import pytest
import torch
from helpers import QUIET, logits_of, randomize
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model

from peft_clsr import CLSRConfig, list_languages, load_language, push_language, read_languages, save_language

REPO = "me/experts"
LANGUAGES = ["ca", "ca-valencia", "hsb"]


@pytest.fixture
def whisper(tiny_whisper):
    def build():
        model = tiny_whisper(init_std=0.2)
        model.name_or_path = model.config._name_or_path = "me/tiny-whisper"
        return model

    return build


@pytest.fixture
def model(whisper):
    settings = {**QUIET, "gate_dim": 8}
    model = get_peft_model(whisper(), CLSRConfig.paper(language="ca", **settings), adapter_name="ca")
    model.add_adapter("valencian", CLSRConfig.paper(language="CA_valencia", **settings))
    model.add_adapter("hsb", CLSRConfig.paper(language="Upper Sorbian", prompt_language="Romanian", **settings))
    for seed, name in enumerate(model.peft_config):
        randomize(model, name, seed=seed)
    return model.eval()


def test_each_has_its_own_folder_row_and_prompt(hub, whisper, model, inputs):
    for language in LANGUAGES:
        push_language(model, REPO, language)
    listed = list_languages(REPO)
    assert [(entry.code, entry.subfolder, entry.prompt_language) for entry in listed] == [
        ("ca", "ca", "ca"),
        ("ca-valencia", "ca-valencia", "ca"),
        ("hsb", "hsb", "ro"),
    ]
    config = json.loads(hub.files(REPO)["hsb/adapter_config.json"])
    assert (config["language"], config["prompt_language"]) == ("hsb", "ro")

    card = hub.files(REPO)["README.md"].decode()
    for cell in ("| Catalan (ca) |", "| Catalan, valencia (ca-valencia) |", "| Upper Sorbian (hsb) |"):
        assert cell in card
    assert "another language's token stands for: Upper Sorbian (hsb) by ro." in card
    assert ModelCard(card).data.language == ["ca", "hsb"]  # the Hub knows no variants

    loaded = load_language(whisper(), REPO, ["CA-Valencia", "Upper Sorbian"]).eval()
    assert list(loaded.peft_config) == ["ca-valencia", "hsb"]
    assert loaded.peft_config["hsb"].prompt_language == "ro"
    assert torch.equal(logits_of(loaded, inputs, "ca-valencia"), logits_of(model, inputs, "valencian"))
    assert torch.equal(logits_of(loaded, inputs, "hsb"), logits_of(model, inputs, "hsb"))


def test_a_dialect_that_is_not_there_takes_its_language_with_a_warning(hub, whisper, model, caplog):
    push_language(model, REPO, "ca")
    loaded = load_language(whisper(), REPO, "ca-valencia")
    assert "me/experts has none for 'ca-valencia', so that for 'ca' is loaded, which is broader" in caplog.text
    assert list(loaded.peft_config) == ["ca"]
    with pytest.raises(ValueError, match=r"me/experts has nothing for 'hsb'; it has ca \(Catalan\)"):
        load_language(whisper(), REPO, "hsb")


def test_an_adapter_saved_before_prompts_loads_as_before(whisper, model, inputs, tmp_path):
    folder = save_language(model, tmp_path, "ca")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["prompt_language"]
    path.write_text(json.dumps(config))
    assert [entry.prompt_language for entry in read_languages(tmp_path)] == ["ca"]
    loaded = PeftModel.from_pretrained(whisper(), folder, adapter_name="ca").eval()
    assert (loaded.peft_config["ca"].language, loaded.peft_config["ca"].prompt_language) == ("ca", "ca")
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs, "ca"))
