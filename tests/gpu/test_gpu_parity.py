"""The golden streams on a GPU: float32 as on a CPU, bf16 within its precision, graphs and plain calls alike.

Imports nothing beyond torch, numpy, safetensors, transformers and pytest: the machine with the GPU has no more.
"""

import pytest
import torch
from golden_stream import GoldenStream
from support import GoldenCase, bits, golden_cases, relative_error

from liveavatar_engine.vae.vae import load_vae
from liveavatar_engine.weights.layout import Checkpoint
from liveavatar_engine.weights.network import load_network

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GPU = torch.device("cuda:0")


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed


def _latents(case: GoldenCase, golden_checkpoint, dtype: torch.dtype, **settings) -> list[torch.Tensor]:
    network = load_network(golden_checkpoint, None, dtype, GPU)
    return [latents.cpu() for latents in GoldenStream(case, network, **settings).latents]


@pytest.mark.parametrize("diagonal", [False, True], ids=["sequential", "diagonal"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("case", golden_cases("dit"))
def test_float32_latents(case: GoldenCase, graphs: bool, diagonal: bool, golden_checkpoint) -> None:
    latents = _latents(case, golden_checkpoint, torch.float32, graphs=graphs, diagonal=diagonal)
    for block, ours in enumerate(latents):
        assert relative_error(ours, case["latents"][block]) <= 1e-5, f"block {block}"


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_bf16_latents(case: GoldenCase, golden_checkpoint) -> None:
    """Within two units of bf16's precision, as on a CPU (measured there: one unit, 4e-3)."""
    for block, latents in enumerate(_latents(case, golden_checkpoint, torch.bfloat16)):
        assert relative_error(latents, case["latents"][block]) <= 2 * 2**-8, f"block {block}"


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_graphs_and_plain_calls_make_the_same_bits(case: GoldenCase, golden_checkpoint) -> None:
    replayed, plain = (_latents(case, golden_checkpoint, torch.bfloat16, graphs=graphs) for graphs in (True, False))
    for block, (one, other) in enumerate(zip(replayed, plain, strict=True)):
        assert torch.equal(bits(one), bits(other)), f"block {block}"


@pytest.mark.parametrize("case", golden_cases("vae"))
def test_vae_frames(case: GoldenCase, golden_checkpoint) -> None:
    vae = load_vae(Checkpoint(golden_checkpoint).vae, torch.float32, GPU)
    frames = vae.decoder_stream().decode(case["stream_latents"][0]).cpu()
    assert (frames - case["frames"][0]).abs().max() <= 1e-3
