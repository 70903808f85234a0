"""The base of a LoRA run: a checkpoint of the run that it started from, whose weights stay frozen.

It is held in `base/<step>` of the run directory, so that the directory can be moved, and the other run be removed. The
checkpoints of a LoRA run have only the adapters; their manifests name the base by its hash.
"""

import hashlib
import os
import shutil
from typing import Any

import jax
from etils import epath

from jaxgpt.errors import CheckpointError
from jaxgpt.files import storage
from jaxgpt.runs import manifest
from jaxgpt.runs.checkpoint import Checkpoints
from jaxgpt.runs.manifest import MANIFEST

BASE = "base"


def keep(checkpoint: epath.Path, run_dir: str) -> bool:
    """Take a checkpoint of another run into a run directory, by hard links or else by copies.

    Args:
        checkpoint: its folder; the step has been verified.
        run_dir: a run directory without checkpoints of its own. An older base in it is replaced.

    Returns:
        True.

    Raises:
        CheckpointError: the checkpoint is no longer there.
        OSError: the run directory cannot be written.
    """
    base = epath.Path(run_dir) / BASE
    if base.exists():  # of a start that was killed before the first checkpoint
        base.rmtree()
    folder = base / checkpoint.name
    names = [*manifest.read(checkpoint)["files"], MANIFEST]  # the manifest comes last, as it makes the step valid
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            _link_or_copy(checkpoint / name, folder / name)
        except FileNotFoundError:
            raise CheckpointError(f"the checkpoint was removed meanwhile ({checkpoint}): start again") from None
    for level in sorted({(folder / name).parent for name in names} | {base, base.parent}, reverse=True):
        storage.sync(level)
    return True


def _link_or_copy(source: epath.Path, target: epath.Path) -> None:
    if not storage.is_remote(source) and not storage.is_remote(target):
        try:
            os.link(source, target)
            return
        except FileNotFoundError:
            raise
        except OSError:  # another disk, or one that has no hard links
            pass
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write)
    storage.sync(target)


def identity(run_dir: str | os.PathLike) -> dict[str, Any]:
    """Return how the manifests of a LoRA run name its base: its step, and the sha256 of its manifest.

    That manifest has the sha256 of each file of the base.

    Raises:
        CheckpointError: there is no base.
    """
    with Checkpoints(f"{run_dir}/{BASE}") as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"the base is missing ({run_dir}/{BASE}): {_remedy(run_dir)}")
    content = (checkpoints.directory / str(steps[0]) / MANIFEST).read_bytes()
    return {"step": steps[0], "sha256": hashlib.sha256(content).hexdigest()}


def verify(checkpoints: Checkpoints, named: dict[str, Any]) -> None:
    """Check that a base is the one that a manifest names, and undamaged.

    Args:
        checkpoints: those in the folder `base`.
        named: from the manifest; see `identity`.

    Raises:
        CheckpointError: it is another one, or is missing or damaged.
    """
    run_dir = checkpoints.directory.parent
    found = identity(run_dir)
    if found != named:
        was, now = (f"step {each['step']}, sha256 {each['sha256']}" for each in (named, found))
        raise CheckpointError(f"not the base of this run ({run_dir}/{BASE}, {now}, was {was}): {_remedy(run_dir)}")
    # in one process of several, as in `Checkpoints.restore`
    damage = checkpoints.find_damage(named["step"]) if jax.process_index() == 0 else None
    if damage:
        folder = checkpoints.directory / str(named["step"])
        raise CheckpointError(f"the base is damaged ({folder}, {damage}): {_remedy(run_dir)}")


def _remedy(run_dir: str | os.PathLike) -> str:
    return f"restore {BASE}/ from a copy of the run directory"


def uncut(checkpoints: Checkpoints, step: int, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes with the position table as long as the base has it, since a run may have a shorter context.

    Args:
        checkpoints: those in the folder `base`.
        step: of the base.
        shapes: nested dict of `jax.ShapeDtypeStruct`s.
    """
    stored = checkpoints.manifest(step)["arrays"].get("['params']['position_embedding_table']['embedding']")
    if stored is None or "position_embedding_table" not in shapes:
        return shapes
    like = shapes["position_embedding_table"]["embedding"]
    rows = int(stored.partition("[")[2].partition(",")[0])  # such as float32[1024, 768]
    table = jax.ShapeDtypeStruct((rows, *like.shape[1:]), like.dtype, sharding=like.sharding)
    return shapes | {"position_embedding_table": {"embedding": table}}
