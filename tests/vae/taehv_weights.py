"""A light decoder in TAEHV's file format: random weights, and its plain form over a whole sequence."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from liveavatar_engine.vae.light import LightShape

SHAPE = LightShape((12, 8, 8, 4), 2, (False, True, True), 16)
"""Of `random_state`; the published files have widths 256, 128, 64 and 64, and three blocks per level."""
State = dict[str, Tensor]


def random_state(
    widths: tuple[int, ...] = SHAPE.widths, doublings: tuple[int, ...] = (1, 2, 2), latent_channels: int = 16
) -> State:
    """What a file of TAEHV's form holds, an encoder's tensor included; two memory blocks per level."""
    generator = torch.Generator().manual_seed(1)

    def conv(name: str, channels_in: int, channels_out: int, side: int = 3, bias: bool = True) -> State:
        size = 1 / math.sqrt(channels_in * side * side)
        made = {f"{name}.weight": size * torch.randn(channels_out, channels_in, side, side, generator=generator)}
        return made | ({f"{name}.bias": 0.3 * torch.randn(channels_out, generator=generator)} if bias else {})

    state = conv("decoder.1", latent_channels, widths[0])
    number = 3
    for (width, above), times in zip(pairwise(widths), doublings, strict=True):
        for block in (number, number + 1):
            state |= conv(f"decoder.{block}.conv.0", 2 * width, width) | conv(f"decoder.{block}.conv.2", width, width)
            state |= conv(f"decoder.{block}.conv.4", width, width)
        state |= conv(f"decoder.{number + 3}.conv", width, times * width, side=1, bias=False)
        state |= conv(f"decoder.{number + 4}", width, above, bias=False)
        number += 5
    state |= conv(f"decoder.{number + 1}", widths[-1], 3) | conv("encoder.0", 3, 4)
    state[f"decoder.{number + 1}.weight"] /= 4
    state[f"decoder.{number + 1}.bias"] += 0.5
    return state


def plain_taehv(state: State, latents: Tensor) -> Tensor:
    """All frames at once, layer by layer, in taehv.py's order: [16, n, h, w] -> [4n - 3, 8h, 8w, 3] in [0, 1]."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    x = F.relu(conv("decoder.1", 3 * torch.tanh(latents.transpose(0, 1) / 3)))
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("decoder.")})
    for number in numbers[1:-1]:
        name = f"decoder.{number}"
        if f"{name}.conv.0.weight" in state:
            past = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
            y = F.relu(conv(f"{name}.conv.0", torch.cat((x, past), dim=1)))
            x = F.relu(conv(f"{name}.conv.4", F.relu(conv(f"{name}.conv.2", y))) + x)
        elif f"{name}.conv.weight" in state:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
            x = conv(f"{name}.conv", x).unflatten(1, (-1, x.shape[1])).flatten(0, 1)
        else:
            x = conv(name, x)
    return conv(f"decoder.{numbers[-1]}", F.relu(x)).clamp(0, 1)[3:].permute(0, 2, 3, 1)
