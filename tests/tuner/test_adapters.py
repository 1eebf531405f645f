"""Several adapters on one model, switched, deleted, disabled, inspected and refused, as with PEFT's own tuners."""

import pytest
import torch
from helpers import SMALL, logits_of, random_clsr, randomize
from peft import LoraConfig, get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from peft.helpers import disable_input_dtype_casting
from torch import nn

from peft_clsr import CLSRConfig, CLSRLayer


def adapter_parameters(model, adapter):
    return {name: p for name, p in model.named_parameters() if "clsr_" in name and f".{adapter}." in name}


def test_adapters_are_independent_of_each_other(tiny_whisper, inputs):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca", "uk")
    catalan, ukrainian = logits_of(model, inputs, "ca"), logits_of(model, inputs, "uk")
    assert not torch.allclose(catalan, ukrainian, atol=1e-3)
    randomize(model, "uk", seed=sum(map(ord, "uk")), scale=0.3)
    assert torch.equal(logits_of(model, inputs, "ca"), catalan)
    assert not torch.allclose(logits_of(model, inputs, "uk"), ukrainian, atol=1e-3)


def test_adding_an_adapter_changes_neither_the_output_nor_what_is_trained(tiny_whisper, inputs):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca")
    before = logits_of(model, inputs)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("uk", CLSRConfig.paper(**SMALL))
    assert model.active_adapters == ["ca"]
    assert torch.equal(logits_of(model, inputs), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_set_adapter_makes_one_adapter_trainable_and_inference_mode_none(tiny_whisper):
    model = random_clsr(tiny_whisper(), "ca", "uk")
    model.set_adapter("uk")
    assert all(p.requires_grad for p in adapter_parameters(model, "uk").values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "ca").values())
    model.set_adapter("ca", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("uk")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model, "uk"))
    model.set_requires_grad("uk", requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())
    model = get_peft_model(tiny_whisper(), CLSRConfig.paper(inference_mode=True))
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["encoder", "fc1", "0", "weight", "clsr_expert", "modules_to_save"])
def test_a_name_of_the_models_own_is_refused(tiny_whisper, name):
    """PEFT would take it for that of an adapter in the names of weights, and leave those out in saving another."""
    with pytest.raises(ValueError, match=f"adapter name '{name}' is a part of the names"):
        random_clsr(tiny_whisper(), name)
    model = random_clsr(tiny_whisper(), "ca")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=f"adapter name '{name}' is a part of the names"):
        model.add_adapter(name, CLSRConfig.paper())
    assert set(model.state_dict()) == before and list(model.peft_config) == ["ca"]


def test_names_that_are_parts_of_other_names(tiny_whisper, inputs):
    names = ("ca", "ca_valencia", "c", "base", "enc")
    model = random_clsr(tiny_whisper(init_std=0.2), *names)
    logits = {name: logits_of(model, inputs, name) for name in names}
    model.delete_adapter("ca")
    for name in names[1:]:
        assert torch.equal(logits_of(model, inputs, name), logits[name]), name


def test_deleting_the_active_adapter_activates_another(tiny_whisper, inputs):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca", "uk")
    ukrainian = logits_of(model, inputs, "uk")
    model.set_adapter("ca")
    with pytest.warns(UserWarning, match="ca was active which is now deleted"):
        model.delete_adapter("ca")
    assert model.active_adapters == ["uk"]
    assert torch.equal(logits_of(model, inputs), ukrainian)
    assert not adapter_parameters(model, "ca") and "ca" not in model.peft_config
    assert all("ca" not in m.clsr_config for m in model.modules() if isinstance(m, CLSRLayer))


def test_deleting_an_inactive_adapter_changes_nothing(tiny_whisper, inputs):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca", "uk")
    before = logits_of(model, inputs, "ca")
    model.delete_adapter("uk")
    assert torch.equal(logits_of(model, inputs), before)
    with pytest.raises(ValueError, match="uk"):
        model.delete_adapter("uk")
    assert torch.equal(logits_of(model, inputs), before)


def test_deleting_the_last_adapter_leaves_the_base(tiny_whisper, inputs):
    base = tiny_whisper(init_std=0.2)
    expected = logits_of(base, inputs)
    model = random_clsr(tiny_whisper(init_std=0.2), "ca")
    model.base_model.delete_adapter("ca")
    assert torch.equal(logits_of(model.base_model, inputs), expected)


def test_disabling_and_enabling_layers(tiny_whisper, inputs):
    expected = logits_of(tiny_whisper(init_std=0.2), inputs)
    model = random_clsr(tiny_whisper(init_std=0.2), "ca")
    before = logits_of(model, inputs)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits_of(model, inputs), expected)
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits_of(model, inputs), before)
    assert all(p.requires_grad for p in adapter_parameters(model, "ca").values())
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits_of(model, inputs), before)


