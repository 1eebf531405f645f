"""An expert that starts as a copy of another: from a folder, a repository or the same model; checks before copies."""

import json

import pytest
import torch
from helpers import SMALL, logits_of, random_clsr, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from peft_clsr import (
    CLSRConfig,
    list_languages,
    load_language,
    push_language,
    read_languages,
    save_language,
    warm_start,
)
from peft_clsr.hub.card import write_folder_card

REPO = "me/experts"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def whisper(tiny_whisper):
    def build(name="me/tiny-whisper", **kwargs):
        model = tiny_whisper(init_std=0.2, **kwargs)
        model.name_or_path = model.config._name_or_path = name
        return model

    return build


@pytest.fixture
def experts(whisper):
    """A factory: a model with trained-looking adapters."""

    def build(*languages, base=None, **config):
        return random_clsr(whisper() if base is None else base, *languages, **config)

    return build


@pytest.fixture
def folder(experts, tmp_path):
    """A folder with experts of Romanian and French."""
    model = experts("ro", "fr")
    for language in ("ro", "fr"):
        save_language(model, tmp_path / "experts", language)
    return tmp_path / "experts"


def weights_of(model, adapter):
    return {
        name.replace(f".{adapter}.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if "clsr_" in name and f".{adapter}." in name
    }


def assert_same(one, other):
    assert one.keys() == other.keys() and one
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_unchanged(model, before, adapter="ca"):
    assert_same(weights_of(model, adapter), before)
    assert model.peft_config[adapter].started_from is None


# ------------------------------------------------------------------------------------------------ the three sources


def test_an_adapter_starts_as_a_copy_of_a_folders(experts, folder, inputs):
    source = experts("ro", "fr")
    model = experts("ca", "el")
    other, mode = weights_of(model, "el"), model.training
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    warm_start(model, "ca", folder, "ro")
    assert_same(weights_of(model, "ca"), weights_of(source, "ro"))
    assert torch.equal(logits_of(model, inputs, "ca"), logits_of(source, inputs, "ro"))
    assert_same(weights_of(model, "el"), other)
    assert model.training == mode and model.active_adapter == "ca"
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert model.peft_config["ca"].language is None  # that of the new adapter is kept
    assert model.peft_config["ca"].started_from == "ro of the folder experts"
    assert model.peft_config["el"].started_from is None


@pytest.mark.parametrize("language", ["ro", "Romanian", "<|ro|>"])
def test_the_language_selects_an_expert_of_a_folder(experts, folder, language):
    model = experts("ca")
    warm_start(model, "ca", str(folder), language=language)
    assert_same(weights_of(model, "ca"), weights_of(experts("ro"), "ro"))


def test_the_folder_of_one_adapter_needs_no_language(experts, folder):
    model = experts("ca")
    warm_start(model, "ca", folder / "ro")
    assert_same(weights_of(model, "ca"), weights_of(experts("ro"), "ro"))
    assert model.peft_config["ca"].started_from == "ro of the folder ro"
    with pytest.raises(ValueError, match=r"ro has nothing for 'fr'; it has ro \(Romanian\)"):
        warm_start(model, "ca", folder / "ro", "fr")


def test_a_folder_of_one_language_needs_no_language(experts, tmp_path):
    save_language(experts("ro"), tmp_path / "one", "ro")
    model = experts("ca")
    warm_start(model, "ca", tmp_path / "one")
    assert_same(weights_of(model, "ca"), weights_of(experts("ro"), "ro"))


def test_an_adapter_starts_as_a_copy_of_a_repositorys(experts, hub):
    push_language(experts("ro"), REPO, "ro")
    push_language(experts("fr"), REPO, "fr")
    model = experts("ca")
    warm_start(model, "ca", REPO, language="ro")
    assert_same(weights_of(model, "ca"), weights_of(experts("ro"), "ro"))
    commit = hub.repos[REPO].refs["main"]
    assert model.peft_config["ca"].started_from == f"ro of me/experts (commit {commit[:8]})"
    assert not [path for path in hub.paths_of("GET") if f"fr/{WEIGHTS}" in path]  # only what is copied is downloaded


def test_a_revision_names_the_commit_of_a_repository(experts, hub, whisper):
    push_language(experts("ro"), REPO, "ro")
    first = hub.repos[REPO].refs["main"]
    push_language(randomize(experts("ro"), seed=9), REPO, "ro")
    model = experts("ca")
    warm_start(model, "ca", REPO, "ro", revision=first)
    assert_same(weights_of(model, "ca"), weights_of(experts("ro"), "ro"))


def test_an_adapter_starts_as_a_copy_of_one_on_the_model(experts, monkeypatch, folder):
    model = experts("ca", "ro")
    monkeypatch.chdir(folder)  # a folder "ro" is there too
    source = weights_of(model, "ro")
    warm_start(model, "ca", "ro")
    assert_same(weights_of(model, "ca"), source)
    assert model.peft_config["ca"].started_from == "ro of the same model"
    randomize(model, "ca", seed=1)
    assert_same(weights_of(model, "ro"), source)  # a copy, not the same tensors
    with pytest.raises(ValueError, match="'ca' cannot start as a copy of itself"):
        warm_start(model, "ca", "ca")
    with pytest.raises(ValueError, match="language is 'fr', but 'ro' is an adapter on the model"):
        warm_start(model, "ca", "ro", language="fr")
    warm_start(model, "ca", "./fr")
    assert_same(weights_of(model, "ca"), weights_of(experts("ro", "fr"), "fr"))


def test_full_experts_and_modules_to_save_are_copied_too(experts, tmp_path):
    settings = {"expert_rank": None, "modules_to_save": ["layer_norm"]}
    source = experts("ro", **settings)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if ".modules_to_save.ro." in name:
                parameter.add_(1)
    save_language(source, tmp_path / "experts", "ro")
    model = experts("ca", **settings)
    warm_start(model, "ca", tmp_path / "experts", "ro")
    saved = {name.replace(".ro.", ".ca."): p for name, p in source.named_parameters() if ".ro." in name}
    own = dict(model.named_parameters())
    assert any("modules_to_save" in name for name in saved)
    assert all(torch.equal(own[name], parameter) for name, parameter in saved.items())


def test_a_model_with_transformers_own_add_adapter_is_started_too(whisper, experts, folder, inputs):
    model = whisper()
    model.add_adapter(CLSRConfig.paper(language="ca", **SMALL), adapter_name="ca")
    warm_start(model, "ca", folder, "ro")
    assert torch.equal(model.eval()(**inputs).logits, logits_of(experts("ro"), inputs))


# ------------------------------------------------------------------------------------------------------ the record


def test_the_source_stays_with_the_adapter_when_it_is_saved_and_loaded(experts, whisper, folder, tmp_path):
    model = experts("ca")
    warm_start(model, "ca", folder, "ro")
    model.save_pretrained(tmp_path / "plain")  # PEFT's, as a trainer's checkpoints
    assert json.loads((tmp_path / "plain/ca/adapter_config.json").read_text())["started_from"].startswith("ro of")
    loaded = PeftModel.from_pretrained(whisper(), tmp_path / "plain", subfolder="ca", adapter_name="ca")
    assert loaded.peft_config["ca"].started_from == "ro of the folder experts"
    save_language(loaded, tmp_path / "again", "ca")
    record = json.loads((tmp_path / "again/ca/language.json").read_text())
    assert record["started_from"] == "ro of the folder experts"
    assert str(tmp_path) not in (tmp_path / "again/ca/README.md").read_text()


def test_the_card_names_the_source(experts, folder, hub):
    push_language(experts("ro"), REPO, "ro")
    model = experts("ca")
    warm_start(model, "ca", REPO, "ro")
    push_language(model, "me/catalan", "ca")
    (language,) = list_languages("me/catalan")
    assert language.started_from.startswith("ro of me/experts (commit ")
    card = hub.files("me/catalan")["README.md"].decode()
    assert f"Catalan (ca): started from {language.started_from}" in card
    loaded = load_language(experts("el"), "me/catalan", "ca")
    assert loaded.peft_config["ca"].started_from == language.started_from
    assert [entry.started_from for entry in list_languages(REPO)] == [None]


def test_a_sources_name_from_a_file_cannot_break_the_card(experts, tmp_path):
    save_language(experts("ca"), tmp_path, "ca")
    path = tmp_path / "ca/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "started_from": "<!-- a\n| b -->"}))
    (language,) = read_languages(tmp_path)
    assert language.started_from == "<!-- a\n| b -->"
    write_folder_card(tmp_path)
    assert "started from &lt;!-- a \\| b -->" in (tmp_path / "README.md").read_text()


def test_swapped_weights_bring_the_name_of_their_source(experts, folder, tmp_path):
    model = experts("ca")
    warm_start(model, "ca", folder, "ro")
    hotswap_adapter(model, str(folder / "fr"), "ca")
    assert model.peft_config["ca"].started_from is None


# ------------------------------------------------------------------------------------ refused, with nothing changed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_rank": 2}, r"expert_rank is None \(a full copy\) in adapter 'ca' and 2 in ro of .*expert_rank=2"),
        ({"gate_dim": 4}, "gate_dim is 8 in adapter 'ca' and 4 in ro of .*gate_dim=4"),
        (
            {"exclude_modules": ".*encoder.*"},
            r"adapter 'ca' is in 8 modules and ro of .* in 4, of which 4 are the same \(exclude_modules is None here "
            r"and '\.\*encoder\.\*' there\)",
        ),
        ({"modules_to_save": ["layer_norm"]}, r"modules_to_save is None here and \['layer_norm'\] there"),
    ],
)
@pytest.mark.parametrize("where", ["folder", "model"])
def test_other_sizes_and_modules_are_refused(experts, tmp_path, where, settings, message):
    model = experts("ca")
    source = experts("ro", **settings)
    save_language(source, tmp_path, "ro")
    if where == "model":
        model.load_adapter(tmp_path / "ro", "ro")
    before = weights_of(model, "ca")
    with pytest.raises(ValueError, match=message):
        warm_start(model, "ca", "ro" if where == "model" else tmp_path, language="ro")
    assert_unchanged(model, before)


