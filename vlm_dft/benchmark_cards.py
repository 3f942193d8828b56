"""Benchmark cards: the name of a benchmark in; its card, every key of it checked, and what it says of a protocol, out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vlm_dft.asking import FORM_KEYS, check_cases, check_form
from vlm_dft.cards import check_keys, nearest, read_card
from vlm_dft.columns import columns_of
from vlm_dft.errors import CardError
from vlm_dft.scoring import SCORERS

REQUIRED = ("description", "licence", "splits", "answer", "scorer", "max_new_tokens")
PICTURES = ("image", "images", "image_root", "images_optional")
OPTIONAL = (
    "paper", "rows", "default", "layouts", "each", "id", "cluster", *PICTURES, *FORM_KEYS, "protocols", "record", "groups",
    "metrics", "empty_gold", "notes",
)  # fmt: skip
RECORD = ("question", "choices", "question_type", "answer_type", "precision", "unit")  # and gold_answer
EXTRAS = ("ID", "key", "knowledge concept", "seed", "variant", "problem_index", "problem_version", "precise_value")
SPLIT_KEYS = ("rows", "id", *PICTURES)
SOURCES = ("files", "hub", "embedded")
LAYOUT_KEYS = (*SOURCES, "config", "split", "revision", "kind", "columns", "given", "name", "folder", *PICTURES)
OFFICIAL = "official"


def read_benchmark(name: str) -> dict[str, Any]:
    """A benchmark card by name or path, everything in it checked. Raises CardError; reads no data.

    mathvision:testmini, or own.yaml:a,b, are those splits of a card; the name alone is those that its `default` names, or
    all. The card's `chosen` lists them; its `name` says them where they are not the default, so that it finds the same
    again; its `set` is the name without them.
    """
    found, _, words = name.rpartition(":") if _names_splits(name) else (name, "", "")
    card = read_card("benchmark", found, required=REQUIRED, optional=OPTIONAL)
    where = f"Benchmark {card['name']!r}"
    for key, check in CHECKS.items():
        if key in card:
            check(card[key], f"{where}, {key}")
    _splits(card, where)
    default = card.get("default", list(card["splits"]))
    for split in default:
        _known(split, card["splits"], "split", f"{where}, default")
    chosen = [word.strip() for word in words.split(",")] if words else default
    for split in chosen:
        _known(split, card["splits"], "split", where)
    forms = protocols_of(card)
    if OFFICIAL not in forms:
        raise CardError(f"{where}, protocols: expected one named {OFFICIAL}, found {', '.join(forms)}.")
    chosen = list(dict.fromkeys(chosen))
    name = card["name"] if chosen == default else f"{card['name']}:{','.join(chosen)}"
    return {**card, "name": name, "set": card["name"], "chosen": chosen}


def protocols_of(card: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each protocol's name -> what it asks (FORM_KEYS). A name alone is another protocol of the card. Raises CardError."""
    where = f"Benchmark {card['name']!r}"
    own = {key: card[key] for key in FORM_KEYS if key in card}
    if "protocols" not in card:
        if "prompt" not in own:
            raise CardError(f"{where}: missing prompt, or protocols. A benchmark card says what is asked.")
        check_form(own, where=where)
        return {OFFICIAL: own}
    if own:
        raise CardError(f"{where}: {', '.join(own)} beside protocols. Say it in each protocol.")
    told = card["protocols"]
    if not isinstance(told, Mapping) or not told:
        raise CardError(f"{where}, protocols: expected names with what each asks, found {told!r}.")
    forms = {}
    for protocol, form in told.items():
        if isinstance(form, str):
            _known(form, told, "protocol", f"{where}, protocols: {protocol}")
            form = told[form]
        check_form(form, where=f"{where}, protocol {protocol}")
        forms[str(protocol)] = dict(form)
    return forms


