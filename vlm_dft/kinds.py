"""Kinds of response tokens: the target tokens of turns in; what each is (first, digit, format, final answer, end of turn) out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vlm_dft.alignment import Ints

KINDS = {"first": 1, "digit": 2, "format": 4, "answer": 8, "end": 16}
"""Name -> bit of `token_kinds`: the first token of a response, tokens with a digit, of a format string, of the final answer, and
the end of turn."""

MEANING = {"first": "first tokens of responses", "digit": "tokens with digits", "format": "format tokens",
           "answer": "tokens of the final answer", "end": "end-of-turn tokens"}  # fmt: skip

FORMAT_STRINGS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed", "Answer:", "answer is")
ANSWERS = (
    r"<answer>(.*?)(?:</answer>|$)", r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", r"(?i:answer\s+is|answer)\s*:?\s*(.+?)\s*\.?\s*$",
)  # fmt: skip
"""Where a response states its final answer: the first pattern that is found, the last time it is."""


class TokenKinds:
    """Tells the kinds of the tokens of responses, from their text alone: any tokenizer, no offsets needed."""

    def __init__(self, tokenizer: Any, format_strings: Sequence[str] = FORMAT_STRINGS) -> None:
        """format_strings: literal texts whose tokens are of the kind "format"."""
        self.tokenizer = tokenizer
        self.format = re.compile("|".join(map(re.escape, format_strings)) or r"(?!)")
        self.answers = [re.compile(pattern, re.DOTALL) for pattern in ANSWERS]
        self._texts: dict[int, str] = {}
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.ends = special | {int(token) for token in tokenizer.all_special_ids}

    def __call__(self, ids: Ints) -> Ints:
        """Bits of KINDS [n] for the target tokens of one turn, in order."""
        kinds = np.zeros(len(ids), np.int64)
        if not len(ids):
            return kinds
        tokens = ids.tolist()
        texts = [self._text(token) for token in tokens]
        ended = tokens[-1] in self.ends
        if ended:
            kinds[-1] |= KINDS["end"]
            texts[-1] = ""
        kinds[0] |= KINDS["first"]
        kinds[[any(c.isdigit() for c in text) for text in texts]] |= KINDS["digit"]
        text = "".join(texts)
        ends = np.cumsum([len(piece) for piece in texts])
        for found in self.format.finditer(text):
            _mark(kinds, ends, found.span(), KINDS["format"])
        answer = next((last for pattern in self.answers for last in list(pattern.finditer(text))[-1:]), None)
        if answer is not None:
            _mark(kinds, ends, answer.span(1), KINDS["answer"])
        return kinds

    def _text(self, token: int) -> str:
        """The text of one token, its leading blank kept (SentencePiece's decoder drops it)."""
        if token not in self._texts:
            text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            raw = self.tokenizer.convert_ids_to_tokens(token)
            blank = isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" ")
            self._texts[token] = f" {text}" if blank else text
        return self._texts[token]


def _mark(kinds: Ints, ends: Ints, span: tuple[int, int], bit: int) -> None:
    """Set a bit on the tokens that hold characters [start, end); ends: of each token, in characters."""
    first, stop = np.searchsorted(ends, span[0], "right"), np.searchsorted(ends, span[1], "left")
    if span[1] > span[0]:
        kinds[first : stop + 1] |= bit


def kind_bits(names: Sequence[str]) -> int:
    """The bits of some of KINDS together. Raises ValueError naming the known ones."""
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"Unknown kind of tokens {unknown[0]!r}. Known: {', '.join(KINDS)}.")
    return sum({KINDS[name] for name in names})
