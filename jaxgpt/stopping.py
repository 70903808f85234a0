"""Asked to stop: SIGINT and SIGTERM become a request that a loop sees between two steps."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(Exception):
    """A signal asked the run to stop; all is saved, and the same command continues it."""

    def __init__(self, signal_number: int, step: int, unit: str = "step"):
        super().__init__(f"stopped and saved at {unit} {step:,}: run the same command again to continue")
        self.signal_number = signal_number


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect the signals in the list that is handed out; a second one acts as if nobody listened."""
    asked: list[int] = []
    before: dict[int, object] = {}

    def restore(*_):
        while before:
            signal.signal(*before.popitem())

    def ask(number, _frame):
        asked.append(number)
        restore()

    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        before.update({each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield asked
    finally:
        restore()
