"""Whole commands, timed from outside: from the start of a fresh process to a line on its screen."""

import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from turns import busy, others

from jaxgpt.config import Config
from jaxgpt.files import download

# of jaxgpt's lines `step 20/2,000  loss 3.5` and `done     validation loss 1.9`, and of nanoGPT's `iter 0: loss 4.2`
# and `step 250: train loss 2.4, val loss 2.4`
TRAINING_LOSS = re.compile(r"^(?:iter \d+:|step +[\d,]+/[\d,]+) +loss (\d+\.\d+)")
VALIDATION_LOSS = re.compile(r"val(?:idation)? loss (\d+\.\d+)")


class RunError(RuntimeError):
    """A command failed; the message holds the end of what it wrote."""


class Watched(NamedTuple):
    """What was seen of a command."""

    seconds: float
    """From its start to the line that was enough, or to its end if none was."""
    lines: str
    """Its stdout to there."""
    others: float | None
    """Processor cores that were busy with anything else meanwhile, if known."""


def watch(command: Sequence[str], enough: Callable[[str], bool], cwd: str, env: dict[str, str]) -> Watched:
    """Run a command until a line on its stdout is enough, and end it there.

    Raises:
        RunError: it failed.
    """
    began, lines, before, children = time.perf_counter(), [], busy(), os.times()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            for line in process.stdout:
                lines.append(line)
                if enough(line):
                    break
            else:
                if process.wait():
                    stderr.seek(0)
                    said = stderr.read().decode(errors="replace").strip()[-2000:]
                    raise RunError(f"exit code {process.returncode} ({' '.join(command)}):\n{said}")
            seconds = time.perf_counter() - began
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    now = os.times()
    own = now.children_user + now.children_system - children.children_user - children.children_system
    return Watched(seconds, "".join(lines), others(before, own, seconds))


def to_first_loss(line: str) -> bool:
    """Whether a line shows the loss of a training step."""
    return TRAINING_LOSS.search(line) is not None


def to_validation_loss(goal: float) -> Callable[[str], bool]:
    """Whether a line shows a validation loss of at most `goal`."""

    def enough(line: str) -> bool:
        return any(float(loss) <= goal for loss in VALIDATION_LOSS.findall(line))

    return enough


def last_validation_loss(lines: str) -> float:
    """The last one on the screen."""
    return float(VALIDATION_LOSS.findall(lines)[-1])


def empty_cache(folder: pathlib.Path) -> pathlib.Path:
    """A cache folder without anything compiled; corpora that are downloaded already stay out of the measured time."""
    folder.mkdir()
    for path in download.cache_dir().glob("*"):
        if path.is_file():
            shutil.copy2(path, folder)
    return folder


def jaxgpt_command(flags: Sequence[str], run_dir: str) -> list[str]:
    """A new run of jaxgpt."""
    return [sys.executable, "-m", "jaxgpt", "train", *flags, "--run.dir", run_dir]


def environment(device: str, cache: pathlib.Path | None = None) -> dict[str, str]:
    """Of a child: lines appear at once, and jax uses the device (and this cache)."""
    changed = {"PYTHONUNBUFFERED": "1", "JAX_PLATFORMS": device}
    return {**os.environ, **changed, **({"JAXGPT_CACHE": str(cache)} if cache else {})}


def prepare_nanogpt(clone: str, tokens: np.ndarray, vocab_size: int, train_fraction: float, folder: pathlib.Path):
    """A working directory for the train.py of a clone, which it looks for its configurator and data in."""
    data = folder / "data" / "corpus"
    data.mkdir(parents=True)
    shutil.copy2(pathlib.Path(clone, "configurator.py"), folder)
    cut = int(train_fraction * len(tokens))
    tokens[:cut].astype(np.uint16).tofile(data / "train.bin")
    tokens[cut:].astype(np.uint16).tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))


def nanogpt_command(clone: str, config: Config, device: str) -> list[str]:
    """The clone's own train.py with a resolved configuration; its seed is 1337 whatever ours is."""
    model, optim, train = config.model, config.optim, config.train
    values = {name: getattr(model, name) for name in ("n_layer", "n_head", "n_embd", "block_size", "dropout")}
    for name in ("learning_rate", "weight_decay", "beta1", "beta2", "grad_clip"):
        values[name] = getattr(optim, name)
    values |= {
        "bias": model.bias == "all",
        "batch_size": config.data.batch_size,
        "gradient_accumulation_steps": optim.grad_accumulation,
        "min_lr": optim.min_learning_rate,
        "warmup_iters": optim.warmup_steps,
        "lr_decay_iters": optim.decay_steps or config.train.steps,
        "max_iters": train.steps,
        "eval_interval": train.eval_interval,
        "eval_iters": train.eval_batches,
        "always_save_checkpoint": False,
        "log_interval": 1,
        "dataset": "corpus",
        "device": device,
        "compile": False,
        "dtype": train.dtype,
    }
    return [sys.executable, f"{clone}/train.py", *(f"--{name}={value}" for name, value in values.items())]
