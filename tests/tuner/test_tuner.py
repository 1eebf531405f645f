"""The tuner against `SlowFFN`, the formulas of the paper with both paths computed for every token."""

import copy
import importlib
import io
import math
import pickle
import subprocess
import sys

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import QUIET
from peft import PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_clsr
from peft_clsr import CLSRConfig
from peft_clsr.tuner.gate import gate_logits

FEATURE_FRAMES = 100  # two frames a token: 50 encoder tokens


class SlowFFN(nn.Module):
    """(1 - g) shared(x) + g expert(x), densely. Holds its own leaves, so autograd gives the reference gradients."""

    def __init__(self, input_projection, output_projection, activation, adapter="default", hard=False):
        super().__init__()
        self.activation, self.hard = activation, hard
        self.is_skipped = self.straight_through = False
        self.gates = None  # of the latest forward

        def leaf(tensor):
            return nn.Parameter(tensor.detach().float().clone())

        for i, projection in ((1, input_projection), (2, output_projection)):
            setattr(self, f"w{i}", projection.base_layer.weight.detach().float().clone())
            setattr(self, f"b{i}", projection.base_layer.bias.detach().float().clone())
            setattr(self, f"ew{i}", leaf(projection.clsr_expert[adapter].weight))
            setattr(self, f"eb{i}", leaf(projection.clsr_expert[adapter].bias))
        self.gate_w1 = leaf(input_projection.clsr_gate_in[adapter].weight)
        self.gate_b1 = leaf(input_projection.clsr_gate_in[adapter].bias)
        self.gate_w2 = leaf(input_projection.clsr_gate_out[adapter].weight)

    def gate_logits(self, x):
        return (F.relu(x @ self.gate_w1.T + self.gate_b1) @ self.gate_w2.T).squeeze(-1)

    def gate_values(self, x):
        logits = self.gate_logits(x)
        is_open = (logits >= 0).float()
        soft = logits.sigmoid()
        return is_open if self.hard else soft + (is_open - soft).detach() * self.straight_through

    def forward(self, x):
        dtype, x = x.dtype, x.float()
        self.gates = self.gate_values(x)
        gate_values = self.gates.unsqueeze(-1) * (not self.is_skipped)
        shared = self.activation(x @ self.w1.T + self.b1) @ self.w2.T + self.b2
        expert = self.activation(x @ self.ew1.T + self.eb1) @ self.ew2.T + self.eb2
        return ((1 - gate_values) * shared + gate_values * expert).to(dtype)

    def gradients(self):
        return {
            "clsr_gate_in.weight": self.gate_w1.grad,
            "clsr_gate_in.bias": self.gate_b1.grad,
            "clsr_gate_out.weight": self.gate_w2.grad,
            "fc1.clsr_expert.weight": self.ew1.grad,
            "fc1.clsr_expert.bias": self.eb1.grad,
            "fc2.clsr_expert.weight": self.ew2.grad,
            "fc2.clsr_expert.bias": self.eb2.grad,
        }


class MLP(nn.Module):
    def __init__(self, hidden=12, width=20):
        super().__init__()
        torch.manual_seed(3)
        self.lin0 = nn.Linear(hidden, width)
        self.relu = nn.ReLU()
        self.lin1 = nn.Linear(width, hidden)

    def forward(self, x):
        return self.lin1(self.relu(self.lin0(x)))


@pytest.fixture
def tiny_whisper(tiny_whisper):
    """The tiny Whisper with weights and biases large enough that a wrong path shows in every FFN's output."""

    def build():
        model = tiny_whisper(init_std=0.2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in layers(model).values():
                for bias in (layer.fc1.bias, layer.fc2.bias):
                    bias.copy_(torch.randn(bias.shape, generator=generator) * 0.2)
        return model

    return build


def clsr(base, adapter="default", **config):
    return helpers.clsr(base, (adapter,), **config)


def clsr_mlp(**config):
    return clsr(MLP(), target_modules=["lin0"], output_modules=["lin1"], **config)


def layers(model):
    """The transformer layers by name, encoder and decoder."""
    whisper = model.base_model.model if isinstance(model, PeftModel) else model
    return {
        f"model.{side}.layers.{i}": layer
        for side in ("encoder", "decoder")
        for i, layer in enumerate(getattr(whisper.model, side).layers)
    }


def randomize(model, adapter="default", seed=5):
    return helpers.randomize(model, adapter, seed=seed, scale=0.3, gate_scale=0.5)


@torch.no_grad()
def force_gate(input_projection, logit, adapter="default"):
    """Makes the gate logit of every token `logit`."""
    gate_in, gate_out = input_projection.clsr_gate_in[adapter], input_projection.clsr_gate_out[adapter]
    gate_in.weight.zero_()
    gate_in.bias.fill_(1.0)
    gate_out.weight.fill_(logit / gate_out.weight.numel())


def apply_pattern(model, pattern):
    if pattern != "mixed":
        for layer in layers(model).values():
            force_gate(layer.fc1, 1000.0 if pattern == "ones" else -1000.0)


def slow_copy(model, base, hard, adapter="default"):
    """`base` with every FFN a `SlowFFN` of `model`'s weights: fc2(activation(fc1(x))) becomes SlowFFN(x)."""
    for (name, layer), wrapped in zip(layers(base).items(), layers(model).values(), strict=True):
        slow = SlowFFN(wrapped.fc1, wrapped.fc2, layer.activation_fn, adapter, hard)
        layer.fc1, layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity(), slow
        assert name in layers(model)
    return base


def make_inputs(base, batch=3, label_tokens=7, seed=0, dtype=torch.float32, padding=False):
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "input_features": torch.randn(batch, 80, FEATURE_FRAMES, generator=generator).to(dtype),
        "labels": torch.randint(0, base.config.vocab_size, (batch, label_tokens), generator=generator),
    }
    if padding:
        inputs["attention_mask"] = torch.ones(batch, FEATURE_FRAMES, dtype=torch.long)
        inputs["attention_mask"][1, 61:] = 0  # 61 frames are 31 tokens
        inputs["labels"][1, 4:] = -100
    return inputs


