"""`data.sampling: epochs`: each window once per epoch, found without the ones before it."""

import dataclasses

import numpy as np
import pytest

from jaxgpt import step
from jaxgpt.data import DataConfig
from jaxgpt.devices import sharding
from jaxgpt.devices.sharding import MeshConfig
from jaxgpt.text import epochs, mixtures, source
from jaxgpt.text.prepare import PrepareArgs, prepare

KEY = (1337, 1)


def keys(seed):
    return np.random.default_rng(seed).integers(0, 2**64, epochs.ROUNDS, np.uint64)


# The order within an epoch


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 1024, 4097])
def test_an_order_has_every_index_once(size):
    index = np.arange(size)
    for seed in range(10):
        order = epochs.permuted(index, size, keys(seed))
        np.testing.assert_array_equal(np.sort(order), index)
        assert order[size // 2] == epochs.permuted(index[size // 2 : size // 2 + 1], size, keys(seed))[0]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_order_of_a_few_is_as_likely_as_any(size):
    n = 1000
    orders = np.array([epochs.permuted(np.arange(size), size, keys(seed)) for seed in range(n)])
    counts = np.array([np.bincount(at, minlength=size) for at in orders.T])  # how often index i goes to place j
    sigma = (n / size * (1 - 1 / size)) ** 0.5
    assert np.abs(counts - n / size).max() < 5 * sigma


@pytest.mark.parametrize("size", [1000, 100_000, 10**12])
def test_an_order_of_many_has_no_pattern(size):
    order = epochs.permuted(np.arange(1000), size, keys(0))
    steps = np.diff(order)
    assert len(np.unique(steps)) > 600  # a random order of 1000 has about 630 to 750; a stride would have one
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.16 > abs(np.corrcoef(np.arange(1000), order)[0, 1])  # 5 s
    assert 400 < (steps > 0).sum() < 600


# The windows of an epoch


@pytest.mark.parametrize("tokens, block_size", [(1003, 8), (1000, 8), (1000, 1), (17, 8), (16, 8), (2000, 333)])
def test_an_epoch_predicts_every_token_once_but_some_at_the_ends(tokens, block_size):
    n = (tokens - block_size) // block_size
    offsets = set()
    for epoch in range(5):
        starts = epochs.starts(KEY, np.arange(n * epoch, n * (epoch + 1)), tokens, block_size)
        targets = starts[:, None] + np.arange(1, block_size + 1)
        assert starts.min() >= 0 and targets.max() < tokens
        seen = np.bincount(targets.reshape(-1), minlength=tokens)
        assert set(seen[starts.min() + 1 : targets.max() + 1]) == {1}  # consecutive, and none twice
        assert tokens - seen.sum() <= 2 * block_size
        offsets.add(int(starts.min()))
    assert max(offsets) < block_size and (len(offsets) > 1 or block_size == 1)


def test_epochs_seeds_streams_and_folders_have_orders_and_offsets_of_their_own():
    n = (5000 - 32) // 32

    def epoch(i, key=KEY, folder=0):
        return epochs.starts(key, np.arange(n * i, n * (i + 1)), 5000, 32, folder)

    found = [epoch(0), epoch(1), epoch(0, (1338, 1)), epoch(0, (1337, 2)), epoch(0, folder=1)]
    orders = [np.argsort(starts).tolist() for starts in found]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert len({int(starts.min()) for starts in found}) > 2  # of 32


def test_a_window_is_found_without_those_before_it():
    numbers = np.arange(3000)
    whole = epochs.starts(KEY, numbers, 5000, 32)
    for part in (slice(0, 1), slice(7, 2000, 3), slice(2999, None)):
        np.testing.assert_array_equal(epochs.starts(KEY, numbers[part], 5000, 32), whole[part])
    far = epochs.starts(KEY, np.array([10**15]), 9 * 10**9, 1024)  # nothing of this size is listed
    assert 0 <= far[0] < 9 * 10**9 - 1024


@pytest.mark.parametrize("tokens", [9, 10, 12, 15])
def test_a_text_of_less_than_two_windows_is_one_window_anywhere_in_it(tokens):
    starts = epochs.starts(KEY, np.arange(500), tokens, 8)
    assert set(starts.tolist()) == set(range(tokens - 8))


def test_the_windows_of_a_seed_stay_what_they_are():
    """A run that continues with another version must see the same data."""
    numbers = np.array([0, 1, 2, 154, 155, 10**9])
    assert epochs.starts(KEY, numbers, 5000, 32).tolist() == [745, 2793, 2729, 489, 4782, 2365]
    which, before = epochs.turns(KEY, numbers, (0.7, 0.2, 0.1))
    assert (which.tolist(), before.tolist()) == ([0, 0, 1, 1, 0, 0], [0, 1, 0, 28, 110, 699_999_991])


# Mixtures


@pytest.mark.parametrize(
    "weights", [(1.0,), (0.5, 0.5), (0.1, 0.7, 0.2), (0.9999, 0.0001), tuple([0.5 / 99] * 99 + [0.5])]
)
def test_folders_take_turns_by_their_weights(weights):
    n = max(epochs.TURNS, len(weights) ** 2)
    which, before = epochs.turns(KEY, np.arange(5 * n), weights)
    counts = np.zeros(len(weights), int)
    for row, (folder, rank) in enumerate(zip(which, before)):
        assert rank == counts[folder]
        counts[folder] += 1
        if (row + 1) % n == 0:  # the largest takes what the others leave
            error = np.abs(counts - (row + 1) * np.array(weights))
            assert np.delete(error, np.argmax(weights)).max(initial=0) <= 1 and error.max() <= len(weights)


def test_turns_are_mixed_within_a_round_and_found_without_those_before_it():
    numbers = np.arange(3000)
    which, before = epochs.turns(KEY, numbers, (0.25, 0.75))
    for part in (slice(5, 6), slice(0, 2500, 7)):
        np.testing.assert_array_equal(epochs.turns(KEY, numbers[part], (0.25, 0.75)), (which[part], before[part]))
    hundreds = which.reshape(-1, 100).sum(1)
    assert 50 < hundreds.min() and hundreds.max() < 95 and len(set(hundreds.tolist())) > 5  # 5 sigma around 75
    assert (which[:1024] != which[1024:2048]).any()
    assert (which != epochs.turns((7, 1), numbers, (0.25, 0.75))[0]).any()


# Sources


@pytest.fixture
def config(text_file, tmp_path):
    """A text, of which there also is a prepared folder."""
    prepare(PrepareArgs(str(text_file), str(tmp_path / "tokens"), "char", workers=1))
    return DataConfig(path=str(text_file), sampling="epochs")


def opened(config, **fields):
    found = source.open_source(dataclasses.replace(config, **fields))
    found.split(sharding.make_mesh(MeshConfig(1)), 16)
    return found


def test_a_text_and_a_folder_of_it_are_passed_through_in_the_same_order(config, tmp_path):
    text, folder = opened(config), opened(config, path=str(tmp_path / "tokens"))
    mixture = opened(config, path=f"{tmp_path}/tokens=1,{tmp_path}/tokens=3")
    expected = np.asarray(text.windows(step.TRAIN, 3, 0, 30, 100))  # 1,124 windows per epoch
    first = text.splits.train[: len(text.splits.train)]
    at = epochs.starts((3, step.TRAIN), np.arange(3000), len(first), 16)
    np.testing.assert_array_equal(expected.reshape(3000, 17), np.asarray(first)[at[:, None] + np.arange(17)])
    for found in (text, folder):
        fed = found.feed([(0, 20), (20, 1), (21, 9)], 3, 100)
        np.testing.assert_array_equal(np.concatenate([np.asarray(windows) for windows in fed]), expected)
    where = (mixture.splits.train, 3, step.TRAIN, 5, 100, 16)
    which, starts = mixtures.next_windows(*where)
    for rows in (slice(0, 50), slice(50, 100)):
        np.testing.assert_array_equal(mixtures.next_windows(*where, rows), (which[rows], starts[rows]))
    assert 0.6 < which.mean() < 0.9


def test_losses_are_still_estimated_on_random_windows(config, tmp_path):
    for path in (config.path, str(tmp_path / "tokens")):
        plain, found = opened(config, path=path, sampling="random"), opened(config, path=path)
        for stream in (step.ESTIMATE, step.VAL):
            np.testing.assert_array_equal(plain.windows(stream, 3, 0, 2, 4), found.windows(stream, 3, 0, 2, 4))
        assert (np.asarray(plain.windows(step.TRAIN, 3, 0, 2, 4)) != found.windows(step.TRAIN, 3, 0, 2, 4)).any()
