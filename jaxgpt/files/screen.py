"""The screen: what is shown there may get lost, and the work goes on."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich import filesize
from rich.console import Console

PLAIN = 10.0, 600.0  # seconds before the first plain line of progress, and most seconds between two of them


class Lenient:
    """A text stream that never fails: characters that it cannot show are escaped, and what nobody reads is dropped.

    Args:
        stream: where the text goes; None if there is no such stream, as in a window without a terminal.
    """

    def __init__(self, stream: TextIO | None):
        self._stream = stream

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "backslashreplace").decode(self.encoding))
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if there is one left."""
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The file descriptor of the stream; OSError if there is none."""
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def _give_up(self) -> None:
        flush_or_drop(self._stream)
        self._stream = None


def flush_or_drop(stream: TextIO | None) -> None:
    """Flush a stream; if that fails, drop what it holds, on which Python would fail when the process ends."""
    with contextlib.suppress(OSError, ValueError):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            number, nowhere = stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


class Screen(Console):
    """rich's console for progress: plain text, on a stream that never fails. By itself, rich ends the process when a
    reader goes away."""

    def __init__(self, stream: TextIO | None):
        super().__init__(file=Lenient(stream), highlight=False, soft_wrap=True, markup=False, emoji=False)


class Bar:
    """A progress bar between two texts. It is shown on a terminal only, and is gone once it is closed.

    Args:
        screen: where it is shown.
        on_stdout: whether that is stdout; then what is printed there meanwhile appears above the bar.
    """

    def __init__(self, screen: Screen, on_stdout: bool = True):
        from rich.progress import BarColumn, Progress, TextColumn  # imported late: most commands show no bar

        before, after = (TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("before", "after"))
        self.shown = screen.is_terminal and not screen.is_dumb_terminal
        self._progress = Progress(before, BarColumn(), after, console=screen, transient=True, redirect_stdout=on_stdout)
        self._task = None

    def show(self, before: str, done: float, total: float | None, after: str) -> None:
        """Show that `done` of `total` is done; a total of None is not known."""
        if self._task is None and self.shown:
            self._task = self._progress.add_task("", total=total, completed=done, before=before, after=after)
            self._progress.start()
        elif self.shown:
            self._progress.update(self._task, completed=done, total=total, before=before, after=after)

    def close(self) -> None:
        """Remove the bar."""
        if self._task is not None:
            self._progress.stop()
            self._progress.remove_task(self._task)
            self._task = None


@contextlib.contextmanager
def progress(
    title: str, total: float | None, unit: str, stream: TextIO | None, done: float = 0
) -> Iterator[Callable[[float], None]]:
    """Show how far some work is, at which rate it goes, and the time that is left.

    On a terminal it is a bar. Elsewhere it is a plain line now and then, the first after some seconds.

    Args:
        title: names the work.
        total: amount of all work; None = not known.
        unit: what is counted, in the plural; B = bytes.
        stream: where to show it; None = nowhere.
        done: amount that was done earlier.

    Yields:
        A function to be called with each amount that has just been done.
    """
    screen = Screen(stream)
    bar, began, first = Bar(screen, stream is sys.stdout), time.monotonic(), None
    due = began + PLAIN[0]

    def advance(amount: float) -> None:
        nonlocal done, due, first
        done, now = done + amount, time.monotonic()
        first = first or (now, done)  # the first part takes longer, as something is compiled or started for it
        rate = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
        if bar.shown:
            bar.show(title, done, total, _pace(done, total, unit, rate))
        elif now >= due:
            screen.print(f"{title:8} {_pace(done, total, unit, rate)}")
            due = now + min(now - began, PLAIN[1])

    if bar.shown:
        bar.show(title, done, total, "")
    elif total is None:
        screen.print(f"{title} ...")
    try:
        yield advance
    finally:
        bar.close()


def _pace(done: float, total: float | None, unit: str, rate: float) -> str:
    """How far some work is, in words."""
    shown = [_amount(done, unit)]
    if total:
        whole = _amount(total, unit)
        shown = [f"{shown[0].removesuffix(f' {unit}')} of {whole}"]
    if rate > 0:
        shown.append(f"{_amount(rate, unit)}/s")
        shown += [f"{clock(max(total - done, 0) / rate)} left"] if total else []
    return ", ".join(shown)


def _amount(n: float, unit: str) -> str:
    if unit == "B":
        return filesize.decimal(int(n))
    return f"{n:,.0f} {unit}" if n >= 10 or n == int(n) else f"{n:.2g} {unit}"


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, from an hour on with hours."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}" if minutes >= 60 else f"{minutes}:{seconds:02}"
