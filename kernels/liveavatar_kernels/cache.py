"""Key-value caches of an arena, and the small device tensors that say where in them a block writes and reads.

Kernels span the whole arena and read the slot on the device, so that neither their arguments nor a captured graph
changes from block to block or from session to session.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .e4m3 import E4M3, KV_TILE, padded_to_tile

RING, RING_WRAPPED, FIXED, MOVED = range(4)
"""Rows of a segment table: two parts of the ring (a window may wrap), sink tokens that stand, sink tokens that roll."""


class KeyValueCache(NamedTuple):
    """Keys and values of one layer in every slot of an arena.

    In bf16, fp16 or fp32, tokens lie one behind the other. In e4m3 they lie in runs (the blocks of a ring): each starts
    on a multiple of KV_TILE, and what is left of its last tile holds zeros. Values are transposed there, and scaled per
    tile; keys are scaled per token.

    Attributes:
        k: [slots, tokens, heads, head_dim], keys rotated at their positions.
        v: [slots, tokens, heads, head_dim]; e4m3: [slots, heads, head_dim, tokens].
        k_scale: float32 [slots, heads, tokens] for e4m3, else None.
        v_scale: float32 [slots, heads, tokens / KV_TILE] for e4m3, else None.
        run_tokens: tokens of a run that hold anything; 0 where the whole cache is one run.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    run_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Capacity of a slot."""
        return self.k.shape[1]

    @property
    def quantized(self) -> bool:
        return self.k.dtype == E4M3

    @property
    def run_stride(self) -> int:
        """Tokens from the start of a run to that of the next."""
        return padded_to_tile(self.run_tokens) if self.quantized and self.run_tokens else self.tokens

    @property
    def run_length(self) -> int:
        """Tokens of a run that hold anything."""
        return self.run_tokens if self.quantized and self.run_tokens else self.tokens

    def check(self, name: str, heads: int, head_dim: int) -> None:
        """Check that shapes and dtypes fit together.

        Raises:
            ValueError: naming the tensor and what was expected.
        """
        if self.k.ndim != 4 or self.k.shape[2:] != (heads, head_dim):
            raise ValueError(f"{name}.k: expected [slots, tokens, {heads}, {head_dim}], not {list(self.k.shape)}")
        slots, tokens = self.k.shape[:2]
        if self.v.dtype != self.k.dtype:
            raise ValueError(f"{name}.v: expected {self.k.dtype} like k, not {self.v.dtype}")
        if not self.quantized:
            _check_shape(f"{name}.v", self.v, (slots, tokens, heads, head_dim))
            return
        if tokens % KV_TILE:
            raise ValueError(f"{name}: e4m3 caches hold whole tiles of {KV_TILE} tokens, not {tokens}")
        if self.run_tokens and tokens % self.run_stride:
            raise ValueError(f"{name}: {tokens} tokens do not hold whole runs of {self.run_stride}")
        if self.k_scale is None or self.v_scale is None:
            raise ValueError(f"{name}: e4m3 needs k_scale and v_scale")
        _check_shape(f"{name}.v", self.v, (slots, heads, head_dim, tokens))
        _check_shape(f"{name}.k_scale", self.k_scale, (slots, heads, tokens))
        _check_shape(f"{name}.v_scale", self.v_scale, (slots, heads, tokens // KV_TILE))


class Window(NamedTuple):
    """What a block's queries see; tensors on the device.

    Attributes:
        slots: int32 [2], the slot of the ring and that of the sink.
        segments: int32 [groups, 4, 2], first token and length of RING, RING_WRAPPED, FIXED and MOVED, for each of
            `groups` equal groups of heads. In e4m3 a length counts the padding between runs.
        shift: float32 [2, temporal_pairs], cosines and sines of the angles by which the keys of MOVED have rolled on
            since they were stored.
    """

    slots: Tensor
    segments: Tensor
    shift: Tensor


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {list(shape)}, not {list(tensor.shape)}")
