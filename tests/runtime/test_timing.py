"""Clocks of devices and hosts, brought together."""

import time

import pytest
import torch

from liveavatar_engine.runtime.timing import DeviceClock, StageTimer


def test_an_interruption_between_two_readings_does_not_count() -> None:
    """Another process may run there, for as long as it likes; that must not move what is traced."""
    interruptions = iter([0.03, 0.03])

    def clock() -> float:
        time.sleep(next(interruptions, 0.0))
        return time.time()

    made = DeviceClock(torch.device("cpu"), clock)
    timer, before = StageTimer(torch.device("cpu")), time.time()
    with timer.stage("work"):
        time.sleep(0.01)
    ((_, start, end),) = timer.spans()
    assert made.at(start) == pytest.approx(before, abs=2e-3)
    assert made.at(end) - made.at(start) == pytest.approx(end - start, abs=1e-5)
