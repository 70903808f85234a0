"""jaxgpt against PyTorch, side by side in one run: one JSON line for each thing that is measured.

Training and generation: every side is a live process of its own that has compiled and warmed up; they work in turns of
some seconds, forwards in one round and backwards in the next, never two at once. Whole commands (startup, loss): fresh
processes, in the same alternating order. Ratios are of jaxgpt to PyTorch within a round, above 1 where jaxgpt is
faster. Further --section.field VALUE flags change the recipe of both sides.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile

import whole_runs
from comparison import GPT2, RECIPE, Case, Comparison
from turns import WorkerError

QUIET = 0.1  # processor cores that other programs may use
LOADED = "other programs used up to {:.2f} cores meanwhile: PyTorch's threads suffer most, measure on a quiet machine"
GOAL = 1.92  # nats a character: what both sides reach with nanoGPT's CPU recipe, in its 2,000 steps
ONE_CALL = ("--train.steps_per_call", "1")  # a call of the recipe's 20 steps takes minutes on a CPU
SMALL_STEP = ("--optim.grad_accumulation", "1", "--train.log_interval", "10")
WORKS = {
    "bigram": ("training steps/s of the bigram model", [Case("train", "lecture/bigram")]),
    "ladder": ("training steps/s of the lecture's small transformer", [Case("train", "lecture/layernorm")]),
    "recipe": ("training steps/s of nanoGPT's CPU recipe", [Case("train", RECIPE)]),
    "scaled": ("training steps/s of the lecture's scaled model", [Case("train", "lecture/scaled", "", ONE_CALL, 15.0)]),
    "generate": (
        "tokens/s that the recipe's model writes, 1 and 10 texts, within its window of 64 and past it",
        [Case("generate", RECIPE, f"within, batch {B}", batch=B, prompt=1, new_tokens=63) for B in (1, 10)]
        + [Case("generate", RECIPE, f"past, batch {B}", batch=B, prompt=64, new_tokens=64) for B in (1, 10)],
    ),
    "startup": (
        "seconds from the recipe's command to the first training loss, with nothing compiled before and with all",
        [Case("startup", RECIPE, cache) for cache in ("cold", "warm")],
    ),
    "loss": (
        f"seconds from the recipe's command to validation loss {GOAL}, with nothing compiled before",
        [Case("loss", RECIPE, "cold")],
    ),
    "loss-warm": ("the same with everything compiled", [Case("loss", RECIPE, "warm")]),
    "gpt2": ("training steps/s of GPT-2 124M, and MFU; for --device cuda", [Case("train", GPT2, "", SMALL_STEP, 8.0)]),
    "gpt2-generate": (
        "tokens/s that GPT-2 124M writes, 1 and 16 texts, 256 tokens within its window; for --device cuda",
        [Case("generate", GPT2, f"within, batch {B}", batch=B, prompt=1, new_tokens=256) for B in (1, 16)],
    ),
}


def machine() -> dict:
    """The processor, the cores that this process may use, and the versions of everything that matters."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"python": platform.python_version()}
    for library in ("jax", "jaxlib", "flax", "optax", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[library] = importlib.metadata.version(library)
    cpu = named[0] if named else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": cores, "versions": versions}


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the flags of the recipe among them."""
    works = "\n".join(f"  {name:14} {what}" for name, (what, _) in WORKS.items())
    works += "\n  all            everything that the device is for"
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"works:\n{works}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", choices=[*WORKS, "all"], metavar="WORK", help="what to measure, see below")
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements (default 5)")
    parser.add_argument(
        "--case", default="", help="only the cases of the work that have this in their name (past, cold)"
    )
    parser.add_argument("--seconds", type=float, help="of a slice, instead of the work's own (4 to 15)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where both sides compute")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--pytorch", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"],
                        help="forms of PyTorch to measure (default both)")  # fmt: skip
    for flag, metavar, what in (
        ("--nanogpt", "DIR", "a clone of nanoGPT: its model instead of the reference, its whole train.py for "
         "startup and loss; for recipe, generate, startup, loss and the gpt2 works"),
        ("--ours", "RECIPE", "for startup and loss: the recipe that jaxgpt trains (default: that of the other side)"),
        ("--text", "FILE", "a text of the lecture's 65 characters (default: the recipe's named corpus)"),
        ("--tokens", "DIR", "for gpt2: a folder that `jaxgpt prepare` made with GPT-2's tokenizer (default: 50 million "
         "random tokens)"),
    ):  # fmt: skip
        parser.add_argument(flag, metavar=metavar, help=what)
    parser.add_argument("--get_batch", choices=["slices", "gather"], default="slices",
                        help="PyTorch's batches: a slice a window as the lecture and nanoGPT have it (default), or all "
                        "windows in one gather, which is faster")  # fmt: skip
    parser.add_argument("--goal", type=float, default=GOAL, help=f"validation loss for loss (default {GOAL})")
    args, flags = parser.parse_known_args(argv)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.rounds < 1:
        parser.error(f"rounds is {args.rounds}: use 1 or more")
    if args.ours and args.work not in ("startup", "loss", "loss-warm"):
        parser.error(f"no other recipe for {args.work} (--ours, {args.ours}): it is for startup and loss")
    if args.nanogpt and not pathlib.Path(args.nanogpt, "model.py").is_file():
        parser.error(f"not a clone of nanoGPT (--nanogpt, {args.nanogpt}): name the folder that holds its model.py")
    return args, flags


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is jaxgpt's for its errors and 1 for a side that failed."""
    args, flags = parse(argv)
    for_device = [name for name in WORKS if name.startswith("gpt2") == (args.device == "cuda")]
    command = shlex.join(["python", "benchmarks/compare.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        for work in for_device if args.work == "all" else [args.work]:
            for case in (case for case in WORKS[work][1] if args.case in case.name):
                with tempfile.TemporaryDirectory(prefix="jaxgpt-compare-") as folder:
                    print(f"measuring {work} {case.name} ...", file=sys.stderr)
                    comparison = Comparison(case, args, flags, pathlib.Path(folder))
                    in_turns = case.kind in ("train", "generate")
                    measured = comparison.in_turns() if in_turns else comparison.from_outside()
                if (measured["others"] or 0) > QUIET:
                    print(f"compare: warning: {LOADED.format(measured['others'])}", file=sys.stderr)
                known = {"device": args.device, "dtype": args.dtype, "rounds": args.rounds} | machine()
                record = {"work": work, "case": case.name, **measured, **known, "command": command}
                print(json.dumps(record), flush=True)
    except (WorkerError, whole_runs.RunError, ValueError, OSError) as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
