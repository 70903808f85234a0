"""Checkpoints of a run directory: orbax writes the arrays, a manifest written last makes a step valid."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

MANIFEST = "manifest.json"
ARRAYS = "state"


class CheckpointError(ValueError):
    """A checkpoint that is not there or cannot be used."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run is kept, and how often."""

    dir: str = ""
    """Run directory, also on an object store (gs://...); the default is runs/<name of the config file>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Continue the run in the directory if there is one, refuse to, or insist on it."""
    init_from: str = ""
    """Run directory to start a new run from: its best weights, its model and its tokenizer, but step 0."""
    checkpoint_interval: int = 250
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the latest checkpoints are kept; the one with the best validation loss is kept besides."""

    def __post_init__(self):
        for name in ("checkpoint_interval", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: use 1 or more")


class Checkpoints:
    """The steps below `<run directory>/checkpoints`."""

    def __init__(self, directory: str | pathlib.Path, keep: int = 2):
        remote = "://" in str(directory)
        self.directory = epath.Path(directory if remote else pathlib.Path(directory).absolute())
        self.keep = keep
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._unfinished: concurrent.futures.Future | None = None

    def steps(self) -> list[int]:
        """The valid steps, oldest first."""
        found = (path.parent for path in self.directory.glob(f"*/{MANIFEST}"))
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def best(self) -> int | None:
        """The step with the lowest validation loss, the latest where none was measured, None where there is no step."""
        steps = self.steps()
        losses = {step: self.manifest(step).get("val_loss") for step in steps}
        measured = [step for step in steps if losses[step] is not None]
        return min(measured, key=losses.__getitem__) if measured else max(steps, default=None)

    def manifest(self, step: int) -> dict[str, Any]:
        """What `save` was told about a step.

        Raises:
            CheckpointError: there is no such valid step.
        """
        path = self.directory / str(step) / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"no checkpoint of step {step} ({self.directory}): there are {there}") from None

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Copy the state off the device and write it in the background; the previous save is finished first.

        Args:
            step: the name of the checkpoint; one that is there already is left alone.
            state: a pytree of arrays.
            facts: what the manifest says besides the step, `val_loss` (float or None) among it.
        """
        self._wait()
        if step in self.steps():
            return
        self._orbax.save(self.directory / str(step) / ARRAYS, args=ocp.args.PyTreeSave(state), force=True)
        manifest = {"step": step, **facts, "arrays": _signature(state)}
        self._unfinished = self._background.submit(self._finish, manifest)

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, or a part of it.

        Args:
            step: a valid step.
            like: the tree wanted, of arrays or their descriptions: shapes, dtypes and shardings.

        Raises:
            CheckpointError: the step is not there, or holds other arrays.
        """
        stored, wanted = self.manifest(step)["arrays"], _signature(like)
        for name, array in wanted.items():
            if stored.get(name) != array:
                raise CheckpointError(
                    f"checkpoint {step} has another array ({self.directory}, {name}: {stored.get(name)}, not {array}): "
                    "use the configuration that it was trained with"
                )
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

    def close(self) -> None:
        """Wait until the last save is on disk and valid."""
        try:
            self._wait()
        finally:
            self._background.shutdown()
            self._orbax.close()

    def _wait(self) -> None:
        if self._unfinished is not None:
            self._unfinished.result()

    def _finish(self, manifest: dict[str, Any]) -> None:
        """Make a step valid once its arrays are in place, and remove those no longer kept (the manifest first)."""
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        folder = self.directory / str(manifest["step"])
        temporary = folder / (MANIFEST + ".tmp")
        with temporary.open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            if "://" not in str(folder):
                os.fsync(file.fileno())
        temporary.replace(folder / MANIFEST)
        for step in set(self.steps()[: -self.keep]) - {self.best()}:
            (self.directory / str(step) / MANIFEST).unlink()
            (self.directory / str(step)).rmtree()


def _signature(tree: Any) -> dict[str, str]:
    """The name and `dtype[shape]` of each array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
