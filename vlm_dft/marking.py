"""Marking: an example and a chat template in; the rendered text and the characters of its responses out.

Render, mark by text, process once, align, prove, else raise: nothing here knows a model family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from vlm_dft.chat import Example, Message, is_trained, text_of
from vlm_dft.errors import MaskError
from vlm_dft.markers import MARKERS, count_markers
from vlm_dft.templates import ChatTemplate

FIRST_SENTINEL = 0x100000  # private-use characters of plane 16: no tokenizer or template gives them a meaning
SENTINELS = re.compile("[\U00100000-\U0010ffef]")
TAG = re.compile(
    r"(</?(?:think|reason|thought|analysis)\w*>|◁/?think▷|\[/?THINK\])", re.IGNORECASE
)  # templates cut answers there
REMEDIES = {"reasoning": ": write it into the content, between the model's own thinking tags, or take it out."}
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Turn:
    """A trained assistant turn: characters [start, end) of the rendered text, end-of-turn token included where there is one."""

    message: int  # its place in the conversation
    start: int
    end: int
    method: str  # how its characters were found: "generation prompt" (from its end on), "sentinels" or "suffix"
    weight: float = 1.0
    objective: str | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """A rendered conversation: its text, its trained turns, and what is to be said about it."""

    text: str
    turns: list[Turn]
    notes: list[str] = field(default_factory=list)
    markup: list[Span] = field(default_factory=list)  # media placeholders, with the template's tokens around them

    @property
    def spans(self) -> list[Span]:
        """Characters [start, end) of each trained turn."""
        return [(turn.start, turn.end) for turn in self.turns]


class Owner(NamedTuple):
    """What a pair of sentinels encloses."""

    message: int
    name: str  # "content", "reasoning" or "tool_calls"
    text: str


def mark_responses(example: Example, template: ChatTemplate, *, where: str) -> Marked:
    """Render an example and find the assistant's texts in it by sentinels, which works for any chat template.

    Each trained text, reasoning and tool name is rendered between two private-use characters of its own; what they enclose
    must be the row's own words, the text without them the plain render, and its beginning the inference prompt of the last
    answer. A turn's span runs from the generation prompt's end to the end-of-turn token: all that the model must write.
    Where a template renders a finished conversation otherwise than the prompt of its last answer, the text is that prompt
    and the answer. A template without an end-of-turn token gets the tokenizer's end of sequence after the last answer.
    Raises MaskError naming the sample.
    """
    messages, tools, escaped = template.escape(example.messages, example.tools, where=where)
    _check_answers(messages, where)
    marked, owners = _with_sentinels(messages)
    indices: dict[int, list[int]] = {}
    for index, owner in enumerate(owners):
        indices.setdefault(owner.message, []).append(index)
    said = template.render(marked, tools=tools, where=where)
    plain = SENTINELS.sub("", said)
    found = _spans(said, owners, where)
    notes = ["literal control token kept as text"] if escaped else []
    for kind, media in (("image", example.images), ("video", example.videos)):
        if not media and count_markers(example.messages, kind):
            notes.append(f"{MARKERS[kind]} kept as text: the row has no {kind}s")
    last, opened = len(messages) - 1, 0
    if template.render(messages, tools=tools, where=where) != plain:
        raise MaskError(
            f"{where}: the chat template changes the assistant's text, so the response cannot be found in it. Expected "
            f"the template to render an assistant's content as it is.\n  rendered: {excerpt(plain, len(plain))}"
        )
    if tools and template.render(messages, where=where) == plain:
        raise MaskError(
            f"{where}: the chat template of {type(template.processor).__name__} leaves out the row's tools. Describe them in "
            "the system's text, or take them out."
        )
    if is_trained(messages[last]) and last:
        prompt = template.render(messages[:last], tools=tools, prompt=True, where=where)
        opened = len(prompt)
        if not plain.startswith(prompt):
            history = template.render(marked[:last], tools=tools, prompt=True, where=where)
            mine = {index: found[index] for index in indices[last] if index in found}
            plain, moved = _after_prompt(prompt, messages, mine, plain, template, where)
            found = {**_spans(history, owners, where), **moved}
            notes.append("trained after the inference prompt: the template renders a finished conversation otherwise")
    template.check_texts(messages, plain, where=where)
    turns: list[Turn] = []
    for k, message in enumerate(messages):
        if not is_trained(message):
            continue
        mine = {index: found[index] for index in indices[k] if index in found}
        lost = [owners[index].name for index in indices[k] if index not in found]
        if "content" in lost or "tool_calls" in lost or not mine or (lost and k == last):
            raise MaskError(
                f"{where}, message {k}: the chat template leaves out the assistant's {lost[0]}. Expected its text in the "
                f"rendered conversation{REMEDIES.get(lost[0], '.')}\n  rendered: {excerpt(plain, len(plain))}"
            )
        if lost:
            notes.append(
                "reasoning of an earlier turn dropped by the chat template (unroll trains every turn with its own)"
            )
        pieces = list(mine.values())
        turn, plain = _extent(message, k, pieces, plain, template, turns[-1].end if turns else 0, k == last, where)
        if k == last and opened:
            turn = replace(turn, start=opened, method="generation prompt")
        turns.append(turn)
    if turns[-1].end == len(plain) and not template.end and plain.endswith(template.tokenizer.eos_token or "\0"):
        notes.append("end of sequence added after the last answer: the chat template writes no end of turn")
    markup = template.markup(plain) if example.images or example.videos else []
    return Marked(plain, turns, notes, markup)


def _after_prompt(
    prompt: str, messages: Sequence[Message], mine: Mapping[int, Span], plain: str, template: ChatTemplate, where: str
) -> tuple[str, dict[int, Span]]:  # fmt: skip
    """The inference prompt and the last answer as one text, and where the answer's pieces are in it."""
    last = len(messages) - 1
    if not mine:
        raise MaskError(f"{where}: the chat template leaves out the last answer of a finished conversation.")
    first, _ = _own_edges(text_of(messages[last]["content"]), plain, min(mine.values()), max(mine.values()))
    _check_same_prompt(messages[:last], prompt, plain[:first], where)
    turn, _ = _extent(messages[last], last, list(mine.values()), plain, template, 0, True, where)
    opening = plain[turn.start : first] if plain[turn.start : first].strip() else ""  # a thinking block, say
    by = len(prompt) + len(opening) - first
    return prompt + opening + plain[first:], {index: (a + by, b + by) for index, (a, b) in mine.items()}