def trainable_gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_gradients_match(model, slow, atol):
    for name, layer in layers(model).items():
        for key, expected in layers(slow)[name].fc2.gradients().items():
            projection = layer.fc2 if key.startswith("fc2") else layer.fc1
            *_, module, tensor = key.split(".")
            actual = getattr(getattr(projection, module)["default"], tensor).grad
            if expected is None:
                assert actual is None or actual.abs().max() == 0, f"{name} {key}"
            else:
                torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


# ---------------------------------------------------------------- the base model is left alone


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
def test_fresh_adapter_equals_base(tiny_whisper, training, rank):
    base = tiny_whisper()
    inputs = make_inputs(base)
    model = clsr(tiny_whisper(), "ca", expert_rank=rank)
    model.add_adapter("uk", CLSRConfig.paper(**QUIET, language="be", gate_dim=4))
    base.train(training)
    model.train(training)
    with torch.no_grad():
        expected = base(**inputs).logits
        for adapter in ("ca", "uk"):
            model.set_adapter(adapter)
            assert (model(**inputs).logits - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_disabled_adapter_is_bit_identical_to_base(tiny_whisper, training):
    base = tiny_whisper()
    inputs = make_inputs(base)
    model = randomize(clsr(tiny_whisper()))
    base.train(training)
    model.train(training)
    with torch.no_grad():
        expected = base(**inputs)
        assert not torch.allclose(model(**inputs).logits, expected.logits, atol=1e-3)
        with model.disable_adapter():
            disabled = model(**inputs)
        assert torch.equal(disabled.logits, expected.logits)
        assert torch.equal(disabled.loss, expected.loss)  # no budget loss either
        assert not torch.allclose(model(**inputs).logits, expected.logits, atol=1e-3)


def test_unloaded_model_is_bit_identical_to_base(tiny_whisper):
    base = tiny_whisper()
    inputs = make_inputs(base)
    model = randomize(clsr(tiny_whisper()))
    model.train()
    model(**inputs).loss.backward()
    assert model.base_model.model.accepts_loss_kwargs is False
    unloaded = model.unload().eval()
    assert not hasattr(unloaded, "accepts_loss_kwargs")
    assert not unloaded._forward_hooks and not unloaded._forward_pre_hooks
    assert all(type(layer.fc1) is nn.Linear and type(layer.fc2) is nn.Linear for layer in layers(unloaded).values())
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(unloaded(**inputs).logits, base(**inputs).logits)


def test_training_one_language_leaves_base_and_other_language_untouched(tiny_whisper):
    model = randomize(clsr(tiny_whisper(), "ca"), "ca")
    model.add_adapter("uk", CLSRConfig.paper(**QUIET, gate_dim=8))
    inputs = make_inputs(model)
    model.eval()
    with torch.no_grad():
        catalan = model(**inputs).logits
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    model.set_adapter("uk")
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # The gate's second projection starts at 0, and expert and shared FFN alike: three steps until W1 moves.
    for _ in range(4):
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    for name, parameter in model.named_parameters():
        is_ukrainian = "clsr_" in name and ".uk." in name
        assert parameter.requires_grad == is_ukrainian, name
        assert torch.equal(parameter, before[name]) != is_ukrainian, name
    model.set_adapter("ca")
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, catalan)


def test_only_gates_and_experts_are_trainable(tiny_whisper):
    model = clsr(tiny_whisper())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "clsr_" in name}
    # A layer: gate W1, b1, w2 and the expert's two weights and biases.
    assert len(trainable) == len(layers(model)) * 7


def test_gate_starts_undecided_and_takes_the_expert_in_evaluation(tiny_whisper):
    model = clsr(tiny_whisper(), gate_dim=64)
    for layer in layers(model).values():
        gate_in, gate_out = layer.fc1.clsr_gate_in["default"], layer.fc1.clsr_gate_out["default"]
        assert gate_out.bias is None
        assert gate_out.weight.eq(0).all() and gate_in.bias.eq(0).all()
        # N(0, 0.01): 0.01 is the standard deviation, as in the reference (0.1 were it the variance).
        assert 0.008 < gate_in.weight.std().item() < 0.012
    inputs = make_inputs(model)
    for training, value in ((True, 0.5), (False, 1.0)):
        model.train(training)
        with torch.no_grad(), model.base_model.record_gates() as gates:
            model(**inputs)
        assert all(gate.eq(value).all() for gate in gates.values())


# ---------------------------------------------------------------- soft and hard against the slow implementation


