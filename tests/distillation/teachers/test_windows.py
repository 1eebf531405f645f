"""Teacher states of packed windows: those of the planned epochs, and no others."""

import json

import pytest
import torch
from conftest import SPECIAL_TOKENS
from helpers import clsr, noise
from training import adapter_weights, make_args
from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

datasets = pytest.importorskip("datasets")

from peft_clsr import (
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    cache_teacher_states,
    load_teacher_states,
    pack_utterances,
)


def recordings(number=8, language="ca", first_seed=0):
    return datasets.Dataset.from_list(
        [
            {
                "audio": {"array": noise(0.2, seed=first_seed + index), "sampling_rate": 16000},
                "transcription": f"text {index}",
                "language": language,
            }
            for index in range(number)
        ]
    )


def packed(processor, dataset=None, **arguments):
    dataset = recordings() if dataset is None else dataset
    return pack_utterances(
        dataset, processor, **{"max_seconds": 1, "timestamps": 0, "previous_text": 0.7, "single": 0.5, **arguments}
    )


@pytest.fixture
def teacher(tiny_whisper):
    return tiny_whisper(seed=1, init_std=0.3)


def trainer(model, teacher, dataset, processor, folder, **arguments):
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 2, **arguments}
    return DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=make_args(DistillationTrainingArguments, folder, **settings),
        train_dataset=dataset,
        data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor),
        processing_class=processor,
    )


def losses_of(one):
    one.train()
    return [log["kd_loss"] for log in one.state.log_history if "kd_loss" in log]


def test_states_of_a_window_are_those_of_the_live_teacher(teacher, readable_whisper, tiny_processor, tmp_path):
    states = cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path / "cache", epochs=2)
    live = trainer(clsr(readable_whisper()), teacher, packed(tiny_processor), tiny_processor, tmp_path)
    cached = trainer(clsr(readable_whisper()), states, states.dataset, tiny_processor, tmp_path)
    assert len(states.dataset) == len(live.train_dataset)
    prompts = 0
    for epoch in (1, 0):
        states.dataset.set_epoch(epoch)
        live.train_dataset.set_epoch(epoch)
        for index in range(0, len(states.dataset), 2):
            rows = [states.dataset[index], states.dataset[index + 1 - len(states.dataset)]]
            prompts += sum("prompt_ids" in row for row in rows)
            batch = cached.data_collator(rows)
            found = cached._teacher_targets(dict(batch), batch["labels"], True).hidden_states
            batch = live.data_collator(
                [live.train_dataset[index], live.train_dataset[index + 1 - len(states.dataset)]]
            )
            expected = live._teacher_targets(dict(batch), batch["labels"], True).hidden_states
            torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=1e-3)
    assert prompts > 2


def test_training_from_the_cache_is_training_with_the_teacher(teacher, readable_whisper, tiny_processor, tmp_path):
    states = cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path / "cache", epochs=2)
    model, other = clsr(readable_whisper()), clsr(readable_whisper())
    live = losses_of(trainer(model, teacher, packed(tiny_processor), tiny_processor, tmp_path))
    cached = losses_of(trainer(other, states, states.dataset, tiny_processor, tmp_path))
    assert len(live) == 4 and min(live) > 0
    assert cached == pytest.approx(live, rel=2e-3, abs=2e-4)
    weights = adapter_weights(other)
    for name, weight in adapter_weights(model).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-3, rtol=1e-2)


def test_a_run_that_was_killed_goes_on_with_the_windows_of_its_plan(teacher, tiny_processor, tmp_path):
    whole = cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path / "whole", epochs=2)
    forward, calls = teacher.forward, []

    def stop(**arguments):
        calls.append(len(arguments["input_features"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(**arguments)

    sizes = {"epochs": 2, "batch_size": 2, "shard_size": 3}
    teacher.forward = stop
    with pytest.raises(KeyboardInterrupt):
        cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path / "killed", **sizes)
    with pytest.raises(ValueError, match=f"holds the states of 3 of {2 * len(whole.dataset)} examples"):
        load_teacher_states(packed(tiny_processor), tmp_path / "killed")
    states = cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path / "killed", **sizes)
    assert sum(calls[3:]) == 2 * len(whole.dataset) - 3
    for epoch in range(2):
        for dataset in (whole.dataset, states.dataset):
            dataset.set_epoch(epoch)
        for row, expected in zip(states.dataset, whole.dataset, strict=True):
            torch.testing.assert_close(row["teacher_states"], expected["teacher_states"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"seed": 1}, "is of packed windows whose seed is 0, expected 1"),
        ({"single": 0.4}, "is of packed windows whose single is 0.5, expected 0.4"),
        ({"previous_text": 0}, "is of packed windows whose previous_text is 0.7, expected 0"),
        ({"dataset": recordings(9)}, "is of packed windows whose number is 4, expected 7"),
        (
            {"dataset": recordings().map(lambda row: {"transcription": "other"})},
            "is of packed windows whose hash of utterances is ",
        ),
        ({"dataset": recordings(first_seed=50)}, "is of other audio at window 0 of epoch 0"),
    ],
)
def test_a_cache_of_another_plan_is_refused(teacher, tiny_processor, tmp_path, arguments, error):
    cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path, epochs=2)
    other = packed(tiny_processor, **arguments)
    for call in (
        lambda: load_teacher_states(other, tmp_path),
        lambda: cache_teacher_states(other, teacher, tiny_processor, tmp_path, epochs=2),
    ):
        with pytest.raises(ValueError, match=error) as raised:
            call()
        assert "give another cache_dir, or delete this one" in str(raised.value)


