"""Checks of settings and arguments: a mistake is one line that names the argument, its value and the remedy."""

import dataclasses
import numbers
import os
import types
import typing
from collections.abc import Callable
from typing import Any, NewType

from jaxgpt.errors import ArgumentError, one_line, shortened

Path = NewType("Path", str)
"""The type of a field that holds a path, in which `~` is the home folder."""
Text = NewType("Text", str)
"""The type of a field that holds free text, in which every word stands for itself, `null` too."""
SEEDS = 1 << 32
WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    Text: "a text",
    type(None): "None",
}


def check_fields(section: Any) -> None:
    """Check the values of a settings dataclass against the types of its fields, and expand `~` in paths.

    Flags and files are converted to these types; this is for values that come from Python.

    Args:
        section: an instance of a frozen dataclass, as in its `__post_init__`.

    Raises:
        ArgumentError: a value has another type, or is not one of the values that are allowed.
    """
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        is_union = typing.get_origin(field.type) in (types.UnionType, typing.Union)
        kinds = typing.get_args(field.type) if is_union else (field.type,)
        if Path in kinds and isinstance(value, str | os.PathLike):
            value = os.path.expanduser(value)
            object.__setattr__(section, field.name, value)  # the dataclass is frozen
        if not any(_fits(value, kind) for kind in kinds):
            raise ArgumentError(f"{field.name} is {shortened(repr(value))}: use {' or '.join(map(_words, kinds))}")


def _words(kind: Any) -> str:
    """The values of a type, in words."""
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(kind)))}"
    return WORDS.get(kind) or getattr(kind, "__name__", str(kind))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type, to which NumPy's scalars belong as well."""
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if kind in (Path, Text):
        return isinstance(value, str)
    return isinstance(value, typing.get_origin(kind) or kind)


def check_seed(seed: int) -> None:
    """Check that a seed is in the range in which every seed has a key of its own.

    Args:
        seed: from 0 to 2^32 - 1.

    Raises:
        ArgumentError: it is not.
    """
    if not 0 <= seed < SEEDS:
        raise ArgumentError(f"seed is {shortened(str(seed))}: use a whole number from 0 to {SEEDS - 1} (2^32 - 1)")


def check_number(name: str, value: Any, test: Callable[[Any], bool], remedy: str) -> None:
    """Check that a number passes a test. Anything that is not a number, or that jax.jit traces, fails.

    Raises:
        ArgumentError: it does not; the message ends in the remedy.
    """
    try:
        passes = bool(test(value))
    except (TypeError, ValueError, OverflowError):
        passes = False
    if not passes:
        raise ArgumentError(f"{name} is {one_line(shortened(str(value)))}: {remedy}")


def check_key(key: Any) -> Any:
    """Check a PRNG key; return it in its typed form, whose random numbers are the same."""
    import jax  # here and below imported late: the command line checks its flags before it needs jax or NumPy
    import jax.numpy as jnp
    import numpy as np

    array = isinstance(key, jax.Array | np.ndarray)
    if array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return key
    try:
        if array and key.ndim == 1:
            return jax.random.wrap_key_data(key)  # from jax.random.PRNGKey
    except TypeError:  # it has another dtype or length
        pass
    kind = f"dtype {key.dtype} and shape {key.shape}" if array else f"type {type(key).__name__}"
    raise ArgumentError(f"key is of {kind}: use a single key, such as jax.random.key(0)")


def check_prompt(prompt: Any, lengths: Any, vocab_size: int) -> Any:
    """Check prompts and their lengths.

    Args:
        prompt: expected to be (B, T) integers in [0, vocab_size).
        lengths: expected to be None, or (B,) integers from 1 to T; the padding after them may be any integers.
        vocab_size: number of ids.

    Returns:
        The lengths as (B,) int32, or None.

    Raises:
        ArgumentError: an argument has another type or shape, or is out of its range.
    """
    import jax.numpy as jnp
    import numpy as np

    ids = _check_integers("prompt", prompt, ("B", "T"), "such as tokenizer.encode(text)[None]")
    if lengths is not None:
        lengths, (B, T) = _as_array(lengths), prompt.shape
        values = _check_integers("lengths", lengths, (B,), "one for each row of the prompt")
        _check_range("lengths", values, 1, T)
        lengths = jnp.asarray(lengths, jnp.int32)
        known = ids is not None and values is not None
        ids = ids[np.arange(T) < values[:, None]] if known else None
    _check_range("prompt", ids, 0, vocab_size - 1)
    return lengths


def check_stop(stop: Any, vocab_size: int) -> Any:
    """Check stop tokens.

    Args:
        stop: expected to be an id, a sequence of ids, or None.
        vocab_size: number of ids.

    Returns:
        (K,) integers, or None if there are none.

    Raises:
        ArgumentError: they have another type or shape, or are out of range.
    """
    ids = _as_array(stop)
    if ids is None or getattr(ids, "size", 1) == 0:
        return None
    ids = ids[None] if getattr(ids, "shape", None) == () else ids
    _check_range("stop", _check_integers("stop", ids, ("K",), "such as [tokenizer.end_of_text]"), 0, vocab_size - 1)
    return ids


def _as_array(value: Any) -> Any:
    """Return a number or a sequence of numbers as an array; anything else as it is, for the check that follows."""
    import numpy as np

    if value is None or hasattr(value, "dtype"):
        return value
    try:
        return np.asarray(value)
    except ValueError:  # rows of different lengths
        return value


def _check_integers(name: str, value: Any, shape: tuple[int | str, ...], example: str) -> Any:
    """Check that an argument is an array of integers of this shape.

    Args:
        name: of the argument.
        value: the argument.
        shape: the wanted sizes, in which a letter stands for any size.
        example: what the user could pass.

    Returns:
        Its values; None if they are not known here: jax.jit traces them, or they are on devices of other processes.

    Raises:
        ArgumentError: it is no such array, or an empty one.
    """
    import jax
    import numpy as np

    dtype, found = getattr(value, "dtype", None), getattr(_as_array(value), "shape", ())
    integers = isinstance(dtype, np.dtype) and np.issubdtype(dtype, np.integer)
    fits = len(found) == len(shape) and all(a == b for a, b in zip(found, shape) if isinstance(b, int))
    if not (integers and fits):
        kind = f"dtype {dtype}" if isinstance(dtype, np.dtype) else f"type {type(value).__name__}"
        wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
        given = f"{name} is of {kind} and shape {tuple(found)}"
        raise ArgumentError(f"{given}: use a NumPy or jax array of integers of shape {wanted}, {example}")
    if 0 in found:
        raise ArgumentError(f"{name} is empty, of shape {found}: give at least one row of at least one token")
    known = not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
    return np.asarray(value) if known else None


def _check_range(name: str, values: Any, least: int, most: int) -> None:
    """Check that all values of a NumPy array are from `least` to `most`; None passes.

    Raises:
        ArgumentError: they are not.
    """
    if values is not None and not (least <= values.min() and values.max() <= most):
        raise ArgumentError(f"{name} has values from {values.min()} to {values.max()}: use {least} to {most}")
