"""The golden streams on a GPU: float32 as on a CPU, bf16 within its precision, no host sync in a step.

Imports nothing beyond torch, numpy, safetensors, transformers and pytest: the machine with the GPU has no more.
"""

import pytest
import torch
from support import GoldenCase, golden_cases, relative_error

from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.caches import CacheArena
from liveavatar_engine.denoise.noise import BlockNoise
from liveavatar_engine.denoise.positions import StreamPositions
from liveavatar_engine.denoise.schedule import Schedule
from liveavatar_engine.denoise.stream import Denoiser, LatentStream, SinkPolicy
from liveavatar_engine.model.network import BlockInputs
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


def _latents(case: GoldenCase, golden_checkpoint, dtype: torch.dtype) -> list[torch.Tensor]:
    network = load_network(golden_checkpoint, None, dtype, GPU)
    parameters = case.parameters
    geometry = StreamGeometry(
        network.config,
        parameters["lat_h"] * 8,
        parameters["lat_w"] * 8,
        parameters["frames_per_block"],
        parameters["window_frames"],
    )
    schedule = Schedule(tuple(case["timesteps"].tolist()), tuple(case["sigmas"].tolist()))
    mask = case.tensors.get("actor_mask")
    frames = geometry.frames_per_block
    with torch.inference_mode():
        stream = LatentStream(
            Denoiser(network, schedule),
            geometry,
            CacheArena(geometry, schedule.steps, 1, dtype, GPU).caches(0),
            text=network.text_keys(case["context"]),
            reference=case["ref_latents"][0].to(GPU),
            motion=case["motion_latents"][0].to(GPU),
            policy=SinkPolicy(parameters["relative_dist"], parameters.get("aas_after"), seed=0),
            actor_mask=None if mask is None else mask[:, :frames].flatten(2, 3).to(GPU),
            first_frame=parameters.get("frame_offset", 0),
        )
        return [
            stream.next_block(
                case["noise"][:, block * frames : (block + 1) * frames],
                case["audio"][..., block * 4 * frames : (block + 1) * 4 * frames],
                case["cond_states"][0, :, block * frames : (block + 1) * frames],
            ).cpu()
            for block in range(parameters["num_blocks"])
        ]


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_float32_latents(case: GoldenCase, golden_checkpoint) -> None:
    for block, latents in enumerate(_latents(case, golden_checkpoint, torch.float32)):
        assert relative_error(latents, case["latents"][block]) <= 1e-5, f"block {block}"


@pytest.mark.parametrize("case", golden_cases("dit"))
def test_bf16_latents(case: GoldenCase, golden_checkpoint) -> None:
    """Within two units of bf16's precision, as on a CPU (measured there: one unit, 4e-3)."""
    for block, latents in enumerate(_latents(case, golden_checkpoint, torch.bfloat16)):
        assert relative_error(latents, case["latents"][block]) <= 2 * 2**-8, f"block {block}"


@pytest.mark.parametrize("case", golden_cases("vae"))
def test_vae_frames(case: GoldenCase, golden_checkpoint) -> None:
    vae = load_vae(Checkpoint(golden_checkpoint).vae, torch.float32, GPU)
    frames = vae.decoder_stream().decode(case["stream_latents"][0]).cpu()
    assert (frames - case["frames"][0]).abs().max() <= 1e-3


def test_no_host_sync_in_a_step(golden_checkpoint) -> None:
    network = load_network(golden_checkpoint, None, torch.bfloat16, GPU)
    geometry = StreamGeometry(network.config, 64, 64)
    caches = CacheArena(geometry, 1, 1, torch.bfloat16, GPU).caches(0)
    with torch.inference_mode():
        text = network.text_keys(torch.randn(5, network.config.text_dim))
        states = torch.randn(1, network.config.audio_layers, network.config.audio_dim, 12)
        inputs = BlockInputs(None, network.audio_inputs(states), None)
        time = network.time_modulation(500.0)
        positions = StreamPositions(geometry, caches, 1, GPU)
        channels, _, height, width = geometry.block_shape
        reference, motion = (torch.randn(channels, n, height, width, device=GPU) for n in (1, 19))
        network.prefill_sink(reference, motion, text, caches.sink, positions.sink_view())
        view = positions.block_views(0, [10])[0]
        latents = BlockNoise(geometry, 1).block(0).to(GPU)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            velocity = network(latents, time, text, inputs, caches.rings[0], caches.sink, view)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert velocity.isfinite().all()
