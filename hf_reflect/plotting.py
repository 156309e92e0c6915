"""Pictures of what a run did, drawn with matplotlib (extra `plots`) without a display.

Dark ink on a light ground of their own, so that they can be read on a light page and on a dark one.
"""

import base64
import importlib.util
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from hf_reflect.describing import Description, number
from hf_reflect.errors import HfReflectError
from hf_reflect.output import PICTURES


if TYPE_CHECKING:
    import numpy as np

BEFORE, AFTER = "#0b5c8a", "#b34700"
INK, GROUND = "#1f2328", "#fbfbf9"
GREEN, GREY, BLUE = "#2f7d5b", "#7d8792", "#3f8fa8"
_COLOURS = (GREEN, BEFORE, AFTER, "#8a5a9e", "#a3870b", GREY, "#a8415b", BLUE, "#7a7a2e", "#94623a")
_OUTCOMES = {
    "all": BEFORE,
    "rewritten": GREEN,
    "both": GREEN,
    "instruction": BLUE,
    "response": "#8a5a9e",
    "turned down": AFTER,
    "not scored": "#a3870b",
    "no rewrite": GREY,
    "original": GREY,
    "left out": AFTER,
}
_SIZE = (8.0, 3.3)
_DPI = 150
_MOST_POINTS = 4000
_GRID = 400
_FAR = 3.0
_NAMES = {"ifd": "IFD", "rifd": "r-IFD"}
_STAGES = {"original": ("before", BEFORE, (0, (4, 2))), "recycled": ("after", AFTER, "solid")}


@dataclass(frozen=True)
class Caption:
    """What a picture shows.

    Attributes:
        name: Its file's name, without `.png`.
        title: What it shows, in a few words.
        alt: What can be seen on it, in a sentence or two, for who can't see it.
    """

    name: str
    title: str
    alt: str

    @property
    def path(self) -> str:
        """Its file's path in the folder of a result."""
        return f"{PICTURES}/{self.name}.png"


@dataclass(frozen=True)
class Picture(Caption):
    """A picture and what it shows.

    Attributes:
        png: The file's content.
    """

    png: bytes

    def to_html(self) -> str:
        """For a page that must need no other file."""
        content = base64.b64encode(self.png).decode()
        return f'<img src="data:image/png;base64,{content}" alt="{escape(self.alt)}" style="max-width: 100%">'


@dataclass(frozen=True)
class _Plot:
    name: str
    title: str
    alt: Callable[[Description], str | None]
    draw: Callable[[Any, Description], None]


