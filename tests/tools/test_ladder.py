import itertools
import pathlib

import pytest

from jaxgpt import cli
from jaxgpt.tools import ladder, ngrams

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("recipes", [[f"lecture/{rung}" for rung in ladder.RUNGS], [*ladder.MODERN.values()][1:]])
def test_every_rung_is_a_config_on_top_of_the_one_before(recipes):
    for before, recipe in itertools.pairwise(recipes):
        name = before.rpartition("/")[2]
        assert f"base: {name}.yaml" in (ROOT / "configs" / f"{recipe}.yaml").read_text()


def run_with(loss, **curve):
    """The records of a run of 2 windows x 4 tokens, with its estimates by step."""
    records = [{"kind": "start", "batch": [2, 4]}, {"kind": "final", "val_loss": loss}]
    records += [{"kind": "train", "tokens_per_second": v, "elapsed_s": t} for v, t in ((1.0, 2), (800.0, 5), (1e6, 9))]
    return records + [{"kind": "eval", "step": int(step[1:]), "val_loss": value} for step, value in curve.items()]


def test_the_modern_table_gives_the_time_of_a_step_and_the_steps_to_the_goal():
    slow, quick = run_with(1.8, s100=2.0, s200=1.914, s300=1.9), run_with(1.6, s100=1.8, s200=1.7)
    lines = ladder.modern_table({"plain": [slow, quick], "tuned": [run_with(2.0, s100=2.1)]}, 1.914).splitlines()
    assert lines[2:] == [
        "| plain | 1.700 (1.600 to 1.800, 2 seeds) | 10.0 ms | 7 s | 150 |", "| tuned | 2.000 | 10.0 ms | 7 s |  |"
    ]  # fmt: skip


def test_the_table_gives_mean_and_range_beside_the_lecture():
    lines = ladder.table({"one_head": [run_with(2.3), run_with(2.5)], "positions": [run_with(2.51)]}).splitlines()
    assert lines[2:] == ["| one_head | 2.4 | 2.400 (2.300 to 2.500, 2 seeds) |", "| positions |  | 2.510 |"]


@pytest.mark.full
def test_the_ladder_trains_each_rung_once_and_draws_them_with_the_count_tables(
    text_file, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(ladder.RECIPES, "lecture", {rung: f"lecture/{rung}" for rung in ("bigram", "positions")})
    argv = ["ladder", "--path", str(text_file), "--dir", str(tmp_path / "ladder"), "--seeds", "2"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "2 seeds" in out and out.rstrip().endswith(str(tmp_path / "ladder" / "ladder.png"))
    runs = {path.name for path in (tmp_path / "ladder").iterdir() if path.is_dir()}
    assert runs == {"bigram-1337", "bigram-1338", "positions-1337", "positions-1338"}
    assert (tmp_path / "ladder" / "ladder.png").stat().st_size > 10_000
    before = (tmp_path / "ladder" / "ladder.md").read_text()
    assert cli.main(argv) == 0
    assert (tmp_path / "ladder" / "ladder.md").read_text() == before
    assert "compile  " not in capsys.readouterr().out.replace("compile  ...", "")  # nothing is trained again


def test_closed_forms_fall_with_the_context_and_are_those_of_the_count_tables(text_file, text):
    from jaxgpt.data import DataConfig
    from jaxgpt.tokenizer import CharTokenizer

    forms = ladder.closed_forms(DataConfig(path=str(text_file)))
    assert list(forms) == ["unigram counts", "bigram counts", "trigram counts"]
    assert forms["unigram counts"] > forms["bigram counts"] > forms["trigram counts"]
    ids = CharTokenizer.from_text(text).encode(text)
    expected = ngrams.loss(ids[:18_000], ids[18_000:], 2, ids.max() + 1, smoothing=0.1)
    assert forms["bigram counts"] == pytest.approx(expected)


@pytest.mark.parametrize("flags, message", [(["--seeds", "0"], "seeds is 0"), (["--seed", "1"], "--seeds")])
def test_a_ladder_that_cannot_be_climbed_is_one_line(flags, message, capsys):
    assert cli.main(["ladder", *flags]) == 2
    assert message in capsys.readouterr().err
