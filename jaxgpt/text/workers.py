"""A function of many items in several processes, in the order of the items."""

import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from jaxgpt.errors import JaxgptError

A, B = TypeVar("A"), TypeVar("B")


class ProcessError(JaxgptError, RuntimeError):
    """A worker process was killed, nearly always by the kernel because memory ran out."""

    exit_code = 9


def in_order(function: Callable[[A], B], items: Iterable[A], processes: int) -> Iterator[tuple[A, B]]:
    """Each item with `function(item)`, computed in processes, at most two in flight for each.

    The processes are spawned: a fork would copy jax's threads in the middle of what they do.

    Raises:
        ProcessError: a process was killed.
    """
    if processes == 1:
        yield from ((item, function(item)) for item in items)
        return
    spawn, flying = multiprocessing.get_context("spawn"), collections.deque()
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, _start_process)
    try:
        for item in items:
            flying.append((item, pool.submit(function, item)))
            if len(flying) >= 2 * processes:
                item, future = flying.popleft()
                yield item, future.result()
        for item, future in flying:
            yield item, future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ProcessError(
            f"a process was killed (--workers, {processes}): free memory, or use fewer; the same command carries on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """Signals are for the parent; should it be killed, nobody would end this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
