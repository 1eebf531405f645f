"""Which checkpoint a training resumes from."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import clsr, randomize
from training import adapter_weights, distiller

from peft_clsr.distillation import resumption
from peft_clsr.distillation.resumption import last_checkpoint


def test_a_checkpoint_that_was_not_finished_is_passed_over(readable_whisper, tmp_path, caplog):
    """Its random state is cut, or the trainer's state is not there yet."""

    def train(resume=None):
        model = randomize(clsr(readable_whisper(), expert_dropout=0.5))
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        distiller(model, None, tmp_path, **options).train(resume_from_checkpoint=resume)
        return adapter_weights(model)

    whole = train()
    for step in (3, 4):
        states = tmp_path / f"checkpoint-{step}" / "rng_state.pth", tmp_path / f"checkpoint-{step}/trainer_state.json"
        states[0].write_bytes(states[0].read_bytes()[:100])
        if step == 4:
            states[1].unlink()
    with caplog.at_level(logging.WARNING):
        resumed = train(resume=True)
    assert "checkpoint-4 in" in caplog.text and "is not complete: the training resumes from step 2" in caplog.text
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_without_a_checkpoint_there_is_none(readable_whisper, tmp_path):
    assert last_checkpoint(tmp_path / "nowhere", SimpleNamespace(num_processes=1, process_index=0)) is None
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        distiller(clsr(readable_whisper()), None, tmp_path).train(resume_from_checkpoint=True)


def test_folders_that_are_no_checkpoints_are_passed_over(tmp_path):
    save(tmp_path, 3)
    for name in ("checkpoint-40 (copy)", "checkpoint-best", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-50").write_text("no folder")
    alone = SimpleNamespace(num_processes=1, process_index=0)
    assert last_checkpoint(tmp_path, alone) == str(tmp_path / "checkpoint-3")


def save(folder, step, *processes):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text(json.dumps({}))
    for process in processes:
        torch.save({}, checkpoint / f"rng_state_{process}.pth")


@pytest.fixture
def among_others(monkeypatch):
    """`last_checkpoint` of process 0, with the checkpoints that process 1 has: readable ones, and whole ones."""

    def call(folder, *of_other):
        monkeypatch.setattr(resumption, "gather_object", lambda own: [*own, of_other])
        return last_checkpoint(folder, SimpleNamespace(num_processes=2, process_index=0))

    return call


def test_machines_resume_from_the_last_checkpoint_that_each_of_them_has_whole(among_others, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, 0)
    assert among_others(tmp_path, {1, 2}, {1}) == str(tmp_path / "checkpoint-1")


def test_a_checkpoint_of_fewer_processes_is_taken_with_a_warning(among_others, tmp_path, caplog):
    save(tmp_path, 3, 0)
    assert among_others(tmp_path, {3}, set()) == str(tmp_path / "checkpoint-3")
    assert "has no random state for each of 2 processes" in caplog.text


def test_a_machine_that_does_not_see_the_checkpoints_of_the_first_stops_all(among_others, tmp_path):
    save(tmp_path, 3, 0)
    message = f"the processes 1 do not see the checkpoints of the others in {tmp_path}: use a folder that all machines"
    with pytest.raises(ValueError, match=re.escape(message)):
        among_others(tmp_path, set(), set())
