"""`translate_with_shared_decoder`: when a Whisper translates, its encoder is routed and its decoder is the base's."""

import pytest
import torch
from helpers import clsr, random_clsr, randomize
from training import collate, distiller

from peft_clsr import CLSRConfig

OPTION = {"translate_with_shared_decoder": True}


@pytest.fixture
def token(tiny_processor):
    return lambda name: tiny_processor.tokenizer.convert_tokens_to_ids(f"<|{name}|>")


@pytest.fixture
def model(tiny_whisper):
    """Two languages, one of them with the option."""
    model = clsr(tiny_whisper(init_std=0.2), ("ca",), language="ca", **OPTION)
    model.add_adapter("ro", CLSRConfig(language="ro", gate_dim=8, expert_rank=2))
    return randomize(model, scale=0.3, gate_scale=0.5).eval()


FEATURES = torch.randn(3, 80, 100, generator=torch.Generator().manual_seed(0))


def generate(model, rows=slice(None), **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return model.generate(input_features=FEATURES[rows], **options)


def by_reference(model, base, rows=slice(None), language="ca", **options):
    """As the reference implementation: the encoder's states by the expert, decoded by the base."""
    model.set_adapter(language)
    with torch.no_grad():
        states = model.base_model.model.get_encoder()(FEATURES[rows])
    return generate(base, rows, encoder_outputs=states, language=language, task="translate", **options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_translation_is_that_of_the_base_decoder_on_the_experts_encoder(model, tiny_whisper, options):
    base = tiny_whisper(init_std=0.2)
    expected = by_reference(model, base, **options)
    assert torch.equal(generate(model, language="ca", task="translate", **options), expected)
    assert not torch.equal(generate(base, language="ca", task="translate", **options), expected)
    config = model.peft_config["ca"]
    config.translate_with_shared_decoder = False
    assert not torch.equal(generate(model, language="ca", task="translate", **options), expected)
    before = generate(model, language="ca", task="transcribe", **options)
    config.translate_with_shared_decoder = True
    assert torch.equal(generate(model, language="ca", task="transcribe", **options), before)  # of both halves


def test_the_active_adapter_and_named_ones_translate_so_too(model, tiny_whisper):
    expected = by_reference(model, tiny_whisper(init_std=0.2))
    named = generate(model, language="ca", task="translate", adapter_names=["ca"] * 3)
    model.base_model.route_by_language = False
    assert torch.equal(generate(model, language="ca", task="translate"), expected)
    assert torch.equal(named, expected)


def test_an_adapter_without_the_option_translates_with_its_experts(model, tiny_whisper):
    base = tiny_whisper(init_std=0.2)
    mixed = generate(model, language=["ca", "ro", "ca"], task="translate")
    assert torch.equal(mixed[[0, 2]], by_reference(model, base)[[0, 2]])
    assert torch.equal(mixed[1:2], generate(model, slice(1, 2), language="ro", task="translate"))
    assert not torch.equal(mixed[1:2], by_reference(model, base, slice(1, 2), "ro"))


def test_one_sample_translates_and_another_transcribes(model, tiny_whisper, token):
    """In a batch of one forward, by the prompts of its samples."""
    tasks = ("translate", "transcribe", "translate")
    prompts = [[token("startoftranscript"), token("ca"), token(task), token("notimestamps")] for task in tasks]
    mixed = generate(model, decoder_input_ids=torch.tensor(prompts))
    for row, task in enumerate(tasks):
        alone = generate(model, slice(row, row + 1), decoder_input_ids=torch.tensor(prompts[row : row + 1]))
        assert torch.equal(mixed[row : row + 1], alone), task
    translated = by_reference(model, tiny_whisper(init_std=0.2))
    size = translated.shape[1]
    assert torch.equal(mixed[[0, 2], -size:], translated[[0, 2]])
    assert not torch.equal(mixed[1, -size:], translated[1])


def labels_of(token, *tasks):
    rows = [[token("ca"), token(task), token("notimestamps"), 5 + row, 6, 7] for row, task in enumerate(tasks)]
    return torch.tensor(rows)


def test_training_prompts_decide_for_each_sample(tiny_whisper, token):
    """Logits of a sample are those of its task, and decoder tokens of translations have no part in the budget."""
    model = randomize(clsr(tiny_whisper(init_std=0.2), language="ca", **OPTION), scale=0.3, gate_scale=0.5).train()
    routed = randomize(clsr(tiny_whisper(init_std=0.2), language="ca"), scale=0.3, gate_scale=0.5).train()
    labels = labels_of(token, "transcribe", "translate")
    inputs = {"input_features": FEATURES[:2], "labels": labels}
    with routed.base_model.record_gates() as gates:
        expected = routed(**inputs).logits
    with model.base_model.route_samples(["ca"] * 2, labels):
        outputs = model(**inputs)
        outputs.loss.backward()
        mean = model.base_model.gate_mean()
    torch.testing.assert_close(outputs.logits[0], expected[0], atol=1e-5, rtol=1e-5)
    assert (outputs.logits[1] - expected[1]).abs().max() > 0.01
    counted = [values if "encoder" in name else values[:1] for name, values in gates.items()]
    # The second sample's decoder states differ, but the first one's do not.
    assert mean.item() == pytest.approx(torch.cat([values.flatten() for values in counted]).mean().item(), abs=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_a_training_step_of_translations_trains_the_encoders_experts_alone(tiny_whisper, token, tmp_path):
    model = randomize(clsr(tiny_whisper(init_std=0.2), language="ca", **OPTION), scale=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [
        {"input_features": features, "labels": labels}
        for features, labels in zip(FEATURES, labels_of(token, *["translate"] * 3), strict=True)
    ]
    options = {"max_steps": 1, "gradient_checkpointing": True}
    options |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    trainer = distiller(model, None, tmp_path, dataset=rows, **options)
    assert trainer.data_collator is collate
    trainer.train()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) == (".decoder." in name), name


def test_the_option_is_saved_with_the_adapter(tiny_whisper, tmp_path):
    random_clsr(tiny_whisper(), "ca", language="ca", **OPTION).save_pretrained(tmp_path)
    assert CLSRConfig.from_pretrained(str(tmp_path / "ca")).translate_with_shared_decoder
