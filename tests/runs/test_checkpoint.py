import itertools
import json
import shutil
import threading
import warnings

import chex
import jax
import jax.numpy as jnp
import pytest
from etils import epath

from jaxgpt.config import RunConfig
from jaxgpt.devices import processes
from jaxgpt.errors import CheckpointError
from jaxgpt.files.storage import StorageError
from jaxgpt.runs import manifest
from jaxgpt.runs.checkpoint import Checkpoints, CheckpointWarning


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
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5.*saved steps are 1, 2"):
        saved(tmp_path, [1.0, 2.0]).restore(5, state(0))


@pytest.mark.parametrize(
    "like", [state(0, rows=3), {"other": jnp.zeros(1)}, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state(0))]
)
def test_arrays_of_another_shape_name_or_type_are_refused(tmp_path, like):
    with pytest.raises(CheckpointError, match="holds a different array"):
        saved(tmp_path, [1.0]).restore(1, like)


def test_what_orbax_cannot_read_is_an_error_in_our_words(tmp_path):
    checkpoints = saved(tmp_path, [1.0])
    for file in (tmp_path / "1" / "state").rglob("*"):
        if file.is_file() and "manifest" in file.name:
            file.write_bytes(b"")
    facts = manifest.read(epath.Path(tmp_path / "1"))
    manifest.write(epath.Path(tmp_path / "1"), {name: facts[name] for name in ("step", "arrays")})
    with pytest.raises(CheckpointError, match="checkpoint 1 cannot be read"):
        checkpoints.restore(1, state(0))


def test_a_link_is_no_step(tmp_path):
    """It may lead out of the run directory, where something else may be removed or changed."""
    saved(tmp_path / "a", [1.0, 2.0])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2").symlink_to(tmp_path / "a" / "2")
    checkpoints = Checkpoints(tmp_path / "b", keep=1)
    assert checkpoints.steps() == [] and checkpoints.newest(9) is None
    for step in (3, 4):
        checkpoints.save(step, state(step), facts())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["2", "4"]
    assert Checkpoints(tmp_path / "a").find_damage(2) is None


def test_a_name_that_is_no_plain_number_is_no_step(tmp_path):
    saved(tmp_path, [1.0, 2.0])
    (tmp_path / "1").rename(tmp_path / "01")
    (tmp_path / "2").rename(tmp_path / "٢")  # a digit, too, says Python
    assert Checkpoints(tmp_path).steps() == []


def damage(folder):
    file = max((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    return file.name


def test_a_damaged_step_is_set_aside_by_name_and_the_newest_undamaged_one_is_used(tmp_path):
    saved(tmp_path, [1.0, 3.0, 2.0], keep=3)
    name = damage(tmp_path / "3")
    with pytest.warns(CheckpointWarning, match=rf"checkpoint 3 .*{name} has sha256 .*set aside as 3.corrupt"):
        assert Checkpoints(tmp_path).newest(1) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3.corrupt"]
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(3), facts(2.0))
    checkpoints.close()
    damage(tmp_path / "3")
    with pytest.warns(CheckpointWarning, match="set aside as 3.corrupt2"):
        assert Checkpoints(tmp_path).newest(1) == 2


def test_where_all_are_damaged_nothing_begins_again_in_silence(tmp_path):
    saved(tmp_path, [1.0, 2.0])
    for step in ("1", "2"):
        damage(tmp_path / step)
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match=r"1.corrupt, 2.corrupt\): restore one"):
        Checkpoints(tmp_path).newest(1)
    with pytest.raises(CheckpointError, match=r"1.corrupt, 2.corrupt\): restore one"):
        Checkpoints(tmp_path).newest(1)


def test_a_step_cut_off_in_the_first_save_begins_again_and_a_later_one_does_not(tmp_path):
    saved(tmp_path, [1.0, 2.0])
    for step in ("1", "2"):
        (tmp_path / step / "manifest.json").unlink()
    with pytest.warns(CheckpointWarning, match="checkpoint 2 was never finished"):
        assert Checkpoints(tmp_path).newest(interval=2) is None
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match=r"1, 2\): restore one"):
        Checkpoints(tmp_path).newest(interval=1)


