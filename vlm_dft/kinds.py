"""Kinds of response tokens: the target tokens of turns in; what each is (first, digit, format, final answer, end of turn) out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_dft.explain import token_texts

if TYPE_CHECKING:
    from vlm_dft.alignment import Ints

KINDS = {"first": 1, "digit": 2, "format": 4, "answer": 8, "end": 16}
"""Name -> bit of `token_kinds`: the first token of a response, tokens with a digit, of a format string, of the final answer, and
the end of turn."""

MEANING = {"first": "first tokens of responses", "digit": "tokens with digits", "format": "format tokens",
           "answer": "tokens of the final answer", "end": "end-of-turn tokens"}  # fmt: skip

FORMAT_STRINGS = ("<think>", "</think>", "<answer>", "</answer>", "\\boxed", "Answer:", "answer is")
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
STATED = re.compile(r"(?i:\banswer\s*(?:is\b\s*:?|:))\s*")  # "Answer: 3", "The answer is 3."


def final_answer(text: str) -> tuple[int, int] | None:
    """Where a response states its final answer: in the last <answer> tag, else the last \\boxed, else after the last "answer is"
    or "answer:", to the end of the text and without a full stop. Characters [start, end), or None."""
    for found in reversed(list(TAGGED.finditer(text))):
        return found.span(1)
    boxed = text.rfind("\\boxed{")
    if boxed >= 0:
        depth, start = 0, boxed + len("\\boxed{")
        for k in range(start - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[k], 0)
            if depth == 0:
                return start, k
    for found in reversed(list(STATED.finditer(text))):
        said = text[found.end() :].rstrip().removesuffix(".").rstrip()
        if said:
            return found.end(), found.end() + len(said)
    return None


class TokenKinds:
    """Tells the kinds of the tokens of responses, from their text alone: any tokenizer, no offsets needed."""

    def __init__(self, tokenizer: Any, format_strings: Sequence[str] = FORMAT_STRINGS) -> None:
        """format_strings: literal texts whose tokens are of the kind "format"."""
        self.tokenizer = tokenizer
        self.format = re.compile("|".join(map(re.escape, format_strings)) or r"(?!)")
        self._texts: dict[int, str] = {}
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.ends = special | {int(token) for token in tokenizer.all_special_ids}

    def __call__(self, ids: Ints) -> Ints:
        """Bits of KINDS [n] for the target tokens of one turn, in order."""
        import numpy as np  # not above: the checks before a run know the kinds by name, and need to be quick

        kinds = np.zeros(len(ids), np.int64)
        if not len(ids):
            return kinds
        tokens = ids.tolist()
        texts = [self._text(token) for token in tokens]
        if any("\N{REPLACEMENT CHARACTER}" in text for text in texts):  # characters spread over several tokens
            texts = token_texts(tokens, lambda some: self.tokenizer.decode(some, skip_special_tokens=False))
        stop = len(tokens)
        while stop and tokens[stop - 1] in self.ends:  # Cohere ends a turn with two tokens
            stop -= 1
        texts = texts[:stop]
        kinds[stop:] = KINDS["end"]
        kinds[0] |= KINDS["first"]
        said, text = kinds[:stop], "".join(texts)
        said[[any(c.isdigit() for c in text) for text in texts]] |= KINDS["digit"]
        ends = np.cumsum([len(piece) for piece in texts])
        for found in self.format.finditer(text):
            _mark(said, ends, found.span(), KINDS["format"])
        answer = final_answer(text)
        if answer is not None:
            _mark(said, ends, answer, KINDS["answer"])
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
    """Set a bit on the tokens that hold characters [start, end); ends: of each token, in characters.

    Of a character of several tokens the first one holds it, and those after it nothing: they go with it.
    """
    if span[1] > span[0]:
        last = ends.searchsorted(span[1], "left")  # the token that holds the last character, or is the first of it
        stop = ends.searchsorted(ends[last], "right")
        kinds[ends.searchsorted(span[0], "right") : stop] |= bit


def kind_bits(names: Sequence[str]) -> int:
    """The bits of some of KINDS together. Raises ValueError naming the known ones."""
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise ValueError(f"Unknown kind of tokens {unknown[0]!r}. Known: {', '.join(KINDS)}.")
    return sum({KINDS[name] for name in names})
