"""Asked to stop: SIGINT and SIGTERM become a request that a loop sees between two steps."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from jaxgpt.errors import JaxgptError


class Stopped(JaxgptError):
    """A signal asked the work to stop; it is saved, and the same command continues it."""

    def __init__(self, signal_number: int, step: int, unit: str = "step"):
        super().__init__(f"stopped and saved at {unit} {step:,}: run the same command again to continue")
        self.signal_number = signal_number
        self.exit_code = 130 if signal_number == signal.SIGINT else 75


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Collect signals; a second one acts as if nobody listened.

    Yields:
        A function that returns the number of the signal that came, None while there was none. Where several processes
        run, each calls it equally often, and all learn at the same call that one of them was asked.
    """
    asked: list[int] = []
    before: dict[int, object] = {}
    several = jax.process_count() > 1
    calls = itertools.count()

    def restore(*_):
        while before:
            signal.signal(*before.popitem())

    def ask(number, _frame):
        asked.append(number)
        restore()
        if several:
            signal.raise_signal(signal.SIGTERM)  # which jax tells to the other processes

    def request() -> int | None:
        if several and not multihost_utils.reached_preemption_sync_point(next(calls)):
            return None
        return asked[0] if asked else signal.SIGTERM if several else None

    # with several processes, jax itself listens for SIGTERM: a handler of ours would take it away
    numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        before.update({each: signal.signal(each, ask) for each in numbers})
    try:
        yield request
    finally:
        restore()
