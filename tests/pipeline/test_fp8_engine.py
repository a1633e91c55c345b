"""Engines in FP8 on a CPU: the same picture within quantisation noise, and the settings that steer it."""

import logging
from pathlib import Path

import numpy as np
import pytest
from support import speech

from liveavatar_engine import Engine, EngineConfig
from liveavatar_engine.cli import main
from liveavatar_engine.errors import ConfigError
from liveavatar_engine.model.linear import Fp8Linear
from liveavatar_engine.pipeline import one_device


def _engine(checkpoint: Path, **settings) -> Engine:
    return Engine.from_pretrained(checkpoint, config=EngineConfig(size="64x64", devices="cpu", **settings))


def _frames(engine: Engine, face: np.ndarray) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in engine.generate(face, speech(1.2), "hello", seed=3)])


def _psnr(frames: np.ndarray, exact: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((frames.astype(float) - exact.astype(float)) ** 2)))


@pytest.fixture(scope="module")
def exact_frames(engine: Engine, face: np.ndarray) -> np.ndarray:
    return _frames(engine, face)


@pytest.mark.parametrize(
    ("precision", "kv_precision", "psnr"), [("bf16", "fp8", 40), ("fp8", "auto", 34), ("fp8", "fp8", 34)]
)
def test_frames_are_those_of_float32_and_some_noise(
    precision: str, kv_precision: str, psnr: float, checkpoint: Path, exact_frames: np.ndarray, face: np.ndarray
) -> None:
    frames = _frames(_engine(checkpoint, precision=precision, kv_precision=kv_precision), face)
    assert frames.shape == exact_frames.shape
    assert _psnr(frames, exact_frames) >= psnr


def test_the_skip_list_keeps_layers_out(checkpoint: Path) -> None:
    def quantized(**settings) -> set[str]:
        network = _engine(checkpoint, precision="fp8", **settings)._runner.network
        return {name for name, module in network.named_modules() if isinstance(module, Fp8Linear)}

    by_default, narrower, everything = quantized(), quantized(fp8_skip=["self_attn.k", "ffn"]), quantized(fp8_skip=[])
    assert "blocks.0.self_attn.qkv" in by_default
    assert "audio_injector.injector.0.q" in by_default
    assert "head.head" not in by_default
    assert {"blocks.0.self_attn.q", "blocks.0.self_attn.v", "blocks.0.cross_attn.k"} <= narrower
    assert not any("ffn" in name or name.endswith(("self_attn.k", "qkv")) for name in narrower)
    assert {"head.head", "time_embedding.0"} <= everything


@pytest.mark.parametrize("part", ["self_attn.q", "self_attn.k", "self_attn.o", "cross_attn.q", "ffn.0", "ffn.2"])
def test_any_part_of_a_layer_may_stay_out(part: str, checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint, precision="fp8", fp8_skip=[part])
    assert next(iter(engine.generate(face, speech(0.4), max_blocks=1))).frames.std() > 0


def test_an_engine_may_have_every_layer_in_fp8(checkpoint: Path, face: np.ndarray) -> None:
    engine = _engine(checkpoint, precision="fp8", fp8_skip=[])
    assert next(iter(engine.generate(face, speech(0.4), max_blocks=1))).frames.std() > 0


def test_a_name_that_skips_nothing_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="fp8_skip: no linear layer's name contains 'fnn'"):
        _engine(checkpoint, precision="fp8", fp8_skip=["fnn", "ffn"])


def test_losses_are_measured_against_more_than_fp8(checkpoint: Path, face: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="nothing to compare with"):
        _engine(checkpoint, precision="fp8").precision_losses(face, speech(0.4))


def test_losses_are_not_measured_on_replayed_graphs(
    checkpoint: Path, face: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay calls no layer; the command opens its engine without graphs."""
    monkeypatch.setattr(one_device, "graphs_absent", lambda device: None)
    with pytest.raises(ConfigError, match="graphs=False"):
        _engine(checkpoint).precision_losses(face, speech(0.4))
    assert _engine(checkpoint, graphs=False).precision_losses(face, speech(0.4))
    report = tmp_path / "losses.json"
    assert main(["inspect", str(checkpoint), "--precision", "--size", "64x64", "--json", str(report)]) == 0
    assert report.stat().st_size > 1000


def test_kernels_are_logged_and_an_unknown_choice_is_an_error(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        _engine(checkpoint)
    assert "op ring_attention: emulation or reference" in caplog.text
    monkeypatch.setenv("LIVEAVATAR_KERNELS", "fast")
    with pytest.raises(ConfigError, match="LIVEAVATAR_KERNELS must be one of"):
        _engine(checkpoint)


def test_kv_precision_must_suit_what_auto_becomes(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="precision auto is fp32 on cpu"):
        _engine(checkpoint, kv_precision="bf16")
