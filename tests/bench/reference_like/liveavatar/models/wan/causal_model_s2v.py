"""A network with the reference's names, signature and habits, written for the tests of `compare` from its formulas.

It has one prompt, one actor and no pose, keeps keys and values in the dictionaries that it is given, and computes what
does not depend on the step in every step. It writes "cuda" and 5120 where the reference does, rounds where it does,
and needs the same packages.
"""

import random

import torch
import torch.cuda.amp as amp
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin  # noqa: F401 - imported and never used, as in the reference
from diffusers.models.attention import AdaLayerNorm
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from liveavatar.models.wan.wan_2_2.modules.attention import attention, flash_attention
from torch.nn import functional as F

from liveavatar_engine.config import ModelConfig, StreamGeometry
from liveavatar_engine.model import Network
from liveavatar_engine.model.rope import AxisFrequencies

REFERENCE_TIME = 30
PERTURBATION = 0.0


class CausalWanModel_S2V(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(
        self,
        cond_dim=0,
        audio_dim=5120,
        num_audio_token=4,
        enable_adain=False,
        adain_mode="attn_norm",
        audio_inject_layers=(0, 2),
        zero_timestep=False,
        enable_motioner=True,
        add_last_motion=True,
        enable_framepack=False,
        framepack_drop_mode="drop",
        patch_size=(1, 2, 2),
        text_len=512,
        in_dim=16,
        dim=2048,
        ffn_dim=8192,
        freq_dim=256,
        text_dim=4096,
        out_dim=16,
        num_heads=16,
        num_layers=32,
        window_size=(-1, -1),
        qk_norm=True,
        cross_attn_norm=True,
        eps=1e-6,
        **kwargs,
    ):
        super().__init__()
        self.sizes = ModelConfig(
            dim, ffn_dim, num_heads, num_layers, audio_dim, audio_inject_layers, freq_dim, text_dim, text_len
        )
        for name, child in Network(self.sizes).named_children():
            setattr(self, name, child)
        self.audio_injector.injector_adain_layers = torch.nn.ModuleList(
            AdaLayerNorm(output_dim=dim * 2, embedding_dim=dim, chunk_dim=1) for _ in audio_inject_layers
        )
        self.angles = AxisFrequencies.of(dim // num_heads)
        self.device_check = torch.zeros(1).to("cuda")
        self.sink_angles = None

    def forward(self, *args, **kwargs):
        call = self._forward_sink if kwargs.pop("sink_flag", False) else self._forward_inference
        return call(*args, **kwargs)

    def _forward_sink(
        self,
        x,
        t,
        context,
        seq_len,
        ref_latents,
        motion_latents,
        cond_states,
        audio_input=None,
        motion_frames=(17, 5),
        drop_motion_frames=False,
        kv_cache=None,
        crossattn_cache=None,
        current_start=0,
        current_end=0,
    ):
        assert not self.enable_motioner, "found among the recorded arguments only"
        nothing = torch.zeros([1, 5120, 0, 1, 1]).to(dtype=torch.bfloat16, device=x[0].device)
        reference = self._patches(self.patch_embedding, ref_latents) + self.trainable_cond_mask.weight[1]
        motion = self._motion(motion_latents) + self.trainable_cond_mask.weight[2]
        tokens = torch.cat([nothing.flatten(2).transpose(1, 2), reference, motion], dim=1)
        geometry = StreamGeometry(self.sizes, x[0].shape[2] * 8, x[0].shape[3] * 8)
        segments = (geometry.reference_segment, *geometry.fixed_sink)
        self.sink_angles = torch.cat([self.angles.angles(s.times, s.rows, s.columns) for s in segments])
        self.reference_tokens = reference.shape[1]
        time, _ = self._time(t[0, :1] * 0)
        text = self._text(context)

        def attend(layer, q, k, v):
            cache = kv_cache[layer]
            cache["cond_k"][:], cache["cond_v"][:] = k, v
            cache["cond_end"][0] = k.shape[1]
            turn = self._turns(self.sink_angles)
            return attention(rotated(q, turn), rotated(k, turn), v)

        for layer in range(len(self.blocks)):
            tokens = self._layer(layer, tokens, time, text, attend)
        return [state for state in torch.zeros_like(cond_states)]

    def _forward_inference(
        self,
        x,
        t,
        context,
        seq_len,
        ref_latents,
        motion_latents,
        cond_states,
        audio_input=None,
        motion_frames=(17, 5),
        drop_motion_frames=False,
        kv_cache=None,
        crossattn_cache=None,
        current_start=0,
        current_end=0,
        mask=None,
    ):
        latents = x[0][None]
        _, _, frames, height, width = latents.shape
        rows, columns = range(height // 2), range(width // 2)
        tokens = self._patches(self.patch_embedding, latents) + self._patches(self.cond_encoder, cond_states)
        tokens = tokens + self.trainable_cond_mask.weight[0]
        first = current_start // (len(rows) * len(columns))
        turn = self._turns(self.angles.angles(range(first, first + frames), rows, columns))
        shift = max(0, first - (REFERENCE_TIME - random.randint(4, 30)))
        sink_turn = self._turns(self._shifted_sink(shift))
        time, embedding = self._time(t[0, :1])
        text, audio = self._text(context), self.casual_audio_encoder(audio_input.float())

        def attend(layer, q, k, v):
            cache = kv_cache[layer]
            size, start = cache["k"].shape[1], current_start % cache["k"].shape[1]
            cache["k"][:, start : start + k.shape[1]], cache["v"][:, start : start + k.shape[1]] = rotated(k, turn), v
            valid, end = min(size, current_end), int(cache["cond_end"])
            keys = torch.cat([cache["k"][:, :valid], rotated(cache["cond_k"][:, :end], sink_turn)], dim=1)
            values = torch.cat([cache["v"][:, :valid], cache["cond_v"][:, :end]], dim=1)
            return attention(rotated(q, turn), keys, values)

        for layer in range(len(self.blocks)):
            tokens = self._layer(layer, tokens, time, text, attend)
            if layer in self.sizes.injector_layers:
                tokens = tokens + self._injected(self.sizes.injector_layers.index(layer), tokens, audio, frames)
        velocity = self._head(tokens, embedding)
        shape = {"f": frames, "h": len(rows), "w": len(columns), "p": 1, "q": 2, "r": 2}
        return list(rearrange(velocity, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", **shape) + PERTURBATION)

    def _patches(self, layer, latents):
        patches = F.conv3d(latents, layer.weight, layer.bias, stride=layer.weight.shape[2:])
        return rearrange(patches, "b c f h w -> b (f h w) c")

    def _motion(self, latents):
        packer = self.frame_packer
        parts = (latents[:, :, 18:], latents[:, :, 16:18], latents[:, :, :16])
        layers = (packer.proj, packer.proj_2x, packer.proj_4x)
        return torch.cat([self._patches(layer, part) for layer, part in zip(layers, parts, strict=True)], dim=1)

    def _time(self, t):
        with amp.autocast(dtype=torch.float32):
            half = self.sizes.freq_dim // 2
            angles = t.double() * torch.pow(10000, -torch.arange(half, dtype=torch.float64) / half)
            embedding = self.time_embedding(torch.cat([angles.cos(), angles.sin()]).float())
            return self.time_projection(embedding).view(6, -1), embedding

    def _text(self, context):
        padded = F.pad(context[0], (0, 0, 0, self.sizes.text_len - len(context[0])))
        return self.text_embedding(padded[None])

    def _layer(self, layer, x, time, text, attend):
        block, dtype = self.blocks[layer], x.dtype
        e = (block.modulation[0] + time)[:, None]
        norm = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        q, k, v = self._projected(block.self_attn, (norm * (1 + e[1]) + e[0]).to(dtype))
        x = x + block.self_attn.o(attend(layer, q, k, v).flatten(2)) * e[2]
        norm = F.layer_norm(x.to(torch.bfloat16), x.shape[-1:], block.norm3.weight, block.norm3.bias, 1e-6)
        q, k, v = self._projected(block.cross_attn, norm.to(dtype), text)
        x = x + block.cross_attn.o(flash_attention(q, k, v, k_lens=None).flatten(2))
        norm = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
        up = F.gelu(block.ffn[0]((norm * (1 + e[4]) + e[3]).to(dtype)), approximate="tanh")
        return (x + block.ffn[2](up) * e[5]).to(dtype)

    def _injected(self, number, x, audio, frames):
        by_frame = rearrange(x, "b (t n) c -> (b t) n c", t=frames)
        heard = self.audio_injector.injector_adain_layers[number](by_frame, temb=audio.global_token[0].to(x.dtype))
        injector = self.audio_injector.injector[number]
        context = audio.local_tokens[0].to(x.dtype)
        q, k, v = self._projected(injector, heard, context)
        lengths = torch.full((frames,), context.shape[1])
        found = injector.o(flash_attention(q, k, v, k_lens=lengths).flatten(2))
        return rearrange(found, "(b t) n c -> b (t n) c", t=frames)

    def _projected(self, layer, x, context=None):
        context = x if context is None else context
        parts = normed(layer.q(x), layer.norm_q), normed(layer.k(context), layer.norm_k), layer.v(context)
        return [part.unflatten(-1, (self.sizes.num_heads, -1)) for part in parts]

    def _head(self, x, embedding):
        with amp.autocast(dtype=torch.float32):
            shift, scale = self.head.modulation[0] + embedding
            norm = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift
            return self.head.head(norm).to(x.dtype)

    def _turns(self, angles):
        """Rotations from a table in float16."""
        table = torch.stack([angles.cos(), angles.sin()], dim=-1).to(torch.float16)
        return torch.view_as_complex(table.double())[None, :, None]

    def _shifted_sink(self, frames):
        angles = self.sink_angles.clone()
        pairs = len(self.angles.time)
        angles[: self.reference_tokens, :pairs] += self.angles.time_angles([frames])
        return angles


def normed(x, norm):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype) * norm.weight


def rotated(x, turn):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
