"""What a teacher gives to distillation: its decoder states, its output layer, its identity."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig, WhisperForConditionalGeneration

from peft_clsr import CLSRConfig
from peft_clsr.distillation.teachers.forward import teacher_decoder_states, teacher_hash, teacher_output_layer

SIZES = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.2}


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 200, (2, 6), generator=generator)
    labels[1, 4:] = -100
    return {"input_features": torch.randn(2, 80, 100, generator=generator), "labels": labels}


@pytest.fixture
def build(tiny_whisper, tmp_path):
    """A factory of teachers by kind, the same weights at every call."""

    def quantized(config):
        tiny_whisper(**SIZES).save_pretrained(tmp_path / "base")
        return WhisperForConditionalGeneration.from_pretrained(
            tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
        ).eval()

    def bitsandbytes():
        pytest.importorskip("bitsandbytes")
        return quantized(BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["proj_out"]))

    def with_8bit_output_layer():
        nn8bit = pytest.importorskip("bitsandbytes").nn
        teacher = tiny_whisper(**SIZES)
        weight = nn8bit.Int8Params(teacher.proj_out.weight.detach(), has_fp16_weights=False, requires_grad=False)
        teacher.proj_out = nn8bit.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False, threshold=6.0)
        teacher.proj_out.weight = weight
        teacher.proj_out.to("cpu")  # quantizes
        return teacher

    def with_adapter(config):
        model = get_peft_model(tiny_whisper(**SIZES), config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.2, generator=generator)
        return model

    def torchao():
        quantization = pytest.importorskip("torchao.quantization")
        return quantized(TorchAoConfig(quantization.Int8WeightOnlyConfig()))

    kinds = {
        "plain": lambda: tiny_whisper(**SIZES),
        "bfloat16": lambda: tiny_whisper(**SIZES).bfloat16(),
        "lora": lambda: with_adapter(LoraConfig(target_modules=["q_proj", "fc1"], lora_dropout=0.5)),
        "lora of the output layer": lambda: with_adapter(LoraConfig(target_modules=["fc1", "proj_out"])),
        "lora with a task type": lambda: with_adapter(LoraConfig(target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM")),
        "clsr": lambda: with_adapter(CLSRConfig.paper(gate_dim=8)),
        "8-bit": bitsandbytes,
        "8-bit output layer": with_8bit_output_layer,
        "torchao": torchao,
        "offloaded": lambda: cpu_offload(tiny_whisper(**SIZES), execution_device="cpu"),
    }
    return lambda kind: kinds[kind]()


KINDS = ("plain", "bfloat16", "lora", "lora of the output layer", "lora with a task type", "clsr", "8-bit")
KINDS += ("8-bit output layer", "torchao", "offloaded")


@pytest.mark.parametrize("kind", KINDS)
def test_states_times_the_output_layer_are_the_logits(build, inputs, kind):
    teacher = build(kind)
    whisper = teacher.get_base_model() if hasattr(teacher, "get_base_model") else teacher
    with torch.no_grad():
        logits = whisper(input_features=inputs["input_features"].to(whisper.dtype), labels=inputs["labels"]).logits
    states = teacher_decoder_states(teacher, **inputs)
    layer = teacher_output_layer(teacher)
    assert states.shape == (2, 6, 64) and states.dtype == whisper.dtype and not states.requires_grad
    assert type(layer) is nn.Linear and layer.weight.shape == logits.shape[-1:] + states.shape[-1:]
    assert not layer.weight.requires_grad and layer.bias is None
    # An 8-bit layer rounds its inputs as well, to a 127th of the largest.
    tolerance = {"8-bit output layer": 2e-2, "bfloat16": 1e-2}.get(kind, 1e-5)
    torch.testing.assert_close(layer(states), logits, rtol=0, atol=tolerance * logits.abs().max().item())


def test_the_output_layer_is_a_copy(tiny_whisper):
    teacher = tiny_whisper()
    layer = teacher_output_layer(teacher)
    assert torch.equal(layer.weight, teacher.proj_out.weight)
    assert layer.weight.data_ptr() != teacher.proj_out.weight.data_ptr()


def test_an_output_layer_with_a_bias_keeps_it(tiny_whisper, inputs):
    teacher = tiny_whisper()
    teacher.proj_out = nn.Linear(16, len(teacher.proj_out.weight))
    logits = teacher.proj_out(teacher_decoder_states(teacher, **inputs))
    assert torch.equal(teacher_output_layer(teacher)(teacher_decoder_states(teacher, **inputs)), logits)
    get_peft_model(teacher, LoraConfig(target_modules=["proj_out"]))
    layer = teacher_output_layer(teacher.eval())
    torch.testing.assert_close(layer(teacher_decoder_states(teacher, **inputs)), logits, atol=1e-6, rtol=1e-6)


def test_inputs_stay_as_they_are(tiny_whisper, inputs):
    """In training mode, Whisper masks the features that it is given in place (SpecAugment)."""
    teacher = tiny_whisper(
        apply_spec_augment=True, mask_time_prob=0.5, mask_feature_prob=0.5, mask_time_length=4
    ).train()
    before = copy.deepcopy(inputs)
    teacher_decoder_states(teacher, **inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_padding_changes_no_other_state(tiny_whisper, inputs):
    teacher = tiny_whisper(**SIZES)
    alone = teacher_decoder_states(teacher, inputs["input_features"][1:], inputs["labels"][1:, :4])
    torch.testing.assert_close(teacher_decoder_states(teacher, **inputs)[1:, :4], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_hash_is_of_the_weights(build, inputs, kind):
    teacher = build(kind)
    key = teacher_hash(teacher)
    assert len(key) == 32
    teacher_decoder_states(teacher, **inputs)
    assert teacher_hash(teacher) == key == teacher_hash(build(kind))
    others = {teacher_hash(build(other)) for other in ("plain", "bfloat16", "lora", "clsr") if other != kind}
    assert kind == "offloaded" or key not in others
    name, parameter = next(
        (name, parameter) for name, parameter in teacher.named_parameters() if "decoder" in name and "norm" in name
    )
    if not parameter.is_meta:
        with torch.no_grad():
            parameter[0] += 0.1
        assert teacher_hash(teacher) != key, name


def test_an_offloaded_teacher_is_the_same_teacher(build):
    assert teacher_hash(build("offloaded")) == teacher_hash(build("plain"))


@pytest.mark.parametrize(
    "change", [{"encoder_attention_heads": 4}, {"scale_embedding": True}, {"decoder_start_token_id": 3}]
)
def test_the_hash_is_of_what_the_weights_are_used_for(tiny_whisper, change):
    key = teacher_hash(tiny_whisper())
    assert teacher_hash(tiny_whisper(use_cache=False, dropout=0.3).train()) == key
    other = tiny_whisper(**change)
    assert all(torch.equal(*pair) for pair in zip(other.parameters(), tiny_whisper().parameters(), strict=True))
    assert teacher_hash(other) != key


def test_the_hash_is_of_the_adapters_in_use(build):
    teacher = build("lora")
    key = teacher_hash(teacher)
    with teacher.disable_adapter():
        assert teacher_hash(teacher) != key
    assert teacher_hash(teacher) == key
    teacher.base_model.model.model.encoder.layers[0].fc1.scaling["default"] *= 2
    assert teacher_hash(teacher) != key
