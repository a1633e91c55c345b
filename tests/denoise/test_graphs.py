"""What is recorded once is enough for every block, session, prompt and sink: on a CPU, with tapes for CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from streams import STEPS, Streams
from support import CPU, bits, relative_error
from tape import Tape, Tapes
from torch import Tensor
from torch.utils._pytree import tree_leaves

from liveavatar_engine.denoise.diagonal import open_stream
from liveavatar_engine.denoise.stream import Conditions, SinkPolicy
from liveavatar_engine.errors import InputError
from liveavatar_engine.model import Network
from liveavatar_engine.runtime.struct import DeviceStruct
from liveavatar_engine.weights.network import load_network


def _same(ours: list[Tensor], expected: list[Tensor]) -> None:
    assert len(ours) == len(expected)
    for block, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert torch.equal(bits(one), bits(other)), f"block {block}"


@pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
@pytest.mark.parametrize(("actors", "pose"), [(1, False), (2, False), (1, True)])
def test_replays_give_the_same_bits_as_plain_calls(schedule: str, actors: int, pose: bool, network: Network) -> None:
    diagonal = schedule == "diagonal"
    recorder = Tapes()
    plain = Streams(network, diagonal=diagonal).run(6, actors=actors, pose=pose)
    replayed = Streams(network, diagonal=diagonal, record_with=recorder).run(6, actors=actors, pose=pose)
    assert recorder.replayed > 6
    _same(replayed, plain)


def test_fp8_and_a_clean_ring_are_replayed_too(checkpoint) -> None:
    low = load_network(checkpoint, None, torch.bfloat16, CPU, fp8_skip=())
    settings = {"cache_dtype": torch.float8_e4m3fn, "clean": True}
    _same(Streams(low, record_with=Tapes(), **settings).run(3), Streams(low, **settings).run(3))


def test_nothing_is_recorded_after_the_warm_up(network: Network) -> None:
    recorder = Tapes()
    streams = Streams(network, sessions=2, record_with=recorder)
    streams.executor.warm_up()
    recorded = recorder.recorded
    assert recorded == STEPS + 1 + network.config.num_layers + 1, "steps, audio, and the sink's tokens and layers"
    for seed in range(3):
        stream = streams.open(session=seed % 2, seed=seed)
        for index in range(4):
            if index == 1:
                stream.change_prompt(streams.context(7))
            streams.push(stream, seed, pose=index == 3)
    assert recorder.recorded == recorded


def test_a_block_is_one_struct_and_the_same_calls(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the block: host-side decisions are counted, as sends and as the operations between them."""
    sent = []
    send = DeviceStruct.send
    monkeypatch.setattr(DeviceStruct, "send", lambda struct: (sent.append(struct), send(struct)))
    recorder = Tapes()
    streams = Streams(network, record_with=recorder)
    stream = streams.open(update_after=None)
    sent.clear()
    before = recorder.replayed
    for block in range(6):
        streams.push(stream)
        assert len(sent) == block + 1
        assert recorder.replayed - before == (block + 1) * (STEPS + 1), "audio once, then every step"
    assert len({id(struct) for struct in sent}) == 1


def test_plain_steps_do_the_same_operations_in_every_block(network: Network) -> None:
    """Shapes, strides and static buffers of block 0 are those of block 5 and of a new session."""
    streams = Streams(network, sessions=2)
    traces = []
    for session in range(2):
        stream = streams.open(session=session, seed=session, update_after=2)
        for _ in range(6):
            with Tape() as tape:
                cast = stream._cast
                for step in range(STEPS):
                    cast.steps[step, step]()
            traces.append([(str(call[0]), _layout(call[1:])) for call in tape.calls])
            streams.push(stream, session)
    assert len(traces[0]) > 50
    assert all(trace == traces[0] for trace in traces)


def _layout(call: tuple) -> list[tuple]:
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tree_leaves(call) if isinstance(t, Tensor)]


def test_company_changes_no_bit(network: Network) -> None:
    alone = [Streams(network).run(5, seed=seed) for seed in range(2)]
    streams = Streams(network, sessions=2, record_with=Tapes())
    pair = [streams.open(session=index, seed=index) for index in range(2)]
    together: list[list[Tensor]] = [[], []]
    for _ in range(5):
        for index in range(2):
            together[index] += streams.push(pair[index], index)
    for index in range(2):
        _same(together[index], alone[index])


