"""`DistillationTrainer`, and a plain `Seq2SeqTrainer`, on a tiny random Whisper with random features."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import SMALL, clsr, randomize
from training import (
    PARTS,
    adapter_weights,
    base_state,
    collate,
    distiller,
    make_args,
    make_dataset,
    make_uneven_dataset,
)
from transformers import GenerationConfig, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

from peft_clsr import CLSRConfig, DistillationTrainer, DistillationTrainingArguments, GateScheduleCallback
from peft_clsr.distillation import callbacks


@pytest.fixture
def progress_calls(monkeypatch):
    """Collects the values that the callback gives to `set_gate_progress`."""
    calls, original = [], callbacks.set_gate_progress

    def record(model, progress):
        calls.append(progress)
        return original(model, progress)

    monkeypatch.setattr(callbacks, "set_gate_progress", record)
    return calls


def test_training_overfits_eight_utterances_and_leaves_the_base_bit_identical(readable_whisper, tmp_path):
    torch.manual_seed(0)
    model = clsr(readable_whisper(), gate_noise=1.0, gate_budget=0.9, gate_dim=16)
    before, adapter_before = base_state(model), adapter_weights(model)
    trainer = distiller(
        model,
        readable_whisper(seed=1),
        tmp_path,
        eval_dataset=make_dataset(),
        optim="adamw_torch",
        learning_rate=2e-2,
        lr_scheduler_type="linear",
        max_steps=600,
        per_device_train_batch_size=8,
        kd_weight=0.01,
    )
    trainer.train()

    after = base_state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(not torch.equal(p, adapter_before[name]) for name, p in adapter_weights(model).items())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 600
    assert all(part in entry for entry in logs for part in PARTS)
    assert logs[0]["ce_loss"] > 1.0
    assert sum(entry["ce_loss"] for entry in logs[-10:]) / 10 < 0.1
    assert trainer.evaluate()["eval_ce_loss"] < 0.1  # with hard gates


def test_logged_loss_is_the_weighted_sum_of_its_parts(readable_whisper, tmp_path):
    model = randomize(clsr(readable_whisper(), gate_budget=0.9, budget_weight=0.7))
    trainer = distiller(
        model, readable_whisper(seed=1), tmp_path, max_steps=3, kd_weight=2.0, ce_weight=0.5, temperature=2.0
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        expected = 0.5 * entry["ce_loss"] + 2.0 * entry["kd_loss"] + 0.7 * entry["budget_loss"]
        assert entry["loss"] == pytest.approx(expected, abs=2e-3)
        assert entry["budget_loss"] == pytest.approx(abs(entry["gate_mean"] - 0.9), abs=2e-3)


def test_logged_parts_are_those_of_the_first_batch_by_hand(readable_whisper, tmp_path):
    dataset = make_dataset(size=4, lengths=(3, 6))
    model, teacher = randomize(clsr(readable_whisper())), readable_whisper(seed=1)
    reference = copy.deepcopy(model).train()
    trainer = distiller(model, teacher, tmp_path, dataset=dataset, max_steps=1, temperature=2.0, kd_loss="kl")
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)

    batch = collate(dataset)
    keep = batch["labels"] != -100
    with torch.no_grad():
        logits = reference(**batch).logits[keep]
        teacher_logits = readable_whisper(seed=1)(**batch).logits[keep]
    ce = F.cross_entropy(logits, batch["labels"][keep])
    kd = 4 * F.kl_div(
        (logits / 2).log_softmax(-1), (teacher_logits / 2).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert entry["ce_loss"] == pytest.approx(ce.item(), abs=2e-3)
    assert entry["kd_loss"] == pytest.approx(kd.item(), abs=2e-3)
    assert entry["budget_loss"] == pytest.approx(reference.base_model.budget_loss().item(), abs=2e-3)


def test_evaluation_returns_every_part_with_hard_gates(readable_whisper, tmp_path):
    dataset = make_dataset(size=6, lengths=(3, 6, 4))  # batches of four and two: means are over tokens
    model = randomize(clsr(readable_whisper()))
    trainer = distiller(model, readable_whisper(seed=1), tmp_path, eval_dataset=dataset, kd_loss="kl")
    metrics = trainer.evaluate()
    assert {f"eval_{part}" for part in PARTS} <= metrics.keys()

    batch = collate(dataset)
    keep = batch["labels"] != -100
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits[keep]
        teacher_logits = readable_whisper(seed=1)(**batch).logits[keep]
    ce = F.cross_entropy(logits, batch["labels"][keep])
    kd = F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True, reduction="batchmean")
    assert metrics["eval_ce_loss"] == pytest.approx(ce.item(), abs=1e-4)
    assert metrics["eval_kd_loss"] == pytest.approx(kd.item(), abs=1e-4)
    assert 0 < metrics["eval_gate_mean"] < 1
    assert metrics["eval_budget_loss"] >= 0
    logged = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    assert {f"eval_{part}" for part in PARTS} <= logged.keys()


def test_evaluation_does_not_depend_on_the_batch_size(readable_whisper, tmp_path):
    dataset = make_dataset(size=6, lengths=(3, 9, 4))
    metrics = []
    for batch_size in (6, 4, 1):
        model = randomize(clsr(readable_whisper(), gate_budget=0.4, budget_weight=0.5))
        trainer = distiller(
            model,
            readable_whisper(seed=1),
            tmp_path,
            eval_dataset=dataset,
            per_device_eval_batch_size=batch_size,
            label_smoothing_factor=0.1,
            kd_weight=2.0,
        )
        metrics.append({key: value for key, value in trainer.evaluate().items() if key[5:] in (*PARTS, "loss")})
    for other in metrics[1:]:
        assert other == pytest.approx(metrics[0], abs=1e-5)
    parts = {key.removeprefix("eval_"): value for key, value in metrics[0].items()}
    assert parts["budget_loss"] == pytest.approx(abs(parts["gate_mean"] - 0.4), abs=1e-6)
    weighted = parts["ce_loss"] + 2 * parts["kd_loss"] + 0.5 * parts["budget_loss"]
    assert parts["loss"] == pytest.approx(weighted, abs=1e-5)
    batch = collate(dataset)
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    unsmoothed = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert parts["ce_loss"] == pytest.approx(unsmoothed.item(), abs=1e-4)


def test_a_second_training_starts_with_clean_logs(readable_whisper, tmp_path):
    trainer = distiller(
        randomize(clsr(readable_whisper())), readable_whisper(seed=1), tmp_path, max_steps=3, logging_steps=2
    )
    trainer.train()
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    expected = entry["ce_loss"] + 32 * entry["kd_loss"] + entry["budget_loss"]
    assert entry["loss"] == pytest.approx(expected, abs=2e-3)


def test_the_best_checkpoint_is_loaded_at_the_end(readable_whisper, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:  # after the evaluation of step 2
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "clsr_expert" in name:
                            parameter.mul_(3.0)

    trainer = distiller(
        clsr(readable_whisper()),
        readable_whisper(),  # its own base: nothing is lost before the spoiling
        tmp_path,
        eval_dataset=make_dataset(),
        callbacks=[Spoil()],
        max_steps=4,
        kd_weight=2.0,
        learning_rate=1e-6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_kd_loss",
    )
    trainer.train()
    losses = [entry["eval_kd_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(losses[:2]) < 1e-3 and min(losses[2:]) > 0.1
    assert trainer.evaluate()["eval_kd_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "clsr_" in name)


def test_evaluation_during_training_does_not_mix_with_the_training_logs(readable_whisper, tmp_path):
    model = randomize(clsr(readable_whisper()))
    trainer = distiller(
        model,
        readable_whisper(seed=1),
        tmp_path,
        eval_dataset=make_dataset(seed=9),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=2,
        learning_rate=0.0,
        per_device_train_batch_size=8,
    )
    trainer.train()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    evaluation = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(training) == len(evaluation) == 2
    # Nothing is learned at a learning rate of 0, so the means over two equal steps are equal.
    for part in PARTS:
        assert training[0][part] == pytest.approx(training[1][part], abs=2e-3)
        assert evaluation[0][f"eval_{part}"] == pytest.approx(evaluation[1][f"eval_{part}"], abs=1e-6)
    assert training[0]["ce_loss"] != pytest.approx(evaluation[0]["eval_ce_loss"], abs=1e-2)


def test_teacher_stays_frozen_in_evaluation_mode_and_without_gradient(readable_whisper, tmp_path):
    teacher = readable_whisper(seed=1).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    modes = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            modes.append(any(module.training for module in teacher.modules()))

    model = clsr(readable_whisper())
    trainer = distiller(model, teacher, tmp_path, max_steps=2, callbacks=[Watch()])
    seen = []
    teacher.register_forward_hook(lambda module, args, output: seen.append(output.logits.requires_grad))
    trainer.train()
    assert modes == [False, False]
    assert seen and not any(seen)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())


@pytest.mark.parametrize("kd_loss", ["js", "kl"])
def test_a_teacher_equal_to_the_student_gives_no_distillation_loss(readable_whisper, tmp_path, kd_loss):
    dataset = make_dataset(lengths=(3, 6))
    model = clsr(readable_whisper())
    trainer = distiller(
        model, readable_whisper(), tmp_path, dataset=dataset, eval_dataset=dataset, max_steps=1, kd_loss=kd_loss
    )
    assert trainer.evaluate()["eval_kd_loss"] == pytest.approx(0.0, abs=1e-6)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["kd_loss"] == pytest.approx(0.0, abs=1e-6)
    assert first["ce_loss"] > 1


def test_wrong_arguments_class_and_loss_function_are_refused(tiny_whisper, tmp_path):
    model = clsr(tiny_whisper())
    with pytest.raises(TypeError, match="DistillationTrainingArguments"):
        DistillationTrainer(model=model, args=make_args(Seq2SeqTrainingArguments, tmp_path))
    with pytest.raises(ValueError, match="compute_loss_func"):
        args = make_args(DistillationTrainingArguments, tmp_path)
        DistillationTrainer(model=model, args=args, compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="get_peft_model"):
        DistillationTrainer(model=tiny_whisper(), args=make_args(DistillationTrainingArguments, tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("kd_loss", "cosine"), ("temperature", 0.0), ("temperature", -1.0), ("kd_weight", -1.0), ("ce_weight", -1.0)],
)
def test_bad_arguments_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=field) as error:
        DistillationTrainingArguments(output_dir=str(tmp_path), **{field: value})
    assert str(value) in str(error.value)


def test_argument_defaults(tmp_path):
    args = DistillationTrainingArguments(output_dir=str(tmp_path))
    assert isinstance(args, Seq2SeqTrainingArguments)
    assert (args.kd_loss, args.kd_weight, args.ce_weight, args.temperature) == ("js", 32.0, 1.0, 1.0)
    assert args.language_column == "language"


@pytest.mark.parametrize(
    ("metric", "higher_is_better"),
    [
        ("error_rate", False),
        ("eval_error_rate", False),
        ("wer", False),
        ("cer_ja", False),
        ("loss", False),
        ("f1", True),
    ],
)
def test_lower_error_rates_are_better(tmp_path, metric, higher_is_better):
    args = DistillationTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric)
    assert args.greater_is_better == higher_is_better
    args = DistillationTrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=True
    )
    assert args.greater_is_better  # as given


@pytest.mark.parametrize(
    ("cpu", "is_slow"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "aarch64", "bf16": False}, False),  # not measured
        (None, False),  # torch 2.6 cannot tell
    ],
)
def test_bf16_on_a_cpu_without_such_instructions_warns(tmp_path, monkeypatch, recwarn, cpu, is_slow):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if cpu is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    DistillationTrainingArguments(str(tmp_path), bf16=True, use_cpu=True)
    messages = [str(each.message) for each in recwarn if "bf16" in str(each.message)]
    assert len(messages) == is_slow and all("Leave bf16 out" in message for message in messages)
    recwarn.clear()
    DistillationTrainingArguments(str(tmp_path), use_cpu=True)
    assert not [each for each in recwarn if "bf16" in str(each.message)]


# ---------------------------------------------------------------- gradient accumulation


def accumulated_weights(make_trainer, readable_whisper, folder, lengths, model_kwargs):
    """Adapter weights after training with one batch of four, and with two micro-batches of two."""
    results = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        model = randomize(clsr(readable_whisper(), **model_kwargs))
        start = adapter_weights(model)
        trainer = make_trainer(
            model,
            dataset=make_dataset(lengths=lengths),
            folder=folder / str(accumulation),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
        )
        trainer.train()
        results.append((adapter_weights(model), trainer))
    moved = max((results[0][0][name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-2
    return results


@pytest.mark.parametrize("gate_budget", [0.0, 1.0])
def test_plain_seq2seq_trainer_accumulates_gradients_of_equal_micro_batches(readable_whisper, tmp_path, gate_budget):
    def make_trainer(model, dataset, folder, **kwargs):
        return Seq2SeqTrainer(
            model=model,
            args=make_args(Seq2SeqTrainingArguments, folder, **kwargs),
            train_dataset=dataset,
            data_collator=collate,
            callbacks=[GateScheduleCallback()],
        )

    (whole, first), (parts, second) = accumulated_weights(
        make_trainer, readable_whisper, tmp_path, (5,), {"gate_budget": gate_budget, "budget_weight": 2.0}
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (first, second)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize(
    ("lengths", "model_kwargs"),
    [((5,), {"gate_budget": 1.0, "budget_weight": 2.0}), ((2, 9, 4, 5, 7), {"budget_weight": 0.0})],
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_distillation_trainer_accumulates_gradients(
    readable_whisper, tmp_path, lengths, model_kwargs, label_smoothing
):
    """CE and KD with unequal numbers of labels too, where a mean of the micro-batches' means is another number."""

    def make_trainer(model, dataset, folder, **kwargs):
        teacher = readable_whisper(seed=1)
        return distiller(model, teacher, folder, dataset=dataset, label_smoothing_factor=label_smoothing, **kwargs)

    (whole, first), (parts, second) = accumulated_weights(
        make_trainer, readable_whisper, tmp_path, lengths, model_kwargs
    )
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-5, rtol=1e-4)
    for one, other in zip(first.state.log_history, second.state.log_history, strict=True):
        for part in ("loss", "ce_loss", "kd_loss"):
            if part in one:
                assert one[part] == pytest.approx(other[part], abs=2e-3)


