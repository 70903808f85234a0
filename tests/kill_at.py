"""`jaxgpt`, killed at a named point: python tests/kill_at.py POINT COUNT train ..., the COUNTth time there."""

import os
import pathlib
import signal
import sys

import orbax.checkpoint as ocp
from etils import epath

from jaxgpt import cli, loop
from jaxgpt.files import storage
from jaxgpt.runs import checkpoint, directory, manifest

FOLDER = type(epath.Path("/"))


def die(*_, **__):
    """What the kernel does for `kill -9`: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def remove_half(folder):
    """Every second file, and then no more."""
    for path in sorted(path for path in pathlib.Path(folder).rglob("*") if path.is_file())[::2]:
        path.unlink()
    die()


# where the patched function is, its name, what runs instead of it or, if None, after it
POINTS = {
    "before the first small file": (directory.RunDirectory, "begin", die),
    "between config.yaml and its name": (storage, "replace", lambda file, path: str(path).endswith("yaml") and die()),
    "in a step": (loop.TrainingLoop, "log", die),
    "before a save": (checkpoint.Checkpoints, "save", die),
    "while arrays are written": (ocp.AsyncCheckpointer, "save", None),
    "before the manifest": (manifest, "write", die),
    "between the manifest and its name": (
        storage,
        "replace",
        lambda file, path: str(path).endswith("manifest.json") and die(),
    ),
    "after the manifest": (manifest, "write", None),
    "in deletion, after its manifest": (FOLDER, "rmtree", die),
    "in deletion, half done": (FOLDER, "rmtree", remove_half),
    "after the last step": (checkpoint.Checkpoints, "close", die),
}


def arm(point: str, count: int) -> None:
    """Patch the function."""
    owner, name, instead = POINTS[point]
    original, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        # a replacement that returns lets the call through and does not count
        calls.append(1)
        if len(calls) >= count and instead is not None:
            instead(*args, **kwargs)
        result = original(*args, **kwargs)
        if len(calls) >= count and instead is None:
            die()
        return result

    setattr(owner, name, patched)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.exit(cli.main(sys.argv[3:]))