@pytest.mark.parametrize("schedule", ["sequential", "diagonal"])
def test_a_new_prompt_counts_from_a_block_on(schedule: str, network: Network) -> None:
    """As if the stream had had it from there: ring contents stay, text and sink change."""
    made = []
    for changed in (False, True):
        streams = Streams(network, diagonal=schedule == "diagonal")
        stream = streams.open(update_after=None)
        latents: list[Tensor] = []
        for index in range(7):
            if index == 3 and changed:
                stream.change_prompt(streams.context(8))
            latents += streams.push(stream)
        made.append(latents + stream.drain())
    _same(made[1][:5], made[0][:5])
    for block in (5, 6):
        assert relative_error(made[1][block], made[0][block]) > 1e-3, f"block {block}"


def test_a_prompt_before_the_first_block_is_as_good_as_one_at_opening(network: Network) -> None:
    streams = Streams(network)
    stream = streams.open(seed=0)
    stream.change_prompt(streams.context(8))
    changed = [latents for _ in range(4) for latents in streams.push(stream)]
    other = Streams(network)
    channels, _, height, width = other.geometry.block_shape
    conditions = Conditions(
        other.context(8), other.draw(0, channels, 1, height, width), other.draw(0, channels, 19, height, width)
    )
    expected_stream = open_stream(other.executor, 0, conditions, SinkPolicy("random", 2, 0))
    _same(changed, [latents for _ in range(4) for latents in other.push(expected_stream)])


@pytest.mark.parametrize("update_after", [1, 2, 3, 5])
@pytest.mark.parametrize("prompt_at", [None, 1, 2, 4])
def test_schedules_agree_whenever_the_sink_changes(update_after: int, prompt_at: int | None, network: Network) -> None:
    made = []
    for diagonal in (False, True):
        streams = Streams(network, diagonal=diagonal)
        stream = streams.open(update_after=update_after)
        latents: list[Tensor] = []
        for index in range(8):
            if index == prompt_at:
                stream.change_prompt(streams.context(8))
            latents += streams.push(stream)
        made.append(latents + stream.drain())
    assert len(made[1]) == 8
    for block in range(8):
        assert relative_error(made[1][block], made[0][block]) <= 1e-5, f"block {block}"


def test_diagonal_streams_may_be_shorter_than_the_diagonal(network: Network) -> None:
    for blocks in (1, 2):
        sequential, diagonal = (Streams(network, steps=4, diagonal=d).run(blocks) for d in (False, True))
        assert len(diagonal) == blocks
        for ours, expected in zip(diagonal, sequential, strict=True):
            assert relative_error(ours, expected) <= 1e-5


def test_a_sink_left_by_a_closed_stream_disturbs_nobody(network: Network) -> None:
    streams = Streams(network, sessions=2)
    left = streams.open(session=0, seed=3, update_after=4)
    streams.push(left, 3)
    streams.push(left, 3)
    left.close()
    _same(
        [
            latents
            for stream in [streams.open(session=1, seed=1)]
            for _ in range(4)
            for latents in streams.push(stream, 1)
        ],
        Streams(network).run(4, seed=1),
    )


def test_inputs_that_do_not_fit_are_refused(network: Network) -> None:
    streams = Streams(network)
    stream = streams.open()
    with pytest.raises(InputError, match="audio states: expected"):
        streams.push(stream, actors=2)
    with pytest.raises(InputError, match="prompt: a context of"):
        stream.change_prompt(torch.zeros(3, network.config.text_dim + 1))
    assert len(streams.push(stream)) == 1


def test_sinks_prefilled_at_the_same_time_do_not_mix(network: Network) -> None:
    """One is finished early, one is half done when a third begins: pieces of one never continue another."""
    updates, prompts, blocks = (6, 7, 8), (1, 2, 3), 10
    together: list[list[Tensor]] = [[], [], []]
    for sessions in (1, 3):
        streams = [Streams(network) for _ in range(3)] if sessions == 1 else [Streams(network, sessions=3)] * 3
        opened = [streams[i].open(session=i if sessions == 3 else 0, seed=i, update_after=updates[i]) for i in range(3)]
        made: list[list[Tensor]] = [[], [], []]
        for block in range(blocks):
            for i in range(3):
                if block == prompts[i]:
                    opened[i].change_prompt(streams[i].context(7 + i))
                made[i] += streams[i].push(opened[i], i)
        if sessions == 3:
            for i in range(3):
                _same(made[i], together[i])
        together = made
