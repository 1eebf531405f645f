"""Training on packed utterances: prompts without loss, several languages, new windows in each epoch, resumption."""

import datasets
import pytest
import torch
from helpers import clsr, noise, randomize
from training import adapter_weights, make_args

from peft_clsr import (
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
    pack_utterances,
)


def recordings(number=12):
    return datasets.Dataset.from_list(
        [
            {
                "audio": {"array": noise(0.2, seed=index), "sampling_rate": 16000},
                "transcription": f"text {index}",
                "language": ("ca", "ro")[index % 2],
            }
            for index in range(number)
        ]
    )


def packed(processor, **arguments):
    return pack_utterances(recordings(), processor, max_seconds=1, **{"timestamps": 0, **arguments})


def trainer(model, processor, folder, dataset, teacher=None, **arguments):
    return DistillationTrainer(
        model=model,
        teacher_model=teacher,
        args=make_args(
            DistillationTrainingArguments,
            folder,
            per_device_train_batch_size=2,
            **{"num_train_epochs": 2, **arguments},
        ),
        train_dataset=dataset,
        data_collator=DataCollatorSpeechSeq2SeqWithPadding(processor),
    )


def test_a_prompt_is_read_and_has_no_loss(readable_whisper, tiny_processor):
    rows = [row for row in packed(tiny_processor, previous_text=1) if "prompt_ids" in row]
    batch = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor)(rows[:2])
    start = tiny_processor.tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    for row, inputs, labels in zip(rows, batch["decoder_input_ids"].tolist(), batch["labels"].tolist(), strict=False):
        prompt = row["prompt_ids"]
        assert inputs[: len(prompt) + 1] == [*prompt, start]
        assert labels[: len(prompt)] == [-100] * len(prompt)
        assert [token for token in labels if token != -100] == row["labels"]
        at = len(prompt) + 1
        assert inputs[at : at + len(row["labels"]) - 1] == row["labels"][:-1]
    model = readable_whisper()
    inputs = {name: batch[name] for name in ("input_features", "decoder_input_ids", "labels")}
    alone = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor)(
        [{name: value for name, value in row.items() if name != "prompt_ids"} for row in rows[:2]]
    )
    with torch.no_grad():
        loss = model(**inputs).loss.item()
        without = model(input_features=alone["input_features"], labels=alone["labels"]).loss.item()
    assert loss != pytest.approx(without, rel=1e-4)  # the prompt is read


def test_rows_without_a_prompt_may_share_a_batch_with_others(tiny_processor):
    rows = list(packed(tiny_processor, previous_text=1))
    with_prompt = next(row for row in rows if "prompt_ids" in row)
    without = {name: value for name, value in with_prompt.items() if name != "prompt_ids"}
    batch = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor)([with_prompt, without])
    assert batch["decoder_input_ids"].shape == batch["labels"].shape
    assert batch["labels"][1, : len(without["labels"])].tolist() == without["labels"]


def test_the_teacher_reads_the_prompt_too(readable_whisper, tiny_processor, tmp_path):
    model = randomize(clsr(readable_whisper(), ("ca", "ro")))
    with_prompts = trainer(model, tiny_processor, tmp_path, packed(tiny_processor, previous_text=1), model)
    rows = [row for row in with_prompts.train_dataset if "prompt_ids" in row and row["language"] == "ca"]
    batch = with_prompts.data_collator(rows[:2])
    model.eval()
    with torch.no_grad():
        targets = with_prompts._teacher_targets(dict(batch), batch["labels"], True)
        reads = readable_whisper().model(
            input_features=batch["input_features"], decoder_input_ids=batch["decoder_input_ids"]
        )
    expected = reads.last_hidden_state[batch["labels"] != -100]
    assert torch.allclose(targets.hidden_states, expected, atol=1e-4)


def test_each_language_trains_its_expert_on_its_windows(readable_whisper, tiny_processor, tmp_path):
    model = clsr(readable_whisper(), ("ca", "ro"))
    before = adapter_weights(model)
    windows = packed(tiny_processor, previous_text=0.5)
    done = trainer(model, tiny_processor, tmp_path, windows).train()
    batches = sum(-(-windows.languages.count(language) // 2) for language in ("ca", "ro"))
    assert done.global_step == 2 * batches
    for language in ("ca", "ro"):
        after = adapter_weights(model, language)
        assert any(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("languages", [("ca",), ("ca", "ro")])
def test_each_epoch_has_new_windows(readable_whisper, tiny_processor, tmp_path, languages):
    seen = []

    class Recording(DataCollatorSpeechSeq2SeqWithPadding):
        def __call__(self, features):
            seen.extend(feature["text"] for feature in features)
            return super().__call__(features)

    dataset = recordings().filter(lambda row: row["language"] in languages)
    windows = pack_utterances(dataset, tiny_processor, max_seconds=1, timestamps=0)
    one = trainer(clsr(readable_whisper(), languages), tiny_processor, tmp_path, windows)
    one.data_collator = Recording(tiny_processor)
    one.train()
    first, second = seen[: len(windows)], seen[len(windows) :]
    assert sorted(" ".join(first).split()) == sorted(" ".join(second).split())
    assert sorted(first) != sorted(second)


def test_a_resumed_run_ends_with_the_same_weights(readable_whisper, tiny_processor, tmp_path):
    def run(folder, resume=None, **arguments):
        model = clsr(readable_whisper(), ("ca", "ro"))
        one = trainer(model, tiny_processor, folder, packed(tiny_processor), save_strategy="steps", **arguments)
        one.train(resume_from_checkpoint=resume)
        return adapter_weights(model), one.state.max_steps

    whole, steps = run(tmp_path / "whole", save_steps=1000)
    middle = steps // 2 + 1  # in the second epoch
    run(tmp_path / "cut", save_steps=middle)
    resumed, _ = run(tmp_path / "cut", tmp_path / "cut" / f"checkpoint-{middle}", save_steps=1000)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_stream_of_windows_trains(readable_whisper, tiny_processor, tmp_path):
    model = clsr(readable_whisper(), ("ca", "ro"))
    before = adapter_weights(model)
    stream = pack_utterances(recordings().to_iterable_dataset(), tiny_processor, max_seconds=1, timestamps=0)
    trainer(model, tiny_processor, tmp_path, stream, num_train_epochs=1, max_steps=6).train()
    after = adapter_weights(model)
    assert any(not torch.equal(after[name], before[name]) for name in after)
