"""Processes that measure in turns: each warms up once, then sleeps until it is told to work for some seconds.

The driver's end is `Worker` and `take_turns`, the worker's end `serve`; between them goes one line of JSON at a time.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any


class WorkerError(RuntimeError):
    """A worker ended before its time; the message holds the end of what it wrote to stderr."""


class Worker:
    """The driver's end of one side: a fresh process that is warm when the constructor returns."""

    def __init__(self, program: str, spec: dict[str, Any], env: dict[str, str]):
        """Start `python program spec` and wait until it is ready; `facts` is what it then says of itself."""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        command = [sys.executable, program, json.dumps(spec)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, env=env, text=True
        )
        self.facts = self._read()

    def go(self, seconds: float) -> dict[str, Any]:
        """Let it work for about so many seconds; the amount of work done, the seconds it took, and more."""
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip()[-2000:]
        raise WorkerError(f"a side ended with exit code {code} ({' '.join(self._process.args[1:])}):\n{said}")


def serve(prepare: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[float], dict[str, Any]]]]) -> None:
    """The worker's end: prepare as the first argument says, then one slice of work for each line of stdin.

    Args:
        prepare: takes the specification, warms up, and returns the facts and a function that works for the seconds
            that it is given and returns at least `amount` and `seconds`.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries and training print is written, and not read

    def answer(message):
        print(json.dumps(message), file=channel, flush=True)

    facts, work = prepare(json.loads(sys.argv[1]))
    answer(facts)
    slept = time.process_time(), time.perf_counter()
    for line in sys.stdin:
        woken = time.process_time(), time.perf_counter()
        done = work(float(line))
        idle = {"idle_cpu_s": woken[0] - slept[0], "idle_s": woken[1] - slept[1]}
        slept = time.process_time(), time.perf_counter()
        answer(done | idle | {"cpu_s": slept[0] - woken[0]})


def until(seconds: float, piece: Callable[[], int]) -> tuple[int, float]:
    """Repeat a piece of work until the time is over: the amounts that it returned in all, and the seconds they took."""
    began, amount = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not amount:
        amount += piece()
    return amount, spent


def busy() -> float:
    """Processor seconds that the whole machine has spent since it started; 0 on anything but Linux."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def others(before: float, own: float, seconds: float) -> float | None:
    """Processor cores that something else has kept busy since `busy` said `before`; None where that is not known."""
    return round((busy() - before - own) / seconds, 3) if before else None


def take_turns(workers: dict[str, Any], rounds: int, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Slices of all workers, never two at once, forwards in one round and backwards in the next (ABC CBA ABC ...).

    Args:
        workers: by the name of the side; anything with the `go` of Worker.
        rounds: that are returned; a short one before them is dropped.
        seconds: of a slice.

    Returns:
        The answers of each side by round, each with its `rate`, amount over seconds, and `others`, the processor cores
        that were busy with anything else meanwhile.
    """
    answers = {name: [] for name in workers}
    for i in range(-1, rounds):
        for name in list(workers)[:: 1 if i % 2 else -1]:
            before = busy()
            answer = workers[name].go(seconds if i >= 0 else min(seconds, 1.0))
            answer["others"] = others(before, answer["cpu_s"], answer["seconds"])
            if i >= 0:
                answers[name].append(answer | {"rate": answer["amount"] / answer["seconds"]})
    return answers


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range, to four digits."""
    digits = [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]
    return {"median": digits[0], "range": digits[1:]}


def compare(sides: dict[str, Sequence[float]], lower_is_better: bool = False) -> dict[str, Any]:
    """The first side against the others, round by round.

    Args:
        sides: the measurements of each side; those of one round stand at the same index.
        lower_is_better: they are times, not rates.

    Returns:
        Median and range of each side, and of the paired ratios of the first side to each of the others (above 1: the
        first is faster), `better`, the other side with the better median, and `ratio`, that against it.
    """
    (first, ours), *others = sides.items()
    ratios = {}
    for name, theirs in others:
        ratios[name] = spread([b / a if lower_is_better else a / b for a, b in zip(ours, theirs, strict=True)])
    rank = min if lower_is_better else max
    better = rank((name for name, _ in others), key=lambda name: statistics.median(sides[name]))
    measured = {name: spread(values) for name, values in sides.items()}
    return {"sides": measured, "first": first, "ratios": ratios, "better": better, "ratio": ratios[better]}
