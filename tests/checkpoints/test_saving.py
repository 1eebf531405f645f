"""Files and other doors: what PEFT and transformers do with adapters, done with CLSR."""

import json

import pytest
import torch
from helpers import SMALL, logits_of, random_clsr, randomize
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForSpeechSeq2Seq, WhisperForConditionalGeneration, pipeline
from versions import transformers_own_adapters

from peft_clsr import CLSRConfig, CLSRLayer


@pytest.fixture
def whisper(tiny_whisper):
    return lambda: tiny_whisper(init_std=0.2)


# ---------------------------------------------------------------- PEFT


def test_each_adapter_has_its_folder_and_selected_ones_are_saved(whisper, inputs, tmp_path):
    model = random_clsr(whisper(), "ca", "uk", "ro")
    expected = {name: logits_of(model, inputs, name) for name in ("ca", "uk")}
    model.save_pretrained(tmp_path, selected_adapters=["ca", "uk"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["ca", "uk"]
    loaded = PeftModel.from_pretrained(whisper(), tmp_path, subfolder="ca", adapter_name="ca").eval()
    loaded.load_adapter(tmp_path / "uk", "ukrainian")  # under another name
    assert torch.equal(logits_of(loaded, inputs), expected["ca"])
    assert torch.equal(logits_of(loaded, inputs, "ukrainian"), expected["uk"])


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapters_are_trainable_on_request(whisper, tmp_path, is_trainable):
    random_clsr(whisper(), "ca").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(
        whisper(), tmp_path, subfolder="ca", adapter_name="ca", is_trainable=is_trainable
    )
    assert {p.requires_grad for name, p in model.named_parameters() if "clsr_" in name} == {is_trainable}
    assert model.peft_config["ca"].inference_mode is not is_trainable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_half_precision_bases(whisper, inputs, tmp_path, dtype, autocast_adapter_dtype):
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    base = whisper().to(dtype)
    expected = logits_of(base, inputs)
    model = get_peft_model(
        base, CLSRConfig.paper(**SMALL), adapter_name="ca", autocast_adapter_dtype=autocast_adapter_dtype
    ).eval()
    adapter_dtype = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for name, p in model.named_parameters() if "clsr_" in name} == {adapter_dtype}
    assert logits_of(model, inputs).dtype == dtype
    assert (logits_of(model, inputs) - expected).abs().max() <= 2e-2 * expected.abs().max()
    randomize(model, "ca", seed=sum(map(ord, "ca")), scale=0.3)
    expected = logits_of(model, inputs)
    assert expected.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        whisper().to(dtype),
        tmp_path,
        subfolder="ca",
        adapter_name="ca",
        autocast_adapter_dtype=autocast_adapter_dtype,
    ).eval()
    assert torch.equal(logits_of(loaded, inputs), expected)


def test_low_cpu_mem_usage_leaves_nothing_on_meta(whisper, inputs, tmp_path):
    model = random_clsr(whisper(), "ca", "uk", expert_rank=2)
    expected = {name: logits_of(model, inputs, name) for name in ("ca", "uk")}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        whisper(), tmp_path, subfolder="ca", adapter_name="ca", low_cpu_mem_usage=True
    ).eval()
    loaded.load_adapter(tmp_path / "uk", "uk", low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in loaded.parameters())
    for name, logits in expected.items():
        assert torch.equal(logits_of(loaded, inputs, name), logits)


def test_state_dict_of_one_adapter_moves_to_another(whisper, inputs):
    model = random_clsr(whisper(), "ca", "uk")
    expected = logits_of(model, inputs, "ca")
    state_dict = get_peft_model_state_dict(model, adapter_name="ca")
    assert all("clsr_" in key and ".ca." not in key for key in state_dict)
    result = set_peft_model_state_dict(model, state_dict, adapter_name="uk")
    assert not result.unexpected_keys
    assert torch.equal(logits_of(model, inputs, "uk"), expected)