@pytest.mark.parametrize("pattern", ["mixed", "zeros", "ones"])
@pytest.mark.parametrize("hard", [False, True])
def test_whole_model_equals_slow_implementation(tiny_whisper, hard, pattern):
    model = randomize(clsr(tiny_whisper()))
    apply_pattern(model, pattern)
    model.train(not hard)
    slow = slow_copy(model, tiny_whisper(), hard).train(not hard)
    inputs = make_inputs(model)
    with torch.no_grad(), model.base_model.record_gates() as gates:
        actual = model(**inputs).logits
    expected = slow(**inputs).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    assert set(gates) == {f"{name}.fc1" for name in layers(model)}
    values = torch.cat([gate.flatten() for gate in gates.values()]).float()
    if pattern == "mixed":
        assert values.min() < 0.4 and values.max() > 0.6
    else:
        assert values.eq(float(pattern == "ones")).all()
    for name, gate in gates.items():
        assert gate.shape == ((3, 7) if "decoder" in name else (3, FEATURE_FRAMES // 2))


# bfloat16 keeps 8 bits: one rounding is 0.4 % of the value, and an FFN rounds input, hidden state and output.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("adapter_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["mixed", "zeros", "ones"])
@pytest.mark.parametrize("hard", [False, True])
def test_each_ffn_equals_slow_implementation(tiny_whisper, hard, pattern, adapter_dtype, dtype, tolerance):
    if adapter_dtype is not None and dtype != adapter_dtype:
        pytest.skip("a float32 base with half-precision adapters does not occur")
    model = randomize(clsr(tiny_whisper().to(dtype)))
    apply_pattern(model, pattern)
    if adapter_dtype is not None:
        model.to(adapter_dtype)
    model.train(not hard)

    seen, handles = {name: {} for name in layers(model)}, []
    for name, layer in layers(model).items():
        keep = seen[name]
        handles.append(layer.fc1.register_forward_pre_hook(lambda _, args, k=keep: k.update(x=args[0].detach())))
        handles.append(layer.fc2.register_forward_hook(lambda _, args, out, k=keep: k.update(y=out.detach())))
    with torch.no_grad(), model.base_model.record_gates() as gates:
        logits = model(**make_inputs(model, dtype=dtype)).logits
    assert logits.dtype == dtype and logits.isfinite().all()

    for name, layer in layers(model).items():
        x, y = seen[name]["x"], seen[name]["y"]
        assert y.dtype == dtype and y.shape == x.shape
        slow = SlowFFN(layer.fc1, layer.fc2, layer.activation_fn, hard=hard)
        with torch.no_grad():
            expected, expected_gates = slow(x.float()), slow.gate_values(x.float())
        assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max(), name
        # The gate is computed in float32 whatever the model's precision; bfloat16 would err by 1e-3.
        assert (gates[f"{name}.fc1"].float() - expected_gates).abs().max() < 1e-5, name


@pytest.mark.parametrize("pattern", ["mixed", "ones", "zeros"])
@pytest.mark.parametrize("hard", [False, True])
def test_gradients_equal_autograd_of_slow_implementation(tiny_whisper, hard, pattern):
    """In evaluation too: hard routing is differentiable in the expert, not in the gate."""
    model = randomize(clsr(tiny_whisper(), budget_weight=0.0))
    apply_pattern(model, pattern)
    model.train(not hard)
    slow = slow_copy(model, tiny_whisper(), hard).train(not hard)
    inputs = make_inputs(model)
    loss, slow_loss = model(**inputs).loss, slow(**inputs).loss
    assert loss.item() == pytest.approx(slow_loss.item(), abs=1e-5)
    if hard and pattern == "zeros":
        assert not loss.requires_grad  # no token takes anything trainable
        return
    loss.backward()
    slow_loss.backward()
    if pattern == "mixed":
        for layer in layers(slow).values():
            assert layer.fc2.ew1.grad.abs().max() > 0
            assert hard or layer.fc2.gate_w2.grad.abs().max() > 0
    assert_gradients_match(model, slow, atol=1e-6)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "clsr_" not in name)


@pytest.mark.parametrize("rank", [None, 4])
def test_straight_through_gates_are_those_of_evaluation(tiny_whisper, rank):
    model = randomize(clsr(tiny_whisper(), straight_through=True, expert_rank=rank))
    inputs = make_inputs(model)
    outputs, gates = {}, {}
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad(), model.base_model.record_gates() as recorded:
            outputs[mode] = model(**inputs).logits
        gates[mode] = torch.cat([gate.flatten() for gate in recorded.values()]).float()
    assert 0.2 < gates[False].mean() < 0.8
    torch.testing.assert_close(gates[True], gates[False], atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs[True], outputs[False], atol=1e-5, rtol=1e-5)


def test_straight_through_gates_have_the_gradient_of_their_sigmoid():
    model = randomize(clsr_mlp(straight_through=True)).train()
    lin0, lin1 = model.base_model.model.lin0, model.base_model.model.lin1
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    model(x).sum().backward()
    slow = SlowFFN(lin0, lin1, F.relu)
    logits = slow.gate_logits(x)
    hidden = [F.relu(F.linear(x, *first)) for first in ((slow.w1, slow.b1), (slow.ew1, slow.eb1))]
    shared, expert = (
        F.linear(h, *second) for h, second in zip(hidden, ((slow.w2, slow.b2), (slow.ew2, slow.eb2)), strict=True)
    )
    # d out/dg is the difference of the paths, wherever the rounded gate stands.
    logits.backward(((expert - shared).sum(dim=-1) * logits.sigmoid() * (1 - logits.sigmoid())).detach())
    assert slow.gate_w2.grad.abs().max() > 1e-3
    torch.testing.assert_close(lin0.clsr_gate_out["default"].weight.grad, slow.gate_w2.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(lin0.clsr_gate_in["default"].weight.grad, slow.gate_w1.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [(1,), (2,), (15,), (16,), (17,), (64,), (300,), (1, 1), (3, 5), (4, 50), (2, 3, 9)])
@pytest.mark.parametrize("pattern", ["mixed", "zeros", "ones"])
def test_hard_routing_gives_each_row_its_own_path(rows, pattern):
    """Few tokens compute both paths and select, many are sorted: the result is one, each row at its place."""
    torch.manual_seed(0)
    model = randomize(clsr_mlp()).eval()
    mlp = model.base_model.model
    if pattern != "mixed":
        force_gate(mlp.lin0, 1000.0 if pattern == "ones" else -1000.0)
    slow = SlowFFN(mlp.lin0, mlp.lin1, F.relu, hard=True)
    x = torch.randn(*rows, 12)
    with torch.no_grad():
        actual = model(x)
    expected = slow(x)
    if pattern == "mixed" and math.prod(rows) > 14:
        assert 0 < slow.gate_values(x).mean() < 1
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)

    gradients = []
    for function in (model, slow):
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@pytest.mark.performance
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("gates", ["mixed", "shared", "expert"])
def test_tokens_of_full_experts_are_grouped_and_those_of_low_rank_experts_are_not(rank, gates):
    torch.manual_seed(0)
    mlp = randomize(clsr_mlp(expert_rank=rank)).eval().base_model.model
    x = torch.randn(300, 12)
    to_expert = gate_logits(x, mlp.lin0.clsr_gate_in["default"], mlp.lin0.clsr_gate_out["default"]) >= 0
    if gates != "mixed":
        x = x[to_expert == (gates == "expert")]
    mlp.lin0(x)
    route = mlp.lin0.route.tokens
    if gates != "mixed":
        assert route.groups == [(None if gates == "shared" else "default", None)] and route.choice is None
    elif rank is None:
        assert [path for path, _ in route.groups] == [None, "default"] and route.choice is None
        for (_, tokens), expected in zip(route.groups, (~to_expert, to_expert), strict=True):
            assert torch.equal(tokens, expected.nonzero().squeeze(1))
    else:
        assert not route.groups and torch.equal(route.choice.bool(), to_expert)
    mlp.lin1(torch.randn(len(x), 20))
    assert not route.is_set


@pytest.mark.performance
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_low_rank_expert_in_training_takes_one_product_with_each_shared_weight(dropout):
    torch.manual_seed(0)
    mlp = randomize(clsr_mlp(expert_rank=2, expert_dropout=dropout)).train().base_model.model
    calls = []
    for layer in (mlp.lin0, mlp.lin1):
        layer.base_layer.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    x = torch.randn(7, 12)
    torch.manual_seed(1)
    hidden = F.relu(mlp.lin0(x))
    gate = mlp.lin0.route.tokens.gate.detach()
    torch.manual_seed(2)
    actual = mlp.lin1(hidden)
    assert calls == [(7, 12), (7, 20)]

    shared, expert = hidden.chunk(2, dim=-1)
    if dropout:  # of what goes into the expert's projection
        torch.manual_seed(2)
        expert = F.dropout(expert, dropout)
    low_rank = expert @ mlp.lin1.clsr_expert_A["default"].weight.T @ mlp.lin1.clsr_expert_B["default"].weight.T
    weighted = (1 - gate) * mlp.lin1.base_layer(shared) + gate * (mlp.lin1.base_layer(expert) + low_rank)
    torch.testing.assert_close(actual, weighted, atol=1e-5, rtol=1e-5)


def test_what_a_low_rank_expert_makes_of_others_tokens_does_not_matter():
    """In half precision its product of a token that is not its own may overflow."""
    mlp = clsr_mlp(expert_rank=2).eval().base_model.model
    expected = mlp.lin0.base_layer(x := torch.ones(2, 12))
    with torch.no_grad():
        mlp.lin0.clsr_expert_A["default"].weight.fill_(math.inf)
        mlp.lin0.clsr_gate_in["default"].weight.fill_(1)
        mlp.lin0.clsr_gate_out["default"].weight.fill_(-1)  # to the shared path, where the gate's input is positive
        x[1] = 0  # a logit of 0: to the expert
        assert torch.equal(mlp.lin0(x)[0], expected[0])
    assert mlp.lin0.route.tokens.choice.tolist() == [False, True]


def test_random_initial_weights_change_the_output():
    model, x = clsr_mlp(init_weights=False).eval(), torch.randn(30, 12)
    assert not torch.allclose(model(x), MLP()(x), atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_model_equals_eager(tiny_whisper, training):
    model = randomize(clsr(tiny_whisper())).train(training)
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("hard", [False, True])
def test_autocast_keeps_the_gate_in_float32(tiny_whisper, hard):
    model = randomize(clsr(tiny_whisper())).train(not hard)
    layer = model.base_model.model.model.encoder.layers[0]
    seen = {}
    layer.fc1.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    layer.fc2.register_forward_hook(lambda module, args, output: seen.update(y=output.detach()))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), model.base_model.record_gates() as gates:
        model(**make_inputs(model))
    slow = SlowFFN(layer.fc1, layer.fc2, layer.activation_fn, hard=hard)
    with torch.no_grad():
        values, expected = slow.gate_values(seen["x"].float()), slow(seen["x"].float())
    assert (gates["model.encoder.layers.0.fc1"] - values).abs().max() < 1e-5  # bfloat16 would err by 1e-3
    assert seen["y"].dtype == torch.bfloat16
    assert (seen["y"].float() - expected).abs().max() <= 3e-2 * expected.abs().max()


def test_hard_routing_treats_a_row_alike_in_every_batch():
    torch.manual_seed(0)
    model = randomize(clsr_mlp()).eval()
    x = torch.randn(40, 12)
    order = torch.randperm(40)
    with torch.no_grad():
        whole = model(x)
        torch.testing.assert_close(model(x[order]), whole[order], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), whole, atol=1e-6, rtol=1e-5)


