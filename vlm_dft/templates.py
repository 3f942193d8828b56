"""Chat templates: a processor in; its conversations rendered, and what its template does, found by rendering small ones."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from jinja2.exceptions import TemplateError

from vlm_dft.chat import OURS, SETTINGS, Message, text_of
from vlm_dft.errors import MaskError, RowError

USER, ANSWER, SYSTEM = "qzu1", "qza2", "qzs3"  # words that no template holds
BREAK = "\U0010fff0"  # private use: breaks a literal control token in two; its own tokens are taken out again
RESERVED = re.compile("[\ud800-\udfff\U00100000-\U0010ffff]")
TOKEN_NAME = re.compile(r"^(?!num_|n_).*token(_ids?|s)?$")
MEDIA_NAME = re.compile(
    r"image|img|video|vision|audio|boi|eoi|(row|col)_?\d|tile|slice|patch|fake_token", re.IGNORECASE
)


class ChatTemplate:
    """A processor's chat template: renders conversations, and knows the header and the end of an assistant turn.

    Nothing here knows a model family: the form of content a template takes (a string or a list of parts), its generation
    prompt and its end-of-turn token are found by rendering a conversation of two known words.
    """

    def __init__(self, processor: Any, options: Mapping[str, Any] | None = None) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.options = dict(options or {})  # variables of the template, such as enable_thinking
        self.source = str(
            getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None) or ""
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled template, which a worker compiles anew."""
        return {key: value for key, value in self.__dict__.items() if key != "_direct"}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (), prompt: bool = False, where: str = "self-test"
    ) -> str:
        """The text of messages, each content in the form that the template takes; `prompt`: ready for the assistant.

        Raises RowError naming `where` if the template refuses the conversation.
        """
        try:
            return self._render([self._formed(m) for m in messages], tools, prompt)
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise RowError(
                f"{where}: the chat template of {type(self.processor).__name__} refuses it: {error.message or error} "
                f"(roles: {roles})"
            ) from error

    def _render(self, messages: list[Message], tools: Sequence[Any] = (), prompt: bool = False) -> str:
        return (self._direct or self._by_processor)(messages, tools, prompt)

    def _by_processor(self, messages: list[Message], tools: Sequence[Any] = (), prompt: bool = False) -> str:
        holder = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        text = holder.apply_chat_template(
            messages, tools=list(tools) or None, add_generation_prompt=prompt, tokenize=False, **self.options
        )
        return text if isinstance(text, str) else str(text[0])

    @cached_property
    def _direct(self) -> Callable[..., str] | None:
        """The compiled template itself, which spares two thirds of a render; None where transformers (whose function is
        private) does not give it, or where it does not say on small conversations what the processor says."""
        template = getattr(self.processor, "chat_template", None)
        try:
            module = importlib.import_module("transformers.utils.chat_template_utils")
            compiled = module._compile_jinja_template(template)
        except (ImportError, AttributeError, TypeError, TemplateError):
            return None

        def render(messages: list[Message], tools: Sequence[Any] = (), prompt: bool = False) -> str:
            chat = [
                {"thinking": m["reasoning_content"], **m} if "reasoning_content" in m else m for m in messages
            ]  # the other name by which templates read it
            words = {**self.tokenizer.special_tokens_map, **self.options}
            return str(
                compiled.render(
                    messages=chat, tools=list(tools) or None, documents=None, add_generation_prompt=prompt, **words
                )
            )

        asked: Message = {"role": "user", "content": USER}
        answered: Message = {"role": "assistant", "content": ANSWER}
        system, thought = {"role": "system", "content": SYSTEM}, {**answered, "reasoning_content": SYSTEM}
        picture: Message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": USER}]}
        tool = [{"type": "function", "function": {"name": SYSTEM, "description": USER, "parameters": {}}}]
        chats: list[list[Message]] = [[asked], [system, asked, answered], [asked, thought, asked], [picture, answered]]
        chats += [[_in_form(m, isinstance(m["content"], str)) for m in chat] for chat in chats]
        for chat in chats:
            for tools, prompt in ((), False), ((), True), (tool, True):
                if _said(render, chat, tools, prompt) != _said(self._by_processor, chat, tools, prompt):
                    return None
        return render

    def _formed(self, message: Message) -> Message:
        content = message["content"]
        kept = {key: value for key, value in message.items() if key not in OURS}
        as_parts = self.forms[message["role"]]
        if isinstance(content, str):
            return {**kept, "content": [{"type": "text", "text": content}] if as_parts and content else content}
        media = [part["type"] for part in content if part["type"] != "text"]
        if as_parts or (media and (message["role"] == "tool" or self.placeholder("image") is None)):
            return {**kept, "content": [p if p["type"] == "text" else {"type": p["type"]} for p in content]}
        words = [p["text"] if p["type"] == "text" else self.placeholder(p["type"]) or "" for p in content]
        return {**kept, "content": "".join(words)}

    @cached_property
    def forms(self) -> dict[str, bool]:
        """{role: whether its content is given as a list of parts}, the first form in which no word is lost or mangled.

        Some templates pass over a content string in silence, others print a list of parts as Python would.
        """
        asked, answered = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        tried: list[str] = []
        for parts in (("user", "assistant"), ("user",), ()):
            forms = {"user": "user" in parts, "assistant": "assistant" in parts}
            try:
                text = self._render([_in_form(m, forms[m["role"]]) for m in (asked, answered)])
            except Exception as error:  # noqa: BLE001  a template raises whatever it likes; the last one is reported below
                tried.append(f"{type(error).__name__}: {error}")
                continue
            if text.count(USER) == text.count(ANSWER) == 1 and not re.search(r"""['"]type['"]""", text):
                return {**forms, "system": self._system_form(forms), "tool": False}
            tried.append(f"a conversation of {USER!r} and {ANSWER!r} became {text!r}")
        raise MaskError(
            f"{type(self.processor).__name__}: its chat template renders a user's and an assistant's text neither from "
            f"strings nor from lists of parts. {tried[-1]}"
        )

    def _system_form(self, forms: Mapping[str, bool]) -> bool:
        """Like the user's where that works; a template without a system turn is noticed when one is rendered."""
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
        for form in (forms["user"], not forms["user"]):
            try:
                text = self._render([_in_form(messages[0], form), _in_form(messages[1], forms["user"])])
            except Exception:  # noqa: BLE001  see above
                continue
            if text.count(SYSTEM) == 1 and not re.search(r"""['"]type['"]""", text):
                return form
        return forms["user"]

    @cached_property
    def headers(self) -> list[str]:
        """What opens an assistant's turn, the longest first: the generation prompt, and what it shares with a past turn.

        They differ where the generation prompt opens a thinking block that past turns do not have.
        """
        asked, answered = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        before, inference = self.render([asked]), self.render([asked], prompt=True)
        header = inference[len(_shared(before, inference)) :]
        past = self.render([asked, answered, asked])
        opened = past[past.find(USER) + len(USER) : past.find(ANSWER)]
        start = opened.find(header[: max(1, len(header) // 2)]) if header else -1
        shared = _shared(header, opened[start:]) if start >= 0 else ""
        return [header] if shared in ("", header) else [header, shared]

    @cached_property
    def end(self) -> str:
        """The special tokens that end the last assistant's turn, by the template's own account; "" where it writes none."""
        asked, answered = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        tail = self.render([asked, answered]).split(ANSWER, 1)[1].lstrip()
        found = ""
        while token := self.special_at(tail, len(found)):  # Cohere writes two
            found += token
        return found

    def special_at(self, text: str, at: int = 0) -> str | None:
        """The special token that a text begins with, if it begins with one that stands for no media."""
        return next((t for t in self._end_tokens if text.startswith(t, at)), None)

    @cached_property
    def _end_tokens(self) -> list[str]:
        tokens = {*self.tokenizer.all_special_tokens, *self._extra_tokens}
        return sorted((t for t in tokens if t and t not in self.media_tokens), key=len, reverse=True)

    @cached_property
    def _extra_tokens(self) -> set[str]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {str(token) for token in added.values() if getattr(token, "special", False)}

    def is_glue(self, text: str) -> bool:
        """Whether a text is only what a template writes between a turn's header and its answer: blanks, tags, special tokens."""
        return self._glue.fullmatch(text) is not None

    @cached_property
    def _glue(self) -> re.Pattern[str]:
        special = "|".join(map(re.escape, self._end_tokens)) or r"(?!)"
        return re.compile(rf"(\s|</?[A-Za-z_]+>|◁/?think▷|\[/?THINK\]|{special})*")

    def placeholder(self, kind: str) -> str | None:
        """The token that stands for an image or a video in a text, by the processor's own account."""
        token = getattr(self.processor, f"{kind}_token", None) or getattr(self.tokenizer, f"{kind}_token", None)
        return str(token) if token else None

    @cached_property
    def media_ids(self) -> set[int]:
        """Ids that stand for pixels or enclose them: added tokens that the processor or its tokenizer name or spell that way."""
        found: set[int] = set()
        for holder in (self.processor, self.tokenizer):
            named = [n for n in {**vars(type(holder)), **vars(holder)} if MEDIA_NAME.search(n) and TOKEN_NAME.search(n)]
            for name in (
                *named,
                *(f"{kind}_token{end}" for kind in ("image", "video", "audio") for end in ("", "_id")),
            ):
                found |= set(self.ids_of(getattr(holder, name, None)))
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        found |= {i for i, token in added.items() if token.special and MEDIA_NAME.search(str(token))}
        own = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.tokenizer.bos_token_id}
        return (found & set(added)) - own

    def ids_of(self, value: Any) -> Iterable[int]:
        """The ids that a value names: an id, a token, or a list of either; nothing for anything else."""
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, int):
            yield value
        elif isinstance(value, str):
            token = self.tokenizer.convert_tokens_to_ids(value)
            if isinstance(token, int) and token != self.tokenizer.unk_token_id:
                yield token
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from self.ids_of(item)

    @cached_property
    def media_tokens(self) -> set[str]:
        """The tokens of `media_ids`."""
        return {t for t in self.tokenizer.convert_ids_to_tokens(sorted(self.media_ids)) if t}

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches the tokens by which a text would speak for the template: media, turns, beginning and end of sequence.

        Special tokens that a template does not write, such as Qwen's <|box_start|>, belong to the text.
        """
        own = (getattr(self.tokenizer, f"{name}_token", None) for name in ("bos", "eos", "pad", "unk"))
        written = {t for t in (*self.tokenizer.all_special_tokens, *self._extra_tokens) if t in self.source}
        tokens = {*self.media_tokens, *written, *self._turn_tokens, *(str(t) for t in own if t)}
        tokens |= {t for kind in SETTINGS if (t := self.placeholder(kind))}
        long = sorted((t for t in tokens if len(t) > 1), key=len, reverse=True)  # one character cannot be broken in two
        return re.compile("|".join(map(re.escape, long)) or r"(?!)")

    def escape(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, where: str
    ) -> tuple[list[Message], list[Any], int]:
        """(messages, tools, count): literal control tokens in their words broken by BREAK, so that they stay text.

        Raises MaskError for characters that we need ourselves, or that are none.
        """
        count = 0

        def broken(value: Any) -> Any:
            nonlocal count
            if isinstance(value, str):
                if reserved := RESERVED.search(value):
                    raise MaskError(
                        f"{where}: the text holds U+{ord(reserved.group()):04X}: expected no lone surrogate, and no character "
                        "from U+100000 on (they mark responses here). Remove it."
                    )
                while self.control.search(value):
                    value, found = self.control.subn(lambda m: m.group()[0] + BREAK + m.group()[1:], value)
                    count += found
                return value
            if isinstance(value, Mapping):
                return {key: broken(item) for key, item in value.items()}
            return [broken(item) for item in value] if isinstance(value, (list, tuple)) else value

        said = ("content", "reasoning_content", "tool_calls", "name")
        escaped = [{key: broken(value) if key in said else value for key, value in m.items()} for m in messages]
        return escaped, broken(list(tools)), count

    def markup(self, text: str, start: int = 0) -> list[tuple[int, int]]:
        """Characters [a, b) of the media placeholders from `start` on, with the special tokens that stand right beside them."""
        found: list[tuple[int, int]] = []
        for match in self._placeholders.finditer(text, start):
            a, b = match.span()
            if found and a < found[-1][1]:
                continue
            while token := next((t for t in self._beside if text.endswith(t, start, a)), None):
                a -= len(token)
            while token := next((t for t in self._beside if text.startswith(t, b)), None):
                b += len(token)
            found.append((a, b))
        return found

    @cached_property
    def _placeholders(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(t) for kind in SETTINGS if (t := self.placeholder(kind))) or r"(?!)")

    @cached_property
    def _turn_tokens(self) -> set[str]:
        """The special tokens of a conversation without media: what opens and ends turns."""
        if not self.source:
            return set()
        asked, answered = {"role": "user", "content": USER}, {"role": "assistant", "content": ANSWER}
        text = self.render([asked, answered, asked], prompt=True)
        return {t for t in self._end_tokens if t in text}

    @cached_property
    def _beside(self) -> list[str]:
        apart = {self.tokenizer.eos_token, *self._turn_tokens}
        return sorted({*self.media_tokens, *(t for t in self._end_tokens if t not in apart)}, key=len, reverse=True)

    def check_texts(self, messages: Sequence[Message], rendered: str, *, where: str) -> None:
        """Raise MaskError if the template lost or changed what a user, the system or a tool said."""
        at = 0
        for k, message in enumerate(messages):
            if (
                message["role"] == "assistant"
            ):  # its words are marked, or context that a template may shorten; not its calls
                for call in message.get("tool_calls", []):
                    called = call.get("function", call)["name"]
                    if called not in rendered:
                        raise MaskError(
                            f"{where}, message {k}: the chat template of {type(self.processor).__name__} leaves out the call of "
                            f"{called!r}. Write it into the content, or take it out."
                        )
                continue
            pieces = [message["content"]] if isinstance(message["content"], str) else message["content"]
            for piece in pieces:
                text = (piece if isinstance(piece, str) else text_of([piece])).strip()
                found = rendered.find(text, at)  # in order nearly always: long conversations are read once
                if (
                    found < 0
                    and text not in rendered
                    and not (message["role"] == "tool" and json.dumps(text, ensure_ascii=False)[1:-1] in rendered)
                ):
                    raise MaskError(
                        f"{where}, message {k}: the chat template of {type(self.processor).__name__} lost or changed the "
                        f"{message['role']}'s text.\n  expected: {text[:160]!r}\n  found:    {rendered[:400]!r}"
                    )
                at = max(at, found)


def _in_form(message: Message, as_parts: bool) -> Message:
    return {**message, "content": [{"type": "text", "text": message["content"]}]} if as_parts else message


def _shared(one: str, other: str) -> str:
    """The characters that two texts begin with alike."""
    count = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:count]


def _said(render: Callable[..., str], chat: list[Message], tools: Sequence[Any], prompt: bool) -> str | None:
    """What a way to render says, or None where the template refuses."""
    try:
        return render(chat, tools, prompt)
    except Exception:  # noqa: BLE001  a template raises whatever it likes
        return None
