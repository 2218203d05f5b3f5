"""A lag over time as a small drawing: inline SVG without a style of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from instance_manager.http.lag_history import SAMPLES_MAX, Sample

WIDTH, HEIGHT = 2 * (SAMPLES_MAX - 1), 46
_TOP, _BOTTOM = 4, 42
_FULL_SCALE_MIN_BYTES = 1024 * 1024


def lag_chart(samples: Sequence[Sample]) -> str:
    """Newest at the right edge. Logarithmic, from nothing to the highest seen or 1 MB: a kilobyte and a gigabyte both show.

    Where nothing is known the drawing has a gap, marked by a bar.
    """
    known = [sample for sample in samples if sample is not None]
    scale = math.log10(1 + max([_FULL_SCALE_MIN_BYTES, *known]))
    step = 2
    first = SAMPLES_MAX - len(samples)
    parts = []
    for begin, end, is_known in _runs(samples):
        left, right = (first + begin) * step, (first + end - 1) * step
        if not is_known:
            parts.append(
                f'<rect class="gap" x="{left}" y="{_TOP}" width="{max(right - left, step)}" height="{_BOTTOM - _TOP}"/>'
            )
            continue
        points = " ".join(
            f"{(first + index) * step},{_BOTTOM - round((_BOTTOM - _TOP) * math.log10(1 + (samples[index] or 0)) / scale)}"
            for index in range(begin, end)
        )
        parts.append(f'<polygon points="{left},{_BOTTOM} {points} {right},{_BOTTOM}"/>')
        parts.append(f'<polyline points="{points}"/>')
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="lag over time">'
        f"{''.join(parts)}</svg>"
    )


def _runs(samples: Sequence[Sample]) -> Iterator[tuple[int, int, bool]]:
    """(first, behind the last, known) of each stretch."""
    begin = 0
    for index in range(1, len(samples) + 1):
        if index == len(samples) or (samples[index] is None) != (samples[begin] is None):
            yield begin, index, samples[begin] is not None
            begin = index
