"""Checkpoints of a run directory: orbax writes the arrays, a manifest written last makes a step valid."""

import concurrent.futures
import contextlib
import itertools
import math
import os
import pathlib
import warnings
from collections.abc import Set
from functools import cached_property
from typing import Any

import jax
from etils import epath

from jaxgpt.runs import manifest
from jaxgpt.errors import CheckpointError, JaxgptWarning
from jaxgpt.files import storage
from jaxgpt.runs.manifest import MANIFEST

ARRAYS = "state"


class CheckpointWarning(JaxgptWarning):
    """A checkpoint is passed over, or a run continues in other circumstances."""


class Checkpoints:
    """The steps below `<run directory>/checkpoints`."""

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        remote = storage.is_remote(directory)
        self.directory = epath.Path(directory if remote else pathlib.Path(directory).absolute())
        self.keep = keep
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._unfinished: concurrent.futures.Future | None = None
        self._verified: set[int] = set()

    @cached_property
    def _orbax(self):
        import orbax.checkpoint as ocp  # here, since it takes half a second: whatever only asks for steps does without

        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that have a manifest, oldest first."""
        return [step for step in self._folders() if (self.directory / str(step) / MANIFEST).exists()]

    def best(self, without: Set[int] = frozenset()) -> int | None:
        """The step with the lowest validation loss, the latest where none was measured, None where there is no step."""
        losses = {step: self._val_loss(step) for step in self.steps() if step not in without}
        measured = [step for step in losses if losses[step] is not None]
        return min(measured, key=losses.__getitem__) if measured else max(losses, default=None)

    def manifest(self, step: int) -> dict[str, Any]:
        """What `save` was told about a step.

        Raises:
            CheckpointError: there is no such step, or its manifest is damaged.
        """
        folder = self.directory / str(step)
        try:
            return manifest.read(folder)
        except FileNotFoundError:
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"no checkpoint of step {step} ({self.directory}): there are {there}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"checkpoint {step} cannot be used ({folder}, {error}): use another step") from None

    def find_damage(self, step: int) -> str | None:
        """What is wrong with a step's files, None where each has the sha256 that it was saved with.

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
                    f"checkpoint {step} cannot be read ({self.directory / str(step)}, {error}): repair that, "
                    "or use another step"
                ) from error
            self._verified.add(step)
        return None

    def newest(self, interval: int) -> int | None:
        """The newest undamaged step to continue from, for the one process that writes here.

        Damaged steps are set aside as `N.corrupt`; those and the unfinished ones are named in warnings.

        Args:
            interval: steps between two checkpoints; the first save cannot have been cut off behind it.

        Returns:
            The step, None where nothing was saved yet.

        Raises:
            CheckpointError: something was saved, and nothing of it can be used.
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
                f"no checkpoint is left that can be used ({self.directory}, {names}): restore one from a copy, "
                "or delete the run directory to begin again"
            )
        return found

    def best_undamaged(self) -> int | None:
        """The best step, leaving out damaged ones with a warning; None where nothing was saved yet. Changes nothing.

        Raises:
            CheckpointError: something was saved, and nothing of it can be used.
        """
        damaged: set[int] = set()
        while (step := self.best(damaged)) is not None and (damage := self.find_damage(step)):
            if step in self.steps():  # else the run that trains here has just removed it
                damaged.add(step)
                _warn(f"checkpoint {step} is damaged ({self.directory / str(step)}, {damage}): it is not used")
        if step is None and damaged:
            raise CheckpointError(f"no checkpoint is left that can be used ({self.directory}): restore one from a copy")
        return step

    def check_space(self, like: Any, saves: int) -> None:
        """Find out before the first step whether the saves to come have room.

        Args:
            like: the state, as arrays or their descriptions.
            saves: how many will be made.

        Raises:
            StorageError: they have not.
        """
        there, room = len(self.steps()), storage.free(self.directory)
        each = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        more = min(saves, self.keep + 1 - there)  # the last one is written before the first one is removed
        if room is not None and more * each > room:
            raise storage.StorageError(
                f"too little space ({self.directory}, {storage.size(room)} free, {more} checkpoints of "
                f"{storage.size(each)}): free space, name another --run.dir, or lower --run.keep"
            )

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Copy the state off the device and write it in the background; the previous save is finished first.

        Args:
            step: the name of the checkpoint; one that is there already is left alone.
            state: a pytree of arrays.
            facts: what the manifest says besides the step, `val_loss` (float or None) among it.

        Raises:
            StorageError: this save or the previous one cannot be written.
        """
        self.wait()
        if step in self.steps():
            return
        import orbax.checkpoint as ocp

        with storage.failures(self.directory):
            if jax.process_index() == 0:
                self._remove(step)  # what a killed save left
            self._orbax.save(self.directory / str(step) / ARRAYS, args=ocp.args.PyTreeSave(state), force=True)
        facts = {"step": step, **facts, "arrays": _signature(state)}
        self._unfinished = self._background.submit(self._finish, step, facts)

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, or a part of it.

        Args:
            step: a valid step.
            like: the tree wanted, of arrays or their descriptions: shapes, dtypes and shardings.

        Raises:
            CheckpointError: the step is not there, is damaged, or holds other arrays.
        """
        stored, wanted = self.manifest(step)["arrays"], _signature(like)
        for name, array in wanted.items():
            if stored.get(name) != array:
                raise CheckpointError(
                    f"checkpoint {step} has another array ({self.directory}, {name}: {stored.get(name)}, not {array}): "
                    "use the configuration that it was trained with"
                )
        if jax.process_index() == 0 and (damage := self.find_damage(step)):
            raise CheckpointError(f"checkpoint {step} is damaged ({self.directory}, {damage}): use another step")
        import orbax.checkpoint as ocp

        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        request = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
        try:
            return self._orbax.restore(self.directory / str(step) / ARRAYS, args=request)
        except (ValueError, OSError, KeyError, TypeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"checkpoint {step} cannot be read ({self.directory}, {first}): use another step or run directory"
            ) from error

    def wait(self) -> None:
        """Return when the last save is on disk and valid.

        Raises:
            StorageError: it cannot be written.
        """
        if self._unfinished is not None:
            self._unfinished.result()

    def close(self) -> None:
        """Wait for the last save, as `wait`, and end the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if "_orbax" in vars(self):
                with contextlib.suppress(Exception):  # orbax repeats what `wait` has raised
                    self._orbax.close()

    def _folders(self) -> list[int]:
        """The steps that have a folder, oldest first. A link is none: it may lead out of the run directory."""
        names = {path.name for path in self.directory.glob("*") if path.is_dir() and not os.path.islink(path)}
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    def _val_loss(self, step: int) -> float | None:
        try:
            return self.manifest(step).get("val_loss")
        except CheckpointError:
            return None

    def _finish(self, step: int, facts: dict[str, Any]) -> None:
        """Make a step valid once its arrays are in place, and remove those no longer kept."""
        first = jax.process_index() == 0
        try:
            with storage.failures(self.directory):
                self._orbax.wait_until_finished()  # which waits for what the other processes write, too
                if first:
                    manifest.write(self.directory / str(step), facts)
        except BaseException:
            with contextlib.suppress(OSError):
                if first:
                    self._remove(step)  # half of a checkpoint takes space away from the next one
            raise
        if first:
            kept = {*self.steps()[-self.keep :], self.best()}
            for other in set(self._folders()) - kept:
                self._remove(other)

    def _remove(self, step: int) -> None:
        """The manifest goes first: what a kill in between leaves is no valid step."""
        folder = self.directory / str(step)
        if folder.exists():
            (folder / MANIFEST).unlink(missing_ok=True)
            storage.sync(folder)
            with contextlib.suppress(OSError):  # a file that somebody reads on a network; the next save tries again
                folder.rmtree()

    def _set_aside(self, step: int, damage: str) -> None:
        folder = self.directory / str(step)
        names = itertools.chain([f"{step}.corrupt"], (f"{step}.corrupt{i}" for i in itertools.count(2)))
        target = next(path for path in (self.directory / name for name in names) if not path.exists())
        folder.rename(target)
        _warn(f"checkpoint {step} is damaged ({folder}, {damage}): set aside as {target.name}")


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)


def _signature(tree: Any) -> dict[str, str]:
    """The name and `dtype[shape]` of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
