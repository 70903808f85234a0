"""Training with several processes: joining JAX's distributed runtime, and work that only the first process does."""

import ctypes
import dataclasses
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Literal, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxgpt.errors import ArgumentError, JaxgptError
from jaxgpt.settings.checks import check_fields

A = TypeVar("A")


class PeerLostError(JaxgptError, RuntimeError):
    """Another process of the run has died, or the processes never connected."""

    exit_code = 8


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other; start every process with the same command."""

    join: Literal["auto", "always", "never"] = "auto"
    """When to join other processes: auto = if an address is given, or Slurm, Open MPI, Kubernetes or a TPU slice with
    several hosts is detected; always = let JAX find them (TPU pods without such variables)."""
    coordinator_address: str | None = None
    """HOST:PORT of process 0; on a cluster JAX finds it."""
    num_processes: int | None = None
    """Number of processes; on a cluster JAX finds it."""
    process_id: int | None = None
    """Index of this process, from 0; on a cluster JAX finds it."""
    bind_address: str | None = None
    """HOST:PORT where process 0 listens, if that differs from coordinator_address."""
    heartbeat_timeout: int = 30
    """Seconds without a heartbeat after which a process counts as dead."""

    def __post_init__(self):
        check_fields(self)
        if self.heartbeat_timeout < 1:
            raise ArgumentError(f"heartbeat_timeout is {self.heartbeat_timeout}: use 1 second or more")
        if self.coordinator_address is not None and ":" not in self.coordinator_address:
            raise ArgumentError(f"coordinator_address is {self.coordinator_address!r}: write HOST:PORT")
        if (self.num_processes is None) != (self.process_id is None):
            raise ArgumentError("num_processes and process_id go together: give both or none")
        if self.process_id is not None and not 0 <= self.process_id < self.num_processes:
            raise ArgumentError(
                f"process_id is {self.process_id}: use 0 to {self.num_processes - 1} (num_processes - 1)"
            )


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_number):
    gone = b"another process of the run is gone or never connected (see above): start all of them again"
    os.write(2, b"jaxgpt: error: " + gone + b"\n")
    os._exit(8)


def expected(config: DistributedConfig, environ: Mapping[str, str]) -> bool:
    """Whether the flags or the environment variables say that this process is one of several."""
    if config.join != "auto":
        return config.join == "always"
    return (
        bool(config.coordinator_address or environ.get("JAX_COORDINATOR_ADDRESS"))
        or (int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ)
        or "OMPI_MCA_orte_hnp_uri" in environ
        or ("JOB_COMPLETION_INDEX" in environ and "KUBERNETES_SERVICE_HOST" in environ)
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    )  # fmt: skip


def join(config: DistributedConfig) -> None:
    """Connect to the other processes, if there are any. Call this before any other JAX function.

    Raises:
        PeerLostError: not all processes connected.
    """
    if not expected(config, os.environ) or jax.distributed.is_initialized():
        return
    if os.name == "posix":  # JAX aborts the process from its own thread if a peer dies or never connects
        ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)
    try:
        jax.distributed.initialize(
            config.coordinator_address,
            config.num_processes,
            config.process_id,
            coordinator_bind_address=config.bind_address or config.coordinator_address,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            initialization_timeout=60,
        )
    except (RuntimeError, ValueError) as error:
        raise PeerLostError(
            f"the processes did not connect ({str(error).splitlines()[0]}): start all of them with the same "
            "--distributed.coordinator_address and --distributed.num_processes, or use --distributed.join never"
        ) from error


def exit_process(code: int) -> NoReturn:
    """Exit at once: an orderly exit would wait for other processes, which are waiting for this one."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def is_multi_process() -> bool:
    """Whether this process has joined others; unlike jax.process_count, this starts no backend."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is the process that writes the logs and small files of the run."""
    return jax.process_index() == 0


def from_first(make: Callable[[], A]) -> A:
    """Call `make` in the first process and return its result in all of them.

    An exception is raised in all of them too, so that none waits for ever.
    """
    if jax.process_count() == 1:
        return make()
    made, error = None, None
    if is_first():
        try:
            made = make()
        except Exception as raised:
            error = raised
    told = np.frombuffer(pickle.dumps((made, error)) if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    told = multihost_utils.broadcast_one_to_all(told if is_first() else np.zeros(size, np.uint8))
    made, error = pickle.loads(np.asarray(told, np.uint8).tobytes())  # safe: the bytes come from our own first process
    if error is not None:
        raise error
    return made


def lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process died; JAX raises several exception types for that.

    Our own errors and the operating system's never do: what they quote, such as the name of a folder, may be anything.
    """
    signs = ("Gloo", "NCCL", "onnection closed", "onnection reset", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat",
             "Barrier", "CoordinationService", "coordination service", "shut down")  # fmt: skip
    foreign = isinstance(error, RuntimeError | ValueError) and not isinstance(error, JaxgptError)
    return is_multi_process() and foreign and any(sign in str(error) for sign in signs)
