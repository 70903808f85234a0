"""Metric sinks: metrics.jsonl for programs, and the console for people.

A sink is called with each record: a dict whose `kind` is start, compile, train, eval, early_stop or final. Only
metrics.jsonl must be written; whatever else fails is left out with a warning, and the run goes on.
"""

import json
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

from jaxgpt.errors import JaxgptWarning, printable
from jaxgpt.files.screen import Bar, Screen, clock
from jaxgpt.gpt_config import GPTConfig

LINE = 1 << 20  # bytes that no record reaches
Record = dict[str, Any]
Sink = Callable[[Record], None]


def flops_per_token(model: GPTConfig, parameters: int, frozen: int = 0) -> int:
    """Count the floating point operations of training on one token, forward and backward.

    Tables that are only looked up do not count, and with a sliding window, neither do the keys outside it.

    Args:
        model: sizes and switches.
        parameters: number of parameters.
        frozen: number of those that are not trained, which need no gradient of their own.

    Returns:
        FLOPs per token.

    Source: Chowdhery et al. 2022, "PaLM", appendix B.
    """
    attention = model.n_layer * model.n_head * model.channels_per_head * model.span
    return 6 * (parameters - model.looked_up) - 2 * max(frozen - model.looked_up, 0) + 12 * attention


class MetricsWarning(JaxgptWarning):
    """Something that only shows or draws the progress of a run has failed."""


def optional(what: str, call: Callable[..., Any]) -> Callable[..., None]:
    """Make a function whose failure does not end a run: it is reported once, and later calls do nothing.

    Args:
        what: what is lost, for the warning.
        call: the function.

    Returns:
        A function of the same arguments.
    """
    failed = False

    def careful(*args: Any) -> None:
        nonlocal failed
        if failed:
            return
        try:
            call(*args)
        except Exception as error:
            failed = True
            why = f"{type(error).__name__}: {error}"
            warnings.warn(f"no {what} ({why}): the run goes on without it", MetricsWarning, stacklevel=2)

    return careful


class JsonLines:
    """Append each record to a file as one line of JSON, and flush it. A last line that a kill cut off is dropped."""

    def __init__(self, path: str | pathlib.Path):
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by close)
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(size - LINE, 0))
        self._file.truncate(size - len(self._file.read().rpartition(b"\n")[2]))

    def __call__(self, record: Record) -> None:
        # JSON has no NaN, so a number that is not finite becomes null
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Console:
    """Print progress as plain lines, with a progress bar below them if stdout is a terminal."""

    def __init__(self, steps: int):
        self._steps = steps
        self._tokens_per_step = 0
        self._console = Screen(sys.stdout)
        self._bar = Bar(self._console)

    def __call__(self, record: Record) -> None:
        getattr(self, "_" + record["kind"])(record)

    def close(self) -> None:
        """Remove the progress bar."""
        self._bar.close()

    def _start(self, r: Record) -> None:
        rows, block_size = r["batch"]
        self._tokens_per_step = rows * block_size
        devices = ", ".join(f"{r['devices'].count(kind)} x {kind}" for kind in sorted(set(r["devices"])))
        versions = ", ".join(f"{name} {version}" for name, version in r["versions"].items())
        corpus = f"{r['tokens']:,} tokens of {r['vocab_size']:,}"
        if r["alphabet"]:
            alphabet = printable(json.dumps(r["alphabet"], ensure_ascii=False))
            alphabet = alphabet if len(alphabet) <= 90 else alphabet[:87] + "..."
            corpus = f"{r['tokens']:,} characters, alphabet of {len(r['alphabet'])}: {alphabet}"
        mesh, before = (", ".join(f"{axis} {size}" for axis, size in r[key].items()) for key in ("mesh", "mesh_before"))
        mesh += f" (until now on another mesh, {before}: the last bits may differ)" if mesh != before else ""
        self._console.print(
            f"devices  {devices} ({versions})\n"
            f"mesh     {mesh}\n"
            f"model    {r['parameters']:,} parameters, computed in {r['dtype']}"
            + (f"; {r['adapters']:,} of them are adapters and trained" if "adapters" in r else "") + "\n"
            f"corpus   {r['corpus']}: {corpus}\n"
            f"step     {rows} windows x {block_size} = {self._tokens_per_step:,} tokens, {r['steps']:,} steps\n"
            f"run      {r['run_dir']}, " + (f"continued at step {r['step']:,}" if r["step"] else "new")
            + (f", from the weights of {r['init_from']}" if r["init_from"] and not r["step"] else "")
            + "".join(f"\nchanged  {name} {old} -> {new}" for name, (old, new) in r["changed"].items())
            + ("\nMFU      unknown for this device: give its peak, --run.peak_tflops" if r.get("peak_unknown") else "")
            + "\ncompile  ... (seconds to a minute the first time)"
        )  # fmt: skip

    def _compile(self, r: Record) -> None:
        self._console.print(f"compile  {r['seconds']:.1f} s")

    def _eval(self, r: Record) -> None:
        self._console.print(f"{self._at(r)}  train loss {r['train_loss']:.4f}  val loss {r['val_loss']:.4f}")
        if r["step"] >= self._steps:
            self._bar.close()  # the evaluation of the whole split, which follows, has a bar of its own

    def _train(self, r: Record) -> None:
        speed = r["tokens_per_second"]
        left = clock((self._steps - r["step"]) * self._tokens_per_step / speed)
        mfu = f"  MFU {r['mfu']:.0%}" if r["mfu"] else ""
        say = f"loss {r['loss']:.4f}  {speed:>9,.0f} tokens/s{mfu}  {left} left"
        if self._bar.shown:
            self._bar.show(f"step {r['step']:,}/{self._steps:,}", r["step"], self._steps, say)
        else:
            self._console.print(f"{self._at(r)}  {say}")

    def _early_stop(self, r: Record) -> None:
        self._bar.close()
        self._console.print(
            f"stopped  no lower validation loss in {r['waited']} evaluations (--train.patience): "
            f"step {r['best_step']:,} is kept, with {r['best_loss']:.4f}"
        )

    def _final(self, r: Record) -> None:
        folder = r["run_dir"]
        self._console.print(
            f"done     validation loss {r['val_loss']:.4f} over the whole split, {clock(r['elapsed_s'])} in all\n"
            f"files    {folder}: loss.png, {'samples.txt, ' if r['sample'] else ''}metrics.jsonl, checkpoints/\n"
            + (f"sample   {'-' * 60}\n{printable(r['sample'])}\n         {'-' * 60}\n" if r["sample"] else "")
            + f"more     jaxgpt {r.get('next', 'sample')} --run {folder}"
        )

        if not r["val_loss"] < r["uniform_loss"]:
            self._console.print(
                f"warning  nothing was learned: a uniform guess has the loss ln V = {r['uniform_loss']:.4f}; "
                "try another --optim.learning_rate, or a longer text"
            )

    def _at(self, r: Record) -> str:
        return f"step {r['step']:>{len(f'{self._steps:,}')},}/{self._steps:,}"
