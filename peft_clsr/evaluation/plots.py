"""Plots of gate means, and of error rates beside them."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..extras import require
from ..whisper import module_side

_NAME_LENGTH = 20  # of a test set
_GREEN = "#059669"

logger = logging.getLogger(__name__)


def try_plot_language(
    path: str | os.PathLike,
    title: str,
    rate: Literal["wer", "cer"],
    results: Mapping[str, Mapping[str, Any]],
    gate_means: Mapping[str, float],
) -> bool:
    """
    Plot the error rates of a language, before and after, and its mean gates by layer.

    A failure is a warning, as results are worth more than their plot.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        title (`str`): Title of the figure.
        rate (`str`): The error rate to show.
        results (`Mapping`): Test set to its rates, as in [`push_language`]. Those without the rate are left out.
        gate_means (`Mapping[str, float]`): As in [`plot_gate_means`].

    Returns:
        `bool`: True if there is a plot.
    """
    try:
        rates = {name: row for name, row in results.items() if rate in row}
        figure, panels = _figure(3 if rates else 2, title)
        if rates:
            _draw_rates(panels[0], rate, rates)
        _draw_gates(panels[-2:], gate_means)
        figure.savefig(path, format="png", dpi=150)
    except Exception as error:
        logger.warning(
            f"there is no plot of the gate means at {path}, the rest goes on ({type(error).__name__}: {error}). "
            "To make it later: peft_clsr.plot_gate_means(gate_means, path)"
        )
        return False
    return True


def plot_gate_means(gate_means: Mapping[str, float], path: str | os.PathLike, title: str | None = None) -> None:
    """
    Plot the mean gate by layer, with one panel for the encoder and one for the decoder.

    Args:
        gate_means (`Mapping[str, float]`):
            Module name to mean gate in [0, 1], from [`gate_means`]. The layer is the number after "layers." in the
            name. Several routed modules of a layer become several lines.
        path (`str` or `os.PathLike`): The PNG file to write.
        title (`str`, *optional*): Title of the figure.

    Raises:
        ValueError: `gate_means` is empty.
    """
    if not gate_means:
        raise ValueError("no gate means to plot: record them with an active CLSR adapter first")
    figure, panels = _figure(2, title)
    _draw_gates(panels, gate_means)
    figure.savefig(path, format="png", dpi=150)


def _figure(panels: int, title: str | None) -> tuple[Any, Any]:
    """A figure with panels beside each other."""
    # The object interface needs no display and shares no state with the caller's pyplot.
    figure = require("matplotlib.figure").Figure(figsize=(4.5 * panels, 3.5), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, parse_math=False)
    return figure, figure.subplots(1, panels)


def _draw_rates(panel: Any, rate: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Two bars for each test set: the base model, and with the expert."""
    for offset, key, label, color in (
        (-0.2, f"base_{rate}", "base model", "#9c9c9c"),
        (0.2, rate, "expert", "#059669"),
    ):
        shown = [(index + offset, 100 * row[key]) for index, row in enumerate(results.values()) if key in row]
        if shown:
            places, heights = zip(*shown, strict=True)
            panel.bar_label(panel.bar(places, heights, 0.4, label=label, color=color), fmt="%.1f")
    names = [name.rpartition("/")[2][:_NAME_LENGTH] for name in results]
    panel.set_xticks(range(len(names)), names, parse_math=False, rotation=20 if len(names) > 2 else 0)
    panel.set(title=f"{rate.upper()} %, lower is better", xlim=(-0.8, len(names) - 0.2))
    panel.margins(y=0.25)  # for the legend
    panel.legend(fontsize="small", ncols=2, loc="upper center")


def _draw_gates(panels: Sequence[Any], gate_means: Mapping[str, float]) -> None:
    """The mean gate by layer, in a panel for the encoder and one for the decoder."""
    for panel, side in zip(panels, ("encoder", "decoder"), strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for name, mean in gate_means.items():
            if (module_side(name) or "encoder") != side:
                continue
            match = re.search(r"\blayers?\.(\d+)\.?(.*)", name)
            layer, module = (int(match[1]), match[2]) if match else (0, name)
            lines.setdefault(module, []).append((layer, mean))
        for module, points in sorted(lines.items()):
            layers, means = zip(*sorted(points), strict=True)
            panel.plot(layers, means, marker="o", label=module, color=None if len(lines) > 1 else _GREEN)
        if len(lines) > 1:
            panel.legend(fontsize="small")
        ticks = sorted({layer for points in lines.values() for layer, _ in points})
        panel.set_xticks(ticks[:: 1 + len(ticks) // 12])
        panel.set(title=side, xlabel="layer", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of tokens sent to the expert")
