"""Image and audio columns to frames, all of it the engine's own, against the reference."""

import pytest
import torch
from support import CPU, GoldenCase, golden_cases, relative_error
from torch import Tensor

from liveavatar_engine.conditions.still import still_conditions
from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.noise import BlockNoise
from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.denoise.stream import Conditions, LatentStream, SinkPolicy
from liveavatar_engine.pipeline.production import Production, ProductionParts
from liveavatar_engine.pipeline.session import Session
from liveavatar_engine.runtime.graphs import PlainCalls
from liveavatar_engine.runtime.timing import StageTimer
from liveavatar_engine.vae.block_decoder import BlockDecoder
from liveavatar_engine.vae.delivery import HostFrames, Pending
from liveavatar_engine.vae.vae import to_uint8


class GoldenColumns:
    """The case's audio columns in place of encoded speech."""

    def __init__(self, audio: Tensor, columns_per_block: int) -> None:
        self.columns = audio.shape[-1]
        self._audio, self._per_block = audio, columns_per_block

    def block(self, index: int) -> Tensor | None:
        first = index * self._per_block
        return self._audio[..., first : first + self._per_block] if first < self.columns else None


class FloatDecoder:
    """A stream's decoder that keeps frames as they are before they become uint8, [3, frames, height, width] each."""

    def __init__(self, vae, rows: int, columns: int) -> None:
        self._stream = BlockDecoder(vae, rows, columns, 3, PlainCalls(), torch.float32).stream()
        self.frames: list[Tensor] = []

    def skip(self, latents: Tensor) -> None:
        self._stream.skip(latents)

    def check(self) -> None:
        self._stream.check()

    def start(self, latents: Tensor, timer: StageTimer) -> Pending:
        frames = self._stream.decode(latents).permute(3, 0, 1, 2).clamp(-1, 1)
        self.frames.append(frames)
        return HostFrames(CPU).take(to_uint8(frames))

    def close(self) -> None:
        self._stream.close()


@pytest.mark.parametrize("case", golden_cases("pipeline"))
def test_image_to_frames(case: GoldenCase, golden_network, golden_vae) -> None:
    parameters = case.parameters
    height, width = parameters["hw"]
    geometry = StreamGeometry(
        golden_network.config, height, width, parameters["frames_per_block"], parameters["window_frames"]
    )
    still = still_conditions(
        golden_vae, case["image"][0, :, 0], parameters["reference_frames"], parameters["motion_source_frames"]
    )
    assert relative_error(still.reference[None], case["ref_latents"]) <= 1e-5
    assert relative_error(still.motion[None], case["motion_latents"]) <= 1e-5
    assert relative_error(still.priming[None], case["decoder_prime_latents"]) <= 1e-5

    noise = BlockNoise(geometry, parameters["seed"])
    drawn = torch.cat([noise.block(index) for index in range(parameters["blocks"])], dim=1)
    assert torch.equal(drawn, case["noise"])

    denoiser = Denoiser(golden_network, flow_match_schedule(parameters["steps"], parameters["shift"]))
    latents = LatentStream(
        StepExecutor(denoiser, geometry),
        0,
        Conditions(case["context"], still.reference, still.motion),
        SinkPolicy(parameters["relative_dist"], parameters.get("sink_update_after"), parameters["seed"]),
    )
    produced = []
    original = latents.push
    latents.push = lambda *arguments: produced.extend(finished := original(*arguments)) or finished
    decoder = FloatDecoder(golden_vae, geometry.latent_height, geometry.latent_width)
    decoder.skip(still.priming)
    features = GoldenColumns(case["audio_input"], geometry.columns_per_block)
    parts = ProductionParts(geometry, features, noise, latents, decoder, None)
    session = Session(Production(parts, None, release=lambda: None), [], lambda _: case["context"])
    chunks = list(session)

    for block, expected in enumerate(case["latents"]):
        assert relative_error(produced[block], expected) <= 1e-5, f"block {block}"
    dropped = parameters["blocks"] * geometry.columns_per_block - case["frames"].shape[2]
    frames = torch.cat(decoder.frames, dim=1)[:, dropped:]
    assert (frames - case["frames"][0]).abs().max() <= 1e-3
    assert sum(len(chunk.frames) for chunk in chunks) == case["frames"].shape[2]
    assert chunks[0].start_column == dropped
    as_pixels = torch.cat([torch.from_numpy(chunk.frames) for chunk in chunks]).float() / 127.5 - 1
    assert (as_pixels.permute(3, 0, 1, 2) - case["frames"][0]).abs().max() <= 1 / 255 + 1e-3
