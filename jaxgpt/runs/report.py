"""Pictures drawn from the metrics of run directories."""

import json
import pathlib
import warnings


def read_metrics(run_dir: str | pathlib.Path) -> list[dict]:
    """Read the records of metrics.jsonl; a line that was cut off by a kill is skipped."""
    records = []
    content = (pathlib.Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    for line in content.split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "kind" in record]


def that_count(records: list[dict]) -> list[dict]:
    """Leave out the records of steps that a continued run has repeated, and let `elapsed_s` count on.

    Args:
        records: from `read_metrics`. Where a run continues, they go back to its last checkpoint, and the time to 0.

    Returns:
        The records that led to the last weights; `elapsed_s` is the time that these steps took.
    """
    kept, before = [], 0.0
    for record in records:
        if record["kind"] == "start":
            first = record.get("step") or 0
            kept = [each for each in kept if first and each.get("step", 0) <= first]
            before = max((each.get("elapsed_s") or 0.0 for each in kept), default=0.0)
        if record.get("elapsed_s") is not None:
            record = {**record, "elapsed_s": record["elapsed_s"] + before}
        kept.append(record)
    return kept


def draw_loss(run_dir: str | pathlib.Path, title: str | None = None) -> pathlib.Path:
    """Draw the training and validation loss over the steps, with the learning rate and the gradient norm below.

    Args:
        run_dir: local run directory, which gets the picture.
        title: of the picture; by default the name of the directory.

    Returns:
        The path of loss.png.
    """
    records = read_metrics(run_dir)
    # a resumed run repeats the steps after its last checkpoint, so the last record of a step counts
    train = {r["step"]: r for r in records if r["kind"] == "train"}
    evals = {r["step"]: r for r in records if r["kind"] == "eval"}
    small = {"learning rate": "learning_rate", "gradient norm": "grad_norm"}
    small = {label: curve for label, name in small.items() if (curve := _sorted(train, name))[0]}
    figure = _figure(7, 4.2 + 0.9 * len(small))
    axes, *below = figure.subplots(
        1 + len(small), sharex=True, squeeze=False, height_ratios=[4.2] + [0.9] * len(small)
    )[:, 0]
    axes.plot(*_sorted(train, "loss"), color="tab:blue", alpha=0.3, linewidth=1, label="batch")
    for name, color, label in (("train", "tab:blue", "train"), ("val", "tab:orange", "validation")):
        axes.plot(*_sorted(evals, f"{name}_loss"), color=color, marker="o", markersize=3, label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title or pathlib.Path(run_dir).resolve().name, parse_math=False)  # a name may hold $ signs
    axes.legend()
    for each, (label, curve) in zip(below, small.items()):
        each.plot(*curve, color="tab:gray", linewidth=1, label=label)
        each.set_ylabel(label.replace(" ", "\n"))
        if max(curve[1]) > 20 * min(curve[1]) > 0 and label == "gradient norm":
            each.set_yscale("log")  # some steps have a norm far above that of the others
            each.yaxis.set_major_formatter("{x:g}")
    for each in (axes, *below):
        each.grid(alpha=0.3)
    (axes, *below)[-1].set_xlabel("step")
    figure.align_ylabels()
    return _save(figure, pathlib.Path(run_dir) / "loss.png")


def draw_runs(path: str | pathlib.Path, runs: list[tuple[str, list[dict]]]) -> pathlib.Path:
    """Draw the loss estimates of several runs, over their steps and over the time that these took.

    Args:
        path: of the picture, a PNG file.
        runs: the name of each run, which the legend shows with its last estimate, and its records from `that_count`.

    Returns:
        The path.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    colors = colormaps["tab10"].colors if len(runs) <= 10 else colormaps["turbo"].resampled(len(runs)).colors
    columns = 1 if len(runs) == 1 or max(len(name) for name, _ in runs) > 60 else 2
    figure = _figure(11, 4.4 + 0.25 * -(-len(runs) // columns))
    over_steps, over_time = figure.subplots(1, 2, sharey=True)
    evals = [{r["step"]: r for r in records if r["kind"] == "eval"} for _, records in runs]
    unit, seconds = _unit(max(r.get("elapsed_s") or 0.0 for each in evals for r in each.values()))
    for each, color in zip(evals, colors):
        times = {step: r["elapsed_s"] / seconds for step, r in each.items() if r.get("elapsed_s") is not None}
        known = len(set(times.values())) == len(each)  # a sweep has one time for all estimates of a run
        for name, style in (("train_loss", {"alpha": 0.4, "linestyle": "--"}), ("val_loss", {"marker": "o"})):
            steps, losses = _sorted(each, name)
            over_steps.plot(steps, losses, color=color, markersize=3, **style)
            if known:
                over_time.plot([times[step] for step in steps], losses, color=color, markersize=3, **style)
    _show_what_was_learned(over_steps, evals)
    over_steps.set(xlabel="step", ylabel="loss (nats per token)")
    over_time.set(xlabel=unit, xlim=(0, None))
    for axes in (over_steps, over_time):
        axes.grid(alpha=0.3)
    kinds = {"validation": {"marker": "o", "markersize": 3}, "train": {"alpha": 0.4, "linestyle": "--"}}
    over_time.legend(handles=[Line2D([], [], color="black", label=label, **style) for label, style in kinds.items()])
    handles = [Line2D([], [], color=color, linewidth=3) for _, color in zip(runs, colors)]
    legend = figure.legend(handles, [" "] * len(runs), loc="outside lower center", ncols=columns, frameon=False)
    for text, (name, _), each in zip(legend.get_texts(), runs, evals):
        _, losses = _sorted(each, "val_loss")
        text.set_parse_math(False)  # set afterwards: before matplotlib 3.10, a legend leaves out what begins with _
        text.set_text(f"{name}   {losses[-1]:.3f}" if losses else name)
    return _save(figure, pathlib.Path(path))


def _show_what_was_learned(axes, evals: list[dict[int, dict]]) -> None:
    """Cut the axis off above the first estimate after step 0, of untrained weights, which would squeeze the others."""
    losses = [r.get(name) for each in evals for step, r in each.items() if step for name in ("train_loss", "val_loss")]
    losses = [loss for loss in losses if loss is not None]
    if losses and max(losses) > min(losses):
        margin = 0.05 * (max(losses) - min(losses))
        axes.set_ylim(min(losses) - margin, max(losses) + margin)


def _unit(seconds: float) -> tuple[str, float]:
    """The unit for times up to this one, and its seconds."""
    return next((each for each in (("hours", 3600.0), ("minutes", 60.0)) if seconds > 2 * each[1]), ("seconds", 1.0))


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
        steps, losses = _sorted({r["step"]: r for r in records if r["kind"] == "eval" and r["step"]}, "val_loss")
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


def _sorted(by_step: dict[int, dict], name: str) -> tuple[list, list]:
    """The steps whose record has this field, and its values."""
    known = sorted((step, r[name]) for step, r in by_step.items() if r.get(name) is not None)
    return [step for step, _ in known], [value for _, value in known]
