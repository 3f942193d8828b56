r"""Symbolic equality: two short expressions in, math-verify's verdict out, if they are proved harmless first; else False.

math-verify parses with ANTLR and compares with sympy, whose time has no bound of its own: what gets that far is short, shallow,
with few operations, small numbers, small exponents that are digits, and no sums, limits, integrals, factorials or words.
"""

from __future__ import annotations

import logging
import re
from functools import cache, lru_cache
from typing import Any

LONGEST = 80
DEEPEST = 4
MOST_OPERATIONS = 8
MOST_LETTERS = 3

_COMMANDS = frozenset(
    r"\frac \sqrt \pi \cdot \times \div \pm \mp \le \ge \ne \neq \infty \cup \cap \in \emptyset \varnothing \begin \end \pmatrix \\ "
    r"\theta \alpha \beta \gamma \phi \lambda \mu \{ \} \sin \cos \tan \ln \log \mathbb \circ".split()
)  # fmt: skip
_ALLOWED = re.compile(r"[\w\s+\-*/^=<>()\[\]{}|,.\\&%]*")
_COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)")
_WORD = re.compile(r"[a-zA-Z]{3,}")
_LONG_NUMBER = re.compile(r"\d{9}|\d[eE]")
_POWER = re.compile(r"\^\s*(?!\{?\s*-?\d\s*\}?(?![\d^]))|[)}\]]\s*\^\s*\{?\s*-?[4-9]|[)}\]]\s*\^.*[)}\]]\s*\^")
"""An exponent of more than one digit, or letters; a bracket to more than the third power; or two brackets to a power."""
_OPERATION = re.compile(r"[-+*/^]|\\(?:frac|sqrt|cdot|times|sin|cos|tan|ln|log)")
_MATRIX = re.compile(r"\\(?:begin|end)\{[pbvV]?matrix\}")


def symbolic_equal(answer: str, gold: str) -> bool:
    """Whether math-verify finds two texts equal. False for what is not harmless, or not mathematics, without asking it."""
    if not (harmless(answer) and harmless(gold)) or not (_mathematical(answer) and _mathematical(gold)):
        return False
    return _verified(answer, gold)


def harmless(text: str) -> bool:
    """Whether sympy is sure to be done with a text soon."""
    text = _MATRIX.sub(" ", text)
    plain = _COMMAND.sub(" ", text)
    return (
        len(text) <= LONGEST
        and _ALLOWED.fullmatch(text) is not None
        and set(_COMMAND.findall(text)) <= _COMMANDS
        and _WORD.search(plain) is None
        and _LONG_NUMBER.search(text) is None
        and _POWER.search(text) is None
        and len(_OPERATION.findall(text)) <= MOST_OPERATIONS
        and len(set(re.findall(r"[a-zA-Z]", plain))) <= MOST_LETTERS
        and _depth(text) <= DEEPEST
    )


def _mathematical(text: str) -> bool:
    return re.search(r"[\d\\=<>^+]", text) is not None


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
        if depth < 0:
            return DEEPEST + 1
    return deepest if depth == 0 else DEEPEST + 1


@cache
def _math_verify() -> Any:
    """math-verify, imported where it is first needed: it brings sympy, and takes half a second."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    return math_verify


@lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[Any, ...]:
    library = _math_verify()
    return tuple(library.parse(f"${text}$", [library.LatexExtractionConfig()], parsing_timeout=None))


def _verified(answer: str, gold: str) -> bool:
    library = _math_verify()
    try:
        found, wanted = _parsed(answer), _parsed(gold)
        return bool(library.verify(list(wanted), list(found), timeout_seconds=None))
    except Exception:  # noqa: BLE001 - sympy and ANTLR raise what they like, and an answer they cannot read is not the gold
        return False
