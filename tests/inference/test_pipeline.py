"""transformers' pipeline for speech recognition routes by language as `generate` does."""

import pytest
import torch
from conftest import SPECIAL_TOKENS, build_tokenizer
from helpers import QUIET
from peft import get_peft_model
from transformers import WhisperFeatureExtractor, pipeline

from peft_clsr import CLSRConfig

RATE = 16000
TIMESTAMPS = [f"<|{position / 50:.2f}|>" for position in range(51)]


@pytest.fixture
def tokenizer():
    return build_tokenizer([*SPECIAL_TOKENS, *TIMESTAMPS])


@pytest.fixture
def experts(tiny_whisper, tokenizer):
    """A factory of a Whisper of 1 s of context with experts for Catalan and Romanian; Romanian is active."""

    def build(seed):
        whisper = tiny_whisper(seed=seed, init_std=0.2, vocab_size=len(tokenizer))
        model = get_peft_model(whisper, CLSRConfig.paper(language="ro", gate_dim=8, **QUIET), adapter_name="ro")
        model.add_adapter("ca", CLSRConfig.paper(language="ca", gate_dim=8, **QUIET))
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "clsr_" in name:
                    parameter.add_(torch.randn_like(parameter))
        return model.eval()

    return build


@pytest.fixture
def transcribe(tokenizer):
    """`transcribe(model, waveforms, language, ...)`: the texts that the pipeline gives."""

    def call(model, waveforms, language, **options):
        silenced = [token for token in range(256) if not tokenizer.decode(token).isalpha()]  # no text of its own
        if not options.get("return_timestamps"):  # a random model says them all the same, and Whisper heeds them
            silenced += tokenizer.convert_tokens_to_ids(TIMESTAMPS)
        kwargs = {"language": language, "task": "transcribe", "num_beams": 1, "max_new_tokens": 8}
        recognizer = pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=tokenizer,
            feature_extractor=WhisperFeatureExtractor(chunk_length=1),
            generate_kwargs={**kwargs, "suppress_tokens": silenced},
            **options,
        )
        inputs = [{"raw": waveform.numpy(), "sampling_rate": RATE} for waveform in waveforms]
        return [output["text"] for output in recognizer(inputs)]

    return call


@pytest.fixture
def by_hand(transcribe):
    """The same with the adapter of the language active, or none, and nothing routed by language."""

    def call(model, waveforms, language, **options):
        model.base_model.route_by_language = False
        try:
            if language not in model.peft_config:
                with model.disable_adapter():
                    return transcribe(model, waveforms, language, **options)
            model.set_adapter(language)
            return transcribe(model, waveforms, language, **options)
        finally:
            model.set_adapter("ro")
            model.base_model.route_by_language = True

    return call


@pytest.mark.parametrize(
    ("seconds", "options"),
    [
        ((0.7,), {}),
        ((0.7, 1.0, 0.3), {"batch_size": 3}),
        ((2.6,), {"return_timestamps": True}),
        ((2.6,), {"chunk_length_s": 1}),
        ((2.6, 0.7, 1.5), {"chunk_length_s": 1, "batch_size": 4}),
        ((2.6, 0.7, 1.5), {"chunk_length_s": 1, "batch_size": 4, "return_timestamps": True}),
    ],
    ids=["short", "batch", "long", "chunks", "batches of chunks", "chunks with timestamps"],
)
@pytest.mark.parametrize("language", ["ca", "bg"])  # Bulgarian has no expert
def test_the_pipeline_routes_by_language(experts, transcribe, by_hand, seconds, options, language):
    model = experts(seed=1)  # one that says several things
    generator = torch.Generator().manual_seed(0)
    waveforms = [torch.randn(round(length * RATE), generator=generator) * 0.1 for length in seconds]
    texts = transcribe(model, waveforms, language, **options)
    assert len(texts) == len(seconds)
    assert texts == by_hand(model, waveforms, language, **options)
    for other in {"ca", "ro"} - {language}:
        model.base_model.route_by_language = False
        model.set_adapter(other)
        assert texts != transcribe(model, waveforms, language, **options)


def test_each_recording_of_a_batch_is_routed_by_the_language_that_the_base_hears(experts, transcribe, by_hand):
    model = experts(seed=0)  # one that hears several languages in tones
    tones = [torch.sin(6.283 * hertz * torch.arange(RATE) / RATE) for hertz in (100, 1000, 3000)]
    waveforms = [loudness * tone for tone in tones for loudness in (0.001, 0.5)]
    inputs = WhisperFeatureExtractor(chunk_length=1)(
        [waveform.numpy() for waveform in waveforms], sampling_rate=RATE, return_tensors="pt"
    )
    whisper = model.get_base_model()
    tokens = whisper.generation_config.lang_to_id
    with model.disable_adapter():
        heard = whisper.detect_language(inputs.input_features, num_segment_frames=100).tolist()
    # Two of these languages become those that have experts.
    for token_id, token in zip(dict.fromkeys(heard), ("<|ca|>", "<|ro|>"), strict=False):
        former = next(name for name, value in tokens.items() if value == token_id)
        tokens[former], tokens[token] = tokens[token], tokens[former]
    codes = {token_id: token[2:-2] for token, token_id in tokens.items()}
    languages = [codes[token_id] for token_id in heard]
    assert {"ca", "ro"} <= set(languages)
    assert transcribe(model, waveforms, None, batch_size=len(waveforms)) == [
        by_hand(model, [waveform], language)[0] for waveform, language in zip(waveforms, languages, strict=True)
    ]


def test_a_language_that_whisper_does_not_know_takes_its_expert_in_the_pipeline(experts, transcribe):
    model = experts(seed=3)
    model.add_adapter("hsb", CLSRConfig.paper(language="hsb", prompt_language="ca", gate_dim=8, **QUIET))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clsr_" in name and ".hsb." in name:
                parameter.add_(torch.randn_like(parameter))
    model.eval()
    waveforms = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    texts = transcribe(model, waveforms, "Upper Sorbian")
    model.set_adapter("hsb")
    model.base_model.route_by_language = False
    assert texts == transcribe(model, waveforms, "ca")
    model.set_adapter("ca")
    assert texts != transcribe(model, waveforms, "ca")
