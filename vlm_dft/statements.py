"""Statements: response text in, the places where it states its answer out, most trusted last. Linear time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

HEAD, TAIL = 8_000, 24_000
"""Characters read of a longer response: conclusions stand at its start or at its end."""

SPAN = 400
"""Characters read of one statement."""

LONG = 4_000
"""Characters read of a sentence, from its end."""


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
ITEM = re.compile(r"^[ \t*#]{0,6}\d{1,2}[.)][ \t]+(?=\S)", re.MULTILINE)
"""The number of a list's item: no number of an answer."""

SPACES = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad\b|[~\u00a0\u3000\u2009\u202f]")
WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | str.maketrans("−–", "--")
"""Full-width letters, digits and signs, and minus signs, as ASCII has them."""


def settled(response: str, *, latex: bool = False) -> str:
    r"""What counts of a response: after its thoughts, without special tokens and unseen characters, bounded.

    latex: its \text{..} and LaTeX's spaces stay, for `latex_text` to read: "{cm}^2" alone is no unit.
    """
    if len(response) > HEAD + TAIL:
        response = f"{response[:HEAD]}\n{response[-TAIL:]}"
    ends = list(THOUGHT_END.finditer(response))
    if ends and response[ends[-1].end() :].strip():
        response = response[ends[-1].end() :]
    text = THOUGHT_START.sub("\n", THOUGHT_END.sub("\n", response))
    text = UNSEEN.sub("", SPECIAL.sub(" ", text)).translate(WIDE)
    text = (text if latex else SPACES.sub(" ", STYLE.sub("", text))).strip()
    while (polite := COURTESY.search(text, max(0, len(text) - 300))) and text[: polite.start()].strip():
        text = text[: polite.start()].rstrip()
    return ITEM.sub("", text) if len(ITEM.findall(text)) > 1 else text


def finished(response: str) -> str:
    """A response without a thought that it has opened and not closed: it was cut before it answered."""
    ends = list(THOUGHT_END.finditer(response))
    opened = THOUGHT_START.search(response, ends[-1].end() if ends else 0)
    return response[: opened.start()] if opened else response


COURTESY = re.compile(
    r"(?<!\S)(?:I(?:'d| would| am|'m)? (?:be )?(?:hope|happy|glad)|Hope|Please (?:let|feel)|Let me know|Feel free|If you (?:have|need|want)"
    r"|Don't hesitate|Do you have|Is there anything)\b[^.!?\n]{0,160}[.!?\s]*$",
    re.IGNORECASE,
)
"""A sentence that takes leave at the end."""

LONE = re.compile(r"(?:\A|[^A-Z\s)][ \t]*\n|:)[\s*_$#]{0,8}(\(?[A-Z]\)?)[\s*_$.]{0,8}\Z")
"""A last line that is a letter, or ends in a colon and a letter."""

RUN_ON = re.compile(r"(?:^|\n)[ \t*#]{0,6}(?:Question|Q|问题|Problem|Human|User|Hint)\s?\d{0,3}\**\s?:", re.IGNORECASE)


def segments(text: str, question: str | None) -> list[str]:
    """A settled text cut where a model ran on into a further question; the prompt's own question again is left out."""
    parts = RUN_ON.split(text)
    own = bare((question or "")[:200])
    kept = [part for i, part in enumerate(parts) if part.strip() and not (i and _begins_alike(bare(part[:1_000]), own))]
    return kept or [text]


def _begins_alike(one: str, other: str) -> bool:
    shared = min(len(one), len(other))
    return shared >= 8 and one[:shared] == other[:shared]


