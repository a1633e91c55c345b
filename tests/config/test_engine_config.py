"""EngineConfig: frozen, and one clear error for every bad value."""

import dataclasses

import pytest

from liveavatar_engine import EngineConfig
from liveavatar_engine.config import Size
from liveavatar_engine.errors import ConfigError

BAD = {
    "size without a separator": ({"size": "704"}, "expected W\\*H"),
    "size too small": ({"size": "32*32"}, "64 to 4096"),
    "size absurd": ({"size": "99999*384"}, "64 to 4096"),
    "exact size off the grid": ({"size": "700x384"}, "multiples of 16, 700 is not"),
    "precision": ({"precision": "int3"}, "precision must be one of"),
    "features": ({"features": "some"}, "features must be one of"),
    "schedule": ({"schedule": "fast"}, "schedule must be one of"),
    "no steps": ({"steps": 0}, "steps must be an integer, 1 to 1000, not 0"),
    "steps as a float": ({"steps": 4.0}, "steps must be an integer"),
    "steps as a bool": ({"steps": True}, "steps must be an integer"),
    "sink distance out of the reference's range": ({"sink_distance": 3}, "'random' or an integer, 4 to 30"),
    "sink distance word": ({"sink_distance": "near"}, "'random' or an integer"),
    "sink update at once": ({"sink_update_after": 0}, "None or an integer, at least 1"),
    "motion tokens": ({"motion_tokens": "yes"}, "motion_tokens must be True or False"),
    "no devices": ({"devices": []}, "devices must be"),
    "auto among devices": ({"devices": ["auto", "cpu"]}, "stands alone"),
    "same device twice": ({"devices": ["cpu", "cpu"]}, "named twice"),
    "kv_precision": ({"kv_precision": "int3"}, "kv_precision must be one of"),
    "kv_precision wider": ({"precision": "fp8", "kv_precision": "fp32"}, "must be auto, bf16 or fp8, not 'fp32'"),
    "kv_precision narrower": ({"precision": "fp32", "kv_precision": "bf16"}, "must be auto, fp32 or fp8, not 'bf16'"),
    "fp8_skip as text": ({"fp8_skip": "ffn"}, "fp8_skip must be a list of names, not 'ffn'"),
    "kv_mode": ({"kv_mode": "dirty"}, "kv_mode must be one of"),
    "diagonal with a clean ring": ({"schedule": "diagonal", "kv_mode": "clean"}, "needs kv_mode 'timestep'"),
    "diagonal for two": ({"schedule": "diagonal", "max_sessions": 2}, "max_sessions must be 1, not 2"),
    "offload as text": ({"offload": "vae"}, "offload must be a list of names, not 'vae'"),
    "offload of another part": ({"offload": ["vae", "audio"]}, "expected some of text_encoder, vae, not vae, audio"),
    "offload twice": ({"offload": ["vae", "vae"]}, "expected some of text_encoder, vae, not vae, vae"),
    "diagonal on several devices": ({"devices": ["cuda:0", "cuda:1"], "schedule": "diagonal"}, "need schedule 'seq"),
    "costs of stages": ({"stage_ms": [110]}, "stage_ms must be two times in ms"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_values_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_unknown_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown setting stepz; known are size, precision"):
        EngineConfig.from_mapping({"stepz": 4})


def test_is_frozen_and_comparable() -> None:
    config = EngineConfig(devices=["cpu"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 2  # type: ignore[misc]
    assert config == EngineConfig(devices="cpu")
    assert EngineConfig.from_mapping(dataclasses.asdict(config)) == config


@pytest.mark.parametrize(
    ("text", "size"),
    [("704*384", Size(704, 384, exact=False)), (" 720x400 ", Size(720, 400, exact=True))],
    ids=["area", "exact"],
)
def test_size_notations(text: str, size: Size) -> None:
    assert Size.parse(text) == size
