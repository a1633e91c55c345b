"""The suite `vae`: decoding a stream's blocks, encoding the still picture, priming the decoder."""

from __future__ import annotations

import torch

from ..conditions.still import still_conditions, to_pixels
from ..config.geometry import FRAMES_PER_SECOND
from ..pipeline.device import resolve_precision
from ..vae.shape import VaeShape
from ..vae.vae import Vae
from .bench import Bench, Marks
from .inputs import picture
from .results import Figure, Run, Series, percentile
from .settings import Settings
from .work import Work, decode_flops, stage

SUITE = "vae"
_ENCODES = 2
"""Besides the one that is left out: it takes seconds."""


def measure(settings: Settings, bench: Bench) -> Run:
    """Decode random latents block by block, and encode a picture that stands still, as opening a session does."""
    ceilings = bench.ceilings
    bench.restart_memory()
    geometry, vae = settings.geometry(), bench.vae(settings)
    pixels = to_pixels(picture(geometry)).to(bench.device)
    still = still_conditions(vae, pixels)
    encode_ms = []
    for _ in range(_ENCODES):
        marks = Marks(bench.device)
        marks.mark()
        still_conditions(vae, pixels)
        marks.mark()
        encode_ms += marks.intervals_ms()
    decoder = vae.decoder_stream()
    decoder.decode(still.priming)
    priming = Marks(bench.device)
    priming.mark()
    vae.decoder_stream().decode(still.priming)
    priming.mark()
    generator = torch.Generator().manual_seed(settings.seed)
    latents = torch.randn(geometry.block_shape, generator=generator).to(bench.device)
    for _ in range(settings.warm_up):
        decoder.decode(latents)
    marks = Marks(bench.device)
    for _ in range(settings.blocks):
        marks.mark()
        decoder.decode(latents)
    marks.mark()
    blocks = Series(
        "decode_ms", "ms", "decode of a block", tuple(marks.intervals_ms()), geometry.seconds_per_block * 1e3
    )
    flops = decode_flops(_shape(vae), geometry)
    precision = resolve_precision(settings.engine_config(), bench.device)
    whole = stage("decode of a block", blocks.p50, 1, Work(flops), bench.limits, ceilings, per_block=True)
    frames = geometry.columns_per_block
    return Run(
        SUITE,
        settings.as_dict(),
        warm_up=f"the decoder's priming and {settings.warm_up} blocks; one encode",
        figures=(
            Figure("decode_ms_p50", blocks.p50, "ms", f"decode of a block of {frames} frames, median"),
            Figure("decode_ms_p99", blocks.p99, "ms", "decode of a block, p99"),
            Figure("decode_fps", frames / blocks.p50 * 1e3, "frames/s", "decoder alone"),
            Figure("decode_real_time", frames / FRAMES_PER_SECOND / blocks.p50 * 1e3, "", "decoder over real time"),
            Figure("decode_tflops", whole.tflops, "TFLOP/s", f"decode, of {flops / 1e12:,.3g} TFLOP a block"),
            Figure("decode_datasheet", whole.datasheet, "share", "decode: share of the datasheet's limit"),
            Figure("decode_measured", whole.measured, "share", f"decode: share of a {ceilings.dtype} product's speed"),
            Figure("encode_ms", percentile(encode_ms, 50), "ms", "encode of the still picture, median"),
            Figure("priming_ms", priming.intervals_ms()[0], "ms", "priming of a decoder, 7 latents"),
            Figure("memory_mb", bench.memory_bytes() / 2**20, "MiB", bench.memory_label),
        ),
        series=(blocks,),
        stages=(whole,),
        notes=(
            f"decoder in {str(precision.dtype).removeprefix('torch.')}, encoder in float32",
            "the picture's encode ends where the encoder's history repeats itself: random weights may need more steps",
        ),
    )


def _shape(vae: Vae) -> VaeShape:
    return VaeShape.of_tensors({name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()})