def test_status_of_model_and_layers(tiny_whisper):
    model = random_clsr(tiny_whisper(), "ca", "uk")
    status = get_model_status(model)
    assert status.peft_types == {"ca": "CLSR", "uk": "CLSR"}
    assert status.active_adapters == ["ca"] and status.available_adapters == ["ca", "uk"]
    assert status.enabled is True and status.merged_adapters == []
    assert status.requires_grad == {"ca": True, "uk": False}
    assert status.num_adapter_layers == 8  # two projections in four layers
    assert status.trainable_params == sum(p.numel() for p in adapter_parameters(model, "ca").values())
    layers = get_layer_status(model)
    assert {layer.module_type for layer in layers} == {"InputLinear", "OutputLinear"}
    assert all(layer.available_adapters == ["ca", "uk"] for layer in layers)
    assert all(layer.devices == {"ca": ["cpu"], "uk": ["cpu"]} for layer in layers)
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def test_printed_numbers_of_parameters(tiny_whisper, capsys):
    model = random_clsr(tiny_whisper(), "ca")
    model.print_trainable_parameters()
    expected = sum(p.numel() for p in adapter_parameters(model, "ca").values())
    assert f"trainable params: {expected:,}" in capsys.readouterr().out


def test_adapters_on_different_layers(tiny_whisper, inputs):
    base_logits = logits_of(tiny_whisper(init_std=0.2), inputs)
    model = get_peft_model(
        tiny_whisper(init_std=0.2), CLSRConfig.paper(**SMALL, layers_to_transform=[0]), adapter_name="first"
    )
    model.add_adapter("second", CLSRConfig.paper(**SMALL, layers_to_transform=[1], expert_rank=2))
    model.eval()
    assert torch.allclose(logits_of(model, inputs, "second"), base_logits, atol=1e-6)
    randomize(model, "first", seed=sum(map(ord, "first")), scale=0.3)
    assert torch.allclose(logits_of(model, inputs, "second"), base_logits, atol=1e-6)
    first = logits_of(model, inputs, "first")
    assert not torch.allclose(first, base_logits, atol=1e-3)
    randomize(model, "second", seed=sum(map(ord, "second")), scale=0.3)
    assert torch.equal(logits_of(model, inputs, "first"), first)
    assert not torch.allclose(logits_of(model, inputs, "second"), base_logits, atol=1e-3)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert not torch.allclose(logits_of(model, inputs), base_logits, atol=1e-3)


def test_switching_between_training_and_evaluation_leaves_nothing_behind(tiny_whisper, inputs):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca", "uk")
    hard = logits_of(model, inputs)
    for adapter in ("uk", "ca"):
        model.set_adapter(adapter)
        model.train()
        soft = logits_of(model, inputs)
        with model.disable_adapter():
            logits_of(model, inputs)
        assert torch.equal(logits_of(model, inputs), soft)
        model.eval()
    assert torch.equal(logits_of(model, inputs), hard)
    assert not torch.allclose(soft, hard, atol=1e-3)


def test_a_further_adapter_with_swapped_projections_is_refused(tiny_whisper, inputs):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca")
    with pytest.raises(ValueError, match="fc"):
        model.add_adapter("uk", CLSRConfig.paper(**SMALL, target_modules=["fc2"], output_modules=["fc1"]))


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["uk"]),
        lambda model: model.merge_adapter(),
        lambda model: model.merge_adapter(adapter_names=["ca"]),
        lambda model: next(m for m in model.modules() if isinstance(m, CLSRLayer)).merge(),
    ],
)
def test_merging_is_refused_and_nothing_is_half_merged(tiny_whisper, inputs, merge):
    model = random_clsr(tiny_whisper(init_std=0.2), "ca", "uk")
    before, logits = {name: t.clone() for name, t in model.state_dict().items()}, logits_of(model, inputs)
    with pytest.raises(ValueError, match="token.*unload"):
        merge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert get_model_status(model).merged_adapters == []
    assert torch.equal(logits_of(model, inputs), logits)
    assert not hasattr(model.base_model, "add_weighted_adapter")
    model.unmerge_adapter()  # nothing to do
    assert torch.equal(logits_of(model, inputs), logits)


def test_modules_to_save_are_trained_and_switched(tiny_whisper, inputs):
    model = get_peft_model(
        tiny_whisper(), CLSRConfig.paper(**SMALL, modules_to_save=["layer_norm"]), adapter_name="ca"
    ).eval()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and "clsr_" not in name}
    assert trainable and all("layer_norm.modules_to_save.ca" in name for name in trainable)
    before = logits_of(model, inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.add_(1.0)
    assert not torch.allclose(logits_of(model, inputs), before, atol=1e-2)
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(model(**inputs).logits, before, atol=1e-6)


def test_a_plain_network_takes_two_adapters():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0, self.relu, self.lin1 = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2)

        def forward(self, x):
            return self.lin1(self.relu(self.lin0(x)))

    torch.manual_seed(0)
    base, x = MLP(), torch.randn(40, 10)
    expected = base(x)
    config = CLSRConfig.paper(**SMALL, target_modules=["lin0"], output_modules=["lin1"])
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    randomize(model, "a", seed=sum(map(ord, "a")), scale=0.3)
    model.eval()
    outputs = {name: (model.set_adapter(name), model(x))[1] for name in ("a", "b")}
    assert not torch.allclose(outputs["a"], expected, atol=1e-2)
    torch.testing.assert_close(outputs["b"], expected)


