"""Frozen routing: decided FFNs become plain ones; what is left is a plain Whisper, or saves and loads as a pair."""

import itertools
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForSpeechSeq2Seq,
    BartConfig,
    BartForConditionalGeneration,
)

datasets = pytest.importorskip("datasets")
pytest.importorskip("jiwer")

from freezing import (
    EXPERT,
    MIXED,
    MODULES,
    SHARED,
    TEXTS,
    assert_same_state,
    logits_of,
    recordings,
    set_gates,
    state_of,
)

from peft_clsr import (
    CLSRConfig,
    CLSRLayer,
    DataCollatorSpeechSeq2SeqWithPadding,
    error_rates,
    gate_means,
    prepare_dataset,
    transcribe,
)

# ---------------------------------------------------------------- all decided


@pytest.mark.parametrize("rank", [None, 3])
def test_decided_gates_leave_a_plain_whisper_of_the_same_logits(routed, freeze, dataset, rank):
    model = routed([EXPERT, SHARED, SHARED, EXPERT], expert_rank=rank)
    frozen = freeze(model)
    assert type(frozen.model) is type(model.get_base_model()) and not frozen.model.training
    assert frozen.shares == {key: share for key, share in zip(MODULES, [1.0, 0.0, 0.0, 1.0], strict=True)}
    assert list(frozen.decisions.values()) == ["expert", "shared", "shared", "expert"]
    expected = logits_of(model, dataset)
    assert torch.allclose(logits_of(frozen.model, dataset), expected, atol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(logits_of(model, dataset), expected, atol=0.1)
    assert frozen.after == frozen.before


def test_nothing_of_this_library_is_left_on_the_plain_whisper(routed, freeze, tiny_whisper):
    fresh = tiny_whisper(max_target_positions=20)
    model = freeze(routed([EXPERT, SHARED, SHARED, EXPERT])).model
    assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
    for (name, module), other in zip(model.named_modules(), fresh.modules(), strict=True):
        assert type(module) is type(other), name
        assert vars(module).keys() == vars(other).keys(), name
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
            assert len(getattr(module, hooks)) == len(getattr(other, hooks)), name
    assert model.state_dict().keys() == fresh.state_dict().keys()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_the_saved_folder_is_that_of_a_whisper(routed, freeze, tiny_whisper, dataset, tmp_path):
    tiny_whisper(init_std=0.5, max_target_positions=20).save_pretrained(tmp_path / "base")
    model = freeze(routed([EXPERT, SHARED, SHARED, EXPERT], expert_rank=3)).model
    model.save_pretrained(tmp_path / "frozen")
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("base", "frozen")]
    assert names[0] == names[1]
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "base" / name).read_text() == (tmp_path / "frozen" / name).read_text()
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "frozen", dtype=torch.float32).eval()
    assert torch.equal(logits_of(again, dataset), logits_of(model, dataset))


def test_a_low_rank_expert_becomes_the_sum_in_the_precision_of_the_base(routed, freeze, tiny_whisper):
    model = routed([EXPERT] * 4, base=tiny_whisper(init_std=0.5).bfloat16(), expert_rank=3)
    layer = model.get_base_model().model.encoder.layers[0].fc1
    A, B = layer.clsr_expert_A["ca"].weight, layer.clsr_expert_B["ca"].weight
    assert A.dtype == torch.float32
    frozen = freeze(model).model.model.encoder.layers[0].fc1
    assert torch.equal(frozen.weight, (layer.base_layer.weight.float() + B @ A).bfloat16())
    assert torch.equal(frozen.bias, layer.base_layer.bias)
    assert type(frozen) is nn.Linear and frozen.weight.dtype == torch.bfloat16


def test_the_result_shares_no_weight_with_the_model(routed, freeze):
    model = routed([EXPERT, SHARED, SHARED, EXPERT])
    there = {parameter.data_ptr() for parameter in model.parameters()}
    assert not there & {parameter.data_ptr() for parameter in freeze(model).model.parameters()}


# ---------------------------------------------------------------- shares and thresholds


