"""Languages that share a token in the prompt, and those that Whisper does not know, in `generate`."""

import warnings

import pytest
import torch
from peft import get_peft_model

from peft_clsr import CLSRConfig
from peft_clsr.inference.language_tokens import LanguageTokens
from peft_clsr.inference.transcribe import detect_languages

# Adapter to its prompt.
PROMPTS = {"ca": "ca", "ca-valencia": "ca", "rw": "sw"}


@pytest.fixture
def base(tiny_whisper, tiny_processor):
    """A factory of one Whisper that knows timestamps, from 0 to 1 s."""
    tokenizer = tiny_processor.tokenizer

    def build():
        whisper = tiny_whisper(init_std=0.2, vocab_size=len(tokenizer) + 51)
        whisper.generation_config.prev_sot_token_id = tokenizer.convert_tokens_to_ids("<|startofprev|>")
        # The byte tokenizer has tokens for some of Whisper's languages only.
        whisper.generation_config.lang_to_id |= {"<|sw|>": tokenizer.convert_tokens_to_ids("<|el|>")}
        whisper.generation_config.lang_to_id.pop("<|el|>")
        return whisper

    return build


@pytest.fixture
def model(base):
    torch.manual_seed(0)
    model = get_peft_model(base(), CLSRConfig.paper(language="ca", gate_dim=8), adapter_name="ca")
    model.add_adapter("ca-valencia", CLSRConfig.paper(language="ca-valencia", gate_dim=8))
    model.add_adapter("rw", CLSRConfig.paper(language="rw", prompt_language="sw", gate_dim=4, expert_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.5)
    return model.eval()


def make_features(batch, seconds=1):
    return torch.randn(batch, 80, 100 * seconds, generator=torch.Generator().manual_seed(0))


def generate(model, features, language, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    if "return_timestamps" not in options:
        size = model.config.vocab_size
        options["suppress_tokens"] = list(range(size - 51, size))
    return model.generate(input_features=features, language=language, **options)


def by_hand(model, adapter, features, prompt, **options):
    """The transcript by one adapter, or by the base for `None`, with a Whisper language in the prompt."""
    active = model.active_adapter
    model.base_model.route_by_language = False
    try:
        if adapter is None:
            with model.disable_adapter():
                return generate(model, features, prompt, **options)
        model.set_adapter(adapter)
        return generate(model, features, prompt, **options)
    finally:
        model.set_adapter(active)
        model.base_model.route_by_language = True


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"return_timestamps": True}], ids=str)
def test_a_batch_mixes_dialects_and_languages_that_whisper_does_not_know(model, options):
    languages = ["ca-valencia", "ca", "rw", "sw", "ca-valencia", "ca"]
    features = make_features(len(languages), seconds=3 if "return_timestamps" in options else 1)
    if "return_timestamps" in options:
        options = {**options, "attention_mask": torch.ones(len(languages), features.shape[-1], dtype=torch.long)}
    tokens = generate(model, features, languages, **options)
    for row, language in enumerate(languages):
        adapter = language if language in PROMPTS else None
        if "attention_mask" in options:
            options["attention_mask"] = torch.ones(1, features.shape[-1], dtype=torch.long)
        alone = by_hand(model, adapter, features[row : row + 1], PROMPTS.get(language, language), **options)
        assert torch.equal(tokens[row, : alone.shape[1]], alone[0]), language
    assert not torch.equal(tokens[0], by_hand(model, "ca", features[:1], "ca", **options)[0])


@pytest.mark.parametrize("language", [*PROMPTS, "Kinyarwanda", "CA_valencia", "ca-ES-valencia"])
def test_one_language_for_all_takes_its_expert_and_its_prompt(model, language):
    tag = {"Kinyarwanda": "rw", "CA_valencia": "ca-valencia", "ca-ES-valencia": "ca-valencia"}.get(language, language)
    features = make_features(2)
    expected = by_hand(model, tag, features, PROMPTS[tag])
    assert torch.equal(generate(model, features, language), expected)
    assert torch.equal(generate(model, features, [language, language]), expected)
    model.set_adapter(tag)
    model.base_model.route_by_language = False
    assert torch.equal(generate(model, features, [language, language]), expected)


def test_prompts_of_the_output_have_whispers_tokens(model):
    output = generate(model, make_features(2), ["ca", "ca-valencia"], return_dict_in_generate=True)
    catalan = model.generation_config.lang_to_id["<|ca|>"]
    language_ids = set(model.generation_config.lang_to_id.values())
    assert language_ids.intersection(output["sequences"].flatten().tolist()) <= {catalan}


