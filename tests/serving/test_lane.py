"""Requests that wait, and threads that take turns."""

import asyncio
import threading
import time

import numpy as np
import pytest

from peft_clsr.serving.lane import Job, Lane
from peft_clsr.serving.turns import Turns


def job(name, task="transcribe", prompt=""):
    return Job(np.zeros(1), name, task, prompt, 0.0)


class Model:
    """Runs batches when it is told to, and writes down what it ran."""

    def __init__(self):
        self.batches, self.go = [], threading.Semaphore(0)

    def run(self, batch):
        self.batches.append([job.language for job in batch])
        assert self.go.acquire(timeout=20)
        return [ValueError(job.language) if job.language == "bad" else f"text of {job.language}" for job in batch]


async def started(model, count):
    while len(model.batches) < count:
        await asyncio.sleep(0.01)


def test_what_arrives_while_a_batch_runs_is_the_next_batch():
    """One by one, with more time between them than a batch waits for others."""

    async def scenario():
        model = Model()
        lane = Lane(model.run, 4)
        answers = [asyncio.create_task(lane.submit(job("a")))]
        await started(model, 1)
        for name in "bcdefg":
            answers.append(asyncio.create_task(lane.submit(job(name))))
            await asyncio.sleep(0.05)
        model.go.release(3)
        return await asyncio.gather(*answers), model.batches

    texts, batches = asyncio.run(scenario())
    assert batches == [["a"], ["b", "c", "d", "e"], ["f", "g"]]
    assert texts == [f"text of {name}" for name in "abcdefg"]


def test_a_batch_has_the_same_settings_and_the_oldest_goes_first():
    async def scenario():
        model = Model()
        model.go.release(9)
        lane = Lane(model.run, 4)
        jobs = [job("a"), job("b", "translate"), job("c"), job("d", prompt="x"), job("e", "translate")]
        await asyncio.gather(*map(lane.submit, jobs))
        return model.batches

    assert asyncio.run(scenario()) == [["a", "c"], ["b", "e"], ["d"]]


def test_a_job_whose_caller_left_does_not_run_and_an_error_is_that_of_its_job():
    async def scenario():
        model = Model()
        lane = Lane(model.run, 4)
        first = asyncio.create_task(lane.submit(job("a")))
        await started(model, 1)
        others = [asyncio.create_task(lane.submit(job(name))) for name in ("left", "bad", "b")]
        await asyncio.sleep(0)
        others[0].cancel()
        first.cancel()  # it runs already: the batch goes on, and nobody gets its text
        model.go.release(2)
        return await asyncio.gather(first, *others, return_exceptions=True), model.batches

    answers, batches = asyncio.run(scenario())
    assert batches == [["a"], ["bad", "b"]]
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 2 + [ValueError, str]


def test_a_failing_run_fails_its_batch_alone():
    def run(batch):
        if batch[0].language == "bad":
            raise RuntimeError("out of memory")
        return ["text"] * len(batch)

    async def scenario():
        lane = Lane(run, 1)
        return await asyncio.gather(*map(lane.submit, [job("bad"), job("b")]), return_exceptions=True)

    failed, text = asyncio.run(scenario())
    assert isinstance(failed, RuntimeError) and text == "text"


def test_a_turn_that_is_passed_on_goes_to_who_waits_for_longest():
    turns, order, waiting = Turns(), [], []

    def short(name):
        waiting.append(name)
        with turns:
            order.append(name)

    with turns:
        order.append("window 1")
        threads = []
        for name in "ab":
            threads.append(threading.Thread(target=short, args=(name,)))
            threads[-1].start()
            while name not in waiting:
                time.sleep(0.001)
            time.sleep(0.05)  # it takes its ticket
        turns.pass_on()
        order.append("window 2")
        turns.pass_on()  # nobody waits
        order.append("window 3")
    for thread in threads:
        thread.join(20)
    assert order == ["window 1", "a", "b", "window 2", "window 3"]


def test_an_error_gives_the_turn_back():
    turns = Turns()
    with pytest.raises(ValueError), turns:
        raise ValueError
    with turns:
        pass
