import json

import matplotlib.image
import pytest
from matplotlib.axes import Axes

from jaxgpt.runs import report


def write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tra')


@pytest.fixture
def drawn(monkeypatch):
    """The curves of a picture by their labels."""
    curves, plot = {}, Axes.plot

    def remember(axes, x, y, **style):
        if "label" in style:
            curves[style["label"]] = (x, y)
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", remember)
    return curves


def test_the_picture_shows_both_losses_and_the_last_record_of_a_repeated_step(tmp_path, drawn):
    evals = [{"kind": "eval", "step": step, "train_loss": 3.0 - step, "val_loss": 3.5 - step} for step in (0, 1)]
    write(
        tmp_path,
        {"kind": "start"},
        *evals,
        {"kind": "train", "step": 1, "loss": 9.0},
        {"kind": "train", "step": 2, "loss": None},
        {"kind": "train", "step": 1, "loss": 2.0},
    )
    path = report.draw_loss(tmp_path)
    assert drawn == {"batch": ([1], [2.0]), "train": ([0, 1], [3.0, 2.0]), "validation": ([0, 1], [3.5, 2.5])}
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 400 and len(set(map(tuple, pixels.reshape(-1, pixels.shape[-1]).tolist()))) > 50


@pytest.fixture
def figures(monkeypatch):
    """The figures, which are kept and not rendered."""
    kept = []
    monkeypatch.setattr(report, "_save", lambda figure, path: kept.append(figure) or path)
    return kept


@pytest.mark.parametrize(("norms", "scale"), [([2.0, 80.0], "log"), ([0.0, 80.0], "linear")])  # log 0 is not a number
def test_below_it_are_the_learning_rate_and_the_gradient_norm(tmp_path, drawn, figures, norms, scale):
    rows = [
        {"kind": "train", "step": step, "loss": 2.0, "learning_rate": 0.1 * step, "grad_norm": norm}
        for step, norm in enumerate(norms, 1)
    ]
    write(tmp_path, *rows)
    report.draw_loss(tmp_path)
    assert drawn["learning rate"] == ([1, 2], [0.1, 0.2]) and drawn["gradient norm"] == ([1, 2], norms)
    assert [axes.get_yscale() for axes in figures[0].axes] == ["linear", "linear", scale]
    heights = [axes.get_subplotspec().get_position(figures[0]).height for axes in figures[0].axes]
    assert heights[0] > 3 * heights[1] == pytest.approx(3 * heights[2])


def test_a_directory_without_metrics_cannot_be_drawn(tmp_path):
    with pytest.raises(FileNotFoundError):
        report.draw_loss(tmp_path)


def test_lines_that_are_no_records_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'[1]\n7\n{"step": 1}\n\xff\xfe\n{"kind": "final", "x": "\xff\xe2\x80\xa8"}\n'
    )
    assert report.read_metrics(tmp_path) == [{"kind": "final", "x": "\ufffd\u2028"}]


def test_steps_that_a_continued_run_repeats_do_not_count_and_the_time_goes_on():
    def record(kind, step, elapsed):
        return {"kind": kind, "step": step, "elapsed_s": elapsed}

    records = [
        {"kind": "start", "step": 0},
        record("eval", 0, 1.0),
        record("train", 10, 5.0),
        {"kind": "start", "step": 0},  # it was killed before the first checkpoint
        record("eval", 0, 2.0),
        record("train", 10, 6.0),
        record("eval", 20, 12.0),
        record("train", 30, 20.0),
        {"kind": "start", "step": 20},
        record("train", 25, 4.0),
        {"kind": "start", "step": 25},
        record("eval", 40, 7.0),
    ]
    found = [(r["step"], r["elapsed_s"]) for r in report.that_count(records) if r["kind"] != "start"]
    assert found == [(0, 2.0), (10, 6.0), (20, 12.0), (25, 16.0), (40, 23.0)]
    assert [r["step"] for r in report.that_count(records) if r["kind"] == "start"] == [0, 20, 25]


def evals(*points, each_s=10.0):
    return [
        {"kind": "eval", "step": step, "train_loss": loss - 0.1, "val_loss": loss, "elapsed_s": each_s * i}
        for i, (step, loss) in enumerate(points, 1)
    ]


def test_runs_are_drawn_over_steps_and_over_time_with_their_names_as_they_are(tmp_path, monkeypatch):
    kept, save = [], report._save
    monkeypatch.setattr(report, "_save", lambda figure, path: kept.append(figure) or save(figure, path))
    runs = [
        ("a$x_{$b", evals((0, 4.2), (10, 2.0), (20, 1.9), each_s=60)),
        ("_hidden", evals((0, 4.2), (20, 1.7))),
        ("swept", [{**r, "elapsed_s": 7.0} for r in evals((0, 4.2), (10, 1.95), (20, 1.8))]),  # one time for all
        ("diverged", [{**evals((0, 4.2))[0], "val_loss": None}]),
    ]
    assert report.draw_runs(tmp_path / "a.png", runs).stat().st_size > 20_000
    steps, times = kept[0].axes
    curve = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in steps.lines]
    assert (
        curve[:2] == [([0, 10, 20], pytest.approx([4.1, 1.9, 1.8])), ([0, 10, 20], [4.2, 2.0, 1.9])] and len(curve) == 8
    )
    assert [line.get_xdata().tolist() for line in times.lines][:4] == [
        [1, 2, 3],
        [1, 2, 3],
        [1 / 6, 1 / 3],
        [1 / 6, 1 / 3],
    ]
    assert len(times.lines) == 6 and times.get_xlabel() == "minutes"
    low, high = steps.get_ylim()
    assert 1.5 < low < 1.6 and 2.0 < high < 2.1  # untrained weights are above the picture
    names = [text.get_text() for text in kept[0].legends[0].get_texts()]
    assert names == ["a$x_{$b   1.900", "_hidden   1.700", "swept   1.800", "diverged"]


@pytest.mark.parametrize("n", [1, 11])
def test_one_run_and_more_runs_than_named_colors_each_have_a_color(tmp_path, figures, n):
    report.draw_runs(tmp_path / "a.png", [(f"run {i}", evals((0, 4.2))) for i in range(n)])
    assert len({tuple(line.get_color()) for line in figures[0].axes[0].lines}) == n
