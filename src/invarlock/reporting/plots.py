"""The figures of a certificate as inline SVG. Deterministic; colours follow the page's light or dark scheme.

matplotlib draws with placeholder colours, which become CSS variables of the page; text stays text.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from invarlock.certificate.schema import Certificate
from invarlock.evidence.histogram import HISTOGRAM_EDGES
from invarlock.reporting.view import growth_rows, layer_rows
from invarlock.reporting.wording import (
    FORMS,
    change,
    family_order,
    find,
    interval,
    middle_cut,
    nats,
    number,
    percent,
    reading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_WIDTH = 540  # px, the width of half a page; the SVG scales
_LINE = 22  # px, room below a picture for what a mark tells
_INK, _MUTED, _GRID, _ONE, _TWO, _BAD = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_VARIABLES = {
    _INK: "--ink", _MUTED: "--muted", _GRID: "--line", _ONE: "--series-1", _TWO: "--series-2", _BAD: "--bad",
}  # fmt: skip
_FAR = 1e30  # no axis reaches further; the figures in words are not cut
_DASHED: dict[str, Any] = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (4, 3))}
_MARKERS = ("o", "s", "^", "D", "v")
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "invarlock",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.labelpad": 9,  # a phone shows text larger
    "axes.edgecolor": _GRID,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "path.simplify": False,
}


def draw(c: Certificate) -> dict[str, Markup]:
    """Return the figures by name, those left out for which nothing was measured: interval, windows, divergence, growth."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found: dict[str, Markup] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own style must not change a certificate's page
        matplotlib.rcParams.update(_STYLE)
        for name, plot in _PLOTS.items():
            figure = Figure(figsize=(_WIDTH / 72, plot.height / 72), dpi=72, layout="constrained")
            FigureCanvasSVG(figure)
            description = plot.draw(c, figure)
            if description is not None:
                found[name] = _svg(figure, name, plot.title, description)
    return found


def _titles(figure: Figure) -> dict[str, str]:
    """Return what a reader sees who points at a mark, by the id of the mark."""
    marks = [mark for axes in figure.axes for mark in axes.collections if mark.get_gid()]
    return {str(mark.get_gid()): str(mark.get_label()) for mark in marks}