def test_no_speech_is_detected_for_languages_that_share_a_token(model):
    # Whisper's detection runs the model with the prompts, before the tokens are replaced.
    options = {
        "return_timestamps": True,
        "no_speech_threshold": 0.6,
        "logprob_threshold": -1.0,
        "temperature": (0.0, 0.2),
    }
    options["attention_mask"] = torch.ones(2, 200, dtype=torch.long)
    tokens = generate(model, make_features(2, seconds=2), ["ca", "ca-valencia"], **options)
    assert len(tokens) == 2


def test_a_dialect_without_an_expert_takes_that_of_its_language_and_this_is_said_once(model):
    model.delete_adapter("ca-valencia")
    features = make_features(1)
    with pytest.warns(UserWarning, match="no adapter for 'ca-valencia', so 'ca' takes it, which is for 'ca'"):
        tokens = generate(model, features, "ca-valencia")
    assert torch.equal(tokens, by_hand(model, "ca", features, "ca"))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        generate(model, features, "ca-valencia")
    assert not [warning for warning in said if "takes it" in str(warning.message)]


def test_a_language_does_not_take_the_expert_of_its_dialect(model):
    model.delete_adapter("ca")
    features = make_features(1)
    assert torch.equal(generate(model, features, "ca"), by_hand(model, None, features, "ca"))


def test_a_language_without_expert_and_token_is_refused(model):
    with pytest.raises(
        ValueError, match=r"'hsb' has no adapter on the model \(adapters: ca, .*Whisper does not know it"
    ):
        generate(model, make_features(1), "hsb")
    with pytest.raises(ValueError, match="'qqqq' is neither a language tag"):
        generate(model, make_features(1), "qqqq")


def test_a_config_whose_prompt_this_whisper_has_no_token_for_is_refused(base):
    with pytest.raises(ValueError, match=r"prompt_language is 'yue', and this Whisper has no token <\|yue\|>"):
        get_peft_model(base(), CLSRConfig.paper(language="yue"), adapter_name="yue")
    model = get_peft_model(base(), CLSRConfig.paper(language="ca"), adapter_name="ca")
    with pytest.raises(ValueError, match="has no token"):
        model.add_adapter("hak", CLSRConfig.paper(language="hak", prompt_language="yue"))
    assert list(model.peft_config) == ["ca"]


@pytest.fixture
def hears_swahili(model):
    whisper = model.get_base_model()
    detect = type(whisper).detect_language

    def detect_swahili(*args, **kwargs):
        return torch.full_like(detect(whisper, *args, **kwargs), whisper.generation_config.lang_to_id["<|sw|>"])

    whisper.detect_language = detect_swahili
    return model


def test_what_is_detected_takes_the_exact_expert_or_by_request_the_only_one_with_that_prompt(hears_swahili):
    model, features = hears_swahili, make_features(2)
    with pytest.warns(UserWarning, match="To let 'rw' take what is heard as 'sw', pass route_by_prompt_language=True"):
        tokens = generate(model, features, None, task="transcribe")
    assert torch.equal(tokens, by_hand(model, None, features, "sw", task="transcribe"))
    tokens = generate(model, features, None, task="transcribe", route_by_prompt_language=True)
    assert torch.equal(tokens, by_hand(model, "rw", features, "sw", task="transcribe"))

    given = generate(model, features, "sw", route_by_prompt_language=True)  # nothing is detected
    assert torch.equal(given, by_hand(model, None, features, "sw"))

    model.add_adapter("rn", CLSRConfig.paper(language="rn", prompt_language="sw", gate_dim=8))
    model.base_model.routing.warned_of.clear()
    with pytest.warns(UserWarning, match="prompt_language of 'rw', 'rn': pass the language to choose one"):
        tokens = generate(model.eval(), features, None, task="transcribe", route_by_prompt_language=True)
    assert torch.equal(tokens, by_hand(model, None, features, "sw", task="transcribe"))

    model.add_adapter("sw", CLSRConfig.paper(language="sw", gate_dim=8))
    expected = by_hand(model.eval(), "sw", features, "sw")
    assert torch.equal(generate(model, features, None, task="transcribe"), expected)


def test_candidates_are_heard_as_their_prompts(hears_swahili):
    features = make_features(2)
    assert detect_languages(hears_swahili, features, ["ca", "rw"]) == ["rw", "rw"]
    assert detect_languages(hears_swahili, features, route_by_prompt_language=True) == ["rw", "rw"]
    assert detect_languages(hears_swahili, features) == ["sw", "sw"]
    with pytest.raises(ValueError, match="'ca' and 'ca-valencia' are both heard as 'ca'"):
        detect_languages(hears_swahili, features, ["ca", "ca-valencia"])


def test_more_languages_than_tokens_are_refused():
    with pytest.raises(ValueError, match="3 languages, which share tokens, and the model has 2"):
        LanguageTokens({"<|ca|>": 1, "<|uk|>": 2}, {"ca": "ca", "ca-valencia": "ca", "ca-FR": "ca"})
