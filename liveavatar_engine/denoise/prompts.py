"""Prompts as keys and values, computed once and read by every step."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..errors import InputError
from ..model import Network
from .caches import CacheArena
from .positions import Scene


class Prompts:
    """Writes the keys and values of prompts to their slots of an arena."""

    def __init__(self, network: Network, arena: CacheArena) -> None:
        self._network, self._layers = network, arena.layers

    def check(self, context: Tensor) -> None:
        """Check that the network can read a text encoder's result, [tokens, text_dim].

        Raises:
            InputError: it is longer than the network's text_len, or of another width.
        """
        model, (tokens, width) = self._network.config, context.shape
        if tokens > model.text_len or width != model.text_dim:
            expected = f"at most {model.text_len} x {model.text_dim}"
            raise InputError(f"prompt: a context of {tokens} x {width}; the network reads {expected}")

    def write(self, scene: Scene, context: Tensor) -> Scene:
        """Write a prompt, [tokens, text_dim], to the slot that `scene` names; returns the scene with its lengths."""
        self.check(context)
        for keys, layer in zip(self._network.text_keys(context), self._layers, strict=True):
            layer.text.k[scene.text].copy_(keys.k)
            layer.text.v[scene.text].copy_(keys.v)
        tokens = len(context)
        return replace(scene, text_tokens=tokens, text_padding=self._network.config.text_len - tokens)
