"""The table, the intervals and the picture of a sweep, from its records."""

import json
import math
import pathlib
import shlex
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

from jaxgpt.errors import CheckpointError

FACTS, RECORDS, PICTURE = "sweep.json", "sweep.jsonl", "sweep.png"
SEED = "seed"
Record = dict[str, Any]


def read(folder: pathlib.Path) -> tuple[dict[str, Any], list[Record]]:
    """Read a folder: the settings of its sweep, which are empty if there is none, and the records of its finished runs.

    Raises:
        CheckpointError: a file is damaged or cannot be read.
    """
    facts, records = folder / FACTS, folder / RECORDS
    try:
        lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
        return json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}, list(map(json.loads, lines))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the sweep ({folder}, {error}): restore its files, or delete it") from None


def best(records: Sequence[Record]) -> Record | None:
    """Return the record of the lowest validation loss; None if all runs diverged, or there are none."""
    return min((r for r in records if r["val_loss"] is not None), key=lambda r: r["val_loss"], default=None)


def words(settings: dict[str, Any]) -> str:
    """Write settings as one short line."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def by_setting(records: Sequence[Record]) -> list[tuple[dict[str, Any], list[Record]]]:
    """Group the records of the same settings, of all seeds."""
    groups: list[tuple[dict[str, Any], list[Record]]] = []
    for record in records:
        settings = {name: value for name, value in record["settings"].items() if name != SEED}
        found = next((members for known, members in groups if known == settings), None)
        if found is None:
            groups.append((settings, found := []))
        found.append(record)
    return groups


def report(folder: pathlib.Path) -> str:
    """Write what `jaxgpt sweep` prints: the table, the difference of the best two settings, and the best run.

    Raises:
        CheckpointError: there is no sweep, or its files are damaged.
    """
    facts, records = read(folder)
    if not facts:
        raise CheckpointError(f"no sweep ({folder}, no {FACTS}): name a folder that `jaxgpt sweep` made")
    runs = math.prod(len(values) for values in facts["vary"].values())
    lines = [table(records), ""]
    if len(records) < runs:
        lines.append(f"left     {runs - len(records)} of {runs} runs: the same command continues")
    if said := difference(records):
        lines.append(f"compare  {said}")
    found = best(records)
    if found is not None:
        flags = {**facts["command"], **{name: str(value) for name, value in found["settings"].items()}}
        command = shlex.join(
            ["jaxgpt", "train", *(word for pair in flags.items() for word in (f"--{pair[0]}", pair[1]))]
        )
        lines.append(f"best     validation loss {found['val_loss']:.4f}: {command}")
        if found["run_dir"]:
            lines.append(f"more     jaxgpt sample --run {shlex.quote(found['run_dir'])}")
    return "\n".join([*lines, f"files    {folder}: {RECORDS}, {PICTURE}"])


def table(records: Sequence[Record]) -> str:
    """Format the losses of each setting as a Markdown table: mean, standard deviation and range over seeds."""
    groups = by_setting(records)
    names = list(groups[0][0]) if groups else []
    rows = [[*(names or ["setting"]), "mean", "standard deviation", "range", "runs"]]
    for settings, members in groups:
        losses = [r["val_loss"] for r in members if r["val_loss"] is not None]
        spread = ["", "", ""]
        if losses:
            deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
            spread = [f"{statistics.mean(losses):.4f}", deviation, f"{min(losses):.4f} to {max(losses):.4f}"]
        diverged = len(members) - len(losses)
        runs = f"{len(members)}{f', {diverged} diverged' if diverged else ''}"
        rows.append([*(map(str, settings.values()) if names else ["all"]), *spread, runs])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [f"| {' | '.join(f'{cell:{width}}' for cell, width in zip(row, widths))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines)


def difference(records: Sequence[Record]) -> str:
    """Compare the two settings with the lowest mean loss, over the seeds that both have; empty if there is only one.

    The interval is that of a paired t test: seeds are drawn at random, and their differences are about normal.
    """
    losses = []
    for settings, members in by_setting(records):
        by_seed = {r["seed"]: r["val_loss"] for r in members if r["val_loss"] is not None}
        if by_seed:
            losses.append((statistics.mean(by_seed.values()), settings, by_seed))
    if len(losses) < 2:
        return ""
    (_, first, one), (_, second, other) = sorted(losses, key=lambda each: each[0])[:2]
    pairs = [other[seed] - one[seed] for seed in one if seed in other]
    names = f"{words(second)} minus {words(first)}"
    if len(pairs) < 2:
        return f"{names}: no interval, which takes two seeds or more that both have (--vary seed=1,2,3)"
    mean, half = statistics.mean(pairs), interval(pairs)
    said = f"95 % interval {mean - half:+.4f} to {mean + half:+.4f}, {len(pairs)} paired seeds"
    return f"{names}: {mean:+.4f} ({said})"


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a mean."""
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def t_quantile(freedom: int, inside: float = 0.95) -> float:
    """Find the t that Student's distribution exceeds, in absolute value, with probability 1 - inside.

    Args:
        freedom: degrees of freedom, 1 or more.
        inside: probability between -t and t.

    Source: the finite series of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, bisected over atan(t / sqrt n).
    """

    def probability(angle: float) -> float:
        cos, odd = math.cos(angle), freedom % 2
        term = total = (cos if freedom > 1 else 0.0) if odd else 1.0
        for i in range(2 + odd, freedom - 1, 2):
            term *= cos * cos * (i - 1) / i
            total += term
        return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < inside else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def draw(folder: pathlib.Path) -> pathlib.Path:
    """Draw the loss against each setting that varies, and the curve of each run.

    Returns:
        The path of sweep.png.
    """
    from matplotlib.figure import Figure  # imported late: it takes 0.3 s

    facts, records = read(folder)
    names = [name for name in facts["vary"] if name != SEED] or [SEED]
    figure = Figure(figsize=(5 * (len(names) + 1), 4.2), layout="constrained")
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for name, each in zip(names, axes):
        _draw_losses(each, name, facts["vary"][name], records)
    _draw_curves(axes[-1], records)
    axes[0].set_ylabel("validation loss (nats per token)")
    for each in axes:
        each.grid(alpha=0.3)
    with warnings.catch_warnings(action="ignore"):  # the font has no sign for some characters of a name
        figure.savefig(folder / PICTURE, dpi=120)
    return folder / PICTURE