def _spans(marked: str, owners: Sequence[Owner], where: str) -> dict[int, Span]:
    """{pair of sentinels: what it encloses, as a span of the text without sentinels}, which must be the row's own words."""
    opened: dict[int, int] = {}
    spans: dict[int, Span] = {}
    for taken, match in enumerate(SENTINELS.finditer(marked)):
        index, closes = divmod(ord(match.group()) - FIRST_SENTINEL, 2)
        if closes and index in opened and index not in spans:
            first = opened[index]
            inside = SENTINELS.sub("", marked[first : match.start()])
            if inside != owners[index].text:
                raise MaskError(
                    f"{where}: the chat template changes the assistant's text, so the response cannot be found in it.\n"
                    f"  expected: {excerpt(owners[index].text, 160)!r}\n  found:    {excerpt(inside, 160)!r}"
                )
            spans[index] = (match.start() - taken - len(inside), match.start() - taken)
        elif not closes:
            opened.setdefault(index, match.end())
    return spans


def _check_same_prompt(messages: Sequence[Message], prompt: str, rendered: str, where: str) -> None:
    """Raise MaskError unless the finished conversation opens like the prompt but for blanks, or lost what the prompt says.

    LLaVA-OneVision writes other blanks before an answer than in its generation prompt; Pixtral leaves the system's text
    out of a conversation that ends with an answer. Any other difference would train what is never asked.
    """
    lost = any(text_of(m["content"]).strip() not in rendered for m in messages if m["role"] in ("system", "user"))
    if not lost and "".join(prompt.split()) != "".join(rendered.split()):
        raise MaskError(
            f"{where}: the training prompt is not the inference prompt.\n  inference: {excerpt(prompt, len(prompt))!r}\n"
            f"  training:  {excerpt(rendered, len(rendered))!r}"
        )


