"""The cache of compiled functions, which later processes read."""

import math
import os
import warnings

import jax

from jaxgpt.errors import JaxgptWarning
from jaxgpt.files import download


def keep_compiled() -> None:
    """Keep what XLA compiles in the user's cache folder, if that can be written."""
    try:
        folder = download.cache_dir() / "xla"
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, download.DownloadError):
        return
    can_write = os.access(folder, os.W_OK)
    if not can_write:
        message = f"compiled functions are not kept ({folder}, read-only): set JAXGPT_CACHE"
        warnings.warn(message, JaxgptWarning, stacklevel=2)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if can_write else math.inf)