BOX = re.compile(r"\\?f?boxed\s?\{|\\fbox\s?\{")
TAG = re.compile(r"<answer>|<final_answer>|<\|begin_of_solution\|>|<\|begin_of_box\|>|<ans>", re.IGNORECASE)
TAG_END = re.compile(r"</?answer>|</final_answer>|<\|end_of_\w{3,8}\|>|</ans>", re.IGNORECASE)
NOUN = (
    r"(?<![A-Za-z])(?<!each )(?<!every )(?<!following )(?<!other )(?<!all )(?<!these )"
    r"(?:answers?|ans|option|choice|solution(?! ?:)|result|conclusion|selection|letter|final (?:value|number|count|amount|total)"
    r"|réponse|respuesta|antwort|lösung|risposta|resposta|ответ)\b"
)
CUE = re.compile(
    rf"{NOUN}[*_\"'`]{{0,3}}(?:[^.\n:=]|\.(?=\d)){{0,90}}?"
    r"(?:\b(?:is|are|was|be|becomes|remains|est|es|ist|è|é)\b(?!\s+(?:not\b|n't))|[:=]|->|→)[*_ ]{0,4}"
    r"|(?:答案|正确选项|正确答案|选项|结果|结论)[^。\n]{0,12}?[是为為:选選】]{1,2}\s?|(?:答え|正解|정답|답)\s?[は은는:]\s?"
    r"|\b(?:(?:choose|chose|select(?:ed)?|pick(?:ed)?|go with|guess is)\s+|not \(?[A-H]\)?,? but )(?=(?:option |choice |answer )?[(*\"']{0,3}[A-H]\b)"
    r"|(?:故|所以|因此|应该?|则|可|综上,?)选择?\s?:?\s?|选择?\s?:?\s?(?=[(*]{0,3}[A-H])|[是为]\s?(?=[(*]{0,3}[A-H][)*]{0,3}\s?(?:[。.,(]|$))|####\s?"
    r"|\bsolution\s?:\s?(?=[(*]{0,3}[A-H]\b[)*.]{0,3}[ \t]*(?:\n|$))",
    re.IGNORECASE,
)
"""Words after which an answer follows."""

END = re.compile(
    r"[.!?](?=[\s*\"')]|$)(?<!\A[A-Za-z]\.)(?<!\n[A-Za-z]\.)(?<!\.[A-Za-z]\.)(?<!\(\w\.)(?<!vs\.)(?<!no\.)|[。\n]|,\s?(?=因此|所以|故|综上)"
)
"""The end of a sentence: no decimal point, no initial, no letter that labels an option."""

LABELLED = re.compile(r"(?:option|choice|answer|letter)[\s*_\"'(\[]{1,4}(?=[A-Z]\b[)\]*]{0,3}\s?[:=])", re.IGNORECASE)


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
    lead = len(piece) - len(piece.lstrip(" \t\r\n:*_"))
    found = END.search(piece, lead)
    return piece[lead : found.start() if found else None].strip()


def announced(text: str) -> Iterator[Statement]:
    """What follows "the answer is", "Answer:", "option:", 答案是, 故选 and the like."""
    for found in list(CUE.finditer(text))[-40:]:
        labelled = LABELLED.match(text, found.start())  # "option C: 40" names C
        yield Statement(sentence(text, labelled.end() if labelled else found.end()), found.start(), "announced")


def sentences(text: str) -> list[str]:
    """The text's sentences in order, without empty ones; a line that ends in a colon goes on in the next."""
    found: list[str] = []
    for piece in END.split(text):
        if not (piece and (piece := piece.strip())):
            continue
        if found and found[-1].endswith(":") and len(found[-1]) < SPAN:
            found[-1] += f"\n{piece}"
        else:
            found.append(piece)
    return found


LISTED = re.compile(r"[ \t*_-]{0,6}\(?([A-H])[).:][)*]{0,2}[ \t]{0,4}[^\n]{0,60}$")
JUDGED = re.compile(r"correct|wrong|true|false|right|answer|because|not ", re.IGNORECASE)


def without_listing(text: str) -> str:
    """A text without lines that only list options: two or more in a row, lettered in order from A."""
    lines = text.split("\n")
    letters = [found[1] if (found := LISTED.match(line)) and not JUDGED.search(line) else "" for line in lines]
    kept, i = [], 0
    while i < len(lines):
        run = 0
        while run < 8 and i + run < len(lines) and letters[i + run] == "ABCDEFGH"[run]:
            run += 1
        if run < 2:
            kept.append(lines[i])
        i += run if run > 1 else 1
    return "\n".join(kept)


def statements(text: str) -> list[Statement]:
    """Every place of a settled text where an answer is stated outright, in the order of the text."""
    found = [*boxed(text), *tagged(text), *announced(text)]
    if lone := LONE.search(text[-60:]):
        found.append(Statement(lone[1], len(text), "last line"))
    return sorted((one for one in found if one.text), key=lambda one: one.start)


