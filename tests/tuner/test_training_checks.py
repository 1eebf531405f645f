"""Adapters keep the mode of their base; warnings name the parts of the method that a training leaves out."""

import copy
import warnings

import pytest
import torch
from helpers import SMALL, clsr, logits_of, random_clsr, randomize
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_clsr import CLSRConfig, CLSRLayer, set_gate_progress

NOISY = {"gate_dim": 8, "skip_gate_prob": 0.9, "expert_dropout": 0.5, "gate_dropout": 0.5}


def by_get_peft_model(base, config, folder):
    return get_peft_model(base, config, adapter_name="ca")


def by_add_adapter_of_peft(base, config, folder):
    model = get_peft_model(base, copy.deepcopy(config), adapter_name="uk")
    model.add_adapter("ca", config)
    model.set_adapter("ca")
    return model


def by_add_adapter_of_transformers(base, config, folder):
    base.add_adapter(config, "ca")
    return base


def by_inject_adapter_in_model(base, config, folder):
    return inject_adapter_in_model(config, base, "ca")


def by_load_adapter_of_transformers(base, config, folder):
    get_peft_model(copy.deepcopy(base), config, adapter_name="ca").save_pretrained(folder)
    base.load_adapter(str(folder / "ca"), "ca")
    return base


def by_load_adapter_of_peft(base, config, folder):
    get_peft_model(copy.deepcopy(base), config, adapter_name="ca").save_pretrained(folder)
    model = PeftModel.from_pretrained(base, folder / "ca", adapter_name="uk", is_trainable=True)
    model.load_adapter(folder / "ca", "ca", is_trainable=True)
    model.set_adapter("ca")
    return model


WAYS = [
    by_get_peft_model,
    by_add_adapter_of_peft,
    by_add_adapter_of_transformers,
    by_inject_adapter_in_model,
    by_load_adapter_of_transformers,
    by_load_adapter_of_peft,
]


@pytest.mark.parametrize("add", WAYS)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_new_adapter_leaves_a_base_in_evaluation_mode_as_it_is(tiny_whisper, inputs, tmp_path, add, rank):
    base = tiny_whisper()
    before = logits_of(base, inputs)
    model = add(base, CLSRConfig.paper(**NOISY, expert_rank=rank), tmp_path)
    set_gate_progress(model, 1.0)
    for _ in range(3):
        torch.testing.assert_close(logits_of(model, inputs), before, atol=1e-5, rtol=0)
    assert not [name for name, module in base.named_modules() if module.training]
    if isinstance(model, PeftModel):
        assert torch.equal(logits_of(model.unload(), inputs), before)


@pytest.mark.parametrize("add", [add for add in WAYS if "load" not in add.__name__])  # loading calls model.eval()
def test_an_adapter_on_a_base_in_training_mode_is_in_training_mode(tiny_whisper, tmp_path, add):
    base = tiny_whisper().train()
    add(base, CLSRConfig.paper(**SMALL), tmp_path)
    assert all(module.training for module in base.modules())


# ---------------------------------------------------------------- gate noise


@pytest.fixture
def batch(inputs):
    return {"input_features": inputs["input_features"], "labels": inputs["decoder_input_ids"]}


def messages_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("add", [by_get_peft_model, by_add_adapter_of_transformers, by_inject_adapter_in_model])
@pytest.mark.parametrize("straight_through", [False, True])
def test_a_training_step_without_a_noise_schedule_is_named_once(tiny_whisper, batch, add, straight_through):
    model = add(
        tiny_whisper(), CLSRConfig.paper(language="ca", gate_dim=8, straight_through=straight_through), None
    ).train()

    def two_steps():
        for _ in range(2):
            model(**batch).loss.backward()

    (message,) = messages_of(two_steps)
    assert all(part in message for part in ("'ca'", "gate_noise=5", "GateScheduleCallback", "set_gate_progress"))


def without_noise(model):
    model.peft_config["ca"].gate_noise = 0.0


def with_progress_zero(model):
    set_gate_progress(model, 0)


def in_evaluation_mode(model):
    model.eval()


def of_another_part(model):
    model.set_requires_grad("ca", requires_grad=False)


@pytest.mark.parametrize("change", [without_noise, with_progress_zero, in_evaluation_mode, of_another_part])
def test_there_is_no_warning_where_no_noise_is_missing(tiny_whisper, batch, change):
    model = clsr(tiny_whisper(), gate_noise=5.0).train()
    change(model)
    assert messages_of(lambda: model(**batch)) == []
    model.train().set_requires_grad("ca", requires_grad=True)
    with torch.no_grad():
        assert messages_of(lambda: model(**batch)) == []  # no training step


class Wrapper(nn.Module):
    """As DDP has it."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("add", [by_get_peft_model, by_add_adapter_of_transformers, by_inject_adapter_in_model])
def test_the_progress_of_every_kind_of_model_can_be_set(tiny_whisper, tmp_path, add):
    model = add(tiny_whisper(), CLSRConfig.paper(**SMALL), tmp_path)
    for progress, wrapped in ((0.25, model), (1, Wrapper(model))):
        set_gate_progress(wrapped, progress)
        layers = [module for module in model.modules() if isinstance(module, CLSRLayer)]
        assert {layer.route.routing.gate_progress for layer in layers} == {progress}
    with pytest.raises(ValueError, match="1.5"):
        set_gate_progress(model, 1.5)
    with pytest.raises(TypeError, match="WhisperForConditionalGeneration without a CLSR adapter"):
        set_gate_progress(tiny_whisper(), 0.5)


# ---------------------------------------------------------------- evaluation mode


def test_a_backward_pass_in_evaluation_mode_is_named(tiny_whisper, batch):
    model = random_clsr(tiny_whisper(), "ca")
    (message,) = messages_of(lambda: [model(**batch).loss.backward() for _ in range(2)])
    assert "model.train()" in message
    model.set_adapter("ca", inference_mode=True)
    batch["input_features"].requires_grad_()  # a saliency map, not a training
    assert messages_of(lambda: model(**batch).loss.backward()) == []


# ---------------------------------------------------------------- a frozen encoder


def freeze_encoder(model):
    for parameter in model.get_encoder().parameters():
        parameter.requires_grad = False


@pytest.mark.parametrize("rank", [None, 2])
def test_frozen_encoder_experts_act_in_training_as_in_evaluation(tiny_whisper, batch, rank):
    torch.manual_seed(0)
    model = by_add_adapter_of_transformers(tiny_whisper(), CLSRConfig.paper(**NOISY, expert_rank=rank), None)
    randomize(model, scale=0.3)
    freeze_encoder(model)
    set_gate_progress(model, 1.0)
    with torch.no_grad():
        expected = model.get_encoder()(batch["input_features"]).last_hidden_state
    (message,) = messages_of(lambda: [model.train()(**batch) for _ in range(2)])
    assert "'ca'" in message and 'exclude_modules=r".*encoder.*"' in message
    for _ in range(3):
        assert torch.equal(model.get_encoder()(batch["input_features"]).last_hidden_state, expected)


def test_frozen_gates_have_no_part_in_the_budget(tiny_whisper, batch):
    frozen = clsr(tiny_whisper(), gate_budget=0.75).train()
    freeze_encoder(frozen.get_base_model())
    decoder_only = clsr(tiny_whisper(), gate_budget=0.75, exclude_modules=r".*encoder.*").train()
    losses = [model(**batch).loss.item() for model in (frozen, decoder_only)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert frozen.base_model.budget_loss().item() == pytest.approx(0.25)  # every trained gate is at 0.5
    assert frozen.base_model.gate_mean().item() == pytest.approx(0.5)
