"""Points and sweeps."""

from pathlib import Path
from typing import Any

import pytest

from liveavatar_engine.bench.settings import Settings, exact_size, parse_sweep, sweep_points
from liveavatar_engine.errors import ConfigError
from liveavatar_engine.weights.convert import convert_checkpoint


def settings(**changes: Any) -> Settings:
    return Settings(**{"preset": "tiny", "checkpoint": None, "lora": None, "device": "cpu", "size": "64x64", **changes})


class TestSettings:
    def test_an_area_becomes_exact(self) -> None:
        assert settings(size="720*400").size == "704x384"
        assert settings(size="720x400").size == "720x400"
        assert exact_size("704*384") == "704x384"

    def test_they_become_an_engines(self) -> None:
        config = settings(precision="fp8", kv_precision="fp8", steps=2, graphs=False, kv_mode="clean").engine_config()
        assert (config.size, config.precision, config.kv_precision, config.devices) == ("64x64", "fp8", "fp8", ("cpu",))
        assert (config.steps, config.graphs, config.kv_mode) == (2, False, "clean")
        assert settings().engine_config(schedule="diagonal").schedule == "diagonal"

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"size": "big"}, "size 'big': expected W\\*H"),
            ({"size": "100x100"}, "multiples of 16"),
            ({"blocks": 0}, "blocks must be at least 1, not 0"),
            ({"warm_up": -1}, "warm-up must be at least 0, not -1"),
            ({"steps": 0}, "steps must be an integer, 1 to 1000"),
            ({"precision": "fp32", "kv_precision": "bf16"}, "kv_precision with precision fp32"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_what_an_engine_cannot_be_is_refused(self, changes: dict[str, Any], complaint: str) -> None:
        with pytest.raises(ConfigError, match=complaint):
            settings(**changes)


class TestSweep:
    def test_spaces_and_commas_separate_alike(self) -> None:
        expected = {"size": ["704x384", "720x400"], "precision": ["bf16", "fp8"]}
        assert parse_sweep(["size=704x384,720x400", "precision=bf16,fp8"]) == expected
        assert parse_sweep(["size=704x384,720x400,precision=bf16,fp8"]) == expected
        assert list(parse_sweep(["precision=fp8", "size=64x64"])) == ["precision", "size"]
        assert parse_sweep([]) == {}

    def test_values_have_their_types(self) -> None:
        found = parse_sweep(["steps=2,4", "graphs=on,off", "kv-precision=fp8", "motion_tokens=off", "size=128*64"])
        assert found == {
            "steps": [2, 4],
            "graphs": [True, False],
            "kv_precision": ["fp8"],
            "motion_tokens": [False],
            "size": ["128x64"],
        }

    def test_every_combination_is_a_point(self) -> None:
        points = sweep_points(settings(), parse_sweep(["size=64x64,128x64", "steps=2,4"]))
        assert [(point.size, point.steps) for point in points] == [
            ("64x64", 2),
            ("64x64", 4),
            ("128x64", 2),
            ("128x64", 4),
        ]
        assert sweep_points(settings(), {}) == [settings()]

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["704x384"], "expected KEY=VALUE"),
            (["size="], "a value of size is empty"),
            (["size=64x64,,128x64"], "a value of size is empty"),
            (["depth=3"], "no setting 'depth' to sweep; there are size"),
            (["blocks=3"], "no setting 'blocks' to sweep"),
            (["size=64x64", "size=128x64"], "size stands there twice"),
            (["size=64x64,64x64"], "a value of size stands there twice"),
            (["precision=fp9"], "precision must be one of auto, fp32, bf16, fp8"),
            (["steps=two"], "steps must be an integer"),
            (["graphs=yes"], "graphs must be on or off"),
            (["size=65x65"], "multiples of 16"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_mistakes_are_named(self, words: list[str], complaint: str) -> None:
        with pytest.raises(ConfigError, match=complaint):
            parse_sweep(words)

    def test_a_point_that_cannot_be_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"--sweep, at precision=fp32, kv_precision=bf16: kv_precision with"):
            sweep_points(settings(), parse_sweep(["precision=auto,fp32", "kv_precision=bf16"]))


def test_a_converted_checkpoint_decides_the_precision(checkpoint: Path, tmp_path: Path) -> None:
    convert_checkpoint(checkpoint, tmp_path / "fp8")
    point = settings(preset=None, checkpoint=str(tmp_path / "fp8"))
    assert point.engine_config().precision == "fp8"
    with pytest.raises(ConfigError, match="must be fp8 or auto"):
        settings(preset=None, checkpoint=str(tmp_path / "fp8"), precision="bf16")
