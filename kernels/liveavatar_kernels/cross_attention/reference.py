"""Cross attention in plain PyTorch: the float32 truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_LOGIT_BYTES = 1 << 28


def cross_attention(q: Tensor, norm_weight: Tensor, k: Tensor, v: Tensor, view: Tensor, eps: float) -> Tensor:
    """As the op; never reads `view` on the host, and may be captured in a CUDA graph."""
    groups, tokens, heads, head_dim = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    slot, seen, count = view[:, :1], view[:, 1:2], view[:, 2:]
    row = torch.arange(k.shape[1], dtype=torch.int32, device=q.device)
    bias = torch.where(row == seen, count.to(wide).log(), float("-inf")).masked_fill(row < seen, 0.0)
    used = (row < seen + count.sign())[..., None, None]
    keys, values = (x.index_select(0, slot[:, 0]).masked_fill(~used, 0.0).transpose(1, 2).to(wide) for x in (k, v))
    normed = F.rms_norm(q.flatten(-2).to(wide), norm_weight.shape, norm_weight.to(wide), eps)
    queries = normed.to(q.dtype).view_as(q).transpose(1, 2).to(wide) * head_dim**-0.5
    out = q.new_empty(q.shape)
    at_once = max(1, _LOGIT_BYTES // (groups * heads * k.shape[1] * wide.itemsize))
    for start in range(0, tokens, at_once):
        tile = slice(start, start + at_once)
        logits = queries[:, :, tile] @ keys.transpose(2, 3)
        logits += bias[:, None, None]
        out[:, tile] = (logits.softmax(-1) @ values).transpose(1, 2)
    return out
