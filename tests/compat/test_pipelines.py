"""The reference's pipeline classes: golden latents, the engine's latents, and each class's own way to frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compat.pipeline_calls import Files, observed, reference_config
from support import CPU, GoldenCase, golden_cases, relative_error
from torch import Tensor

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.compat import BlockwiseWanS2V, TppWanS2V, WanS2V
from liveavatar_engine.compat.clips import ClipMaker, Memory
from liveavatar_engine.compat.inputs import Inputs
from liveavatar_engine.conditions.still import StillConditions, still_conditions, to_pixels
from liveavatar_engine.config import StreamGeometry
from liveavatar_engine.denoise.executor import Denoiser, StepExecutor
from liveavatar_engine.denoise.noise import BlockNoise
from liveavatar_engine.denoise.schedule import flow_match_schedule
from liveavatar_engine.denoise.stream import Conditions, LatentStream, SinkPolicy
from liveavatar_engine.errors import WorkerError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, face: np.ndarray) -> Files:
    return Files(tmp_path_factory.mktemp("inputs"), face)


@pytest.fixture(scope="module")
def pipelines(checkpoint: Path) -> dict[type, Any]:
    """One of each class."""
    return {kind: kind(reference_config(), checkpoint) for kind in (WanS2V, TppWanS2V, BlockwiseWanS2V)}


@pytest.fixture(scope="module")
def single(pipelines, files: Files) -> dict[bool, tuple[dict[int, Tensor], Tensor]]:
    """Latents and video of the single-GPU pipeline, without and with online decoding."""
    pipeline = pipelines[WanS2V]
    return {
        online: (observed(pipeline), _run(pipeline, files.arguments(enable_online_decode=online)))
        for online in (False, True)
    }


def _run(pipeline, arguments) -> Tensor:
    """The whole video, [3, frames, height, width]."""
    made = pipeline.generate(**arguments)
    if isinstance(made, tuple):
        video, information = made
        assert information == {}
        return video
    return torch.cat([chunk[0] for chunk in made], dim=1)


def _stream_by_hand(pipeline, network, still: StillConditions, update_after: int | None) -> LatentStream:
    """What makes the latents of `Files.arguments()`, put together here."""
    context = pipeline.text_encoder(["a person talks"], CPU)[0]
    executor = StepExecutor(Denoiser(network, flow_match_schedule(2)), StreamGeometry(network.config, 64, 64))
    conditions = Conditions(context, still.reference, still.motion)
    return LatentStream(executor, 0, conditions, SinkPolicy("random", update_after, 7))


class _GoldenColumns:
    def __init__(self, audio: Tensor) -> None:
        self.columns, self._audio = audio.shape[-1], audio

    def block(self, index: int) -> Tensor | None:
        columns = self._audio[..., 12 * index : 12 * index + 12]
        return columns if columns.shape[-1] else None

    def ready(self, index: int) -> bool:
        return True


@pytest.fixture(params=golden_cases("pipeline"))
def golden(request, monkeypatch: pytest.MonkeyPatch, golden_checkpoint, files: Files):
    """Pipelines that see the golden picture, prompt and audio columns in place of encoded files; and arguments."""
    case: GoldenCase = request.param
    parameters, read = case.parameters, Inputs.read

    def golden_inputs(*args, **kwargs) -> Inputs:
        inputs = read(*args, **kwargs)
        height, width = parameters["hw"]
        geometry = dataclasses.replace(inputs.geometry, height=height, width=width)
        return dataclasses.replace(inputs, geometry=geometry, pixels=case["image"][0, :, 0])

    monkeypatch.setattr(Inputs, "read", golden_inputs)

    def make(kind):
        pipeline = kind(reference_config(), golden_checkpoint)
        pipeline.sink_distance = parameters["relative_dist"]
        monkeypatch.setattr(pipeline._backend, "context", lambda *_: case["context"])
        padded = torch.cat((case["audio_input"], torch.zeros_like(case["audio_input"][..., :24])), dim=-1)
        monkeypatch.setattr(pipeline._backend, "spoken", lambda *_: _GoldenColumns(padded))
        return pipeline

    arguments = files.arguments(seed=parameters["seed"], sampling_steps=parameters["steps"])
    return case, make, arguments


def test_the_live_pipeline_makes_the_golden_latents_and_frames(golden) -> None:
    case, make, arguments = golden
    pipeline = make(BlockwiseWanS2V)
    latents = observed(pipeline)
    video = _run(pipeline, arguments)
    for block, expected in enumerate(case["latents"]):
        assert relative_error(latents[block], expected) <= 1e-5, f"block {block}"
    frames = case["frames"][0]
    assert (video[:, : frames.shape[1]] - frames).abs().max() <= 1 / 255 + 1e-3


def test_the_single_gpu_pipeline_makes_the_golden_latents_of_the_first_clip(golden, monkeypatch) -> None:
    case, make, arguments = golden
    monkeypatch.setattr(ClipMaker, "decode", lambda *_: torch.zeros(3, 48, *case.parameters["hw"]))
    monkeypatch.setattr(Memory, "take", lambda *_: None)
    pipeline = make(WanS2V)
    latents = observed(pipeline)
    _run(pipeline, arguments)
    for block, expected in enumerate(case["latents"][:4]):
        assert relative_error(latents[block], expected) <= 1e-5, f"block {block}"
    assert relative_error(latents[4], case["latents"][4]) > 1e-3, "its sink must keep the picture"


def test_the_live_pipeline_makes_the_engines_latents(checkpoint, pipelines, files: Files, face) -> None:
    pipeline = pipelines[BlockwiseWanS2V]
    latents = observed(pipeline)
    _run(pipeline, files.arguments())
    engine = Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices="cpu", steps=2))
    session = engine.generate(face, str(files.audio), "a person talks", seed=7)
    blocks = 0
    for chunk in session:
        assert relative_error(latents[chunk.index], session.last_latents) <= 1e-5, f"block {chunk.index}"
        blocks += 1
    assert blocks == 5
    assert len(latents) == 8, "whole clips"


def test_the_tpp_pipeline_encodes_one_frame_and_73(pipelines, files: Files, face, network, vae) -> None:
    pipeline = pipelines[TppWanS2V]
    made = observed(pipeline)
    _run(pipeline, files.arguments())
    still = still_conditions(vae, to_pixels(face), 1, 73)
    assert not torch.equal(still.reference, still_conditions(vae, to_pixels(face)).reference)
    stream = _stream_by_hand(pipeline, network, still, 4)
    features, clips = pipeline.encode_audio(files.audio, 48)
    assert clips == 2
    noise = BlockNoise(stream.geometry, 7)
    for block in range(8):
        latents = stream.next_block(noise.block(block), features[..., 12 * block : 12 * block + 12])
        assert relative_error(made[block], latents) <= 1e-5, f"block {block}"


@pytest.fixture(scope="module")
def memories(single, face, vae) -> list[Tensor]:
    """Motion latents in front of each clip: of the portrait, and of the first clip's frames behind it."""
    (_, kept), (_, renewed) = single[False], single[True]
    assert kept[:, :45].equal(renewed[:, :45]), "online decoding changes what follows the first clip"
    still = to_pixels(face)[:, None].expand(-1, 365, -1, -1)
    videos = (still, torch.cat((still[:, 45:], kept[:, :45]), dim=1))
    return [torch.stack(list(vae.encode(video.unbind(1))), dim=1) for video in videos]


