"""Response text: a response and what a card declares of its tags and ending in; the text to train on, and what was done, out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from vlm_dft.cards import nearest
from vlm_dft.errors import CardError, RowError

KNOWN_TAGS = (
    "think", "thinking", "thought", "reason", "reasoning", "analysis", "answer", "solution", "summary", "caption", "conclusion",
    "description", "explanation", "rationale", "reflection", "verification", "final", "final_answer",
)  # fmt: skip
"""What reasoning sets mark their parts with, in any case. One that a card does not declare is an error, not a word."""
ALL_KEPT = {"*": "keep"}  # tags are words like others: none is looked for
ACTIONS = ("keep", "strip", "drop", "reasoning")
NAME = re.compile(r"[A-Za-z][\w-]*\Z")


@dataclass(frozen=True, slots=True)
class Finished:
    """A response as it is trained on."""

    text: str
    reasoning: str = ""  # what goes to the message's reasoning_content
    changed: tuple[str, ...] = ()  # what was done: "tag <think> made reasoning", the same words for every row


@dataclass(slots=True)
class _Open:
    """A tag that has been opened, and what it has held so far."""

    name: str
    raw: str
    held: list[str]


def check_tags(tags: object, *, where: str) -> dict[str, str]:
    """A card's `tags`, names in lower case. Raises CardError for a value that is no action, tag or wrapper."""
    if tags == ALL_KEPT:
        return dict(ALL_KEPT)
    if not isinstance(tags, Mapping) or not tags:
        raise CardError(f"{where}: tags must map names of tags to what becomes of them, found {tags!r}.")
    for name, action in tags.items():
        if not isinstance(name, str) or not NAME.match(name):
            raise CardError(
                f"{where}, tags: {name!r} is not a tag's name. Expected the bare name, such as think; or {{'*': keep}} alone."
            )
        if not isinstance(action, str):
            raise CardError(
                f"{where}, tags: {name} must be one of {', '.join(ACTIONS)}, a tag's name or a wrapper, found {action!r}."
            )
        known = {*ACTIONS, *KNOWN_TAGS, *map(str, tags)}
        if action.count("{}") != 1 and action.lower() not in {word.lower() for word in known}:
            raise CardError(
                f"{where}, tags: {name}: {action!r} is neither {', '.join(ACTIONS)}, nor the name of a known or declared tag, nor a "
                f"wrapper with one {{}}.{nearest(action, known)}"
            )
    return {str(name).lower(): str(action) for name, action in tags.items()}


def finish(text: str, tags: Mapping[str, str], *, where: str) -> Finished:
    """Do with each tag what `tags` (names in lower case) declares. Raises RowError for an undeclared or unbalanced one.

    keep: as it is. strip: the text alone stays. drop: the text goes too. reasoning: the text becomes the message's
    reasoning. Another tag's name: renamed. A wrapper such as \\boxed{}: the text goes inside its braces.
    """
    if "<" not in text or tags == ALL_KEPT:
        return Finished(text)
    names = sorted({*KNOWN_TAGS, *tags}, key=len, reverse=True)
    pieces = re.split(rf"(</?(?:{'|'.join(map(re.escape, names))})>)", text, flags=re.IGNORECASE)
    if len(pieces) == 1:
        return Finished(text)
    stack, thoughts, changed = [_Open("", "", [])], list[str](), dict[str, None]()
    for k, piece in enumerate(pieces):
        if k % 2 == 0:
            stack[-1].held.append(piece)
            continue
        name = piece.strip("</>").lower()
        if name not in tags:
            raise RowError(
                f"{where}: undeclared tag {piece}. Say in the card what becomes of it: tags: {{{name}: keep}} as it is, strip (its "
                "text stays), drop (its text goes), reasoning (the message's reasoning), another tag's name, or a wrapper "
                "with {}.",
                f"undeclared tag <{name}>",
            )
        if not piece.startswith("</"):
            stack.append(_Open(name, piece, []))
        elif stack[-1].name != name:
            raise _unbalanced(where, piece, stack[-1].raw)
        else:
            opened = stack.pop()
            stack[-1].held.append(_done(opened, piece, tags[name], thoughts, changed))
    if len(stack) > 1:
        raise _unbalanced(where, "the end of the response", stack[-1].raw)
    made = "".join(stack[0].held)
    return Finished(made.strip() if changed else made, "\n\n".join(filter(None, thoughts)), tuple(changed))


def _done(opened: _Open, closing: str, action: str, thoughts: list[str], changed: dict[str, None]) -> str:
    inside = "".join(opened.held)
    if action == "keep":
        return opened.raw + inside + closing
    if action in ACTIONS:
        done = {"strip": "stripped", "drop": "dropped with its text", "reasoning": "made reasoning"}[action]
    else:
        done = f"made {action}" if "{}" in action else f"renamed to <{action}>"
    changed[f"tag <{opened.name}> {done}"] = None
    if action == "reasoning":
        thoughts.append(inside.strip())
    if action in ("reasoning", "drop"):
        return ""
    if action == "strip":
        return inside.strip()
    return action.replace("{}", "{" + inside.strip() + "}") if "{}" in action else f"<{action}>{inside}</{action}>"


def _unbalanced(where: str, found: str, opened: str) -> RowError:
    expected = f"</{opened.strip('<>')}>" if opened else "no closing tag"
    name = (opened or found).strip("</>").lower()
    return RowError(
        f"{where}: unbalanced tags: expected {expected}, found {found}. Mend the response, or leave the row out.",
        f"unbalanced tag <{name}>",
    )


def with_ending(text: str, ending: str) -> tuple[str, bool]:
    """(the text ending in `ending`, whether that was put there). The same last sentence but for blanks and a full stop is one."""
    said, wanted = _bare(text), _bare(ending)
    before = said[: -len(wanted)].rstrip() if said.endswith(wanted) else None
    begins = before is not None and (not before or before[-1] in ".!?:;。！？>" or said[: -len(wanted)][-1:] == "\n")
    return (text, False) if begins else (f"{text.rstrip()}\n{ending}", True)


def _bare(text: str) -> str:
    """A text with its blanks squeezed and the last full stops taken off; line ends stay, as they begin a sentence."""
    lines = [" ".join(line.split()) for line in text.strip().rstrip(".。 \t\n").split("\n")]
    return "\n".join(lines)
