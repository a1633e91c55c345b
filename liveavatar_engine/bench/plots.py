"""Plots as inline SVG, in plain elements that need no script; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

WIDTH = 900
_RIGHT, _TOP, _AXIS = 30, 12, 44
_NARROW, _WIDE = 110, 330
"""Room for the names of bars, at least and at most."""
_BAR, _GAP = 26, 14
_CLOSE = 0.6
"""Values of which the least is more than this share of the largest need no axis from zero."""
_CHARACTER = 6.6
"""Width of a character of a label, about."""


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar; `style` is a class of the style sheet."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Bar:
    """A bar of segments, and a mark across it, or None."""

    name: str
    segments: tuple[Segment, ...]
    mark: float | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of a row of a timeline.

    Attributes:
        start, end: on the axis.
        style: a class of the style sheet.
        told: what it is, when pointed at.
        inside: a short text within it, where there is room.
    """

    start: float
    end: float
    style: str
    told: str
    inside: str = ""


def stacked_bars(bars: Sequence[Bar], unit: str, axis: str, mark: str) -> str:
    """Horizontal bars on one axis; `mark` says what the marks across them are."""
    most = max([sum(s.value for s in bar.segments) for bar in bars] + [bar.mark or 0.0 for bar in bars])
    left = _room([bar.name for bar in bars])
    scale = _Scale.of(most, WIDTH - left - _RIGHT)
    height = _TOP + len(bars) * (_BAR + _GAP)
    parts = [_x_axis(left, scale, height, f"{axis} ({unit})")]
    for number, bar in enumerate(bars):
        top = _TOP + number * (_BAR + _GAP)
        parts.append(_text(left - 8, top + _BAR / 2 + 4, bar.name, "end", left))
        at = 0.0
        for segment in bar.segments:
            x, wide = left + scale.at(at), scale.at(segment.value)
            told = f"{segment.name}: {segment.value:,.4g} {unit}"
            shape = f'<rect x="{x:.1f}" y="{top}" width="{max(wide, 0.3):.2f}" height="{_BAR}" class="{segment.style}">'
            parts.append(f"{shape}<title>{escape(told)}</title></rect>")
            if wide > _CHARACTER * len(segment.name) + 8:
                parts.append(_text(x + wide / 2, top + _BAR / 2 + 4, segment.name, "middle", style="inside"))
            at += segment.value
        if bar.mark is not None:
            x = left + scale.at(bar.mark)
            told = f"{mark}: {bar.mark:,.4g} {unit}"
            line = f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{top + _BAR + 4}" class="mark">'
            parts.append(f"{line}<title>{escape(told)}</title></line>")
    return _svg(height + _AXIS, f"{axis}, stacked", parts)


def legend(segments: Mapping[str, str], mark: str | None) -> str:
    """Names beside their colours; `segments` is name -> class."""
    entries = [f'<li><span class="key {style}"></span>{escape(name)}</li>' for name, style in segments.items()]
    if mark is not None:
        entries.append(f'<li><span class="key line"></span>{escape(mark)}</li>')
    return f'<ul class="legend">{"".join(entries)}</ul>'


def bars(values: Mapping[str, float], unit: str, axis: str, line: float | None = None) -> str:
    """Plain horizontal bars with their values; `line` is drawn across all of them."""
    left = _room(list(values))
    scale = _Scale.of(max([*values.values(), line or 0.0]), WIDTH - left - _RIGHT - 60)
    height = _TOP + len(values) * (_BAR + _GAP)
    parts = [_x_axis(left, scale, height, f"{axis} ({unit})" if unit else axis)]
    told = []
    for number, (name, value) in enumerate(values.items()):
        top = _TOP + number * (_BAR + _GAP)
        wide = scale.at(value)
        parts.append(
            f'<rect x="{left}" y="{top}" width="{wide:.1f}" height="{_BAR}" class="bar">'
            f"<title>{escape(f'{name}: {value:,.4g} {unit}')}</title></rect>"
        )
        told.append(_text(left - 8, top + _BAR / 2 + 4, name, "end", left))
        told.append(_text(left + wide + 6, top + _BAR / 2 + 4, f"{value:,.4g}", "start"))
    if line is not None:
        x = left + scale.at(line)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{height - _GAP + 6}" class="deadline"/>')
    return _svg(height + _AXIS, axis, [*parts, *told])


