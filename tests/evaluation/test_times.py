"""Errors of timestamps."""

import math

import pytest

from peft_clsr.evaluation.times import summarize_times, time_errors


@pytest.mark.parametrize(
    ("heard", "said", "errors"),
    [
        ([(0.0, 1.0), (1.5, 3.0)], [(0.0, 1.0), (1.4, 3.2)], [0.0, 0.2]),
        ([(0.0, 3.0)], [(0.0, 1.0), (1.4, 3.2)], [2.0, 1.4]),  # one segment of two utterances
        ([(0.0, 1.0)], [(0.0, 1.0), (5.0, 6.0)], [0.0, 5.0]),  # nothing heard of the second
        ([], [(0.0, 1.0)], [math.inf]),
    ],
)
def test_an_utterance_is_missed_by_the_worse_of_its_start_and_end(heard, said, errors):
    assert time_errors(heard, said) == pytest.approx(errors)


def test_errors_are_summarized_by_median_and_share_within_half_a_second():
    assert summarize_times([0.1, 0.5, 0.6, math.inf]) == {"median_time_error": 0.55, "on_time": 0.5}
    assert summarize_times([math.inf]) == {"median_time_error": None, "on_time": 0.0}
