"""`generate` routes each sample by its language."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from transformers import GenerationConfig

from peft_clsr import CLSRConfig
from peft_clsr.inference import generation

LANGUAGES = ["ca", "bg", "fr", "ca", "en"]  # no adapter for Bulgarian and English
ADAPTERS = {"ca": "ca", "fr": "mine"}


@pytest.fixture
def base(tiny_whisper, tiny_processor):
    """A factory of one Whisper that knows timestamps, from 0 to 1 s."""
    tokenizer = tiny_processor.tokenizer

    def build():
        whisper = tiny_whisper(init_std=0.2, vocab_size=len(tokenizer) + 51)
        whisper.generation_config.prev_sot_token_id = tokenizer.convert_tokens_to_ids("<|startofprev|>")
        return whisper

    return build


@pytest.fixture
def model(base):
    """Adapters for Catalan, French and Romanian, each unlike the others; Romanian is active."""
    torch.manual_seed(0)
    model = get_peft_model(base(), CLSRConfig.paper(language="ro", gate_dim=8), adapter_name="ro")
    model.add_adapter("ca", CLSRConfig.paper(gate_dim=8))  # its name says its language
    model.add_adapter("mine", CLSRConfig.paper(language="fr", gate_dim=4, expert_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def make_features(batch=5, seconds=1):
    return torch.randn(batch, 80, 100 * seconds, generator=torch.Generator().manual_seed(0))


def by_hand(model, language, call):
    """`call()` with the adapter of a language active, or none, and nothing routed by language."""
    model.base_model.route_by_language = False
    active = model.active_adapter
    try:
        if language not in ADAPTERS:
            with model.disable_adapter():
                return call()
        model.set_adapter(ADAPTERS[language])
        return call()
    finally:
        model.set_adapter(active)
        model.base_model.route_by_language = True


def generate(model, features, language, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    if "return_timestamps" not in options:  # after a timestamp, Whisper runs the rest of the audio again
        size = model.config.vocab_size
        options["suppress_tokens"] = list(range(size - 51, size))
    return model.generate(input_features=features, language=language, **options)


def one_by_one(model, features, languages, **options):
    rows = [
        by_hand(model, code, lambda row=row, code=code: generate(model, features[row : row + 1], code, **options))
        for row, code in enumerate(languages)
    ]
    return torch.cat(rows)


def test_one_language_takes_its_expert_whatever_is_active(model):
    features = make_features(2)
    with model.disable_adapter():
        base = generate(model, features, "ca")
    for name in ("ro", "ca", "mine"):
        model.set_adapter(name)
        tokens = generate(model, features, "ca")
        assert torch.equal(tokens, by_hand(model, "ca", lambda: generate(model, features, "ca")))
        assert not torch.equal(tokens, base)
        assert model.active_adapter == name


def test_a_language_without_an_expert_takes_the_base(model):
    features = make_features(2)
    tokens = generate(model, features, "bg")
    assert torch.equal(tokens, by_hand(model, "bg", lambda: generate(model, features, "bg")))
    assert not torch.equal(tokens, by_hand(model, "ca", lambda: generate(model, features, "bg")))


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"task": "translate"}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_a_list_of_languages_routes_each_sample(model, options):
    features = make_features()
    tokens = generate(model, features, LANGUAGES, **options)
    assert torch.equal(tokens, one_by_one(model, features, LANGUAGES, **options))
    assert not torch.equal(tokens, generate(model, features, ["bg"] * len(LANGUAGES), **options))


@pytest.mark.parametrize("spelling", ["Catalan", "ca_es", "cat", "<|ca|>", "ca-ES", "Valencian"])
def test_a_language_may_be_written_in_several_ways(model, spelling):
    features = make_features(1)
    expected = generate(model, features, "ca")
    assert torch.equal(generate(model, features, spelling), expected)
    assert torch.equal(generate(model, features, [spelling]), expected)
    model.base_model.route_by_language = False
    model.set_adapter("ca")
    assert torch.equal(generate(model, features, spelling), expected)


def test_an_unknown_language_is_refused(model):
    with pytest.raises(ValueError, match=r"'catalann' is neither .*; did you mean 'catalan' \(ca\)"):
        generate(model, make_features(2), ["ca", "catalann"])
    assert torch.equal(generate(model, make_features(), LANGUAGES), one_by_one(model, make_features(), LANGUAGES))


def test_a_missing_language_is_detected_by_the_base(model):
    features = make_features(32)
    whisper = model.get_base_model()
    tokens = whisper.generation_config.lang_to_id  # by chance, the model detects English and Bulgarian
    tokens["<|ca|>"], tokens["<|en|>"] = tokens["<|en|>"], tokens["<|ca|>"]
    languages = {token_id: token[2:-2] for token, token_id in whisper.generation_config.lang_to_id.items()}
    with model.disable_adapter():
        detected = [languages[token_id] for token_id in whisper.detect_language(features).tolist()]
    assert len(set(detected)) > 1 and set(detected) & set(ADAPTERS)
    assert [languages[token_id] for token_id in model.detect_language(features).tolist()] == detected
    tokens = generate(model, features, None, task="transcribe")
    assert torch.equal(tokens, one_by_one(model, features, detected, task="transcribe"))


def test_the_language_of_the_generation_config_counts(model):
    features = make_features(1)
    expected = generate(model, features, "ca")
    model.generation_config.language = "ca"
    assert torch.equal(generate(model, features, None), expected)


def tokens_of(segments):
    return [segment["tokens"].tolist() for segment in segments]


def test_a_generation_config_of_the_call_need_not_know_languages(model):
    features = make_features()
    size = model.config.vocab_size
    config = GenerationConfig(max_new_tokens=8, min_new_tokens=8, suppress_tokens=list(range(size - 51, size)))
    tokens = model.generate(input_features=features, language=LANGUAGES, generation_config=config)
    assert torch.equal(tokens, generate(model, features, LANGUAGES))


SECONDS = [3, 1, 3, 2, 3]  # of audio in each sample


def long_audio(model, **kwargs):
    """The segments of samples that Whisper runs as long as their audio is not at its end."""
    mask = torch.tensor([[1] * 100 * length + [0] * 100 * (3 - length) for length in SECONDS])
    kwargs |= {"input_features": make_features(seconds=3), "attention_mask": mask, "language": LANGUAGES}
    outputs = model.generate(**kwargs, return_timestamps=True, return_segments=True, max_new_tokens=12)
    return [tokens_of(segments) for segments in outputs["segments"]]


def test_long_audio_is_routed_sample_by_sample(model):
    sizes = encoder_batches(model)
    mixed = long_audio(model)
    assert len(set(sizes)) > 1 and max(sizes) == len(LANGUAGES)
    features = make_features(seconds=3)
    options = {"return_timestamps": True, "return_segments": True, "max_new_tokens": 12}
    for row, code in enumerate(LANGUAGES):
        audio = features[row : row + 1, :, : 100 * SECONDS[row]]
        alone = by_hand(
            model, code, lambda audio=audio, code=code: model.generate(input_features=audio, language=code, **options)
        )
        assert mixed[row] == tokens_of(alone["segments"][0])


def encoder_batches(model):
    """The sizes of the batches that the encoder runs, as they come."""
    sizes = []
    model.get_encoder().conv1.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_a_sample_that_is_run_again_at_another_temperature_keeps_its_expert(model):
    """Temperatures near 0 draw the likeliest token, so that runs can be compared."""
    features = make_features()
    options = {"return_timestamps": True, "return_segments": True, "max_new_tokens": 12}

    def run(rows, language, **kwargs):
        return model.generate(input_features=features[rows], language=language, **options, **kwargs)["segments"]

    once = run(slice(None), LANGUAGES)
    likely = [
        by_hand(model, code, lambda row=row, code=code: tokens_of(run(slice(row, row + 1), code)[0]))
        for row, code in enumerate(LANGUAGES)
    ]
    assert [tokens_of(segments) for segments in once] == likely
    for threshold in (-5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.0):
        sizes = encoder_batches(model)
        again = run(slice(None), LANGUAGES, temperature=(0.0, 1e-4), logprob_threshold=threshold)
        assert [tokens_of(segments) for segments in again] == likely
        if len(sizes) > 1 and sizes[1] < len(LANGUAGES):
            return
    raise AssertionError("no threshold ran a part of the batch again")


def test_prompts_of_earlier_text_do_not_hide_the_language(model):
    features = make_features()
    prompt = torch.tensor([model.generation_config.prev_sot_token_id, 65, 66, 67])
    tokens = generate(model, features, LANGUAGES, prompt_ids=prompt)
    for row, code in enumerate(LANGUAGES):
        audio = features[row : row + 1]
        alone = by_hand(model, code, lambda audio=audio, code=code: generate(model, audio, code, prompt_ids=prompt))
        assert tokens[row, :8].tolist() == alone[0, :8].tolist()
    assert not torch.equal(tokens[:, :8], generate(model, features, LANGUAGES))


def test_an_assistant_gives_the_same_tokens(model, tiny_whisper):
    features = make_features(1)
    expected = generate(model, features, "ca")
    tokens = generate(
        model, features, "ca", assistant_model=tiny_whisper(seed=1, init_std=0.2, vocab_size=model.config.vocab_size)
    )
    assert torch.equal(tokens, expected)


def test_token_timestamps_are_those_of_the_expert(model):
    features = make_features()
    model.generation_config.alignment_heads = [[0, 0], [1, 1]]
    options = {"return_token_timestamps": True, "return_timestamps": True, "return_segments": True}
    mask = torch.ones(len(LANGUAGES), 100, dtype=torch.long)
    model.get_base_model().set_attn_implementation("eager")
    mixed = generate(model, features, LANGUAGES, attention_mask=mask, **options)
    for row, code in enumerate(LANGUAGES):
        alone = by_hand(
            model,
            code,
            lambda row=row, code=code: generate(
                model, features[row : row + 1], code, attention_mask=mask[:1], **options
            ),
        )
        for ours, theirs in zip(mixed["segments"][row], alone["segments"][0], strict=True):
            assert torch.equal(ours["tokens"], theirs["tokens"])
            torch.testing.assert_close(ours["token_timestamps"], theirs["token_timestamps"])


def test_given_encoder_outputs_are_decoded_by_language(model):
    features = make_features()
    with model.base_model.route_samples(["ca", "__base__", "mine", "ca", "__base__"]):
        encoded = model.get_encoder()(features)
    tokens = generate(model, None, LANGUAGES, encoder_outputs=encoded)
    assert torch.equal(tokens, generate(model, features, LANGUAGES))


def test_adapter_names_come_before_languages(model):
    features = make_features(2)
    tokens = generate(model, features, ["bg", "bg"], adapter_names=["mine", "__base__"])
    expected = by_hand(model, "fr", lambda: generate(model, features[:1], "bg"))
    assert torch.equal(tokens[:1], expected)
    assert torch.equal(tokens[1:], generate(model, features[1:], "bg"))


def test_set_adapter_is_in_force_where_routing_is_off(model):
    features = make_features(2)
    model.set_adapter("mine")
    model.base_model.route_by_language = False
    with model.base_model.record_gates() as gates:
        generate(model, features, "ca")
    assert any(values.any() for values in gates.values())
    off = generate(model, features, "ca")
    model.set_adapter("ca")
    assert not torch.equal(generate(model, features, "ca"), off)


def test_two_experts_of_a_language_are_chosen_by_set_adapter(model):
    model.add_adapter("ca-2", CLSRConfig.paper(language="ca", gate_dim=8))
    features = make_features(2)
    first = generate(model, features, "ca")  # the one of that name
    model.set_adapter("ca-2")  # fresh: as the base
    with model.disable_adapter():
        base = generate(model, features, "ca")
    assert torch.equal(generate(model, features, "ca"), base)
    assert not torch.equal(first, base)


def test_a_sole_adapter_of_no_language_takes_all(tiny_whisper):
    torch.manual_seed(0)
    model = get_peft_model(tiny_whisper(init_std=0.2), CLSRConfig.paper(gate_dim=8)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    features = make_features(2)
    with model.disable_adapter():
        base = generate(model, features, "bg")
    assert not torch.equal(generate(model, features, "bg"), base)


def test_disabled_adapters_stay_disabled(model, base):
    features = make_features()
    with model.disable_adapter():
        tokens = generate(model, features, LANGUAGES)
    assert torch.equal(tokens, generate(base(), features, LANGUAGES))


def test_a_plain_whisper_and_an_unloaded_one_are_left_alone(model, base):
    features = make_features()
    plain = generate(base(), features, LANGUAGES)
    with pytest.raises(ValueError, match="Unsupported language: ca_es"):
        generate(base(), features, "ca_es")
    whisper = model.unload()
    assert torch.equal(generate(whisper, features, LANGUAGES), plain)
    assert not any("clsr" in name for name in vars(whisper))


def test_adapters_of_transformers_are_routed_too(model, base):
    whisper = base()
    for name in ("ro", "ca", "mine"):
        inject_adapter_in_model(model.peft_config[name], whisper, name)
    weights = {name: weight for name, weight in model.get_base_model().state_dict().items() if "clsr_" in name}
    assert not whisper.load_state_dict(weights, strict=False).unexpected_keys
    features = make_features()
    tokens = generate(whisper.eval(), features, LANGUAGES)
    assert torch.equal(tokens, generate(model, features, LANGUAGES))
    assert not torch.equal(tokens, generate(base(), features, LANGUAGES))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_route_by_themselves(model, copied):
    features = make_features()
    expected = generate(model, features, LANGUAGES)
    model.base_model.route_by_language = False
    twin = copied(model)
    assert not twin.base_model.route_by_language
    twin.base_model.route_by_language = True
    assert torch.equal(generate(twin, features, LANGUAGES), expected)
    assert not model.base_model.route_by_language


def test_nothing_is_routed_after_an_error(model):
    features = make_features()
    with pytest.raises(ValueError, match="length of the list must match"):
        generate(model, features, LANGUAGES[:2])
    routing = model.base_model.routing
    assert routing.adapter_names is None and generation._current_call.get() is None


def test_modules_to_save_follow_the_language(tiny_whisper):
    torch.manual_seed(0)
    config = {"gate_dim": 8, "modules_to_save": ["proj_out"]}
    model = get_peft_model(tiny_whisper(init_std=0.2), CLSRConfig.paper(language="ro", **config), adapter_name="ro")
    model.add_adapter("ca", CLSRConfig.paper(language="ca", **config))
    model.add_adapter("mine", CLSRConfig.paper(language="fr", **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save.ca" in name or "modules_to_save.mine" in name:
                parameter.add_(torch.randn_like(parameter))
    features = make_features()
    tokens = generate(model.eval(), features, LANGUAGES)
    assert torch.equal(tokens, one_by_one(model, features, LANGUAGES))
    assert not torch.equal(tokens, generate(model, features, ["bg"] * len(LANGUAGES)))


def test_a_call_within_a_call_leaves_the_outer_one_its_routes(model):
    def within(input_ids, scores):
        generate(model, make_features(2), ["fr", "bg"], max_new_tokens=1, min_new_tokens=1)
        return scores

    assert long_audio(model, logits_processor=[within]) == long_audio(model)


def test_the_language_of_the_generation_config_may_be_an_alias(model):
    features = make_features(1)
    expected = generate(model, features, "ca")
    model.generation_config.language = "ca_es"
    assert torch.equal(generate(model, features, None), expected)


def test_features_over_a_context_that_an_adapter_cut_are_refused_with_the_remedy(base):
    model = get_peft_model(base(), CLSRConfig.paper(language="ca", max_audio_seconds=0.5), adapter_name="ca").eval()
    with pytest.raises(
        ValueError, match=r"have 100 frames, .* is 50, 0.5 s, .*set_audio_context\(None, processor, 0.5\)"
    ):
        generate(model, make_features(1), "ca")
    generate(model, make_features(1)[..., :50], "ca")
    generate(model, make_features(1), "ca", return_timestamps=True)
