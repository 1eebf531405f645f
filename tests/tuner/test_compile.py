"""`torch.compile`: one graph, and the same numbers."""

import pytest
import torch
from helpers import QUIET, clsr, randomize
from peft import get_peft_model
from training import adapter_weights, distiller
from versions import one_graph_in_training

from peft_clsr import CLSRConfig


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def rank():
    return 2


@pytest.fixture
def model(tiny_whisper, rank):
    """With an expert of a rank, and one of full size."""
    torch.manual_seed(0)
    base = tiny_whisper(init_std=0.2)
    model = get_peft_model(base, CLSRConfig.paper(gate_dim=8, expert_rank=rank, **QUIET), adapter_name="ca")
    model.add_adapter("uk", CLSRConfig.paper(gate_dim=8, **QUIET))
    return randomize(model, scale=0.3).eval()


def make_inputs(model, batch=3, tokens=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(batch, 80, 100, generator=generator),
        "labels": torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator),
    }


def test_evaluation_is_one_graph_and_equals_eager(model):
    inputs = make_inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for adapter in ("ca", "uk"):
            model.set_adapter(adapter)
            expected = model(**inputs)
            actual = compiled(**inputs)
            torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_other_batch_sizes_and_lengths_work_on_the_compiled_model(model):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for batch, tokens in ((3, 6), (1, 1), (4, 9), (2, 30)):
            inputs = make_inputs(model, batch, tokens)
            expected = model(**inputs).logits
            torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@one_graph_in_training
@pytest.mark.parametrize("rank", [None, 2])
def test_training_is_one_graph_with_the_same_gradients(model):
    model.train()
    inputs = make_inputs(model)
    results = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        outputs = function(**inputs)
        outputs.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs.loss.item(), gradients))
    (loss, gradients), (compiled_loss, compiled_gradients) = results
    assert compiled_loss == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == compiled_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, atol=1e-5, rtol=1e-4)


@one_graph_in_training
def test_compiled_skips_keep_their_gates_in_the_budget(tiny_whisper):
    model = randomize(clsr(tiny_whisper(init_std=0.2), skip_gate_prob=1 - 1e-9), scale=0.3).train()
    inputs = make_inputs(model)
    gradients = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        outputs = function(**inputs)
        outputs.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        gradients[-1]["loss"] = outputs.loss.detach()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
        assert "expert" in name or gradient.abs().max() > 0, name


def test_generation_with_a_compiled_forward_gives_the_same_tokens(model):
    features = make_inputs(model)["input_features"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    start = torch.full((3, 1), model.config.decoder_start_token_id)
    expected = model.generate(input_features=features, decoder_input_ids=start, **options)
    whisper = model.get_base_model()
    whisper.forward = torch.compile(whisper.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(input_features=features, decoder_input_ids=start, **options), expected)


@one_graph_in_training
def test_a_compiled_trainer_trains_to_the_same_weights_without_compiling_each_step_anew(tiny_whisper, tmp_path):
    """The output layer, where the losses are made in chunks, stays outside of the graph."""
    results, graphs = [], 0
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trained = randomize(clsr(tiny_whisper(init_std=0.1)))
        distiller(trained, tiny_whisper(seed=1, init_std=0.1), tmp_path, max_steps=6, **options).train()
        results.append(adapter_weights(trained))
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 4  # once more when the schedule leaves 0
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-6, rtol=1e-5)


def test_generation_by_language_with_a_compiled_forward_gives_the_same_tokens(model):
    features = make_inputs(model)["input_features"]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    options |= {"input_features": features, "language": ["ca", "fr", "ro"]}
    model.add_adapter("ro", CLSRConfig.paper(gate_dim=8, **QUIET))
    expected = model.generate(**options)
    whisper = model.get_base_model()
    whisper.forward = torch.compile(whisper.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(model.generate(**options), expected)
    options["language"] = ["ro", "ca", "ca"]
    routed = model.generate(**options)
    del whisper.forward
    assert torch.equal(model.generate(**options), routed)