def test_a_cache_of_other_epochs_or_of_prepared_rows_is_refused(teacher, tiny_processor, tmp_path):
    windows = packed(tiny_processor)
    cache_teacher_states(windows, teacher, tiny_processor, tmp_path / "windows", epochs=1)
    with pytest.raises(ValueError, match="is of packed windows whose epochs is 1, expected 2"):
        cache_teacher_states(windows, teacher, tiny_processor, tmp_path / "windows", epochs=2)
    rows = datasets.Dataset.from_list([{name: windows[0][name] for name in ("input_features", "labels")}])
    with pytest.raises(ValueError, match="is of packed windows, expected a prepared dataset"):
        load_teacher_states(rows, tmp_path / "windows")
    cache_teacher_states(rows, teacher, tiny_processor, tmp_path / "rows")
    with pytest.raises(ValueError, match="is of a prepared dataset, expected packed windows"):
        load_teacher_states(windows, tmp_path / "rows")


def test_states_of_changed_rows_are_not_used(teacher, tiny_processor, tmp_path):
    """A window beyond those that are checked when the cache is opened."""
    states = cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path, epochs=1)
    assert len(states.dataset[-1]["teacher_states"]) > 0
    states.dataset._windows.packed._samples = lambda row, times: noise(0.2, seed=row + 50)
    with pytest.raises(ValueError, match=r"were cached with other audio at window 3 of epoch 0.*cache them again"):
        states.dataset[-1]
    with pytest.raises(IndexError):
        states.dataset[4]


def test_features_of_another_cpu_are_the_same_audio(teacher, tiny_processor, tmp_path):
    states = cache_teacher_states(packed(tiny_processor), teacher, tiny_processor, tmp_path, epochs=1)
    window = states.dataset._windows.packed.window
    states.dataset._windows.packed.window = lambda *at: (
        (row := window(*at)) | {"input_features": row["input_features"] + 1e-6}
    )
    assert len(states.dataset) == len([*states.dataset])


def test_the_number_of_epochs_must_be_given(teacher, tiny_processor, tmp_path):
    windows = packed(tiny_processor)
    for epochs, error in ((None, "give epochs, those of the training"), (0, "epochs is 0, expected at least 1")):
        with pytest.raises(ValueError, match=error):
            cache_teacher_states(windows, teacher, tiny_processor, tmp_path / "cache", epochs=epochs)
    rows = datasets.Dataset.from_list([{name: windows[0][name] for name in ("input_features", "labels")}])
    with pytest.raises(ValueError, match="epochs is for packed utterances"):
        cache_teacher_states(rows, teacher, tiny_processor, tmp_path / "cache", epochs=1)
    stream = packed(tiny_processor, recordings().to_iterable_dataset())
    with pytest.raises(TypeError, match="is a PackedStream, expected"):
        cache_teacher_states(stream, teacher, tiny_processor, tmp_path / "cache", epochs=1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("languages", [("ca",), ("ca", "ro")])
def test_a_training_of_more_epochs_than_are_cached_does_not_begin(
    teacher, readable_whisper, tiny_processor, tmp_path, languages
):
    dataset = datasets.concatenate_datasets([recordings(4, language) for language in languages])
    states = cache_teacher_states(
        packed(tiny_processor, dataset), teacher, tiny_processor, tmp_path / "cache", epochs=1
    )
    one = trainer(clsr(readable_whisper(), languages), states, states.dataset, tiny_processor, tmp_path)
    with pytest.raises(ValueError, match="cached for 1 epochs, and the training has 2"):
        one.train()
    assert one.state.global_step == 0
    with pytest.raises(ValueError, match="cached for 1 epochs, and epoch 2 was asked for"):
        states.dataset.set_epoch(1)
    one = trainer(
        clsr(readable_whisper(), languages), states, states.dataset, tiny_processor, tmp_path, num_train_epochs=1
    )
    assert one.train().global_step == len(languages)


def test_a_teacher_of_another_vocabulary_reads_the_prompt_in_its_own(tiny_whisper, tiny_processor, tmp_path):
    """As large-v3: `<|yue|>` shifts the special tokens behind it, such as `<|startofprev|>`."""
    yue = SPECIAL_TOKENS.index("<|translate|>")
    symbols = [*bytes_to_unicode().values(), *SPECIAL_TOKENS[:yue], "<|yue|>", *SPECIAL_TOKENS[yue:]]
    tokenizer = WhisperTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])
    processor = WhisperProcessor(WhisperFeatureExtractor(128, chunk_length=1), tokenizer)
    teacher = tiny_whisper(init_std=0.3, num_mel_bins=128, vocab_size=len(tokenizer))
    windows = packed(tiny_processor, previous_text=1, teacher_processor=processor)
    states = cache_teacher_states(windows, teacher, processor, tmp_path, epochs=1)
    row = next(row for row in states.dataset if "prompt_ids" in row)
    start = teacher.config.decoder_start_token_id
    prompt = tokenizer.convert_tokens_to_ids(["<|startofprev|>"]) + row["prompt_ids"][1:]
    inputs = torch.tensor([[*prompt, start, *row["teacher_labels"][:-1]]])
    features = torch.as_tensor(row["teacher_input_features"])[None]
    with torch.no_grad():
        expected = teacher.model(input_features=features, decoder_input_ids=inputs).last_hidden_state[0, len(prompt) :]
    found = row["teacher_states"].view(len(row["labels"]), -1)
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-2)
    header = json.loads((tmp_path / "teacher" / "teacher.json").read_text())
    assert header["windows"]["epochs"] == 1