def test_a_reader_uses_the_best_undamaged_step_and_changes_nothing(tmp_path):
    saved(tmp_path, [2.0, 1.0, 3.0], keep=3)
    damage(tmp_path / "2")
    with pytest.warns(CheckpointWarning, match="checkpoint 2 is damaged"):
        assert Checkpoints(tmp_path).read_best(lambda step: step) == 1
    (tmp_path / "1" / "manifest.json").write_text("{")
    with pytest.warns(CheckpointWarning, match="checkpoint 2 is damaged"):
        assert Checkpoints(tmp_path).read_best(lambda step: step) == 3
    damage(tmp_path / "3")
    with pytest.warns(CheckpointWarning), pytest.raises(CheckpointError, match="no usable checkpoint is left"):
        Checkpoints(tmp_path).read_best(lambda step: step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"]
    with pytest.raises(CheckpointError, match="checkpoint 3 is damaged"):
        Checkpoints(tmp_path).restore(3, state(0))


def test_a_step_of_another_format_is_left_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    saved(tmp_path, [1.0])
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, but this jaxgpt reads format 1"):
        Checkpoints(tmp_path).newest(1)
    assert (tmp_path / "1").is_dir()


def test_removing_a_step_begins_with_its_manifest(tmp_path, monkeypatch):
    checkpoints = saved(tmp_path, [2.0, 1.0])
    seen = []
    path = type(epath.Path(tmp_path))
    monkeypatch.setattr(path, "rmtree", lambda self: seen.append(sorted(each.name for each in self.iterdir())))
    checkpoints.save(3, state(3), facts(0.5))
    checkpoints.close()
    assert seen == [["state"]]


def test_too_little_space_is_known_before_the_first_save(tmp_path, monkeypatch):
    like = {"a": jax.ShapeDtypeStruct((1000, 250), jnp.float32)}  # 1 MB
    monkeypatch.setattr("jaxgpt.files.storage.free", lambda path: 2_500_000)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.check_space(like, saves=2)
    with pytest.raises(StorageError, match=rf"{tmp_path}, 2.50 MB free, 3 checkpoints of 1.00 MB.*--run.keep"):
        checkpoints.check_space(like, saves=9)
    saved(tmp_path, [1.0])
    checkpoints.check_space(like, saves=9)  # one of the three is there


def test_a_save_that_fails_is_an_error_that_names_path_and_space_and_leaves_the_earlier_steps(tmp_path, monkeypatch):
    saved(tmp_path, [1.0])
    checkpoints = Checkpoints(tmp_path)

    def fail():
        raise ValueError("OUT_OF_RANGE: Failed to write 9 bytes: No space left on device [os_error_code='28']")

    monkeypatch.setattr(checkpoints._orbax, "wait_until_finished", fail)
    with pytest.raises(StorageError, match=rf"{tmp_path}, No space left on device, [\d,.]+ [MG]B free"):
        checkpoints.save(2, state(2), facts())  # orbax waits for its last save in there
        checkpoints.wait()
    monkeypatch.undo()
    assert Checkpoints(tmp_path).newest(1) == 1


@pytest.mark.parametrize("field", ["checkpoint_interval", "keep"])
def test_counts_start_at_one(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        RunConfig(**{field: 0})


def test_a_reader_takes_the_next_best_step_when_training_removes_the_one_it_reads(tmp_path, recwarn):
    """At each of the three moments at which a step can vanish, and for the manifest alone as for the whole folder."""
    for moment, vanish in itertools.product(("damage", "manifest", "restore"), (shutil.rmtree, remove_manifest)):
        folder = tmp_path / f"{moment}-{vanish.__name__}"
        folder.mkdir()
        saved(folder, [1.0, 2.0, 3.0], keep=3)
        checkpoints, gone = Checkpoints(folder), []

        def at(when, step, moment=moment, vanish=vanish, folder=folder, gone=gone):
            if when == moment and step == 1 and not gone:
                vanish(folder / "1")
                gone.append(step)

        find_damage = checkpoints.find_damage
        checkpoints.find_damage = lambda step, at=at, find=find_damage: (at("damage", step), find(step))[1]

        def read(step, at=at, checkpoints=checkpoints):
            at("manifest", step)
            checkpoints.manifest(step)
            at("restore", step)
            return step, checkpoints.restore(step, state(0))

        with checkpoints:
            step, found = checkpoints.read_best(read)
        assert gone == [1] and step == 2, moment
        chex.assert_trees_all_equal(found, state(2))
    assert not recwarn.list


def remove_manifest(folder):
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "state")


def test_a_run_that_only_writes_is_read_at_any_moment(tmp_path):
    """A reader in a loop beside a writer that keeps two steps: no error, no warning, always a whole state."""
    saved(tmp_path, [1.0])
    stop, failed = threading.Event(), []

    def reader():
        with warnings.catch_warnings(action="error"):
            while not stop.is_set():
                try:
                    with Checkpoints(tmp_path) as checkpoints:
                        step, found = checkpoints.read_best(lambda step: (step, checkpoints.restore(step, state(0))))
                    chex.assert_trees_all_equal(found, state(step))
                except Exception as error:
                    failed.append(error)
                    return

    thread = threading.Thread(target=reader)
    thread.start()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in range(2, 12):
            checkpoints.save(step, state(step), {"val_loss": 1.0 / step})
    stop.set()
    thread.join()
    assert not failed


def test_losses_of_another_text_do_not_make_a_step_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, (text, loss) in enumerate([("a", 1.0), ("a", 0.5), ("b", 3.0), ("b", 2.0), ("b", 4.0)], 1):
            checkpoints.save(step, state(step), {"val_loss": loss, "corpus_sha256": text})
        checkpoints.wait()
        assert checkpoints.best() == 4


@pytest.mark.parametrize(
    "name", [".DS_Store", "Thumbs.db", "desktop.ini", "._x", ".nfs0001", "a~", "ehthumbs_vista.db"]
)
def test_what_file_managers_leave_behind_is_no_damage(tmp_path, name):
    saved(tmp_path, [1.0])
    (tmp_path / "1" / "state" / name).write_text("x")
    (tmp_path / "1" / name).write_text("x")
    assert Checkpoints(tmp_path).find_damage(1) is None


def test_an_error_about_a_lost_process_is_not_taken_for_one_about_the_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, [1.0])

    class Orbax:
        def restore(self, *_, **__):
            raise ValueError("Gloo all-reduce failed: Connection closed by peer")

    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setitem(vars(checkpoints), "_orbax", Orbax())
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoints.restore(1, state(0))
    monkeypatch.setattr(processes, "is_multi_process", lambda: True)
    with pytest.raises(ValueError, match=r"^Gloo"):
        checkpoints.restore(1, state(0))