@pytest.mark.parametrize("gate_budget", [0.0, 1.0])
def test_the_budget_loss_of_uneven_micro_batches_is_that_of_one_batch(readable_whisper, tmp_path, gate_budget):
    """Batches of unequal audio and labels count by their routed tokens."""
    dataset = make_uneven_dataset()
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = randomize(clsr(readable_whisper(), gate_budget=gate_budget, budget_weight=3.0))
        trainer = distiller(
            model,
            None,
            tmp_path,
            dataset=dataset,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            ce_weight=0.0,
            learning_rate=1.0,
        )
        start = adapter_weights(model)
        trainer.train()
        results.append((adapter_weights(model), [e for e in trainer.state.log_history if "loss" in e]))
    (whole, logs), (parts, other_logs) = results
    assert max((whole[name] - start[name]).abs().max() for name in whole) > 1e-3
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)
    for one, other in zip(logs, other_logs, strict=True):
        for part in ("budget_loss", "gate_mean"):
            assert one[part] == pytest.approx(other[part], abs=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_an_accumulated_step_is_exact_with_micro_batches_on_both_sides_of_the_budget(readable_whisper, tmp_path, bf16):
    """All three losses, uneven labels and audio; also under autocast."""
    dataset = make_uneven_dataset()
    model = randomize(clsr(readable_whisper())).train()
    means = []
    for row in dataset:
        model(**collate([row]))
        means.append(model.base_model.gate_mean().item())
    budget = sorted(means)[1] + 1e-4  # two of the micro-batches have more
    model(**collate(dataset))
    assert abs(model.base_model.gate_mean().item() - budget) > 1e-5

    results = []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        model = randomize(clsr(readable_whisper(), gate_budget=budget, budget_weight=3.0))
        trainer = distiller(
            model,
            readable_whisper(seed=1),
            tmp_path,
            dataset=dataset,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            train_sampling_strategy="sequential",
            bf16=bf16,
        )
        start = adapter_weights(model)
        trainer.train()
        moved = {name: weight - start[name] for name, weight in adapter_weights(model).items()}
        results.append((moved, trainer.state.log_history[0]))
    (whole, log), *others = results
    gate = next(name for name in whole if "clsr_gate_out" in name)
    assert whole[gate].abs().max() > 1e-4
    for parts, other_log in others:
        for name in whole:
            scale = whole[name].abs().max().item()
            # A CPU without bfloat16 instructions rounds more often: up to 3 % were seen.
            torch.testing.assert_close(parts[name], whole[name], atol=(5e-2 if bf16 else 1e-5) * scale, rtol=0)
        for part in ("loss", "ce_loss", "kd_loss", "budget_loss", "gate_mean"):
            assert log[part] == pytest.approx(other_log[part], rel=1e-2 if bf16 else 1e-4, abs=1e-5)


def test_plain_seq2seq_trainer_trains_gates_and_experts(readable_whisper, tmp_path, progress_calls):
    torch.manual_seed(0)
    model = clsr(readable_whisper(), gate_dropout=0.1, expert_dropout=0.1, skip_gate_prob=0.1, gate_noise=1.0)
    before, adapter_before = base_state(model), adapter_weights(model)
    trainer = Seq2SeqTrainer(
        model=model,
        args=make_args(Seq2SeqTrainingArguments, tmp_path, max_steps=30, optim="adamw_torch", learning_rate=1e-2),
        train_dataset=make_dataset(),
        data_collator=collate,
        callbacks=[GateScheduleCallback()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert progress_calls[:30] == pytest.approx([step / 30 for step in range(30)])
    after = base_state(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(not torch.equal(p, adapter_before[name]) for name, p in adapter_weights(model).items())


def by_transformers(base, adapters=("ca",), **config):
    """`clsr`, but with transformers' own `add_adapter`."""
    torch.manual_seed(0)
    for adapter in adapters:
        base.add_adapter(CLSRConfig.paper(**{**SMALL, **config}), adapter)
    base.set_adapter(adapters[0])
    return base


def test_a_model_of_transformers_own_add_adapter_is_trained_as_a_peft_model(
    readable_whisper, tmp_path, progress_calls
):
    def train(model, folder):
        trainer = distiller(
            model,
            readable_whisper(seed=1),
            folder,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            eval_dataset=make_dataset(size=4),
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        trainer.train()
        return trainer

    weights = []
    for make, folder in ((clsr, tmp_path / "a"), (by_transformers, tmp_path / "b")):
        model = make(readable_whisper(), ["ca"], gate_noise=1.0)
        train(model, folder)
        weights.append({name.removeprefix("base_model.model."): p for name, p in adapter_weights(model).items()})
        assert (folder / "checkpoint-4" / "ca" / "adapter_model.safetensors").is_file()
    assert progress_calls[:4] == progress_calls[-4:] == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4])
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-6, rtol=1e-5)

    model.save_pretrained(tmp_path / "own")  # the model itself has the trained weights, and saves them as ever
    again = readable_whisper()
    again.load_adapter(str(tmp_path / "own"), "ca")
    for name, parameter in adapter_weights(again).items():
        assert torch.equal(parameter, weights[1][name])


def test_languages_of_transformers_own_add_adapter_are_trained_each_by_its_batches(readable_whisper, tmp_path):
    model = by_transformers(readable_whisper(), ("ca", "fr"))
    before = adapter_weights(model)
    dataset = make_dataset(languages=("fr",))
    trainer = distiller(model, None, tmp_path, dataset, max_steps=1)
    trainer.train()
    changed = {name for name, p in adapter_weights(model).items() if not torch.equal(p, before[name])}
    assert changed and all(".fr." in name for name in changed)
    assert [*trainer.model.peft_config] == ["ca", "fr"] and trainer.model.get_base_model() is model


def test_plain_seq2seq_trainer_schedules_the_noise_of_transformers_own_add_adapter(
    readable_whisper, tmp_path, progress_calls
):
    model = by_transformers(readable_whisper(), gate_noise=1.0)
    before = adapter_weights(model)
    args = make_args(Seq2SeqTrainingArguments, tmp_path, max_steps=2)
    callback = GateScheduleCallback()
    Seq2SeqTrainer(model, args, train_dataset=make_dataset(), data_collator=collate, callbacks=[callback]).train()
    assert progress_calls == [0, 0.5] and model.clsr_routing.gate_progress == 0.5
    assert any(not torch.equal(p, before[name]) for name, p in adapter_weights(model).items())


# ---------------------------------------------------------------- schedule, resuming, generation


def test_resuming_from_a_checkpoint_keeps_gate_progress_and_weights(readable_whisper, tmp_path, progress_calls):
    def train(folder, resume=None):
        progress_calls.clear()
        torch.manual_seed(0)
        model = clsr(readable_whisper(), gate_noise=5.0)
        trainer = distiller(
            model,
            readable_whisper(seed=1),
            folder,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            optim="adamw_torch",
            learning_rate=1e-2,
        )
        trainer.train(resume_from_checkpoint=resume)
        return adapter_weights(model), list(progress_calls)

    whole, calls = train(tmp_path)
    assert calls[:6] == pytest.approx([step / 6 for step in range(6)])
    resumed, calls = train(tmp_path / "again", resume=str(tmp_path / "checkpoint-3"))
    assert calls[:3] == pytest.approx([3 / 6, 4 / 6, 5 / 6])
    assert resumed.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(resumed[name], whole[name], atol=1e-6, rtol=1e-5)


def test_checkpoints_hold_the_adapter_only(readable_whisper, tmp_path):
    model = clsr(readable_whisper())
    trainer = distiller(model, readable_whisper(seed=1), tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    assert (checkpoint / "ca" / "adapter_model.safetensors").exists()
    assert not list(checkpoint.glob("model*.safetensors")) and not list(checkpoint.glob("pytorch_model*"))


def test_predict_with_generate_returns_tokens_and_loss_parts(readable_whisper, tmp_path):
    dataset = make_dataset(size=5)
    model = randomize(clsr(readable_whisper()))
    trainer = distiller(
        model,
        readable_whisper(seed=1),
        tmp_path,
        eval_dataset=dataset,
        predict_with_generate=True,
        generation_max_length=12,
    )
    prediction = trainer.predict(dataset)
    assert prediction.predictions.shape[0] == 5
    assert (prediction.predictions[:, 12:] == model.config.pad_token_id).all()  # padded by Seq2SeqTrainer
    assert (prediction.label_ids[:, :5] == torch.stack([row["labels"] for row in dataset]).numpy()).all()
    assert {f"test_{part}" for part in PARTS} <= prediction.metrics.keys()
    metrics = trainer.evaluate()
    assert {f"eval_{part}" for part in PARTS} <= metrics.keys()


def test_an_outdated_generation_config_is_named_before_the_training(readable_whisper, tmp_path):
    model = clsr(readable_whisper())
    model.generation_config = model.get_base_model().generation_config = GenerationConfig()
    distiller(model, readable_whisper(seed=1), tmp_path)  # nothing is generated
    with pytest.raises(ValueError, match="outdated generation config, which lacks the languages"):
        distiller(model, readable_whisper(seed=1), tmp_path, predict_with_generate=True)


def test_gradient_checkpointing_trains_to_the_same_weights(readable_whisper, tmp_path):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = randomize(clsr(readable_whisper(), gate_noise=2.0, skip_gate_prob=0.3))
        distiller(
            model,
            readable_whisper(seed=1),
            tmp_path,
            max_steps=3,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        ).train()
        results.append(adapter_weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_trains_adapters_in_float32(readable_whisper, tmp_path, dtype):
    model = clsr(readable_whisper().to(dtype))
    trainer = distiller(
        model, readable_whisper(seed=1), tmp_path, max_steps=8, optim="adamw_torch", learning_rate=1e-2
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(model).values())


def test_logits_of_a_half_precision_base_under_autocast_reach_the_metrics(readable_whisper, tmp_path):
    dataset, seen = make_dataset(size=3), []
    trainer = distiller(
        clsr(readable_whisper().to(torch.bfloat16)), None, tmp_path, dataset=dataset, eval_dataset=dataset, bf16=True
    )
    trainer.compute_metrics = lambda prediction: seen.append(prediction.predictions) or {}
    trainer.evaluate()
    logits = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert logits.shape == (3, 5, trainer.model.config.vocab_size)


def test_a_budget_without_weight_is_logged_alike_in_micro_batches(readable_whisper, tmp_path):
    logged = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = distiller(
            randomize(clsr(readable_whisper(), budget_weight=0.0, gate_budget=0.1)),
            None,
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        logged.append(trainer.state.log_history[0]["budget_loss"])
    assert logged[0] > 0.2
    assert logged[1] == pytest.approx(logged[0], abs=1e-4)


def test_an_output_layer_in_modules_to_save_is_trained_too(readable_whisper, tmp_path):
    model = clsr(readable_whisper(), modules_to_save=["proj_out"])
    before = base_state(model)
    trainer = distiller(model, readable_whisper(seed=1), tmp_path, max_steps=2, label_smoothing_factor=0.1)
    trainer.train()
    after = base_state(model)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved == ["base_model.model.proj_out.modules_to_save.ca.weight"]


def test_a_step_without_any_label_moves_nothing_by_nan(readable_whisper, tmp_path):
    dataset = make_dataset(size=4)
    for row in dataset:
        row["labels"] = torch.full_like(row["labels"], -100)
    model = clsr(readable_whisper())
    distiller(model, readable_whisper(seed=1), tmp_path, dataset=dataset, max_steps=1).train()
    assert all(weight.isfinite().all() for weight in adapter_weights(model).values())


def test_the_smallest_batch_trains_and_evaluates_with_logging_off(readable_whisper, tmp_path):
    """One utterance with one label: the smallest batch there is."""
    dataset = make_dataset(size=1, lengths=(1,))
    trainer = distiller(
        clsr(readable_whisper()),
        readable_whisper(seed=1),
        tmp_path,
        dataset=dataset,
        eval_dataset=dataset,
        max_steps=1,
        logging_strategy="no",
    )
    trainer.train()
    assert trainer.evaluate()["eval_ce_loss"] > 0


def test_every_part_of_the_loss_is_in_tensorboard_and_in_what_other_trackers_take(readable_whisper, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    dataset = make_dataset(size=4)
    trainer = distiller(
        clsr(readable_whisper()),
        readable_whisper(seed=1),
        tmp_path,
        dataset=dataset,
        eval_dataset=dataset,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to="tensorboard",
    )
    trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    logged = [entry for entry in trainer.state.log_history if "kd_loss" in entry]
    for part in PARTS:
        values = [event.value for event in events.Scalars(f"train/{part}")]
        assert values == pytest.approx([entry[part] for entry in logged])
        assert len(events.Scalars(f"eval/{part}")) == 1
    # Weights & Biases takes what `json` takes.
    assert all(type(value) in (int, float) for entry in trainer.state.log_history for value in entry.values())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_labels_longer_than_the_students_decoder_are_refused(tiny_whisper, tmp_path, accumulation):
    model = clsr(tiny_whisper(max_target_positions=12))
    dataset = make_dataset()
    limit = model.config.max_target_positions
    dataset[-1] = {**dataset[-1], "labels": torch.full((limit + 1,), 5)}
    arguments = {"max_steps": 1, "per_device_train_batch_size": len(dataset) // accumulation}
    arguments["train_sampling_strategy"] = "sequential"  # the long one is in the last batch
    trainer = distiller(model, None, tmp_path, dataset, gradient_accumulation_steps=accumulation, **arguments)
    with pytest.raises(
        ValueError, match=r"example \d of the batch has 13 label tokens .*takes 12 .*max_label_length=12"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="has 13 label tokens"):
        trainer.evaluate(dataset)