def test_a_source_of_another_base_model_is_refused(experts, whisper, folder, hub):
    push_language(experts("ro"), REPO, "ro")
    for base in (whisper(seed=1), whisper("me/other")):
        for source in (folder, REPO):
            model = experts("ca", base=base)
            before = weights_of(model, "ca")
            with pytest.raises(ValueError, match="trained on (another|the) base model.*allow_other_base=True"):
                warm_start(model, "ca", source, "ro")
            assert_unchanged(model, before)
            warm_start(model, "ca", source, "ro", allow_other_base=True)
            assert_same(weights_of(model, "ca"), weights_of(experts("ro"), "ro"))
            base = model.unload()


def test_a_folder_without_a_record_of_another_base_is_warned_of(experts, whisper, folder):
    (folder / "ro/language.json").unlink()
    model = experts("ca", base=whisper("me/other"))
    with pytest.warns(UserWarning, match="was trained on the base model 'me/tiny-whisper'"):
        warm_start(model, "ca", folder, "ro")


def test_a_source_of_another_context_is_warned_of(experts, tmp_path):
    save_language(experts("ro", max_audio_seconds=0.5), tmp_path, "ro")
    with pytest.warns(UserWarning, match="ro of the folder .* a context of 0.5 s, and adapter 'ca' has all"):
        warm_start(experts("ca"), "ca", tmp_path, "ro")


