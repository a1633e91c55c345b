"""The reference's own network on a stream: made, filled with our weights, and driven as its pipeline drives it.

Nothing of its pipeline runs, because that begins with files, encoders and the VAE: what the pipeline does between two
calls of the network (caches, timesteps, Euler steps) is done here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ...config import ModelConfig, StreamGeometry
from ...config.geometry import LATENT_FRAME_STRIDE, MOTION_LATENTS
from ...denoise.schedule import Schedule
from ...errors import InputError
from . import patches, stand_ins
from .checkout import ATTENTION_MODULE, CONSTRUCTOR, FP8_MODULE, NETWORK_CLASS, NETWORK_MODULE, PACKAGE, Checkout
from .inputs import StreamInputs
from .stand_ins import StandInLog

Weights = Iterator[tuple[str, Tensor]]
LayerCaches = list[dict[str, Any]]
StepDone = Callable[[int, int, Tensor], None]
"""Called with block, step and velocity when a step, its Euler update included, is done."""

_MOTION_FRAMES = MOTION_LATENTS * LATENT_FRAME_STRIDE - 3


@contextmanager
def imported(
    checkout: Checkout, device: torch.device, dtype: torch.dtype, compiled: bool, log: StandInLog
) -> Iterator[ModuleType]:
    """The module of the reference's network, with all that stands in for what cannot run, while the body runs.

    Raises:
        InputError: it needs a package that is not installed and has no stand-in.
    """
    importlib.import_module("torch._dynamo")  # looks at einops when it is imported: before there is a stand-in for it
    with ExitStack() as opened:
        opened.enter_context(stand_ins.packages(device, log))
        opened.enter_context(patches.compile_switch(compiled))
        if device.type == "cpu" and not compiled:
            opened.enter_context(patches.eager(log))
        opened.enter_context(patches.autocast(device, dtype, log))
        opened.enter_context(patches.own_packages(PACKAGE, _packages(checkout)))
        log.use("the packages' __init__ files", "nothing", "they import pipelines, encoders and the VAE")
        attention = _import(checkout, ATTENTION_MODULE) if checkout.has(ATTENTION_MODULE) else None
        opened.enter_context(patches.attention(attention, device, dtype, log))
        yield _import(checkout, NETWORK_MODULE)


def _packages(checkout: Checkout) -> dict[str, str]:
    """Package -> folder of every folder with Python files, and of those above; outer ones first."""
    top = checkout.root / PACKAGE
    folders = {file.parent for file in top.rglob("*.py")}
    folders |= {parent for folder in folders for parent in folder.parents if parent.is_relative_to(top)} | {top}
    return {".".join(folder.relative_to(checkout.root).parts): str(folder) for folder in sorted(folders)}


def _import(checkout: Checkout, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--reference {checkout.root}: {module} imports {error.name}, which is not installed and has no stand-in"
        ) from error


class ReferenceModel:
    """The reference's network with our weights; make and use it inside `imported`.

    Args:
        module: that holds the network's class.
        config: sizes and variants.
        weights: name and tensor, in the dtype that the network is to have.
        fp8_skip: parts of the names of linear layers that the reference's FP8 leaves alone; None: no FP8.

    Raises:
        InputError: the network has other parameters than ours.
    """

    def __init__(
        self,
        module: ModuleType,
        config: ModelConfig,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        fp8_skip: tuple[str, ...] | None,
        log: StandInLog,
    ) -> None:
        self.config, self.device, self.dtype, self.log = config, device, dtype, log
        with patches.cuda_literals(device, log):
            with patches.parameters_on_meta():
                network: nn.Module = getattr(module, NETWORK_CLASS)(
                    **{name: getattr(config, name) for name in CONSTRUCTOR}
                )
            self.network = network.eval().requires_grad_(False)
            _fill(self.network, weights)
            if fp8_skip is not None:
                importlib.import_module(FP8_MODULE).replace_linear_with_scaled_fp8(
                    self.network, ignore_keys=list(fp8_skip)
                )

    @contextmanager
    def running(self) -> Iterator[None]:
        """The conditions under which the reference's pipeline calls its network."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        with torch.no_grad(), torch.amp.autocast(self.device.type, dtype=self.dtype) if half else nullcontext():
            yield


def _fill(network: nn.Module, weights: Weights) -> None:
    wanted = {name: parameter.shape for name, parameter in network.state_dict().items()}
    for name, tensor in weights:
        if wanted.get(name) != tensor.shape:
            found = "absent" if name not in wanted else f"of shape {list(wanted[name])}"
            raise InputError(f"the reference's network: {name} is {found}, expected {list(tensor.shape)}")
        del wanted[name]
        owner, _, leaf = name.rpartition(".")
        network.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    if wanted:
        names = sorted(wanted)
        raise InputError(
            f"the reference's network has {len(names)} parameters that ours has not: {', '.join(names[:5])}"
        )