def test_shares_are_gate_means_and_the_majority_decides_all(routed, freeze, dataset, tiny_processor):
    model = routed([MIXED] * 4)
    frozen = freeze(model, undecided="majority")
    expected = gate_means(model, dataset, DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="ca"))
    assert frozen.shares == pytest.approx(expected)
    assert all(0.05 < share < 0.95 for share in frozen.shares.values()), frozen.shares
    assert frozen.decisions == {key: "expert" if share >= 0.5 else "shared" for key, share in frozen.shares.items()}
    assert not isinstance(frozen.model, PeftModel)


def test_a_share_at_the_threshold_is_decided_and_one_inside_is_not(routed, freeze):
    model = routed([MIXED] * 4)
    shares = freeze(model, threshold=1.0).shares
    key, share = max(((key, shares[key]) for key in MODULES[2:]), key=lambda item: abs(item[1] - 0.5))
    decided = max(share, 1 - share)
    at, above = freeze(model, threshold=decided - 1e-9), freeze(model, threshold=decided + 1e-6)
    assert at.decisions[key] == ("expert" if share > 0.5 else "shared")
    assert above.decisions[key] == "routed"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_encoder_is_decided_by_audio_and_padding_each_for_itself(routed, freeze, dataset, sign):
    model = routed([EXPERT] * 4)
    gate_by_padding(model, dataset, sign)
    shares = {key: 1.0 for key in MODULES} | {MODULES[0]: float(sign > 0)}
    frozen = freeze(model)
    assert frozen.shares == shares
    assert frozen.padding_shares == {MODULES[0]: float(sign < 0), MODULES[1]: 1.0}
    assert list(frozen.decisions.values()) == ["routed", "expert", "expert", "expert"]
    assert torch.allclose(logits_of(frozen.model, dataset), logits_of(model, dataset), atol=1e-4)
    majority = freeze(model, undecided="majority").decisions
    assert majority[MODULES[0]] == ("expert" if sign > 0 else "shared")


@torch.no_grad()
def gate_by_padding(model, dataset, sign):
    """Make the first gate tell audio (to the expert if `sign` is 1) from the padding after it."""
    layer = model.get_base_model().model.encoder.layers[0].fc1
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(model, dataset)
    hook.remove()
    is_audio = dataset["attention_mask"][:][:, ::2].bool()
    means = [seen[0][mask].mean(dim=0) for mask in (is_audio, ~is_audio)]
    direction = sign * (means[0] - means[1])
    middle = direction @ (means[0] + means[1]) / 2
    layer.clsr_gate_in["ca"].weight.copy_(torch.stack([direction, -direction] * 4))
    layer.clsr_gate_in["ca"].bias.copy_(torch.stack([-middle, middle] * 4))
    layer.clsr_gate_out["ca"].weight.copy_(torch.tensor([[1.0, -1] * 4]))


def test_utterances_that_fill_the_context_have_no_padding_to_decide_by(routed, freeze, dataset):
    frozen = freeze(routed([EXPERT, SHARED, EXPERT, SHARED]), dataset=dataset.select([0]))
    assert bool(dataset[0]["attention_mask"].all()) and frozen.padding_shares == {}
    assert list(frozen.decisions.values()) == ["expert", "shared", "expert", "shared"]


def test_undecided_modules_become_what_loses_less(routed, freeze, dataset, tiny_processor):
    model = routed([EXPERT, MIXED, MIXED, SHARED])
    frozen = freeze(model, undecided="loss")
    assert type(frozen.model) is type(model.get_base_model())
    assert (frozen.decisions[MODULES[0]], frozen.decisions[MODULES[3]]) == ("expert", "shared")

    def loss(kinds):
        batch = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="ca")(list(dataset))
        with torch.no_grad():
            plain = freeze(routed([EXPERT, *kinds, SHARED])).model
            return float(plain(input_features=batch["input_features"], labels=batch["labels"]).loss)

    losses = {kinds: loss(kinds) for kinds in itertools.product((EXPERT, SHARED), repeat=2)}
    chosen = tuple(frozen.decisions[key] for key in MODULES[1:3])
    other = SHARED if chosen[1] == EXPERT else EXPERT
    assert losses[chosen] < losses[chosen[0], other]  # the first was chosen while the second was still routed


