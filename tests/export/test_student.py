"""The student of a frozen routing: it starts as the frozen model, and learns from the routed one."""

import copy

import pytest
import torch
from freezing import EXPERT, MIXED, SHARED, assert_same_state, logits_of, state_of

from peft_clsr import (
    CLSRLayer,
    DataCollatorSpeechSeq2SeqWithPadding,
    DistillationTrainer,
    DistillationTrainingArguments,
)

MIX = [EXPERT, MIXED, MIXED, SHARED]


@pytest.fixture
def train(dataset, tiny_processor, tmp_path):
    """Trains a student with a teacher alone."""

    def call(student, teacher, steps=30, **settings):
        defaults = {"learning_rate": 1e-2, "max_steps": steps, "per_device_train_batch_size": 3, "ce_weight": 0.0}
        args = DistillationTrainingArguments(
            output_dir=str(tmp_path / "training"),
            **(defaults | settings),
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        collator = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="ca")
        trainer = DistillationTrainer(
            model=student, args=args, teacher_model=teacher, train_dataset=dataset, data_collator=collator
        )
        trainer.train()

    return call


@pytest.fixture
def divergence(dataset, tiny_processor):
    """Mean KL divergence of a model's predictions of the transcripts from the teacher's, in nats."""
    batch = DataCollatorSpeechSeq2SeqWithPadding(tiny_processor, language="ca")(list(dataset))
    inputs = {"input_features": batch["input_features"], "labels": batch["labels"]}

    @torch.no_grad()
    def measure(model, teacher):
        ours, theirs = (one.eval()(**inputs).logits.log_softmax(-1) for one in (model, teacher))
        return float((theirs.exp() * (theirs - ours)).sum(-1)[inputs["labels"] != -100].mean())

    return measure


@pytest.mark.parametrize("rank", [None, 3])
def test_the_student_starts_as_the_frozen_model_and_the_routed_one_stays(routed, freeze, dataset, rank):
    model = routed(MIX, adapters=("ro", "ca"), expert_rank=rank)
    frozen = freeze(model, undecided="majority")
    assert set(frozen.decisions.values()) == {"expert", "shared"}
    before = state_of(model)
    student = frozen.student(model)
    assert_same_state(model, before)
    expected = logits_of(frozen.model, dataset)
    assert not torch.allclose(logits_of(model, dataset), expected, atol=0.01)
    assert torch.allclose(logits_of(student, dataset), expected, atol=1e-4)
    assert torch.allclose(logits_of(student.train(), dataset), expected, atol=1e-4)
    assert list(student.peft_config) == ["ca"]


def test_training_brings_the_frozen_form_to_the_routed_model(routed, freeze, train, dataset, divergence):
    model = routed(MIX, expert_rank=3).requires_grad_(False)
    model.peft_config["ca"].inference_mode = True  # as of an adapter that was loaded
    expected = logits_of(model, dataset)
    frozen = freeze(model, undecided="majority")
    student = frozen.student(model)
    train(student, model)
    assert torch.equal(logits_of(model, dataset), expected)
    recovered = freeze(student)
    assert set(recovered.decisions.values()) == {"expert"}
    assert torch.allclose(logits_of(recovered.model, dataset), logits_of(student.eval(), dataset), atol=1e-4)
    assert divergence(recovered.model, model) < divergence(frozen.model, model) / 2


def test_training_does_not_move_the_gates(routed, freeze, train):
    model = routed(MIX, expert_rank=3)
    student = freeze(model, undecided="majority").student(model)
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, CLSRLayer)}
    before = {name: copy.deepcopy(layer.state_dict()) for name, layer in layers.items()}
    train(student, model, steps=3)
    for name, layer in layers.items():
        after = layer.state_dict()
        assert all(torch.equal(after[key], weight) for key, weight in before[name].items() if "gate" in key), name
        assert not torch.equal(after["clsr_expert_B.ca.weight"], before[name]["clsr_expert_B.ca.weight"]), name


def test_what_cannot_be_a_student_is_refused(routed, freeze, tiny_whisper):
    model = routed(MIX, expert_rank=3)
    with pytest.raises(ValueError, match="2 of 4 modules are left routed, and a student has no gates"):
        freeze(model).student(model)
    frozen = freeze(model, undecided="majority")
    with pytest.raises(ValueError, match="no adapter 'ca': give the routed model that was frozen"):
        frozen.student(frozen.model)
    with pytest.raises(ValueError, match="'ca' of the model routes other modules than were frozen"):
        frozen.student(routed(MIX, expert_rank=3, layers_to_transform=[0]))
