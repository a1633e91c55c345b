"""Steps that several ranks share, each in a process of its own over Gloo, against one process that computes alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from liveavatar_kernels.e4m3 import E4M3
from support import CPU, GoldenCase, relative_error
from torch import Tensor

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise import executor as executor_module
from liveavatar_engine.denoise.caches import CacheArena
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.errors import ConfigError
from liveavatar_engine.model.sequence import Strips, Whole, token_splits

SIZES = (2, 4)
TOLERANCES = {"float64": 1e-14, "e4m3 caches": 1e-4}
"""Where it is not float32's 1e-5; a key on the edge between two e4m3 numbers may become the other one."""
LOW = ("bf16", "e4m3")
"""Streams of low precision, where ranks round q and k once more than one alone: as near to float32's as theirs."""
AS_EXACT = 1.25
"""Times the error that one alone has."""
Latents = dict[str, list[Tensor]]


class Lonely:
    """A group of which nobody else is there: nothing may be sent."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = size, rank

    def all_to_all(self, *_: object) -> Tensor:
        raise AssertionError("sent")

    def gather(self, *_: object) -> Tensor:
        raise AssertionError("sent")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Latents]]:
    """What every rank made, by the number of ranks; all processes run side by side."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / part) for part in ("", "kernels", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    folders = {size: tmp_path_factory.mktemp(f"{size}_ranks") for size in SIZES}
    processes = []
    try:
        for size, folder in folders.items():
            for rank in range(size):
                command = [sys.executable, ranks.__file__, str(rank), str(size), str(folder)]
                processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return {size: [torch.load(folder / f"{rank}.pt") for rank in range(size)] for size, folder in folders.items()}


@pytest.fixture(scope="module")
def alone() -> Latents:
    return {name: run(None) for name, run in ranks.scenarios(2).items()}


def _by_size(wanted: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    """Each number of ranks with the streams that it can share."""
    cases = [(size, name) for size in SIZES for name in ranks.scenarios(size) if wanted(name)]
    return pytest.mark.parametrize(("size", "name"), cases, ids=str)


@_by_size(lambda name: name not in LOW)
def test_ranks_make_what_one_makes_alone(
    size: int, name: str, shared: dict[int, list[Latents]], alone: Latents
) -> None:
    ours, expected = shared[size][0][name], alone[name]
    assert len(ours) == len(expected)
    for block, (one, other) in enumerate(zip(ours, expected, strict=True)):
        assert relative_error(one, other) <= TOLERANCES.get(name, 1e-5), f"block {block}"


@_by_size(lambda name: name in (*LOW, "e4m3 caches"))
def test_ranks_round_no_worse_than_one_alone(
    size: int, name: str, shared: dict[int, list[Latents]], alone: Latents
) -> None:
    for block, exact in enumerate(alone["updated sink"]):
        ours, theirs = (relative_error(made[name][block], exact) for made in (shared[size][0], alone))
        assert ours <= AS_EXACT * theirs, f"block {block}"


@_by_size()
def test_all_ranks_have_the_same_bits(size: int, name: str, shared: dict[int, list[Latents]]) -> None:
    first, *others = (latents[name] for latents in shared[size])
    assert all(a.equal(b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("case", ranks.GOLDEN_CASES, ids=lambda case: case.name)
def test_two_ranks_make_the_reference_latents(case: GoldenCase, shared: dict[int, list[Latents]]) -> None:
    for block, latents in enumerate(shared[2][1][case.name]):
        assert relative_error(latents, case["latents"][block]) <= 1e-5, f"block {block}"


def test_streams_notice_their_inputs(alone: Latents) -> None:
    """What is compared above depends on sink, pose and prompts by far more than the tolerance."""
    plain = alone["updated sink"]
    still = ranks.RANDOM["updated sink"](None, run={"update_after": None})
    assert relative_error(still[1], plain[1]) == 0
    assert relative_error(still[2], plain[2]) > 1e-3
    changed = alone["two sessions"][0::2]
    assert relative_error(changed[2], still[2]) == 0
    assert relative_error(changed[3], ranks.RANDOM["updated sink"](None, blocks=4, run={"update_after": 3})[3]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_a_rank_has_its_share_of_rings_and_sinks(size: int, dtype: torch.dtype) -> None:
    geometry = StreamGeometry(ranks.random_network().config, 64, 80)
    whole, share = (CacheArena(geometry, 3, 2, dtype, torch.bfloat16, CPU, count) for count in (1, size))
    assert whole.ring_bytes == size * share.ring_bytes
    assert whole.sink_bytes == size * share.sink_bytes
    assert whole.text_bytes == share.text_bytes


@pytest.mark.parametrize("rank", range(4))
def test_strips_are_the_same_part_of_every_frame(rank: int) -> None:
    split = Strips(Lonely(4, rank), run=8)
    tokens = torch.arange(3 * 8)[:, None]
    mine = split.mine(tokens)
    assert mine.flatten().tolist() == [8 * frame + 2 * rank + i for frame in range(3) for i in range(2)]
    assert split.count(24) == len(mine) == 6
    mask = torch.arange(2 * 1 * 8).view(2, 1, 8, 1)
    assert split.mine(mask, dim=2)[1, 0, :, 0].tolist() == [8 + 2 * rank, 9 + 2 * rank]


def test_a_sink_is_shared_to_the_last_token() -> None:
    parts = [Strips(Lonely(4, rank), run=85) for rank in range(4)]
    tokens = torch.arange(85)
    assert torch.cat([part.mine(tokens) for part in parts]).equal(tokens)
    counts = [part.count(85) for part in parts]
    assert sum(counts) == 85
    assert max(counts) - min(counts) == 1


def test_one_rank_sends_nothing() -> None:
    geometry = StreamGeometry(ranks.random_network().config, 64, 80)
    assert token_splits(geometry, None) == token_splits(geometry, Lonely(1)) == (Whole(), Whole())


@pytest.mark.parametrize(
    ("heads", "sides", "size", "complaint"),
    [
        (4, (64, 80), 3, r"sequence_parallel=3: must divide the network's 4 heads.* it can be 1 or 2 or 4"),
        (3, (64, 80), 3, "the 20 tokens of a latent frame of 80x64; here it can be 1$"),
        (4, (80, 80), 2, "the 25 tokens of a latent frame of 80x80; here it can be 1$"),
    ],
    ids=["heads", "tokens of an even frame", "tokens of an odd frame"],
)
def test_what_cannot_be_shared_is_refused_before_anything_is_allocated(
    heads: int, sides: tuple[int, int], size: int, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = ranks.random_network(heads=heads)
    denoiser, geometry = Denoiser(network, flow_match_schedule(2)), StreamGeometry(network.config, *sides)
    monkeypatch.delattr(executor_module, "CacheArena")
    with pytest.raises(ConfigError, match=complaint):
        StepExecutor(denoiser, geometry, group=Lonely(size))
    with pytest.raises(ConfigError, match=complaint):
        CacheArena(geometry, 1, 1, torch.float32, torch.float32, torch.device("meta"), size)
