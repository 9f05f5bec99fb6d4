"""Create tables and a plot from the results of `run.py`.

    python benchmarks/report.py --plot docs/benchmarks.svg > docs/benchmarks.md

prints the documentation page: `page.md` with the measured values in place of its placeholders.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from _cases import CURVES, ROWS, Row
from frameworks import FRAMEWORKS, HAND_WRITTEN, OURS

FOLDER = Path(__file__).parent
COMPARED = ("A", "A-off", "B", "C", "D", "E-import", "E-start", "G", "H", "M-peak", "S-all", "S-calls")
"""The rows shown in the table with the other frameworks."""
PLOTTED = ("A", "A-off", "B", "D")


class Spread(NamedTuple):
    """The median, minimum and maximum over the rounds."""

    median: float
    lowest: float
    highest: float


def spread(values: Iterable[float]) -> Spread:
    values = list(values)
    return Spread(statistics.median(values), min(values), max(values))


def spreads(results: dict[str, Any]) -> dict[tuple[str, str], Spread]:
    """Return the spread over the rounds, by row and framework.

    Peak memory is the difference from the median peak of the hand-written loop.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for figure in results["figures"]:
        if figure["at"] is None:
            values.setdefault((figure["row"], figure["framework"]), []).append(figure["value"])
    by_row = {place: spread(found) for place, found in values.items()}
    baseline = by_row.get(("M-peak", HAND_WRITTEN))
    for (row, framework), found in list(by_row.items()):
        if row == "M-peak":
            if baseline is None or framework == HAND_WRITTEN:
                del by_row[row, framework]
            else:
                by_row[row, framework] = Spread(*(value - baseline.median for value in found))
    return by_row


# --- tables --------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    parts = [about(results), budgets(results), comparison(results), curves(results), failures(results)]
    return "\n\n".join(part for part in parts if part) + "\n"


def about(results: dict[str, Any]) -> str:
    num_rounds = results["num_rounds"]
    rounds = f"{num_rounds} round{'s' if num_rounds > 1 else ''}"
    if (num_peer_rounds := results["num_peer_rounds"]) != num_rounds:
        rounds += f" ({num_peer_rounds} for the other frameworks)"
    return f"`{results['command']}`, {results['date']}, {rounds}, one thread.\n{results['machine']}."


def budgets(results: dict[str, Any]) -> str:
    """Return the table of this library's rows, with their budgets and whether they are met."""
    found = spreads(results)
    lines = []
    for name, row in ROWS.items():
        if (name, OURS) in found:
            ours = found[name, OURS]
            budget = "" if row.budget is None else f"{row.budget:g}"
            lines.append([name, row.title, shown(row, ours), budget, verdict(row, ours)])
    return table(["case", "description", "measured", "budget", "met"], lines)


def verdict(row: Row, ours: Spread) -> str:
    if row.budget is None:
        return ""
    return "yes" if ours.median <= row.budget else "**no**"


def comparison(results: dict[str, Any]) -> str:
    """Return the table that compares all frameworks."""
    found = spreads(results)
    rows = [name for name in COMPARED if any(row == name and peer != OURS for row, peer in found)]
    if not rows:
        return ""
    lines = []
    for framework, version in results["versions"].items():
        title = FRAMEWORKS[framework].title
        if version is None:
            lines.append([title, "not installed", *[""] * len(rows)])
            continue
        values = [brief(ROWS[row], found.get((row, framework))) for row in rows]
        lines.append([title, version, *values])
    return table(["framework", "version", *rows], lines)


def curves(results: dict[str, Any]) -> str:
    parts = []
    for name, title in CURVES.items():
        points: dict[int, list[float]] = {}
        for figure in results["figures"]:
            if figure["row"] == name:
                points.setdefault(figure["at"], []).append(figure["value"])
        if points:
            heads = [f"{at:,}" for at in points]
            values = [number(statistics.median(found)) for found in points.values()]
            parts.append(f"{title[0].upper()}{title[1:]}:\n\n{table(heads, [values])}")
    return "\n\n".join(parts)


def failures(results: dict[str, Any]) -> str:
    return "\n".join(f"- {place} failed: {message}" for place, message in results["errors"].items())


def table(heads: list[str], lines: list[list[str]]) -> str:
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *lines])


def shown(row: Row, values: Spread) -> str:
    """Format a median, with the minimum and maximum if they differ."""
    median, lowest, highest = (number(value) for value in values)
    extremes = "" if lowest == highest else f" ({lowest} to {highest})"
    return f"{median}{extremes}{' ' if row.unit else ''}{row.unit}"


def brief(row: Row, values: Spread | None) -> str:
    return "" if values is None else f"{number(values.median)}{' ' if row.unit else ''}{row.unit}"


def number(value: float) -> str:
    """Format a number with three decimals if it is small, and with fewer if it is large.

    Example:
        >>> number(1.0421), number(12.34), number(621.0), number(0.0)
        ('1.042', '12.3', '621', '0')
    """
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


# --- plot ----------------------------------------------------------------------------------------------------------


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the ratios of the frameworks with their spread. If there are none, draw nothing."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"  # the same results give the same file
    from matplotlib import pyplot as plt

    found = spreads(results)
    rows = [row for row in PLOTTED if any(name == row for name, _ in found)]
    if not rows:
        return
    figure, all_axes = plt.subplots(1, len(rows), figsize=(3.4 * len(rows), 4.2), layout="constrained", squeeze=False)
    for axes, row in zip(all_axes[0], rows, strict=True):
        measured = {name: values for (place, name), values in found.items() if place == row}
        names = sorted(measured, key=lambda name: measured[name].median, reverse=True)
        medians = [measured[name].median for name in names]
        errors = [
            [measured[name].median - measured[name].lowest for name in names],
            [measured[name].highest - measured[name].median for name in names],
        ]
        colors = ["tab:blue" if name == OURS else "tab:gray" for name in names]
        bars = axes.barh([FRAMEWORKS[name].title for name in names], medians, xerr=errors, color=colors, ecolor="black")
        axes.bar_label(bars, fmt=" %.2f", padding=2, fontsize=8)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.margins(x=0.2)
        axes.set_title(f"{row}: {ROWS[row].title.partition(',')[0]}", fontsize=9)
        axes.set_xlabel("ratio to the hand-written loop", fontsize=8)
        axes.tick_params(labelsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


# --- page ----------------------------------------------------------------------------------------------------------


def page(results: dict[str, Any]) -> str:
    """Return the documentation page."""
    template = Template((FOLDER / "page.md").read_text())
    return template.substitute(
        about=about(results),
        budgets=budgets(results),
        comparison=comparison(results),
        curves=curves(results),
        failures=failures(results) or "All requested measurements succeeded.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER / "results" / "results.json", help="results of run.py")
    parser.add_argument("--plot", type=Path, help="file to write the plot to")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    if arguments.plot is not None:
        plot(results, arguments.plot)
    print(page(results), end="")


if __name__ == "__main__":
    main()