def test_error_rates_are_those_of_transcribing_before_and_after(routed, freeze, dataset, tiny_processor):
    model = routed([MIXED] * 4)
    frozen = freeze(model, undecided="majority")

    def rates(model):
        heard = transcribe(model, tiny_processor, dataset, "ca", max_new_tokens=6)
        return heard, error_rates(heard, TEXTS, language="ca")["ca"]

    heard, before = rates(model)
    heard_frozen, after = rates(frozen.model)
    assert heard != heard_frozen
    assert (frozen.before, frozen.after) == (before, after)
    assert frozen.before["utterances"] == 3


# ---------------------------------------------------------------- some left


@pytest.mark.parametrize(
    "exclude", [None, ["model.encoder.layers.1.fc1", "model.encoder.layers.1.fc2"], r".*encoder.*1\..*"]
)
def test_a_model_with_modules_left_saves_as_a_pair_and_loads_again(routed, freeze, dataset, tmp_path, exclude):
    gates = [EXPERT, MIXED, MIXED, SHARED]
    model = routed(gates, expert_rank=3, exclude_modules=exclude)
    frozen = freeze(model)
    left = [MODULES[2]] if exclude else MODULES[1:3]
    assert [key for key, kind in frozen.decisions.items() if kind == "routed"] == left
    with frozen.model.base_model.record_gates() as recorded:
        expected = logits_of(frozen.model, dataset)
    assert sorted(recorded) == sorted(left)
    assert torch.allclose(expected, logits_of(model, dataset), atol=1e-4)
    names = {key.replace("fc1", fc) for key in MODULES if key not in left for fc in ("fc1", "fc2")}
    assert frozen.model.peft_config["ca"].exclude_modules == names
    assert model.peft_config["ca"].exclude_modules == (set(exclude) if isinstance(exclude, list) else exclude)

    frozen.model.save_pretrained(tmp_path)
    base = frozen.model.unload()
    assert not any(isinstance(module, CLSRLayer) for module in base.modules())
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "base", dtype=torch.float32)
    again = PeftModel.from_pretrained(base, tmp_path, subfolder="ca", adapter_name="ca").eval()
    assert torch.equal(logits_of(again, dataset), expected)
    with again.base_model.record_gates() as recorded:
        logits_of(again, dataset)
    assert sorted(recorded) == sorted(left)


def test_a_model_with_modules_left_does_not_name_the_base_that_it_left(routed, freeze, tiny_whisper, tmp_path):
    base = tiny_whisper(init_std=0.5, max_target_positions=20)
    base.name_or_path = base.config.name_or_path = "openai/whisper-tiny"
    model = routed([EXPERT, MIXED, MIXED, SHARED], base=base)
    assert model.peft_config["ca"].base_model_name_or_path == "openai/whisper-tiny"
    frozen = freeze(model).model
    frozen.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "ca" / "adapter_config.json").read_text())["base_model_name_or_path"] in (None, "")
    assert frozen.get_base_model().name_or_path == frozen.config.name_or_path == ""
    assert freeze(routed([EXPERT] * 4, base=base)).model.name_or_path == ""
    untouched = freeze(routed([MIXED] * 4, base=base))
    assert untouched.model.get_base_model().name_or_path == "openai/whisper-tiny"
    assert set(untouched.decisions.values()) == {"routed"} and untouched.before is untouched.after


# ---------------------------------------------------------------- the model given


@pytest.mark.parametrize("active", ["ca", "ro"])
@pytest.mark.parametrize("gates", [[EXPERT, SHARED, SHARED, EXPERT], [EXPERT, MIXED, MIXED, SHARED]])
def test_the_language_asked_for_is_frozen_whatever_is_active_and_the_model_stays(
    routed, freeze, dataset, active, gates
):
    model = routed(gates, adapters=("ro", "ca"))
    model.set_adapter("ca")
    expected = logits_of(model, dataset)
    model.set_adapter(active)
    model.base_model.disable_adapter_layers()
    model.train()
    model.get_base_model().model.encoder.eval()
    before = state_of(model)
    frozen = freeze(model, "Catalan")
    assert_same_state(model, before)
    assert torch.allclose(logits_of(frozen.model, dataset), expected, atol=1e-4)
    if isinstance(frozen.model, PeftModel):
        assert list(frozen.model.peft_config) == [frozen.model.active_adapter] == ["ca"]
        assert not any("ro" in name.split(".") for name in frozen.model.state_dict())


