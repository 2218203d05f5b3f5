"""Panels of a dashboard drawn by matplotlib, one picture for a section, in the places that the dashboard gives them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib as mpl
from dashboard_panels import Filled, Panel, Section, Series, UnknownPart, Window, colour_of, formatted, ticks
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

DPI = 100
COLUMN_PX, ROW_PX = 60, 34
"""A unit of the dashboard's grid; 24 columns are the width of a picture."""
GAP_PX, HEAD_PX, FOOT_PX = 8, 40, 20
TITLE_PX, AXIS_PX, LEFT_PX, LEGEND_LINE_PX = 30, 20, 66, 15
LEGEND_LINES_MAX = 5
COLOURS_KEPT = 256
"""In a picture's file: a palette makes it half as large."""

INK, FAINT, GRID, PAPER, PANEL = "#24292e", "#6b7280", "#e3e5e8", "#e9ebee", "#ffffff"
COLOURS = {
    "green": "#37872d",
    "red": "#c4162a",
    "orange": "#e36209",
    "yellow": "#c69c06",
    "blue": "#1f60c4",
    "purple": "#7a3fa8",
    "text": INK,
}
LINES = ("#1f60c4", "#e36209", "#37872d", "#c4162a", "#7a3fa8", "#0e8a93", "#c69c06", "#d1478f", "#6b4e2e", "#7b8794")
DASHES = ("-", "--", ":", "-.")
"""For the series beyond the colours."""
BRIEF = 4
"""Samples that are drawn as points too."""
MORE = "and {} more"


def draw(
    section: Section, filled: Sequence[Filled], window: Window, file: Path, *, heading: str, footing: Sequence[str]
) -> None:
    """One PNG. `footing`: lines below the panels, that tell what the picture is. UnknownPart: a colour is unknown."""
    mpl.rcParams.update({"font.family": "DejaVu Sans", "font.size": 8, "text.color": INK})
    height = (
        max(panel.y + panel.height for panel in section.panels) * ROW_PX + HEAD_PX + FOOT_PX * len(footing) + GAP_PX
    )
    page = _Page(24 * COLUMN_PX, height)
    page.text(GAP_PX, HEAD_PX / 2, heading, size=12, weight="bold")
    for each in filled:
        panel = each.panel
        frame = _Frame(
            page,
            panel.x * COLUMN_PX + GAP_PX / 2,
            HEAD_PX + panel.y * ROW_PX + GAP_PX / 2,
            panel.width * COLUMN_PX - GAP_PX,
            panel.height * ROW_PX - GAP_PX,
        )
        {"stat": _stat, "timeseries": _time_series, "state-timeline": _state_timeline}[panel.kind](frame, each, window)
    for number, line in enumerate(footing):
        page.text(GAP_PX, height - GAP_PX / 2 - FOOT_PX * (len(footing) - number - 0.5), line, size=8.5, colour=FAINT)
    page.save(file)