def test_a_gate_logit_of_exactly_zero_takes_the_expert():
    model = randomize(clsr_mlp()).eval()
    mlp = model.base_model.model
    force_gate(mlp.lin0, 0.0)
    x = torch.randn(30, 12)
    expert = mlp.lin1.clsr_expert["default"](F.relu(mlp.lin0.clsr_expert["default"](x)))
    torch.testing.assert_close(model(x), expert, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_an_empty_batch_passes(training):
    model = randomize(clsr_mlp()).train(training)
    assert model(torch.zeros(0, 12)).shape == (0, 12)


@pytest.mark.parametrize("hard", [False, True])
def test_low_rank_expert_equals_the_full_expert_it_stands_for(hard):
    torch.manual_seed(0)
    model = randomize(clsr_mlp(expert_rank=3)).train(not hard)
    full = clsr_mlp().train(not hard)
    mlp, full_mlp = model.base_model.model, full.base_model.model
    assert not any(".clsr_expert." in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name in ("lin0", "lin1"):
            source, target = getattr(mlp, name), getattr(full_mlp, name).clsr_expert["default"]
            a, b = source.clsr_expert_A["default"], source.clsr_expert_B["default"]
            assert a.weight.shape == (3, source.base_layer.in_features)
            assert b.weight.shape == (source.base_layer.out_features, 3)
            target.weight.copy_(source.base_layer.weight + b.weight @ a.weight)
            target.bias.copy_(source.base_layer.bias + (0 if b.bias is None else b.bias))
        for gate in ("clsr_gate_in", "clsr_gate_out"):
            getattr(full_mlp.lin0, gate).load_state_dict(getattr(mlp.lin0, gate).state_dict())
    for rows in (5, 80):
        x = torch.randn(rows, 12)
        torch.testing.assert_close(model(x), full(x), atol=1e-5, rtol=1e-5)
    model(torch.randn(80, 12)).sum().backward()
    for name, parameter in model.named_parameters():
        if "clsr_expert" in name:
            assert parameter.grad.abs().sum() > 0, name


# ---------------------------------------------------------------- budget


def test_budget_loss_by_hand_on_a_known_gate_pattern_with_padding(tiny_whisper):
    model = clsr(tiny_whisper(), gate_budget=0.3, budget_weight=2.0)
    for (name, layer), logit in zip(layers(model).items(), (1000.0, -1000.0, 1000.0, 0.0), strict=True):
        assert "encoder" in name or logit >= 0
        force_gate(layer.fc1, logit)
    inputs = make_inputs(model, batch=2, label_tokens=6, padding=True)
    # Tokens left: encoder 50 + 31, decoder 6 + 4. Gates: encoder 1 and 0, decoder 1 and 0.5.
    mean = (81 * 1 + 81 * 0 + 10 * 1 + 10 * 0.5) / (2 * 81 + 2 * 10)

    model.train()
    outputs = model(**inputs)
    budget = model.base_model.budget_loss()
    assert budget.shape == ()
    assert budget.item() == pytest.approx(abs(mean - 0.3), abs=1e-6)
    cross_entropy = F.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten())
    assert outputs.loss.item() == pytest.approx(cross_entropy.item() + 2.0 * abs(mean - 0.3), abs=1e-5)

    model.eval()  # G = 0 takes the expert
    outputs = model(**inputs)
    mean = (81 * 1 + 81 * 0 + 10 * 1 + 10 * 1) / (2 * 81 + 2 * 10)
    assert model.base_model.budget_loss().item() == pytest.approx(abs(mean - 0.3), abs=1e-6)
    cross_entropy = F.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten())
    assert outputs.loss.item() == pytest.approx(cross_entropy.item(), abs=1e-5)