def test_an_adapter_of_another_name_is_found_by_its_language(routed, freeze, tiny_whisper, dataset):
    base = tiny_whisper(init_std=0.5, max_target_positions=20)
    model = get_peft_model(base, CLSRConfig.paper(gate_dim=8, language="ca"), adapter_name="mine")
    set_gates(model, dict.fromkeys(MODULES, EXPERT))
    for language in ("ca", "mine"):
        assert set(freeze(model, language).decisions.values()) == {"expert"}


def test_gated_layers_of_some_depths_alone(routed, freeze, dataset):
    model = routed([EXPERT, MIXED, SHARED, MIXED], layers_to_transform=[0])
    frozen = freeze(model)
    assert frozen.decisions == {MODULES[0]: "expert", MODULES[2]: "shared"}
    assert torch.allclose(logits_of(frozen.model, dataset), logits_of(model, dataset), atol=1e-4)


def test_modules_to_save_are_those_of_the_language(routed, freeze, dataset):
    model = routed([EXPERT] * 4, modules_to_save=["model.encoder.layer_norm"])
    with torch.no_grad():
        model.get_base_model().model.encoder.layer_norm.modules_to_save["ca"].weight.mul_(2)
    frozen = freeze(model).model
    assert isinstance(frozen.model.encoder.layer_norm, nn.LayerNorm)
    assert torch.allclose(logits_of(frozen, dataset), logits_of(model, dataset), atol=1e-4)