# ---------------------------------------------------------------- mixed batches


class Network(nn.Module):
    """A feed-forward network and a head, whose input has a name of its own."""

    def __init__(self):
        super().__init__()
        self.lin0, self.relu, self.lin1, self.head = nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 8), nn.Linear(8, 2)

    def forward(self, X):
        return self.head(self.lin1(self.relu(self.lin0(X))))


def network(*adapters, **config):
    torch.manual_seed(0)
    config = CLSRConfig.paper(**SMALL, target_modules=["lin0"], output_modules=["lin1"], **config)
    model = get_peft_model(Network(), config, adapter_name=adapters[0])
    for adapter in adapters[1:]:
        model.add_adapter(adapter, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def test_a_mixed_batch_takes_the_modules_to_save_of_each_sample():
    model, X = network("a", "b", modules_to_save=["head"]), torch.randn(6, 10)
    names = ["a", "__base__", "b", "b", "a", "__base__"]
    with torch.no_grad():
        expected = {name: (model.set_adapter(name), model(X=X))[1] for name in ("b", "a")}
        with model.disable_adapter():
            expected["__base__"] = model(X=X)
        alone = torch.stack([expected[name][row] for row, name in enumerate(names)])
        torch.testing.assert_close(model(X=X, adapter_names=names), alone)
        for name in ("a", "b", "__base__"):
            torch.testing.assert_close(model(X=X, adapter_names=[name] * 6), expected[name])
        assert torch.equal(model(X=X), expected["a"])  # the active adapter is back


def test_a_mixed_batch_in_generation_with_beams_takes_the_modules_to_save_of_each_sample(tiny_whisper, inputs):
    model = get_peft_model(tiny_whisper(init_std=0.2), CLSRConfig.paper(**SMALL, modules_to_save=["out_proj"]), "ca")
    model.add_adapter("uk", CLSRConfig.paper(**SMALL, modules_to_save=["out_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    features = inputs["input_features"]
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

    def generate(features, **kwargs):
        start = torch.full((len(features), 1), model.config.decoder_start_token_id)
        return model.eval().generate(input_features=features, decoder_input_ids=start, **options, **kwargs)

    mixed = generate(features, adapter_names=["uk", "ca"])
    alone = [(model.set_adapter(name), generate(features[row : row + 1]))[1] for row, name in enumerate(("uk", "ca"))]
    assert torch.equal(mixed, torch.cat(alone))
    assert not torch.equal(mixed, generate(features))


def test_a_wrong_number_of_adapter_names_is_refused_whatever_the_input_is_called():
    model, X = network("a", "b"), torch.randn(6, 10)
    for call in (lambda **kwargs: model(X, **kwargs), lambda **kwargs: model(X=X, **kwargs)):
        for names in (["a", "b"], ["__base__"] * 5):
            with pytest.raises(ValueError, match=f"but got {len(names)} and 6 respectively"):
                call(adapter_names=names)


# ---------------------------------------------------------------- precision and initial weights


def test_casting_of_inputs_can_be_switched_off():
    """PEFT's helper is for hooks that cast weights as they are used, and must be left to."""
    model, X = network("a").bfloat16(), torch.randn(6, 10)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args: module.float() and None)
            module.register_forward_hook(lambda module, args, output: module.bfloat16() and None)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="dtype"):
            model(X)
        with disable_input_dtype_casting(model):
            assert model(X).dtype == torch.float32
        with pytest.raises(RuntimeError, match="dtype"):
            model(X)


def test_without_initial_weights_every_token_goes_to_a_random_expert():
    torch.manual_seed(0)
    config = CLSRConfig.paper(**SMALL, target_modules=["lin0"], output_modules=["lin1"], init_weights=False)
    base, X = Network(), torch.randn(40, 10)
    with torch.no_grad():
        expected = base(X)
        model = get_peft_model(base, config).eval()
        with model.base_model.record_gates() as gates:
            assert ((model(X) - expected).abs().amax(dim=1) > 1e-3).all()
    assert gates["lin0"].eq(1).all()


def test_an_adapter_of_another_method_may_be_there_first(tiny_whisper):
    whisper = tiny_whisper()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), whisper, "lora")
    inject_adapter_in_model(CLSRConfig.paper(language="ca", gate_dim=4), whisper, "ca")
    assert any(isinstance(module, CLSRLayer) for module in whisper.modules())
