"""The adapter that is for a language."""

import pytest

from peft_clsr import CLSRConfig, adapter_of_language, inference_adapter

ANY = CLSRConfig.paper()


# In training


@pytest.mark.parametrize("language", ["ca", "cat", "ca_es", "Catalan", "<|ca|>"])
@pytest.mark.parametrize(
    ("adapters", "name"),
    [
        ({"uk": ANY, "ca": ANY}, "ca"),
        ({"uk": ANY, "mine": CLSRConfig.paper(language="ca")}, "mine"),
        ({"uk": ANY, "catalan": ANY}, "catalan"),
        ({"default": ANY}, "default"),
    ],
)
def test_training_takes_the_adapter_of_a_language(adapters, name, language):
    assert adapter_of_language(adapters, language) == name


def test_training_takes_an_adapters_name_before_its_language():
    assert adapter_of_language({"ca": ANY, "ca_valencia": ANY}, "ca_valencia") == "ca_valencia"


@pytest.mark.parametrize(
    ("adapters", "has"),
    [
        ({"uk": ANY}, "no adapter"),
        ({"mine": CLSRConfig.paper(language="uk")}, "no adapter"),
        ({"default": ANY, "uk": ANY}, "no adapter"),
        ({"a": CLSRConfig.paper(language="ca"), "b": CLSRConfig.paper(language="ca")}, "several adapters"),
        ({"ca_valencia": ANY, "uk": ANY}, "no adapter"),  # a part of the language
    ],
)
def test_training_wants_one_adapter_for_a_language(adapters, has):
    with pytest.raises(ValueError, match=f"'ca' has {has} on the model .*{', '.join(adapters)}"):
        adapter_of_language(adapters, "ca")


# In inference

RWANDA = CLSRConfig.paper(language="rw", prompt_language="sw")
DIALECTS = {"ca": ANY, "ca-valencia": ANY, "rw": RWANDA}
TWO = {"a": CLSRConfig.paper(language="ca"), "b": CLSRConfig.paper(language="ca"), "uk": ANY, "default": ANY}


@pytest.mark.parametrize(
    ("adapters", "language", "active", "name"),
    [
        # the active one, if it is of the language
        (TWO, "ca", "b", "b"),
        ({"ca": ANY, "mine": CLSRConfig.paper(language="ca")}, "ca", "mine", "mine"),
        ({"ca": ANY, "ca_es": ANY}, "ca", "ca", "ca"),
        ({"ca": ANY, "ca_es": ANY}, "ca", "ca_es", "ca"),  # the exact one
        # the exact one, else a broader one, but not a part of it
        (DIALECTS, "ca", "ca-valencia", "ca"),
        (DIALECTS, "ca-valencia", "ca", "ca-valencia"),
        (DIALECTS, "ca-ES-valencia", "ca", "ca-valencia"),
        (DIALECTS, "ca-FR", "rw", "ca"),
        ({"ca-valencia": ANY, "rw": RWANDA}, "ca", "ca-valencia", None),
        (DIALECTS, "rw", "ca", "rw"),
        (DIALECTS, "sw", "rw", None),
        # the one of its name
        ({"ca": ANY, "mine": CLSRConfig.paper(language="ca")}, "ca", "ca", "ca"),
        ({"ca": ANY, "mine": CLSRConfig.paper(language="ca"), "uk": ANY}, "ca", "uk", "ca"),
        ({"xx": ANY, "uk": ANY}, "xx", "uk", "xx"),
        ({"xx": ANY, "uk": ANY}, "xx", None, "xx"),
        # the only one of it
        ({"mine": CLSRConfig.paper(language="ca"), "uk": ANY}, "ca", "uk", "mine"),
        ({"ca_es": ANY, "default": ANY}, "ca", "default", "ca_es"),
        ({"jv": ANY, "uk": ANY}, "jw", None, "jv"),
        # the active one, if it is for no language in particular
        (TWO, "ro", "default", "default"),
        (TWO, "xx", "default", "default"),
        # else the base
        (TWO, "ro", "uk", None),
        (TWO, "ro", None, None),
        (TWO, "xx", "uk", None),
        ({"mine": CLSRConfig.paper(language="ca")}, "uk", "mine", None),
        ({"default": ANY}, "ca", None, None),
        ({}, "ca", None, None),
    ],
)
def test_inference_routes_by_the_adapter_of_a_language_else_by_the_base(adapters, language, active, name):
    assert inference_adapter(adapters, language, active) == name


@pytest.mark.parametrize("active", ["uk", "default", None])
def test_inference_does_not_choose_among_several_adapters_of_a_language(active):
    with pytest.raises(ValueError, match=r"'ca' has several adapters on the model \(a, b\).*model.set_adapter\('a'\)"):
        inference_adapter(TWO, "ca", active)


def test_training_takes_a_broader_adapter_for_a_dialect_and_the_exact_one_if_there_is_one():
    assert adapter_of_language({"ca": ANY, "uk": ANY}, "ca-valencia") == "ca"
    assert adapter_of_language({"ca": ANY, "mine": CLSRConfig.paper(language="ca-valencia")}, "ca_valencia") == "mine"
    with pytest.raises(ValueError, match="'rw' has no adapter"):
        adapter_of_language({"sw": ANY, "uk": ANY}, "rw")


def test_a_detected_language_takes_the_only_adapter_with_its_prompt_if_that_is_asked_for():
    one = {"rw": RWANDA, "ca": ANY}
    assert inference_adapter(one, "sw", "ca") is None
    assert inference_adapter(one, "sw", "ca", by_prompt_language=True) == "rw"
    two = {**one, "rn": CLSRConfig.paper(language="rn", prompt_language="sw")}
    assert inference_adapter(two, "sw", "rw", by_prompt_language=True) is None  # no guess between two
    assert inference_adapter({**two, "sw": ANY}, "sw", "rw", by_prompt_language=True) == "sw"


def test_the_prompt_of_a_config_is_whispers_own_language_or_must_be_given():
    assert CLSRConfig.paper(language="ca-valencia").prompt_language == "ca"
    config = CLSRConfig.paper(language="kinyarwanda", prompt_language="Swahili")
    assert (config.language, config.prompt_language) == ("rw", "sw")
    with pytest.raises(ValueError, match="Whisper has no language 'rw': name the Whisper language .*sw \\(swahili\\)"):
        CLSRConfig.paper(language="rw")
    with pytest.raises(ValueError, match="'rn' is not a Whisper language"):
        CLSRConfig.paper(language="rw", prompt_language="rn")
    with pytest.raises(ValueError, match="prompt_language is 'sw' but language is not given"):
        CLSRConfig.paper(prompt_language="sw")
