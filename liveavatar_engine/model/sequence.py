"""Which tokens of a call a device computes, and how they meet in self-attention (Ulysses, arXiv 2309.14509).

Several ranks can share a timestep. Each has all weights, a part of the tokens for everything that treats tokens one by
one, and a part of the heads for self-attention, with these heads' keys and values in its ring and sink. Around
self-attention the ranks exchange rows: from [my tokens, all heads] to [all tokens, my heads], and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor

from ..config import StreamGeometry
from ..runtime.group import Group
from .norms import RMSNorm


class HeadRows(NamedTuple):
    """What the ops of self-attention take.

    Attributes:
        q, k, v: [tokens, heads, head_dim], of all tokens and of the heads that this rank has.
        q_weight, k_weight: of the RMSNorm over all heads that is to come; None where it has been.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None


class TokenSplit(Protocol):
    """How the tokens of a call are split over the ranks that share it. Tokens lie in (frame, row, column) order."""

    @property
    def ranks(self) -> int:
        """That share a call."""
        ...

    def count(self, tokens: int) -> int:
        """How many of so many tokens are mine."""
        ...

    def mine(self, x: Tensor, dim: int = 0) -> Tensor:
        """My part of the tokens that lie along `dim`."""
        ...

    def whole(self, x: Tensor) -> Tensor:
        """The tokens of all ranks, [tokens, ...], from mine, where all have as many."""
        ...

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, norm_q: RMSNorm, norm_k: RMSNorm) -> HeadRows:
        """All tokens of my heads, from my tokens of all heads: [my tokens, all heads, head_dim] each."""
        ...

    def to_tokens(self, attended: Tensor) -> Tensor:
        """Back: [all tokens, my heads, head_dim] -> [my tokens, all heads, head_dim]."""
        ...


@dataclass(frozen=True)
class Whole:
    """One rank that computes everything: nothing is cut or sent."""

    ranks: int = 1

    def count(self, tokens: int) -> int:
        return tokens

    def mine(self, x: Tensor, dim: int = 0) -> Tensor:
        return x

    def whole(self, x: Tensor) -> Tensor:
        return x

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, norm_q: RMSNorm, norm_k: RMSNorm) -> HeadRows:
        return HeadRows(q, k, v, norm_q.weight, norm_k.weight)

    def to_tokens(self, attended: Tensor) -> Tensor:
        return attended


WHOLE = Whole()


class Strips:
    """Each rank has one strip of every run of tokens.

    A block's run is a frame, so that tokens which share a frame's audio or mask stay equal groups, and strips are
    equal. A sink is a single run, whose strips may differ by a token.

    q and k are normalised over all heads while a rank has them all, before the exchange. What a rank sends per layer,
    with T tokens of width D on k ranks: 3 T D (k - 1) / k^2 values there (q, k and v) and a third of that back. At 3168
    tokens of width 5120 in bf16 [computed, not measured] that is 32 MB a layer on two ranks and 24 MB on four. A step
    of 40 layers sends 1.3 or 1.0 GB in 80 exchanges, none of them hidden behind other work, and each has a pass over
    memory before and after it. Gathering keys and values instead would send 2 T D (k - 1) / k, as much on two ranks and
    twice as much on four, and leave every rank with a whole ring. The velocity is gathered once per step and is small.

    Args:
        group: of the ranks.
        run: tokens of a run.
    """

    def __init__(self, group: Group, run: int) -> None:
        bounds = [run * rank // group.size for rank in range(group.size + 1)]
        self._group, self._run = group, run
        self._start, self._stop = bounds[group.rank : group.rank + 2]
        self._lengths = [stop - start for start, stop in pairwise(bounds)]

    @property
    def ranks(self) -> int:
        return self._group.size

    def count(self, tokens: int) -> int:
        return tokens // self._run * (self._stop - self._start)

    def mine(self, x: Tensor, dim: int = 0) -> Tensor:
        runs = x.unflatten(dim, (-1, self._run))
        return runs.narrow(dim + 1, self._start, self._stop - self._start).flatten(dim, dim + 1)

    def whole(self, x: Tensor) -> Tensor:
        return self._in_order(self._group.gather(x))

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, norm_q: RMSNorm, norm_k: RMSNorm) -> HeadRows:
        sent, received = [len(q)] * self.ranks, self._rows(len(q))
        rows = self._in_order(self._group.all_to_all(self._packed(q, k, v, norm_q, norm_k), sent, received))
        return HeadRows(rows[:, 0], rows[:, 1], rows[:, 2], None, None)

    def to_tokens(self, attended: Tensor) -> Tensor:
        mine = self.count(len(attended))
        received = self._group.all_to_all(self._by_rank(attended), self._rows(mine), [mine] * self.ranks)
        return received.unflatten(0, (self.ranks, mine)).transpose(0, 1).flatten(1, 2)

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, norm_q: RMSNorm, norm_k: RMSNorm) -> Tensor:
        """q, k and v side by side, first the heads of rank 0: [ranks * my tokens, 3, heads of a rank, head_dim]."""
        tokens, heads, head_dim = q.shape
        packed = q.new_empty(self.ranks, tokens, 3, heads // self.ranks, head_dim)
        by_rank = packed.movedim(0, 1)
        by_rank[:, :, 0].copy_(norm_q(q.flatten(1)).view_as(by_rank[:, :, 0]))
        by_rank[:, :, 1].copy_(norm_k(k.flatten(1)).view_as(by_rank[:, :, 1]))
        by_rank[:, :, 2].copy_(v.unflatten(1, (self.ranks, -1)))
        return packed.flatten(0, 1)

    def _rows(self, mine: int) -> list[int]:
        """Tokens of each rank where so many are mine."""
        runs = mine // (self._stop - self._start)
        return [runs * length for length in self._lengths]

    def _by_rank(self, x: Tensor) -> Tensor:
        """[tokens, ...] -> the same rows, those of rank 0 first."""
        runs = len(x) // self._run
        if runs == 1:
            return x
        return x.unflatten(0, (runs, self.ranks, -1)).transpose(0, 1).flatten(0, 2)

    def _in_order(self, x: Tensor) -> Tensor:
        """Undo `_by_rank`."""
        runs = len(x) // self._run
        if runs == 1:
            return x
        return x.unflatten(0, (self.ranks, runs, -1)).transpose(0, 1).flatten(0, 2)


def token_splits(geometry: StreamGeometry, group: Group | None) -> tuple[TokenSplit, TokenSplit]:
    """How a block's tokens and a sink's are split over a group.

    Raises:
        ConfigError: the group's size does not divide the heads and a frame's tokens.
    """
    if group is None or group.size == 1:
        return WHOLE, WHOLE
    geometry.heads_per_rank(group.size)
    return Strips(group, geometry.tokens_per_frame), Strips(group, geometry.sink_tokens)
