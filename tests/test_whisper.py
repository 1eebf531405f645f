"""The context of a Whisper, cut by hand and by an adapter, and given back."""

import copy
import pickle

import numpy as np
import pytest
import torch
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Speech2TextConfig,
    Speech2TextModel,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from versions import transformers_own_adapters

from peft_clsr import CLSRConfig, set_audio_context

NOISE = np.random.default_rng(0).normal(0, 0.1, 16000).astype(np.float32)  # 1 s


@pytest.fixture
def whisper(tiny_whisper):
    """A Whisper of 3 s of context."""
    return lambda: tiny_whisper(max_source_positions=150, init_std=0.2)


@pytest.fixture
def clsr():
    """`clsr(base, ca=2)` puts an adapter of 2 s on a Whisper, `ca=None` one that leaves the context alone."""

    def build(base, **adapters):
        (first, seconds), *others = adapters.items()
        model = get_peft_model(base, config(seconds), adapter_name=first)
        for name, seconds in others:
            model.add_adapter(name, config(seconds))
        return model.eval()

    return build


def config(seconds, **kwargs):
    return CLSRConfig.paper(gate_dim=8, max_audio_seconds=seconds, **kwargs)


def context_of(model):
    """In positions: what the table, the encoder and both configs say, which must be one number."""
    encoder = next(module for name, module in model.named_modules() if name.endswith("encoder"))
    (positions,) = {
        len(encoder.embed_positions.weight),
        encoder.embed_positions.num_embeddings,
        encoder.max_source_positions,
        encoder.config.max_source_positions,
        model.config.max_source_positions,
    }
    return positions


@torch.no_grad()
def logits_of(model, frames):
    features = torch.randn(1, 80, frames, generator=torch.Generator().manual_seed(0))
    return model(input_features=features, decoder_input_ids=torch.tensor([[257, 258, 97]])).logits


# ---------------------------------------------------------------- by hand


def test_the_context_of_model_and_processor_is_cut_together(tiny_whisper, tiny_processor):
    model = tiny_whisper(max_source_positions=150)
    processor = WhisperProcessor(WhisperFeatureExtractor(chunk_length=3), tiny_processor.tokenizer)
    before = model.model.encoder.embed_positions.weight.detach().clone()
    set_audio_context(model, processor, 2)
    encoder = model.model.encoder
    assert encoder.embed_positions.num_embeddings == 100
    assert torch.equal(encoder.embed_positions.weight, before[:100])
    assert not encoder.embed_positions.weight.requires_grad
    assert (encoder.max_source_positions, model.config.max_source_positions) == (100, 100)
    extractor = processor.feature_extractor
    assert (extractor.chunk_length, extractor.n_samples, extractor.nb_max_frames) == (2, 32000, 200)
    inputs = extractor(NOISE, sampling_rate=16000, return_tensors="pt")
    assert encoder(inputs.input_features).last_hidden_state.shape == (1, 100, 16)
    assert model.generate(**inputs, language="ro", max_new_tokens=3).shape[0] == 1


def test_a_cut_model_and_processor_load_again(tiny_whisper, tiny_processor, tmp_path):
    model = tiny_whisper(max_source_positions=150)
    processor = WhisperProcessor(WhisperFeatureExtractor(chunk_length=3), tiny_processor.tokenizer)
    set_audio_context(model, processor, 2)
    model.save_pretrained(tmp_path)
    processor.feature_extractor.save_pretrained(tmp_path)
    inputs = WhisperFeatureExtractor.from_pretrained(tmp_path)(NOISE, sampling_rate=16000, return_tensors="pt")
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(
        again.get_encoder()(inputs.input_features).last_hidden_state,
        model.get_encoder()(inputs.input_features).last_hidden_state,
    )


def test_the_context_of_a_peft_model_is_cut(tiny_whisper):
    model = get_peft_model(tiny_whisper(), LoraConfig(target_modules=["fc1"]))
    set_audio_context(model, None, 0.5)
    assert model.config.max_source_positions == 25
    labels = torch.tensor([[259, 97, 256]])
    assert model(input_features=torch.zeros(1, 80, 50), labels=labels).loss.isfinite()


@pytest.mark.parametrize("seconds", [0, -1, 1.02, 30, 0.505])
def test_a_context_outside_of_the_current_one_is_refused_and_changes_nothing(tiny_whisper, tiny_processor, seconds):
    model = tiny_whisper()
    with pytest.raises(ValueError, match=f"context of {seconds} s"):
        set_audio_context(model, None, seconds)
    with pytest.raises(ValueError, match=f"context of {seconds} s"):
        set_audio_context(None, tiny_processor, seconds)
    assert model.config.max_source_positions == 50
    assert tiny_processor.feature_extractor.n_samples == 16000


