"""The runs of a sweep: the product of the values that vary, and which of them can train side by side."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxgpt import config as configs
from jaxgpt.config import Config, ConfigError
from jaxgpt.errors import shortened
from jaxgpt.settings.flags import check_name, convert, fields
from jaxgpt.settings.numbers import numbers
from jaxgpt.tools.side_by_side import values_of

FIXED = ("run.", "distributed.", "train.profile")  # where a run is and how it is watched, not what it does


class Planned(NamedTuple):
    """A run to be trained."""

    number: int
    settings: dict[str, Any]
    """The values of the settings that vary."""
    config: Config


def parse_vary(vary: Sequence[str]) -> dict[str, list[Any]]:
    """Read the settings that vary.

    Args:
        vary: `FIELD=a,b,c` each.

    Returns:
        The values of each setting by its name.

    Raises:
        ConfigError: there are none, a name is unknown or not to be varied, it is given twice, or its values are of
            another type, equal, or none.
    """
    known, values = fields(Config), {}
    for each in vary:
        name, equals, texts = each.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        where = f"--vary, {shortened(each)}"
        if not equals:
            raise ConfigError(f"no values ({where}): write --vary FIELD=a,b,c")
        check_name(name, known, "--vary")
        if name.startswith(FIXED):
            raise ConfigError(f"{name} cannot vary ({where}): it does not change what a run learns")
        if name in values:
            raise ConfigError(f"a setting twice ({where}): give all of its values in one --vary {name}=a,b,c")
        values[name] = (
            [convert(text.strip(), known[name], name, "--vary") for text in texts.split(",")] if texts else []
        )
        if not values[name]:
            raise ConfigError(f"no values ({where}): write --vary {name}=a,b,c")
        if twice := [value for value, n in _counted(values[name]) if n > 1]:
            raise ConfigError(f"a value twice ({where}, {twice[0]}): give it once")
    if not values:
        raise ConfigError("nothing varies (--vary): add --vary FIELD=a,b,c, such as --vary seed=1,2,3")
    return values


def _counted(values: Sequence[Any]) -> list[tuple[Any, int]]:
    return [(value, values.count(value)) for value in values]


def expand(base: Config, values: dict[str, list[Any]]) -> list[Planned]:
    """Make a run for each combination of values, each with its own folder below `run.dir`.

    Raises:
        ArgumentError: a combination cannot be trained.
    """
    planned = []
    for number, combination in enumerate(itertools.product(*values.values()), 1):
        settings = dict(zip(values, combination))
        config = with_settings(base, settings)
        run = dataclasses.replace(config.run, dir=f"{base.run.dir}/runs/{number:03}", resume="auto")
        alone = dataclasses.replace(config.distributed, join="never")
        config = dataclasses.replace(config, run=run, distributed=alone)
        values_of(config)  # checks that the numbers of the schedule fit together
        planned.append(Planned(number, settings, config))
    return planned


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """Return the configuration with these values in place of its own.

    Raises:
        ArgumentError: it cannot be trained.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        sections.setdefault(section, {})[field] = value
    inner = sections.pop("", {})
    inner |= {name: dataclasses.replace(getattr(config, name), **changed) for name, changed in sections.items()}
    return dataclasses.replace(config, **inner)


def structure(config: Config) -> tuple:
    """What decides the compiled step of a run, and with it the runs that can train beside it.

    That is all settings but the numbers in the step; of a number that leaves something out when it is 0, whether it is.
    """
    switches = numbers(Config)

    def part(name, value):
        if name not in switches:
            return value
        return "number" if not switches[name] else None if value is None else bool(value)

    return tuple((name, part(name, value)) for name, value in configs.flat(config).items() if name != "run.dir")
