"""Plots: axes that end on round numbers, labels that fit, nothing that is no XML."""

import xml.etree.ElementTree as ET

import pytest

from liveavatar_engine.bench import plots
from liveavatar_engine.bench.plots import Bar, Segment, _Scale

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in parsed(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("most", [1e-4, 0.3, 1.0, 7.0, 99.9, 100.0, 480.0, 123_456.0])
def test_axes_end_on_round_numbers(most: float) -> None:
    scale = _Scale.of(most, 100.0)
    assert most <= scale.end <= 2 * most
    assert 3 <= len(scale.ticks) <= 7
    assert scale.ticks[-1] == pytest.approx(scale.end)
    assert scale.at(scale.end) == 100.0
    assert scale.at(scale.end / 2) == 50.0


def test_an_axis_of_nothing() -> None:
    assert _Scale.of(0.0, 100.0).end == 1.0


def test_values_that_are_close_need_no_axis_from_zero() -> None:
    scale = _Scale.around([430.0, 436.0, 480.0], 100.0)
    assert 400 <= scale.start <= 430
    assert scale.at(scale.start) == 0.0
    assert 480 <= scale.end <= 500
    svg = plots.over_time([430.0, 436.0], "ms", "a block", {"deadline": (480.0, "deadline")})
    assert any(text.startswith("a block (ms), from 4") for text in texts(svg)), "which is said"
    assert _Scale.around([100.0, 480.0], 100.0).start == 0.0
    assert (_Scale.around([5.0], 100.0).start, _Scale.around([5.0], 100.0).end) == (0.0, 5.0)


def test_stacked_bars_are_as_long_as_their_parts() -> None:
    bars = [
        Bar("fp8", (Segment("attention", 60.0, "attention1"), Segment("norms & more", 30.0, "norm0")), 95.0),
        Bar("bf16", (Segment("attention", 30.0, "attention1"),)),
    ]
    root = parsed(plots.stacked_bars(bars, "ms", "time of a step", "the real step"))
    wide = [float(rect.attrib["width"]) for rect in root.iter(f"{SVG}rect")]
    assert wide[0] == pytest.approx(2 * wide[1], rel=1e-3)
    assert wide[0] == pytest.approx(wide[2] * 2, rel=1e-3)
    titles = ["".join(title.itertext()) for title in root.iter(f"{SVG}title")]
    assert "norms & more: 30 ms" in titles
    assert "the real step: 95 ms" in titles
    assert len([line for line in root.iter(f"{SVG}line") if line.attrib["class"] == "mark"]) == 1


def test_a_name_that_is_too_long_is_cut_and_told_whole() -> None:
    long = "ring_attention: 3168 tokens, e4m3, and so much more that nobody would read it"
    svg = plots.bars({long: 1.0, "b": 2.0}, "", "times as fast", 1.0)
    assert any(text.endswith("…") and len(text) > len(long) for text in texts(svg)), "the title, then what is shown"
    assert "b" in texts(svg)


def test_lines_over_time_are_labelled_apart() -> None:
    lines = {"p50": (10.0, "p50"), "p99": (10.1, "p99"), "deadline": (480.0, "deadline")}
    root = parsed(plots.over_time([9.0, 10.0, 10.1], "ms", "a block", lines))
    places = {"".join(t.itertext()): float(t.attrib["y"]) for t in root.iter(f"{SVG}text") if t.attrib.get("y")}
    assert abs(places["p50: 10 ms"] - places["p99: 10.1 ms"]) >= 14
    assert places["deadline: 480 ms"] < places["p99: 10.1 ms"]
    assert "a block (ms)" in texts(plots.over_time([1.0], "ms", "a block", {}))
    assert len(list(root.iter(f"{SVG}circle"))) == 3
    assert [text for text in texts(ET.tostring(root, encoding="unicode")) if text.isdigit()].count("2") == 1


def test_many_blocks_have_few_labels() -> None:
    found = texts(plots.over_time([1.0] * 1000, "ms", "a block", {}))
    assert len([text for text in found if text.isdigit() and int(text) > 10]) <= 10
