"""`jaxgpt ladder`: train the small rungs of the lecture one after the other, with one table and one picture."""

import dataclasses
import pathlib
import statistics
from collections.abc import Sequence

from jaxgpt import config as configs
from jaxgpt import data, training
from jaxgpt import tokenizer as tokenizers
from jaxgpt.runs import report
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


@dataclasses.dataclass(frozen=True)
class LadderArgs:
    """Train the small rungs of the lecture and draw them in one picture. Run it in a clone of the repository."""

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
        ConfigError: seeds is below 1, or the working directory has no configs/lecture with the recipes of the rungs.
    """
    if args.seeds < 1:
        raise configs.ConfigError(f"seeds is {args.seeds} (command line): use 1 or more")
    folder = pathlib.Path(args.dir)
    losses: dict[str, list[float]] = {}
    for rung in RUNGS:
        for seed in range(1337, 1337 + args.seeds):
            flags = ["--config", f"configs/lecture/{rung}.yaml", "--run.dir", str(folder / f"{rung}-{seed}")]
            flags += ["--seed", str(seed), "--data.name", args.name, *(["--data.path", args.path] if args.path else [])]
            run = training.train(configs.load_config(flags))
            final = [record for record in report.read_metrics(run.dir) if record["kind"] == "final"]
            losses.setdefault(rung, []).append(final[-1]["val_loss"])
    (folder / "ladder.md").write_text(table(losses), encoding="utf-8")
    return report.draw_ladder(folder, [f"{rung}-1337" for rung in RUNGS], closed_forms(run.config.data))


def table(losses: dict[str, Sequence[float]]) -> str:
    """Format the mean and range of each rung's losses beside the lecture's number, as a Markdown table."""
    lines = ["| rung | the lecture | jaxgpt, whole validation split |", "|---|---|---|"]
    for rung, values in losses.items():
        spread = f" ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)" if len(values) > 1 else ""
        lines.append(f"| {rung} | {RUNGS[rung] or ''} | {statistics.mean(values):.3f}{spread} |")
    return "\n".join(lines) + "\n"


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
