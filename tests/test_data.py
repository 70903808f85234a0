import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import data

TOKENS = jnp.arange(100, dtype=jnp.uint8)


def batch(seed, step, batch_size=4, tokens=TOKENS):
    (windows,) = data.windows(jax.random.key(seed), tokens, jnp.array([step]), batch_size, 8)
    return data.inputs_and_targets(windows)


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = batch(0, 3, batch_size=5)
    chex.assert_shape([inputs, targets], (5, 8))
    chex.assert_type([inputs, targets], jnp.int32)
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(np.diff(inputs, axis=1), 1)


def test_a_batch_depends_on_key_and_step_only():
    one = batch(0, 7)
    whole = data.windows(jax.random.key(0), TOKENS, jnp.arange(5, 10), 4, 8)  # also among other steps
    chex.assert_trees_all_equal(one, batch(0, 7), data.inputs_and_targets(whole[2]))
    for other in (batch(1, 7), batch(0, 8)):
        assert (one[0] != other[0]).any()


def test_every_window_can_be_drawn_and_none_beyond_the_split():
    inputs, targets = batch(0, 0, batch_size=2000, tokens=TOKENS[:20])
    assert set(np.asarray(inputs[:, 0]).tolist()) == set(range(12))  # 12 windows of 8 inputs and their targets
    assert targets.max() == 19
    counts = np.bincount(inputs[:, 0])
    assert counts.min() > 0.6 * counts.mean()  # 5 sigma for 2,000 draws of 12


def test_splits_never_overlap_and_lose_nothing():
    splits = data.split(np.arange(1000) % 65, 0.9, vocab_size=65, block_size=8)
    assert (len(splits.train), len(splits.val)) == (900, 100)
    np.testing.assert_array_equal(np.concatenate(splits), np.arange(1000) % 65)


@pytest.mark.parametrize("vocab_size, dtype", [(65, "uint8"), (256, "uint8"), (257, "uint16"), (65_537, "uint32")])
def test_tokens_take_the_smallest_unsigned_type(vocab_size, dtype):
    ids = np.full(100, vocab_size - 1)
    train = data.split(ids, 0.9, vocab_size, block_size=8).train
    chex.assert_type(train, dtype)
    assert train[0] == vocab_size - 1


def test_a_text_shorter_than_a_window_is_named_with_its_numbers():
    with pytest.raises(data.DataError, match=r"\(my.txt, 8 in the validation split, 9 needed for block_size 8\)"):
        data.split(np.zeros(80, int), 0.9, 65, block_size=8, name="my.txt")
    data.split(np.zeros(90, int), 0.9, 65, block_size=8)


@pytest.mark.parametrize("n", [9, 10, 33, 100])
def test_a_pass_in_order_predicts_each_token_but_the_first_once(n):
    tokens, seen = jnp.arange(n, dtype=jnp.uint8), []
    for i in range(data.consecutive_batches(n, batch_size=2, block_size=8)):
        inputs, targets, documents, real = data.consecutive_batch(tokens, i, 2, 8)
        assert documents is None
        chex.assert_shape([inputs, targets, real], (2, 8))
        np.testing.assert_array_equal(targets[real], inputs[real] + 1)
        seen += np.asarray(targets[real]).tolist()
    assert seen == list(range(1, n))


@pytest.mark.parametrize("ends", [[], [3], [1, 2, 3], [8], [4, 4, 9], [16, 17], [20]])
def test_targets_count_where_they_are_in_the_document_of_their_input(ends):
    tokens = np.arange(20)
    documents = np.searchsorted(ends, tokens, side="right")
    (row,) = documents[None, 3:12]
    wanted = [row[t] == row[t + 1] for t in range(8)]
    windows = data.Windows(jnp.asarray(tokens[None, 3:12]), jnp.asarray(documents[None, 3:12]))
    inputs, targets, of_inputs, weights = data.batch(windows)
    chex.assert_trees_all_equal((inputs, targets), data.batch(windows.tokens), data.inputs_and_targets(windows.tokens))
    np.testing.assert_array_equal(of_inputs, row[None, :8])
    np.testing.assert_allclose(weights[0], np.array(wanted) / np.mean(wanted), rtol=1e-6)
    chex.assert_type(weights, jnp.float32)
    seen = []
    for i in range(data.consecutive_batches(20, batch_size=2, block_size=4)):
        inputs, targets, of_inputs, counted = data.consecutive_batch(data.Windows(tokens, documents), i, 2, 4)
        np.testing.assert_array_equal(of_inputs[counted], documents[inputs[counted]])
        seen += np.asarray(targets[counted]).tolist()
    assert seen == [i for i in range(1, 20) if i not in ends]


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"train_fraction": 0.0}, {"train_fraction": 1.0}])
def test_numbers_that_leave_nothing_to_train_on_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        data.DataConfig(**fields)
