"""A recipe trained by its command: when which validation loss was on the screen, and at what speed. One JSON line.

python benchmarks/gpu/recipe.py --config RECIPE [--goal LOSS] [--limit SECONDS] [--section.field VALUE ...]
Seconds count from the start of the command. After --limit seconds the run is asked to stop, which saves it.
"""

import argparse
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

sys.path.append(str(pathlib.Path(__file__).parent.parent))
from whole_runs import VALIDATION_LOSS, jaxgpt_command, to_first_loss

GOALS = {"lecture/scaled": 1.48}  # what the lecture says; nanoGPT's Shakespeare recipe reports 1.4697
SAVING = 60  # seconds that a run may take to stop


def watch(command: list[str], limit: float) -> dict:
    """Run the command; the seconds of its first training loss, and those and the loss of each evaluation."""
    began, first, evaluations = time.perf_counter(), None, []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    timers = (
        threading.Timer(limit, process.send_signal, [signal.SIGTERM]),
        threading.Timer(limit + SAVING, process.kill),
    )
    for timer in timers:
        timer.start()
    try:
        for line in process.stdout:
            seconds = round(time.perf_counter() - began, 2)
            print(line, end="", file=sys.stderr)
            if first is None and to_first_loss(line):
                first = seconds
            evaluations += [[seconds, float(loss)] for loss in VALIDATION_LOSS.findall(line)]
        code = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        process.kill()
    seconds = round(time.perf_counter() - began, 2)
    return {"exit_code": code, "seconds": seconds, "first_loss_s": first, "evaluations": evaluations}


def summary(run_dir: pathlib.Path) -> dict:
    """What metrics.jsonl says of the device, the model and the speed."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in ("start", "compile", "train", "final")}
    start, train = kinds["start"][0], kinds["train"]
    pace = {}
    for name in ("tokens_per_second", "mfu"):
        values = [row[name] for row in train if row[name]]
        pace[name] = float(f"{statistics.median(values):.4g}") if values else None
    known = {name: start[name] for name in ("devices", "versions", "dtype", "parameters", "batch", "steps")}
    compiled = round(sum(row["seconds"] for row in kinds["compile"]), 1)
    final = kinds["final"][0]["val_loss"] if kinds["final"] else None
    return {"last_step": train[-1]["step"], **pace, "compile_s": compiled, "final_val_loss": final} | known


def main() -> int:
    """Train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--goal", type=float)
    parser.add_argument("--limit", type=float, default=300)
    args, flags = parser.parse_known_args()
    goal = args.goal or GOALS.get(args.config, 1.47)
    with tempfile.TemporaryDirectory(prefix="jaxgpt-recipe-") as folder:
        run_dir = pathlib.Path(folder, "run")
        command = jaxgpt_command(["--config", args.config, *flags], str(run_dir))
        seen = watch(command, args.limit)
        facts = summary(run_dir) if (run_dir / "metrics.jsonl").is_file() else {}
    losses = [loss for _, loss in seen["evaluations"]]
    reached = next((seconds for seconds, loss in seen["evaluations"] if loss <= goal), None)
    record = {
        "part": "recipe",
        "recipe": args.config,
        "goal": goal,
        "reached_s": reached,
        "best": min(losses, default=None),
    }
    print(json.dumps({**record, **seen, **facts, "command": " ".join(command[1:])}), flush=True)
    return 0 if seen["exit_code"] in (0, 75) else 1


if __name__ == "__main__":
    sys.exit(main())