def _check_answers(messages: Sequence[Message], where: str) -> None:
    if not any(map(is_trained, messages)):
        raise MaskError(f"{where}: no assistant message to train on (roles: {[m['role'] for m in messages]}).")
    for k, message in enumerate(messages):
        if is_trained(message) and not text_of(message["content"]).strip() and not message.get("tool_calls"):
            raise MaskError(
                f"{where}, message {k}: the assistant's answer is empty. Drop the row, or set 'train': False."
            )


def _with_sentinels(messages: Sequence[Message]) -> tuple[list[Message], list[Owner]]:
    """The messages with every trained text wrapped, and for each pair of sentinels what it belongs to."""
    owners: list[Owner] = []

    def wrap(text: str, k: int, name: str) -> str:
        pieces = TAG.split(text)
        if not any(piece.strip() for piece in pieces[::2]):
            pieces = [text]  # nothing but tags
        for place, piece in enumerate(pieces):
            core = piece.strip()  # templates strip what they are given, and would strip around a sentinel
            if core and place % 2 == 0:  # the odd ones are the tags
                first = FIRST_SENTINEL + 2 * len(owners)
                if first + 1 > 0x10FFEF:
                    raise MaskError("A conversation has more than 32,000 pieces of answers. Split it.")
                owners.append(Owner(k, name if place == len(pieces) - 1 else "reasoning", core))
                at = piece.index(core)
                pieces[place] = f"{piece[:at]}{chr(first)}{core}{chr(first + 1)}{piece[at + len(core) :]}"
        return "".join(pieces)

    marked = []
    for k, message in enumerate(messages):
        if is_trained(message):
            content, message = message["content"], dict(message)
            if "reasoning_content" in message:
                message["reasoning_content"] = wrap(message["reasoning_content"], k, "reasoning")
            if isinstance(content, str):
                message["content"] = wrap(content, k, "content")
            else:
                message["content"] = [
                    {**p, "text": wrap(p["text"], k, "content")} if p["type"] == "text" else p for p in content
                ]
            if message.get("tool_calls"):
                named = partial(wrap, k=k, name="tool_calls")
                message["tool_calls"] = [_named(call, named) for call in message["tool_calls"]]
        marked.append(message)
    return marked, owners


def _named(call: Any, wrap: Callable[[str], str]) -> Any:
    """A tool call ({"name": ...} or {"function": {"name": ...}}) with its name wrapped."""
    if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
        return {**call, "function": _named(call["function"], wrap)}
    return {**call, "name": wrap(call["name"])} if isinstance(call, Mapping) and "name" in call else call


def mark_suffix(example: Example, template: ChatTemplate, *, where: str) -> Marked:
    """The same for a processor that takes one prompt and its answer apart and has no chat template (PaliGemma)."""
    messages, _, escaped = template.escape(example.messages, where=where)
    _check_answers(messages, where)
    if not example.images:
        raise MaskError(
            f"{where}: {type(template.processor).__name__} needs an image in every row, found none. Drop the row."
        )
    prompt = suffix_prompt(messages[:-1], template, where=where)
    answer, turn = text_of(messages[-1]["content"]), messages[-1]
    media = not isinstance(turn["content"], str) and any(part["type"] != "text" for part in turn["content"])
    if not is_trained(turn) or media or "reasoning_content" in turn or turn.get("tool_calls"):
        raise MaskError(f"{where}: expected the last message to be a plain answer, found {excerpt(str(turn), 160)!r}.")
    end = len(prompt) + len(answer) + len(template.tokenizer.eos_token)
    found = Turn(len(messages) - 1, len(prompt), end, "suffix", float(turn.get("weight", 1)), turn.get("objective"))
    return Marked(
        prompt + answer + template.tokenizer.eos_token, [found],
        ["literal control token kept as text"] if escaped else [],
    )  # fmt: skip


