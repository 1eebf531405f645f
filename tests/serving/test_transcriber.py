"""A replica, in this process and without Ray."""

import asyncio
import shutil
import threading
import time

import pytest
import torch

pytest.importorskip("ray.serve")

from peft_clsr.inference.experts import load_with_experts
from peft_clsr.inference.subtitles import Transcript
from peft_clsr.inference.transcribe import transcribe_waveforms
from peft_clsr.serving import transcriber as module
from peft_clsr.serving.catalog import make_catalog
from peft_clsr.serving.errors import ApiError
from peft_clsr.serving.settings import Settings


@pytest.fixture
def make_replica(models):
    def build(experts=None, **changes):
        settings = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads(), "replicas": 1}
        settings |= {"batch_size": 8, "max_experts": 2, "max_bytes": 10**6, "max_seconds": 20, "max_queue": 9}
        settings |= {"model": str(models / "tiny"), "name": "tiny", "created": 0, **changes}
        catalog = make_catalog(settings["model"], [str(experts or models / "experts")], [])
        return module.Transcriber(Settings(**settings), catalog)

    return build


def ask(replica, recording, language=None):
    return replica.transcribe(recording.path.read_bytes(), "a", language or recording.language, "transcribe", "", 0.0)


def together(replica, recordings):
    async def scenario():
        answers = [ask(replica, recording) for recording in recordings]
        return await asyncio.gather(*answers, return_exceptions=True)

    return asyncio.run(scenario())


def test_experts_load_at_first_use_and_are_released_when_there_are_many(make_replica, recordings, models):
    replica = make_replica()
    first = [*replica.experts.loaded]
    assert len(first) == 1  # it shows that the experts fit
    short = [recording for recording in recordings if recording.path.stem in ("0", "1", "4", "5", "8", "9", "12")]
    model, processor = load_with_experts(str(models / "tiny"), [str(models / "experts")], {None})
    for _ in range(2):  # a batch of five experts, where two may stay
        answers = together(replica, short)
        assert all(isinstance(answer, Transcript) for answer in answers)
        assert len(replica.experts.loaded) == 2 and len(replica.experts.model.peft_config) == 2
        for recording, answer in zip(short, answers, strict=True):
            waveform = replica._read(recording.path.read_bytes(), "a")
            (expected,) = transcribe_waveforms(model.eval(), processor, [waveform], [recording.language])
            assert answer == expected
    (kept, last) = replica.experts.loaded
    replica.experts.load(kept)
    assert [*replica.experts.loaded] == [last, kept]  # the last used one stays longest


def test_tags_that_clients_make_up_are_kept_nowhere(make_replica, recordings, monkeypatch):
    replica, labels = make_replica(), set()
    monkeypatch.setattr(replica.heard_seconds, "inc", lambda seconds, tags: labels.add(tuple(tags.values())))
    tags = [f"{code}-x-u{number}" for code in ("ca", "fr") for number in range(3)]

    async def scenario():
        return await asyncio.gather(*[ask(replica, recordings[0], tag) for tag in tags])

    answers = asyncio.run(scenario())
    assert [(answer.language, answer.adapter) for answer in answers] == [
        (tag, "ca" if tag.startswith("ca") else None) for tag in tags
    ]
    assert labels == {("ca", "ca"), ("fr", "")}
    assert not replica.experts.model.base_model.routing.warned_of


def test_an_expert_that_cannot_be_loaded_fails_its_requests_alone(make_replica, recordings, models, tmp_path):
    shutil.copytree(models / "experts", tmp_path / "experts")
    replica = make_replica(tmp_path / "experts", max_experts=9)
    (broken,) = tmp_path.glob("experts/ro/*.safetensors")
    broken.write_bytes(broken.read_bytes()[:-99])
    answers = together(replica, recordings[:2])
    assert isinstance(answers[0], Transcript) and isinstance(answers[1], ApiError)
    assert answers[1].status == 500 and "the expert of 'ro' cannot be loaded" in answers[1].message


def test_a_recording_that_breaks_its_batch_fails_alone(make_replica, recordings, monkeypatch):
    replica, sizes = make_replica(max_experts=9), []

    def break_at_ro(model, processor, waveforms, languages, **settings):
        sizes.append(len(waveforms))
        if "ro" in languages:
            raise RuntimeError("out of memory")
        return transcribe_waveforms(model, processor, waveforms, languages, **settings)

    monkeypatch.setattr(module, "transcribe_waveforms", break_at_ro)
    short = [recordings[index] for index in (0, 1, 4)]
    answers = together(replica, short)
    assert sizes == [3, 1, 1, 1]
    assert [type(answer) for answer in answers] == [Transcript, RuntimeError, Transcript]
    replica.check_health()  # it is well


def test_a_replica_whose_accelerator_is_lost_asks_to_be_replaced(make_replica, recordings, monkeypatch):
    class AcceleratorError(RuntimeError):
        pass

    def lose(*arguments, **settings):
        raise AcceleratorError("CUDA error: device-side assert triggered")

    replica = make_replica()
    monkeypatch.setattr(module, "_FATAL", (AcceleratorError,))
    monkeypatch.setattr(module, "transcribe_waveforms", lose)
    assert isinstance(together(replica, recordings[:1])[0], AcceleratorError)
    with pytest.raises(AcceleratorError):
        replica.check_health()


def held_at_first_window(monkeypatch, until):
    """The list of what happens. The first window of a long recording is held until `until()` is true."""
    happened, begun = [], threading.Event()

    def transcribe(model, processor, waveforms, languages, on_window, **settings):
        is_long = len(waveforms[0]) > 16000

        def after_window(*arguments):
            if is_long:
                happened.append("window")
                if len(happened) == 1:
                    begun.set()
                    deadline = time.monotonic() + 20
                    while not until() and time.monotonic() < deadline:
                        time.sleep(0.01)
            on_window(*arguments)

        transcripts = transcribe_waveforms(model, processor, waveforms, languages, on_window=after_window, **settings)
        happened.append("long" if is_long else "short")
        return transcripts

    monkeypatch.setattr(module, "transcribe_waveforms", transcribe)
    return happened, begun


def test_short_recordings_have_their_turn_between_the_windows_of_long_ones(make_replica, recordings, monkeypatch):
    replica = make_replica(max_experts=9)
    happened, begun = held_at_first_window(monkeypatch, lambda: replica.turns._tickets == 2)

    async def scenario():
        long = asyncio.create_task(ask(replica, recordings[3]))
        await asyncio.to_thread(begun.wait, 20)
        return await asyncio.gather(ask(replica, recordings[1]), long)

    assert all(isinstance(answer, Transcript) for answer in asyncio.run(scenario()))
    assert happened[:3] == ["window", "short", "window"] and happened[-1] == "long"


def test_a_long_recording_that_nobody_waits_for_is_stopped(make_replica, recordings, monkeypatch):
    replica, left = make_replica(max_experts=9), threading.Event()
    happened, begun = held_at_first_window(monkeypatch, left.is_set)

    async def scenario():
        long = asyncio.create_task(ask(replica, recordings[3]))
        await asyncio.to_thread(begun.wait, 20)
        long.cancel()
        await asyncio.wait([long])
        left.set()
        return await ask(replica, recordings[1])

    assert isinstance(asyncio.run(scenario()), Transcript)
    assert happened == ["window", "short"]
