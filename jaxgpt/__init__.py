"""The GPT of "Let's build GPT from scratch" in JAX and Flax.

The public names are imported when they are first used: `import jaxgpt` itself loads nothing, not even jax.
"""

import importlib

_HOMES = {
    "CharTokenizer": "jaxgpt.tokenizer",
    "Config": "jaxgpt.config",
    "GPT": "jaxgpt.model",
    "GPTConfig": "jaxgpt.model",
    "Run": "jaxgpt.runs.loading",
    "generate": "jaxgpt.sampling",
    "load": "jaxgpt.runs.loading",
    "load_config": "jaxgpt.config",
    "train": "jaxgpt.training",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxgpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
