"""The figure of the second round: one number a method, as plain as it can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

EXPERT, OTHER, INK = "#c2500a", "#5b6470", "#1f2328"


def draw(points: list[dict[str, Any]], unchanged: float | None, title: str, path: Path) -> None:
    """
    Draw a row a method, the lowest on top. The background is white, so that it can be read on a dark page, too.

    Args:
        points (`list[dict]`): "label", "value", "low", "high" (percent) and "has_experts" of each method.
        unchanged (`float`, *optional*): The unchanged model's number, in percent: a line.
        title (`str`): Above the figure.
        path (`Path`): The PNG to write.
    """
    points = sorted(points, key=lambda point: -point["value"])
    figure = Figure(figsize=(9, 1.7 + 0.5 * len(points)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_facecolor("white")
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK)
    axes.set_title("Left is better. Bars: 95 % intervals. Orange: language experts.", fontsize=11, color=INK)
    for place, point in enumerate(points):
        color = EXPERT if point["has_experts"] else OTHER
        axes.plot([point["low"], point["high"]], [place, place], color=color, linewidth=5, alpha=0.4)
        axes.plot(point["value"], place, marker="o", markersize=9, color=color)
        text = f"{point['value']:.1f}"
        axes.annotate(text, (point["value"], place), (0, 8), textcoords="offset points", ha="center", color=color)
    axes.set_yticks(range(len(points)), [point["label"] for point in points], fontsize=11)
    for label, point in zip(axes.get_yticklabels(), points, strict=True):
        label.set_color(EXPERT if point["has_experts"] else INK)
    axes.set_ylim(-0.6, len(points) - 0.2)
    if unchanged is not None:
        axes.axvline(unchanged, color=INK, linestyle="--", linewidth=1.5)
        text = f"Whisper,\nunchanged: {unchanged:.1f}"
        left = unchanged > max(point["high"] for point in points)
        offset, side = ((-6, 0), "right") if left else ((6, 0), "left")
        axes.annotate(text, (unchanged, -0.5), offset, textcoords="offset points", ha=side, va="bottom", color=INK)
    axes.margins(x=0.08)
    axes.tick_params(colors=INK, which="both", axis="x")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=130, metadata={"Software": None})
