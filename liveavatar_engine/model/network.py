"""The Live Avatar network: velocity of a block at one timestep, and the caches that it reads.

Everything that does not change from step to step is computed once by a method of its own: text keys and values per
prompt, audio inputs and pose tokens per block, time modulation per timestep, the sink whenever its image or the prompt
changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import ModelConfig
from ..config.geometry import LATENT_FRAME_STRIDE, MOTION_LATENTS
from .attention import KeyValue, LayerCaches, StepView
from .audio_injection import AudioInjector, AudioInputs
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
    """What timesteps contribute; float32.

    Attributes:
        blocks: [layers, 6, timesteps, dim], learned modulation plus the time projection.
        head: [2, timesteps, dim], learned modulation plus the time embedding.
    """

    blocks: Tensor
    head: Tensor

    def __getitem__(self, timesteps: slice) -> TimeModulation:
        """Views of some of the timesteps."""
        return TimeModulation(self.blocks[:, :, timesteps], self.head[:, timesteps])


@dataclass(frozen=True)
class StepInputs:
    """What blocks bring besides their latents; the same for all steps of a block.

    Attributes:
        token_bias: [tokens, dim], added to the tokens of the latents: pose tokens and the mark of noisy ones.
        audio: of all frames.
        actor_mask: [actors, frames, tokens of a frame, 1], or None for a single actor without a mask.

    `token_bias` and `actor_mask` are of this rank's tokens.
    """

    token_bias: Tensor
    audio: AudioInputs
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

    def text_keys(self, context: Tensor) -> Iterator[KeyValue]:
        """Cross-attention keys and values of a prompt, layer by layer: [text_len, heads, head_dim] each.

        `context` is [tokens, text_dim], at most text_len tokens. It is padded with zeros to text_len *before* the
        embedding, and the padding is attended to; all of its rows are alike.
        """
        padded = F.pad(context.to(self.device, self.dtype), (0, 0, 0, self.config.text_len - context.shape[0]))
        embedded = self.text_embedding(padded)
        for block in self.layers():
            yield block.cross_attn.key_value(embedded)

    def audio_inputs(self, states: Tensor) -> Tensor:
        """`AudioInputs.packed` of a block from wav2vec2 states [actors, audio_layers, audio_dim, columns]."""
        return self.audio_injector.prepare(self.casual_audio_encoder(states.to(self.device)))

    def audio_inputs_shape(self, actors: int, frames: int) -> tuple[int, ...]:
        """The shape of what `audio_inputs` returns."""
        rows = self.audio_injector.rows(self.config.num_audio_token + 1)
        return (len(self.audio_injector.injector), actors, frames, rows, self.config.dim)

    def time_modulation(self, timesteps: Sequence[float]) -> TimeModulation:
        """Modulation of every layer and of the head at timesteps in 0..1000."""
        each = [self._time_modulation(timestep) for timestep in timesteps]
        return TimeModulation(
            blocks=torch.stack([blocks for blocks, _ in each], dim=2), head=torch.stack([head for _, head in each], 1)
        )

    def token_bias(self, pose: Tensor | None) -> Tensor:
        """What a block's pose latents [cond_dim, frames, height, width] add to its tokens: [tokens, dim].

        Without a pose the reference encodes zeros, which leaves a bias: [dim].
        """
        noisy = self.trainable_cond_mask.weight[NOISY]
        if pose is not None:
            return self.cond_encoder.tokens(pose.to(self.device)) + noisy
        bias = self.cond_encoder.bias
        assert bias is not None
        return bias + noisy

    def sink_tokens(self, reference: Tensor, motion: Tensor | None) -> Tensor:
        """Tokens of the sink, `[motion | reference]`, [tokens, dim].

        Args:
            reference: [channels, 1, height, width].
            motion: [channels, frames, height, width], oldest first, or None to leave motion tokens out.
        """
        tokens = self.patch_embedding.tokens(reference) + self.trainable_cond_mask.weight[REFERENCE]
        if motion is None:
            return tokens
        packed = self.frame_packer(motion.to(self.dtype)) + self.trainable_cond_mask.weight[MOTION]
        return torch.cat((packed, tokens))

    def layers(self) -> list[TransformerBlock]:
        """The transformer's blocks, in order."""
        return [block for block in self.blocks if isinstance(block, TransformerBlock)]

    def forward(
        self,
        latents: Tensor,
        time: TimeModulation,
        inputs: StepInputs,
        caches: Sequence[LayerCaches],
        view: StepView,
    ) -> Tensor:
        """Velocity of one or several groups, each a block at one timestep; groups do not see each other.

        Writes the blocks' keys and values to the rings that `view` names.

        Args:
            latents: [channels, groups * frames, height, width], the same on all ranks that share the call.
            time: of the groups' timesteps.
            inputs: of the groups, one behind the other.
            caches: one entry per layer.
            view: where the groups stand, and how their tokens are split over ranks.

        Returns:
            Of latents' shape, float32; the same bits on all ranks.
        """
        _, frames, height, width = latents.shape
        stream = Residual(view.split.mine(self.patch_embedding.tokens(latents)) + inputs.token_bias)
        layers = zip(self.layers(), time.blocks, caches, strict=True)
        for index, (block, modulation, layer_caches) in enumerate(layers):
            stream = block(stream, modulation, layer_caches, view)
            stream = self.audio_injector(stream, index, inputs.audio, inputs.actor_mask)
        patch_frames, patch_rows, patch_columns = self.config.patch_size
        grid = (frames // patch_frames, height // patch_rows, width // patch_columns)
        return self.head(stream, time.head[0], time.head[1], grid, self.dtype, view.split)

    def _time_modulation(self, timestep: float) -> tuple[Tensor, Tensor]:
        position = torch.as_tensor(timestep, dtype=torch.float64, device=self.device)
        wide = self.head.modulation.dtype
        embedding = self.time_embedding(sinusoid(position, self.config.freq_dim).to(wide))
        projection = self.time_projection(embedding).view(6, -1)
        blocks = torch.stack([block.modulation[0] + projection for block in self.layers()])
        return blocks, self.head.modulation[0] + embedding
