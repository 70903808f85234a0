"""Mapping a function over items, with the results in order: in worker processes, or in a thread that runs ahead."""

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
    """Yield each item with `function(item)`, computed in worker processes.

    The processes are spawned, because a fork is unsafe while JAX's threads are running.

    Args:
        function: picklable; called with one item.
        items: read lazily, at most two per process ahead of the caller.
        processes: number of worker processes; 1 = compute in this process.

    Raises:
        ProcessError: a worker process was killed.
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
            f"a process was killed (--workers, {processes}): free memory, or use fewer; the same command continues"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def prefetched(read: Callable[[A], B], arguments: Iterable[A]) -> Iterator[B]:
    """Yield `map(read, arguments)`, with a thread reading one item ahead of the caller.

    An exception of `read` is raised here when its item is due. Closing the iterator waits for at most one read.
    """
    with concurrent.futures.ThreadPoolExecutor(1, "prefetch") as thread:
        ahead = None
        for argument in arguments:
            current, ahead = ahead, thread.submit(read, argument)
            if current is not None:
                yield current.result()
        if ahead is not None:
            yield ahead.result()


def _start_process() -> None:
    """Leave signals to the parent, and exit when it dies, as nobody else would end this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
