"""PyTorch's own attention behind the op, for comparison: it attends to every token of the padding."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import Implementation, never_absent


class Text(NamedTuple):
    """Groups of queries that see equally many keys, and these: [groups, keys, heads, head_dim] each."""

    groups: slice
    k: Tensor
    v: Tensor


def padded(k: Tensor, v: Tensor, view: Tensor) -> list[Text]:
    """Keys and values of every group as the model has them, the padding's repeated. Reads `view` on the host."""
    texts, first = [], 0
    for _, alike in groupby(view.tolist(), key=lambda row: row[1] + row[2]):
        keys, values = [], []
        for slot, seen, count in alike:
            rows = torch.arange(seen + count, device=k.device).clamp(max=seen)
            keys.append(k[slot, rows])
            values.append(v[slot, rows])
        texts.append(Text(slice(first, first + len(keys)), torch.stack(keys), torch.stack(values)))
        first += len(keys)
    return texts


def attend(q: Tensor, norm_weight: Tensor, texts: list[Text], eps: float) -> Tensor:
    """Norm and attention of [groups, tokens, heads, head_dim], in q's dtype."""
    normed = F.rms_norm(q.flatten(-2), norm_weight.shape, norm_weight.to(q.dtype), eps).view_as(q)
    parts = [_sdpa(normed[text.groups], text.k, text.v) for text in texts]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _padded_sdpa(q: Tensor, norm_weight: Tensor, k: Tensor, v: Tensor, view: Tensor, eps: float) -> Tensor:
    """As the op. Reads `view` on the host."""
    return attend(q, norm_weight, padded(k, v, view), eps)


IMPLEMENTATIONS = (Implementation("sdpa", _padded_sdpa, never_absent),)
