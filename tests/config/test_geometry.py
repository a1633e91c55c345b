"""Derived numbers, against the ones that are known of the 14B model."""

import json
from dataclasses import replace

import pytest

from liveavatar_engine.config import ModelConfig, StreamGeometry
from liveavatar_engine.errors import CheckpointError, ConfigError

MODEL = ModelConfig(
    dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, audio_dim=1024, audio_inject_layers=(0, 4, 39)
)


def test_the_14b_model_at_704x384() -> None:
    geometry = StreamGeometry(MODEL, 384, 704)
    assert geometry.tokens_per_frame == 1056
    assert geometry.tokens_per_block == 3168
    assert geometry.ring_tokens == 12672
    assert geometry.sink_tokens == 2640
    assert geometry.blocks_per_clip == 4
    assert geometry.columns_per_block == 12
    assert geometry.seconds_per_block == 0.48


def test_720x400_has_uneven_packed_grids() -> None:
    geometry = StreamGeometry(MODEL, 400, 720)
    assert geometry.tokens_per_block == 3375
    assert [segment.tokens for segment in geometry.fixed_sink] == [1125, 22 * 12, 4 * 66]


def test_positions_of_the_packed_motion_latents() -> None:
    newest, middle, oldest = StreamGeometry(MODEL, 128, 192).fixed_sink
    assert (newest.times, middle.times, oldest.times) == ((-1,), (-3,), (-19, -14, -9, -4))
    assert newest.rows == tuple(range(8))
    assert middle.rows == (0, 2, 4, 7)
    assert oldest.columns == (0, 5, 11)


def test_without_motion_tokens_only_the_reference_is_left() -> None:
    geometry = StreamGeometry(MODEL, 384, 704, motion_tokens=False)
    assert geometry.fixed_sink == ()
    assert geometry.sink_tokens == geometry.tokens_per_frame


@pytest.mark.parametrize(
    ("height", "width", "extra", "message"),
    [
        (100, 128, {}, "height 100: must be a positive multiple of 16"),
        (128, 0, {}, "width 0"),
        (48, 128, {}, "at least 64 pixels"),
        (128, 128, {"ring_frames": 10}, "whole blocks of 3"),
    ],
    ids=["off the grid", "zero", "too small for motion", "uneven ring"],
)
def test_impossible_sizes(height: int, width: int, extra: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamGeometry(MODEL, height, width, **extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "must split into 3 heads"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"audio_inject_layers": (0, 40)}, r"\[40\] lie outside"),
        ({"enable_motioner": True}, "enable_motioner=True is a variant"),
        ({"window_size": (4, 4)}, "window_size"),
    ],
)
def test_impossible_models(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(MODEL, **change)


def test_config_files(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(MODEL.to_json())
    assert ModelConfig.from_file(path) == MODEL
    sizes = json.loads(MODEL.to_json())
    for text, message in {
        "{": "not a readable JSON",
        "[]": "expected a JSON object",
        json.dumps({**sizes, "dim": "big"}): "dim must be a int, not 'big'",
        json.dumps({key: value for key, value in sizes.items() if key != "dim"}): "lacks dim",
        json.dumps({**sizes, "adain_mode": "none"}): f"{path}: adain_mode='none' is a variant",
    }.items():
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            ModelConfig.from_file(path)
    with pytest.raises(CheckpointError, match="no such file"):
        ModelConfig.from_file(tmp_path / "none.json")
