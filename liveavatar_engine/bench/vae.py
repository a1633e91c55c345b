"""The suite `vae`: decoding a stream's blocks, encoding the still picture, priming the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..conditions.still import still_conditions, to_pixels
from ..config.geometry import FRAMES_PER_SECOND
from ..pipeline.device import graphs_absent, resolve_precision
from ..runtime.graphs import recorder
from ..synthetic import picture
from ..vae.block_decoder import BlockDecoder
from ..vae.light import LightDecoder, load_decoder
from ..vae.shape import VaeShape
from ..vae.vae import Vae, to_uint8
from .bench import Bench, Marks
from .counting import Counter
from .results import Figure, Run, Series, Stage, percentile
from .settings import Settings
from .work import Work, decode_flops, stage

SUITE = "vae"
_ENCODES = 2
"""Besides the one that is left out: it takes seconds."""
_PLAIN_BLOCKS = 5
"""Most blocks that the plain decoder is given."""


def measure(settings: Settings, bench: Bench) -> Run:
    """Decode random latents block by block, and encode a picture that stands still, as opening a session does."""
    ceilings = bench.ceilings
    bench.restart_memory()
    geometry, vae = settings.geometry(), bench.vae(settings)
    pixels = to_pixels(picture(geometry.height, geometry.width)).to(bench.device)
    still = still_conditions(vae, pixels)
    encode_ms = []
    for _ in range(_ENCODES):
        marks = Marks(bench.device)
        marks.mark()
        still_conditions(vae, pixels)
        marks.mark()
        encode_ms += marks.intervals_ms()
    graphs = settings.graphs and graphs_absent(bench.device) is None
    _, count, rows, columns = geometry.block_shape
    decoder = BlockDecoder(vae, rows, columns, count, recorder(bench.device, graphs))
    decoder.stream().decode(still.priming)
    priming = Marks(bench.device)
    priming.mark()
    stream = decoder.stream()
    stream.skip(still.priming)
    priming.mark()
    generator = torch.Generator().manual_seed(settings.seed)
    latents = torch.randn(geometry.block_shape, generator=generator).to(bench.device)
    deadline = geometry.seconds_per_block * 1e3
    times = decode_ms(stream.decode, latents, settings.warm_up, settings.blocks, bench.device)
    blocks = Series("decode_ms", "ms", "decode of a block", tuple(times), deadline)
    memory = bench.memory_bytes()
    plain = vae.decoder_stream()
    plain.decode(still.priming)
    fewer = min(settings.blocks, _PLAIN_BLOCKS)
    times = decode_ms(lambda x: to_uint8(plain.decode(x)), latents, min(settings.warm_up, 2), fewer, bench.device)
    plain_blocks = Series("plain_decode_ms", "ms", "decode of a block in plain PyTorch", tuple(times), deadline)
    counts = [_counted(lambda: stream.decode(latents)), _counted(lambda: to_uint8(plain.decode(latents)))]
    if bench.device.type == "cuda":
        counts[0] = _counted(decoder.work_of(latents.shape[1], first=False))
    flops = decode_flops(_shape(vae), geometry)
    precision = resolve_precision(settings.engine_config(), bench.device)
    light = _light(settings, bench, decoder, latents, blocks.p50)
    whole = stage("decode of a block", blocks.p50, 1, Work(flops), bench.limits, ceilings, per_block=True)
    frames = geometry.columns_per_block
    return Run(
        SUITE,
        settings.as_dict(),
        warm_up=f"the decoder's priming and {settings.warm_up} blocks; one encode",
        figures=(
            Figure("decode_ms_p50", blocks.p50, "ms", f"decode of a block of {frames} frames, median"),
            Figure("decode_ms_p99", blocks.p99, "ms", "decode of a block, p99"),
            Figure("plain_decode_ms_p50", plain_blocks.p50, "ms", "the same in plain PyTorch, median"),
            Figure("decode_speedup", plain_blocks.p50 / blocks.p50, "", "plain PyTorch over the decoder"),
            *light.figures,
            Figure("decode_operations", counts[0].operations, "", "operations that a block enqueues"),
            Figure("plain_operations", counts[1].operations, "", "the same in plain PyTorch"),
            Figure("decode_copied_mb", counts[0].copied_bytes / 2**20, "MiB", "that a block only moves"),
            Figure("plain_copied_mb", counts[1].copied_bytes / 2**20, "MiB", "the same in plain PyTorch"),
            Figure("decode_fps", frames / blocks.p50 * 1e3, "frames/s", "decoder alone"),
            Figure("decode_real_time", frames / FRAMES_PER_SECOND / blocks.p50 * 1e3, "", "decoder over real time"),
            Figure("decode_tflops", whole.tflops, "TFLOP/s", f"decode, of {flops / 1e12:,.3g} TFLOP a block"),
            Figure("decode_datasheet", whole.datasheet, "share", "decode: share of the datasheet's limit"),
            Figure("decode_measured", whole.measured, "share", f"decode: share of a {ceilings.dtype} product's speed"),
            Figure("encode_ms", percentile(encode_ms, 50), "ms", "encode of the still picture, median"),
            Figure("priming_ms", priming.intervals_ms()[0], "ms", "priming of a decoder, 7 latents"),
            Figure("memory_mb", memory / 2**20, "MiB", bench.memory_label),
        ),
        series=(blocks, plain_blocks, *light.series),
        stages=(whole, *light.stages),
        notes=(
            f"decoder in {str(precision.decoder).removeprefix('torch.')}, encoder in float32",
            "the picture's encode ends where the encoder's history repeats itself: random weights may need more steps",
        ),
    )


@dataclass(frozen=True)
class _Light:
    """What was measured of a light decoder, if there is one."""

    figures: tuple[Figure, ...] = ()
    series: tuple[Series, ...] = ()
    stages: tuple[Stage, ...] = ()


def _light(settings: Settings, bench: Bench, wan: BlockDecoder, latents: Tensor, wan_ms: float) -> _Light:
    """Decode the same latents with a light decoder, and say how far its frames are from the VAE's own."""
    if settings.vae is None:
        return _Light()
    path, precision = Path(settings.vae), resolve_precision(settings.engine_config(), bench.device)
    loaded = load_decoder(path, precision.decoder, bench.device)
    _, count, rows, columns = latents.shape
    graphs = settings.graphs and graphs_absent(bench.device) is None
    decoder = BlockDecoder(loaded, rows, columns, count, recorder(bench.device, graphs))
    stream = decoder.stream()
    deadline = settings.geometry().seconds_per_block * 1e3
    times = decode_ms(stream.decode, latents, settings.warm_up, settings.blocks, bench.device)
    blocks = Series("light_decode_ms", "ms", f"decode of a block by {path.name}", tuple(times), deadline)
    if isinstance(loaded, LightDecoder):
        flops = float(count * loaded.shape.flops(rows, columns))
    else:
        flops = decode_flops(_shape(loaded), settings.geometry())
    whole = stage(f"decode by {path.name}", blocks.p50, 1, Work(flops), bench.limits, bench.ceilings, per_block=True)
    ours, theirs = (one.stream().decode(latents).double() for one in (decoder, wan))
    noise = float((ours - theirs).square().mean())
    return _Light(
        (
            Figure("light_decode_ms_p50", blocks.p50, "ms", f"the same by {path.name}, median"),
            Figure("light_decode_ms_p99", blocks.p99, "ms", f"by {path.name}, p99"),
            Figure("light_speedup", wan_ms / blocks.p50, "", f"the VAE's decoder over {path.name}"),
            Figure(
                "light_psnr_db",
                10 * math.log10(255**2 / noise) if noise else None,
                "dB",
                f"frames of {path.name} beside the VAE's own, of random latents",
            ),
        ),
        (blocks,),
        (whole,),
    )


def decode_ms(
    decode: Callable[[Tensor], Tensor], latents: Tensor, warm_up: int, blocks: int, device: torch.device
) -> list[float]:
    """Milliseconds of each block behind the warm-up."""
    for _ in range(warm_up):
        decode(latents)
    marks = Marks(device)
    for _ in range(blocks):
        marks.mark()
        decode(latents)
    marks.mark()
    return marks.intervals_ms()


def _counted(work: Callable[[], object]) -> Counter:
    with torch.inference_mode(), Counter() as counter:
        work()
    return counter


def _shape(vae: Vae) -> VaeShape:
    return VaeShape.of_tensors({name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()})
