"""`jaxgpt ladder`: train the rungs of a ladder of recipes one after the other, with one table and one picture."""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence
from typing import Literal

from jaxgpt import config as configs
from jaxgpt import data, training
from jaxgpt import tokenizer as tokenizers
from jaxgpt.runs import report
from jaxgpt.runs.metrics import Record
from jaxgpt.settings.checks import Path, check_fields
from jaxgpt.text import corpus
from jaxgpt.tools import ngrams

# validation losses that the lecture states or shows; None if it gives none
RUNGS = {
    "bigram": 2.5,
    "positions": None,
    "one_head": 2.40,
    "four_heads": 2.28,
    "feed_forward": 2.24,
    "residual": 2.08,
    "layernorm": 2.06,
}

# name -> recipe; each is based on the one before, from nanoGPT's recipe as it is, and with its rate tuned
MODERN = {
    "plain": "shakespeare_cpu",
    "tuned": "modern/tuned",
    "rope": "modern/rope",
    "qk_norm": "modern/qk_norm",
    "rmsnorm": "modern/rmsnorm",
    "relu2": "modern/relu2",
    "zero_init": "modern/zero_init",
    "muon": "modern/muon",
    "one_kv_head": "modern/one_kv_head",
    "value_embeddings": "modern/shakespeare_cpu",
}
# larger windows, for a laptop: the plain model with its rate tuned, for about as long as the modern one
LAPTOP = {"laptop_plain": "modern/laptop_plain", "laptop": "modern/laptop", "laptop_long": "modern/laptop_long"}
RECIPES = {"lecture": {rung: f"lecture/{rung}" for rung in RUNGS}, "modern": MODERN, "laptop": LAPTOP}
# losses on Tiny Shakespeare to compare with; nanoGPT's is its README's, of 10.7 M parameters after 3 minutes of an A100
GOALS = {"modern": ("nanoGPT's CPU recipe", 1.914), "laptop": ("nanoGPT on an A100", 1.4697)}
TITLES = {"lecture": "The lecture, rung by rung", "modern": "Beyond the lecture, switch by switch",
          "laptop": "Two CPU cores"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LadderArgs:
    """Train the rungs of a ladder and draw them in one picture."""

    ladder: Literal["lecture", "modern", "laptop"] = "lecture"
    """The small rungs of the lecture; what came after it, one switch at a time; or models for a laptop."""
    dir: Path = "runs/ladder"
    """Folder for the runs; rungs already finished there are not trained again."""
    seeds: int = 1
    """Number of seeds to train each rung with, counted up from the seed of the recipes."""
    name: str = "shakespeare"
    """Named corpus: shakespeare, or tiny_shakespeare (the exact file of the lecture)."""
    path: Path | None = None
    """Your own text file to use instead."""

    def __post_init__(self):
        check_fields(self)


def climb(args: LadderArgs) -> pathlib.Path:
    """Train every rung with every seed.

    Returns:
        The path of the picture; the table is beside it, in ladder.md.

    Raises:
        ConfigError: seeds is below 1.
    """
    if args.seeds < 1:
        raise configs.ConfigError(f"seeds is {args.seeds} (command line): use 1 or more")
    folder = pathlib.Path(args.dir)
    rungs = RECIPES[args.ladder]
    records: dict[str, list[list[Record]]] = {}
    for rung, recipe in rungs.items():
        for seed in range(1337, 1337 + args.seeds):
            flags = ["--config", recipe, "--run.dir", str(folder / f"{rung}-{seed}")]
            flags += ["--seed", str(seed), "--data.name", args.name, *(["--data.path", args.path] if args.path else [])]
            run = training.train(configs.load_config(flags))
            records.setdefault(rung, []).append(report.read_metrics(run.dir))
    names = [f"{rung}-1337" for rung in rungs]
    if args.ladder == "lecture":
        rows, lines = table(records), closed_forms(run.config.data)
    else:
        goal, loss = GOALS[args.ladder]
        rows, lines = modern_table(records, loss), {goal: loss}
    (folder / "ladder.md").write_text(rows, encoding="utf-8")
    return report.draw_ladder(folder, names, lines, TITLES[args.ladder])


def table(records: dict[str, Sequence[Sequence[Record]]]) -> str:
    """Format the mean and range of each rung's losses beside the lecture's number, as a Markdown table."""
    lines = ["| rung | the lecture | jaxgpt, whole validation split |", "|---|---|---|"]
    lines += [f"| {rung} | {RUNGS[rung] or ''} | {_losses(runs)} |" for rung, runs in records.items()]
    return "\n".join(lines) + "\n"


def modern_table(records: dict[str, Sequence[Sequence[Record]]], goal: float) -> str:
    """Format the losses of each rung, the time of a step and of the training, and the steps until the goal."""
    lines = [f"| rung | whole validation split | step | training | steps to {goal} |", "|---|---|---|---|---|"]
    for rung, runs in records.items():
        steps = [_steps_to(goal, run) for run in runs]
        reached = "" if None in steps else f"{statistics.mean(steps):,.0f}"
        step, seconds = (statistics.median(map(time, runs)) for time in (_step_seconds, _training_seconds))
        lines.append(f"| {rung} | {_losses(runs)} | {1000 * step:.1f} ms | {seconds:.0f} s | {reached} |")
    return "\n".join(lines) + "\n"


def _losses(runs: Sequence[Sequence[Record]]) -> str:
    values = [[record for record in run if record["kind"] == "final"][-1]["val_loss"] for run in runs]
    spread = f" ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _step_seconds(run: Sequence[Record]) -> float:
    """The median time of a step."""
    rows, tokens = next(record["batch"] for record in run if record["kind"] == "start")
    return rows * tokens / statistics.median(record["tokens_per_second"] for record in run if record["kind"] == "train")


def _training_seconds(run: Sequence[Record]) -> float:
    """From the first to the last record of training, evaluations included."""
    times = [record["elapsed_s"] for record in run if record["kind"] == "train"]
    return times[-1] - times[0]


def _steps_to(goal: float, run: Sequence[Record]) -> int | None:
    """The first step at which the estimated validation loss was the goal or less."""
    losses = {record["step"]: record["val_loss"] for record in run if record["kind"] == "eval"}
    return min((step for step, loss in losses.items() if loss <= goal), default=None)


def closed_forms(config: data.DataConfig) -> dict[str, float]:
    """Compute the validation losses of n-gram counts on the same split.

    A model that sees as few tokens cannot do much better.

    Returns:
        Name -> loss, in nats per character.
    """
    text = corpus.load(config.name, config.path)
    tokenizer = tokenizers.for_text("char", text.text, text.alphabet)
    splits = data.split(tokenizer.encode(text.text), config.train_fraction, tokenizer.vocab_size, 1, text.name)
    names = {1: "unigram counts", 2: "bigram counts", 3: "trigram counts"}
    return {name: ngrams.loss(*splits, n, tokenizer.vocab_size, smoothing=0.1) for n, name in names.items()}
