import itertools
import os
import signal
import threading
import time

import pytest

from jaxgpt.text import workers


def square(i):
    return i * i


def die(i):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2])
def test_results_come_with_their_items_in_order(n):
    assert list(workers.in_order(square, iter(range(20)), n)) == [(i, i * i) for i in range(20)]


@pytest.mark.full
def test_items_are_taken_no_further_ahead_than_needed():
    taken = []
    results = workers.in_order(square, (taken.append(i) or i for i in range(1000)), 2)
    assert next(results) == (0, 0)
    assert len(taken) <= 5
    results.close()


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_is_an_error_with_the_remedy():
    with pytest.raises(workers.ProcessError, match=r"killed \(--workers, 2\): free memory"):
        list(workers.in_order(die, range(3), 2))


# In a thread


def test_the_next_one_is_read_while_the_caller_works_and_no_further():
    reads, second = [], threading.Event()

    def read(i):
        reads.append(i)
        if i == 1:
            second.set()
        return i * i

    results = workers.prefetched(read, itertools.count())
    assert next(results) == 0
    assert second.wait(10)
    time.sleep(0.05)
    assert reads == [0, 1]
    assert list(itertools.islice(results, 3)) == [1, 4, 9]
    results.close()


def test_all_results_come_in_order_and_then_no_more():
    assert list(workers.prefetched(str, range(5))) == list("01234")
    assert list(workers.prefetched(str, [])) == []


def test_what_reading_raises_is_raised_in_its_turn():
    results = workers.prefetched(lambda i: 1 // (2 - i), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_closing_waits_for_no_more_than_the_read_in_flight():
    gate, threads = threading.Event(), threading.active_count()

    def read(i):
        if i:
            gate.wait(10)
        return i

    results = workers.prefetched(read, range(1000))
    assert next(results) == 0
    threading.Timer(0.1, gate.set).start()
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 5
    time.sleep(0.2)
    assert threading.active_count() == threads