def test_auto_peft_model_finds_the_base(whisper, inputs, tmp_path):
    whisper().save_pretrained(tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = random_clsr(base, "default")
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits_of(loaded, inputs), expected)


def test_unknown_keys_of_a_later_version_are_ignored_with_a_warning(whisper, inputs, tmp_path):
    model = random_clsr(whisper(), "ca", language="catalan")
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    path = tmp_path / "ca" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gate_shape": "round"}))
    with pytest.warns(UserWarning, match="gate_shape"):
        loaded = PeftModel.from_pretrained(whisper(), tmp_path, subfolder="ca", adapter_name="ca").eval()
    assert torch.equal(logits_of(loaded, inputs), expected)
    assert PeftConfig.from_pretrained(tmp_path / "ca").language == "ca"


def test_modules_to_save_are_in_the_file(whisper, inputs, tmp_path):
    model = random_clsr(whisper(), "ca", modules_to_save=["layer_norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    assert any("layer_norm" in key for key in load_file(tmp_path / "ca" / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(whisper(), tmp_path, subfolder="ca", adapter_name="ca").eval()
    assert torch.equal(logits_of(loaded, inputs), expected)


@pytest.mark.parametrize("rank", [None, 2])
def test_hotswapping_puts_another_language_in_place(whisper, inputs, tmp_path, rank):
    model = random_clsr(whisper(), "ca", "uk", expert_rank=rank)
    for name in ("ca", "uk"):
        model.peft_config[name].language = name
    expected = {name: logits_of(model, inputs, name) for name in ("uk", "ca")}
    model.save_pretrained(tmp_path)
    model.delete_adapter("uk")

    hotswap_adapter(model, str(tmp_path), subfolder="uk", adapter_name="ca", torch_device="cpu")
    assert torch.equal(logits_of(model, inputs), expected["uk"])
    model.save_pretrained(tmp_path / "swapped")
    assert PeftConfig.from_pretrained(tmp_path / "swapped" / "ca").language == "uk"
    hotswap_adapter(model, str(tmp_path / "ca"), adapter_name="ca", torch_device="cpu")
    assert torch.equal(logits_of(model, inputs), expected["ca"])
    assert all(p.requires_grad for name, p in model.named_parameters() if "clsr_" in name)


def test_a_language_that_is_swapped_in_is_decoded_and_saved_as_itself(whisper, inputs, tmp_path):
    random_clsr(whisper(), "rup", language="rup", prompt_language="ro", started_from="ro").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(whisper(), tmp_path / "rup", adapter_name="rup")
    model = random_clsr(whisper(), "ca", language="ca", translate_with_shared_decoder=False)
    hotswap_adapter(model, str(tmp_path / "rup"), adapter_name="ca", torch_device="cpu")
    for task in ("transcribe", "translate"):
        options = {"language": "rup", "task": task, "max_new_tokens": 8, "min_new_tokens": 8}
        expected = loaded.generate(input_features=inputs["input_features"], **options)
        assert torch.equal(model.generate(input_features=inputs["input_features"], **options), expected)
    model.save_pretrained(tmp_path / "swapped")
    saved = PeftConfig.from_pretrained(tmp_path / "swapped" / "ca")
    assert (saved.language, saved.prompt_language, saved.started_from) == ("rup", "ro", "ro")
    assert saved.translate_with_shared_decoder


def test_a_language_of_another_context_is_not_swapped_in(whisper, inputs, tmp_path):
    short = random_clsr(whisper(), "uk", max_audio_seconds=0.5)
    short.save_pretrained(tmp_path)
    model = random_clsr(whisper(), "ca")
    expected = logits_of(model, inputs)
    with pytest.raises(ValueError, match=r"max_audio_seconds, None != 0\.5"):
        hotswap_adapter(model, str(tmp_path), subfolder="uk", adapter_name="ca", torch_device="cpu")
    assert torch.equal(logits_of(model, inputs), expected)


def test_a_compiled_model_is_swapped_without_recompilation(whisper, inputs, tmp_path):
    model = random_clsr(whisper(), "ca", "uk")
    expected = {name: logits_of(model, inputs, name) for name in ("uk", "ca")}
    model.save_pretrained(tmp_path)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, inputs), expected["ca"], atol=1e-5, rtol=1e-5)
    hotswap_adapter(compiled, str(tmp_path / "uk"), adapter_name="ca", torch_device="cpu")
    torch.testing.assert_close(logits_of(compiled, inputs), expected["uk"], atol=1e-5, rtol=1e-5)
    model.load_adapter(tmp_path / "ca", "ca")  # over an adapter of that name: in place too
    torch.testing.assert_close(logits_of(compiled, inputs), expected["ca"], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"expert_rank": 2}, "for expert_rank, None != 2"),
        ({"gate_dim": 4}, "for gate_dim, 8 != 4"),
        ({"layers_to_transform": [0]}, "do not fit adapter 'ca'.*layers.1"),
        ({"exclude_modules": r".*encoder.*"}, "do not fit adapter 'ca'.*encoder"),
        ({"modules_to_save": ["layer_norm"]}, "do not fit adapter 'ca'.*layer_norm"),
    ],
)
def test_hotswapping_what_does_not_fit_is_refused_and_changes_nothing(whisper, inputs, tmp_path, config, error):
    get_peft_model(whisper(), CLSRConfig.paper(**{**SMALL, **config}), adapter_name="uk").save_pretrained(tmp_path)
    model = random_clsr(whisper(), "ca")
    before = logits_of(model, inputs)
    with pytest.raises((ValueError, RuntimeError), match=error):
        hotswap_adapter(model, str(tmp_path / "uk"), adapter_name="ca", torch_device="cpu")
    assert torch.equal(logits_of(model, inputs), before)


