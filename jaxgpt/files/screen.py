"""The screen: what is shown there may get lost, and the work goes on."""

import contextlib
import os
from typing import TextIO

from rich.console import Console


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
