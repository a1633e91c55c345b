"""Actor masks: which tokens each actor's audio may move."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import StreamGeometry
from ..errors import InputError

_DILATION = 0.1
"""Growth of a mask, as a share of the longer side of its bounding box."""


def actor_mask(masks: list[np.ndarray], geometry: StreamGeometry) -> Tensor:
    """Injection weights of each actor: 1 where no *other* actor is, so the background belongs to all.

    Masks are brought to the token grid, made exclusive (a later actor wins) and grown by 10%, as the reference does.

    Args:
        masks: bool [height, width] of the picture, one per actor.

    Returns:
        float32 [actors, 1, tokens_per_frame, 1]; the same for every frame.

    Raises:
        InputError: a mask is empty on the token grid.
    """
    grid = (geometry.grid_rows, geometry.grid_columns)
    owner = torch.full(grid, -1)
    for actor, mask in enumerate(masks):
        pixels = torch.from_numpy(np.ascontiguousarray(mask)).float()
        owner[F.interpolate(pixels[None, None], size=grid, mode="bilinear")[0, 0] > 0.5] = actor
    grown = []
    for actor in range(len(masks)):
        inside = owner == actor
        if not inside.any():
            raise InputError(
                f"actor mask {actor + 1} of {len(masks)}: nothing of it is left on the {grid[1]}x{grid[0]} token grid; "
                "expected a white area of at least 16x16 pixels that no later mask covers"
            )
        grown.append(_grow(inside))
    present = torch.stack(grown)
    others = present.sum(dim=0, keepdim=True) - present.long() > 0
    return (~others).float().flatten(1)[:, None, :, None]


def _grow(inside: Tensor) -> Tensor:
    """Dilate a mask [rows, columns] by a square of the dilation radius."""
    rows, columns = inside.nonzero(as_tuple=True)
    longer = max(int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
    radius = max(1, int(_DILATION * longer + 0.9999))
    return F.max_pool2d(inside[None, None].float(), 2 * radius + 1, stride=1, padding=radius)[0, 0] > 0