def timeline(rows: Mapping[str, Sequence[Piece]], unit: str, axis: str) -> str:
    """Rows of pieces on one axis from zero, one bar for each piece."""
    left = _room(list(rows))
    scale = _Scale.of(max((piece.end for row in rows.values() for piece in row), default=0.0), WIDTH - left - _RIGHT)
    height = _TOP + len(rows) * (_BAR + _GAP)
    parts = [_x_axis(left, scale, height, f"{axis} ({unit})")]
    for number, (name, row) in enumerate(rows.items()):
        top = _TOP + number * (_BAR + _GAP)
        parts.append(_text(left - 8, top + _BAR / 2 + 4, name, "end", left))
        for piece in row:
            x, wide = left + scale.at(piece.start), scale.at(piece.end) - scale.at(piece.start)
            place = f'x="{x:.2f}" y="{top}" width="{wide:.2f}" height="{_BAR}"'
            parts.append(f'<rect {place} class="{piece.style}"><title>{escape(piece.told)}</title></rect>')
            if piece.inside and wide > _CHARACTER * len(piece.inside) + 4:
                parts.append(_text(x + wide / 2, top + _BAR / 2 + 4, piece.inside, "middle", style="inside"))
    return _svg(height + _AXIS, axis, parts)


def over_time(values: Sequence[float], unit: str, axis: str, lines: Mapping[str, tuple[float, str]]) -> str:
    """Values in their order as points, with horizontal lines: name -> value and class."""
    plot = 240
    scale = _Scale.around([*values, *(value for value, _ in lines.values())], plot)
    left, right = 64, 190
    across = WIDTH - left - right
    step = across / max(1, len(values) - 1)
    bottom = _TOP + plot
    parts = []
    for tick in scale.ticks:
        y = bottom - scale.at(tick)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + across}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(left - 8, y + 4, f"{tick:,.6g}", "end"))
    points = [(left + number * step, bottom - scale.at(value)) for number, value in enumerate(values)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline points="{path}" class="trace"/>')
    for number, ((x, y), value) in enumerate(zip(points, values, strict=True)):
        told = f"{number}: {value:,.4g} {unit}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" class="point"><title>{escape(told)}</title></circle>')
    levels = sorted(((bottom - scale.at(value), value, name, style) for name, (value, style) in lines.items()))
    below = -math.inf
    for y, value, name, style in levels:
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + across}" y2="{y:.1f}" class="{style}"/>')
        below = max(below + 15, y + 4)
        parts.append(_text(left + across + 8, below, f"{name}: {value:,.4g} {unit}", "start"))
    parts += [_text(left + n * step, bottom + 18, str(n), "middle") for n in _indices(len(values))]
    parts.append(_text(left + across / 2, bottom + 38, "block, in order, warm-up left out", "middle"))
    middle = _TOP + plot / 2
    title = f"{axis} ({unit})" + (f", from {scale.start:,.6g}" if scale.start else "")
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(title)}</text>'
    )
    return _svg(bottom + _AXIS, f"{axis} over time", parts)


@dataclass(frozen=True)
class _Scale:
    """From values, `start` to `end`, to pixels, 0 to `length`; both ends are multiples of `step`."""

    end: float
    length: float
    step: float
    start: float = 0.0

    @classmethod
    def of(cls, most: float, length: float, least: float = 0.0) -> _Scale:
        """A scale that reaches from round numbers at or below `least` to one at or above `most`."""
        most = most if most > least and math.isfinite(most) else least + 1.0
        span = most - least
        power = 10.0 ** math.floor(math.log10(span / 5))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 6)
        return cls(step * math.ceil(most / step - 1e-9), length, step, step * math.floor(least / step + 1e-9))

    @classmethod
    def around(cls, values: Sequence[float], length: float) -> _Scale:
        """A scale from zero, or from just below the values where these are close together."""
        least, most = min(values), max(values)
        return cls.of(most, length, least - (most - least) / 2 if most > least > _CLOSE * most else 0.0)

    @property
    def ticks(self) -> list[float]:
        return [self.start + number * self.step for number in range(round((self.end - self.start) / self.step) + 1)]

    def at(self, value: float) -> float:
        return self.length * (min(value, self.end) - self.start) / (self.end - self.start)


def _x_axis(left: float, scale: _Scale, bottom: float, title: str) -> str:
    parts = []
    for tick in scale.ticks:
        x = left + scale.at(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{bottom}" class="grid"/>')
        parts.append(_text(x, bottom + 16, f"{tick:,.6g}", "middle"))
    parts.append(_text(left + scale.length / 2, bottom + 36, title, "middle"))
    return "".join(parts)


def _indices(count: int) -> range:
    """Which indices an axis of `count` points names: at most about ten."""
    return range(0, count, max(1, -(-count // 10)))


def _room(names: Sequence[str]) -> float:
    """Pixels for names at the left of bars."""
    return min(_WIDE, max(_NARROW, *(_CHARACTER * len(name) + 16 for name in names)))


def _text(x: float, y: float, text: str, anchor: str, room: float | None = None, style: str = "") -> str:
    """A label; one that does not fit into `room` is cut, and told whole when pointed at."""
    most = len(text) if room is None else int((room - 16) / _CHARACTER + 1e-6)
    shown = text if len(text) <= most else f"{text[: most - 1]}…"
    whole = "" if shown == text else f"<title>{escape(text)}</title>"
    kind = f" class={quoteattr(style)}" if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{whole}{escape(shown)}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label={quoteattr(title)} '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
