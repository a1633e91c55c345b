"""Shapes of cross_attention, declared once for tests, benchmarks and warm-up."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..model_sizes import ModelSizes

EPS = 1e-6
_PROMPT = 100
"""Tokens of a usual prompt."""
_BLOCKS = 4
"""Blocks that are computed together in the diagonal schedule."""
_GAP = 32
"""Values between tokens that lie apart."""

View = tuple[int, int, int]
"""Slot, number of tokens, count of padding tokens."""


@dataclass(frozen=True)
class Case:
    """Groups of `group_tokens` queries, and the rows of the slots that they see.

    Attributes:
        rows: of a slot.
        views: one per group.
        slots: that there are.
        apart: whether tokens and rows lie apart in memory.
    """

    name: str
    heads: int
    head_dim: int
    group_tokens: int
    rows: int
    views: tuple[View, ...]
    slots: int = 2
    apart: bool = False

    @property
    def tokens(self) -> int:
        return len(self.views) * self.group_tokens

    @property
    def flops(self) -> int:
        """Of the attention; the padding counts as one key."""
        keys = sum(_keys(view) for view in self.views)
        return 4 * self.group_tokens * keys * self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        """Least traffic at two bytes an element: q, the result, and what is seen of every slot once."""
        keys = {view[0]: 0 for view in self.views}
        for view in self.views:
            keys[view[0]] = max(keys[view[0]], _keys(view))
        return 2 * 2 * self.heads * self.head_dim * (self.tokens + sum(keys.values()))

    def arguments(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of the op: random where a group looks, NaN elsewhere."""
        generator = torch.Generator().manual_seed(seed)
        weight = 1 + 0.1 * torch.randn(self.heads * self.head_dim, generator=generator)
        unseen = torch.ones(self.slots, self.rows, dtype=torch.bool)
        for view in self.views:
            unseen[view[0], : _keys(view)] = False

        def random(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, self.heads * self.head_dim, generator=generator)

        q, k, v = 3 * random(len(self.views), self.group_tokens), *(random(self.slots, self.rows) for _ in range(2))
        k, v = (x.masked_fill(unseen[..., None], float("nan")) for x in (k, v))
        return {
            "q": self._placed(q.to(device, dtype)),
            "norm_weight": weight.to(device, dtype),
            "k": self._placed(k.to(device, dtype)),
            "v": self._placed(v.to(device, dtype)),
            "view": torch.tensor(self.views, dtype=torch.int32, device=device),
            "eps": EPS,
        }

    def _placed(self, x: Tensor) -> Tensor:
        """[rows, columns, heads * head_dim] -> [rows, columns, heads, head_dim], with NaN between if they are apart."""
        if self.apart:
            wide = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + _GAP), float("nan"))
            wide[:, 1:, : x.shape[2]] = x
            x = wide[:, 1:, : x.shape[2]]
        return x.unflatten(-1, (self.heads, self.head_dim))


def _keys(view: View) -> int:
    """Rows that are seen."""
    _, tokens, padding = view
    return tokens + (padding > 0)


def model_cases(sizes: ModelSizes) -> tuple[Case, ...]:
    """A usual prompt, the longest one and audio at every picture size; at the first also the blocks of a diagonal."""
    cases = []
    for tokens in sizes.block_tokens:
        usual, frames = (0, _PROMPT, sizes.text_tokens - _PROMPT), sizes.block_frames
        text = Case("", sizes.heads, sizes.head_dim, tokens, sizes.text_tokens, (usual,))
        audio = replace(text, group_tokens=tokens // frames, rows=sizes.audio_tokens)
        cases += [
            replace(text, name=f"{tokens} tokens, text of {_PROMPT}"),
            replace(text, name=f"{tokens} tokens, text of {sizes.text_tokens}", views=((1, sizes.text_tokens, 0),)),
            replace(audio, name=f"{tokens} tokens, audio", **_frames(frames, sizes)),
        ]
        if tokens == sizes.block_tokens[0]:
            name = f"{_BLOCKS} x {tokens} tokens"
            cases += [
                replace(text, name=f"{name}, text of {_PROMPT}", views=(usual,) * _BLOCKS),
                replace(audio, name=f"{name}, audio", **_frames(_BLOCKS * frames, sizes)),
            ]
    return tuple(cases)


def _frames(frames: int, sizes: ModelSizes) -> dict[str, Any]:
    """A slot for each frame."""
    return {"views": tuple((frame, sizes.audio_tokens, 0) for frame in range(frames)), "slots": frames}


CASES = (
    Case("short prompt", 2, 32, 63, 40, ((1, 7, 505),)),
    Case("every row", 3, 64, 100, 130, ((0, 130, 0),)),
    Case("nothing but padding", 2, 32, 20, 6, ((0, 0, 512),)),
    Case("one token of padding", 1, 128, 33, 66, ((2, 65, 1),), slots=3),
    Case("whole tiles, padded", 2, 64, 32, 130, ((0, 128, 384),), apart=True),
    Case("groups", 3, 64, 37, 100, ((2, 99, 5), (0, 64, 0), (1, 1, 448)), slots=3, apart=True),
    Case("audio", 2, 128, 63, 5, ((0, 5, 0), (1, 5, 0), (2, 5, 0)), slots=3),
    Case("audio of one token", 5, 32, 1, 5, ((1, 5, 0),), apart=True),
    Case("few rows", 2, 64, 17, 16, ((1, 9, 3), (1, 16, 0), (0, 15, 1))),
)