def _svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Return the figure as an <svg> element with title and description, its ids made unique to the page."""
    buffer = io.StringIO()
    empty = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=empty)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    titles = _titles(figure)
    text = _told(text, titles)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"(?=[^>]*>)', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"(?=[^>]*>)', r"\1", text, count=1)
    head = Markup('<svg role="{1}" aria-labelledby="{0}-title {0}-desc"').format(name, "group" if titles else "img")
    labels = Markup('<title id="{0}-title">{1}</title><desc id="{0}-desc">{2}</desc>').format(name, title, description)
    opened = text.index(">") + 1
    return Markup(head + Markup(text[4:opened]) + labels + Markup(text[opened:].strip()))


def _told(text: str, titles: Mapping[str, str]) -> str:
    """Let every named mark tell its figures below the picture, where it is pointed at, tapped or reached by the keyboard.

    The page has no scripts: each mark holds its line, which its style shows. What can be hit is larger than what is drawn.
    """
    if not titles:
        return text
    width, height = (float(size) for size in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0])
    text = text.replace(f'viewBox="0 0 {width:g} {height:g}"', f'viewBox="0 0 {width:g} {height + _LINE:g}"', 1)
    place = f'x="{width / 2:g}" y="{height + _LINE / 2:g}" text-anchor="middle"'
    for gid, said in titles.items():
        start = text.index(f'<g id="{gid}">')
        spot = re.search(r'<use [^>]*x="([\d.-]+)" y="([\d.-]+)"', text[start:])
        x, y = spot.groups() if spot else ("0", "0")
        opened = f'<g id="{gid}" class="mark-told" tabindex="0" role="img" aria-label="{escape(said)}">'
        around = f'<title>{escape(said)}</title><circle class="reach" cx="{x}" cy="{y}" r="9"/>'
        line = f'<text class="told" {place}>{escape(said)}</text>'
        text = text[:start] + text[start:].replace(f'<g id="{gid}">', opened + around + line, 1)
    hint = f'<text class="hint" {place}>Point at a mark, tap it or move to it by the keyboard for its figures.</text>'
    end = text.rindex("</svg>")
    return text[:end] + hint + text[end:]


def _quiet(axes: Axes, *, left: bool = False) -> None:
    axes.spines["left"].set_visible(left)
    axes.tick_params(length=3, width=0.8)


def _plain_ticks(axes: Axes) -> None:
    """Label powers of ten without the markup of formulas, which is switched off as names could hold it."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _interval(c: Certificate, figure: Figure) -> str | None:
    """The interval against the limit: a line with a dot, the region beyond the limit shaded."""
    pm, r = c.primary_metric, reading(c.primary_metric)
    floor, form, neutral = r.bound == "floor", FORMS[r.form], r.neutral
    value, limit = number(getattr(pm, r.value)), number(pm.limit)
    if value is None or limit is None:
        return None
    bounds = [number(x) for x in pm.display_ci]
    lo, hi = (min(max(value if bound is None else bound, -_FAR), _FAR) for bound in bounds)
    value = min(value, _FAR)
    ends = [lo, hi, value, limit, neutral]
    room = max(0.12 * (max(ends) - min(ends)), 1e-3)
    first, last = min(ends) - (2 if floor else 1) * room, max(ends) + (1 if floor else 2) * room
    axes = figure.add_subplot()
    if not floor and hi > 3 * limit and lo > 0:
        first, last = min(ends) / 1.2, max(ends) * 1.5
        axes.set_xscale("log")
        _plain_ticks(axes)
    axes.set_xlim(first, last)
    axes.set_ylim(-1, 1.5)
    axes.axvspan(*((first, limit) if floor else (limit, last)), color=_BAD, alpha=0.12, linewidth=0)
    axes.axvline(limit, color=_BAD, linewidth=1.6)
    axes.axvline(neutral, **_DASHED)
    axes.plot([lo, hi], [0, 0], color=_ONE, linewidth=3, solid_capstyle="butt")
    axes.plot([lo, hi], [0, 0], color=_ONE, linewidth=0, marker="|", markersize=16, markeredgewidth=2)
    axes.plot([value], [0], color=_ONE, marker="o", markersize=9)
    said, side = f"{r.bound} {form(limit)}", ("right", -6) if floor else ("left", 6)  # away from no change
    for text, place, shift, align, colour in (
        (said, (limit, 1.5), (side[1], -4), side[0], _BAD),
        (form(value), (value, 0), (0, -13), "center", _INK),
    ):
        axes.annotate(text, place, shift, ha=align, color=colour, textcoords="offset points", va="top")
    axes.set_yticks([])
    axes.set_xlabel(r.axis)
    _quiet(axes)
    around = interval(pm.display_ci, form)
    return f"{form(value)}, {pm.ci_level:.0%} interval {around}, {said}; {form(neutral)} would be unchanged."


def _deltas(c: Certificate) -> tuple[list[float], list[float]]:
    """Return the finite differences of log-loss of the preview and of the final windows, in nats."""
    found: dict[str, list[float]] = {}
    for split, rows in c.evaluation_windows.items():
        pairs = zip(map(number, rows.subject_loss), map(number, rows.baseline_loss), strict=False)
        found[split] = [min(max(s - b, -_FAR), _FAR) for s, b in pairs if s is not None and b is not None]
    return found.get("preview", []), found.get("final", [])