@pytest.mark.parametrize(("online", "clip"), [(False, 0), (False, 1), (True, 1)])
def test_the_single_gpu_pipeline_decodes_behind_encoded_frames(online, clip, single, memories, vae) -> None:
    made, video = single[online]
    latents = torch.cat([made[4 * clip + block] for block in range(4)], dim=1)
    frames = vae.decoder_stream().decode(torch.cat((memories[clip], latents), dim=1))[:, -48 if clip else -45 :]
    start = 45 * clip
    assert (video[:, start : start + frames.shape[1]] - frames).abs().max() <= 1e-4
    assert video.shape == (3, 93, 64, 64)


def test_online_decoding_renews_the_sink_after_the_first_clip(
    single, memories, pipelines, files: Files, face, network, vae
) -> None:
    kept, renewed = single[False][0], single[True][0]
    stream = _stream_by_hand(pipelines[WanS2V], network, still_conditions(vae, to_pixels(face)), None)
    features, _ = pipelines[WanS2V].encode_audio(files.audio, 48)
    noise = BlockNoise(stream.geometry, 7)
    for block in range(8):
        if block == 4:
            stream.show(renewed[0][:, :1], memories[1][:, -19:])
        latents = stream.next_block(noise.block(block), features[..., 12 * block : 12 * block + 12])
        assert relative_error(renewed[block], latents) <= 1e-5, f"block {block}"
    assert all(kept[block].equal(renewed[block]) for block in range(4))
    assert relative_error(renewed[4], kept[4]) > 1e-3


