"""Checkpoints of a run directory: orbax writes the arrays, and a manifest, written last, makes a step valid."""

import concurrent.futures
import contextlib
import itertools
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Set
from functools import cached_property
from typing import Any, TypeVar

import jax
from etils import epath

from jaxgpt.devices import processes
from jaxgpt.errors import CheckpointError, JaxgptWarning, shortened
from jaxgpt.files import storage
from jaxgpt.runs import manifest
from jaxgpt.runs.manifest import MANIFEST

A = TypeVar("A")
ARRAYS = "state"
FILES, FILE_BYTES = 64, 8 << 20  # tensorstore keeps each file in memory until it is whole, by default up to 2 GB


class CheckpointWarning(JaxgptWarning):
    """A checkpoint is skipped, or a run continues under different circumstances."""


class Checkpoints:
    """The checkpoints below `<run directory>/checkpoints`, one folder per step.

    Args:
        directory: a local path, or a folder on an object store.
        keep: how many of the latest checkpoints to keep; the best one is kept as well.
    """

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        remote = storage.is_remote(directory)
        self.directory = epath.Path(directory if remote else pathlib.Path(directory).absolute())
        self.keep = keep
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._unfinished: concurrent.futures.Future | None = None
        self._verified: set[int] = set()

    @cached_property
    def _orbax(self):
        import orbax.checkpoint as ocp  # imported late: it takes half a second, and listing steps does not need it

        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    @cached_property
    def _arrays(self) -> epath.Path:
        """The directory by a name that orbax's tensorstore can use."""
        return storage.without_backslash(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Return the steps that have a manifest, oldest first."""
        return [step for step in self._folders() if (self.directory / str(step) / MANIFEST).exists()]

    def best(self, without: Set[int] = frozenset()) -> int | None:
        """Find the step with the lowest validation loss, or the latest if none was measured; None if there is none.

        Losses count only if they were measured on the same validation split as the latest one.
        """
        facts = {step: self._facts(step) for step in self.steps() if step not in without}
        measured = {step: each for step, each in facts.items() if each.get("val_loss") is not None}
        if not measured:
            return max(facts, default=None)
        split = _split(measured[max(measured)])
        comparable = [step for step, each in measured.items() if _split(each) == split]
        return min(comparable, key=lambda step: measured[step]["val_loss"])

    def _last(self, without: Set[int]) -> int | None:
        return max((step for step in self.steps() if step not in without), default=None)

    def manifest(self, step: int) -> dict[str, Any]:
        """Read the manifest of a step: the facts that were given to `save`, and the list of files.

        Raises:
            CheckpointError: there is no such step, or its manifest is damaged.
        """
        folder = self.directory / str(step)
        try:
            return manifest.read(folder)
        except FileNotFoundError:
            saved = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"no checkpoint of step {step} ({self.directory}): saved steps are {saved}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {step} cannot be used ({folder}, {error}): use another step") from None

    def find_damage(self, step: int) -> str | None:
        """Describe the first damage found in a step's files; None if each has the sha256 that it was saved with.

        Raises:
            CheckpointError: a file cannot be read, or another version of jaxgpt wrote the step.
        """
        if step not in self._verified:
            try:
                manifest.verify(self.directory / str(step))
            except (manifest.DamagedError, FileNotFoundError) as error:
                return str(error)
            except (OSError, manifest.OtherFormatError) as error:
                raise CheckpointError(
                    f"checkpoint {step} cannot be read ({self.directory / str(step)}, {error}): fix that, "
                    "or use another step"
                ) from error
            self._verified.add(step)
        return None

    def newest(self, interval: int) -> int | None:
        """Find the newest undamaged step to continue from; only the process that writes here may call this.

        Damaged steps are renamed to `N.corrupt`. A warning names each damaged and each unfinished step.

        Args:
            interval: steps between two checkpoints. An unfinished step beyond it was not the first save.

        Returns:
            The step, or None if nothing was saved yet.

        Raises:
            CheckpointError: checkpoints were saved, but none of them is usable.
        """
        found = None
        for step in reversed(self.steps()):
            damage = self.find_damage(step)
            if damage is None:
                found = step
                break
            self._set_aside(step, damage)
        unfinished = [step for step in self._folders() if found is None or step > found]
        for step in unfinished:
            _warn(f"checkpoint {step} was never finished ({self.directory / str(step)}, no {MANIFEST}): not used")
        aside = sorted(path.name for path in self.directory.glob("*.corrupt*")) if found is None else []
        if found is None and (aside or max(unfinished, default=0) > interval):
            names = ", ".join([*aside, *map(str, unfinished)])
            raise CheckpointError(
                f"no usable checkpoint is left ({self.directory}, {names}): restore one from a copy, "
                "or delete the run directory to start over"
            )
        return found

    def read_best(self, read: Callable[[int], A], last: bool = False) -> A | None:
        """Read the best undamaged step, with a warning for each damaged one. Changes no files.

        The run may be training at the same time. If it removes a step while that is being read, the next best one is
        read, without a word.

        Args:
            read: called with a step; raises CheckpointError if that cannot be read.
            last: read the last undamaged step, and not the best.

        Returns:
            What `read` returned, or None if nothing was saved yet.

        Raises:
            CheckpointError: checkpoints were saved, but none of them is usable.
        """
        damaged: set[int] = set()
        choose = self._last if last else self.best
        while (step := choose(damaged)) is not None:
            try:
                damage = self.find_damage(step)
                if damage is None:
                    return read(step)
            except CheckpointError:
                if step in self.steps():
                    raise
                continue
            if step in self.steps():  # otherwise it has just been removed
                damaged.add(step)
                _warn(f"checkpoint {step} is damaged ({self.directory / str(step)}, {damage}): skipped")
        if damaged:
            raise CheckpointError(f"no usable checkpoint is left ({self.directory}): restore one from a copy")
        return None

    def check_space(self, shapes: Any, saves: int) -> None:
        """Check, before the first step, that the disk has room for the checkpoints to come.

        Args:
            shapes: the state, as arrays or `ShapeDtypeStruct`s.
            saves: the number of checkpoints to be saved.

        Raises:
            StorageError: there is too little space.
        """
        saved, free = len(self.steps()), storage.free(self.directory)
        size = _bytes(shapes)
        more = min(saves, self.keep + 1 - saved)  # the newest is written before the oldest is removed
        if free is not None and more * size > free:
            raise storage.StorageError(
                f"too little space ({self.directory}, {storage.size(free)} free, {more} checkpoints of "
                f"{storage.size(size)}): free space, name another --run.dir, or lower --run.keep"
            )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Copy the state off the device and write it in the background, after waiting for the previous save.

        Args:
            step: names the checkpoint; an existing checkpoint is left alone.
            state: a pytree of arrays.
            facts: further entries of the manifest, as JSON types, including `val_loss` (float or None).

        Raises:
            StorageError: this save or the previous one cannot be written.
        """
        self.wait()
        if step in self.steps():
            return
        import orbax.checkpoint as ocp

        with storage.failures(self.directory):
            if jax.process_index() == 0:
                self._remove(step)  # left behind by a save that was killed
            file_bytes = max(FILE_BYTES, _bytes(state) // FILES)
            request = ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=file_bytes)
            self._orbax.save(self._arrays / str(step) / ARRAYS, args=request, force=True)
        facts = {"step": step, **facts, "arrays": _signature(state)}
        self._unfinished = self._background.submit(self._finish, step, facts)

    def restore(self, step: int, shapes: Any) -> Any:
        """Read the state of a step, or a part of it, as arrays.

        Args:
            step: a valid step.
            shapes: the wanted subtree, as arrays or `ShapeDtypeStruct`s; gives shapes, dtypes and shardings.

        Raises:
            CheckpointError: the step does not exist, is damaged, or holds different arrays.
        """
        stored, wanted = self.manifest(step)["arrays"], _signature(shapes)
        for name, array in wanted.items():
            if stored.get(name) != array:
                raise CheckpointError(
                    f"checkpoint {step} holds a different array ({self.directory}, {name}: {stored.get(name)}, "
                    f"not {array}): use the configuration that it was trained with"
                )
        if jax.process_index() == 0 and (damage := self.find_damage(step)):
            raise CheckpointError(f"checkpoint {step} is damaged ({self.directory}, {damage}): use another step")
        import orbax.checkpoint as ocp

        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, shapes)
        restore_args = ocp.checkpoint_utils.construct_restore_args(shapes)
        request = ocp.args.PyTreeRestore(item=shapes, restore_args=restore_args, partial_restore=True)
        try:
            return self._orbax.restore(self._arrays / str(step) / ARRAYS, args=request)
        except Exception as error:  # orbax and tensorstore raise many kinds
            if isinstance(error, MemoryError | jax.errors.JaxRuntimeError) or processes.lost_peer(error):
                raise
            first = shortened(str(error).strip().partition("\n")[0], 300)
            raise CheckpointError(
                f"checkpoint {step} cannot be read ({self.directory}, {first}): use another step or run directory"
            ) from error

    def wait(self) -> None:
        """Wait until the last save is on disk and valid.

        Raises:
            StorageError: the save cannot be written.
        """
        if self._unfinished is not None:
            self._unfinished.result()

    def close(self) -> None:
        """Wait for the last save, as `wait` does, and stop the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if "_orbax" in vars(self):
                with contextlib.suppress(Exception):  # orbax raises the error of `wait` again
                    self._orbax.close()

    def _folders(self) -> list[int]:
        """The steps that have a folder, oldest first. Links are ignored: they may lead out of the run directory."""
        names = {path.name for path in self.directory.glob("*") if path.is_dir() and not os.path.islink(path)}
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def _facts(self, step: int) -> dict[str, Any]:
        try:
            return self.manifest(step)
        except CheckpointError:
            return {}

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        """Make a step valid once its arrays are written, and remove the steps that are no longer kept."""
        first = jax.process_index() == 0
        try:
            with storage.failures(self.directory):
                self._orbax.wait_until_finished()  # this waits for the other processes, too
                if first:
                    manifest.write(self.directory / str(step), facts)
        except BaseException:
            with contextlib.suppress(OSError):
                if first:
                    self._remove(step)  # a partial checkpoint takes space that the next one needs
            raise
        if first:
            kept = {*self.steps()[-self.keep :], self.best()}
            for other in set(self._folders()) - kept:
                self._remove(other)

    def _remove(self, step: int) -> None:
        """Remove a step, its manifest first: if a kill interrupts this, no valid step is left."""
        folder = self.directory / str(step)
        if folder.exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            storage.sync(folder)
            with contextlib.suppress(OSError):  # another machine may have a file open; the next save tries again
                folder.rmtree()

    def _set_aside(self, step: int, damage: str) -> None:
        folder = self.directory / str(step)
        names = itertools.chain([f"{step}.corrupt"], (f"{step}.corrupt{i}" for i in itertools.count(2)))
        target = next(path for path in (self.directory / name for name in names) if not path.exists())
        folder.rename(target)
        _warn(f"checkpoint {step} is damaged ({folder}, {damage}): set aside as {target.name}")


def _bytes(tree: Any) -> int:
    """The size of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _split(facts: dict[str, Any]) -> tuple:
    """What decides the validation split of a checkpoint."""
    return facts.get("corpus_sha256"), facts.get("config", {}).get("data.train_fraction")


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def _signature(tree: Any) -> dict[str, str]:
    """The name and `dtype[shape]` of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