def test_a_processor_that_could_not_be_loaded_again_is_not_made(tiny_whisper, tiny_processor):
    model = tiny_whisper()
    with pytest.raises(ValueError, match="whole seconds"):
        set_audio_context(model, tiny_processor, 0.5)
    assert model.config.max_source_positions == 50


def test_an_equal_context_is_left_alone(whisper):
    model = whisper()
    table = model.model.encoder.embed_positions.weight
    set_audio_context(model, None, 3)
    assert model.model.encoder.embed_positions.weight is table


def test_a_model_that_is_no_whisper_has_no_context_to_cut():
    with pytest.raises(ValueError, match="audio context of 2 s was asked of a Linear, which is no Whisper"):
        set_audio_context(nn.Linear(2, 2), None, 2)


# ---------------------------------------------------------------- by an adapter


def test_an_adapter_cuts_the_context_and_taking_it_off_gives_it_back(whisper, clsr):
    expected, table = logits_of(whisper(), 300), whisper().model.encoder.embed_positions.weight
    model = clsr(whisper(), ca=2)
    assert context_of(model) == 100
    by_hand = whisper()
    set_audio_context(by_hand, None, 2)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, 200), logits_of(by_hand, 200))
    assert not any("embed_positions" in name for name, p in model.named_parameters() if p.requires_grad)

    for base in (clsr(whisper(), ca=2).unload(), clsr(whisper(), ca=2, uk=2, ro=None).unload()):
        assert context_of(base) == 150
        assert torch.equal(base.model.encoder.embed_positions.weight, table)
        assert torch.equal(logits_of(base, 300), expected)


def test_the_context_stays_until_the_last_adapter_that_asks_for_it_is_deleted(whisper, clsr):
    model = clsr(whisper(), ca=2, uk=2, ro=None)
    model.delete_adapter("uk")
    assert context_of(model) == 100
    model.delete_adapter("ca")
    assert context_of(model) == 100  # "ro" named no context, and so is one of 2 s
    assert model.peft_config["ro"].max_audio_seconds == 2
    model.add_adapter("ca", config(2))
    model.delete_adapter("ro")
    model.base_model.delete_adapter("ca")
    base = model.base_model.model  # a PeftModel without adapters does not give its own
    assert context_of(base) == 150
    assert torch.equal(base.model.encoder.embed_positions.weight, whisper().model.encoder.embed_positions.weight)


def test_a_later_adapter_cuts_the_context_too(whisper, clsr):
    model = clsr(whisper(), ro=None, ca=2)
    assert context_of(model) == 100
    assert context_of(model.unload()) == 150