def test_a_single_gpu_pipeline_makes_as_many_clips_as_are_asked_for(
    single, pipelines, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = single[False]
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= 1
    monkeypatch.setattr(ClipMaker, "decode", lambda *_: torch.zeros(3, 48, 64, 64))  # latents are looked at
    latents = observed(pipelines[WanS2V])
    assert _run(pipelines[WanS2V], files.arguments(max_repeat=1)).shape == (3, 45, 64, 64)
    assert len(latents) == 4
    assert all(latents[block].equal(made[block]) for block in latents), "the same seed"
    _run(pipelines[WanS2V], files.arguments(max_repeat=1, seed=-1))
    assert not latents[0].equal(made[0])


@pytest.mark.parametrize("kind", [TppWanS2V, BlockwiseWanS2V])
def test_whole_clips_come_out(kind, pipelines, files: Files) -> None:
    pipeline, arguments = pipelines[kind], files.arguments(max_repeat=1, sampling_steps=1)
    video = _run(pipeline, arguments)
    assert video.shape == (3, 45, 64, 64)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    assert video.equal(_run(pipeline, arguments)), "the same seed"
    assert not video.equal(_run(pipeline, {**arguments, "seed": -1}))


def test_longer_clips(pipelines, files: Files) -> None:
    latents = observed(pipelines[TppWanS2V])
    assert _run(pipelines[TppWanS2V], files.arguments(infer_frames=60, num_repeat=1, sampling_steps=1)).shape[1] == 57
    assert len(latents) == 5


def test_the_number_of_steps_changes_without_loading_anew(pipelines, files: Files) -> None:
    pipeline = pipelines[TppWanS2V]
    _run(pipeline, files.arguments(max_repeat=1))
    network = pipeline._backend.loaded.runner.network
    _run(pipeline, files.arguments(max_repeat=1, sampling_steps=3))
    assert pipeline._backend.loaded.runner.network is network
    assert pipeline._backend.loaded.config.steps == 3


def test_an_engine_that_has_failed_is_loaded_anew(pipelines, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipelines[TppWanS2V]
    _run(pipeline, files.arguments(max_repeat=1, sampling_steps=1))
    failed = pipeline._backend.loaded
    monkeypatch.setattr(Engine, "failure", property(lambda self: WorkerError("gone") if self is failed else None))
    _run(pipeline, files.arguments(max_repeat=1, sampling_steps=1))
    assert pipeline._backend.loaded is not failed


def test_only_rank_0_gets_the_single_gpu_video(checkpoint, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipMaker, "decode", lambda *_: torch.zeros(3, 48, 64, 64))
    video, _ = WanS2V(reference_config(), checkpoint, rank=1).generate(**files.arguments(max_repeat=1))
    assert video is None


def test_bytes_survive_a_script_that_cuts_off_digits() -> None:
    from liveavatar_engine.compat.pipelines import as_video

    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    video = as_video(levels)
    assert ((video + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 3, 0).equal(torch.from_numpy(levels))
    assert (video - (torch.from_numpy(levels).permute(3, 0, 1, 2).float() / 127.5 - 1)).abs().max() < 1e-3
