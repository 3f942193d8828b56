"""Letters of options: a record in, the letter of its gold answer out."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Any


def gold_letter(sample: Mapping[str, Any]) -> str | None:
    """The gold answer as a letter: of the option whose text it is, else itself where it is one; None for neither."""
    gold, choices = str(sample["gold_answer"]).strip(), [str(choice) for choice in sample.get("choices") or ()]
    if gold in choices and not (len(gold) == 1 and gold in ascii_uppercase[: len(choices)]):
        return ascii_uppercase[choices.index(gold)]
    return gold.upper() if len(gold) == 1 and gold.isascii() and gold.isalpha() else None
