"""Cards: the name of a recipe or benchmark in, its YAML file read and checked out, from a wheel or a checkout."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_dft.errors import CardError

PACKAGE = Path(__file__).resolve().parent
FOLDERS = {"recipe": "data_recipes", "benchmark": "eval"}  # kind of card -> folder name in a checkout


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the closest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def check_keys(found: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    """Raise CardError for the first key that is not known, with the nearest name and the whole list."""
    known = sorted(set(known))
    for key in map(str, found):
        if key not in known:
            raise CardError(f"{where}: unknown key {key!r}.{nearest(key, known)} Known keys: {', '.join(known)}.")


def list_cards(kind: str) -> dict[str, Path]:
    """Every shipped card of a kind ('recipe' or 'benchmark'), name -> file. The wheel's folder wins over the checkout's."""
    found: dict[str, Path] = {}
    for folder in (PACKAGE.parent / FOLDERS[kind], PACKAGE / "_cards" / FOLDERS[kind]):
        found.update({path.stem: path for path in sorted(folder.glob("*.yaml"))})
    return dict(sorted(found.items()))


def find_card(kind: str, name: str) -> Path:
    """The file of a card, by name or by path to a .yaml file of one's own. Raises CardError with the nearest name."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise CardError(f"No {kind} card at {name!r}. Expected a YAML file there.")
    cards = list_cards(kind)
    if name not in cards:
        raise CardError(
            f"Unknown {kind} {name!r}.{nearest(name, cards)} Known: {', '.join(cards)}; or the path of a .yaml file."
        )
    return cards[name]


def read_card(kind: str, name: str, *, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, Any]:
    """Read a card and check its keys. Returns its mapping with 'name' set to the file's stem."""
    import yaml

    path = find_card(kind, name)
    try:
        text = path.read_text(encoding="utf-8")
        card = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: not valid YAML ({error}).") from error
    if (twice := _repeated(yaml.compose(text, Loader=yaml.SafeLoader))) is not None:
        raise CardError(
            f"{path}, line {twice.start_mark.line + 1}: the key {twice.value!r} is there twice. Keep one of them."
        )
    if not isinstance(card, dict):
        raise CardError(f"{path}: expected a mapping of keys, found {type(card).__name__}.")
    required = set(required)
    check_keys(card, required | set(optional) | {"name"}, where=str(path))
    missing = sorted(required - set(card))
    if missing:
        raise CardError(f"{path}: missing {', '.join(missing)}. A {kind} card needs: {', '.join(sorted(required))}.")
    return {**card, "name": path.stem}


def _repeated(root: Any) -> Any:
    """The first key of a composed YAML tree that its mapping has already, of which YAML would keep the last in silence; else None."""
    nodes, known = [root] if root is not None else [], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in known or not isinstance(node.value, list):
            continue
        known.add(id(node))  # an alias is the node itself
        if any(isinstance(child, tuple) for child in node.value):
            keys = [key for key, _ in node.value]
            names = [str(key.value) for key in keys]
            if (again := next((k for k, name in enumerate(names) if name in names[:k]), None)) is not None:
                return keys[again]
        nodes += [child[1] if isinstance(child, tuple) else child for child in node.value]
    return None
