"""The Live Avatar network: velocity of a block at one timestep, and the caches that it reads.

Everything that does not change from step to step is computed once by a method of its own: text keys and values per
session, audio inputs per block, time modulation per timestep, the sink whenever its image changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from liveavatar_kernels.cache import KeyValueCache
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..config.geometry import LATENT_FRAME_STRIDE, MOTION_LATENTS
from .attention import KeyValue, RingView
from .audio_injection import AudioInjector, InjectorInput
from .audio_tokens import CausalAudioEncoder
from .block import TransformerBlock
from .embeddings import Head, PatchEmbedding, sinusoid, text_embedding, time_embedding, time_projection
from .residual import Residual
from .sink_tokens import FramePacker

MOTION_FRAMES = MOTION_LATENTS * LATENT_FRAME_STRIDE - 3
"""Video frames behind the motion latents: 73, which also is the audio encoder's left context in columns."""
NOISY, REFERENCE, MOTION = range(3)
"""Rows of `trainable_cond_mask`, one per kind of token."""


@dataclass(frozen=True)
class TimeModulation:
    """What one timestep contributes; float32.

    Attributes:
        blocks: [layers, 6, dim], learned modulation plus the time projection.
        head: [2, dim], learned modulation plus the time embedding.
    """

    blocks: Tensor
    head: Tensor


@dataclass(frozen=True)
class BlockInputs:
    """What a block brings besides its latents; the same for all of its steps.

    Attributes:
        pose: pose latents [cond_dim, frames, height, width], or None.
        audio: one entry per injector.
        actor_mask: [actors, frames, tokens_per_frame, 1], or None for a single actor without a mask.
    """

    pose: Tensor | None
    audio: list[InjectorInput]
    actor_mask: Tensor | None


class Network(nn.Module):
    """The causal Wan 2.2 S2V transformer. Tensors carry no batch axis: one call is one session's work."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.config = config
        self.patch_embedding = PatchEmbedding(config.in_dim, dim, config.patch_size)
        self.cond_encoder = PatchEmbedding(config.cond_dim, dim, config.patch_size)
        self.trainable_cond_mask = nn.Embedding(3, dim)
        self.frame_packer = FramePacker(config.in_dim, dim)
        self.text_embedding = text_embedding(config.text_dim, dim)
        self.time_embedding = time_embedding(config.freq_dim, dim)
        self.time_projection = time_projection(dim)
        self.casual_audio_encoder = CausalAudioEncoder(
            config.audio_dim, dim, config.audio_layers, config.num_audio_token, MOTION_FRAMES, MOTION_LATENTS
        )
        self.audio_injector = AudioInjector(config.injector_layers, dim, heads, eps)
        self.blocks = nn.ModuleList(TransformerBlock(dim, config.ffn_dim, heads, eps) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_dim, config.patch_size, eps)

    @staticmethod
    def keeps_float32(name: str) -> bool:
        """Whether the parameter stays in float32 whatever the model's dtype: the reference computes there in it."""
        return name.startswith(("time_embedding.", "time_projection.", "casual_audio_encoder.", "head.")) or (
            name.endswith(".modulation")
        )

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype: of tokens, caches and most weights."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def text_keys(self, context: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of a prompt, once per session; one entry per layer.

        `context` is [tokens, text_dim], at most text_len tokens. It is padded with zeros to text_len *before* the
        embedding, and the padding is attended to.
        """
        padded = F.pad(context.to(self.device, self.dtype), (0, 0, 0, self.config.text_len - context.shape[0]))
        embedded = self.text_embedding(padded)
        return [block.cross_attn.key_value(embedded) for block in self._blocks()]

    def audio_inputs(self, states: Tensor) -> list[InjectorInput]:
        """Injector inputs of a block from wav2vec2 states [actors, audio_layers, audio_dim, columns]."""
        return self.audio_injector.prepare(self.casual_audio_encoder(states.to(self.device)))

    def time_modulation(self, timestep: float | Tensor) -> TimeModulation:
        """Modulation of every layer and of the head at one timestep in 0..1000."""
        position = torch.as_tensor(timestep, dtype=torch.float64, device=self.device)
        wide = self.head.modulation.dtype
        embedding = self.time_embedding(sinusoid(position, self.config.freq_dim).to(wide))
        projection = self.time_projection(embedding).view(6, -1)
        return TimeModulation(
            blocks=torch.stack([block.modulation[0] + projection for block in self._blocks()]),
            head=self.head.modulation[0] + embedding,
        )

    def prefill_sink(
        self,
        reference: Tensor,
        motion: Tensor | None,
        text: list[KeyValue],
        sink: list[KeyValueCache],
        view: RingView,
    ) -> None:
        """Fill the sink's keys and values, `[motion | reference]`, at time 0 and base positions.

        Args:
            reference: [channels, 1, height, width].
            motion: [channels, frames, height, width], oldest first, or None to leave motion tokens out.
            text: of the session; the sink's tokens read the prompt too, but no audio.
            sink: one entry per layer, written in place.
            view: where the sink's tokens go, and that they see each other.
        """
        tokens = self.patch_embedding.tokens(reference.to(self.device)) + self.trainable_cond_mask.weight[REFERENCE]
        if motion is not None:
            packed = self.frame_packer(motion.to(self.device, self.dtype)) + self.trainable_cond_mask.weight[MOTION]
            tokens = torch.cat((packed, tokens))
        time = self.time_modulation(0.0)
        stream = Residual(tokens)
        for block, modulation, layer_text, layer_sink in zip(self._blocks(), time.blocks, text, sink, strict=True):
            stream = block(stream, modulation, layer_text, layer_sink, layer_sink, view)

    def forward(
        self,
        latents: Tensor,
        time: TimeModulation,
        text: list[KeyValue],
        inputs: BlockInputs,
        ring: list[KeyValueCache],
        sink: list[KeyValueCache],
        view: RingView,
    ) -> Tensor:
        """Velocity of a block: float32 [channels, frames, height, width] -> the same shape, float32.

        Writes the block's keys and values to `ring`, the ring of this timestep.
        """
        _, frames, height, width = latents.shape
        tokens = self.patch_embedding.tokens(latents) + self._pose_tokens(inputs.pose)
        tokens = tokens + self.trainable_cond_mask.weight[NOISY]
        stream = Residual(tokens)
        layers = zip(self._blocks(), time.blocks, text, ring, sink, strict=True)
        for index, (block, modulation, layer_text, layer_ring, layer_sink) in enumerate(layers):
            stream = block(stream, modulation, layer_text, layer_ring, layer_sink, view)
            stream = self.audio_injector(stream, index, inputs.audio, inputs.actor_mask)
        patch_frames, patch_rows, patch_columns = self.config.patch_size
        grid = (frames // patch_frames, height // patch_rows, width // patch_columns)
        return self.head(stream, time.head[0], time.head[1], grid, self.dtype)

    def _pose_tokens(self, pose: Tensor | None) -> Tensor:
        """Pose tokens [tokens, dim]; without a pose the reference encodes zeros, which leaves the bias, [dim]."""
        if pose is None:
            bias = self.cond_encoder.bias
            assert bias is not None
            return bias
        return self.cond_encoder.tokens(pose.to(self.device))

    def _blocks(self) -> list[TransformerBlock]:
        return [block for block in self.blocks if isinstance(block, TransformerBlock)]
