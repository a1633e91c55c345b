"""The steps of a block taken by several executors, one part each, as devices of a pipeline do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streams import Streams
from torch import Tensor

STEPS = 4


class _Parts:
    """Executors in a row, each with some of the steps; what the last one finishes is shown to all before `late`."""

    def __init__(self, network: Any, parts: list[range], **settings: Any) -> None:
        self.parts = [Streams(network, steps=STEPS, part=part, **settings) for part in parts]

    def run(self, blocks: int, update_after: int | None, prompt_after: int, late: bool) -> list[Tensor]:
        streams = [part.open(seed=3, update_after=update_after) for part in self.parts]
        finished: list[Tensor] = []
        for block in range(blocks):
            if finished and block == (update_after if late else 1):
                for stream in streams[:-1]:
                    stream.show_first_latent(finished[0][:, :1])
            if block == prompt_after:
                for stream, part in zip(streams, self.parts, strict=True):
                    stream.change_prompt(part.context(8))
            latents = None
            for stream, part in zip(streams, self.parts, strict=True):
                (latents,) = part.push(stream, seed=3, entering=latents)
            assert latents is not None
            finished.append(latents)
        return finished


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("parts", [[range(1), range(1, 4)], [range(2), range(2, 3), range(3, 4)]])
def test_parts_of_the_steps_in_a_row_give_the_latents_of_all_steps_in_one_place(
    network: Any, parts: list[range], late: bool
) -> None:
    whole = _Parts(network, [range(STEPS)]).run(7, 4, prompt_after=1, late=late)
    split = _Parts(network, parts).run(7, 4, prompt_after=1, late=late)
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))
    unchanged = _Parts(network, parts).run(7, None, prompt_after=1, late=False)
    assert torch.equal(unchanged[3], split[3])
    assert not torch.equal(unchanged[4], split[4]), "the sink's update shows"


def test_each_part_has_rings_for_its_own_steps(network: Any) -> None:
    parts = _Parts(network, [range(1), range(1, 4)]).parts
    whole = Streams(network, steps=STEPS).executor.arena
    assert [part.executor.arena.rings for part in parts] == [1, 3]
    assert sum(part.executor.arena.ring_bytes for part in parts) == whole.ring_bytes
