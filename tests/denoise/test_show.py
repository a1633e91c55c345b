"""Another picture and other motion in the sink of a stream that is under way."""

import torch
from streams import Streams


def _run(network, shown_before_block: int | None) -> list[torch.Tensor]:
    streams = Streams(network)
    channels, _, height, width = streams.geometry.block_shape
    stream, made = streams.open(update_after=None), []
    for block in range(3):
        if block == shown_before_block:
            stream.show(streams.draw(7, channels, 1, height, width), streams.draw(8, channels, 19, height, width))
        made += streams.push(stream)
    return made


def test_it_counts_from_the_next_block_on(network) -> None:
    plain, shown = _run(network, None), _run(network, 1)
    assert shown[0].equal(plain[0])
    assert not torch.allclose(shown[1], plain[1])


def test_motion_counts_too(network) -> None:
    streams = Streams(network)
    channels, _, height, width = streams.geometry.block_shape
    reference = streams.draw(7, channels, 1, height, width)
    made = []
    for seed in (8, 9):
        stream = streams.open(update_after=None)
        stream.show(reference, streams.draw(seed, channels, 19, height, width))
        made += streams.push(stream)
    assert not torch.allclose(*made)