def test_a_mask_given_by_position_counts_as_one_given_by_name(tiny_whisper):
    model = randomize(clsr(tiny_whisper())).train()
    inputs = make_inputs(model, padding=True)
    model(**inputs)
    expected = model.base_model.gate_mean()
    features, mask = inputs.pop("input_features"), inputs.pop("attention_mask")
    model(features, mask, **inputs)
    assert torch.equal(model.base_model.gate_mean(), expected)
    model(input_features=features, **inputs)
    assert not torch.equal(model.base_model.gate_mean(), expected)


@pytest.mark.parametrize("padding", [False, True])
def test_budget_loss_is_the_masked_mean_of_the_recorded_gates(tiny_whisper, padding):
    model = randomize(clsr(tiny_whisper(), gate_budget=0.9)).train()
    inputs = make_inputs(model, padding=padding)
    with model.base_model.record_gates() as gates:
        model(**inputs)
    lengths = [50, 31, 50] if padding else [50, 50, 50]
    kept = []
    for name, gate in gates.items():
        for row, values in enumerate(gate):
            keep = values[: lengths[row]] if "encoder" in name else values[inputs["labels"][row] != -100]
            kept.append(keep.detach().float())
    expected = abs(torch.cat(kept).mean().item() - 0.9)
    assert model.base_model.budget_loss().item() == pytest.approx(expected, abs=1e-6)


