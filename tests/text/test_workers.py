import os
import signal

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
