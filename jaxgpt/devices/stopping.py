"""The signal handler: SIGINT and SIGTERM become a request to stop, which a loop checks between two steps."""

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from jaxgpt.errors import JaxgptError


class Stopped(JaxgptError):
    """A signal stopped the work. The state is saved, and the same command continues from it."""

    def __init__(self, signal_number: int, step: int, unit: str = "step"):
        super().__init__(f"stopped and saved at {unit} {step:,}: run the same command again to continue")
        self.signal_number = signal_number
        self.exit_code = 130 if signal_number == signal.SIGINT else 75


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int | None]]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a second one has its usual effect.

    Yields:
        A function that returns the number of the signal, or None if none has arrived. With several processes, each must
        call it equally often, and it reports a signal to one of them at the same call in all of them.
    """
    asked: list[int] = []
    before: dict[int, object] = {}
    multi_process = jax.process_count() > 1
    calls = itertools.count()

    def restore(*_):
        while before:
            signal.signal(*before.popitem())

    def ask(number, _frame):
        asked.append(number)
        restore()
        if multi_process:
            signal.raise_signal(signal.SIGTERM)  # JAX passes it on to the other processes

    def request() -> int | None:
        if multi_process and not multihost_utils.reached_preemption_sync_point(next(calls)):
            return None
        return asked[0] if asked else signal.SIGTERM if multi_process else None

    # with several processes, JAX has its own SIGTERM handler, which ours would replace
    numbers = (signal.SIGINT,) if multi_process else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
        before.update({each: signal.signal(each, ask) for each in numbers})
    try:
        yield request
    finally:
        restore()
