"""VAE latents and streamed frames against the reference."""

import pytest
import torch
from support import GoldenCase, golden_cases, relative_error

from liveavatar_engine.vae.vae import Vae


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