def _draw_losses(axes, name: str, values: list[Any], records: Sequence[Record]) -> None:
    """The loss against one setting: a point per run; the mean and the range over seeds of each choice of the others."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    place = {value: value if numeric else i for i, value in enumerate(values)}
    lines: dict[str, dict[Any, list[float]]] = {}
    for record in records:
        if record["val_loss"] is None:
            continue
        others = {key: value for key, value in record["settings"].items() if key not in (name, SEED)}
        lines.setdefault(words(others), {}).setdefault(record["settings"][name], []).append(record["val_loss"])
    for label, losses in lines.items():
        x = sorted(losses, key=place.get)
        (line,) = axes.plot([place[v] for v in x], [statistics.mean(losses[v]) for v in x], label=label or None)
        for value in x:
            axes.plot([place[value]] * 2, [min(losses[value]), max(losses[value])], color=line.get_color(), alpha=0.5)
            axes.plot([place[value]] * len(losses[value]), losses[value], ".", color=line.get_color())
    if numeric and min(values) > 0 and max(values) >= 8 * min(values):
        axes.set_xscale("log")
        if len(values) <= 8:  # matplotlib's own labels would lie over each other
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
    elif not numeric:
        axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_xlabel(name)
    if 1 < len(lines) <= 8:
        axes.legend(fontsize="small")


def _draw_curves(axes, records: Sequence[Record]) -> None:
    """The estimated validation loss over the steps, one line per run and one color per setting."""
    groups = by_setting(records)
    for i, (settings, members) in enumerate(groups):
        for j, record in enumerate(members):
            points = [(step, val) for step, _, val in record["curve"] if step and val is not None]
            axes.plot(*zip(*points) if points else ([], []), color=f"C{i % 10}", label=None if j else words(settings))
    axes.set_xlabel("step")
    if 1 < len(groups) <= 8:
        axes.legend(fontsize="small")
