"""What comes out of a run: Markdown tables, one JSON file, one plot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cases import Case

OURS = "fastattn"


@dataclass
class Measurement:
    """One candidate on one case: a verdict and, if that is "ok", a figure per round."""

    case: Case
    candidate: str
    status: str = "ok"
    error: float | None = None
    seconds: list[float] = field(default_factory=list)  # median call of each round
    peaks: list[float | None] = field(default_factory=list)  # live peak beside it
    fastest: float = float("inf")  # seconds of the fastest call of all

    @property
    def rate(self) -> float | None:
        """FLOP/s, or bytes/s for decode."""
        return self.case.work / median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Median absolute deviation of the rounds, relative to their median."""
        if not self.seconds:
            return None
        middle = median(self.seconds)
        return median(abs(s - middle) for s in self.seconds) / middle

    @property
    def share(self) -> float | None:
        """Share of the peak measured right after each round."""
        pairs = [(s, p) for s, p in zip(self.seconds, self.peaks, strict=True) if p]
        return median(self.case.work / s / p for s, p in pairs) if pairs else None

    @property
    def peak(self) -> float | None:
        known = [peak for peak in self.peaks if peak]
        return median(known) if known else None

    def faster_than(self, other: Measurement) -> float:
        """How many times faster than `other`: the median over the rounds they shared."""
        return median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        derived = {"unit": self.case.unit, "rate": self.rate, "share": self.share}
        derived |= {"peak": self.peak, "spread": self.spread}
        return {**asdict(self), **derived}


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """An aligned Markdown table; the first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        first, *others = (
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join(
        "-" * (width + 1) + ("-" if index == 0 else ":") for index, width in enumerate(widths)
    )
    return "\n".join([line(header), rule + "|", *map(line, rows)])


def rate_tables(measurements: list[Measurement]) -> str:
    """One table for each shape file, dtype, direction and unit."""
    return "\n\n".join(
        f"### {title}: {unit} (share of the {group[0].case.yardstick})\n\n{_rate_table(group)}"
        for (title, unit), group in grouped(measurements)
    )


def compact_tables(measurements: list[Measurement]) -> str:
    """The same for a narrow page, in thousands of the unit: ours with its share of the peak, the
    others with how many times faster ours is."""
    blocks = []
    for (title, unit), group in grouped(measurements):
        names = list(dict.fromkeys(m.candidate for m in group))
        rows = [["B,H,L,D", "peak", *names]]
        for _, members in by_shape(group):
            cells = {m.candidate: m for m in members}
            peak = next((m.peak for m in members if m.peak), None)
            row = [_short_label(members[0].case), f"{peak / 1e12:.3g}" if peak else ""]
            rows.append(row + [_compact_cell(cells.get(name), cells.get(OURS)) for name in names])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:]))
            for row in rows
        ]
        blocks.append("\n".join([f"{title}: {unit.replace('G', 'T')}", *lines]))
    return "\n\n".join(blocks)


def _short_label(case: Case) -> str:
    heads = f"{case.Hq}" if case.Hq == case.Hkv else f"{case.Hq}/{case.Hkv}"
    length = f"{case.Lk}" if case.Lq == case.Lk else f"{case.Lq}x{case.Lk}"
    kind = f"{case.option} {case.kept:.0%}" if case.option else "causal" if case.causal else "full"
    return f"{case.B},{heads},{length},{case.D} {kind}"


def _compact_cell(m: Measurement | None, ours: Measurement | None) -> str:
    if m is None or not m.seconds:
        return m.status if m else ""
    time = f"{duration(median(m.seconds))} " if m.case.is_decode else ""
    if m.candidate == OURS or not (ours and ours.seconds):
        against = f"{m.share:.0%}" if m.share else ""
    else:
        against = f"{ours.faster_than(m):.2f}x"
    return f"{time}{m.rate / 1e12:.3g} {against}"


def grouped(measurements: list[Measurement]):
    """((title, unit), the measurements that belong in one table), in the order measured."""
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for m in measurements:
        title = f"{m.case.family}, {m.case.direction}, {m.case.dtype}"
        groups.setdefault((title, m.case.unit, m.case.yardstick), []).append(m)
    return [((title, unit), group) for (title, unit, _), group in groups.items()]


def _rate_table(measurements: list[Measurement]) -> str:
    names = list(dict.fromkeys(m.candidate for m in measurements))
    rows = []
    for shape, group in by_shape(measurements):
        cells = {m.candidate: m for m in group}
        peak = next((m.peak for m in group if m.peak), None)
        row = [shape, f"{peak / 1e9:.0f}" if peak else "unknown"]
        row += [_rate_cell(cells[name]) if name in cells else "" for name in names]
        rows.append([*row, *_against_best(cells)])
    times = [f"{OURS} time", f"{OURS} / best other"] if OURS in names else []
    yardstick = "plain" if measurements[0].case.option else "peak"
    return markdown(["B, H, Lq, Lk, D", yardstick, *names, *times], rows)


def by_shape(measurements: Iterable[Measurement]):
    """(shape, its measurements), in the order of the file."""
    shapes: dict[str, list[Measurement]] = {}
    for m in measurements:
        shapes.setdefault(m.case.shape, []).append(m)
    return shapes.items()


def _rate_cell(m: Measurement) -> str:
    if m.status != "ok":
        return m.status
    share = f" ({m.share:.0%})" if m.share else ""
    return f"{m.rate / 1e9:.3g}{share}" if m.rate < 1e12 else f"{m.rate / 1e9:.0f}{share}"


def _against_best(cells: dict[str, Measurement]) -> list[str]:
    ours = cells.get(OURS)
    if ours is None:
        return []
    if not ours.seconds:
        return ["", ""]
    ratios = {n: ours.faster_than(m) for n, m in cells.items() if m.seconds and n != OURS}
    best = min(ratios, key=ratios.get, default=None)
    return [duration(median(ours.seconds)), f"{ratios[best]:.2f} ({best})" if best else ""]


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError


def write_json(path: Path, **content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def plot(path: Path, measurements: list[Measurement], title: str) -> None:
    """A panel per dtype and direction: rate per shape, or against length; the peak on top."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = grouped([m for m in measurements if m.seconds])
    if not panels:
        return
    colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(_names(measurements)))}
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(13, 3.8 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, ((name, unit), group) in zip(axes[:, 0], panels, strict=True):
        draw = _draw_lines if _differ_in_length_only(group) else _draw_bars
        draw(axis, group, colors)
        axis.set_title(name, loc="left")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _names(measurements: Iterable[Measurement]) -> list[str]:
    return [m.candidate for m in measurements]


def _differ_in_length_only(group: list[Measurement]) -> bool:
    kinds = {(m.case.Hq, m.case.Hkv, m.case.D, m.case.Dv, m.case.Lq == 1) for m in group}
    return len(kinds) == 1 and len({m.case.Lk for m in group}) > 3


def _draw_lines(axis, group: list[Measurement], colors: dict[str, str]) -> None:
    for name in dict.fromkeys(_names(group)):
        for causal, style in ((False, "o-"), (True, "s--")):
            line = [m for m in group if m.candidate == name and m.case.causal == causal]
            if line:
                label = f"{name} causal" if causal else name
                points = [(m.case.Lk, m.rate / 1e9) for m in line]
                axis.plot(*zip(*points, strict=True), style, color=colors[name], label=label)
    lengths = sorted({m.case.Lk for m in group})
    peaks = [_peak([m for m in group if m.case.Lk == length]) for length in lengths]
    if all(peaks):
        axis.plot(lengths, peaks, "k:", label="measured peak")
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, map(str, lengths))
    axis.set_xlabel("length of keys")


def _draw_bars(axis, group: list[Measurement], colors: dict[str, str]) -> None:
    names = list(dict.fromkeys(_names(group)))
    shapes = list(by_shape(group))
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        bars = {i: m for i, (_, ms) in enumerate(shapes) for m in ms if m.candidate == name}
        positions = [i - 0.4 + (offset + 0.5) * width for i in bars]
        heights = [m.rate / 1e9 for m in bars.values()]
        axis.bar(positions, heights, width, color=colors[name], label=name)
    for i, (_, ms) in enumerate(shapes):
        if _peak(ms):
            label = ms[0].case.yardstick if i == 0 else None
            axis.plot([i - 0.45, i + 0.45], [_peak(ms)] * 2, "k:", label=label)
    labels = [_label(group[0].case) for _, group in shapes]
    axis.set_xticks(range(len(shapes)), labels, fontsize="x-small")


def _label(case: Case) -> str:
    batch, heads, rows, keys, width = case.shape.split(", ")
    return f"B {batch}, H {heads}\n{rows} x {keys}\nD {width}"


def _peak(measurements: list[Measurement]) -> float | None:
    peaks = [m.peak / 1e9 for m in measurements if m.peak]
    return median(peaks) if peaks else None
