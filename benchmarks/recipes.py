"""Recipes beside each other: the time of a step, or whole runs with their losses and training times.

python benchmarks/recipes.py steps RECIPE RECIPE ... [--rounds N]
python benchmarks/recipes.py runs RECIPE RECIPE ... [--rounds N] [--dir D] [--section.field VALUE ...]
The recipes take turns, in one order and then in the other. `steps` measures calls of training steps in one process.
`runs` starts each recipe's command in a fresh process, with another seed each round; its training time is from the
first to the last `train` record, evaluations included. `--dir` keeps the runs, under the names that `jaxgpt ladder`
looks for; those that are finished there are read. Ratios are to the first recipe, within a round.
Prints one JSON line a recipe.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from compare import machine
from tricks import Training

from jaxgpt import load_config
from jaxgpt.training import mesh_config, resolve

STEPS = 20  # of a call, as the recipes have it
SEED = 1337  # of the first round; the recipes' own


def steps(recipe: str):
    """A function that trains for some steps and returns the seconds of one."""
    config = load_config(["--config", recipe])
    training = Training(resolve(config, 65), mesh_config(config), STEPS)

    def measure(_seed: int) -> dict[str, float]:
        began = time.perf_counter()
        done = training()
        return {"seconds": (time.perf_counter() - began) / done}

    return measure


def runs(recipe: str, folder: pathlib.Path, flags: list[str]):
    """A function that trains to the end and returns the loss over the whole split and the seconds of training."""

    def measure(seed: int) -> dict[str, float]:
        run = folder / f"{pathlib.PurePath(recipe).stem}-{seed}"
        command = [sys.executable, "-m", "jaxgpt", "train", "--config", recipe, "--run.dir", str(run)]
        subprocess.run([*command, "--seed", str(seed), *flags], check=True, stdout=sys.stderr)
        lines = (run / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        train = [record["elapsed_s"] for record in records if record["kind"] == "train"]
        return {"loss": records[-1]["val_loss"], "seconds": train[-1] - train[0]}

    return measure


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "runs"])
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=pathlib.Path, help="keep the runs here")
    args, flags = parser.parse_known_args()
    if args.what == "steps" and (flags or args.dir):
        parser.error(f"{(flags or ['--dir'])[0]} is for whole runs only")
    with tempfile.TemporaryDirectory(prefix="jaxgpt-recipes-") as folder:
        compare(args, args.dir or pathlib.Path(folder), flags)


def compare(args: argparse.Namespace, folder: pathlib.Path, flags: list[str]):
    """Measure the recipes in turns and print a line for each."""
    sides = {recipe: steps(recipe) if args.what == "steps" else runs(recipe, folder, flags) for recipe in args.recipes}
    if args.what == "steps":  # warm up
        for measure in sides.values():
            measure(SEED)
    found = {recipe: [] for recipe in sides}
    for i in range(args.rounds):
        for recipe in list(sides)[:: -1 if i % 2 else 1]:
            found[recipe].append(sides[recipe](SEED + i))
    first = [values["seconds"] for values in found[args.recipes[0]]]
    for recipe, values in found.items():
        seconds = [value["seconds"] for value in values]
        ratios = [a / b for a, b in zip(seconds, first, strict=True)]
        record = {"what": args.what, "recipe": recipe, "seconds": round(statistics.median(seconds), 5)}
        record |= {"ratio": round(statistics.median(ratios), 3), "range": [round(f(ratios), 3) for f in (min, max)]}
        if args.what == "runs":
            losses = [value["loss"] for value in values]
            record |= {"loss": round(statistics.mean(losses), 4), "losses": [round(loss, 4) for loss in losses]}
        known = {"rounds": args.rounds, "devices": str(jax.devices()), **machine()}
        print(json.dumps(record | known | {"command": " ".join(["python", *sys.argv])}), flush=True)


if __name__ == "__main__":
    main()
