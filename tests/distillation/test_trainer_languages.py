"""`DistillationTrainer` with several languages in one run."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import clsr, randomize
from training import adapter_weights, collate, distiller, make_dataset
from transformers import EarlyStoppingCallback

from peft_clsr import CLSRConfig, encode_labels, make_compute_metrics

LANGUAGES = ("ca", "bg", "el")


def of_language(dataset, language):
    return [row for row in dataset if row["language"] == language]


def spoken(tokenizer, size, languages):
    """Examples whose labels begin with their language, as `prepare_dataset` makes them."""
    dataset = make_dataset(size=size, languages=languages)
    for index, row in enumerate(dataset):
        row["labels"] = torch.tensor(encode_labels(tokenizer, "ab" * (1 + index % 2), row["language"]))
    return dataset


def test_each_language_trains_its_own_expert_alone(readable_whisper, tmp_path):
    """Each as it would in a run of its own, also with momentum and weight decay."""
    kwargs = {"num_train_epochs": 1, "train_sampling_strategy": "sequential", "optim": "adamw_torch"}
    kwargs |= {"weight_decay": 0.1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    dataset = make_dataset(size=12, lengths=(5, 3, 4), languages=("ca", "bg"))
    together = randomize(clsr(readable_whisper(), LANGUAGES))
    start = adapter_weights(together)
    distiller(together, readable_whisper(seed=1), tmp_path, dataset=dataset, **kwargs).train()
    for language in ("ca", "bg"):
        alone = randomize(clsr(readable_whisper(), LANGUAGES))
        part = of_language(dataset, language)
        distiller(alone, readable_whisper(seed=1), tmp_path, dataset=part, **kwargs).train()
        for name, weight in adapter_weights(alone, language).items():
            assert not torch.equal(weight, start[name])
            torch.testing.assert_close(adapter_weights(together)[name], weight, atol=1e-6, rtol=1e-5)
    for name, weight in adapter_weights(together, "el").items():
        assert torch.equal(weight, start[name])


def test_a_step_of_several_languages_is_the_mean_over_all_their_tokens(readable_whisper, tmp_path):
    """Two micro-batches of two languages; each has the budget of its own mean, weighted by its routed tokens."""
    dataset = make_dataset(size=4, lengths=(5, 2), languages=("ca", "bg"))
    model = randomize(clsr(readable_whisper(), ("ca", "bg"), gate_budget=0.3, budget_weight=2.0))
    expected = {"ce": 0.0, "budget": 0.0}
    tokens = {language: sum(len(row["labels"]) for row in of_language(dataset, language)) for language in ("ca", "bg")}
    routed = {language: 2 * (2 * 50) + 2 * number for language, number in tokens.items()}
    with torch.no_grad():
        model.train()
        for language in ("ca", "bg"):
            batch = collate(of_language(dataset, language))
            batch.pop("language")
            model.set_adapter(language)
            loss, budget_loss = model(**batch).loss, model.base_model.budget_loss()
            expected["ce"] += (loss - 2.0 * budget_loss) * tokens[language] / sum(tokens.values())
            expected["budget"] += budget_loss * routed[language] / sum(routed.values())
    model.set_adapter("ca")
    trainer = distiller(
        model,
        None,
        tmp_path,
        dataset=dataset,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
    )
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["ce_loss"] == pytest.approx(expected["ce"].item(), abs=1e-5)
    assert log["budget_loss"] == pytest.approx(expected["budget"].item(), abs=1e-5)
    assert log["loss"] == pytest.approx((expected["ce"] + 2.0 * expected["budget"]).item(), abs=1e-3)


def test_evaluation_of_mixed_batches_is_that_of_each_language(readable_whisper, tmp_path):
    dataset = make_dataset(size=9, lengths=(5, 3), languages=LANGUAGES)
    model = randomize(clsr(readable_whisper(), LANGUAGES, gate_budget=0.4))
    teacher = readable_whisper(seed=1)
    mixed = distiller(model, teacher, tmp_path, dataset=dataset, eval_dataset=dataset).evaluate()
    labels = {language: sum(len(row["labels"]) for row in of_language(dataset, language)) for language in LANGUAGES}
    expected = dict.fromkeys(("ce_loss", "kd_loss"), 0.0)
    for language in LANGUAGES:
        part = of_language(dataset, language)
        alone = distiller(model, teacher, tmp_path, dataset=part, eval_dataset=part).evaluate()
        for name in expected:
            expected[name] += alone[f"eval_{name}"] * labels[language] / sum(labels.values())
    for name, value in expected.items():
        assert mixed[f"eval_{name}"] == pytest.approx(value, abs=1e-5)


def test_generation_takes_the_language_and_the_expert_of_each_sample(tiny_whisper, tiny_processor, tmp_path):
    dataset = spoken(tiny_processor.tokenizer, 6, ("ca", "bg"))
    model = clsr(tiny_whisper(init_std=0.2), ("ca", "bg"))
    for seed in range(6):
        randomize(model, seed=seed)
    options = {"predict_with_generate": True, "generation_max_length": 12, "generation_num_beams": 2}
    trainer = distiller(model, None, tmp_path, dataset=dataset, eval_dataset=dataset, **options)
    mixed = trainer.predict(dataset).predictions
    for index, row in enumerate(dataset):
        with torch.no_grad():
            model.set_adapter(row["language"])
            tokens = model.eval().generate(
                input_features=row["input_features"][None], language=row["language"], max_length=12, num_beams=2
            )[0]
        assert mixed[index, : len(tokens)].tolist() == tokens.tolist()
    swapped = [{**row, "language": {"ca": "bg", "bg": "ca"}[row["language"]]} for row in dataset]
    assert trainer.predict(swapped).predictions.tolist() != mixed.tolist()


def test_training_stops_early_on_the_mean_wer_and_keeps_the_best_adapters(readable_whisper, tiny_processor, tmp_path):
    dataset = spoken(tiny_processor.tokenizer, 4, ("ca", "bg"))
    model = randomize(clsr(readable_whisper(), ("ca", "bg")))
    trainer = distiller(
        model,
        None,
        tmp_path,
        dataset=dataset,
        eval_dataset=dataset,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        num_train_epochs=8,
        per_device_train_batch_size=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        predict_with_generate=True,
        generation_max_length=8,
        load_best_model_at_end=True,
        metric_for_best_model="wer",
        greater_is_better=False,
        learning_rate=0.0,
    )
    trainer.compute_metrics = make_compute_metrics(tiny_processor)
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_wer" in entry]
    assert len(evaluations) == 2  # nothing is learned at a learning rate of 0
    by_language = [evaluations[0][f"eval_wer_{language}"] for language in ("ca", "bg")]
    assert evaluations[0]["eval_wer"] == pytest.approx(sum(by_language) / 2)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert sorted(name for name, p in model.named_parameters() if p.requires_grad) == sorted(adapter_weights(model))


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_run_resumed_after_any_checkpoint_ends_with_the_same_weights(readable_whisper, tmp_path, stop):
    """Order of batches, gate schedule, skipped gates, noise, dropout and SpecAugment included."""

    def train(folder, resume=None):
        model = clsr(
            readable_whisper(), ("ca", "bg"), gate_noise=5.0, skip_gate_prob=0.3, expert_dropout=0.2, gate_dropout=0.1
        )
        model.config.apply_spec_augment, model.config.mask_time_prob = True, 0.3
        trainer = distiller(
            model,
            readable_whisper(seed=1),
            folder,
            dataset=make_dataset(size=10, lengths=(5, 3), languages=("ca", "bg", "bg")),
            num_train_epochs=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=1,
            optim="adamw_torch",
            learning_rate=1e-2,
            language_temperature=2.0,
        )
        trainer.train(resume_from_checkpoint=resume)
        return adapter_weights(model), trainer.state.global_step

    whole, steps = train(tmp_path)
    assert steps == 6
    resumed, _ = train(tmp_path / "again", resume=str(tmp_path / f"checkpoint-{stop}"))
    for name in whole:
        assert torch.equal(resumed[name], whole[name])


def test_a_stream_of_several_languages_trains_them_all(readable_whisper, tmp_path):
    rows = make_dataset(size=8, languages=("ca", "bg"))
    model = randomize(clsr(readable_whisper(), ("ca", "bg")))
    start, seen = adapter_weights(model), []
    stream = IterableDataset.from_generator(lambda: iter(rows))
    trainer = distiller(model, None, tmp_path, dataset=stream, max_steps=4, per_device_train_batch_size=2)
    trainer.data_collator = lambda examples: seen.append({row["language"] for row in examples}) or collate(examples)
    trainer.train()
    assert len(seen) == 4 and all(len(languages) == 1 for languages in seen)
    assert all(not torch.equal(weight, start[name]) for name, weight in adapter_weights(model).items())


@pytest.mark.parametrize("kind", ["dataset", "stream"])
def test_a_temperature_without_effect_is_said(readable_whisper, tmp_path, kind):
    rows = make_dataset(size=8, languages=("ca", "ca-valencia", "ca"))
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if kind == "stream" else rows
    options = {"dataset": dataset, "max_steps": 1, "language_temperature": float("inf")}
    message = "language_temperature is inf, and has no effect on " + (
        "a stream" if kind == "stream" else "the training of one adapter"
    )
    with pytest.warns(UserWarning, match=message):
        distiller(clsr(readable_whisper()), None, tmp_path, **options).get_train_dataloader()


def test_batches_group_similar_lengths_on_request(readable_whisper, tmp_path):
    def uneven_batches(strategy):
        options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 2}
        dataset = make_dataset(size=64, lengths=(2, 9, 9))
        loader = distiller(clsr(readable_whisper()), None, tmp_path, dataset=dataset, **options).get_train_dataloader()
        lengths = [(batch["labels"] != -100).sum(dim=1).tolist() for batch in loader]
        assert sorted(sum(lengths, [])) == sorted(len(row["labels"]) for row in dataset)
        return sum(len(set(batch)) > 1 for batch in lengths)

    assert uneven_batches("random") > 8
    assert uneven_batches("group_by_length") <= 5


def test_languages_are_found_by_the_config_too(readable_whisper, tmp_path):
    dataset = Dataset.from_list(
        [{**row, "language": "Catalan"} for row in make_dataset(size=4)], features=None
    ).with_format("torch", columns=["input_features", "labels"], output_all_columns=True)
    model = clsr(readable_whisper(), ("mine", "bg"))
    model.peft_config["mine"].language = "ca"
    model.set_adapter("bg")
    start = adapter_weights(model)
    distiller(model, None, tmp_path, dataset=dataset, max_steps=1).train()
    assert all(torch.equal(weight, start[name]) for name, weight in adapter_weights(model, "bg").items())
    assert any(not torch.equal(weight, start[name]) for name, weight in adapter_weights(model, "mine").items())


def test_gradient_checkpointing_runs_each_language_again_by_its_own_expert(readable_whisper, tmp_path):
    """The recomputation comes in the backward pass, after the forward that was told the languages."""
    results = []
    for checkpointing in (False, True):
        model = randomize(clsr(readable_whisper(), ("ca", "bg"), skip_gate_prob=0.2, expert_dropout=0.2))
        randomize(model, seed=6)
        trainer = distiller(
            model,
            model,
            tmp_path,
            dataset=make_dataset(languages=("bg", "ca")),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        )
        trainer.train()
        results.append(adapter_weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-7, rtol=1e-6)


def test_a_language_that_is_not_the_active_adapter_is_the_only_one_trained(readable_whisper, tmp_path):
    """Whether or not the collator passes the language on."""
    for collator in (collate, lambda rows: {k: v for k, v in collate(rows).items() if k != "language"}):
        model = randomize(clsr(readable_whisper(), ("ca", "bg")))
        start = adapter_weights(model)
        trainer = distiller(model, None, tmp_path, dataset=make_dataset(languages=("bg",)), max_steps=1)
        trainer.data_collator = collator
        trainer.train()
        assert all(torch.equal(weight, start[name]) for name, weight in adapter_weights(model, "ca").items())
        assert any(not torch.equal(weight, start[name]) for name, weight in adapter_weights(model, "bg").items())
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".ca." in name)


def test_batches_without_their_language_are_refused_where_several_are_trained(readable_whisper, tmp_path):
    trainer = distiller(
        clsr(readable_whisper(), ("ca", "bg")), None, tmp_path, dataset=make_dataset(languages=("ca", "bg"))
    )
    trainer.data_collator = lambda rows: {k: v for k, v in collate(rows).items() if k != "language"}
    with pytest.raises(ValueError, match="the batch has no 'language', and there are the adapters ca, bg"):
        trainer.train()


def test_the_best_checkpoint_brings_an_adapter_named_default_back_too(readable_whisper, tmp_path):
    model = randomize(clsr(readable_whisper(), ("default", "ca")))
    model.peft_config["default"].language = "bg"
    dataset = make_dataset(size=4, languages=("ca", "bg"))
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3}
    options |= {"per_device_train_batch_size": 2, "load_best_model_at_end": True}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first, as the loss falls
    trainer = distiller(model, None, tmp_path, dataset=dataset, eval_dataset=dataset, learning_rate=50.0, **options)
    trainer.train()
    best = max(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-5)
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-3")


def test_a_stream_has_an_order_for_each_pass_and_is_resumed_in_any(readable_whisper, tmp_path):
    rows = make_dataset(size=8, languages=("ca", "bg"))

    class Stream(torch.utils.data.IterableDataset):
        epoch, epochs = 0, []

        def set_epoch(self, epoch):
            self.epoch = epoch
            self.epochs.append(epoch)

        def __iter__(self):
            order = torch.randperm(8, generator=torch.Generator().manual_seed(self.epoch))
            return iter([rows[index] for index in order])

    def train(folder, resume=None):
        model = randomize(clsr(readable_whisper(), ("ca", "bg")))
        Stream.epochs = []
        options = {"max_steps": 7, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
        distiller(model, None, folder, dataset=Stream(), **options).train(resume_from_checkpoint=resume)
        return adapter_weights(model), Stream.epochs

    whole, epochs = train(tmp_path)
    assert epochs[:4] == [0, 1, 2, 3]
    for stop in (1, 4, 6):
        resumed, _ = train(tmp_path / str(stop), resume=str(tmp_path / f"checkpoint-{stop}"))
        assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


# ---------------------------------------------------------------- refusals


def test_a_language_without_an_adapter_is_refused_with_the_remedy(readable_whisper, tmp_path):
    model = clsr(readable_whisper(), ("ca", "bg"))
    with pytest.raises(ValueError, match=r"language 'el' has no adapter on the model \(adapters: ca, bg\): add one"):
        distiller(model, None, tmp_path, dataset=make_dataset(languages=LANGUAGES))
    trainer = distiller(model, None, tmp_path, dataset=make_dataset(languages=("ca", "bg")))
    with pytest.raises(ValueError, match="'el' has no adapter"):
        trainer.evaluate(make_dataset(languages=LANGUAGES))


def test_an_adapter_of_another_language_is_not_trained(readable_whisper, tmp_path):
    with pytest.raises(ValueError, match="'bg' has no adapter"):
        distiller(clsr(readable_whisper()), None, tmp_path, dataset=make_dataset(languages=("bg",)))


def test_a_dataset_without_languages_is_refused_where_there_are_several_adapters(readable_whisper, tmp_path):
    with pytest.raises(ValueError, match="no column 'language', which tells which of the adapters ca, bg"):
        distiller(clsr(readable_whisper(), ("ca", "bg")), None, tmp_path, dataset=make_dataset())


def test_an_empty_dataset_is_refused(readable_whisper, tmp_path):
    with pytest.raises(ValueError, match="the training dataset is empty"):
        distiller(clsr(readable_whisper()), None, tmp_path, dataset=[])


def test_grouping_raw_examples_by_length_is_refused_with_the_remedy(readable_whisper, tmp_path):
    dataset = [{"audio": "a.wav", "text": "a"}, {"audio": "b.wav", "text": "b"}]
    trainer = distiller(
        clsr(readable_whisper()), None, tmp_path, dataset=dataset, train_sampling_strategy="group_by_length"
    )
    with pytest.raises(ValueError, match=r"neither 'length' \(length_column_name\) nor 'labels'"):
        trainer.train()


def test_modules_to_save_of_several_languages_are_refused(readable_whisper, tmp_path):
    model = clsr(readable_whisper(), ("ca",), modules_to_save=["layer_norm"])
    model.add_adapter("bg", CLSRConfig.paper(modules_to_save=["layer_norm"]))
    with pytest.raises(ValueError, match="one after the other"):
        distiller(model, None, tmp_path, dataset=make_dataset(languages=("ca", "bg")))
