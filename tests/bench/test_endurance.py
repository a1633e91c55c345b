"""The endurance bench: it measures a stream, and it sees drift where there is some."""

import dataclasses

import numpy as np
import pytest
from rich.console import Console

from bench import endurance
from bench.endurance import Measurement, drifts, run, table
from liveavatar_engine import Engine

FLAT = [Measurement(float(at), at * 2, 400.0, 70.0, 0.01, 1.2) for at in (0, 100, 1_000, 10_000)]


def test_measures_around_every_mark(engine: Engine, face: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endurance, "WINDOW", 3)
    monkeypatch.setattr(endurance, "MARKS", (0, 2, 4, 100))
    with engine.open_session(face) as session:
        measured = run(session, 6.0, Console(quiet=True))
    assert [one.seconds for one in measured] == [0, 2, 4]
    assert [one.block for one in measured] == [0, 4, 8]
    assert all(one.memory_mb > 50 and one.block_ms > 0 and one.latent_std > 0.1 for one in measured)


def test_a_flat_stream_has_no_drift() -> None:
    assert drifts(FLAT) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"memory_mb": 409.0}, "memory grew by 9.0 MB at 10,000 s against 100 s"),
        ({"block_ms": 90.0}, "a block takes 1.29 times as long"),
        ({"latent_mean": 0.2}, "the latents' mean moved from 0.010 to 0.200"),
        ({"latent_std": 0.9}, "the latents' deviation moved from 1.200 to 0.900"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_drift_is_named(change: dict[str, float], sentence: str) -> None:
    (found,) = drifts([*FLAT[:-1], dataclasses.replace(FLAT[-1], **change)])
    assert found.startswith(sentence)


def test_the_table_has_a_row_per_mark() -> None:
    assert table(FLAT).splitlines()[-1] == "| 10,000 | 20,000 | 400 | 70.0 | +0.0100 | 1.2000 |"
