"""What differs between the settings of a run as it was and as it is to go on."""

from typing import Any

from jaxgpt.config import Config, flat

# model fields that trained weights do not fix
FREE = {"dropout", "attention_dropout", "embedding_dropout", "init", "attention", "remat"}
END = "optim.decay_steps"  # 0 = train.steps


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list]:
    """Find the settings of a run that changed.

    Args:
        before: the earlier result of `flat`; a field that did not exist then counts as having today's default.
        now: the current result of `flat`.

    Returns:
        The old and the new value of each changed setting, by its name. How the run is found does not count.
    """
    before = {**flat(Config()), **before}
    names = (name for name in now if not name.startswith(("run.", "distributed.")))
    return {name: [before[name], now[name]] for name in names if before[name] != now[name]}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings that changed and that affect the numbers of a run.

    The text and the tokenizer do not count: they may have moved, and are compared by content.

    Args:
        before: as for `changes`.
        now: as for `changes`.

    Returns:
        One `name (was X, now Y)` per changed setting.
    """
    ignored = {f"data.{name}" for name in ("name", "path", "tokenizer", "verify")}
    ignored |= {"mesh.", "model.attention", "model.remat", "train.steps", "train.eval", "train.log", "train.profile"}
    ignored |= {"train.patience", "train.sample_tokens", "train.loss_chunks"}
    given = ({**flat(Config()), **each} for each in (before, now))
    found = changes(*({**each, END: each[END] or each["train.steps"]} for each in given))
    described = _described({name: pair for name, pair in found.items() if not name.startswith(tuple(ignored))})
    if before.get(END) or now.get(END):
        return described
    return [f"{each} because train.steps differs" if each.startswith(END) else each for each in described]


def model_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the settings of the model and of its adapters that changed and that trained weights fix.

    See `differences`.
    """
    free, fixed = {f"model.{name}" for name in FREE}, ("model.", "lora.")
    found = changes(before, now)
    return _described({name: pair for name, pair in found.items() if name.startswith(fixed) and name not in free})


def _described(changed: dict[str, list]) -> list[str]:
    return [f"{name} (was {before}, now {now})" for name, (before, now) in changed.items()]