def test_budget_loss_moves_the_gates_towards_the_budget(tiny_whisper):
    model = randomize(clsr(tiny_whisper(), gate_budget=1.0)).train()
    inputs = make_inputs(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        model(**inputs)
        loss = model.base_model.budget_loss()
        loss.backward()
        assert all(
            p.grad is None or p.grad.abs().max() == 0
            for name, p in model.named_parameters()
            if "decoder.layers.1" in name and "clsr_expert" in name
        )
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_without_labels_there_is_no_loss(tiny_whisper):
    model = clsr(tiny_whisper()).train()
    inputs = make_inputs(model)
    inputs["decoder_input_ids"] = inputs.pop("labels")
    outputs = model(**inputs)
    assert outputs.loss is None
    assert model.base_model.budget_loss().item() == pytest.approx(0.0, abs=1e-6)


def test_return_dict_false_returns_the_tuple_with_the_same_loss(tiny_whisper):
    model = randomize(clsr(tiny_whisper())).train()
    inputs = make_inputs(model)
    outputs = model(**inputs, return_dict=False)
    assert isinstance(outputs, tuple)
    assert outputs[0].item() == pytest.approx(model(**inputs).loss.item(), abs=1e-6)


# ---------------------------------------------------------------- randomness of training


@pytest.mark.parametrize(("progress", "alpha"), [(0.0, 0.0), (0.5, 2.5), (1.0, 5.0)])
def test_noise_on_the_gate_logit_grows_with_progress(progress, alpha):
    torch.manual_seed(0)
    model = clsr_mlp(gate_noise=5.0).train()
    model.base_model.set_gate_progress(progress)
    with torch.no_grad(), model.base_model.record_gates() as gates:
        model(torch.randn(4, 5000, 12))
    (gate_values,) = gates.values()
    assert gate_values.shape == (4, 5000)
    logits = gate_values.double().flatten().logit()
    # Quantiles one standard deviation from the middle, since large logits saturate in float32.
    low, middle, high = logits.quantile(torch.tensor([0.158655, 0.5, 0.841345], dtype=torch.float64)).tolist()
    assert (high - low) / 2 == pytest.approx(alpha, rel=0.05, abs=1e-6)
    assert middle == pytest.approx(0.0, abs=0.05 * alpha + 1e-6)


@pytest.mark.parametrize(
    ("progress", "alpha"), [(None, 0.0), (0.0, 5.0), (0.25, 2.5), (0.45, 0.5), (0.5, 0.0), (0.8, 0.0), (1.0, 0.0)]
)
def test_noise_of_straight_through_gates_falls_in_the_first_half(progress, alpha):
    torch.manual_seed(0)
    model = clsr_mlp(gate_noise=5.0, straight_through=True).train()
    force_gate(model.base_model.model.lin0, -2.5)
    if progress is not None:
        model.base_model.set_gate_progress(progress)
    with torch.no_grad(), model.base_model.record_gates() as gates:
        model(torch.randn(4, 5000, 12))
    (gate_values,) = gates.values()
    share = torch.distributions.Normal(0, 1).cdf(torch.tensor(-2.5 / alpha)).item() if alpha else 0.0
    assert set(gate_values.unique().tolist()) <= {0.0, 1.0}
    assert gate_values.mean().item() == pytest.approx(share, abs=0.01)


def test_without_a_schedule_there_is_no_noise(tiny_whisper):
    for config in ({}, {"straight_through": True}):
        model = randomize(clsr(tiny_whisper(), gate_noise=5.0, **config)).train()
        inputs = make_inputs(model)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_noise_is_drawn_per_token_and_only_in_training():
    torch.manual_seed(0)
    model = randomize(clsr_mlp(gate_noise=5.0))
    model.base_model.set_gate_progress(1.0)
    x = torch.randn(1, 12).expand(200, 12)
    model.train()
    with torch.no_grad(), model.base_model.record_gates() as gates:
        model(x)
    (noisy,) = (values.clone() for values in gates.values())
    assert len(noisy.unique()) > 100
    model.eval()
    with torch.no_grad(), model.base_model.record_gates() as gates:
        model(x)
    (values,) = gates.values()
    assert len(values.unique()) == 1


def test_skip_gate_takes_the_shared_ffn_at_its_rate():
    torch.manual_seed(0)
    model = randomize(clsr_mlp(skip_gate_prob=0.3)).train()
    x = torch.randn(20, 12)
    shared = MLP()(x)
    skipped = 0
    forwards = 1000
    with torch.no_grad():
        full = SlowFFN(model.base_model.model.lin0, model.base_model.model.lin1, F.relu)(x)
        for _ in range(forwards):
            y = model(x)
            is_skipped = torch.allclose(y, shared, atol=1e-6, rtol=1e-6)
            skipped += is_skipped
            if not is_skipped:
                torch.testing.assert_close(y, full, atol=1e-5, rtol=1e-5)
        assert abs(skipped / forwards - 0.3) < 0.05  # 3.4 standard deviations
        model.eval()
        evaluated = model(x)
        assert all(torch.equal(model(x), evaluated) for _ in range(20))


def skip_pattern(model, inputs):
    """The outputs of a training forward, and for each routed layer, in their order, True if it was skipped."""
    computed = set()
    hooks = [
        layer.fc1.clsr_expert["default"].register_forward_hook(lambda *_, name=name: computed.add(name))
        for name, layer in layers(model).items()
    ]
    outputs = model(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs, [name not in computed for name in layers(model)]


def test_skip_gate_is_drawn_for_each_module(tiny_whisper):
    torch.manual_seed(0)
    model = randomize(clsr(tiny_whisper(), skip_gate_prob=0.5)).train()
    inputs = make_inputs(model, batch=1)
    with torch.no_grad():
        patterns = {tuple(skip_pattern(model, inputs)[1]) for _ in range(60)}
    assert len(patterns) > 8  # of 16 that four independent draws can give


@pytest.mark.parametrize("straight_through", [False, True])
def test_a_skipped_module_keeps_its_gate_in_the_budget_with_its_gradient(tiny_whisper, straight_through):
    """As in the reference implementation: its output is the shared FFN's, its gate value is part of the mean."""
    torch.manual_seed(0)
    model = randomize(clsr(tiny_whisper(), skip_gate_prob=0.5, gate_budget=0.9, straight_through=straight_through))
    inputs = make_inputs(model.train(), padding=True)
    for seed in range(8):
        torch.manual_seed(seed)
        model.zero_grad()
        outputs, is_skipped = skip_pattern(model, inputs)
        outputs.loss.backward()
        slow = slow_copy(model, tiny_whisper(), hard=False).train()
        ffns = [layer.fc2 for layer in layers(slow).values()]
        for ffn, skipped in zip(ffns, is_skipped, strict=True):
            ffn.is_skipped, ffn.straight_through = skipped, straight_through
        expected = slow(**inputs)
        masks = [inputs["attention_mask"][:, ::2]] * 2 + [inputs["labels"] != -100] * 2
        total = sum((ffn.gates * mask).sum() for ffn, mask in zip(ffns, masks, strict=True))
        budget_loss = (total / sum(mask.sum() for mask in masks) - 0.9).abs()
        (expected.loss + budget_loss).backward()
        torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert model.base_model.budget_loss().item() == pytest.approx(budget_loss.item(), abs=1e-6)
        assert_gradients_match(model, slow, atol=1e-5)
        for ffn, skipped in zip(ffns, is_skipped, strict=True):
            assert ffn.gate_w2.grad.abs().max() > 1e-6  # skipped or not
            assert (ffn.ew2.grad.abs().max() == 0) == skipped


def test_a_skipped_module_has_zero_gradients_not_none(tiny_whisper):
    """Under DDP a parameter without gradient needs find_unused_parameters."""
    torch.manual_seed(0)
    model = randomize(clsr(tiny_whisper(), skip_gate_prob=0.999999, budget_weight=0.0)).train()
    model(**make_inputs(model)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.eq(0).all(), name


@pytest.mark.performance
def test_a_skipped_module_computes_its_gate_but_no_expert(tiny_whisper):
    model = get_peft_model(
        tiny_whisper(), CLSRConfig.paper(gate_dim=8, skip_gate_prob=1 - 1e-9), adapter_name="ca"
    ).train()
    called = []
    for name, module in model.named_modules():
        if ".clsr_" in name and name.endswith(".ca"):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    inputs = {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": torch.tensor([[1, 5]])}
    model(**inputs)
    assert len(called) == 4 * 2 and all("gate" in name for name in called)
    called.clear()
    model.eval()(**inputs)
    assert len(called) == 4 * (2 + 1 + 1)


def test_expert_dropout_drops_the_experts_output_in_training_only():
    torch.manual_seed(0)
    model = randomize(clsr_mlp(expert_dropout=0.4))
    mlp = model.base_model.model
    force_gate(mlp.lin0, 1000.0)
    x = torch.randn(2000, 12)
    with torch.no_grad():
        expert = mlp.lin1.clsr_expert["default"](F.relu(mlp.lin0.clsr_expert["default"](x)))
        y = model.train()(x)
        dropped = y.abs() < 1e-6
        assert dropped.float().mean().item() == pytest.approx(0.4, abs=0.02)
        torch.testing.assert_close(y[~dropped], expert[~dropped] / 0.6, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.eval()(x), expert, atol=1e-5, rtol=1e-5)
        force_gate(mlp.lin0, -1000.0)  # the shared half is not dropped
        torch.testing.assert_close(model.train()(x), MLP()(x), atol=1e-6, rtol=1e-5)


def test_gate_dropout_changes_the_gate_in_training_only():
    torch.manual_seed(0)
    model = randomize(clsr_mlp(gate_dropout=0.5))
    x = torch.randn(50, 12)

    def gates_of(training):
        model.train(training)
        with torch.no_grad(), model.base_model.record_gates() as gates:
            model(x)
        (values,) = gates.values()
        return values.clone()

    assert not torch.equal(gates_of(True), gates_of(True))
    assert torch.equal(gates_of(False), gates_of(False))


# ---------------------------------------------------------------- files and copies


@pytest.mark.parametrize("rank", [None, 2])
def test_round_trip_through_a_folder_gives_the_same_logits(tiny_whisper, tmp_path, rank):
    model = randomize(clsr(tiny_whisper(), "ca", language="ca", expert_rank=rank), "ca").eval()
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    folder = tmp_path / "ca"
    assert sorted(path.name for path in folder.glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved and all("clsr_" in name and "base_layer" not in name for name in saved)
    assert len(saved) == sum("clsr_" in name for name, _ in model.named_parameters())

    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            tiny_whisper(),
            str(tmp_path),
            subfolder="ca",
            adapter_name="ca",
            low_cpu_mem_usage=low_cpu_mem_usage,
        ).eval()
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, expected)
        assert not any(parameter.is_meta for parameter in loaded.parameters())

    loaded.load_adapter(str(folder), "other")
    loaded.set_adapter("other")
    loaded.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    loaded.delete_adapter("ca")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, expected)
    assert not any(".ca." in f"{name}." for name in loaded.state_dict())


def test_state_dict_holds_nothing_of_the_route(tiny_whisper):
    model = randomize(clsr(tiny_whisper()))
    keys = set(model.state_dict())
    model.train()
    model(**make_inputs(model)).loss.backward()
    model.eval()
    model(**make_inputs(model))
    assert (
        set(model.state_dict())
        == keys
        == {name for name, _ in model.named_parameters()}
        | {name for name, _ in model.named_buffers()}
        | {key for key in keys if key.endswith("proj_out.weight")}
    )
    assert not any("route" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("training", [False, True])
def test_deepcopy_and_pickle_after_a_forward_give_independent_equal_models(tiny_whisper, training):
    model = randomize(clsr(tiny_whisper())).train(training)
    inputs = make_inputs(model)
    model(**inputs)  # leaves a graph behind in training
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in copies:
            assert torch.equal(other(**inputs).logits, expected)
            randomize(other, seed=11)
            assert not torch.equal(other(**inputs).logits, expected)
            assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("dataset_like", ["quiet", "random"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_whisper, dataset_like):
    """Recomputation draws the same noise and skips, and counts no gate twice."""
    config = {} if dataset_like == "quiet" else {"gate_dropout": 0.1, "skip_gate_prob": 0.3, "gate_noise": 5.0}
    gradients, losses = [], []
    for checkpointing in (False, True):
        model = randomize(clsr(tiny_whisper(), **config)).train()
        model.base_model.set_gate_progress(0.7)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for _ in range(2):
            torch.manual_seed(1)
            model.zero_grad()
            outputs = model(**make_inputs(model, padding=True))
            outputs.loss.backward()
            losses.append((outputs.loss.item(), model.base_model.budget_loss().item()))
        gradients.append(trainable_gradients(model))
    assert all(loss == pytest.approx(losses[0], abs=1e-6) for loss in losses)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_reentrant_gradient_checkpointing_is_refused_with_the_reason(tiny_whisper):
    model = clsr(tiny_whisper()).train()
    with pytest.raises((RuntimeError, ValueError), match="use_reentrant"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
        model(**make_inputs(model)).loss.backward()


def test_reentrant_checkpointing_of_one_layer_is_refused_too(tiny_whisper):
    model = randomize(clsr(tiny_whisper())).train()
    layer = layers(model)["model.encoder.layers.1"]
    forward = layer.forward
    layer.forward = lambda hidden_states, mask=None, **kwargs: checkpoint(
        lambda x: forward(x, mask, **kwargs), hidden_states, use_reentrant=True
    )
    with pytest.raises(RuntimeError, match="use_reentrant"):
        model(**make_inputs(model))


def test_generation_with_cache_equals_step_by_step_argmax_of_the_slow_implementation(tiny_whisper):
    model = randomize(clsr(tiny_whisper())).eval()
    slow = slow_copy(model, tiny_whisper(), hard=True).eval()
    features = make_inputs(model)["input_features"]
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        generated = model.generate(input_features=features, decoder_input_ids=start, max_new_tokens=6, do_sample=False)
        again = slow.generate(input_features=features, decoder_input_ids=start, max_new_tokens=6, do_sample=False)
    assert generated.shape[1] > 1
    assert torch.equal(generated, again)


# ---------------------------------------------------------------- where the modules go


def test_layers_to_transform_limits_the_layers(tiny_whisper):
    model = clsr(tiny_whisper(), layers_to_transform=[1], layers_pattern="layers")
    for name, layer in layers(model).items():
        assert hasattr(layer.fc1, "base_layer") == hasattr(layer.fc2, "base_layer") == name.endswith("1")
    randomize(model)
    inputs = make_inputs(model)
    model.train()
    with model.base_model.record_gates() as gates:
        model(**inputs).loss.backward()
    assert set(gates) == {"model.encoder.layers.1.fc1", "model.decoder.layers.1.fc1"}


def test_exclude_modules_leaves_a_side_out(tiny_whisper):
    model = clsr(tiny_whisper(), exclude_modules=r".*decoder.*")
    for name, layer in layers(model).items():
        assert hasattr(layer.fc1, "base_layer") == hasattr(layer.fc2, "base_layer") == ("encoder" in name)


def test_any_network_of_two_linear_layers_can_be_named():
    torch.manual_seed(0)
    model = randomize(clsr_mlp()).train()
    mlp = model.base_model.model
    slow = SlowFFN(mlp.lin0, mlp.lin1, F.relu)
    x = torch.randn(30, 12)
    with model.base_model.record_gates() as gates:
        y = model(x)
    assert list(gates) == ["lin0"]
    torch.testing.assert_close(y, slow(x), atol=1e-5, rtol=1e-5)
    model.base_model.budget_loss().backward()
    assert mlp.lin0.clsr_gate_out["default"].weight.grad.abs().sum() > 0


def test_record_gates_stops_at_the_end_of_its_block(tiny_whisper):
    model = clsr(tiny_whisper()).eval()
    inputs = make_inputs(model)
    with torch.no_grad():
        with model.base_model.record_gates() as gates:
            model(**inputs)
        before = {name: values.clone() for name, values in gates.items()}
        for layer in layers(model).values():
            force_gate(layer.fc1, -1000.0)
        model(**inputs)
    assert gates.keys() == before.keys()
    assert all(torch.equal(values, before[name]) for name, values in gates.items())


def test_importing_again_is_harmless(tiny_whisper):
    member = PeftType.CLSR
    importlib.reload(peft_clsr)
    assert PeftType.CLSR is member and PeftType("CLSR") is member
    assert list(PeftType).count(member) == 1
    clsr(tiny_whisper())


def test_import_needs_no_extra_and_no_order():
    program = (
        "import sys\n"
        "for name in ('datasets', 'jiwer', 'matplotlib', 'soundfile'): sys.modules[name] = None\n"
        "import peft_clsr, peft\n"
        "assert peft.PeftType.CLSR == 'CLSR'\n"
        "assert peft.get_peft_config({'peft_type': 'CLSR'}).gate_dim == 64\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_a_clsr_of_pefts_own_is_refused():
    program = (
        "import peft, peft_clsr, sys\n"
        "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as mapping\n"
        "mapping[peft.PeftType.CLSR] = peft.LoraConfig\n"
        "for name in [name for name in sys.modules if name.startswith('peft_clsr')]: del sys.modules[name]\n"
        "try: import peft_clsr\n"
        "except ImportError as error: assert 'LoraConfig' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
