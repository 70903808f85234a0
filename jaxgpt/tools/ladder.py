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
GOAL = 1.914  # the loss of `plain` on Tiny Shakespeare


@dataclasses.dataclass(frozen=True)
class LadderArgs:
    """Train the rungs of a ladder and draw them in one picture."""

    ladder: Literal["lecture", "modern"] = "lecture"
    """The small rungs of the lecture, or what came after it, one switch at a time."""
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
    rungs = MODERN if args.ladder == "modern" else {rung: f"lecture/{rung}" for rung in RUNGS}
    records: dict[str, list[list[Record]]] = {}
    for rung, recipe in rungs.items():
        for seed in range(1337, 1337 + args.seeds):
            flags = ["--config", recipe, "--run.dir", str(folder / f"{rung}-{seed}")]
            flags += ["--seed", str(seed), "--data.name", args.name, *(["--data.path", args.path] if args.path else [])]
            run = training.train(configs.load_config(flags))
            records.setdefault(rung, []).append(report.read_metrics(run.dir))
    lecture = args.ladder == "lecture"
    (folder / "ladder.md").write_text((table if lecture else modern_table)(records), encoding="utf-8")
    names = [f"{rung}-1337" for rung in rungs]
    if lecture:
        return report.draw_ladder(folder, names, closed_forms(run.config.data))
    return report.draw_ladder(folder, names, {"goal": GOAL}, "Beyond the lecture, switch by switch")


def table(records: dict[str, Sequence[Sequence[Record]]]) -> str:
    """Format the mean and range of each rung's losses beside the lecture's number, as a Markdown table."""
    lines = ["| rung | the lecture | jaxgpt, whole validation split |", "|---|---|---|"]
    lines += [f"| {rung} | {RUNGS[rung] or ''} | {_losses(runs)} |" for rung, runs in records.items()]
    return "\n".join(lines) + "\n"


def modern_table(records: dict[str, Sequence[Sequence[Record]]]) -> str:
    """Format the losses of each rung, the time of a step, and the steps until GOAL, as a Markdown table."""
    lines = [f"| rung | whole validation split | step | steps to {GOAL} |", "|---|---|---|---|"]
    for rung, runs in records.items():
        steps = [_steps_to_goal(run) for run in runs]
        reached = "" if None in steps else f"{statistics.mean(steps):,.0f}"
        step = statistics.median(map(_step_seconds, runs))
        lines.append(f"| {rung} | {_losses(runs)} | {1000 * step:.1f} ms | {reached} |")
    return "\n".join(lines) + "\n"


def _losses(runs: Sequence[Sequence[Record]]) -> str:
    values = [[record for record in run if record["kind"] == "final"][-1]["val_loss"] for run in runs]
    spread = f" ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _step_seconds(run: Sequence[Record]) -> float:
    """The median time of a step."""
    rows, tokens = next(record["batch"] for record in run if record["kind"] == "start")
    return rows * tokens / statistics.median(record["tokens_per_second"] for record in run if record["kind"] == "train")


def _steps_to_goal(run: Sequence[Record]) -> int | None:
    """The first step at which the estimated validation loss was GOAL or less."""
    losses = {record["step"]: record["val_loss"] for record in run if record["kind"] == "eval"}
    return min((step for step, loss in losses.items() if loss <= GOAL), default=None)


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
