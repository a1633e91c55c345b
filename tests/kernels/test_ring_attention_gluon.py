"""The Gluon kernel without a GPU, where Gluon cannot run: its schedule of tiles, and why it cannot run here."""

import random

import pytest
import torch
import triton
from liveavatar_kernels import KernelUnavailableError
from liveavatar_kernels.cache import MOVED, RING_WRAPPED
from liveavatar_kernels.model_sizes import WAN_14B
from liveavatar_kernels.ring_attention import OP, gluon, gluon_device, ring_attention
from liveavatar_kernels.ring_attention.cases import CASES, Case
from liveavatar_kernels.rotation import rotate_pairs
from support import relative_error

DENSE = [case for case in CASES if not case.quantized]
HOPPER = torch.device("cuda:0")
locate = gluon_device.locate.fn
"""Integers only: the function of the kernel runs as it is."""


def _tiles(lengths: list[int], keys: int) -> list[int]:
    return [-(-length // keys) for length in lengths]


def _part(table: list[int], part: int, parts: int, keys: int) -> tuple[int, int]:
    """First and last tile, as `gluon_device.attend` computes them."""
    tiles = sum(_tiles(table[1::2], keys))
    return part * tiles // parts, (part + 1) * tiles // parts


@pytest.mark.parametrize("seed", range(20))
def test_parts_visit_every_key_once(seed: int) -> None:
    draw = random.Random(seed)
    keys, parts = draw.choice([16, 112, 128]), draw.choice([1, 2, 3, 7, 40])
    lengths = [draw.choice([0, 1, keys - 1, keys, keys + 1, draw.randrange(1, 6 * keys)]) for _ in range(MOVED + 1)]
    starts = [draw.randrange(1000) for _ in lengths]
    table = [number for pair in zip(starts, lengths, strict=True) for number in pair]
    end_of_row = [sum(_tiles(lengths[: row + 1], keys)) for row in range(MOVED + 1)]
    seen: list[list[int]] = [[] for _ in lengths]
    for part in range(parts):
        first, last = _part(table, part, parts, keys)
        for tile in range(first, first + max(last - first, 1)):
            token, left = locate(tile, last, *table, keys)
            if left > 0:
                row = next(row for row, end in enumerate(end_of_row) if tile < end)
                seen[row] += range(token, token + min(left, keys))
    assert seen == [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_part_without_tiles_visits_one_without_keys(length: int) -> None:
    table = [5, length, 0, 0, 0, 0, 9, 0]
    first, last = _part(table, 0, 3, 128)
    assert first == last == 0
    assert locate(first, last, *table, 128)[1] <= 0


def _tile(cache: torch.Tensor, slot: int, head: int, token: int, keys: int) -> torch.Tensor:
    """As TMA brings it: zeros behind the cache's end, and whatever lies behind the segment's."""
    rows = cache[slot, token : token + keys, head]
    return torch.cat((rows, rows.new_zeros(keys - len(rows), rows.shape[1])))


def _simulated(arguments, parts: int, keys: int) -> torch.Tensor:
    """The kernel's arithmetic in plain PyTorch, from its own schedule, parts combined in their order."""
    q, ring, sink, window = (arguments[name] for name in ("q", "ring", "sink", "window"))
    tokens, heads, head_dim = q.shape
    cos, sin = window.shift
    turned = rotate_pairs(q, cos[None], -sin[None])
    slots = window.slots.tolist()
    out = torch.empty_like(q)
    for head in range(heads):
        table = window.segments[head * len(window.segments) // heads].flatten().tolist()
        tiles = _tiles(table[1::2], keys)
        ring_tiles, still_tiles = sum(tiles[: RING_WRAPPED + 1]), sum(tiles[:MOVED])
        values = torch.zeros(tokens, head_dim)
        total, maximum = torch.zeros(tokens), torch.full((tokens,), -1e38)
        for part in range(parts):
            first, last = _part(table, part, parts, keys)
            for tile in range(first, first + max(last - first, 1)):
                token, left = locate(tile, last, *table, keys)
                cache, slot = (ring, slots[0]) if tile < ring_tiles else (sink, slots[1])
                k, v = (_tile(x, slot, head, token, keys) for x in (cache.k, cache.v))
                counts = torch.arange(keys) < left
                v = v.masked_fill(~counts[:, None], 0)
                query = turned if tile >= still_tiles else q
                logits = (query[:, head] @ k.T * head_dim**-0.5).masked_fill(~counts, float("-inf"))
                new_maximum = torch.maximum(maximum, logits.amax(1))
                p, decay = (logits - new_maximum[:, None]).exp(), (maximum - new_maximum).exp()
                values, total = values * decay[:, None] + p @ v, total * decay + p.sum(1)
                maximum = new_maximum
        out[:, head] = values / total[:, None]
    return out


@pytest.mark.parametrize("parts", [1, 3, 50])
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_schedule_gives_the_reference(case: Case, parts: int) -> None:
    arguments = case.arguments(torch.float32)
    exact = ring_attention(**arguments, implementation="reference")
    assert relative_error(_simulated(arguments, parts, keys=32), exact) <= 1e-5


def test_needs_hopper_and_a_known_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = OP["gluon"].absent
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for version, reason in (
        ("3.6.0", None),
        ("3.9.1", None),
        ("3.5.1", "needs the Gluon of Triton 3.6 to 3.9, not that of 3.5.1"),
        ("3.10.0", "needs the Gluon of Triton 3.6 to 3.9, not that of 3.10.0"),
    ):
        monkeypatch.setattr(triton, "__version__", version)
        assert absent(HOPPER) == reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert absent(HOPPER) == "sm_100: written for sm_90"
    with pytest.raises(KernelUnavailableError, match="'gluon' cannot run here: needs a CUDA device"):
        ring_attention(**DENSE[0].arguments(torch.float16), implementation="gluon")


@pytest.mark.parametrize("case", [DENSE[0], CASES[-1]], ids=["float32", "e4m3"])
def test_other_dtypes_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(OP["gluon"]), "absent", lambda device: None)
    with pytest.raises(KernelUnavailableError, match="only for bf16 and fp16 caches"):
        ring_attention(**case.arguments(torch.float32), implementation="gluon")


def test_is_never_picked() -> None:
    assert OP["gluon"].automatic == ()


def test_compiled_ahead_of_time_for_hopper_only() -> None:
    (spec,) = gluon.aot_specs(WAN_14B, 90)
    assert spec.gluon
    assert set(spec.function.arg_names) == {*spec.signature, *spec.constexprs}
    assert not any(gluon.aot_specs(WAN_14B, capability) for capability in (80, 89, 100, 120))
