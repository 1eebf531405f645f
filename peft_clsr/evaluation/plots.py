"""Plots of gate means."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping

from ..extras import require
from ..whisper import module_side

logger = logging.getLogger(__name__)


def try_plot_gate_means(gate_means: Mapping[str, float], path: str | os.PathLike, title: str | None = None) -> bool:
    """Plot as [`plot_gate_means`] does. A failure is a warning, as results are worth more than their plot."""
    try:
        plot_gate_means(gate_means, path, title)
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
    # The object interface needs no display and shares no state with the caller's pyplot.
    figure = require("matplotlib.figure").Figure(figsize=(9, 3.5), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
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
            panel.plot(layers, means, marker="o", label=module)
        if len(lines) > 1:
            panel.legend(fontsize="small")
        panel.set_xticks(sorted({layer for points in lines.values() for layer, _ in points}))
        panel.set(title=side, xlabel="layer", ylim=(-0.03, 1.03))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of tokens sent to the expert")
    if title:
        figure.suptitle(title)
    figure.savefig(path, format="png", dpi=150)
