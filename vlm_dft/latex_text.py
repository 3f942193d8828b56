r"""LaTeX as text: an answer as models and golds write it in; the same without what does not matter out. Linear time."""

from __future__ import annotations

import re

_UNICODE = {
    "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{HYPHEN}": "-", "\N{NON-BREAKING HYPHEN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ", "\N{MIDDLE DOT}": r"\cdot ", "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": "/", "\N{FRACTION SLASH}": "/", "\N{DIVISION SLASH}": "/", "\N{FULLWIDTH COMMA}": ",",
    "\N{GREEK SMALL LETTER PI}": r"\pi ", "\N{SQUARE ROOT}": r"\sqrt ", "\N{INFINITY}": r"\infty ", "\N{UNION}": r"\cup ",
    "\N{PLUS-MINUS SIGN}": r"\pm ", "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{ALMOST EQUAL TO}": r"\approx ", "\N{SUPERSCRIPT TWO}": "^2", "\N{SUPERSCRIPT THREE}": "^3",
    "\N{VULGAR FRACTION ONE HALF}": " 1/2", "\N{VULGAR FRACTION ONE QUARTER}": " 1/4",
    "\N{VULGAR FRACTION THREE QUARTERS}": " 3/4", "\N{VULGAR FRACTION ONE THIRD}": " 1/3", "\N{VULGAR FRACTION TWO THIRDS}": " 2/3",
    "\N{DEGREE SIGN}": " degrees ", "\u63b3": " degrees ",  # a degree sign of UTF-8 read as GBK, as in MathVerse's golds
    "\N{FULLWIDTH PERCENT SIGN}": "%", "\x0crac": r"\frac",  # \frac once read by a language of escapes, as in MATH-V's golds
}  # fmt: skip
_FOREIGN = re.compile("|".join(map(re.escape, _UNICODE)))
_HIDDEN = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u200b-\u200f\u2060\ufeff\ud800-\udfff]")
_BOXED = re.compile(r"\\f?boxed\s*\{(.*)\}", re.DOTALL)
_MARK = re.compile(r"(?<!\\)\$(?!\s*\.?\d)")  # a dollar that is no money
_NAMES = r"text(?:bf|it|rm|sf|tt)?|mathrm|mathbf|mathit|mathsf|boldsymbol|bm|mbox|operatorname"
_SAME = (
    (re.compile(rf"\\(?:{_NAMES})\s*\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)(?![a-zA-Z])\s*\}?|\\(?:degree|circ)(?![a-zA-Z])|\{\s*degrees\s*\}"), " degrees "),
    (re.compile(r"\\(?:left|right|displaystyle|[bB]ig+[lr]?|q?quad|limits)(?![a-zA-Z])|(?<!\\)\\[!()\[\]]"), " "),
    (re.compile(r"(?<!\\)\\[,;: \n]|~"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\([%#&])"), r"\1"),
    (re.compile(r"\{\s*([,.])\s*\}"), r"\1"),  # 1{,}234
    (re.compile(r"(?<=[\d\s)])(?<!\} )\{\s*([a-zA-Z][a-zA-Z ]*)\s*\}"), r" \1 "),  # 2.5{cm}
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<!\\)\$([^$]*[\\^][^$]*)(?<!\\)\$"), r"\1"),  # a formula among words; its first dollar is no money
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"\s+"), " "),
)  # fmt: skip


def latex_text(text: str) -> str:
    r"""An answer without what does not matter: its dollars and boxes, spacing, \left, \text{..}, bold, a last full stop.

    Degree signs become the word "degrees"; Unicode's mathematics becomes LaTeX's; a dollar of money stays.
    """
    text = _HIDDEN.sub("", _FOREIGN.sub(lambda found: _UNICODE[found[0]], text)).strip()
    while (inner := _unwrapped(text)) != text:
        text = inner
    for pattern, instead in _SAME:
        text = pattern.sub(instead, text)
    return _ended(_MARK.sub("", text).replace(r"\$", "$").strip())


def _unwrapped(text: str) -> str:
    """Less one layer of bold, dollars, brackets of display or box."""
    text = _ended(text)
    for mark in ("**", "$$", "$", "`"):
        inside = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark) and mark not in inside:
            return inside.strip()
    for opens, closes in ((r"\(", r"\)"), (r"\[", r"\]")):
        if text.startswith(opens) and text.endswith(closes):
            return text[2:-2].strip()
    boxed = _BOXED.fullmatch(text)
    return boxed[1].strip() if boxed else text


def _ended(text: str) -> str:
    """Without the full stop, colon or semicolon that ends a sentence; "2." is two, "..." stays."""
    return text[:-1].rstrip() if text[-1:] in (".", ";", ":") and text[-2:-1] != "." else text