def _windows(c: Certificate, figure: Figure) -> str | None:
    """Every window's change in order, beside their histogram."""
    preview, final = _deltas(c)
    deltas = np.array(preview + final)
    if reading(c.primary_metric).bound == "floor" or not deltas.size:
        return None
    tail = c.primary_metric_tail
    strip, bars = figure.subplots(1, 2, sharey=True, width_ratios=[2.4, 1])
    strip.scatter(range(len(preview)), preview, s=9, color=_ONE, linewidths=0, alpha=0.75, label="preview")
    numbers = range(len(preview), deltas.size)
    strip.scatter(numbers, final, s=11, color=_TWO, linewidths=0, alpha=0.75, marker="D", label="final")
    spread = float(np.ptp(deltas))
    edges = np.histogram_bin_edges(deltas, 30, None if spread > 1e-9 else (deltas[0] - 0.01, deltas[0] + 0.01))
    bars.hist([preview, final], edges, orientation="horizontal", stacked=True, color=[_ONE, _TWO])
    quantile = f"{100 * tail.quantile:g}% below" if tail is not None else ""
    for axes in (strip, bars):
        axes.axhline(0, **_DASHED)
        if tail is not None and tail.value is not None:
            axes.axhline(tail.value, color=_INK, linewidth=1)
        _quiet(axes, left=axes is strip)
    if tail is not None and tail.value is not None:
        bars.annotate(quantile, (1, tail.value), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", va="bottom")  # fmt: skip
    strip.set_xlabel("window")
    strip.set_ylabel("change of log-loss, nats")
    bars.set_xlabel("windows")
    strip.legend(loc="upper center", ncols=2, bbox_to_anchor=(0.5, 1.14), handletextpad=0.2, markerscale=1.8)
    middle, least, most = (nats(float(x)) for x in (np.median(deltas), deltas.min(), deltas.max()))
    gated = f", {quantile} {nats(tail.value)}" if tail is not None else ""
    return f"{deltas.size} windows, median {middle}, from {least} to {most} nats{gated}."


def _kl(c: Certificate, figure: Figure) -> str | None:
    """How many tokens moved how far, in five bins per decade."""
    d = c.divergence
    if d is None or len(d.histogram) != len(HISTOGRAM_EDGES) or not sum(d.histogram):
        return None
    zero, counts = d.histogram[0], np.array(d.histogram[1:181], dtype=float).reshape(45, 4).sum(1)
    counts[-1] += d.histogram[181]
    edges = np.array(HISTOGRAM_EDGES[1::4])
    limit = next((number(g.limit) for g in c.gates if g.name == "divergence_kl"), None)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    used = np.flatnonzero(counts)
    # both lines are on every chart, however far apart
    shown = [x for x in (d.kl_mean, limit) if x is not None and x > 0]
    least, most = edges[used[0] if used.size else 0], edges[used[-1] + 1 if used.size else -1]
    ends = np.log10([least, most, *shown])
    room = 0.25 * (ends.max() - ends.min())  # for the words beside a line at the end
    first = min([ends[:2].min() - 0.3, *(ends[2:] - room)])
    last = max([ends[:2].max() + 0.4, *(ends[2:] + room)])
    axes.set_xlim(10**first, 10**last)
    axes.bar(edges[used], counts[used], np.diff(edges)[used] * 0.94, align="edge", color=_ONE, linewidth=0)
    first, second = ("right", "left") if (d.kl_mean or 0.0) <= (limit or 0.0) else ("left", "right")
    for value, label, colour, side in ((d.kl_mean, "mean", _INK, first), (limit, "limit", _BAD, second)):
        if value is not None and value > 0:
            axes.axvline(value, color=colour, linewidth=1.4)
            axes.annotate(f"{label} {nats(value)}", (value, 1), (4 if side == "left" else -4, 0), ha=side, va="bottom",
                          xycoords=("data", "axes fraction"), textcoords="offset points", color=colour)  # fmt: skip
    _plain_ticks(axes)
    axes.set_xlabel("KL of a token, nats")
    axes.set_ylabel("tokens")
    _quiet(axes, left=True)
    return (
        f"{d.tokens} tokens: mean {nats(d.kl_mean)}, median {nats(d.kl_q50)}, q99 {nats(d.kl_q99)}, largest "
        f"{nats(d.kl_max)} nats; {zero} tokens under 1e-7; limit of the mean {nats(limit)}."
    )


def _growth(c: Certificate, figure: Figure) -> str | None:
    """Growth of the largest singular value of every matrix, in the model's order."""
    rows = growth_rows(c.spectral)
    if not rows:
        return None
    factors = [min(max(1 + growth, 1e-3), 1e3) for _, _, growth in rows]
    deadband = number(find(c.spectral, "policy.deadband"))
    axes = figure.add_subplot()
    extreme = max(abs(math.log(factor)) for factor in factors)
    reach = max(1.3 * extreme, 1.4 * math.log1p(deadband or 0.1))
    axes.set_ylim(math.exp(-reach), math.exp(reach))
    axes.set_yscale("log")
    if deadband:
        axes.axhspan(1 / (1 + deadband), 1 + deadband, color=_MUTED, alpha=0.12, linewidth=0)
    axes.axhline(1, **_DASHED)
    for index, family in enumerate(family_order(row[1] for row in rows)):
        places = [i for i, row in enumerate(rows) if row[1] == family]
        axes.scatter(places, [factors[i] for i in places], s=26, marker=_MARKERS[index % len(_MARKERS)], linewidths=0,
                     color=(_ONE, _TWO, _INK, _MUTED)[index % 4], label=_ascii(family, 16))  # fmt: skip
    _growth_ticks(axes, reach)
    axes.set_xlim(-1, len(rows))
    axes.set_xlabel("weight matrix, in the model's order")
    axes.set_ylabel("singular value, ratio")
    axes.legend(loc="lower center", ncols=5, bbox_to_anchor=(0.5, 1.0), handletextpad=0.1, columnspacing=1.2)
    _quiet(axes, left=True)
    worst = max(rows, key=lambda row: abs(row[2]))
    return f"{len(rows)} matrices; the largest change is {worst[0]}, {percent(worst[2])}."


def _layers(c: Certificate, figure: Figure) -> str | None:
    """How much each module's weights changed, and the edge of its activations, by depth. Every point has its own title."""
    from matplotlib.ticker import FuncFormatter

    rows = [row for row in layer_rows(c) if row.change is not None or row.edge is not None]
    if len(rows) < 3:
        return None
    families = family_order(row.family for row in rows)
    named = {"weights, relative change": "change", "activation edge, change": "edge"}
    measures = [(label, key) for label, key in named.items() if any(getattr(row, key) for row in rows)]
    if not measures:
        return None
    worst = sorted(rows, key=lambda row: -abs(row.change or 0.0))[: 3 if c.verdict.status != "PASS" else 0]
    several = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, key) in zip(several, measures, strict=True):
        axes.axhline(0, **_DASHED)
        for index, row in enumerate(rows):
            value, place = getattr(row, key), families.index(row.family)
            if value is None:
                continue
            point = axes.scatter([row.depth + 0.12 * (place - len(families) / 2)], [min(max(value, -_FAR), _FAR)], s=30,
                                 marker=_MARKERS[place % len(_MARKERS)], linewidths=1.4 if row in worst else 0,
                                 color=(_ONE, _TWO, _INK, _MUTED)[place % 4], edgecolors=_BAD)  # fmt: skip
            point.set_gid(f"point-{label[0]}-{index}")
            point.set_label(f"{middle_cut(row.name, 44)}: {label} {change(value)}")
        axes.set_ylabel(label.partition(",")[0], fontsize=10)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        _quiet(axes, left=True)
    handles = [several[0].scatter([], [], s=30, linewidths=0, marker=_MARKERS[i % len(_MARKERS)],
                                  color=(_ONE, _TWO, _INK, _MUTED)[i % 4], label=_ascii(family, 16))
               for i, family in enumerate(families)]  # fmt: skip
    several[0].legend(handles=handles, loc="lower center", ncols=5, bbox_to_anchor=(0.5, 1.0), handletextpad=0.1)
    depths = sorted({row.depth for row in rows})
    step = max(1, len(depths) // 16)
    ticks = [depth for depth in depths if depth % step == 0 or depth in (depths[0], depths[-1])]
    several[-1].set_xticks(ticks, ["in" if depth < 0 else str(depth) for depth in ticks])
    several[-1].set_xlabel("layer")
    most = max(rows, key=lambda row: abs(row.change or 0.0))
    return f"{len(rows)} modules; the weights changed most in {most.name}, {percent(most.change)}."


def _growth_ticks(axes: Axes, reach: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    steps = [0.01, 0.1, 0.2, 0.5, 0.8, 0.9, 1, 1.1, 1.25, 2, 5, 10, 100]
    ticks = [step for step in steps if abs(math.log(step)) <= reach]
    if reach > math.log(2):  # keep those apart that would touch
        ticks = [step for step in ticks if step not in (0.9, 1.1) and (reach < 1.5 or step not in (0.8, 1.25))]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _ascii(text: str, width: int) -> str:
    """Return a label that every font can draw."""
    shown = text.encode("ascii", "backslashreplace").decode("ascii")
    return middle_cut(shown, width).replace("…", "...")


class _Plot(NamedTuple):
    """`draw` fills a figure and describes it in words; None where nothing was measured. The height is in pixels."""

    height: int
    title: str
    draw: Callable[[Certificate, Figure], str | None]


_PLOTS = {
    "interval": _Plot(128, "Primary metric with its interval against the limit", _interval),
    "windows": _Plot(270, "Change of log-loss in every window", _windows),
    "divergence": _Plot(230, "How far the next-token distributions moved", _kl),
    "layers": _Plot(340, "What changed, layer by layer", _layers),
    "growth": _Plot(250, "Growth of the largest singular value by weight matrix", _growth),
}
