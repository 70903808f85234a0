import json

import matplotlib.image
import pytest
from matplotlib.axes import Axes

from jaxgpt.runs import report


def write(folder, *records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"kind": "tra')


def test_the_picture_shows_both_losses_and_the_last_record_of_a_repeated_step(tmp_path, monkeypatch):
    drawn = {}
    plot = Axes.plot

    def remember(axes, x, y, **style):
        drawn[style["label"]] = (x, y)
        return plot(axes, x, y, **style)

    monkeypatch.setattr(Axes, "plot", remember)
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


def test_a_directory_without_metrics_cannot_be_drawn(tmp_path):
    with pytest.raises(FileNotFoundError):
        report.draw_loss(tmp_path)