class _Page:
    """A figure measured in pixels from its top left."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
        self.canvas = FigureCanvasAgg(self.figure)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 8,
        colour: str = INK,
        weight: str = "normal",
        at: str = "left",
    ) -> Any:
        return self.figure.text(
            x / self.width,
            1 - y / self.height,
            text,
            size=size,
            color=colour,
            weight=weight,
            ha=at,
            va="center",
            parse_math=False,
        )

    def width_of(self, text: str, *, size: float = 8, weight: str = "normal") -> float:
        drawn = self.text(0, 0, text, size=size, weight=weight)
        width = drawn.get_window_extent(self.canvas.get_renderer()).width
        drawn.remove()
        return float(width)

    def rectangle(self, x: float, y: float, width: float, height: float, *, face: str, edge: str | None = None) -> None:
        self.figure.patches.append(
            Rectangle(
                (x / self.width, 1 - (y + height) / self.height),
                width / self.width,
                height / self.height,
                transform=self.figure.transFigure,
                facecolor=face,
                edgecolor=edge or "none",
                linewidth=0.8,
                zorder=-1,
            )
        )

    def line(self, x: float, y: float, width: float, colour: str, dash: str) -> None:
        axes = self.axes(x, y - 3, width, 6)
        axes.axis("off")
        axes.plot([0, 1], [0, 0], color=colour, linestyle=dash, linewidth=2)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        return self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )

    def save(self, file: Path) -> None:
        drawn = io.BytesIO()
        self.canvas.print_png(drawn)
        image = Image.open(drawn).convert("RGB")
        image.quantize(COLOURS_KEPT, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            file, optimize=True
        )


class _Frame:
    """The place of one panel, and its title."""

    def __init__(self, page: _Page, x: float, y: float, width: float, height: float) -> None:
        self.page, self.x, self.y, self.width, self.height = page, x, y, width, height
        page.rectangle(x, y, width, height, face=PANEL, edge=GRID)

    def title(self, panel: Panel) -> None:
        self.page.text(self.x + 8, self.y + 14, panel.title, size=9, weight="bold")

    def note(self, text: str) -> None:
        self.page.text(self.x + self.width / 2, self.y + self.height / 2, text, size=10, colour=FAINT, at="center")


def _colour(name: str) -> str:
    if name not in COLOURS:
        raise UnknownPart(f"the colour {name}")
    return COLOURS[name]


def _stat(frame: _Frame, filled: Filled, _window: Window) -> None:
    frame.title(filled.panel)
    panel = filled.panel
    value = filled.series[0].last if filled.series else None
    if len(filled.series) > 1:
        raise UnknownPart(f"panel {panel.title!r}: a stat of several series")
    if value is None:
        frame.note("No data")
        return
    text, name = panel.mappings.get(value) or (formatted(value, panel.unit), colour_of(value, panel.thresholds))
    middle = frame.y + (frame.height + TITLE_PX) / 2
    size = min(24.0, 24 * (frame.width - 24) / frame.page.width_of(text, size=24, weight="bold"))
    frame.page.text(
        frame.x + frame.width / 2, middle - 4, text, size=size, colour=_colour(name), weight="bold", at="center"
    )


def _time_series(frame: _Frame, filled: Filled, window: Window) -> None:
    frame.title(filled.panel)
    if not filled.series:
        frame.note("No data")
        return
    styles = [(LINES[n % len(LINES)], DASHES[n // len(LINES) % len(DASHES)]) for n in range(len(filled.series))]
    lines = _legend_lines(frame, [series.legend for series in filled.series])
    axes = _axes(frame, window, legend_lines=len(lines))
    seen = [value for series in filled.series for value in series.values if not math.isnan(value)]
    at = ticks(min(seen, default=0.0), max(seen, default=0.0), filled.panel.unit)
    axes.set_ylim(at[0], at[-1])
    axes.set_yticks(at, [formatted(value, filled.panel.unit) for value in at])
    for series, (colour, dash) in zip(filled.series, styles, strict=True):
        axes.plot(_moments(series, window), series.values, color=colour, linestyle=dash, linewidth=1.3, clip_on=False)
        brief = _brief(series.values)
        axes.plot(
            [index * window.step_s for index in brief],
            [series.values[index] for index in brief],
            color=colour,
            marker="o",
            markersize=2.5,
            linestyle="none",
            clip_on=False,
        )
    if not seen:
        axes.set_yticks([])
        frame.note("every value is infinite" if any(series.is_infinite for series in filled.series) else "No data")
    _legend(frame, lines, [(series.legend, *style) for series, style in zip(filled.series, styles, strict=True)])


def _state_timeline(frame: _Frame, filled: Filled, window: Window) -> None:
    frame.title(filled.panel)
    panel = filled.panel
    if not filled.series:
        frame.note("No data")
        return
    states = {value: (text, _colour(name)) for value, (text, name) in panel.mappings.items()}
    lines = _legend_lines(frame, [text for text, _ in states.values()])
    axes = _axes(frame, window, legend_lines=len(lines))
    axes.grid(visible=False)
    axes.set_ylim(len(filled.series) - 0.5, -0.5)
    axes.set_yticks(range(len(filled.series)), [series.legend for series in filled.series])
    for row, series in enumerate(filled.series):
        index = 0
        for value, run in groupby(series.values):
            count = len(list(run))
            if not math.isnan(value):
                if value not in states:
                    raise UnknownPart(f"panel {panel.title!r}: no mapping of {value:g}")
                axes.barh(row, count * window.step_s, left=index * window.step_s, height=0.8, color=states[value][1])
            index += count
    _legend(frame, lines, [(text, colour, "-") for text, colour in states.values()])


def _moments(series: Series, window: Window) -> list[float]:
    return [index * window.step_s for index in range(len(series.values))]


def _brief(values: Sequence[float]) -> list[int]:
    """The samples of runs so short that a line hardly shows them, or not at all."""
    found: list[int] = []
    index = 0
    for missing, run in groupby(values, key=math.isnan):
        count = len(list(run))
        if not missing and count <= BRIEF:
            found += range(index, index + count)
        index += count
    return found


def _axes(frame: _Frame, window: Window, *, legend_lines: int) -> Any:
    below = AXIS_PX + legend_lines * LEGEND_LINE_PX + 8
    axes = frame.page.axes(
        frame.x + LEFT_PX, frame.y + TITLE_PX, frame.width - LEFT_PX - 14, frame.height - TITLE_PX - below
    )
    axes.set_facecolor(PANEL)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelcolor=FAINT, labelsize=7.5)
    length_s = window.end_s - window.start_s
    axes.set_xlim(0, length_s)
    at = [value for value in ticks(0, length_s, "s", count=6) if value <= length_s]
    axes.set_xticks(at, [f"{int(value) // 60}:{int(value) % 60:02}" for value in at])
    return axes


def _legend_lines(frame: _Frame, names: Sequence[str]) -> list[list[int]]:
    """The numbers of the names on each line of the legend; those for which there is no room are on none."""
    lines: list[list[int]] = [[]]
    used = 0.0
    room = frame.width - 20
    more = frame.page.width_of(MORE.format(99), size=7.5) + 10
    for number, name in enumerate(names):
        width = frame.page.width_of(name, size=7.5) + 32
        is_last_line = len(lines) == LEGEND_LINES_MAX
        limit = room - (more if is_last_line and number < len(names) - 1 else 0)
        if lines[-1] and used + width > limit:
            if is_last_line:
                break
            lines.append([])
            used = 0.0
        lines[-1].append(number)
        used += width
    return lines


def _legend(frame: _Frame, lines: list[list[int]], entries: Sequence[tuple[str, str, str]]) -> None:
    shown = 0
    y = frame.y + frame.height - len(lines) * LEGEND_LINE_PX
    x = 0.0
    for line in lines:
        x = frame.x + 10
        for number in line:
            name, colour, dash = entries[number]
            frame.page.line(x, y, 14, colour, dash)
            frame.page.text(x + 18, y, name, size=7.5)
            x += frame.page.width_of(name, size=7.5) + 32
            shown += 1
        y += LEGEND_LINE_PX
    if shown < len(entries):
        frame.page.text(x, y - LEGEND_LINE_PX, MORE.format(len(entries) - shown), size=7.5, colour=FAINT)
