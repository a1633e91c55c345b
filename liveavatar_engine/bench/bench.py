"""What all suites of a command share: device, clock, ceilings, weights."""

from __future__ import annotations

import gc
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..pipeline.assembly import assemble
from ..pipeline.device import resolve_precision
from ..pipeline.engine import Encoders, Engine
from ..pipeline.one_device import OneDevice
from ..pipeline.source import Files, RandomWeights
from ..pipeline.tpp.job import Job
from ..pipeline.tpp.many_devices import ManyDevices
from ..vae.light import load_decoder
from ..vae.vae import Vae, load_vae
from ..weights.layout import Checkpoint
from ..weights.presets import PRESETS
from ..weights.random_parts import RandomParts
from .environment import Environment
from .kernels.rows import Limits, limits_of
from .kernels.timing import Ceilings, clock_of, measure_ceilings
from .settings import Settings

_CEILING_REPEATS = 30


class Bench:
    """A device to measure on.

    Args:
        device: resolved.
        environment: of the report.
        progress: where to say what is going on; nothing else is printed.
    """

    def __init__(self, device: torch.device, environment: Environment, progress: Console) -> None:
        self.device, self.environment, self._progress = device, environment, progress
        self.clock = clock_of(device)
        self.limits: Limits | None = limits_of(environment.device)
        self._parts: tuple[tuple[Any, ...], RandomParts] | None = None

    @cached_property
    def ceilings(self) -> Ceilings:
        """What the device really does, measured at first use; nothing else should be running."""
        found = measure_ceilings(self.device, self.clock, _CEILING_REPEATS)
        e4m3 = "" if found.e4m3_tflops is None else f", an e4m3 product {found.e4m3_tflops:,.0f}"
        self.say(
            f"{self.environment.device}: a copy moves {found.copy_gbps:,.1f} GB/s, a {found.dtype} product does "
            f"{found.matmul_tflops:,.2f} TFLOP/s{e4m3}"
        )
        return found

    @property
    def measured_ceilings(self) -> Ceilings | None:
        """The ceilings, if a suite has asked for them."""
        return self.__dict__.get("ceilings")

    def say(self, text: str) -> None:
        """Tell the user, on the terminal's error stream."""
        self._progress.print(text, markup=False, style="dim")

    def engine(self, settings: Settings, **changes: Any) -> Engine:
        """An engine at a point, with `changes` to its settings. Its caches are freed when nobody holds it any more.

        Random weights are those of the engine before, where they are the same ones.

        Raises:
            ConfigError: the settings are not available.
            CheckpointError: the checkpoint is not usable.
            DeviceMemoryError: the device is too small.
        """
        config = settings.engine_config(**changes)
        if len(config.devices) > 1 and not isinstance(config.devices, str):
            return self.pipeline(settings, **changes)[0]
        started = time.perf_counter()
        if settings.checkpoint is not None:
            self.forget()
            engine = Engine.from_pretrained(settings.checkpoint, settings.lora, config, vae=settings.vae)
        else:
            parts = self._random_parts(settings)
            parts.require_memory(settings.geometry(), config)
            decoder = None
            if settings.vae is not None:
                precision = resolve_precision(config, self.device)
                decoder = load_decoder(Path(settings.vae), precision.decoder, self.device)
            runner = OneDevice(config, parts.network, decoder or parts.vae)
            engine = Engine(config, runner, Encoders(parts.vae, parts.text_encoder, parts.audio_encoder))
        self.synchronize()
        self.say(f"the weights are there, after {time.perf_counter() - started:.1f} s")
        return engine

    def pipeline(self, settings: Settings, *, trace: bool = False, **changes: Any) -> tuple[Engine, ManyDevices]:
        """An engine on the several devices that `changes` name, and its workers; it must be closed.

        Raises:
            LiveAvatarError: as of `Engine.from_pretrained`.
        """
        config = settings.engine_config(**changes)
        self.forget()
        source: Files | RandomWeights
        light = None if settings.vae is None else Path(settings.vae)
        if settings.checkpoint is not None:
            lora = None if settings.lora is None else Path(settings.lora)
            source = Files(Path(settings.checkpoint), lora, light)
        else:
            assert settings.preset is not None
            source = RandomWeights(settings.preset, settings.seed, light)
        started = time.perf_counter()
        parts = assemble(source, config, None, Job.current(), trace=trace)
        assert isinstance(parts.runner, ManyDevices)
        self.say(f"{len(parts.runner.plan)} workers are ready, after {time.perf_counter() - started:.1f} s")
        return Engine(parts.config, parts.runner, parts.encoders), parts.runner

    def vae(self, settings: Settings) -> Vae:
        """The VAE of a point alone, in its precision.

        Raises:
            CheckpointError: the checkpoint is not usable.
        """
        if settings.checkpoint is None:
            return self._random_parts(settings).vae
        precision = resolve_precision(settings.engine_config(), self.device)
        return load_vae(Checkpoint(Path(settings.checkpoint)).vae, precision.decoder, self.device)

    def _random_parts(self, settings: Settings) -> RandomParts:
        assert settings.preset is not None
        config = settings.engine_config()
        key = (settings.preset, config.precision, settings.seed)
        if self._parts is None or self._parts[0] != key:
            self.forget()
            preset, precision = PRESETS[settings.preset], resolve_precision(config, self.device)
            self._parts = key, RandomParts(preset, precision, self.device, settings.seed)
        return self._parts[1]

    def forget(self) -> None:
        """Free the weights."""
        self._parts = None
        self.free()

    def free(self) -> None:
        """Give what nobody holds back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def restart_memory(self) -> None:
        """Let `memory_bytes` forget earlier peaks of a GPU."""
        self.free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @property
    def memory_label(self) -> str:
        """What `memory_bytes` is."""
        return "device memory, peak of tensors" if self.device.type == "cuda" else "memory of the process (RSS)"

    def memory_bytes(self) -> int:
        """Of a GPU, most that tensors have held since `restart_memory`; of a CPU, what the process holds now."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


class Marks:
    """Points in time on the device's own clock, read once it has passed them all."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def clear(self) -> None:
        """Forget all marks."""
        self._marks.clear()

    def mark(self) -> None:
        """Remember this moment of what is put on the device."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def intervals_ms(self) -> list[float]:
        """Milliseconds between neighbours; waits for the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._on_gpu:
            return [(end - start) * 1e3 for start, end in pairs]
        if self._marks:
            self._marks[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairs]
