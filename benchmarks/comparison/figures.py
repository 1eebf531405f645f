"""Figures of the comparison, drawn from the numbers of `estimates.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from .estimates import (
    by_parameters,
    gates_by_language,
    gates_by_size,
    rates_by_cell,
    setting_order,
    sweep,
    swept_settings,
    untouched,
)
from .methods import SPLITS
from .selection import main_grid
from .store import Result

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.markersize": 5,
    "lines.linewidth": 1.4,
}
WIDTH, DPI = 8, 200  # inches; at 800 pixels of width, 9 points are 12 pixels
# Okabe and Ito's colours for the colour-blind (one is paler), darker with a teacher. Markers differ, too.
LOOKS = {
    "zero-shot": ("#BBBBBB", "x"),
    "full fine-tuning": ("#666666", "v"),
    "full fine-tuning of all languages together": ("#666666", "P"),
    "LoRA": ("#E69F00", "^"),
    "CLSR": ("#56B4E9", "o"),
    "CLSR + KD": ("#0072B2", "s"),
    "low-rank CLSR": ("#CC79A7", "D"),
    "low-rank CLSR + KD": ("#D55E00", "X"),
    "CLSR, straight-through": ("#85CFB7", "<"),
    "CLSR, straight-through + KD": ("#009E73", ">"),
}
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00")
TITLES = {
    "train_size": "utterances trained on",
    "gate_budget": "budget: share of tokens that training aims at",
    "budget_weight": "weight of the budget loss",
    "skip_gate_prob": "probability of skipping a gate",
    "gate_noise": "noise on gate logits, standard deviation",
    "expert_dropout": "dropout in the expert",
    "kd_loss": "distillation loss",
    "kd_weight": "weight of distillation",
    "teacher": "teacher",
}
PLAIN_NAMES = {
    "whisper-base, zero-shot (30 s)": "Whisper, unchanged",
    "CLSR, straight-through": "language expert",
    "CLSR, straight-through + KD": "language expert, taught",
}
INK = "#7A7A7A"  # read on white and on black
WER = "WER, % of words"
SHARE = "tokens sent to\nthe expert, %"


def draw_all(results: Sequence[Result], output_dir: Path, others: dict[str, Sequence[Result]]) -> dict[str, Any]:
    """
    Draw all figures as PNG. A figure without runs is left out, and a line is printed for it.

    Args:
        results (`Sequence[dict]`): Runs of one student.
        output_dir (`Path`): Where the PNG files go.
        others (`dict`): Runs of further students, by the student's name; only their error rates are drawn.

    Returns:
        `dict[str, Any]`: The numbers drawn, by file name.
    """
    sweeps = {name: sweep(results, name) for name in dict.fromkeys([*TITLES, *swept_settings(results)])}
    ablations = {name: numbers for name, numbers in sweeps.items() if name not in ("train_size", "gate_budget")}
    figures: dict[str, tuple[Callable, Any]] = {
        "overview.png": (overview, overview_of(results)),
        "wer.png": (error_rates, rates_of(results)),
        "size.png": (sweep_panels, {"train_size": sweeps["train_size"]}),
        "parameters.png": (parameters, by_parameters(results)),
        "budget.png": (sweep_panels, {"gate_budget": sweeps["gate_budget"]}),
        "ablations.png": (sweep_panels, ablations),
    }
    for kind, numbers in (("gates", gates_by_language(results)), ("gates-by-size", gates_by_size(results))):
        drawn = {row: splits for row, splits in numbers.items() if max(map(len, splits.values())) > 1}
        for row, splits in (drawn or {"": {}}).items():
            figures[f"{kind}{slug(row)}.png"] = (gate_panels, splits)
    for student, runs in others.items():
        figures[f"wer{slug(student)}.png"] = (error_rates, rates_of(runs))

    drawn = {}
    for name, (draw, numbers) in figures.items():
        numbers = without_empty(numbers)
        path = output_dir / name
        if not numbers:
            print(f"not drawn: {name}, its runs are missing")
            continue
        with matplotlib.rc_context(STYLE):
            figure = draw(numbers)
            FigureCanvasAgg(figure)
            # The same bytes on every run. Pages may be dark.
            figure.savefig(path, dpi=DPI, metadata={"Software": None}, transparent=name == "overview.png")
        drawn[name] = numbers
    return drawn


def rates_of(results: Sequence[Result]) -> dict[str, Any]:
    """WER by split, label and language. If there are several languages, labels with a single one are left out."""
    rates = {split: rates_by_cell(main_grid(results), split) for split in SPLITS}
    return {
        split: {row: cells for row, cells in rows.items() if len(cells) > 1 or max(map(len, rows.values())) == 1}
        for split, rows in rates.items()
    }


def overview_of(results: Sequence[Result]) -> dict[str, Any]:
    """WER of the trained language, mean over languages, and of Spanish after a training in another, by label."""
    means = {row: cells["mean"] for row, cells in rates_of(results)["test"].items() if "mean" in cells}
    rates = {entry["method"]: entry["rates"] for entry in untouched(results)}
    spanish = {row: rates[row]["es WER"] for row in means if "es WER" in rates.get(row, {})}
    return {"trained": {row: means[row] for row in spanish}, "Spanish": spanish}


def without_empty(numbers: Any) -> Any:
    """Removes empty parts at any depth."""
    if not isinstance(numbers, dict):
        return numbers
    kept = {key: without_empty(value) for key, value in numbers.items()}
    return {key: value for key, value in kept.items() if value != {} and value != []}


def slug(name: str) -> str:
    words = "".join(character if character.isalnum() else " " for character in name.lower()).split()
    return "".join(f"-{word}" for word in words)


def look(label: str) -> dict[str, Any]:
    """Colour and marker of a method. The part in parentheses, such as another teacher, does not change them."""
    name = "zero-shot" if "zero-shot" in label else label.split(" (")[0]
    color, marker = LOOKS.get(name, ("#000000", "*"))
    return {"color": color, "marker": marker}


def is_second(label: str) -> bool:
    """True for variants (other data, teacher or context), which have hatching or dashes in their method's look."""
    return label.endswith((" teacher)", " together", "(30 s)"))


def percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def title_of(split: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    """The split, and the languages of its points in parentheses."""
    languages = {language for points in rows.values() for entry in points for language in entry["languages"]}
    return f"{SPLITS[split]} ({', '.join(sorted(languages))})"


def grid_of(figure: Figure, rows: int, columns: int, **kwargs: Any) -> list[list[Axes]]:
    return figure.subplots(rows, columns, squeeze=False, **kwargs).tolist()


def legend_below(figure: Figure, panels: Sequence[Axes], columns: int = 3) -> None:
    handles = {}
    for panel in panels:
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def with_errors(panel: Axes, x: Sequence[float], intervals: Sequence[dict[str, float]], **kwargs: Any) -> None:
    values = [percent(entry["value"]) for entry in intervals]
    # The percentile interval of very few utterances need not hold the data's own value.
    below = [max(0.0, value - percent(entry["low"])) for value, entry in zip(values, intervals, strict=True)]
    above = [max(0.0, percent(entry["high"]) - value) for value, entry in zip(values, intervals, strict=True)]
    panel.errorbar(x, values, yerr=[below, above], elinewidth=0.8, capsize=2, **kwargs)


# ---------------------------------------------------------------------------------------------------------- the kinds


def overview(numbers: dict[str, Any]) -> Figure:
    """Bars of WER by method for a page of any background: in the trained language, and in another one."""
    titles = {"trained": "Trained language: errors in 100 words", "Spanish": "Spanish, after training Romanian"}
    figure = Figure(figsize=(WIDTH, 2.2), layout="constrained")
    (panels,) = grid_of(figure, 1, len(numbers), sharey=True)
    for panel, (group, rows) in zip(panels, numbers.items(), strict=True):
        values = [percent(cell["value"]) for cell in rows.values()]
        positions = range(len(rows), 0, -1)
        bars = panel.barh(positions, values, 0.62, color=[look(row)["color"] for row in rows])
        panel.bar_label(bars, [f"{value:.0f}" for value in values], padding=4, color=INK, fontweight="bold")
        panel.set_title(titles[group], loc="left", color=INK, fontweight="bold")
        panel.set_yticks(positions, [PLAIN_NAMES.get(row, row) for row in rows])
        panel.set(xticks=[], xlim=(0, 1.12 * max(values)))
        panel.tick_params(axis="y", length=0, labelcolor=INK)
        panel.spines[:].set_visible(False)
    return figure


def error_rates(numbers: dict[str, Any]) -> Figure:
    """Bars of WER by language and method, a panel for each split."""
    figure = Figure(figsize=(WIDTH, 0.9 + 2.7 * len(numbers)), layout="constrained")
    panels = [row[0] for row in grid_of(figure, len(numbers), 1)]
    for panel, (split, rows) in zip(panels, numbers.items(), strict=True):
        languages = sorted({language for cells in rows.values() for language in cells} - {"mean"})
        groups = [*languages, *(["mean"] if any("mean" in cells for cells in rows.values()) else [])]
        # An untrained model on a short context can have a WER far above 100 %: cut its bar, and write the value.
        top = 115 * max(
            (cell["high"] for row, cells in rows.items() if "zero-shot" not in row for cell in cells.values()),
            default=max(cell["high"] for cells in rows.values() for cell in cells.values()),
        )
        width = min(0.84 / len(rows), 0.12)
        for index, (row, cells) in enumerate(rows.items()):
            here = [group for group in groups if group in cells]
            x = [groups.index(group) + (index - (len(rows) - 1) / 2) * width for group in here]
            color = look(row)["color"]
            heights = [percent(cells[group]["value"]) for group in here]
            panel.bar(
                x,
                [min(height, top) for height in heights],
                width,
                label=row,
                color=color,
                hatch="////" if is_second(row) else None,
                edgecolor="white",
                linewidth=0.5,
            )
            shown = [(position, cells[group]) for position, group in zip(x, here, strict=True)]
            shown = [(position, cell) for position, cell in shown if percent(cell["value"]) < top]
            if shown:
                positions, intervals = zip(*shown, strict=True)
                with_errors(panel, positions, intervals, fmt="none", ecolor="#000000")
            for position, height in zip(x, heights, strict=True):
                if height >= top:
                    panel.text(
                        position, 1.02 * top, f"{height:.0f}", fontsize=7, rotation=90, ha="center", va="bottom"
                    )
        panel.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, top), ylabel=WER)
        panel.set_title(SPLITS[split], loc="left", pad=22)
        panel.set_xticks(range(len(groups)), groups)
        panel.tick_params(axis="x", length=0)
        panel.grid(axis="y", alpha=0.3)
    legend_below(figure, panels)
    return figure


