"""What each linear layer would lose in e4m3, measured on what the network really computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from liveavatar_kernels.e4m3 import quantize_rows
from liveavatar_kernels.fp8_linear import fp8_linear
from liveavatar_kernels.fp8_quantize import fp8_quantize
from torch import Tensor, nn

from ..model import Network


@dataclass(frozen=True)
class LayerLoss:
    """What e4m3 costs a linear layer.

    Attributes:
        name: of the layer.
        skipped: whether `fp8_skip` keeps it out of e4m3.
        calls: that were measured.
        sqnr: signal to quantisation noise of its output in dB, over all calls: 10 log10(sum |y|^2 / sum |y8 - y|^2).
        worst_sqnr: that of the token that loses most; tokens without any signal are left out.
        weight_sqnr: that of the weight alone.
    """

    name: str
    skipped: bool
    calls: int
    sqnr: float
    worst_sqnr: float
    weight_sqnr: float


class _Meter:
    """Energies of a layer's output and of its error, added up over calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.signal = self.noise = 0.0
        self.worst = math.inf

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        weight, weight_scale = quantize_rows(layer.weight)
        bias = None if layer.bias is None else layer.bias.float()
        quantized = fp8_linear(fp8_quantize(_rows(inputs[0])), weight, weight_scale, bias, dtype=torch.float32)
        exact = _rows(output).float()
        signal, noise = (x.square().sum(dim=-1, dtype=torch.float64) for x in (exact, quantized - exact))
        self.calls += 1
        self.signal += float(signal.sum())
        self.noise += float(noise.sum())
        heard = signal > 0
        if heard.any():
            self.worst = min(self.worst, float(_decibels(signal[heard], noise[heard]).min()))


@contextmanager
def measured_losses(network: Network, skip: tuple[str, ...]) -> Iterator[list[LayerLoss]]:
    """Measure every linear layer of `network` that is called in the body; the list is filled when it ends.

    `network` must not be quantised itself.
    """
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    meters = {name: _Meter() for name in layers}
    hooks = [layer.register_forward_hook(meters[name]) for name, layer in layers.items()]
    losses: list[LayerLoss] = []
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()
    for name, meter in meters.items():
        if meter.calls:
            sqnr = float(_decibels(torch.tensor(meter.signal), torch.tensor(meter.noise)))
            skipped = any(entry in name for entry in skip)
            losses.append(LayerLoss(name, skipped, meter.calls, sqnr, meter.worst, _weight_sqnr(layers[name].weight)))
    losses.sort(key=lambda loss: loss.sqnr)


def _weight_sqnr(weight: Tensor) -> float:
    values, scale = quantize_rows(weight)
    exact = weight.float()
    noise = values.float() * scale[:, None] - exact
    return float(_decibels(exact.square().sum(dtype=torch.float64), noise.square().sum(dtype=torch.float64)))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    return 10 * torch.log10(signal.double() / noise.double().clamp(min=1e-300))