ABSTAINS = re.compile(
    r"\b(?:(?:cannot|can't|can not|could not|couldn't)(?! be \W{0,3}(?:option )?[A-H]\b)"
    r"|unable to|impossible to|(?:not|n't) (?:be )?(?:possible|able) to"
    r"|do(?:es)? ?(?:not|n't) (?:have (?:any|enough|sufficient|access|the)|provide|specify|give|mention)"
    r"|(?:not|n't) (?:\w+ ){0,3}(?:provided|given|specified|mentioned|available|visible|sufficient|determined|measured"
    r"|quantified|calculated|known|applicable|clear)|(?:not|n't) enough (?:information|data|context|details?)"
    r"|insufficient|indeterminate|undefined|unknown|unclear|please (?:provide|share|upload|give|clarify)"
    r"|need (?:more|to know|additional)|(?:more|additional|further) (?:information|context|details|data)"
    r"|no (?:specific |enough )?(?:information|image|data|way)|N/A)|无法|不能确定|未提供|没有提供|没有给出",
    re.IGNORECASE,
)
"""Words of a sentence that answers nothing."""

DOLLAR = re.compile(r"\bS(?=\d)")
"""A dollar sign as text recognition gives it to models, and as they give it back."""

CONCLUDES = re.compile(
    r"[\s*_#>\"']{0,6}(?:(?:therefore|thus|hence|so|in conclusion|in summary|to summarize|overall|finally|in total|altogether"
    r"|consequently|as a result|this means|this gives|we (?:get|have|find|obtain|conclude)|(?:the )?final)\b|因此|所以|综上|故|答)",
    re.IGNORECASE,
)
AIMS = re.compile(
    r"[\s*_#>\"']{0,6}(?:(?:in order )?to (?!\d)\w+|let'?s|let us|suppose|assum\w+|first|step \d|for example|note|(?:this is )?because)\b",
    re.IGNORECASE,
)
TOKEN = re.compile(r"[^\W\d_]{3,}")
PLAIN_WORDS = frozenset(
    "the and are was for that this with from what which how many much does have has than between there image shown".split()
)


def content_words(text: str) -> frozenset[str]:
    """A text's words that say what it is about, in lower case."""
    return frozenset(TOKEN.findall(text.casefold())) - PLAIN_WORDS


def bare(text: str) -> str:
    """Only the letters and digits of a text, case folded."""
    return "".join(filter(str.isalnum, text)).casefold()


def restates(text: str, question: str) -> bool:
    """Whether a text with digits, or what follows its first comma or last colon, stands in a bare question word for word."""
    if not any(map(str.isdigit, text)):
        return False
    pieces = (bare(text), bare(text.split(",", 1)[-1]), bare(text.rsplit(":", 1)[-1]))
    return any(len(piece) >= 12 and piece in question for piece in pieces)


def conclusions(text: str, question: str | None) -> list[str]:
    """Sentences of a settled text, the likeliest to state the answer first; none that the question has word for word.

    Likely: it draws a conclusion, restates the question, is the last (above all after reasoning) or the first;
    unlikely: it states an aim.
    """
    parts = sentences(text)
    places = range(len(parts)) if len(parts) <= 24 else [*range(6), *range(len(parts) - 18, len(parts))]
    asked, whole = content_words((question or "")[-600:]), bare((question or "")[:4_000])
    scored = []
    reasoned = "=" in text or any(CONCLUDES.match(parts[i]) or AIMS.match(parts[i]) for i in places)
    last = next((i for i in reversed(places) if not AIMS.match(parts[i])), len(parts) - 1)
    for i in places:
        part = parts[i]
        worth = len(asked & content_words(part[:SPAN])) / len(asked) if asked else 0.0
        worth += (0.6 if CONCLUDES.match(part) else 0.0) - (0.6 if AIMS.match(part) else 0.0)
        worth += (0.8 if reasoned else 0.35) if i == last else 0.2 if i == 0 and not reasoned else 0.0
        worth += 0.4 if i == last and ABSTAINS.search(part) else 0.0
        if not restates(part[:SPAN], whole):
            scored.append((worth + 0.01 * i / len(parts), part[-LONG:]))
    return [part for _, part in sorted(scored, key=lambda one: -one[0])]
