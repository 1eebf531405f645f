"""A training whose batches, teacher, student or gradients are not finite stops before the optimizer's step."""

import pytest
import torch
from helpers import clsr
from training import adapter_weights, collate, distiller, make_dataset

from peft_clsr.distillation.finite import FiniteChecks, NotFiniteError

NAN = float("nan")


def broken_features(model, teacher, dataset):
    dataset[2]["input_features"][5, 7] = NAN
    return "input features of example 3 of 4"


def broken_teacher(model, teacher, dataset):
    teacher.model.decoder.layer_norm.weight.data.fill_(float("inf"))  # an overflow of float16
    return "teacher's decoder states of examples 1, 2, 3, 4 of 4"


def broken_output_layer_of_the_teacher(model, teacher, dataset):
    teacher.proj_out.weight.data[3, 3] = NAN
    teacher.model.decoder.embed_tokens = torch.nn.Embedding(*teacher.proj_out.weight.shape)  # else tied
    return "distillation loss of batch 1 of 1"


def broken_student(model, teacher, dataset):
    model.get_base_model().model.decoder.layer_norm.weight.data[0] = NAN
    return "student's decoder states of examples 1, 2, 3, 4 of 4"


@pytest.mark.parametrize(
    "break_it", [broken_features, broken_teacher, broken_output_layer_of_the_teacher, broken_student]
)
def test_what_is_not_finite_is_named_and_the_weights_stay(readable_whisper, tmp_path, break_it):
    model, teacher, dataset = clsr(readable_whisper()), readable_whisper(seed=1), make_dataset(size=4)
    named = break_it(model, teacher, dataset)
    before = adapter_weights(model)
    trainer = distiller(model, teacher, tmp_path, dataset, max_steps=3, train_sampling_strategy="sequential")
    with pytest.raises(NotFiniteError, match="step 1") as raised:
        trainer.train()
    assert named in str(raised.value) and "weights are those after 0 steps" in str(raised.value)
    assert all(torch.equal(p, before[name]) for name, p in adapter_weights(model).items())


def test_a_later_micro_batch_is_named_with_its_labels_and_earlier_steps_are_kept(readable_whisper, tmp_path):
    def train(dataset, folder, max_steps):
        model = clsr(readable_whisper())
        trainer = distiller(
            model,
            None,
            folder,
            dataset,
            max_steps=max_steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
        )
        return model, trainer

    good, trainer = train(make_dataset(size=8), tmp_path / "good", 1)
    trainer.train()
    dataset = make_dataset(size=8)
    dataset[3]["input_features"][0, 0] = NAN
    model, trainer = train(dataset, tmp_path / "broken", 4)
    with pytest.raises(NotFiniteError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "example 1 of 1 in batch 2 of 2 in step 2" in message and str(dataset[3]["labels"].tolist()) in message
    assert all(torch.equal(p, adapter_weights(good)[name]) for name, p in adapter_weights(model).items())


def test_states_that_are_not_used_may_be_anything(readable_whisper, tmp_path, monkeypatch):
    module = "peft_clsr.distillation.teachers.teacher.teacher_decoder_states"

    def states(teacher, features, labels, decoder_input_ids):
        return torch.where(labels[..., None] == -100, NAN, 0.1).expand(-1, -1, 16)

    monkeypatch.setattr(module, states)
    model, dataset = clsr(readable_whisper()), make_dataset(lengths=(2, 5))
    distiller(model, readable_whisper(seed=1), tmp_path, dataset, max_steps=1).train()
    assert all(p.isfinite().all() for p in adapter_weights(model).values())


class Scaler:
    """Only its presence counts."""


def test_gradients_that_are_not_finite_stop_the_step_unless_a_scaler_skips_it(readable_whisper, tmp_path):
    model = clsr(readable_whisper())
    before = adapter_weights(model)
    weight = next(p for name, p in model.named_parameters() if "decoder.layers.1.fc2.clsr_expert" in name)
    weight.register_hook(lambda gradient: gradient * float("inf"))
    trainer = distiller(model, None, tmp_path, max_steps=1)
    with pytest.raises(NotFiniteError, match="gradients of step 1"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in adapter_weights(model).items())
    trainer.accelerator.scaler = Scaler()
    FiniteChecks(trainer.accelerator).check_gradients(torch.tensor(float("inf")), step=0, is_step_made=False)


def test_all_processes_stop(readable_whisper, tmp_path, monkeypatch):
    trainer = distiller(clsr(readable_whisper()), None, tmp_path)
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda value, reduction: value + 1)  # one is broken elsewhere
    checks = FiniteChecks(trainer.accelerator)
    checks.flags = {"cross-entropy": torch.tensor(True)}
    checks.end_batch(collate(make_dataset())["labels"])
    with pytest.raises(NotFiniteError, match="another process in step 8"):
        checks.end_step(7, str)
