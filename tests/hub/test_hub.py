"""Languages on the Hub, over HTTP with the real client, against the small server of `hub_server.py`."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import QUIET, logits_of, randomize
from hub_server import Fault
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import PeftModel, get_peft_model
from training import collate, make_args, make_dataset
from transformers import WhisperForConditionalGeneration

from peft_clsr import (
    CLSRConfig,
    DistillationTrainer,
    DistillationTrainingArguments,
    HubLanguage,
    error_rates,
    list_languages,
    load_language,
    push_folder,
    push_language,
    read_languages,
    save_language,
    update_model_card,
)
from peft_clsr.hub.card import language_card, write_folder_card
from peft_clsr.hub.record import check_results

REPO = "me/experts"
BASE = "me/tiny-whisper"
METRICS = {"google/fleurs": {"wer": 0.25, "cer": 0.1, "base_wer": 0.5, "base_cer": 0.2, "split": "test"}}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def whisper(tiny_whisper):
    def build(name=BASE, **kwargs):
        model = tiny_whisper(init_std=0.2, **kwargs)
        model.name_or_path = model.config._name_or_path = name
        return model

    return build


def experts(base, *languages, seed=5, **config):
    """A model with trained-looking adapters, each of other weights."""
    config = {**QUIET, "gate_dim": 8, **config}
    for number, language in enumerate(languages):
        settings = CLSRConfig.paper(language=language, **config)
        if number == 0:
            model = get_peft_model(base, settings, adapter_name=language)
        else:
            model.add_adapter(language, settings)
    return randomize(model, seed=seed).eval()


def card_of(hub, repo=REPO, revision="main"):
    return hub.files(repo, revision)["README.md"].decode()


def rows_of(card):
    """The rows of the card's table of languages, cells stripped."""
    lines = [line for line in card.splitlines() if re.match(r"\| [A-Z]\w+ \(", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# ---------------------------------------------------------------- out and in


def test_the_path_of_a_local_base_model_is_not_published(whisper, hub, tmp_path, caplog):
    whisper("").save_pretrained(tmp_path / "base")
    model = experts(whisper(str(tmp_path / "base")), "ca")
    for _ in range(2):
        push_language(model, REPO, "ca")
    config = json.loads(hub.files(REPO)["ca/adapter_config.json"])
    assert config["base_model_name_or_path"] is None and config["language"] == "ca"
    assert not [name for name, content in hub.files(REPO).items() if str(tmp_path).encode() in content]
    assert rows_of(card_of(hub))[0][2] == "not on the Hub"
    warned = [record.message for record in caplog.records if "is a folder of this machine" in record.message]
    assert len(warned) == 1 and f"the base model '{tmp_path / 'base'}'" in warned[0]
    # The recorded hash tells the base model elsewhere.
    load_language(whisper("/elsewhere/copy"), REPO, "ca")
    with pytest.raises(ValueError, match="have different weights"):
        load_language(whisper("/elsewhere/other", seed=1), REPO, "ca")


def test_a_pushed_language_comes_back_bit_for_bit(hub, whisper, inputs):
    model = experts(whisper(), "ca", "ro")
    expected = {name: logits_of(model, inputs, name) for name in ("ca", "ro")}
    commit = push_language(model, REPO, "Catalan", metrics=METRICS)
    assert commit.oid == hub.repos[REPO].refs["main"]
    assert set(hub.files(REPO)) == {
        ".gitattributes",
        "README.md",
        "ca/adapter_config.json",
        "ca/adapter_model.safetensors",
        "ca/language.json",
    }
    push_language(model, REPO, "ro")
    loaded = load_language(whisper(), REPO, ["catalan", "ro"])
    assert isinstance(loaded, PeftModel) and loaded.active_adapter == "ca"
    for name, logits in expected.items():
        assert torch.equal(logits_of(loaded.eval(), inputs, name), logits)


def test_peft_loads_a_language_by_its_subfolder(hub, whisper, inputs):
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    loaded = PeftModel.from_pretrained(whisper(), REPO, subfolder="ca", adapter_name="ca").eval()
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_a_language_joins_those_that_the_model_has_and_the_active_one_stays(hub, whisper, inputs):
    push_language(experts(whisper(), "ro"), REPO, "ro")
    model = experts(whisper(), "ca")
    expected = logits_of(model, inputs)
    assert load_language(model, REPO) is model
    assert list(model.peft_config) == ["ca", "ro"] and model.active_adapter == "ca"
    assert torch.equal(logits_of(model, inputs), expected)
    with pytest.raises(ValueError, match="has an adapter 'ro' already"):
        load_language(model, REPO, "ro")


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_experts_of_a_half_precision_base_are_in_float32_unless_told(hub, whisper, autocast, dtype):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    push_language(experts(whisper(), "ro"), REPO, "ro")
    model = load_language(whisper().bfloat16(), REPO, "ca", autocast_adapter_dtype=autocast)
    model = load_language(model, REPO, "ro", autocast_adapter_dtype=autocast)
    for adapter in ("ca", "ro"):
        assert {weight.dtype for name, weight in model.named_parameters() if f".{adapter}." in name} == {dtype}


def test_a_repository_without_an_owner_is_that_of_the_user(hub, whisper):
    push_language(experts(whisper(), "ca"), "experts", "ca")
    assert [entry.code for entry in list_languages(REPO)] == ["ca"]


def test_an_adapter_of_any_name_goes_into_the_folder_of_its_language(hub, whisper, inputs):
    model = get_peft_model(whisper(), CLSRConfig.paper(language="ca", **QUIET))  # "default"
    randomize(model).eval()
    push_language(model, REPO, "default")
    assert "ca/adapter_model.safetensors" in hub.files(REPO)
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca"), inputs), logits_of(model, inputs))


def test_a_language_without_config_language_gets_one(hub, whisper):
    model = get_peft_model(whisper(), CLSRConfig.paper(**QUIET), adapter_name="ca")
    push_language(model, REPO, "ca")
    assert json.loads(hub.files(REPO)["ca/adapter_config.json"])["language"] == "ca"
    assert model.peft_config["ca"].language is None


def test_languages_are_listed_without_weights(hub, whisper):
    model = experts(whisper(), "ro", "ca", expert_rank=2)
    push_language(model, REPO, "ro")
    push_language(model, REPO, "ca", metrics=METRICS)
    hub.requests.clear()
    languages = list_languages(REPO)
    assert [(entry.code, entry.name, entry.base_model, entry.rank, entry.wer) for entry in languages] == [
        ("ca", "Catalan", BASE, 2, 0.25),
        ("ro", "Romanian", BASE, 2, None),
    ]
    assert [entry.size for entry in languages] == [len(hub.files(REPO)[f"{code}/{WEIGHTS}"]) for code in ("ca", "ro")]
    assert not [path for path in hub.paths_of("GET", "HEAD") if path.endswith(WEIGHTS) or "/lfs/" in path]


def test_pushing_a_language_leaves_other_files_as_they_are_in_one_commit(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    HfApi().create_commit(REPO, [CommitOperationAdd("ca/notes.txt", b"mine")], commit_message="notes")
    before = dict(hub.files(REPO))
    push_language(experts(whisper(), "ro", seed=6), REPO, "ro")
    after = hub.files(REPO)
    assert {path: after[path] for path in before if path != "README.md"} == {
        path: content for path, content in before.items() if path != "README.md"
    }
    assert hub.repos[REPO].history[-1] == ("main", "Add Romanian (ro)") and len(hub.repos[REPO].history) == 4


def test_pushing_the_same_again_is_no_commit(hub, whisper):
    model = experts(whisper(), "ca")
    first = push_language(model, REPO, "ca")
    assert push_language(model, REPO, "ca").oid == first.oid


def test_new_weights_without_results_lose_the_results_of_the_old(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca", metrics=METRICS)
    push_language(experts(whisper(), "ca", seed=6), REPO, "ca")
    assert list_languages(REPO)[0].wer is None
    assert "25.0" not in card_of(hub)


def test_push_to_hub_of_peft_pushes_all_languages_and_its_results_are_not_those_of_old_weights(hub, whisper, inputs):
    push_language(experts(whisper(), "ca"), REPO, "ca", metrics=METRICS)
    model = experts(whisper(), "ca", "ro", seed=6)
    model.push_to_hub(REPO)
    assert [(entry.code, entry.wer) for entry in list_languages(REPO)] == [("ca", None), ("ro", None)]
    loaded = load_language(whisper(), REPO).eval()
    for name in ("ca", "ro"):
        assert torch.equal(logits_of(loaded, inputs, name), logits_of(model, inputs, name))
    update_model_card(REPO)
    assert [row[:2] for row in rows_of(card_of(hub))] == [["Catalan (ca)", "ca"], ["Romanian (ro)", "ro"]]


# ---------------------------------------------------------------- revisions, pull requests, private repositories


def test_a_revision_pins(hub, whisper, inputs):
    old = experts(whisper(), "ca")
    commit = push_language(old, REPO, "ca", metrics=METRICS).oid
    new = experts(whisper(), "ca", seed=6)
    push_language(new, REPO, "ca")
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca"), inputs), logits_of(new, inputs))
    assert torch.equal(
        logits_of(load_language(whisper(), REPO, "ca", revision=commit), inputs), logits_of(old, inputs)
    )
    assert [entry.wer for entry in list_languages(REPO, revision=commit)] == [0.25]


def test_a_branch_is_made_and_main_stays(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    main = hub.repos[REPO].refs["main"]
    push_language(experts(whisper(), "ro"), REPO, "ro", revision="next")
    assert hub.repos[REPO].refs["main"] == main
    assert [entry.code for entry in list_languages(REPO, revision="next")] == ["ca", "ro"]


def test_a_pull_request_needs_no_write_access(hub, whisper, monkeypatch):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    monkeypatch.setenv("HF_TOKEN", "hf_yours")
    model = experts(whisper(), "ro")
    with pytest.raises(HfHubHTTPError, match="403"):
        push_language(model, REPO, "ro")
    commit = push_language(model, REPO, "ro", create_pr=True)
    assert commit.pr_revision == "refs/pr/1"
    assert [entry.code for entry in list_languages(REPO)] == ["ca"]
    assert [entry.code for entry in list_languages(REPO, revision="refs/pr/1")] == ["ca", "ro"]
    assert len(rows_of(card_of(hub, revision="refs/pr/1"))) == 2


def test_a_private_repository_is_read_with_the_token_alone(hub, whisper, monkeypatch, tmp_path):
    push_language(experts(whisper(), "ca"), REPO, "ca", private=True)
    assert hub.repos[REPO].private
    assert len(list_languages(REPO)) == 1
    for token in ("hf_yours", None):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache of somebody else"))
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
            list_languages(REPO)
        with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
            load_language(whisper(), REPO, "ca")
    assert load_language(whisper(), REPO, "ca", token="hf_mine").active_adapter == "ca"


def test_a_wrong_token_is_said_and_not_shown(hub, whisper, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(HfHubHTTPError, match="401") as error:
        push_language(experts(whisper(), "ca"), REPO, "ca")
    assert "hf_wrong_secret" not in str(error.value)


def test_what_is_not_there_is_said(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    model = whisper()
    with pytest.raises(ValueError, match=r"me/experts has nothing for 'uk'; it has ca \(Catalan\)"):
        load_language(model, REPO, "uk")
    with pytest.raises(RepositoryNotFoundError):
        load_language(model, "me/none", "ca")
    for name in ("../ca", "/etc", "ca/..", "c\0a", ""):
        with pytest.raises(ValueError, match="adapter name"):
            load_language(model, REPO, name)


# ---------------------------------------------------------------- two at once


def test_a_moved_parent_is_retried_on_top_of_the_new_one(hub, whisper):
    model = experts(whisper(), "ca", "ro", "fr")
    push_language(model, REPO, "ca", metrics=METRICS)

    def somebody_else():
        push_language(model, REPO, "fr", metrics=METRICS)

    hub.faults.append(Fault("POST", "/commit/main$", call=somebody_else))
    push_language(model, REPO, "ro", metrics=METRICS)
    assert [message for _, message in hub.repos[REPO].history[-2:]] == ["Add French (fr)", "Add Romanian (ro)"]
    assert [row[0] for row in rows_of(card_of(hub))] == ["Catalan (ca)", "French (fr)", "Romanian (ro)"]
    assert [entry.wer for entry in list_languages(REPO)] == [0.25] * 3


def test_many_who_push_at_once_lose_nothing(hub, whisper):
    languages = ["ca", "ro", "fr", "el", "bg"]
    models = {language: experts(whisper(), language) for language in languages}
    hub.create(REPO)
    errors = []

    def push(language):
        try:
            push_language(models[language], REPO, language, metrics=METRICS)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=push, args=(language,)) for language in languages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(hub.repos[REPO].history) == 1 + len(languages)
    assert sorted(row[1] for row in rows_of(card_of(hub))) == sorted(languages)
    assert sorted(entry.code for entry in list_languages(REPO)) == sorted(languages)
    assert sorted(ModelCard(card_of(hub)).data.language) == sorted(languages)


def test_a_parent_that_moves_for_ever_is_an_error_and_changes_nothing(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    main = hub.repos[REPO].refs["main"]
    hub.faults.append(Fault("POST", "/commit/main$", status=412, times=100))
    with pytest.raises(HfHubHTTPError, match="412"):
        push_language(experts(whisper(), "ro"), REPO, "ro")
    assert 100 - hub.faults[0].times == 8
    assert hub.repos[REPO].refs["main"] == main


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("POST", "/commit/main$", status) for status in (409, 412, 429, 500, 502, 503, 504)),
        *(("POST", "/preupload/main$", status) for status in (429, 503)),
        *(("POST", "objects/batch$", status) for status in (429, 503)),
        *(("PUT", "^/lfs/", status) for status in (429, 500, 503)),
        *(("GET", "^/api/models/me/experts$", status) for status in (429, 500, 503)),
    ],
)
def test_passing_trouble_is_retried_in_a_push(hub, whisper, inputs, method, path, status):
    hub.faults.append(Fault(method, path, status=status, headers={"Retry-After": "0"}))
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    assert hub.faults[0].times == 0
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca"), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_retried_and_nothing_is_there_afterwards(hub, whisper, status):
    hub.faults.append(Fault("POST", "/commit/main$", status=status, times=100))
    with pytest.raises(HfHubHTTPError, match=str(status)):
        push_language(experts(whisper(), "ca"), REPO, "ca")
    assert 100 - hub.faults[0].times == 1
    assert list(hub.files(REPO)) == [".gitattributes"]
    assert list_languages(REPO) == []


def test_an_upload_that_is_cut_is_sent_again(hub, whisper, inputs):
    hub.faults.append(Fault("PUT", "^/lfs/", drop_after=1000, times=2))
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    assert hub.faults[0].times == 0
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca"), inputs), logits_of(model, inputs))


def test_an_upload_that_is_always_cut_leaves_the_language_as_it_was(hub, whisper, inputs):
    old = experts(whisper(), "ca")
    push_language(old, REPO, "ca")
    hub.faults.append(Fault("PUT", "^/lfs/", drop_after=1000, times=100))
    with pytest.raises(Exception, match="(?i)disconnected|reset|closed|uploading"):
        push_language(experts(whisper(), "ca", seed=6), REPO, "ca")
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca"), inputs), logits_of(old, inputs))


def test_a_commit_whose_answer_is_lost_can_be_pushed_again(hub, whisper):
    model = experts(whisper(), "ca")
    hub.faults.append(Fault("POST", "/commit/main$", after=True))
    with pytest.raises(Exception, match="(?i)disconnected|reset|closed"):
        push_language(model, REPO, "ca")
    assert push_language(model, REPO, "ca").oid == hub.repos[REPO].refs["main"]
    assert len(hub.repos[REPO].history) == 2


@pytest.mark.parametrize("drops", [1, 3])
def test_a_download_that_is_cut_goes_on_where_it_was(hub, whisper, inputs, drops):
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    hub.requests.clear()
    hub.faults.append(Fault("GET", "^/lfs/", drop_after=700, times=drops))
    loaded = load_language(whisper(), REPO, "ca")
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert len([path for path in hub.paths_of("GET") if path.startswith("/lfs/")]) == 1 + drops


def test_a_download_that_is_always_cut_leaves_nothing_to_load(hub, whisper, inputs, monkeypatch, tmp_path):
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    base = whisper()
    expected = logits_of(base, inputs)
    hub.faults.append(Fault("GET", "^/lfs/", drop_after=0, times=100))
    with pytest.raises(Exception, match="(?i)closed|peer|disconnected|incomplete"):
        load_language(base, REPO, "ca")
    hub.faults.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((LocalEntryNotFoundError, ValueError)):  # the config is in the cache, the weights are not
        load_language(base, REPO, "ca")
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    assert not any("clsr_" in name for name, _ in base.named_parameters())
    assert torch.equal(logits_of(base, inputs), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert torch.equal(logits_of(load_language(base, REPO, "ca"), inputs), logits_of(model, inputs))


@pytest.mark.parametrize("status", [403, 429, 503])
@pytest.mark.parametrize("path", ["/api/models/me/experts", "/resolve/", "^/lfs/"])
def test_trouble_in_a_download_ends_in_the_language_or_in_a_clear_error(hub, whisper, inputs, status, path):
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    method = "HEAD" if path == "/resolve/" else "GET"
    hub.faults.append(Fault(method, path, status=status, headers={"Retry-After": "0"}, times=100))
    base = whisper()
    with pytest.raises(OSError, match=rf"{status}|cannot find the requested files"):
        load_language(base, REPO, "ca")
    assert not any("clsr_" in name for name, _ in base.named_parameters())
    hub.faults.clear()
    assert torch.equal(logits_of(load_language(base, REPO, "ca"), inputs), logits_of(model, inputs))


# ---------------------------------------------------------------- offline


def test_what_was_loaded_once_is_there_offline(hub, whisper, inputs, monkeypatch):
    model = experts(whisper(), "ca", "ro")
    push_language(model, REPO, "ca", metrics=METRICS)
    push_language(model, REPO, "ro")
    load_language(whisper(), REPO, "ca")
    listed = list_languages(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca"), inputs), logits_of(model, inputs, "ca"))
    assert [(entry.code, entry.wer) for entry in list_languages(REPO)] == [("ca", 0.25), ("ro", None)]
    assert list_languages(REPO)[0] == listed[0]
    with pytest.raises((LocalEntryNotFoundError, ValueError), match="ro|snapshot"):
        load_language(whisper(), REPO, "ro")
    assert hub.requests == []


# ---------------------------------------------------------------- the base model


def test_another_base_model_is_refused_by_name(hub, whisper, inputs):
    model = experts(whisper(), "ca")
    push_language(model, REPO, "ca")
    base = whisper("you/other-whisper")
    with pytest.raises(ValueError, match="trained on the base model 'me/tiny-whisper'.*'you/other-whisper'"):
        load_language(base, REPO, "ca")
    assert not any("clsr_" in name for name, _ in base.named_parameters())
    loaded = load_language(base, REPO, "ca", allow_other_base=True)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_another_base_model_of_the_same_name_is_refused_by_a_hash(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    base = whisper(seed=1)
    with pytest.raises(ValueError, match="shared FFN 'model.decoder.layers.1.fc2'.* different weights"):
        load_language(base, REPO, "ca")
    assert load_language(base, REPO, "ca", allow_other_base=True).active_adapter == "ca"


def test_a_base_model_of_other_sizes_is_refused_whatever_is_allowed(hub, whisper, inputs):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    base = whisper(decoder_ffn_dim=48)
    expected = logits_of(base, inputs)
    for allow_other_base in (False, True):
        with pytest.raises(ValueError):
            load_language(base, REPO, "ca", allow_other_base=allow_other_base)
    assert torch.equal(logits_of(base, inputs), expected)


def test_the_base_model_in_a_folder_here_is_known_by_its_hash(hub, whisper, tmp_path):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    whisper().save_pretrained(tmp_path / "base")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # what float32 was published, in other precisions
        base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=dtype)
        assert load_language(base, REPO, "ca").active_adapter == "ca"
    whisper(seed=1).save_pretrained(tmp_path / "other")
    for dtype in (torch.float32, torch.bfloat16):
        base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "other", dtype=dtype)
        with pytest.raises(ValueError, match="different weights"):
            load_language(base, REPO, "ca")


def test_an_adapter_trained_in_half_precision_fits_the_same_base_in_float32(hub, whisper):
    half = whisper().to(torch.float16)
    push_language(experts(half, "ca"), REPO, "ca")
    assert load_language(whisper(), REPO, "ca").active_adapter == "ca"
    with pytest.raises(ValueError, match="different weights"):
        load_language(whisper(seed=1), REPO, "ca")


# ---------------------------------------------------------------- nothing but safetensors, nothing half


def test_a_pickle_is_neither_fetched_nor_loaded(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca")
    files = hub.files(REPO)
    del files["ca/adapter_model.safetensors"]
    files["ca/adapter_model.bin"] = b"\x80\x04cos\nsystem\n(S'true'\ntR."
    base = whisper()
    hub.requests.clear()
    with pytest.raises(ValueError, match="safetensors"):
        load_language(base, REPO, "ca")
    assert not [path for path in hub.paths_of("GET", "HEAD") if "adapter_model.bin" in path]
    assert not any("clsr_" in name for name, _ in base.named_parameters())


def test_of_several_languages_none_is_loaded_where_one_is_broken(hub, whisper):
    model = experts(whisper(), "ca", "ro")
    push_language(model, REPO, "ca")
    push_language(model, REPO, "ro")
    hub.files(REPO)["ro/adapter_model.safetensors"] = b"\xff" * 100
    base = whisper()
    with pytest.raises(ValueError):
        load_language(base, REPO)
    assert not any("clsr_" in name for name, _ in base.named_parameters())


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_languages_of_two_contexts_are_refused_and_the_model_is_as_before(hub, whisper, inputs, is_wrapped):
    for language, seconds in (("ca", 0.5), ("ro", 0.4)):
        push_language(experts(whisper(), language, max_audio_seconds=seconds), REPO, language)
    base = whisper()
    model = experts(base, "fr") if is_wrapped else base
    expected = logits_of(model, inputs)
    with pytest.raises(ValueError, match="max_audio_seconds"):
        load_language(model, REPO)
    assert {name.split(".clsr_")[1].split(".")[1] for name, _ in base.named_parameters() if ".clsr_" in name} == (
        {"fr"} if is_wrapped else set()
    )
    assert torch.equal(logits_of(model, inputs), expected)


def test_weights_that_are_not_finite_are_not_published(hub, whisper):
    model = experts(whisper(), "ca")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "clsr_expert" in name).view(-1)[0] = torch.nan
    with pytest.raises(ValueError):
        push_language(model, REPO, "ca")
    assert hub.paths_of("POST", "PUT") == []


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"peft_type": "CLSR", "language": "ro", "expert_rank": "x"}',
        b" " * 2_000_000,
    ],
)
@pytest.mark.parametrize("name", ["adapter_config.json", "language.json"])
def test_a_broken_language_is_refused_and_hides_no_other(hub, whisper, content, name):
    model = experts(whisper(), "ca", "ro")
    push_language(model, REPO, "ca")
    push_language(model, REPO, "ro")
    if name == "language.json" and b"CLSR" in content:  # an object: a wrong one here
        record = json.loads(hub.files(REPO)["ro/language.json"])
        content = json.dumps({**record, "results": {"a": {"wer": "b"}}}).encode()
    hub.files(REPO)[f"ro/{name}"] = content
    assert [entry.code for entry in list_languages(REPO)] == ["ca"]
    base = whisper()
    with pytest.raises(ValueError, match=f"{name}|language 'x'"):
        load_language(base, REPO, "ro")
    assert not any("clsr_" in parameter for parameter, _ in base.named_parameters())
    push_language(experts(whisper(), "fr"), REPO, "fr")
    assert [row[1] for row in rows_of(card_of(hub))] == ["ca", "fr"]


@pytest.mark.parametrize(
    ("metrics", "error"),
    [
        ({"fleurs": {"wer": float("nan")}}, "wer on 'fleurs' is nan"),
        ({"fleurs": {"cer": -0.1}}, "cer on 'fleurs' is -0.1"),
        ({"fleurs": {"wer": "25 %"}}, "wer on 'fleurs' is '25 %'"),
        ({"fleurs": {"accuracy": 1.0}}, r"\['accuracy'\], expected some of wer"),
        ({"wer": 0.25}, "'wer': 0.25, expected the name of a test set"),
    ],
)
def test_results_that_make_no_sense_are_refused_before_anything_is_pushed(hub, whisper, metrics, error):
    with pytest.raises(ValueError, match=error):
        push_language(experts(whisper(), "ca"), REPO, "ca", metrics=metrics)
    assert hub.paths_of("POST", "PUT") == []


# ---------------------------------------------------------------- the card


def test_the_card_says_what_is_known(hub, whisper, tmp_path):
    model = experts(whisper(), "ca", "ro", expert_rank=2)
    args = make_args(
        DistillationTrainingArguments, tmp_path / "secret_place", hub_token="hf_mine", learning_rate=0.003
    )
    metrics = {**METRICS, "other/set": {"wer": 0.3}}
    push_language(model, REPO, "ca", metrics=metrics, training_args=args, gate_means={"encoder.layers.0": 0.5})
    push_language(model, REPO, "ro")
    text = card_of(hub)
    data = ModelCard(text).data
    assert (data.language, data.base_model, data.library_name) == (["ca", "ro"], BASE, "peft")
    assert data.pipeline_tag == "automatic-speech-recognition" and "clsr" in data.tags
    assert [(r.dataset_type, r.dataset_config, r.metric_name, r.metric_value) for r in data.eval_results] == [
        ("google/fleurs", "ca", "WER (ca)", 25.0),
        ("google/fleurs", "ca", "CER (ca)", 10.0),
        ("other/set", "ca", "WER (ca)", 30.0),
    ]
    size = f"{len(hub.files(REPO)['ca/adapter_model.safetensors']) / 1e6:.1f} MB"
    start = ["Catalan (ca)", "ca", BASE, "rank 2", size]
    assert rows_of(text)[:2] == [
        [*start, "google/fleurs (test)", "25.0 (50.0)", "10.0 (20.0)", "50, -"],
        [*start, "other/set", "30.0", "", "50, -"],
    ]
    assert "`learning_rate` 0.003" in text and "`kd_loss` js" in text
    assert "(ca/gate_means.png)" in text and hub.files(REPO)["ca/gate_means.png"].startswith(b"\x89PNG")
    pushed = b"\n".join(hub.files(REPO).values())
    assert b"secret_place" not in pushed and b"hf_mine" not in pushed


MEANS = {"model.encoder.layers.0.fc1": 1.0, "model.encoder.layers.1.fc1": 0.5, "model.decoder.layers.0.fc1": 0.125}


def drawn_by(monkeypatch):
    """The figures that are drawn from now on."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (figures.append(figure), savefig(figure, *args, **kw))
    )
    return figures


def test_the_picture_of_the_card_has_both_error_rates_and_the_gates_of_each_layer(hub, whisper, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = drawn_by(monkeypatch)
    metrics = {"a $set_ of a very long name/with $ in it": METRICS["google/fleurs"]}
    push_language(experts(whisper(), "ca"), REPO, "ca", metrics=metrics, gate_means=MEANS)
    (figure,) = figures
    bars, encoder, decoder = figure.axes
    assert figure.get_suptitle() == "Catalan (ca)"
    assert [bar.get_height() for bar in bars.patches] == [50.0, 25.0]  # before, after
    assert [side.lines[0].get_ydata().tolist() for side in (encoder, decoder)] == [[1.0, 0.5], [0.125]]
    content = hub.files(REPO)["ca/gate_means.png"]
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width >= 1200 and height >= 500
    assert rows_of(card_of(hub))[0][-1] == "75, 12"
    (language,) = list_languages(REPO)
    assert language.gate_means == MEANS and language.has_plot
    update_model_card(REPO)
    assert "(ca/gate_means.png)" in card_of(hub)


def test_a_card_without_matplotlib_has_the_table_and_says_how_to_get_the_picture(hub, whisper, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    push_language(experts(whisper(), "ca"), REPO, "ca", metrics=METRICS, gate_means=MEANS)
    text = card_of(hub)
    assert rows_of(text)[0][-3:] == ["25.0 (50.0)", "10.0 (20.0)", "75, 12"]
    assert "gate_means.png" not in text and "ca/gate_means.png" not in hub.files(REPO)
    assert "no picture of Catalan (ca): it needs `peft_clsr[plots]`" in text and "peft_clsr[plots]" in caplog.text


def test_the_hub_accepts_the_metadata_of_a_card(hub, whisper):
    push_language(experts(whisper(), "ca"), REPO, "ca", metrics=METRICS, gate_means=MEANS)
    hub.requests.clear()
    ModelCard(card_of(hub)).validate()
    assert hub.paths_of("POST") == ["/api/validate-yaml"]


def test_means_that_are_no_shares_are_no_record(tmp_path, whisper, caplog):
    folder = save_language(experts(whisper(), "ca"), tmp_path, "ca", gate_means=MEANS)
    record = json.loads((folder / "language.json").read_text())
    (folder / "language.json").write_text(json.dumps({**record, "gate_means": {"x": "</table>"}}))
    assert read_languages(tmp_path) == [] and "is no record of a language" in caplog.text


def test_a_card_says_which_rate_to_read():
    results = {"my/set": {"wer": 1.0, "cer": 0.1, "base_wer": 1.0, "base_cer": 0.3}}
    languages = [
        HubLanguage("ca", "Catalan", "ca", results=results),
        HubLanguage("ja", "Japanese", "ja", results=results),
    ]
    text = language_card(languages, "me/x")
    assert [row[6:] for row in rows_of(text)] == [
        ["100.0 (100.0)", "10.0 (30.0)", ""],
        ["100.0 (100.0)", "**10.0 (30.0)**", ""],
    ]
    assert "read CER, in bold: Japanese (ja)." in text
    assert [result.metric_name for result in ModelCard(text).data.eval_results] == [
        "WER (ca)",
        "CER (ca)",
        "CER (ja)",
        "WER (ja)",
    ]
    assert [(language.rate, language.error_rate, language.wer) for language in languages] == [
        ("wer", 1.0, 1.0),
        ("cer", 0.1, 1.0),
    ]
    assert "in bold" not in language_card(languages[:1], "me/x")


def test_a_row_of_error_rates_is_a_result_as_it_is():
    pytest.importorskip("jiwer")
    row = error_rates(["a"], ["b"], language="ca")["ca"]
    assert check_results({"my/set": row})["my/set"] == {"wer": 1.0, "cer": 1.0, "utterances": 1, "skipped": 0}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_people_wrote_into_the_card_stays(hub, whisper, newline):
    push_language(experts(whisper(), "ca"), REPO, "ca", metrics=METRICS)
    card = ModelCard(card_of(hub))
    card.data.license = "cc-by-4.0"
    card.data.language = ["ca", "oc"]
    card.data.tags = ["clsr", "community"]
    by_hand = huggingface_hub.EvalResult("automatic-speech-recognition", "my/set", "My set", "wer", 9.9)
    card.data.eval_results.append(by_hand)
    mine = ["# Our experts é", "Ask us before you use them.", "## Thanks", "To all who read."]
    card.text = "\n".join([mine[0], mine[1], card.text.split("\n", 2)[2], mine[2], mine[3]])
    text = str(card).replace("\n", newline)
    hub.files(REPO)["README.md"] = text.encode()
    push_language(experts(whisper(), "ro"), REPO, "ro")
    after = card_of(hub)
    assert after.count("\n") == after.count(newline)
    body = after.split(newline)
    assert [body.index(line) for line in mine] == sorted(body.index(line) for line in mine)
    assert after.count("peft_clsr: written by the library") == 1
    data = ModelCard(after).data
    assert data.license == "cc-by-4.0" and data.language == ["ca", "oc", "ro"] and data.tags == ["clsr", "community"]
    assert [result.dataset_type for result in data.eval_results] == ["my/set", "google/fleurs", "google/fleurs"]
    assert len(rows_of(after)) == 2


def test_a_card_without_markers_or_with_half_of_them_keeps_its_text(hub, whisper):
    from peft_clsr.hub.card import END, START

    for text in ("By hand.", f"Above. {START} By hand.", f"By hand. {END} Below.", f"{END} By hand. {START}"):
        hub.create(REPO, files={"README.md": text.encode()})
        for seed in (5, 6):
            push_language(experts(whisper(), "ca", seed=seed), REPO, "ca")
            assert text in card_of(hub) and len(rows_of(card_of(hub))) == 1


def test_a_card_that_cannot_be_read_is_said(hub, whisper):
    hub.create(REPO, files={"README.md": b"---\nlanguage: [\n---\nBy hand."})
    with pytest.raises(ValueError, match="the metadata at the top of README.md cannot be read"):
        push_language(experts(whisper(), "ca"), REPO, "ca")
    assert hub.files(REPO)["README.md"].endswith(b"By hand.")


def test_names_from_strangers_break_neither_table_nor_markers_nor_snippet(hub, whisper):
    from peft_clsr.hub.card import END, START

    hostile = f'x|y\n{END}`"; import os #'
    push_language(experts(whisper(hostile), "ca"), REPO, "ca", metrics={hostile: {"wer": 0.5}})
    push_language(experts(whisper(hostile), "ro"), REPO, "ro")
    text = ModelCard(card_of(hub)).text
    assert text.count(START) == text.count(END) == 1 and len(rows_of(text)) == 2
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "snippet", "exec")
    assert "import os" not in code


def test_javanese_has_the_code_that_the_hub_knows():
    from peft_clsr.hub.card import language_card

    text = language_card([HubLanguage("jw", "Javanese", "jw")], REPO)
    assert ModelCard(text).data.language == ["jv"]


@pytest.fixture
def run_snippet(hub, whisper, tiny_processor, tmp_path):
    """Runs the code of a card, where the base model is on the Hub."""

    def run(card):
        whisper().save_pretrained(tmp_path / "base")
        tiny_processor.save_pretrained(tmp_path / "base")
        files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        hub.create(BASE, files=files)
        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }
        ran = subprocess.run(
            [sys.executable, "-c", snippet], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert ran.returncode == 0, ran.stderr

    return run


def test_the_snippet_of_the_card_runs_as_it_is(hub, whisper, run_snippet, tmp_path):
    push_language(experts(whisper(), "ca", max_audio_seconds=1.0), REPO, "ca")
    assert "from peft_clsr import load_with_experts, set_audio_context\n" in card_of(hub)
    run_snippet(card_of(hub))
    assert (tmp_path / "home" / "hub" / "models--me--experts").is_dir()


def test_no_token_is_logged_or_written(hub, whisper, caplog, capfd):
    for logger in (logging.getLogger("huggingface_hub"), logging.getLogger("transformers")):
        caplog.set_level(logging.DEBUG, logger=logger.name)
        logger.addHandler(caplog.handler)
    hub.faults.append(Fault("POST", "/commit/main$", status=503))
    try:
        push_language(experts(whisper(), "ca"), REPO, "ca", token="hf_mine")
        load_language(whisper(), REPO, "ca", token="hf_mine")
    finally:
        for name in ("huggingface_hub", "transformers"):
            logging.getLogger(name).removeHandler(caplog.handler)
    assert "the Hub answered 503, trying again (1 of 7)" in caplog.text and "Request" in caplog.text
    out, err = capfd.readouterr()
    assert "hf_mine" not in caplog.text + out + err
    assert not [path for path, content in hub.files(REPO).items() if b"hf_mine" in content]


# ---------------------------------------------------------------- the card of a folder


@pytest.mark.parametrize("name", ["ca", "default"])
def test_the_card_of_a_folder_takes_the_place_of_the_empty_template_of_peft(whisper, run_snippet, tmp_path, name):
    model = get_peft_model(
        whisper(), CLSRConfig.paper(language="ca", max_audio_seconds=1.0, gate_dim=8, **QUIET), adapter_name=name
    )
    folder = tmp_path / "out"
    model.save_pretrained(folder)
    path = folder / "README.md"
    assert "# Model Card for Model ID" in path.read_text()
    write_folder_card(folder)
    text = path.read_text()
    assert "Model Card for Model ID" not in text and [row[0] for row in rows_of(text)] == ["Catalan (ca)"]
    assert ModelCard(text).data.language == ["ca"] and ModelCard(text).data.base_model == BASE
    run_snippet(text)


def test_a_folder_card_keeps_what_people_wrote(whisper, tmp_path):
    model = experts(whisper(), "ca", "ro")
    save_language(model, tmp_path, "ca", metrics=METRICS)
    (tmp_path / "README.md").write_bytes("# Our experts é\r\nAsk us.\r\n".encode())
    write_folder_card(tmp_path)
    save_language(model, tmp_path, "ro")
    write_folder_card(tmp_path)
    text = (tmp_path / "README.md").read_bytes().decode()
    assert "# Our experts é\r\nAsk us.\r\n" in text and text.count("\n") == text.count("\r\n")
    assert [row[1] for row in rows_of(text)] == ["ca", "ro"] and text.count("## Languages") == 1
    model.save_pretrained(tmp_path)  # PEFT adds its version below
    write_folder_card(tmp_path)
    assert "Ask us." in (tmp_path / "README.md").read_text()


def test_each_saved_language_has_its_card_and_a_template_in_its_folder_is_replaced(whisper, tmp_path):
    save_language(experts(whisper(), "ca", "ro"), tmp_path / "one", "ro", metrics=METRICS)
    text = (tmp_path / "one" / "ro" / "README.md").read_text()
    assert [(row[0], row[1], row[6]) for row in rows_of(text)] == [("Romanian (ro)", "", "25.0 (50.0)")]
    for code in ("ca", "ro"):
        get_peft_model(whisper(), CLSRConfig.paper(language=code, **QUIET)).save_pretrained(tmp_path / code)
    by_hand = "# By hand"
    (tmp_path / "ro" / "README.md").write_text(by_hand)
    write_folder_card(tmp_path)
    assert [row[1] for row in rows_of((tmp_path / "README.md").read_text())] == ["ca", "ro"]
    assert [row[0] for row in rows_of((tmp_path / "ca" / "README.md").read_text())] == ["Catalan (ca)"]
    assert (tmp_path / "ro" / "README.md").read_text() == by_hand


def test_a_folder_without_languages_gets_no_card(tmp_path):
    with pytest.raises(ValueError, match="holds no adapter of a language"):
        write_folder_card(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- from the trainer


def trainer_of(model, folder, **kwargs):
    arguments = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": "hf_mine", "max_steps": 2, **kwargs}
    languages = list(model.peft_config)
    return DistillationTrainer(
        model=model,
        args=make_args(DistillationTrainingArguments, folder, **arguments),
        train_dataset=make_dataset(languages=languages if len(languages) > 1 else None),
        data_collator=collate,
    )


@pytest.mark.parametrize("name", ["ca", "default"])
def test_the_trainer_pushes_languages_beside_those_of_others(hub, whisper, inputs, tmp_path, name):
    push_language(experts(whisper(), "ro"), REPO, "ro", metrics=METRICS)
    model = get_peft_model(whisper(), CLSRConfig.paper(language="ca", gate_dim=8, **QUIET), adapter_name=name)
    trainer = trainer_of(model, tmp_path / "out", hub_strategy="end")
    trainer.train()
    assert [message for _, message in hub.repos[REPO].history][-1] == "Add Romanian (ro)"
    trainer.push_to_hub(metrics={"ca": METRICS})
    assert set(hub.files(REPO)) == {
        ".gitattributes",
        "README.md",
        *(f"{code}/{name}" for code in ("ca", "ro") for name in ("adapter_config.json", WEIGHTS, "language.json")),
    }
    assert [row[5:] for row in rows_of(card_of(hub))] == [
        ["google/fleurs (test)", "25.0 (50.0)", "10.0 (20.0)", ""]
    ] * 2
    assert "`max_steps` 2" in card_of(hub)
    assert torch.equal(logits_of(load_language(whisper(), REPO, "ca").eval(), inputs), logits_of(model.eval(), inputs))
    assert b"hf_mine" not in b"".join(hub.files(REPO).values())


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_hub_strategies_push_languages_at_every_save(hub, whisper, inputs, tmp_path, strategy, extra):
    model = get_peft_model(whisper(), CLSRConfig.paper(language="ca", gate_dim=8, **QUIET), adapter_name="ca")
    model.add_adapter("ro", CLSRConfig.paper(language="ro", gate_dim=8, **QUIET))
    trainer = trainer_of(
        model, tmp_path / "out", hub_strategy=strategy, save_strategy="steps", save_steps=1, hub_always_push=True
    )
    trainer.train()
    trainer._finish_current_push()
    files = hub.files(REPO)
    assert {path.split("/")[0] for path in files} - {".gitattributes", "README.md"} == {"ca", "ro", *extra}
    assert [row[1] for row in rows_of(card_of(hub))] == ["ca", "ro"]
    assert "Training in progress, step 2" in [message for _, message in hub.repos[REPO].history]
    loaded = load_language(whisper(), REPO).eval()
    for name in ("ca", "ro"):
        assert torch.equal(logits_of(loaded, inputs, name), logits_of(model.eval(), inputs, name))
    assert b"hf_mine" not in b"".join(files.values())
    for folder in extra:
        assert f"{folder}/optimizer.pt" in files and f"{folder}/training_args.bin" not in files


def test_a_run_that_diverged_stops_and_neither_saves_nor_pushes_its_weights(hub, whisper, tmp_path):
    model = get_peft_model(whisper(), CLSRConfig.paper(language="ca", gate_dim=8, **QUIET), adapter_name="ca")
    trainer = trainer_of(model, tmp_path / "out", save_strategy="steps", save_steps=2, learning_rate=1e30)
    with pytest.raises(ValueError, match="NaN or infinite"):
        trainer.train()
    trainer._finish_current_push()
    assert trainer.state.global_step < 2 and not list((tmp_path / "out").glob("checkpoint-*"))
    assert list(hub.files(REPO)) == [".gitattributes"]


@pytest.mark.parametrize(
    ("function", "said"), [("describe_adapter", "checkpoint-2 is not pushed"), ("push_folder", "failed")]
)
def test_a_card_or_an_upload_that_fails_is_said_and_does_not_end_the_training(
    hub, whisper, tmp_path, monkeypatch, caplog, function, said
):
    def fail(*arguments, **options):
        raise ConnectionError("the network is down")

    model = get_peft_model(whisper(), CLSRConfig.paper(language="ca", gate_dim=8, **QUIET), adapter_name="ca")
    trainer = trainer_of(model, tmp_path / "out", save_strategy="steps", save_steps=2)
    monkeypatch.setattr(f"peft_clsr.distillation.publishing.{function}", fail)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        trainer.train()
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert trainer.state.global_step == 2
    assert said in caplog.text and "the network is down" in caplog.text
    assert (tmp_path / "out" / "checkpoint-2" / "ca" / "adapter_model.safetensors").is_file()


def test_create_model_card_writes_the_same_card_with_what_was_evaluated(
    hub, readable_whisper, tiny_processor, tmp_path
):
    model = get_peft_model(readable_whisper(), CLSRConfig.paper(language="ca", gate_dim=8, **QUIET), adapter_name="ca")
    model.get_base_model().name_or_path = BASE
    trainer = trainer_of(model, tmp_path / "out", push_to_hub=False)
    trainer.train()
    trainer.save_model()
    trainer.state.log_history.append({"step": 1, "eval_wer_ca": 0.9})
    trainer.state.log_history.append({"step": 2, "eval_wer_ca": 0.25, "eval_cer_ca": 0.1, "eval_wer": 0.25})
    trainer.create_model_card(dataset="google/fleurs")
    text = (tmp_path / "out" / "README.md").read_text()
    assert rows_of(text)[0][1] == "ca" and rows_of(text)[0][5:] == ["google/fleurs", "25.0", "10.0", ""]
    path = tmp_path / "out" / "README.md"
    path.write_text(text + "By hand.")
    trainer.create_model_card(dataset="google/fleurs")
    assert path.read_text() == text + "By hand."


def test_the_trainer_refuses_to_push_an_adapter_for_no_language(hub, whisper, tmp_path):
    model = get_peft_model(whisper(), CLSRConfig.paper(**QUIET))
    with pytest.raises(ValueError, match="adapter 'default' is for no language"):
        trainer_of(model, tmp_path)


def test_a_folder_of_the_very_name_comes_before_that_of_the_language(hub, whisper, inputs, tmp_path):
    model = experts(whisper(), "ca")
    model.add_adapter("ca_valencia", CLSRConfig.paper(language="ca", **QUIET))
    model.set_adapter("ca_valencia")
    randomize(model).eval()
    model.save_pretrained(tmp_path)
    push_folder(tmp_path, REPO)
    loaded = load_language(whisper(), REPO, "ca_valencia")
    assert loaded.active_adapter == "ca_valencia"
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert load_language(whisper(), REPO, "ca_es").active_adapter == "ca"


def test_a_folder_in_the_place_of_a_repository_is_refused_with_the_remedy(whisper, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder here, .* PeftModel.from_pretrained\(model, "):
        load_language(whisper(), str(tmp_path), "ca")