def form_of(card: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """What a protocol of a card asks. Raises CardError with the nearest name for one that the card has not."""
    forms = protocols_of(card)
    _known(protocol, forms, "protocol", f"Benchmark {card['name']!r}")
    return forms[protocol]


def _names_splits(name: str) -> bool:
    """Whether what follows the last colon is splits, and not a part of a path."""
    before, colon, after = name.rpartition(":")
    return bool(colon and before and after) and not set(after) & set("/\\") and not Path(name).is_file()


def _known(name: object, known: Mapping[str, Any], what: str, where: str) -> None:
    if name not in known:
        raise CardError(
            f"{where}: unknown {what} {name!r}.{nearest(str(name), map(str, known))} Known: {', '.join(map(str, known))}."
        )


def _splits(card: Mapping[str, Any], where: str) -> None:
    """Check the splits, and the layouts or sources in which their rows lie."""
    splits = card["splits"]
    if not isinstance(splits, dict) or not splits:
        raise CardError(f"{where}: splits must be a non-empty dict, found {splits!r}.")
    for split, said in splits.items():
        place = f"{where}, split {split!r}"
        if not isinstance(split, str) or set(split) & set(",:/\\") or not split.strip():
            raise CardError(f"{place}: a split's name is a text without comma, colon or slash.")
        if not isinstance(said, Mapping):
            raise CardError(f"{place}: expected a source such as {{files: [...]}}, found {said!r}.")
        check_keys(said, SPLIT_KEYS if "layouts" in card else (*SPLIT_KEYS, *LAYOUT_KEYS), where=place)
        if "layouts" not in card and len(set(SOURCES) & set(said)) != 1:
            raise CardError(f"{place}: expected one of {', '.join(SOURCES)}, found {sorted(said)}.")
        _check_keys_of(said, place)


def _check_keys_of(source: Mapping[str, Any], place: str) -> None:
    for key in {*SPLIT_KEYS, *LAYOUT_KEYS} & set(source) & set(CHECKS):
        CHECKS[key](source[key], f"{place}, {key}")


def _layouts(value: object, where: str) -> None:
    if not isinstance(value, list) or not value:
        raise CardError(f"{where}: expected a list of places in which the rows may lie, found {value!r}.")
    for k, layout in enumerate(value):
        place = f"{where}, {k + 1}"
        if not isinstance(layout, Mapping):
            raise CardError(f"{place}: expected a source such as {{files: [...]}}, found {layout!r}.")
        check_keys(layout, LAYOUT_KEYS, where=place)
        if len(set(SOURCES) & set(layout)) != 1:
            raise CardError(f"{place}: expected one of {', '.join(SOURCES)}, found {sorted(layout)}.")
        _check_keys_of(layout, place)
        if not isinstance(layout.get("given", {}), Mapping):
            raise CardError(f"{place}, given: expected columns with a value for every row, found {layout['given']!r}.")


def _each(value: object, where: str) -> None:
    one = isinstance(value, Mapping) and len(value) == 1
    if not one or not isinstance(next(iter(value.values())), list) or not next(iter(value.values())):  # type: ignore[attr-defined]
        raise CardError(
            f"{where}: expected one name with a list of values, such as {{variant: [1, 2]}}, found {value!r}."
        )


def _record(value: object, where: str) -> None:
    if not isinstance(value, Mapping):
        raise CardError(f"{where}: expected a mapping such as {{question: question}}, found {value!r}.")
    known = (*RECORD, *EXTRAS)
    for key, rule in value.items():
        if key not in known:
            raise CardError(f"{where}: unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}.")
        if isinstance(rule, list):
            check_cases(rule, ("text", "value", "column"), where=f"{where}, {key}")
        elif isinstance(rule, Mapping):
            check_keys(rule, ("value", "column", "optional"), where=f"{where}, {key}")
            if len({"value", "column"} & set(rule)) != 1 or not isinstance(rule.get("column", ""), str):
                raise CardError(f"{where}, {key}: expected a value or a column, found {rule!r}.")
        elif not isinstance(rule, str):
            raise CardError(f"{where}, {key}: expected a column, a value or a list of cases, found {rule!r}.")


def _groups(value: object, where: str) -> None:
    if not isinstance(value, list):
        raise CardError(f"{where}: expected a list of columns, or of {{name: cases}}, found {value!r}.")
    for one in value:
        if isinstance(one, Mapping) and one:
            for name, cases in one.items():
                check_cases(cases, ("text",), where=f"{where}, {name}")
        elif not isinstance(one, str):
            raise CardError(f"{where}: expected a column, or {{name: cases}}, found {one!r}.")


def _metrics(value: object, where: str) -> None:
    from vlm_dft import metrics

    _texts(value, where)
    known: Mapping[str, Any] = getattr(metrics, "METRICS", {})
    for name in value if known else ():  # type: ignore[attr-defined]
        _known(name, known, "metric", where)


def _scorer(value: object, where: str) -> None:
    if value not in SCORERS:
        raise CardError(
            f"{where.removesuffix(', scorer')}: unknown scorer {value!r}.{nearest(str(value), SCORERS)} Known: {', '.join(SCORERS)}."
        )


def _texts(value: object, where: str) -> None:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise CardError(f"{where}: expected a list of names, found {value!r}.")


def _default(value: object, where: str) -> None:
    _texts(value, where)
    if not value:
        raise CardError(f"{where}: names no split. Leave it out for all of them.")


def _text(value: object, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise CardError(f"{where}: expected a text, found {value!r}.")


def _count(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CardError(f"{where} must be a whole number above zero, found {value!r}.")


def _flag(value: object, where: str) -> None:
    if not isinstance(value, bool):
        raise CardError(f"{where}: expected true or false, found {value!r}.")


CHECKS: dict[str, Callable[[Any, str], object]] = {
    "description": _text, "licence": _text, "paper": _text, "notes": _text, "answer": _text, "cluster": _text,
    "rows": _count, "max_new_tokens": _count, "scorer": _scorer, "layouts": _layouts, "each": _each, "record": _record,
    "groups": _groups, "default": _default, "images": _text, "folder": _text, "metrics": _metrics, "empty_gold": _flag, "images_optional": _flag,
    "image_root": _text,
    "id": lambda value, where: columns_of(value, where=where),
    "image": lambda value, where: columns_of(value, where=where),
}  # fmt: skip
"""What a key's value must be, by key: each raises CardError."""
