"""Pictures drawn from the metrics of run directories."""

import json
import pathlib
import warnings


def read_metrics(run_dir: str | pathlib.Path) -> list[dict]:
    """Read the records of metrics.jsonl; a line that was cut off by a kill is skipped."""
    records = []
    for line in (pathlib.Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw_loss(run_dir: str | pathlib.Path, title: str | None = None) -> pathlib.Path:
    """Draw the training and validation loss over the steps.

    Args:
        run_dir: local run directory, which gets the picture.
        title: of the picture; by default the name of the directory.

    Returns:
        The path of loss.png.
    """
    records = read_metrics(run_dir)
    # a resumed run repeats the steps after its last checkpoint, so the last record of a step counts
    train = {r["step"]: r["loss"] for r in records if r["kind"] == "train"}
    evals = {r["step"]: r for r in records if r["kind"] == "eval"}
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    axes.plot(*_sorted(train), color="tab:blue", alpha=0.3, linewidth=1, label="batch")
    for name, color in (("train", "tab:blue"), ("val", "tab:orange")):
        losses = {step: r[f"{name}_loss"] for step, r in evals.items()}
        axes.plot(*_sorted(losses), color=color, marker="o", markersize=3, label={"val": "validation"}.get(name, name))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.set_title(title or pathlib.Path(run_dir).resolve().name, parse_math=False)  # a name may hold $ signs
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, pathlib.Path(run_dir) / "loss.png")


def draw_ladder(
    folder: str | pathlib.Path, runs: list[str], lines: dict[str, float], title: str = "The lecture, rung by rung"
) -> pathlib.Path:
    """Draw the validation loss of several runs over their steps.

    Args:
        folder: holds the run directories, and gets the picture.
        runs: names of the run directories, from the highest loss to the lowest.
        lines: name -> loss to compare with, drawn as horizontal lines.
        title: of the picture.

    Returns:
        The path of ladder.png.
    """
    figure = _figure(8, 5)
    axes = figure.subplots()
    from matplotlib import colormaps

    colors = colormaps["viridis_r"]
    for i, run in enumerate(runs):
        records = read_metrics(pathlib.Path(folder) / run)
        steps, losses = _sorted({r["step"]: r["val_loss"] for r in records if r["kind"] == "eval" and r["step"]})
        label = f"{run.rpartition('-')[0].replace('_', ' ')}  {losses[-1]:.2f}"
        axes.plot(steps, losses, color=colors(0.1 + 0.9 * i / len(runs)), marker="o", markersize=3, label=label)
    for name, loss in lines.items():
        axes.axhline(loss, color="gray", linestyle=":", linewidth=1)
        axes.annotate(f"{name} {loss:.2f}", (0.01, loss), xycoords=("axes fraction", "data"), va="top", color="gray")
    axes.set(xlabel="step", ylabel="validation loss (nats per character)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", ncols=2)
    return _save(figure, pathlib.Path(folder) / "ladder.png")


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # imported late, so that the first step does not wait 0.3 s for it

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure, path: pathlib.Path) -> pathlib.Path:
    with warnings.catch_warnings(action="ignore"):  # the font has no sign for some characters of a name
        figure.savefig(path, dpi=120)
    return path


def _sorted(values: dict) -> tuple[list, list]:
    known = sorted((step, value) for step, value in values.items() if value is not None)
    return [step for step, _ in known], [value for _, value in known]