def can_draw() -> bool:
    """Whether the extra `plots` is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def captions(description: Description) -> list[Caption]:
    """What pictures there are of a run, where there is something to be seen on them."""
    return [Caption(plot.name, plot.title, alt) for plot, alt in _drawable(description)]


def draw(description: Description) -> list[Picture]:
    """The pictures of a run: scores, scores against length, the flow of the rows, statuses.

    Raises:
        HfReflectError: the extra `plots` is not installed.
    """
    if not can_draw():
        raise HfReflectError("pictures need the extra `plots`: pip install 'hf-reflect[plots]'.")
    return [Picture(plot.name, plot.title, alt, _png(plot, description)) for plot, alt in _drawable(description)]


def _drawable(description: Description) -> Iterator[tuple[_Plot, str]]:
    for plot in _PLOTS:
        if alt := plot.alt(description):
            yield plot, alt


def _png(plot: _Plot, description: Description) -> bytes:
    from matplotlib import style
    from matplotlib.figure import Figure

    look = {
        "text.parse_math": False,  # a status may come from somebody else's file
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": GROUND,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9.5,
        "legend.frameon": False,
    }
    with style.context(["default", look]):  # whatever the user's own settings are
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained", facecolor=GROUND)
        plot.draw(figure, description)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


# Scores before and after


def _scored(description: Description) -> list[str]:
    return [name for name in _NAMES if any(name in description.distributions[stage] for stage in _STAGES)]


def _alt_scores(description: Description) -> str | None:
    said = []
    for score in _scored(description):
        medians = [
            f"{number(score, found.median)} {_STAGES[stage][0]}"
            for stage in _STAGES
            if (found := description.distributions[stage].get(score))
        ]
        columns = [_column(description, stage, score) for stage in _STAGES]
        high = _span(columns)[1]
        said.append(f"median {_NAMES[score]} {', '.join(medians)}{_omitted(_beyond(columns, high), high)}")
    return f"Densities of the scores over the rows: {'; '.join(said)}." if said else None


def _draw_scores(figure: Any, description: Description) -> None:
    scores = _scored(description)
    for axes, score in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores, strict=True):
        columns = {stage: _column(description, stage, score) for stage in _STAGES}
        low, high = _span(list(columns.values()))
        for stage, column in columns.items():
            _density(axes, column, low, high, *_STAGES[stage])
        if low < 1 < high:
            axes.axvline(1, color=INK, linewidth=0.8, alpha=0.6)
        label = "density" if axes is figure.axes[0] else ""
        axes.set(
            xlabel=_NAMES[score] + _omitted(_beyond(columns.values(), high), high), ylabel=label, xlim=(low, high)
        )
        axes.set_yticks([])
        axes.set_ylim(bottom=0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _density(
    axes: Any, column: "np.ndarray[Any, Any]", low: float, high: float, label: str, colour: str, dash: Any
) -> None:
    import numpy as np
    from matplotlib.mlab import GaussianKDE

    if not len(column):
        return
    label = f"{label}, median {np.median(column):.2f} (n={len(column)})"
    shown = column[column <= high][:_MOST_POINTS]  # one far away would smooth all the others flat
    if len(shown) < 2 or np.ptp(shown) < (high - low) / _GRID:  # nothing to smooth
        axes.axvline(np.median(column), color=colour, label=label, linestyle=dash)
        return
    grid = np.linspace(low, high, _GRID)
    heights = GaussianKDE(shown)(grid)
    axes.fill_between(grid, heights, color=colour, alpha=0.15, linewidth=0)
    axes.plot(grid, heights, color=colour, label=label, linestyle=dash)


def _span(columns: Sequence["np.ndarray[Any, Any]"]) -> tuple[float, float]:
    """What is shown of scores: always 1, and all of them, or where some are far away all but the last hundredth."""
    import numpy as np

    every = np.concatenate(columns)
    most, nearly_all, largest = np.quantile(every, (0.95, 0.99, 1.0), method="lower")
    high = largest if largest <= _FAR * most else nearly_all
    return min(0.0, float(every.min())), max(1.1, float(high) * 1.05)


def _beyond(columns: Iterable["np.ndarray[Any, Any]"], high: float) -> int:
    return sum(int((column > high).sum()) for column in columns)


def _omitted(beyond: int, high: float) -> str:
    """What a picture says of scores that it does not show."""
    return f" ({beyond} above {high:.1f} not shown)" if beyond else ""


# IFD against length


def _alt_length(description: Description) -> str | None:
    said = [
        f"{found['response length']:+.2f} {_STAGES[stage][0]}"
        for stage in _STAGES
        if "response length" in (found := description.correlations[stage].get("ifd", {}))
    ]
    if not said:
        return None
    columns = [_column(description, stage, "ifd") for stage in _STAGES]
    high = _span(columns)[1]
    omitted = _omitted(_beyond(columns, high), high)
    return f"IFD against the length of the response, a dot for a row{omitted}: rank correlation {', '.join(said)}."


def _draw_length(figure: Any, description: Description) -> None:
    from matplotlib.ticker import FuncFormatter

    axes = figure.subplots()
    scores = []
    for stage, (label, colour, _) in _STAGES.items():
        lengths = description.summary.measures.column(stage, "response length")
        ifd = description.summary.measures.column(stage, "ifd")
        there = (lengths > 0) & (ifd == ifd)
        scores.append(ifd[there])
        marker = "o" if stage == "original" else "^"
        points = lengths[there][:_MOST_POINTS], ifd[there][:_MOST_POINTS]
        size = min(36.0, max(9.0, 3000 / max(1, len(points[0]))))  # few dots are large enough to be found
        axes.scatter(*points, s=size, color=colour, marker=marker, alpha=0.45, linewidth=0, label=label)
    axes.axhline(1, color=INK, linewidth=0.8, alpha=0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    low, high = _span(scores)
    omitted = _omitted(_beyond(scores, high), high)
    axes.set(xlabel="characters of the response", ylabel=f"IFD{omitted}", ylim=(low, high))
    axes.legend()


# What became of the rows


def _alt_flow(description: Description) -> str | None:
    flows = description.summary.flows
    if not flows:
        return None
    first, second, result = (_summed(flows, at) for at in range(3))
    said = [
        f"in the instruction phase {_listed(first)}",
        f"in the response phase {_listed(second)}",
        f"in the result {_listed(result)}",
    ]
    return f"The way of {flows.total()} rows: {'; '.join(said)}."


def _draw_flow(figure: Any, description: Description) -> None:
    flows: Counter[tuple[str, ...]] = Counter(
        {("all", *path): count for path, count in description.summary.flows.items()}
    )
    total = flows.total()
    axes = figure.subplots()
    axes.set_axis_off()
    titles = ("source", "instruction phase", "response phase", "result")
    columns = [_places(_summed(flows, at), total) for at in range(len(titles))]
    for at, (title, places) in enumerate(zip(titles, columns, strict=True)):
        axes.text(at, -0.06, title, ha="center", va="bottom", weight="bold")
        for name, (top, count) in places.items():
            axes.fill_betweenx([top, top + count / total], at - 0.06, at + 0.06, color=_colour(name), linewidth=0)
            side, edge = ("left", at + 0.08) if at < len(titles) - 1 else ("right", at - 0.08)
            axes.text(edge, top + count / total / 2, f"{name} {count}", ha=side, va="center", bbox=_BEHIND)
    for at in range(len(titles) - 1):
        _draw_ribbons(axes, at, _pairs(flows, at), columns[at], columns[at + 1], total)
    axes.set(xlim=(-0.1, len(titles) - 0.9), ylim=(1.12, -0.14))


_BEHIND = {"facecolor": GROUND, "edgecolor": "none", "alpha": 0.75, "pad": 1.0}
_Places = dict[str, tuple[float, int]]


def _places(counts: Counter[str], total: int) -> _Places:
    """Where each outcome begins, from the top, with a gap between them."""
    places: _Places = {}
    top = 0.0
    for name in sorted(counts, key=_rank):
        places[name] = top, counts[name]
        top += counts[name] / total + 0.04
    return places


def _rank(outcome: str) -> tuple[int, str]:
    known = list(_OUTCOMES)
    return known.index(outcome) if outcome in known else len(known), outcome


def _colour(outcome: str) -> str:
    return _OUTCOMES.get(outcome, GREY)


def _pairs(flows: Counter[tuple[str, ...]], at: int) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for path, count in flows.items():
        found[path[at], path[at + 1]] += count
    return found


def _draw_ribbons(
    axes: Any, at: int, pairs: Counter[tuple[str, str]], left: _Places, right: _Places, total: int
) -> None:
    import numpy as np

    x = np.linspace(0, 1, 50)
    ease = x * x * (3 - 2 * x)
    begun: Counter[tuple[str, str]] = Counter()
    for (one, other), count in sorted(pairs.items(), key=lambda item: [_rank(name) for name in item[0]]):
        start = left[one][0] + begun["left", one] / total
        end = right[other][0] + begun["right", other] / total
        begun["left", one] += count
        begun["right", other] += count
        top = start + (end - start) * ease
        axes.fill_between(at + 0.06 + x * 0.88, top, top + count / total, color=_colour(other), alpha=0.3, linewidth=0)


def _summed(flows: Counter[Any], at: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for path, count in flows.items():
        found[path[at]] += count
    return found


# How reflections ended


def _alt_statuses(description: Description) -> str | None:
    by_phase = _by_phase(description)
    said = [f"of the {phase} {_listed(counts)}" for phase, counts in by_phase.items()]
    return f"How reflections ended: {'; '.join(said)}." if said else None


def _draw_statuses(figure: Any, description: Description) -> None:
    axes = figure.subplots()
    by_phase = _by_phase(description)
    statuses = list(dict.fromkeys(status for counts in by_phase.values() for status, _ in counts.most_common()))
    left = dict.fromkeys(by_phase, 0.0)
    for i, status in enumerate(statuses):
        counts = [by_phase[phase][status] for phase in by_phase]
        colour = _COLOURS[i % len(_COLOURS)]
        label = f"{status} ({sum(counts)})"
        hatch = "//" * (i // len(_COLOURS))
        bars = {"color": colour, "hatch": hatch, "edgecolor": GROUND, "label": label}
        axes.barh(list(by_phase), counts, left=list(left.values()), **bars)
        for phase, count in zip(by_phase, counts, strict=True):
            left[phase] += count
    axes.invert_yaxis()
    axes.set(xlabel="reflections")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4)


def _by_phase(description: Description) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for (phase, status), count in sorted(description.summary.statuses.items()):
        found.setdefault(phase, Counter())[status] = count
    return found


def _listed(counts: Counter[str]) -> str:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {name}" for name, count in ranked)


def _column(description: Description, stage: str, quantity: str) -> "np.ndarray[Any, Any]":
    column = description.summary.measures.column(stage, quantity)
    present: np.ndarray[Any, Any] = column[column == column]  # not NaN
    return present


_PLOTS = (
    _Plot("scores", "Scores before and after", _alt_scores, _draw_scores),
    _Plot("ifd_by_length", "IFD against length", _alt_length, _draw_length),
    _Plot("flow", "What became of the rows", _alt_flow, _draw_flow),
    _Plot("statuses", "How reflections ended", _alt_statuses, _draw_statuses),
)
PATHS = tuple(Caption(plot.name, plot.title, "").path for plot in _PLOTS)
"""Where all pictures are that a result can have."""