def sweep_panels(numbers: dict[str, Any]) -> Figure:
    """WER by value of a setting: a row for each setting, a column for each split. A budget has a row of shares."""
    rows = [(setting, "wer") for setting in numbers] + [("gate_budget", "share")] * ("gate_budget" in numbers)
    figure = Figure(figsize=(WIDTH, 0.7 + 2.1 * len(rows)), layout="constrained")
    panels = grid_of(figure, len(rows), len(SPLITS))
    for line, (setting, quantity) in zip(panels, rows, strict=True):
        for panel, split in zip(line, SPLITS, strict=True):
            methods = numbers[setting].get(split)
            if methods is None:
                panel.set_axis_off()
                continue
            draw_sweep(panel, methods, setting, quantity)
            panel.set(title=title_of(split, methods), xlabel=TITLES.get(setting, setting))
    legend_below(figure, [panel for line in panels for panel in line])
    return figure


def draw_sweep(panel: Axes, methods: dict[str, list[dict[str, Any]]], setting: str, quantity: str) -> None:
    """A line for each method."""
    entries = [entry for points in methods.values() for entry in points]
    for index, (row, points) in enumerate(methods.items()):
        beside = index - (len(methods) - 1) / 2  # side by side, so that no interval hides another
        if setting == "train_size":
            x = [entry["train_utterances"] * 1.02**beside for entry in points]
        else:
            x = [values_of(entries).index(entry["setting"]) + 0.06 * beside for entry in points]
        line = "--" if is_second(row) else "-"
        style = look(row) | {"label": row, "linestyle": "none" if isinstance(points[0]["setting"], str) else line}
        if quantity == "wer":
            with_errors(panel, x, [entry["wer"] for entry in points], **style)
        else:
            panel.plot(x, [percent(entry["share"]) for entry in points], **style)
    if setting == "train_size":
        ticks = sorted({entry["train_utterances"] for entry in entries})
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        panel.minorticks_off()
    else:
        values = values_of(entries)
        panel.set_xticks(range(len(values)), [f"{value}" for value in values])
        panel.set_xlim(-0.4, len(values) - 0.6)
    panel.set_ylabel(WER if quantity == "wer" else SHARE)
    if quantity == "share":
        panel.set_ylim(-3, 103)
    panel.grid(axis="y", alpha=0.3)


