"""The stages of a pipeline in turn on one device, and what several such devices would do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from ...pipeline.device import graphs_absent, resolve_precision
from ...pipeline.tpp.plan import Plan, StageCosts, make_plan
from ...pipeline.tpp.simulate import simulate
from ...runtime.graphs import recorder
from ...vae.block_decoder import BlockDecoder
from ...vae.light import LightDecoder, load_decoder
from ...vae.vae import Vae
from ..bench import Bench, Marks
from ..results import SIMULATED, Figure, Run, Series, percentile
from ..settings import Settings
from ..step import RandomBlocks, run_blocks, warm_executor
from ..stream import run_session
from ..vae import decode_ms
from .options import SUITE, TppOptions

LAYOUTS = range(1, 7)
"""Devices that layouts are simulated for."""
_REPEATS = 5
_PRIMING_LATENTS = 7


@dataclass(frozen=True)
class _StageTimes:
    """Milliseconds, as measured; `fps` is that of a stream on the one device."""

    steps: list[float]
    prefills: list[float]
    decodes: list[float]
    first_decodes: list[float]
    fps: float


def measure(options: TppOptions, settings: Settings, bench: Bench) -> Run:
    """Measure each stage alone, and simulate layouts of 1 to 6 such devices.

    Raises:
        LiveAvatarError: the engine cannot be opened.
        ConfigError: a trace is asked for, or several devices are to share a step, or no layout is possible.
    """
    if options.trace is not None:
        raise ConfigError("--trace: one device has no timeline; name several with --devices, or --simulate")
    times = _times(settings, bench)
    step, prefill, decode, first = (
        percentile(values, 50) / 1e3 for values in (times.steps, times.prefills, times.decodes, times.first_decodes)
    )
    costs = StageCosts(step, decode, first, prefill, options.known.costs.transfer)
    layouts = list(_layouts(costs, options, settings))
    return Run(
        SUITE,
        {**settings.as_dict(), **options.as_dict()},
        warm_up=f"warm-up of the engine and of the decoder, and {settings.warm_up} blocks",
        figures=(*_measured(costs, times), *_predicted(layouts)),
        series=(
            Series("step_ms", "ms", "a denoise step", tuple(times.steps)),
            Series("decode_ms", "ms", "decode of a block", tuple(times.decodes)),
        ),
        rows=tuple(layouts),
        notes=(
            f"stage times are measured on one {bench.environment.device}; frames/s of layouts are simulated from them: "
            "no pipeline has run",
            f"simulated: a transfer takes {costs.transfer * 1e3:.4g} ms, which is "
            f"{'given, not measured' if costs.transfer else 'not measured'}, and the stages of a device never overlap",
        ),
    )


def _measured(costs: StageCosts, times: _StageTimes) -> Iterator[Figure]:
    yield Figure("step_ms", costs.step * 1e3, "ms", "measured: a denoise step, median")
    yield Figure("prefill_ms", costs.prefill * 1e3, "ms", "measured: the sink's prefill at once, median")
    yield Figure("decode_ms", costs.decode * 1e3, "ms", "measured: a block's decode, median")
    yield Figure("first_decode_ms", costs.first_decode * 1e3, "ms", "measured: the first latent's decode, median")
    yield Figure("fps", times.fps, "frames/s", "measured: a stream on this device, steady")


def _predicted(layouts: Sequence[dict[str, Any]]) -> Iterator[Figure]:
    for row in layouts:
        said = f"simulated: {row['devices']} such device{'s' if row['devices'] > 1 else ''}"
        if row["sessions"] > 1:
            said += f", {row['sessions']} sessions"
        yield Figure(f"simulated_fps_{row['devices']}", row["fps"], "frames/s", f"{said}, steady")
        yield Figure(f"simulated_first_frame_s_{row['devices']}", row["first_frame_s"], "s", f"{said}: first frame")


def _layouts(costs: StageCosts, options: TppOptions, settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each number of devices, with as few sessions as use all of them."""
    fits = False
    for count in LAYOUTS:
        found = _plan(count, costs, options)
        if found is None:
            continue
        plan, sessions = found
        fits = True
        run = simulate(
            plan,
            costs,
            settings.warm_up + settings.blocks,
            sessions=sessions,
            update_after=options.sink_update_after,
        )
        yield {
            "status": SIMULATED,
            "devices": count,
            "sessions": sessions,
            "layout": "; ".join(rank.stage for rank in plan.ranks),
            "fps": run.fps,
            "bottleneck_ms": plan.bottleneck(costs) * 1e3,
            "first_frame_s": run.first_frame,
            "early_first_frame_s": run.early_first_frame,
            "real_time_sessions": run.real_time_sessions,
        }
    if not fits:
        raise ConfigError(f"--sequence-parallel {options.sequence_parallel}: no layout of up to {LAYOUTS[-1]} devices")


def _plan(count: int, costs: StageCosts, options: TppOptions) -> tuple[Plan, int] | None:
    """A plan and its sessions; None where some of the devices would always be idle."""
    names = tuple(f"device {index}" for index in range(count))
    for sessions in range(options.sessions, max(options.sessions, count) + 1):
        try:
            plan = make_plan(
                names, options.steps, costs, sequence_parallel=options.sequence_parallel, max_sessions=sessions
            )
        except ConfigError:
            continue
        return plan, sessions
    return None


def _times(settings: Settings, bench: Bench) -> _StageTimes:
    engine = bench.engine(settings)
    fps = run_session(engine, settings, bench).steady_fps
    executor = warm_executor(engine, settings)
    steps = run_blocks(executor, settings, bench).steps
    blocks = RandomBlocks(executor, settings)
    prefills = [blocks.prefill_ms() for _ in range(_REPEATS)]
    del engine, executor, blocks
    bench.free()
    return _StageTimes(steps, prefills, *_decode_times(settings, bench), fps)


def _decoder(settings: Settings, bench: Bench) -> Vae | LightDecoder:
    """What makes frames."""
    if settings.vae is None:
        return bench.vae(settings)
    precision = resolve_precision(settings.engine_config(), bench.device)
    return load_decoder(Path(settings.vae), precision.decoder, bench.device)


def _decode_times(settings: Settings, bench: Bench) -> tuple[list[float], list[float]]:
    """Of whole blocks in mid-stream, and of first latents."""
    geometry = settings.geometry()
    channels, count, rows, columns = geometry.block_shape
    graphs = settings.graphs and graphs_absent(bench.device) is None
    decoder = BlockDecoder(_decoder(settings, bench), rows, columns, count, recorder(bench.device, graphs))
    generator = torch.Generator().manual_seed(settings.seed)

    def latents(frames: int) -> torch.Tensor:
        return torch.randn((channels, frames, rows, columns), generator=generator).to(bench.device)

    block, priming = latents(count), latents(_PRIMING_LATENTS)
    first: list[float] = []
    for _ in range(_REPEATS + 1):
        stream, marks = decoder.stream(), Marks(bench.device)
        stream.skip(priming)
        marks.mark()
        stream.decode(block[:, :1])
        marks.mark()
        first += marks.intervals_ms()
        stream.close()
    stream = decoder.stream()
    stream.skip(priming)
    return decode_ms(stream.decode, block, settings.warm_up, settings.blocks, bench.device), first[1:]
