import io
import os
import sys

import pytest

from jaxgpt.files.screen import Lenient, Screen, flush_or_drop


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