def test_a_context_cut_by_hand_before_is_what_is_given_back(whisper, clsr):
    base = whisper()
    set_audio_context(base, None, 2)
    assert context_of(clsr(base, ca=2).unload()) == 100  # it was so already
    model = clsr(base, ca=1)
    assert context_of(model) == 50
    assert context_of(model.unload()) == 100


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_saved_adapter_brings_its_context(whisper, clsr, tmp_path, low_cpu_mem_usage):
    model = clsr(whisper(), ca=2, uk=2)
    model.save_pretrained(tmp_path)
    assert not any("positions" in key for key in load_file(tmp_path / "ca" / "adapter_model.safetensors"))

    loaded = PeftModel.from_pretrained(
        whisper(), tmp_path, subfolder="ca", adapter_name="ca", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert loaded.peft_config["ca"].max_audio_seconds == 2
    assert context_of(loaded) == 100
    assert torch.equal(logits_of(loaded, 200), logits_of(model, 200))
    loaded.load_adapter(tmp_path / "uk", "uk", low_cpu_mem_usage=low_cpu_mem_usage)
    assert context_of(loaded) == 100

    alone = PeftModel.from_pretrained(clsr(whisper(), ro=None).unload(), tmp_path, subfolder="uk", adapter_name="uk")
    alone.load_adapter(tmp_path / "uk", "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert context_of(alone.unload()) == 150


@transformers_own_adapters
def test_transformers_own_doors_cut_the_context(whisper, tmp_path):
    whisper().save_pretrained(tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(base, config(2)).eval()
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model, 200)

    injected = inject_adapter_in_model(config(2), whisper(), "ca")
    added = whisper()
    added.add_adapter(config(2), "ca")
    for door in (injected, added):
        assert context_of(door) == 100
        with pytest.raises(ValueError, match="1 s is not that of the model's adapter 'ca'"):
            door.add_adapter(config(1), "uk")
        assert context_of(door) == 100

    native = whisper()
    native.load_adapter(str(tmp_path / "adapter"))
    by_folder = WhisperForConditionalGeneration.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    for door in (native, by_folder, AutoPeftModel.from_pretrained(tmp_path / "adapter")):
        assert context_of(door) == 100
        assert torch.equal(logits_of(door.eval(), 200), expected)


@pytest.mark.parametrize(
    ("seconds", "named"),
    [
        (1, "1 s is not that of the model's adapter 'ca', whose max_audio_seconds is 2"),
        (2.5, "2.5 s is not that of the model's adapter 'ca', whose max_audio_seconds is 2"),
    ],
)
def test_adapters_of_two_contexts_are_refused_on_one_model(whisper, clsr, seconds, named):
    model = clsr(whisper(), ca=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        model.add_adapter("uk", config(seconds))
    with pytest.raises(ValueError, match=named):
        set_audio_context(model, None, seconds)
    assert list(model.peft_config) == ["ca"] and context_of(model) == 100
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(("seconds", "named"), [(4, r"4 s is outside \(0, 3\]"), (2.01, "no multiple of 0.02 s")])
def test_a_context_that_the_model_cannot_have_is_refused_and_changes_nothing(whisper, seconds, named):
    base = whisper()
    before = dict(base.state_dict())
    with pytest.raises(ValueError, match=named):
        get_peft_model(base, config(seconds))
    assert context_of(base) == 150 and base.state_dict().keys() == before.keys()


def test_an_adapter_with_a_context_on_a_model_that_is_no_whisper_is_refused():
    with pytest.raises(ValueError, match="a Sequential, which is no Whisper.*leave max_audio_seconds out"):
        get_peft_model(
            nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), config(2, target_modules=["0"], output_modules=["1"])
        )
    # It has max_source_positions as well, but positions of another kind.
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(ValueError, match="a Speech2TextModel, which is no Whisper"):
        get_peft_model(Speech2TextModel(Speech2TextConfig(**sizes)), config(2))


def test_positions_that_rest_on_the_disk_are_refused(whisper, tmp_path):
    whisper().save_pretrained(tmp_path / "base")
    modules = ["model.encoder.conv1", "model.encoder.conv2", "model.encoder.layers", "model.encoder.layer_norm"]
    device_map = {
        **dict.fromkeys([*modules, "model.decoder", "proj_out"], "cpu"),
        "model.encoder.embed_positions": "disk",
    }
    base = WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    with pytest.raises(ValueError, match=r"on the meta device.*embed_positions.*device_map"):
        get_peft_model(base, config(2))
    assert base.config.max_source_positions == 150
    get_peft_model(base, config(3))  # nothing to cut


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_gives_its_context_back_by_itself(whisper, clsr, copied):
    model = clsr(whisper(), ca=2)
    other = copied(model)
    assert torch.equal(logits_of(other, 200), logits_of(model, 200))
    assert context_of(other.half().unload()) == 150
    assert other.get_base_model().model.encoder.embed_positions.weight.dtype == torch.float16
    assert context_of(model) == 100
    assert torch.equal(logits_of(model.unload(), 300), logits_of(whisper(), 300))


def test_a_model_at_a_cut_context_trains(whisper, clsr):
    model = clsr(whisper(), ca=2).train()
    labels = torch.tensor([[258, 97, 256]])
    loss = model(input_features=torch.randn(1, 80, 200), attention_mask=torch.ones(1, 200), labels=labels).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "clsr_" in name)
    assert model.get_base_model().model.encoder.embed_positions.weight.grad is None


@pytest.mark.parametrize("names", [("short", "long"), ("long", "short")])
def test_adapters_of_different_contexts_on_one_model_are_warned_of(tiny_whisper, tmp_path, names):
    for name, seconds in (("short", 0.5), ("long", None)):
        config = CLSRConfig.paper(gate_dim=4, max_audio_seconds=seconds)
        get_peft_model(tiny_whisper(), config, adapter_name=name).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_whisper(), tmp_path, subfolder=names[0], adapter_name=names[0])
    with pytest.warns(
        UserWarning, match=r"adapters \['long'\] were not made for the audio context of 0.5 s that .*'short'"
    ):
        model.load_adapter(tmp_path / names[1], names[1])


@pytest.mark.parametrize("seconds", [None, True, "10"])
def test_a_context_that_is_no_number_is_named(whisper, tiny_processor, seconds):
    model = whisper()
    with pytest.raises(
        ValueError, match=rf"the audio context is {seconds!r}, expected a number of seconds, such as 10"
    ):
        set_audio_context(model, tiny_processor, seconds)
    assert context_of(model) == 150 and tiny_processor.feature_extractor.chunk_length == 1


def test_a_context_of_nothing_is_refused():
    with pytest.raises(ValueError, match="neither a model nor a processor"):
        set_audio_context(None, None, 10)