@dataclass(frozen=True)
class _Caches:
    """What the pipeline keeps: per step and layer the ring, per layer the sink, which the steps share."""

    rings: list[LayerCaches]
    cross: LayerCaches

    @classmethod
    def allocate(cls, geometry: StreamGeometry, steps: int, dtype: torch.dtype, device: torch.device) -> _Caches:
        model = geometry.model

        def zeros(tokens: int) -> Tensor:
            return torch.zeros(1, tokens, model.num_heads, model.head_dim, dtype=dtype, device=device)

        sink = [
            {
                "cond_k": zeros(geometry.sink_tokens),
                "cond_v": zeros(geometry.sink_tokens),
                "cond_end": torch.zeros(1, dtype=torch.long, device=device),
            }
            for _ in range(model.num_layers)
        ]
        rings = [
            [{"k": zeros(geometry.ring_tokens), "v": zeros(geometry.ring_tokens), **layer} for layer in sink]
            for _ in range(steps)
        ]
        return cls(rings, [{"k": zeros(0), "v": zeros(0), "is_init": False} for _ in range(model.num_layers)])


class ReferenceStream:
    """A stream of one portrait without a pose; blocks come in order.

    Args:
        model: on whose device everything runs.
        schedule: timesteps and noise levels.
        inputs: of the stream.
        update_after: blocks after which the first generated latent frame becomes the reference; None: never.
        step_done: see `StepDone`.
    """

    def __init__(
        self,
        model: ReferenceModel,
        geometry: StreamGeometry,
        schedule: Schedule,
        inputs: StreamInputs,
        update_after: int | None,
        step_done: StepDone,
    ) -> None:
        self._model, self._geometry, self._schedule, self._step_done = model, geometry, schedule, step_done
        self._update_after = update_after
        self._caches = _Caches.allocate(geometry, schedule.steps, model.dtype, model.device)
        self._context = [self._own(inputs.context)]
        self._motion = self._own(inputs.motion)[None]
        self._pose = self._own(torch.zeros(geometry.model.cond_dim, *geometry.block_shape[1:]))[None]
        self._noise, self._audio = inputs.noise, inputs.audio
        self._first_latent = self._own(inputs.reference)[None]
        self._prefill(self._first_latent)

    def block(self, index: int) -> Tensor:
        """Latents of a block, [channels, frames, latent_height, latent_width], in the model's dtype."""
        if self._update_after is not None and index == self._update_after:
            self._prefill(self._first_latent)
        latents, audio = self._own(self._noise[index]), self._own(self._audio[index])
        with self._model.running():
            for step in range(self._schedule.steps):
                velocity, latents = self._step(step, index, latents, audio)
                self._step_done(index, step, velocity)
        if index == 0:
            self._first_latent = latents[None, :, :1]
        return latents

    def _step(self, step: int, block: int, latents: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Velocity, and latents one Euler step further: in float32, rounded to the velocity's dtype."""
        tokens, frames = self._geometry.tokens_per_block, self._geometry.frames_per_block
        timestep = torch.full((1, frames), self._schedule.timesteps[step], device=self._model.device)
        (velocity,) = self._model.network(
            [latents],
            t=timestep,
            **self._conditions(audio),
            kv_cache=self._caches.rings[step],
            crossattn_cache=self._caches.cross,
            current_start=block * tokens,
            current_end=(block + 1) * tokens,
            mask=None,
        )
        delta = self._schedule.sigmas[step + 1] - self._schedule.sigmas[step]
        return velocity, (latents.float() + delta * velocity).to(velocity.dtype)

    def _prefill(self, reference: Tensor) -> None:
        nothing = self._own(torch.zeros(self._geometry.block_shape))
        frames, tokens = self._geometry.frames_per_block, self._geometry.tokens_per_block
        with self._model.running(), patches.width_literal(self._geometry.model.dim, self._model.log):
            self._model.network(
                [nothing],
                t=torch.zeros(1, frames, dtype=self._model.dtype, device=self._model.device),
                **{**self._conditions(self._own(self._audio[0])), "ref_latents": reference},
                sink_flag=True,
                kv_cache=self._caches.rings[0],
                crossattn_cache=self._caches.cross,
                current_start=0,
                current_end=tokens,
            )

    def _conditions(self, audio: Tensor) -> dict[str, Any]:
        return {
            "context": self._context,
            "seq_len": None,
            "cond_states": self._pose,
            "motion_latents": self._motion,
            "ref_latents": self._first_latent,
            "audio_input": audio,
            "motion_frames": [_MOTION_FRAMES, MOTION_LATENTS],
            "drop_motion_frames": False,
        }

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._model.device, self._model.dtype)
