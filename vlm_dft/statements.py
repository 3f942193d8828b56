"""Statements: response text in, the places where it states its answer out, most trusted last. Linear time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

HEAD, TAIL = 8_000, 24_000
"""Characters read of a longer response: conclusions stand at its start or at its end."""

SPAN = 400
"""Characters read of one statement."""


class Statement(NamedTuple):
    """What stands where an answer is stated, where it starts in the text, and the name of the place."""

    text: str
    start: int
    rule: str


SPECIAL = re.compile(
    r"</?s>|<\|[\w-]{1,40}\|>|<(?:/?(?:img|image\d*|pad|unk|eos|bos|s|p|b|strong|i|em))>|<br\s?/?>", re.IGNORECASE
)
UNSEEN = re.compile("[\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|<\|end_of_thought\|>|◁/think▷", re.IGNORECASE)
THOUGHT_START = re.compile(r"<(?:think|thinking|thought|reasoning)>|<\|begin_of_thought\|>|◁think▷", re.IGNORECASE)
STYLE = re.compile(
    r"\\(?:text(?:bf|rm|it|tt|sf|normal)?|math(?:bf|rm|it|sf|tt|cal)|mbox|bm|boldsymbol|operatorname)\s?\*?\s?(?=\{)"
)
SPACES = re.compile(r"\\[,;:! ]|\\q?quad\b|[~\u00a0\u3000\u2009\u202f]")
WIDE = str.maketrans("（）［］：，．；？！＝＋－／％−–＄", "()[]:,.;?!=+-/%--$")


def settled(response: str) -> str:
    """What counts of a response: after its thoughts, without special tokens and unseen characters, bounded."""
    if len(response) > HEAD + TAIL:
        response = f"{response[:HEAD]}\n{response[-TAIL:]}"
    ends = list(THOUGHT_END.finditer(response))
    if ends and response[ends[-1].end() :].strip():
        response = response[ends[-1].end() :]
    text = THOUGHT_START.sub("\n", THOUGHT_END.sub("\n", response))
    text = UNSEEN.sub("", SPECIAL.sub(" ", text)).translate(WIDE)
    return SPACES.sub(" ", STYLE.sub("", text)).strip()


BOX = re.compile(r"\\?f?boxed\s?\{|\\fbox\s?\{")
TAG = re.compile(r"<answer>|<final_answer>|<\|begin_of_solution\|>|<\|begin_of_box\|>|<ans>", re.IGNORECASE)
TAG_END = re.compile(r"</?answer>|</final_answer>|<\|end_of_\w{3,8}\|>|</ans>", re.IGNORECASE)
NOUN = r"(?:answer|option|choice|solution|result|conclusion|selection|letter)s?"
CUE = re.compile(
    rf"\b{NOUN}\b[*_\"'`]{{0,3}}(?:[^.\n:=]|\.(?=\d)){{0,90}}?(?:\b(?:is|are|was|be|becomes|remains)\b(?!\s+(?:not\b|n't))|[:=]|->|→)[*_ ]{{0,4}}"
    r"|(?:答案|正确选项|正确答案|选项|结果|结论)[^。\n]{0,12}?[是为:选]{1,2}\s?"
    r"|(?:故|所以|因此|应该?|则|可|综上,?)选择?\s?:?\s?|####\s?",
    re.IGNORECASE,
)
END = re.compile(r"[.!?](?=[\s*\"')]|$)(?<!\b[A-Za-z]\.)(?<!\(\w\.)(?<!vs\.)(?<!no\.)|[。\n]")


def boxed(text: str) -> Iterator[Statement]:
    """What the last few boxes hold, braces balanced; an unclosed box holds the rest of its line."""
    for found in list(BOX.finditer(text))[-4:]:
        depth, end = 1, found.end()
        limit = min(len(text), end + SPAN)
        while end < limit and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        inside = text[found.end() : end - 1] if not depth else text[found.end() : limit].split("\n", 1)[0]
        yield Statement(inside.strip(), found.start(), "boxed")


def tagged(text: str) -> Iterator[Statement]:
    """What the last few answer tags hold."""
    for found in list(TAG.finditer(text))[-3:]:
        end = TAG_END.search(text, found.end())
        yield Statement(text[found.end() : end.start() if end else None][:SPAN].strip(), found.start(), "answer tag")


def sentence(text: str, start: int) -> str:
    """From start to the end of its sentence; an empty rest of a line gives the next line that is not."""
    piece = text[start : start + SPAN]
    lead = len(piece) - len(piece.lstrip())
    found = END.search(piece, lead)
    return piece[lead : found.start() if found else None].strip()


def announced(text: str) -> Iterator[Statement]:
    """What follows "the answer is", "Answer:", "option:", 答案是, 故选 and the like."""
    for found in list(CUE.finditer(text))[-40:]:
        yield Statement(sentence(text, found.end()), found.start(), "announced")


def sentences(text: str) -> list[str]:
    """The text's sentences in order, without empty ones."""
    return [piece.strip() for piece in END.split(text) if piece and piece.strip()]


def statements(text: str) -> list[Statement]:
    """Every place of a settled text where an answer is stated outright, in the order of the text."""
    found = [*boxed(text), *tagged(text), *announced(text)]
    return sorted((one for one in found if one.text), key=lambda one: one.start)