def test_hotswapping_an_adapter_of_another_base_is_refused(tiny_whisper, whisper, inputs, tmp_path):
    model = random_clsr(whisper(), "ca")
    before = logits_of(model, inputs)
    for sizes in ({"encoder_layers": 1}, {"encoder_layers": 3}, {"decoder_ffn_dim": 16}, {"decoder_ffn_dim": 48}):
        random_clsr(tiny_whisper(**sizes), "uk").save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="names or shapes differ"):
            hotswap_adapter(model, str(tmp_path / "uk"), adapter_name="ca", torch_device="cpu")
        assert torch.equal(logits_of(model, inputs), before)


def test_hotswapping_lora_is_as_before(whisper, inputs, tmp_path):
    config = {"target_modules": ["fc1"], "r": 2, "init_lora_weights": False}
    torch.manual_seed(0)
    expected = {}
    for name, alpha in (("a", 4), ("b", 8)):
        model = get_peft_model(whisper(), LoraConfig(**config, lora_alpha=alpha)).eval()
        expected[name] = logits_of(model, inputs)
        model.save_pretrained(tmp_path / name)
    hotswap_adapter(model, str(tmp_path / "a"), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(logits_of(model, inputs), expected["a"], atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- other doors


def test_inject_adapter_in_model_and_its_state_dict(whisper, inputs):
    reference = random_clsr(whisper(), "ca")
    expected = logits_of(reference, inputs)
    state_dict = get_peft_model_state_dict(reference, adapter_name="ca")
    model = inject_adapter_in_model(CLSRConfig.paper(**SMALL), whisper(), "ca").eval()
    assert type(model) is WhisperForConditionalGeneration
    set_peft_model_state_dict(model, state_dict, adapter_name="ca")
    assert torch.equal(logits_of(model, inputs), expected)
    inject_adapter_in_model(CLSRConfig.paper(**SMALL), model, "uk")
    assert len({id(layer.route.routing) for layer in model.modules() if isinstance(layer, CLSRLayer)}) == 1

    targets = {key.rsplit(".clsr_", 1)[0].removeprefix("base_model.model.") for key in state_dict}
    by_keys = {key.removeprefix("base_model.model."): value for key, value in state_dict.items()}
    model = inject_adapter_in_model(CLSRConfig.paper(**SMALL), whisper(), "ca", state_dict=by_keys).eval()
    assert {name for name, module in model.named_modules() if isinstance(module, CLSRLayer)} == targets
    set_peft_model_state_dict(model, state_dict, adapter_name="ca")
    assert torch.equal(logits_of(model, inputs), expected)


@transformers_own_adapters
def test_transformers_own_adapters(whisper, inputs, tmp_path):
    base_logits = logits_of(whisper(), inputs)
    saved = random_clsr(whisper(), "ca", "uk")
    expected = {name: logits_of(saved, inputs, name) for name in ("ca", "uk")}
    saved.save_pretrained(tmp_path)

    model = whisper()
    model.load_adapter(str(tmp_path / "ca"), adapter_name="ca")
    model.load_adapter(str(tmp_path / "uk"), adapter_name="uk")
    model.eval()
    for name in ("ca", "uk"):
        assert torch.equal(logits_of(model, inputs, name), expected[name])
    model.disable_adapters()
    assert torch.equal(logits_of(model, inputs), base_logits)
    model.enable_adapters()
    assert torch.equal(logits_of(model, inputs), expected["uk"])
    with pytest.raises(ValueError, match="ca.*uk"):
        model.set_adapter(["ca", "uk"])
    model.save_pretrained(tmp_path / "again")
    again = whisper()
    again.load_adapter(str(tmp_path / "again"))
    assert torch.equal(logits_of(again.eval(), inputs), expected["uk"])
    model.delete_adapter("uk")
    model.set_adapter("ca")
    assert torch.equal(logits_of(model, inputs), expected["ca"])


@transformers_own_adapters
def test_transformers_own_adapters_train_with_the_budget_loss(whisper, inputs):
    model = whisper()
    model.add_adapter(CLSRConfig.paper(**{**SMALL, "gate_budget": 1.0, "budget_weight": 3.0}), "ca")
    model.train()
    labels = inputs.pop("decoder_input_ids")
    outputs = model(**inputs, labels=labels)
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    assert outputs.loss.item() == pytest.approx(cross_entropy.item() + 3.0 * 0.5, abs=1e-5)
    outputs.loss.backward()
    assert all((p.grad is not None) == ("clsr_" in name) for name, p in model.named_parameters())


def test_a_base_loads_by_the_folder_of_its_adapter(whisper, inputs, tmp_path):
    whisper().save_pretrained(tmp_path / "base")
    base = WhisperForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = random_clsr(base, "default")
    expected = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    for auto in (WhisperForConditionalGeneration, AutoModelForSpeechSeq2Seq):
        loaded = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
        assert torch.equal(logits_of(loaded, inputs), expected)


def test_pipeline_on_a_wrapped_whisper(whisper, tiny_processor, tmp_path):
    model = random_clsr(whisper(), "ca")
    model.save_pretrained(tmp_path)
    native = whisper()
    native.load_adapter(str(tmp_path / "ca"))
    samples = torch.randn(12000, generator=torch.Generator().manual_seed(0)).numpy()
    texts = [
        pipeline(
            "automatic-speech-recognition",
            model=wrapped.eval(),
            tokenizer=tiny_processor.tokenizer,
            feature_extractor=tiny_processor.feature_extractor,
            generate_kwargs={"language": "ca", "task": "transcribe", "max_new_tokens": 8},
        )({"raw": samples, "sampling_rate": 16000})["text"]
        for wrapped in (model, native, whisper())
    ]
    assert texts[0] == texts[1] != texts[2]
