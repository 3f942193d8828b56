"""Settings in groups: the name and the raw value of one (from a file or the command line) in, its checked value out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from vlm_dft.cards import nearest
from vlm_dft.errors import ConfigError
from vlm_dft.families import PARTS
from vlm_dft.kinds import KINDS
from vlm_dft.objectives import OBJECTIVES

Reader = Callable[
    [str, Any, str], Any
]  # (name, raw value, where it stands) -> value; None: not set. Raises ConfigError

TOO_LONG = ("raise", "drop", "shorten_answer", "downscale")
RESIZE = ("processor", "pillow")
QUANTIZE = ("nf4", "int8")
DIRECTIONS = {"forward": "KL(start || model)", "reverse": "KL(model || start)"}
OUTSIDE_BRACKETS = re.compile(r",(?![^(]*\))")  # commas between objectives, not between an objective's parameters
EMPTY = (None, "", "null", "none")


def plain(value: Any) -> Any:
    """A word as a bool, int or float where it reads as one."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def number(low: float, high: float = float("inf"), *, open_low: bool = False) -> Reader:
    """A number from low (or above it) to high; empty: not set."""

    def read(name: str, value: Any, where: str) -> float | None:
        found = None if isinstance(value, str) and value in EMPTY else plain(value)
        if found is None:
            return None
        right = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not right or not low <= found <= high or found == float("inf") or (open_low and found == low):
            said = f"above {low:g}" if open_low else f"{low:g} or more"
            said += "" if high == float("inf") else f" and at most {high:g}"
            raise ConfigError(f"{where}: {name} must be a number, {said}, found {value!r}.")
        return float(found)

    return read


def whole(low: int) -> Reader:
    """A whole number of at least low; empty: not set."""

    def read(name: str, value: Any, where: str) -> int | None:
        found = None if isinstance(value, str) and value in EMPTY else plain(value)
        if found is None:
            return None
        right = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
        if not right or int(found) != found or found < low:
            raise ConfigError(f"{where}: {name} must be a whole number above {low - 1} or null, found {value!r}.")
        return int(found)

    return read


def one_of(*known: Any) -> Reader:
    """One of a few values; empty: not set."""

    def read(name: str, value: Any, where: str) -> Any:
        found = None if isinstance(value, str) and value in EMPTY else plain(value)
        if found is not None and found not in known:
            words = list(map(str, known))
            raise ConfigError(
                f"{where}: {name} must be one of {', '.join(words)}, found {value!r}.{nearest(str(found), words)}"
            )
        return found

    return read


def some_of(*known: str) -> Reader:
    """A list of some of the known names, as a list or as words between commas; 'none': the empty list; null: not set."""

    def read(name: str, value: Any, where: str) -> list[str] | None:
        if value in (None, "", "null"):
            return None
        found = words_of(value)
        if unknown := [word for word in found if word not in known]:
            raise ConfigError(
                f"{where}: {name}: expected some of {', '.join(known)}, found {unknown[0]!r}.{nearest(unknown[0], known)}"
            )
        return list(dict.fromkeys(found))

    return read


def texts(name: str, value: Any, where: str) -> Any:
    """A list of texts, as it is or as words between commas."""
    return value.split(",") if isinstance(value, str) else value


def mapping(name: str, value: Any, where: str) -> dict[str, Any] | None:
    """A mapping, as it is or as YAML's {name: value}; empty: not set."""
    found = None if value in EMPTY else _from_yaml(value) if isinstance(value, str) else value
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{where}: {name} must be a mapping, say '{{name: value}}', found {value!r}.")
    return None if found is None else dict(found)


def _from_yaml(text: str) -> Any:
    """What a word says in YAML; the word itself where it is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def patterns(name: str, value: Any, where: str) -> list[str]:
    """A list of regular expressions; one text is one expression (they may hold commas), or YAML's [one, another]."""
    if isinstance(value, str) and value.startswith("["):
        value = _from_yaml(value)
    found = [] if value in EMPTY else [value] if isinstance(value, str) else list(value)
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ConfigError(f"{where}: {name}: not a regular expression: {pattern!r} ({error}).") from error
    return found


def words_of(value: Any) -> list[str]:
    """Words between commas, or the list that is given already; empty for null and 'none'."""
    if value is None or (isinstance(value, str) and value in EMPTY):
        return []
    return [str(word).strip() for word in (value.split(",") if isinstance(value, str) else value) if str(word).strip()]


def source_objectives(name: str, value: Any, where: str) -> dict[str, str]:
    """{source: objective}, as a mapping or as source=objective,source=objective."""
    if value in EMPTY:
        return {}
    if isinstance(value, str):
        pairs = [piece.split("=", 1) for piece in OUTSIDE_BRACKETS.split(value) if piece.strip()]
        value = (
            {pair[0].strip(): pair[-1].strip() for pair in pairs} if all(len(pair) == 2 for pair in pairs) else value
        )
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: source_objectives must be source=objective,..., found {value!r}.")
    for source, objective in value.items():
        if objective not in OBJECTIVES:
            raise ConfigError(
                f"{where}: source_objectives gives {source!r} the unknown objective {objective!r}."
                f"{nearest(str(objective), OBJECTIVES)} Known (without parameters): {', '.join(OBJECTIVES)}."
            )
    return dict(value)


def full_weight(name: str, value: Any, where: str) -> list[str]:
    """Kinds of tokens."""
    kinds = words_of(value)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ConfigError(
            f"{where}: full_weight takes kinds of tokens, found {unknown[0]!r}.{nearest(unknown[0], KINDS)} Known: "
            f"{', '.join(KINDS)}; texts of your own go into format_strings, and `format` into full_weight."
        )
    return kinds


def kl_direction(name: str, value: Any, where: str) -> str | None:
    """forward or reverse."""
    if value in EMPTY:
        return None
    if value not in DIRECTIONS:
        said = ", ".join(f"{k} = {v}" for k, v in DIRECTIONS.items())
        raise ConfigError(f"{where}: kl_direction must be one of {said}; found {value!r}.")
    return str(value)


GROUPS: dict[str, dict[str, Reader]] = {
    "parts": {
        "train_parts": some_of(*PARTS),
        **{f"{part}_learning_rate": number(0, open_low=True) for part in PARTS},
        **{f"{part}_weight_decay": number(0) for part in PARTS},
        "lora_alpha": number(0, open_low=True),
        "lora_dropout": number(0, 0.99),
        "lora_parts": some_of("vision", "merger", "language"),
        "lora_targets": patterns,
        "quantize": one_of(*QUANTIZE),
        "recompute": some_of("vision", "language"),
        "vision_cache": number(0),
    },
    "loss": {"kl": number(0), "kl_direction": kl_direction, "cadft": number(0), "full_weight": full_weight},
    "collator": {
        "too_long": one_of(*TOO_LONG),
        "packing": one_of(True, False),
        "resize": one_of(*RESIZE),
        "template_options": mapping,
        "source_objectives": source_objectives,
        "format_strings": texts,
        "min_pixels": whole(1),
        "max_pixels": whole(1),
        "hosts": texts,
    },
    "rows": {"limit": whole(1), "bad_rows": one_of("refuse", "drop"), "workers": whole(0)},
    "evaluation": {
        "eval_limit": whole(1),
        "evaluate_every": whole(1),
        "watch_limit": whole(1),
        "keep_best": one_of(True, False),
        "patience": whole(1),
    },
}
"""Each group is a field of TrainConfig, and each of its names a flag of its own."""