def test_a_larger_whispers_source_is_refused(experts, whisper, tmp_path):
    save_language(experts("ro", base=whisper("", d_model=32)), tmp_path, "ro")
    (tmp_path / "ro/language.json").unlink()
    model = experts("ca")
    before = weights_of(model, "ca")
    with pytest.raises(ValueError, match=r"has the shape .* expected .* the adapter does not fit the model"):
        warm_start(model, "ca", tmp_path, "ro")
    assert_unchanged(model, before)


@pytest.mark.parametrize("damage", ["nan", "truncated", "pickle", "config"])
def test_a_broken_source_is_refused(experts, folder, damage):
    path = folder / "ro" / WEIGHTS
    if damage == "nan":
        save_file({key: torch.full_like(tensor, torch.nan) for key, tensor in load_file(path).items()}, path)
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "pickle":
        path.rename(path.with_name("adapter_model.bin"))
    else:
        (folder / "ro/adapter_config.json").write_text('{"peft_type": "LORA"}')
    model = experts("ca")
    before = weights_of(model, "ca")
    with pytest.raises(ValueError, match="NaN|truncated|pickle|has nothing for 'ro'"):
        warm_start(model, "ca", folder, "ro")
    assert_unchanged(model, before)


def test_values_that_are_not_finite_are_not_copied_on_the_model(experts):
    model = experts("ca", "ro")
    before = weights_of(model, "ca")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if ".ro." in name).fill_(torch.inf)
    with pytest.raises(ValueError, match="adapter 'ro' has values that are NaN or infinite"):
        warm_start(model, "ca", "ro")
    assert_unchanged(model, before)


