"""What stands beside a tokenizer.json: which tokens begin and end a text, and the template of a dialogue."""

import json
import pathlib
from typing import Any

from jaxgpt.files.tokenizer_files import TokenizerError

FILE = "tokenizer_config.json"
TEMPLATE, GENERATION, SPECIAL = "chat_template.jinja", "generation_config.json", "special_tokens_map.json"
TOKENS = ("bos_token", "eos_token")


def read(path: pathlib.Path) -> dict[str, Any]:
    """Read the settings of a tokenizer from the files beside it, each of which may be missing.

    Args:
        path: the tokenizer.json.

    Returns:
        See `checked`.

    Raises:
        TokenizerError: a file cannot be read.
    """
    stored = _json(path.with_name(SPECIAL)) | _json(path.with_name(FILE))
    if not isinstance(stored.get("eos_token_id"), list):  # a run's own file has more than one end, if there are more
        stored["eos_token_id"] = _json(path.with_name(GENERATION)).get("eos_token_id")
    template = path.with_name(TEMPLATE)
    try:
        if template.is_file():  # transformers prefers it, too
            stored["chat_template"] = template.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read the template ({template}, {error}): restore it") from None
    return checked(stored, str(path.with_name(FILE)))


def checked(stored: dict[str, Any], source: str) -> dict[str, Any]:
    """Keep the settings that jaxgpt uses.

    Args:
        stored: the content of a tokenizer_config.json in the form of transformers.
        source: its name in error messages.

    Returns:
        Those that are set: `bos_token` and `eos_token` as texts, `add_bos_token`, `chat_template`, and `eos_token_id`,
        a list of all ids that end a text.

    Raises:
        TokenizerError: a value has another type.
    """
    found = {name: _content(stored.get(name)) for name in TOKENS}
    found["add_bos_token"] = stored.get("add_bos_token")
    template = stored.get("chat_template")
    if isinstance(template, list):  # several by name, as older models have them
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    found["chat_template"] = template
    ends = stored.get("eos_token_id")
    found["eos_token_id"] = [ends] if isinstance(ends, int) else ends
    found = {name: value for name, value in found.items() if value is not None}
    kinds = {"add_bos_token": bool, "eos_token_id": list}
    wrong = [name for name, value in found.items() if not isinstance(value, kinds.get(name, str))]
    wrong += [name for name in ("eos_token_id",) if not all(type(i) is int for i in found.get(name, ()))]
    if wrong:
        raise TokenizerError(f"not the settings of a tokenizer ({source}, {', '.join(wrong)}): restore the file")
    return found


def _content(token: Any) -> Any:
    """The text of a token, which transformers stores alone or with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if isinstance(stored, dict):
            return stored
        error = "not a JSON object"
    except (OSError, ValueError, RecursionError) as caught:
        error = caught
    raise TokenizerError(f"cannot read the tokenizer's settings ({path}, {error}): restore the file")
