"""Bar charts as SVG text: the same bytes from the same numbers with any version of any library.

A picture in the README is compared with its result file by a test, so nothing in it may depend on a font, a version or a date.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

_BAR, _GAP, _HEADING, _TOP, _BOTTOM = 18, 8, 26, 46, 38
_PLOT, _MARGIN = 440, 16
# An average character of 12 px in the usual sans-serif fonts, a little more than less.
_CHARACTER = 6.6
_OURS, _OTHERS, _RANGE = "#0b6e99", "#a9b4bd", "#33404a"


@dataclass(frozen=True)
class Bar:
    """One measured value, low and high its 20th and 80th percentile; `text` is printed behind it."""

    label: str
    value: float
    low: float
    high: float
    text: str
    ours: bool = False


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], reference: float = 0) -> str:
    """Horizontal bars from zero, in groups with a heading each (none where empty), the spread as a line over each bar.

    reference: a value that is marked by a line; 0: none.
    """
    bars = [bar for _, group in groups for bar in group]
    left = _MARGIN + round(_CHARACTER * max(len(bar.label) for bar in bars)) + 8
    largest = max(reference, *(max(bar.high, bar.value) for bar in bars))
    step = _step(largest)
    ticks = math.ceil(largest / step - 1e-9) or 1
    scale = _PLOT / (ticks * step)
    height = _TOP + sum((_HEADING if heading else 0) + len(group) * (_BAR + _GAP) for heading, group in groups) + _BOTTOM
    ends = [left + max(bar.high, bar.value) * scale + 6 for bar in bars]
    texts = [end + _CHARACTER * len(bar.text) for bar, end in zip(bars, ends, strict=True)]
    width = _MARGIN + round(max(left + _PLOT, _MARGIN + 8.5 * len(title), *texts))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#1d252b" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="26" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for tick in range(ticks + 1):
        x = left + tick * step * scale
        lines.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{height - _BOTTOM}" stroke="#e3e7ea"/>')
        lines.append(
            f'<text x="{x:.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle" fill="#5b6770">{_tick(tick * step)}</text>'
        )
    y = _TOP
    for heading, group in groups:
        if heading:
            lines.append(f'<text x="{_MARGIN}" y="{y + 18}" font-weight="bold">{escape(heading)}</text>')
            y += _HEADING
        for bar in group:
            middle = y + (_GAP + _BAR) / 2
            end = left + max(bar.high, bar.value) * scale
            lines += [
                f'<text x="{left - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect x="{left}" y="{middle - _BAR / 2:.1f}" width="{bar.value * scale:.1f}" height="{_BAR}" '
                f'fill="{_OURS if bar.ours else _OTHERS}"/>',
                f'<line x1="{left + bar.low * scale:.1f}" y1="{middle:.1f}" x2="{left + bar.high * scale:.1f}" '
                f'y2="{middle:.1f}" stroke="{_RANGE}" stroke-width="2"/>',
                f'<text x="{end + 6:.1f}" y="{middle + 4:.1f}">{escape(bar.text)}</text>',
            ]
            y += _BAR + _GAP
    if reference:
        x = left + reference * scale
        lines.append(f'<path d="M{x:.1f} {_TOP}V{height - _BOTTOM}" stroke="{_RANGE}" stroke-dasharray="4 3"/>')
    lines.append("</svg>")
    return "\n".join(lines) + "\n"


def _step(largest: float) -> float:
    """A round distance of grid lines that gives four to ten of them."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(power * part for part in (0.1, 0.2, 0.5, 1.0) if largest / (power * part) <= 10)


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