@pytest.mark.parametrize("gates", [[EXPERT, SHARED, SHARED, EXPERT], [EXPERT, MIXED, MIXED, SHARED]])
def test_a_context_that_the_adapter_cut_stays(routed, freeze, tiny_whisper, dataset, tmp_path, gates):
    base = tiny_whisper(init_std=0.5, max_source_positions=150, max_target_positions=20)
    model = routed(gates, base=base, max_audio_seconds=1)
    frozen = freeze(model).model
    assert frozen.config.max_source_positions == 50 == model.config.max_source_positions
    expected = logits_of(frozen, dataset)
    if isinstance(frozen, PeftModel):
        frozen.save_pretrained(tmp_path)
        frozen.unload().save_pretrained(tmp_path / "base")
        again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "base", dtype=torch.float32)
        assert again.config.max_source_positions == 150
        again = PeftModel.from_pretrained(again, tmp_path, subfolder="ca", adapter_name="ca")
    else:
        frozen.save_pretrained(tmp_path)
        again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.max_source_positions == 50
    assert torch.equal(logits_of(again.eval(), dataset), expected)
    assert len(model.unload().model.encoder.embed_positions.weight) == 150


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"threshold": 0.5}, ValueError, r"threshold is 0.5, expected in \(0.5, 1\].*undecided='loss'"),
        ({"threshold": 1.01}, ValueError, "threshold is 1.01"),
        ({"threshold": float("nan")}, ValueError, "threshold is nan"),
        ({"undecided": "all"}, ValueError, "undecided is 'all', expected 'routed', 'majority' or 'loss'"),
        ({"language": "catalann"}, ValueError, "did you mean 'catalan'"),
        ({"language": "uk"}, ValueError, "language 'uk' has no adapter on the model"),
        ({"dataset": []}, TypeError, "a list, expected a datasets.Dataset as prepare_dataset gives"),
        ({"dataset": recordings()}, ValueError, "no input_features, attention_mask, labels, text: .*prepare_dataset"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(routed, freeze, kwargs, error, message):
    model = routed([EXPERT] * 4).train()
    before = state_of(model)
    with pytest.raises(error, match=message):
        freeze(model, **kwargs)
    assert_same_state(model, before)


@pytest.mark.parametrize("shared", [True, False])
def test_an_export_says_that_translations_take_the_expert(routed, freeze, caplog, shared):
    freeze(routed([EXPERT] * 4, translate_with_shared_decoder=shared))
    assert ("has translate_with_shared_decoder, which an export does not keep" in caplog.text) is shared


def test_a_dataset_that_does_not_fit_is_refused(routed, freeze, dataset, tiny_whisper, tiny_processor):
    with pytest.raises(ValueError, match="dataset is empty"):
        freeze(routed([EXPERT] * 4), dataset=dataset.select([]))
    silent = dataset.remove_columns("text").add_column("text", ["..."] * len(dataset))
    with pytest.raises(ValueError, match="none of the .* references in 'ca' can be scored"):
        freeze(routed([EXPERT] * 4), dataset=silent)
    other = prepare_dataset(recordings(), tiny_processor, "ro")[0]
    both = datasets.concatenate_datasets([dataset, other])
    with pytest.raises(ValueError, match=r"of the languages \['ro'\] beside or instead of 'ca'"):
        freeze(routed([EXPERT] * 4), dataset=both)
    base = tiny_whisper(max_source_positions=150)
    with pytest.raises(
        ValueError, match=r"have 100 frames and the model takes 200: .*set_audio_context\(None, processor, 2\)"
    ):
        freeze(routed([EXPERT] * 4, base=base, max_audio_seconds=2))


def test_a_model_without_clsr_layers_is_refused(freeze, tiny_whisper):
    with pytest.raises(TypeError, match="a WhisperForConditionalGeneration, expected a PeftModel"):
        freeze(tiny_whisper())
    with pytest.raises(ValueError, match=r"no CLSR layers to freeze, its adapters are: ca \(LORA\)"):
        freeze(get_peft_model(tiny_whisper(), LoraConfig(target_modules=["fc1"]), adapter_name="ca"))
    sizes = dict.fromkeys(
        ("encoder_attention_heads", "decoder_attention_heads", "encoder_layers", "decoder_layers"), 1
    )
    sizes |= {"vocab_size": 20, "d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    bart = get_peft_model(
        BartForConditionalGeneration(BartConfig(**sizes)), CLSRConfig.paper(gate_dim=4), adapter_name="ca"
    )
    with pytest.raises(TypeError, match="around a BartForConditionalGeneration, expected"):
        freeze(bart)


def test_a_base_that_is_not_in_memory_as_it_was_trained_is_refused(routed, freeze):
    model = routed([EXPERT] * 4)
    model.get_base_model().model.decoder.layers[0].fc2.base_layer.to("meta")
    with pytest.raises(ValueError, match=r"'model.decoder.layers.0.fc2' is on the meta device, expected an nn.Linear"):
        freeze(model)


def test_a_quantized_base_is_refused(routed, freeze):
    torchao = pytest.importorskip("torchao.quantization")
    model = routed([EXPERT] * 4)
    shared = model.get_base_model().model.encoder.layers[1].fc1.base_layer
    torchao.quantize_(shared, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="'model.encoder.layers.1.fc1' is a Linear of .*without quantization"):
        freeze(model)


# ---------------------------------------------------------------- CTranslate2


def test_the_plain_whisper_says_the_same_in_ctranslate2(
    routed, freeze, dataset, tiny_processor, ctranslate2, tmp_path
):
    from ctranslate2.converters import TransformersConverter

    model = freeze(routed([EXPERT, SHARED, MIXED, EXPERT], expert_rank=3), undecided="majority").model
    model.save_pretrained(tmp_path / "whisper")
    tiny_processor.save_pretrained(tmp_path / "whisper")
    TransformersConverter(str(tmp_path / "whisper"), copy_files=["tokenizer.json"]).convert(
        str(tmp_path / "converted")
    )
    converted = ctranslate2.models.Whisper(str(tmp_path / "converted"), compute_type="float32", intra_threads=1)

    features = dataset["input_features"][:]
    inputs = ctranslate2.StorageView.from_array(features.numpy())
    with torch.no_grad():
        expected = model.model.encoder(features).last_hidden_state.numpy()
    assert np.allclose(np.array(converted.encode(inputs)), expected, atol=1e-4)
    prompt = tiny_processor.tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|ca|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    # It takes half of max_length for what is said.
    results = converted.generate(inputs, [prompt] * 3, beam_size=1, max_length=16, suppress_blank=False)
    said = model.generate(input_features=features, language="ca", max_new_tokens=8, do_sample=False)
    texts = [tiny_processor.decode(result.sequences_ids[0], skip_special_tokens=True) for result in results]
    assert texts == tiny_processor.batch_decode(said, skip_special_tokens=True)
    assert len(set(texts)) > 1
