"""Quantized bases: the shared FFN stays quantized, the expert starts as its dequantized weight, a plain layer."""

import copy

import pytest
import torch
from helpers import SMALL
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig, WhisperForConditionalGeneration

from peft_clsr import CLSRConfig


def bitsandbytes_8bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["proj_out"])


def bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["proj_out"],
    )


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.fixture(params=[bitsandbytes_8bit, bitsandbytes_4bit, torchao_int8], ids=lambda make: make.__name__)
def build(request, tiny_whisper, tmp_path):
    config = request.param()
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}  # blocks of 4 bits are of 64 numbers
    tiny_whisper(init_std=0.1, **sizes).save_pretrained(tmp_path / "base")
    return lambda: WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(2, 80, 100, generator=generator),
        "labels": torch.randint(0, 200, (2, 6), generator=generator),
    }


@pytest.mark.parametrize("rank", [None, 2])
def test_a_fresh_adapter_changes_next_to_nothing(build, inputs, rank):
    with torch.no_grad():
        expected = build()(**inputs).logits
        model = get_peft_model(build(), CLSRConfig.paper(**SMALL, expert_rank=rank), adapter_name="ca").eval()
        actual = model(**inputs).logits
    fc1 = model.base_model.model.model.encoder.layers[0].fc1
    if rank is None:
        expert = fc1.clsr_expert["ca"]
        assert type(expert) is nn.Linear and expert.weight.dtype == torch.float32
        torch.testing.assert_close(expert.weight.data, dequantize_module_weight(copy.deepcopy(fc1.base_layer)))
    # 8-bit kernels quantize the activations too, which the expert does not.
    assert (actual - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("rank", [None, 2])
def test_training_moves_the_adapter_alone_and_it_can_be_saved(build, inputs, tmp_path, rank):
    model = get_peft_model(build(), CLSRConfig.paper(**SMALL, expert_rank=rank), adapter_name="ca").train()
    fc1 = model.base_model.model.model.encoder.layers[0].fc1
    quantized = dequantize_module_weight(copy.deepcopy(fc1.base_layer)).clone()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(dequantize_module_weight(copy.deepcopy(fc1.base_layer)), quantized)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "clsr_" in name
    }
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter", subfolder="ca", adapter_name="ca").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_an_adapter_may_join_after_the_model_was_used(build, inputs):
    model = get_peft_model(build(), CLSRConfig.paper(**SMALL), adapter_name="ca").eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        model.add_adapter("uk", CLSRConfig.paper(**SMALL))
        assert torch.equal(model(**inputs).logits, expected)
        model.set_adapter("uk")
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def fresh_weights(build, rank):
    """The weights of an adapter on a base that has not run."""
    model = get_peft_model(build(), CLSRConfig.paper(**SMALL, expert_rank=rank), adapter_name="ca")
    return {name: p for name, p in model.named_parameters() if "clsr_expert" in name}


@pytest.mark.parametrize("trained", [False, True])
def test_experts_can_be_added_to_a_base_that_has_run_and_leave_it_bit_identical(build, inputs, tmp_path, trained):
    base, expected_experts = build(), fresh_weights(build, None)
    get_peft_model(build(), CLSRConfig.paper(**SMALL), adapter_name="ca").save_pretrained(tmp_path)
    if trained:  # the base runs in training mode, too
        base.train()(**inputs)
        base.eval()

    def load():
        if not is_packed:
            model.load_adapter(tmp_path / "ca", "fr")

    with torch.no_grad():
        expected = base(**inputs).logits
        state = getattr(base.model.encoder.layers[0].fc1.weight, "quant_state", None)
        # The state_dict() of bitsandbytes itself, which PEFT calls to load, breaks 4-bit weights packed for a CPU.
        is_packed = getattr(state, "packing_format_for_cpu", False)
        model = get_peft_model(base, CLSRConfig.paper(**SMALL), adapter_name="ca").eval()
        for add in (
            lambda: None,
            lambda: model.add_adapter("uk", CLSRConfig.paper(**SMALL)),
            load,
            lambda: model.add_adapter("de", CLSRConfig.paper(**SMALL, expert_rank=2)),
        ):
            add()
            with model.disable_adapter():
                assert torch.equal(model(**inputs).logits, expected)
            model(**inputs)
    experts = {name: p for name, p in model.named_parameters() if "clsr_expert." in name}
    for name, parameter in expected_experts.items():
        for adapter in ("ca", "uk") if is_packed else ("ca", "uk", "fr"):
            expert = experts[name.replace(".ca.", f".{adapter}.")]
            # A kernel of the CPU for packed 4-bit weights has them in bfloat16.
            torch.testing.assert_close(expert, parameter, rtol=0, atol=2e-3 if is_packed else 0)
    assert torch.equal(model.unload()(**inputs).logits, expected)


def test_training_works_as_pefts_notebooks_prepare_a_quantized_base(build, inputs):
    def gradients(prepare):
        torch.manual_seed(0)
        model = get_peft_model(prepare(build()), CLSRConfig.paper(**SMALL), adapter_name="ca").train()
        model(**inputs).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(lambda base: base), gradients(prepare_model_for_kbit_training)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)
    with pytest.raises(RuntimeError, match='"use_reentrant": False.*prepare_model_for_kbit_training'):
        gradients(
            lambda base: prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": True})
        )