def test_a_missing_adapter_is_refused_with_the_line_that_adds_one(experts, whisper, tmp_path):
    save_language(experts("ro", expert_rank=2), tmp_path, "ro")
    model = experts("el")
    line = r"model\.add_adapter\('ca', CLSRConfig\(language='ca', expert_rank=2, gate_dim=8\)\)"
    with pytest.raises(ValueError, match=rf"no adapter 'ca' \(it has el\).*{line}"):
        warm_start(model, "ca", tmp_path, "ro")
    model.add_adapter("ca", CLSRConfig(language="ca", expert_rank=2, gate_dim=8))  # what the message says
    warm_start(model, "ca", tmp_path, "ro")
    with pytest.raises(ValueError, match=r"WhisperForConditionalGeneration without adapters.*get_peft_model\(model, "):
        warm_start(whisper(), "ca", tmp_path, "ro")
    with pytest.raises(
        ValueError, match=r"CLSRConfig\(language='gn', prompt_language='ro', expert_rank=2, gate_dim=8\)"
    ):
        warm_start(model, "gn", tmp_path, "ro")  # Whisper does not know Guarani
    lora = get_peft_model(whisper(), LoraConfig(target_modules=["fc1"]), adapter_name="ca")
    with pytest.raises(ValueError, match="adapter 'ca' is of the method LORA, expected CLSR"):
        warm_start(lora, "ca", tmp_path, "ro")


def test_a_source_that_is_not_there_is_named(experts, folder, tmp_path, hub):
    model = experts("ca")
    with pytest.raises(ValueError, match=r"experts has fr \(French\), ro \(Romanian\): name the language"):
        warm_start(model, "ca", folder)
    with pytest.raises(ValueError, match=r"has nothing for 'pt'; it has fr \(French\), ro \(Romanian\)"):
        warm_start(model, "ca", folder, "pt")
    with pytest.raises(ValueError, match="source '.*expert' does not exist.*did you mean '.*experts'"):
        warm_start(model, "ca", tmp_path / "expert", "ro")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no language"):
        warm_start(model, "ca", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"'me/none' is no adapter on the model \(ca\), no folder here and no repo"):
        warm_start(model, "ca", "me/none", "ro")
