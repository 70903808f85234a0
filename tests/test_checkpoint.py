import json

import chex
import jax
import jax.numpy as jnp
import pytest

from jaxgpt.checkpoint import CheckpointError, Checkpoints, RunConfig


def state(value, rows=2):
    return {"params": {"blocks": {0: {"kernel": jnp.full((rows, 3), value, jnp.float32)}}}, "step": jnp.int32(value)}


def facts(val_loss=None):
    return {"val_loss": val_loss, "corpus_sha256": "abc"}


def saved(folder, losses, keep=2):
    """Checkpoints 1, 2, 3 ... with these validation losses."""
    checkpoints = Checkpoints(folder, keep)
    for step, loss in enumerate(losses, start=1):
        checkpoints.save(step, state(step), facts(loss))
    checkpoints.close()
    return Checkpoints(folder, keep)


def test_what_is_saved_comes_back_in_the_same_bits(tmp_path):
    like = {"key": jnp.arange(3, dtype=jnp.uint32), "half": jnp.full(3, 0.1, jnp.bfloat16), **state(0.1)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, like, facts())
    checkpoints.close()
    restored = Checkpoints(tmp_path).restore(7, like)
    chex.assert_trees_all_equal(restored, like)
    chex.assert_trees_all_equal_dtypes(restored, like)


def test_a_part_can_be_restored(tmp_path):
    checkpoints = saved(tmp_path, [None])
    assert checkpoints.restore(1, {"params": state(0)["params"]})["params"]["blocks"][0]["kernel"][0, 0] == 1


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = saved(tmp_path, [3.0, 1.0, 2.0, None, 4.0])
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]


def test_without_validation_losses_the_latest_is_best(tmp_path):
    assert saved(tmp_path, [None, None, None]).best() == 3
    assert Checkpoints(tmp_path / "nowhere").best() is None


def test_a_step_without_manifest_does_not_count_and_can_be_saved_again(tmp_path):
    checkpoints = saved(tmp_path, [2.0, 1.0])
    (tmp_path / "2" / "manifest.json").unlink()
    (tmp_path / "9").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.save(2, state(5), facts())
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(2, state(0))["step"] == 5


def test_a_valid_step_is_never_written_twice(tmp_path):
    checkpoints = saved(tmp_path, [2.0])
    checkpoints.save(1, state(9), facts())
    checkpoints.close()
    assert Checkpoints(tmp_path).restore(1, state(0))["step"] == 1


def test_the_manifest_is_written_after_the_arrays_and_says_what_they_are(tmp_path):
    saved(tmp_path, [1.5])
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    assert (manifest["step"], manifest["val_loss"], manifest["corpus_sha256"]) == (1, 1.5, "abc")
    assert manifest["arrays"]["['params']['blocks'][0]['kernel']"] == "float32[2, 3]"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_missing_step_is_named_with_those_there_are(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5.*there are 1, 2"):
        saved(tmp_path, [1.0, 2.0]).restore(5, state(0))


@pytest.mark.parametrize(
    "like", [state(0, rows=3), {"other": jnp.zeros(1)}, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state(0))]
)
def test_arrays_of_another_shape_name_or_type_are_refused(tmp_path, like):
    with pytest.raises(CheckpointError, match="another array"):
        saved(tmp_path, [1.0]).restore(1, like)


def test_damaged_arrays_are_an_error_in_our_words(tmp_path):
    checkpoints = saved(tmp_path, [1.0])
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file() and "manifest" in file.name:
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="checkpoint 1 cannot be read"):
        checkpoints.restore(1, state(0))


@pytest.mark.parametrize("field", ["checkpoint_interval", "keep"])
def test_counts_start_at_one(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        RunConfig(**{field: 0})