def suffix_prompt(messages: Sequence[Message], template: ChatTemplate, *, where: str) -> str:
    """The prompt of a processor without a chat template: image placeholders first, then the user's text."""
    if [m["role"] for m in messages] != ["user"]:
        raise MaskError(
            f"{where}: {type(template.processor).__name__} takes one user message and one answer, found the roles "
            f"{[m['role'] for m in messages]} before the answer. Merge the turns, or unroll the row."
        )
    content = messages[0]["content"]
    images = [] if isinstance(content, str) else [p for p in content if p["type"] == "image"]
    return (template.placeholder("image") or "") * len(images) + text_of(content)


def _extent(
    message: Message, k: int, pieces: Sequence[Span], plain: str, template: ChatTemplate, after: int, is_last: bool, where: str
) -> tuple[Turn, str]:  # fmt: skip
    """The turn that the pieces belong to, from the generation prompt's end to its end token; and the text, to which an
    end of sequence is added if it is the last and the template ends it with nothing."""
    said, calls = text_of(message["content"]), bool(message.get("tool_calls"))
    first, last = _own_edges(said, plain, min(pieces), max(pieces))
    start, method, core = first, "sentinels", min(pieces)[0]
    for header in template.headers:  # up to the core: the blanks before it may be the header's, where a template strips
        at = plain.rfind(header, after, core) + len(header) if header else first - _blanks_before(plain, first)
        if at - len(header) >= after and (template.is_glue(plain[at:core]) or (calls and not said.strip())):
            if header == template.headers[0] or plain[at:first].strip():
                start, method = at, "generation prompt"
            break  # the blanks after what is only the beginning of the generation prompt are not the model's to write
    media = template.markup(plain, last) if is_last else []
    if media and not plain[last : media[0][0]].strip():
        last = media[-1][1]  # an answer that ends with a picture
    at = plain.find(template.end, last) if template.end else -1
    token: str | None
    if at >= 0 and (calls or template.is_glue(plain[last:at])):  # a call's arguments have no sentinels
        token, end = template.end, at
    else:
        token, end = template.special_at(plain, last), last  # GLM's turn ends with the next role's token
    if token is None and (is_last or template.end):
        if plain[last:].strip() or not is_last:
            raise MaskError(
                f"{where}, message {k}: no end-of-turn token follows the answer, so the model would never learn to stop. "
                f"Expected {template.end or 'a special token'!r}, found {plain[last : last + 20]!r} after "
                f"{excerpt(plain, last)!r}."
            )
        token = template.tokenizer.eos_token
        if not token:
            raise MaskError(f"{where}: neither the chat template nor the tokenizer has a token that ends the answer.")
        plain, end = plain[:last] + token, last
    stop = last if token is None else end + len(token)
    return Turn(k, start, stop, method, float(message.get("weight", 1.0)), message.get("objective")), plain


def _own_edges(said: str, plain: str, first: Span, last: Span) -> tuple[int, int]:
    """From where to where an answer's own text goes in the plain text: its pieces, and the blanks and tags at its edges that
    stood outside the sentinels, where the template has left them."""
    before = said.find(plain[first[0] : first[1]])
    lead = said[:before] if before > 0 else ""
    words = plain[last[0] : last[1]]
    after = said.rfind(words)
    trail = said[after + len(words) :] if after >= 0 else ""
    return (
        first[0] - (len(lead) if plain.endswith(lead, 0, first[0]) else 0),
        last[1] + (len(trail) if plain.startswith(trail, last[1]) else 0),
    )


def _blanks_before(text: str, at: int) -> int:
    return at - len(text[:at].rstrip())


def excerpt(text: str, end: int, width: int = 160) -> str:
    """At most `width` characters of a text, up to `end`."""
    piece = text[max(0, end - width) : end]
    return piece if end <= width else "..." + piece