def values_of(entries: Sequence[dict[str, Any]]) -> list[Any]:
    return sorted({entry["setting"] for entry in entries}, key=setting_order)


def parameters(numbers: dict[str, Any]) -> Figure:
    """WER by trained parameters, a panel for each split; points of low-rank methods show their rank."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    (panels,) = grid_of(figure, 1, len(numbers))
    for panel, (split, rows) in zip(panels, numbers.items(), strict=True):
        for row, points in rows.items():
            x = [entry["trained_parameters"] for entry in points]
            style = "--" if is_second(row) else "-"
            with_errors(panel, x, [entry["wer"] for entry in points], label=row, linestyle=style, **look(row))
            for entry in points:
                if entry["rank"] is not None:
                    position = entry["trained_parameters"], percent(entry["wer"]["value"])
                    panel.annotate(f"{entry['rank']}", position, (4, 3), textcoords="offset points", fontsize=7)
        panel.set_xscale("log")
        panel.set(xlabel="trained parameters (numbers: rank)", ylabel=WER)
        panel.set_title(title_of(split, rows))
        panel.grid(alpha=0.3)
    legend_below(figure, panels)
    return figure


def gate_panels(numbers: dict[str, Any]) -> Figure:
    """Share of tokens sent to the expert by layer: a row for each split, a column for each side, a line a language."""
    figure = Figure(figsize=(WIDTH, 0.5 + 2.4 * len(numbers)), layout="constrained")
    panels = grid_of(figure, len(numbers), 2, sharex="col", sharey=True)
    names = list(dict.fromkeys(name for lines in numbers.values() for name in lines))
    for line, (split, lines) in zip(panels, numbers.items(), strict=True):
        for panel, side in zip(line, ("encoder", "decoder"), strict=True):
            for index, name in enumerate(names):
                shares = lines.get(name, {}).get(side, {})
                panel.plot(
                    list(shares),
                    [percent(share) for share in shares.values()],
                    color=LINES[index % len(LINES)],
                    marker="os^DvX"[index % 6],
                    label=name,
                )
            panel.set(title=f"{side}, {SPLITS[split]}", ylim=(-3, 103))
            panel.yaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=""))
            panel.set_xticks(sorted({layer for sides in lines.values() for layer in sides.get(side, {})}))
            panel.grid(axis="y", alpha=0.3)
        line[0].set_ylabel(SHARE)
    for panel in panels[-1]:
        panel.set_xlabel("layer")
    legend_below(figure, panels[0], columns=6)
    return figure
