"""Threads that call one model at the same time: each gets what it gets alone."""

import asyncio
import copy
import logging
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import noise, random_clsr
from peft import get_peft_model
from transformers import pipeline

from peft_clsr import CLSRConfig, transcribe
from peft_clsr.inference.transcribe import transcribe_waveforms

LANGUAGES = ["ca", "fr", "bg", "ro"]  # no adapter for Bulgarian


@pytest.fixture(autouse=True)
def frequent_switches():
    """Threads take turns every 0.1 ms, so that each is interrupted in each forward."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def model(tiny_whisper, tiny_processor):
    whisper = tiny_whisper(init_std=0.2, vocab_size=len(tiny_processor.tokenizer) + 51)
    model = random_clsr(whisper, "ca", "fr")
    model.add_adapter("ro", CLSRConfig.paper(gate_dim=8, expert_rank=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".ro." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def features(seed=0, batch=2, seconds=1):
    return torch.randn(batch, 80, 100 * seconds, generator=torch.Generator().manual_seed(seed))


def generate(model, language, **options):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "input_features": features()} | options
    size = model.config.vocab_size  # the last tokens are timestamps
    return model.generate(**options, language=language, suppress_tokens=list(range(size - 51, size)))


def in_threads(call, arguments, times=6, threads=4):
    """The results of `call` for each of the arguments alone, and those of many calls at the same time."""
    alone = [call(argument) for argument in arguments]
    start = threading.Barrier(threads)
    with ThreadPoolExecutor(threads, initializer=start.wait) as pool:
        together = list(pool.map(call, list(arguments) * times))
    return alone, [together[index :: len(arguments)] for index in range(len(arguments))]


def assert_same_tokens(alone, together):
    assert len({tuple(tokens.flatten().tolist()) for tokens in alone}) == len(alone)
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(tokens, expected) for tokens in results)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_each_call_takes_the_expert_of_its_language(model, options):
    assert_same_tokens(*in_threads(lambda language: generate(model, language, **options), LANGUAGES))


def test_mixed_batches_keep_their_languages(model):
    batches = [["ca", "fr"], ["fr", "ca"], ["bg", "ro"], ["ro", "ro"]]
    assert_same_tokens(*in_threads(lambda languages: generate(model, languages), batches))


def test_a_detected_language_is_that_of_the_call(model):
    whisper = model.get_base_model()
    tokens = whisper.generation_config.lang_to_id
    audio = {seed: features(seed) for seed in range(4)}

    def detect_and_generate(seed):
        return torch.cat([model.detect_language(audio[seed]), generate(model, None, input_features=audio[seed])[0]])

    detected = set(model.detect_language(torch.cat(list(audio.values()))).tolist())
    for index, code in zip(detected, ("ca", "fr"), strict=False):  # whatever is detected has an expert
        heard = next(token for token, token_id in tokens.items() if token_id == index)
        tokens[heard], tokens[f"<|{code}|>"] = tokens[f"<|{code}|>"], tokens[heard]
    assert_same_tokens(*in_threads(detect_and_generate, list(audio)))


def test_parts_of_a_batch_that_are_run_again_keep_their_experts(model):
    """Audio over the context, in windows, each again at another temperature, which draws the likeliest token."""
    model.generation_config.prev_sot_token_id = 0
    options = {"return_timestamps": True, "return_segments": True, "max_new_tokens": 8, "logprob_threshold": -1.0}

    def run(languages):
        outputs = model.generate(
            input_features=features(seconds=2),
            attention_mask=torch.tensor([[1] * 200, [1] * 100 + [0] * 100]),
            language=languages,
            temperature=(0.0, 1e-4),
            **options,
        )
        return torch.cat([segment["tokens"] for segments in outputs["segments"] for segment in segments])

    assert_same_tokens(*in_threads(run, [["ca", "fr"], ["fr", "ca"], ["bg", "ro"]], times=4))


def test_adapter_names_of_a_forward_are_those_of_the_call(model):
    decoder_input_ids = torch.arange(12).view(2, 6)

    @torch.no_grad()
    def forward(names):
        return model(input_features=features(), decoder_input_ids=decoder_input_ids, adapter_names=names).logits

    alone, together = in_threads(forward, [["ca", "fr"], ["__base__", "ro"], ["ro", "ca"], None], times=20)
    for expected, results in zip(alone, together, strict=True):
        for logits in results:
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["proj_out", "layer_norm"])
def test_modules_to_save_are_those_of_the_call(tiny_whisper, name):
    config = {"gate_dim": 8, "modules_to_save": [name]}
    model = get_peft_model(tiny_whisper(init_std=0.2), CLSRConfig.paper(**config), adapter_name="ro")
    model.add_adapter("ca", CLSRConfig.paper(**config))
    model.add_adapter("fr", CLSRConfig.paper(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save." in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    decoder_input_ids = torch.arange(12).view(2, 6)

    @torch.no_grad()
    def forward(names):
        inputs = {"input_features": features(), "decoder_input_ids": decoder_input_ids}
        return model(**inputs, adapter_names=names).logits

    calls = [["ca"] * 2, ["fr"] * 2, ["__base__"] * 2, None]
    if name == "proj_out":  # PEFT routes samples through linear layers only
        calls.append(["ca", "fr"])
    for copied in (model.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model = copied
        alone, together = in_threads(forward, calls, times=10)
        assert len({logits.sum().item() for logits in alone}) == len(alone)
        for expected, results in zip(alone, together, strict=True):
            for logits in results:
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_gates_and_budget_are_those_of_the_call(model):
    labels = torch.arange(12).view(2, 6)

    @torch.no_grad()
    def forward(name):
        with model.base_model.record_gates() as gates:
            model(input_features=features(), labels=labels, adapter_names=[name] * 2)
        mean, recorded = model.base_model.gate_mean(), torch.cat([values.flatten() for values in gates.values()])
        assert mean.item() == pytest.approx(recorded.mean().item())
        return recorded

    alone, together = in_threads(forward, ["ca", "fr", "ro"], times=20)
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(values, expected) for values in results)


def test_gates_are_not_recorded_for_other_threads(model):
    with ThreadPoolExecutor(1) as pool, model.base_model.record_gates() as gates:
        pool.submit(generate, model, "ca").result()
        assert not gates
        generate(model, "ca")
        assert gates


def test_tasks_of_asyncio_keep_what_they_set(model):
    """A task gives way within its context; `to_thread` takes the context along, `run_in_executor` does not."""
    decoder_input_ids = torch.arange(12).view(2, 6)

    @torch.no_grad()
    def forward():
        return model(input_features=features(), decoder_input_ids=decoder_input_ids).logits

    expected = {}
    for name in ("ca", "fr", "ro"):
        with model.base_model.route_samples([name] * 2):
            expected[name] = forward()
    active = forward()

    async def task(name):
        with model.base_model.route_samples([name] * 2):
            for _ in range(5):
                await asyncio.sleep(0)
                torch.testing.assert_close(forward(), expected[name], atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(await asyncio.to_thread(forward), expected[name], atol=1e-6, rtol=1e-6)
                plain = await asyncio.get_running_loop().run_in_executor(None, forward)
                torch.testing.assert_close(plain, active, atol=1e-6, rtol=1e-6)

    async def tasks():
        await asyncio.gather(*(task(name) for name in expected))

    asyncio.run(tasks())
    assert torch.equal(forward(), active)


def test_the_pipeline_works_in_threads(model, tiny_processor):
    recognizer = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=tiny_processor.tokenizer,
        feature_extractor=tiny_processor.feature_extractor,
    )
    size = model.config.vocab_size
    options = {"max_new_tokens": 8, "num_beams": 1, "suppress_tokens": list(range(256, size))}
    alone, together = in_threads(
        lambda language: recognizer(noise(0.5), generate_kwargs={"language": language, **options})["text"], LANGUAGES
    )
    assert len(set(alone)) == len(alone)
    for expected, results in zip(alone, together, strict=True):
        assert set(results) == {expected}


def test_windows_that_are_sampled_give_the_same_text_in_threads(model, tiny_processor):
    """The text of a random model repeats itself, so each window is sampled, at five temperatures."""
    tiny_processor.tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(51)])
    model.generation_config.max_length = 16
    before = torch.get_rng_state()

    def hear(language):
        transcript = transcribe_waveforms(model, tiny_processor, [noise(0.3)], [language])[0]
        return tuple(tuple(segment.items()) for segment in transcript.segments)

    alone, together = in_threads(hear, LANGUAGES[:2], times=3)
    assert len(set(alone)) == len(alone)
    for expected, results in zip(alone, together, strict=True):
        assert set(results) == {expected}
    assert torch.equal(torch.get_rng_state(), before)  # the draws of others are not disturbed


def test_transcripts_of_a_model_in_training_mode_are_made_in_evaluation_mode(model, tiny_processor):
    model.train()
    dataset = [{"input_features": example} for example in features(batch=3)]
    level = logging.getLogger("transformers.generation.utils").level
    alone, together = in_threads(
        lambda language: tuple(transcribe(model, tiny_processor, dataset, language, max_new_tokens=6)), LANGUAGES
    )
    assert len(set(alone)) == len(alone)
    for expected, results in zip(alone, together, strict=True):
        assert set(results) == {expected}
    assert all(module.training for module in model.modules())
    assert logging.getLogger("transformers.generation.utils").level == level


def test_adapters_may_be_added_and_activated_while_others_generate(model):
    alone = {language: generate(model, language) for language in LANGUAGES}
    done = threading.Event()

    def serve(language):
        results = []
        while not done.is_set():
            results.append(generate(model, language))
        return results

    with ThreadPoolExecutor(len(LANGUAGES)) as pool:
        running = [pool.submit(serve, language) for language in LANGUAGES]
        try:
            for code in ("en", "el", "be"):
                model.add_adapter(code, CLSRConfig.paper(gate_dim=8))
                model.set_adapter(code)
            model.delete_adapter("el")
        finally:
            done.set()
        for language, results in zip(LANGUAGES, running, strict=True):
            assert results.result() and all(torch.equal(tokens, alone[language]) for tokens in results.result())


def test_calls_of_a_compiled_model_take_turns(model):
    """One FFN is compiled, as that is quick."""
    languages = ["ca", "fr", "ro"]
    expected = [generate(model, language) for language in languages]
    torch._dynamo.reset()
    layer = model.get_base_model().model.decoder.layers[0]
    for module in (layer.fc1, layer.fc2):
        module.compile(backend="eager", dynamic=True)
    generate(model, "ca")  # compiles
    try:
        alone, together = in_threads(lambda language: generate(model, language), languages, times=8)
    finally:
        torch._dynamo.reset()
    assert all(torch.equal(tokens, own) for tokens, own in zip(alone, expected, strict=True))
    assert_same_tokens(alone, together)


@pytest.mark.parametrize("name", ["ca", "ro"])
def test_a_backward_pass_in_another_thread_recomputes_with_the_same_adapter(model, name):
    """CUDA's backward pass runs in a thread of its own, and recomputes checkpointed layers there."""
    model.set_adapter("fr")
    model.train()
    model.set_requires_grad(name)
    labels = torch.arange(12).view(2, 6)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(0)
        with model.base_model.route_samples([name] * 2, labels):
            loss = model(input_features=features(), labels=labels).loss
            gates = model.base_model.gate_mean()
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        assert torch.equal(model.base_model.gate_mean(), gates)  # the recomputation counts nothing
        gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys() and any(f".{name}." in key for key in plain)
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-5)
