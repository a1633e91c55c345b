"""VAE latents and streamed frames against the reference."""

import math

import pytest
import torch
from support import CPU, GoldenCase, golden_cases, relative_error

from liveavatar_engine.runtime.graphs import PlainCalls
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.vae import Vae, load_vae
from liveavatar_engine.weights.layout import Checkpoint


@pytest.mark.parametrize("case", golden_cases("vae"))
def test_encode(case: GoldenCase, golden_vae: Vae) -> None:
    latents = torch.stack(list(golden_vae.encode(case["video"][0].unbind(1))), dim=1)
    assert relative_error(latents, case["latents"][0]) <= 1e-5


@pytest.mark.parametrize("case", golden_cases("vae"))
def test_decode_whole_and_chunked(case: GoldenCase, golden_vae: Vae) -> None:
    latents = case["stream_latents"][0]
    whole = golden_vae.decoder_stream().decode(latents)
    stream = golden_vae.decoder_stream()
    chunked = torch.cat([stream.decode(latents[:, start:end]) for start, end in case.parameters["chunks"]], dim=1)
    assert (whole - case["frames"][0]).abs().max() <= 1e-3
    assert torch.equal(chunked, whole)


@pytest.mark.parametrize("case", golden_cases("vae"))
def test_block_decoder_frames(case: GoldenCase, golden_vae) -> None:
    latents = case["stream_latents"][0]
    stream = BlockDecoder(golden_vae, *latents.shape[2:], 3, PlainCalls(), torch.float32).stream()
    frames = stream.decode(latents).permute(3, 0, 1, 2).clamp(-1, 1)
    assert (frames - case["frames"][0]).abs().max() <= 1e-3


@pytest.mark.parametrize(("dtype", "decibels"), [(torch.float16, 60), (torch.bfloat16, 45)], ids=str)
@pytest.mark.parametrize("case", golden_cases("vae"))
def test_narrow_decoders_are_near_the_reference(
    case: GoldenCase, dtype: torch.dtype, decibels: float, golden_checkpoint
) -> None:
    """Peak signal to noise, of pixels in [-1, 1]. bf16 weights and inputs of convolutions alone allow 49.8 dB here."""
    vae = load_vae(Checkpoint(golden_checkpoint).vae, dtype, CPU)
    latents = case["stream_latents"][0]
    stream = BlockDecoder(vae, *latents.shape[2:], 3, PlainCalls(), dtype).stream()
    frames = stream.decode(latents).float().permute(3, 0, 1, 2).clamp(-1, 1)
    noise = (frames - case["frames"][0]).double().square().mean()
    assert 10 * math.log10(4 / float(noise)) >= decibels
