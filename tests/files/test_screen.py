import io
import os
import sys

import pytest

from jaxgpt.files import screen as screens
from jaxgpt.files.screen import Lenient, Screen, clock, flush_or_drop, progress


class Broken(io.TextIOBase):
    """A stream on which writing, or only flushing, fails."""

    encoding = "utf-8"

    def __init__(self, error, at):
        self.error, self.at, self.tried = error, at, 0

    def write(self, text):
        return self._fail("write") or len(text)

    def flush(self):
        self._fail("flush")

    def _fail(self, where):
        if where == self.at:
            self.tried += 1
            raise self.error


@pytest.mark.parametrize("at", ["write", "flush"])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "pipe"), OSError(5, "gone"), OSError(28, "full"), ValueError("closed")]
)
def test_a_stream_that_fails_is_given_up_and_nothing_is_raised(error, at):
    stream = Broken(error, at)
    lenient, screen = Lenient(stream), Screen(stream)
    for _ in range(3):
        assert lenient.write("a") == 1
        lenient.flush()
        screen.print("b")
    assert stream.tried <= 4  # twice for each of the two, the second time to drop what is left


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8", "shift_jis"])
def test_a_character_that_cannot_be_shown_is_escaped(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Lenient(stream).write("a\u4e2d\u2713\u20ac\xe9\n")
    Screen(stream).print("\u4e2d \u2713 \u20ac \xe9")
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert shown.startswith("a") and ("\\u2713" in shown) == (encoding != "utf-8")


def test_there_may_be_no_stream_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    Screen(sys.stdout).print("nobody")
    lenient = Lenient(None)
    lenient.flush()
    assert lenient.write("abc") == 3 and not lenient.isatty() and lenient.encoding == "utf-8"
    with pytest.raises(OSError):
        lenient.fileno()


def test_what_a_broken_pipe_holds_is_dropped():
    read, write = os.pipe()
    stream = os.fdopen(write, "w")
    stream.write("x" * 10)
    os.close(read)
    with pytest.raises(BrokenPipeError):
        stream.flush()
    flush_or_drop(stream)
    assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    stream.write("y")
    stream.close()  # which flushes: it goes nowhere now
    assert flush_or_drop(None) is None


@pytest.fixture
def clocked(monkeypatch):
    """A clock that the test moves on."""
    now = [1000.0]
    monkeypatch.setattr(screens.time, "monotonic", lambda: now[0])
    return now


def test_away_from_a_terminal_progress_is_a_plain_line_now_and_then_and_ever_more_rarely(clocked):
    stream, at = io.StringIO(), []
    with progress("tokens", 100_000_000, "B", stream, done=20_000_000) as advance:
        for second in range(1, 81):
            clocked[0] += 1
            before = stream.getvalue()
            advance(1_000_000)
            at += [second] * (stream.getvalue() != before)
    assert at == [10, 20, 40, 80]
    first, *_, last = stream.getvalue().splitlines()
    assert first == "tokens   30.0 MB of 100.0 MB, 1.0 MB/s, 1:10 left"
    assert last == "tokens   100.0 MB of 100.0 MB, 1.0 MB/s, 0:00 left"


@pytest.mark.parametrize(
    ("total", "unit", "says"),
    [
        (None, "B", "w ...\nw        600 bytes, 20 bytes/s\n"),
        (2000, "tokens", "w        600 of 2,000 tokens, 20 tokens/s, 1:10 left\n"),
        (100_000, "tokens", "w        600 of 100,000 tokens, 20 tokens/s, 1:22:50 left\n"),
        (300, "steps", "w        600 of 300 steps, 20 steps/s, 0:00 left\n"),  # a size that was only announced
    ],
)
def test_the_rate_is_that_after_the_first_part_which_starts_or_compiles_something(clocked, total, unit, says):
    stream = io.StringIO()
    with progress("w", total, unit, stream) as advance:
        clocked[0] += 9
        advance(400)
        clocked[0] += 10
        advance(200)
    assert stream.getvalue() == says


def test_short_work_leaves_no_line_and_no_stream_is_needed(capsys):
    for stream in (None, sys.stderr):
        with progress("tokens", 10, "tokens", stream) as advance:
            advance(10)
    assert capsys.readouterr() == ("", "")


class Terminal(io.TextIOWrapper):
    """A terminal that knows some characters only, or whose window has been closed."""

    def __init__(self, encoding, gone=False):
        super().__init__(io.BytesIO(), encoding)
        self.gone = gone

    def isatty(self):
        return True

    def write(self, text):
        if self.gone:
            raise OSError(5, "gone")
        return super().write(text)

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_on_a_terminal_there_is_a_bar_and_what_is_printed_stands_above_it(encoding, monkeypatch, capsys, clocked):
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("文[b]", 40, "steps", sys.stderr) as advance:
        for _ in range(3):
            clocked[0] += 1
            advance(10)
        print("a warning", file=sys.stderr)
        print("the result")
    assert sys.stderr is terminal and capsys.readouterr().out == "the result\n"
    shown = terminal.shown()
    assert "30 of 40 steps, 10 steps/s, 0:01 left" in shown and "a warning" in shown
    assert ("文[b]" if encoding == "utf-8" else "\\u6587[b]") in shown


def test_work_goes_on_when_the_terminal_is_gone_and_an_error_removes_the_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for gone in (True, False):
        terminal, done = Terminal("utf-8", gone), 0
        with pytest.raises(KeyError), progress("tokens", 4, "tokens", terminal) as advance:
            for _ in range(4):
                advance(1)
                done += 1
            raise KeyError
        assert done == 4 and (gone or "\x1b[?25h" in terminal.shown())  # the cursor is back


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_times_are_written_as_on_a_clock(seconds, words):
    assert clock(seconds) == words
