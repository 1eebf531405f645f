"""`adapter_names`: several languages in one batch."""

import pytest
import torch
from helpers import randomize
from peft import get_peft_model

from peft_clsr import CLSRConfig

NAMES = ["ca", "__base__", "uk", "ca", "far"]


@pytest.fixture
def model(tiny_whisper):
    """Three adapters, one of them low-rank and one on the decoder only, each unlike the others."""
    torch.manual_seed(0)
    base = tiny_whisper(init_std=0.2)
    model = get_peft_model(base, CLSRConfig.paper(language="ca", gate_dim=8), adapter_name="ca")
    model.add_adapter("uk", CLSRConfig.paper(language="be", gate_dim=4, expert_rank=2))
    model.add_adapter("far", CLSRConfig.paper(gate_dim=8, exclude_modules=r".*encoder.*"))
    return randomize(model, scale=0.3).eval()


def make_inputs(model, batch=5, tokens=6):
    generator = torch.Generator().manual_seed(0)
    return {
        "input_features": torch.randn(batch, 80, 100, generator=generator),
        "decoder_input_ids": torch.randint(0, model.config.vocab_size, (batch, tokens), generator=generator),
    }


def one_by_one(model, call):
    """`call(row)` for each sample alone, with its adapter active."""
    results = []
    for row, name in enumerate(NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(row))
        else:
            model.set_adapter(name)
            results.append(call(row))
    model.set_adapter("ca")
    return torch.cat(results)


def test_a_mixed_batch_gives_each_sample_the_logits_of_its_language(model):
    inputs = make_inputs(model)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=NAMES).logits
        alone = one_by_one(model, lambda row: model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits)
        torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(mixed, model(**inputs).logits, atol=1e-2)  # "ca" alone


def test_one_token_a_sample_is_routed_alike(model):
    inputs = make_inputs(model, tokens=1)
    with torch.no_grad():
        mixed = model(**inputs, adapter_names=NAMES).logits
        alone = one_by_one(model, lambda row: model(**{k: v[row : row + 1] for k, v in inputs.items()}).logits)
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_with_beams_gives_each_sample_the_tokens_of_its_language(model, num_beams):
    features = make_inputs(model)["input_features"]
    options = {"num_beams": num_beams, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}

    def generate(features, **kwargs):
        start = torch.full((len(features), 1), model.config.decoder_start_token_id)
        return model.generate(input_features=features, decoder_input_ids=start, **options, **kwargs)

    mixed = generate(features, adapter_names=NAMES)
    assert torch.equal(mixed, one_by_one(model, lambda row: generate(features[row : row + 1])))
    assert len({tuple(tokens) for tokens in mixed.tolist()}) > 1


def test_recorded_gates_of_the_base_are_zero(model):
    inputs = make_inputs(model)
    with torch.no_grad(), model.base_model.record_gates() as gates:
        model(**inputs, adapter_names=NAMES)
    for name, values in gates.items():
        assert values.shape == (len(NAMES), 6 if "decoder" in name else 50)
        assert values[1].eq(0).all()
        assert "decoder" in name or values[4].eq(0).all()
    assert sum(values[0].sum() for values in gates.values()) > 0


def test_the_active_adapter_is_back_afterwards(model):
    inputs = make_inputs(model)
    with torch.no_grad():
        before = model(**inputs).logits
        model(**inputs, adapter_names=NAMES)
        assert torch.equal(model(**inputs).logits, before)
        with pytest.raises(ValueError, match="nobody"):
            model(**inputs, adapter_names=["nobody"] * len(NAMES))
        with pytest.raises(ValueError, match=r"but got 2 and 5 respectively"):
            model(**inputs, adapter_names=["ca", "uk"])
        assert torch.equal(model(**inputs).logits, before)


def test_a_mixed_batch_in_training_mode_is_pefts_own_error(model):
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model(**make_inputs(model), adapter_names=NAMES)


def test_a_mixed_batch_with_labels_has_no_budget_loss(model):
    inputs = make_inputs(model)
    inputs["labels"] = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        assert model(**inputs, adapter_names=NAMES).loss > 0
    with pytest.raises(RuntimeError, match="gate values"):
        model.base_model.budget_loss()


def test_names_of_another_batch_are_refused(model):
    """Whisper runs what is left of a batch again (audio over its context), and names would fall on other samples."""
    with torch.no_grad(), model.base_model.route_samples(NAMES):
        with pytest.raises(ValueError, match=r"5 adapter_names for a batch of 3: .* Give `language="):
            model(**make_inputs(model, batch=3))
        with pytest.raises(ValueError, match="5 adapter_names for a batch of"):
            features = make_inputs(model)["input_features"].repeat(1, 1, 3)
            mask = torch.ones(5, 300)
            mask[1:3, 100:] = 0  # shorter audio is done earlier
            model.generate(input_features=features, attention_mask=mask, return_timestamps=True, language="ca")
