"""The fields of the settings that are numbers inside the compiled step: a sweep can train their values side by side."""

import dataclasses
from typing import Any

NUMBER = "number"


def number(default: float | None, zero_is_off: bool = False) -> Any:
    """Declare a field that is a number inside the compiled step, and changes neither shapes nor the program.

    Args:
        default: of the field.
        zero_is_off: whether 0 leaves something out of the program.
    """
    return dataclasses.field(default=default, metadata={NUMBER: zero_is_off})


def numbers(cls: type, prefix: str = "") -> dict[str, bool]:
    """Find the fields of a dataclass of sections that were declared with `number`.

    Returns:
        By the name of its flag, whether 0 leaves something out of the program.
    """
    found = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found |= numbers(field.type, f"{prefix}{field.name}.")
        elif NUMBER in field.metadata:
            found[prefix + field.name] = field.metadata[NUMBER]
    return found
