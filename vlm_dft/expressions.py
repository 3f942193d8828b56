r"""Expressions: a short mathematical text, LaTeX or plain, in; its value at given values of its letters out. Bounded, no sympy.

It reads + - * / ^, implied products, mixed numbers, \frac, \sqrt[n], |x|, powers, functions, \pi and letters with subscripts. What
it cannot read it refuses (None); it never guesses. Rational numbers stay exact up to so many bits, all else is floating-point: 9^9^9^9
overflows at once.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

LONGEST = 300  # characters; answers are shorter, and what is longer is compared as text
DEEPEST = 40  # brackets and powers within each other
LARGEST_FACTORIAL = 100
MOST_BITS = 8192  # of an exact number's numerator or denominator

Value = Fraction | complex
Node = Callable[[Mapping[str, float]], Value]

_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[a-zA-Z]+|\\[{}|]|[a-zA-Z]+|[-+*/^_(){}\[\]|!]")
_PLAIN_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_CONSTANTS = {r"\pi": math.pi, "pi": math.pi, "e": math.e, "i": 1j}
_TIMES = ("*", r"\cdot", r"\times", r"\ast")
_OVER = ("/", r"\div")
_GREEK = "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega"
_LETTERS = {"\\" + name for name in _GREEK.split()} | {"\\" + name.title() for name in _GREEK.split()}
_OPENS = {"(": ")", "{": "}", "[": "]", r"\{": r"\}"}


def _log10(value: Value) -> Value:
    return cmath.log(value) / math.log(10)


_FUNCTIONS: dict[str, Callable[[Value], Value]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "sinh": cmath.sinh,
    "cosh": cmath.cosh, "tanh": cmath.tanh, "exp": cmath.exp, "ln": cmath.log, "log": _log10, "sqrt": cmath.sqrt, "abs": lambda x: _magnitude(x),
}  # fmt: skip
"""log is to base ten: both sides are read alike, so only a log beside a ln is affected."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A text that was read: the letters in it, and its value where they have values."""

    letters: frozenset[str]
    node: Node

    def at(self, values: Mapping[str, float]) -> Value | None:
        """Its value, or None where it has none (division by zero, overflow)."""
        try:
            value = self.node(values)
        except (ArithmeticError, ValueError, TypeError):
            return None
        return value if isinstance(value, Fraction) or cmath.isfinite(value) else None


class _NotReadError(Exception):
    """The text is no expression that this module reads."""


def read_expression(text: str) -> Expression | None:
    """The expression that a text is, or None."""
    if not text or len(text) > LONGEST:
        return None
    text = _COMMAS.sub(lambda found: found[0].replace(",", ""), text)
    tokens = _TOKEN.findall(text)
    if re.sub(r"\s", "", text) != "".join(tokens) or (len(text) > 1 and all(map(str.isalpha, tokens))):
        return None  # something is in it that no expression has, or it is words: "no" is not "on"
    try:
        reader = _Reader(tokens)
        node = reader.sum(0)
        if reader.here is not None:
            return None
    except _NotReadError:
        return None
    return Expression(frozenset(reader.letters), node)


class _Reader:
    """Recursive descent over the tokens; `depth` is how many brackets it is in."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens: list[str | None] = [*_letters_apart(tokens), None]
        self.place = 0
        self.bars = 0  # how many absolute values are open
        self.letters: set[str] = set()

    @property
    def here(self) -> str | None:
        return self.tokens[self.place]

    def take(self, *wanted: str) -> str | None:
        """The next token if it is one of these (none named: whatever it is), stepping over it."""
        token = self.here
        if token is None or (wanted and token not in wanted):
            return None
        self.place += 1
        return token

    def need(self, wanted: str) -> None:
        if self.take(wanted) is None:
            raise _NotReadError

    def sum(self, depth: int) -> Node:
        if depth > DEEPEST:
            raise _NotReadError
        parts: list[tuple[int, Node]] = []
        sign = -1 if self.take("-") else 1
        if sign == 1:
            self.take("+")
        parts.append((sign, self.product(depth)))
        while (operator := self.take("+", "-")) is not None:
            parts.append((1 if operator == "+" else -1, self.product(depth)))

        def value(at: Mapping[str, float]) -> Value:
            total: Value = Fraction(0)
            for sign, node in parts:
                total = _bounded(total + node(at) if sign == 1 else total - node(at))
            return total

        return parts[0][1] if len(parts) == 1 and parts[0][0] == 1 else value

    def product(self, depth: int) -> Node:
        factors: list[tuple[bool, Node]] = [(False, self.power(depth))]
        while True:
            if (operator := self.take(*_TIMES, *_OVER)) is not None:
                sign = self.take("-", "+")
                node = self.power(depth)
                factors.append((operator in _OVER, _negated(node) if sign == "-" else node))
            elif self.begins_factor():
                factors.append((False, self.power(depth)))
            else:
                break

        def value(at: Mapping[str, float]) -> Value:
            total: Value = Fraction(1)
            for over, node in factors:
                total = _bounded(total / node(at) if over else total * node(at))
            return total

        return factors[0][1] if len(factors) == 1 else value

    def begins_factor(self) -> bool:
        token = self.here
        if token is None or token in ("+", "-", "^", "_", "!", ")", "]", "}", r"\}"):
            return False
        return not (token == "|" and self.bars)

    def power(self, depth: int) -> Node:
        base = self.atom(depth)
        while self.take("!"):
            base = _factorial(base)
        if not self.take("^"):
            return base
        if depth > DEEPEST:
            raise _NotReadError
        negative = self.take("-") is not None
        exponent = self.power(depth + 1)
        if negative:
            exponent = _negated(exponent)
        return lambda at: _powered(base(at), exponent(at))

    def atom(self, depth: int) -> Node:
        token = self.take()
        if token is None:
            raise _NotReadError
        if _PLAIN_NUMBER.fullmatch(token):
            return self.number(token)
        if token in _OPENS:
            inside = self.sum(depth + 1)
            self.need(_OPENS[token])
            return inside
        if token in ("|", r"\|"):
            self.bars += 1
            inside = self.sum(depth + 1)
            self.need(token)
            self.bars -= 1
            return lambda at: _magnitude(inside(at))
        if token == r"\frac":
            above, below = self.argument(depth), self.argument(depth)
            return lambda at: _bounded(above(at) / below(at))
        if token.lstrip("\\") == "sqrt":
            return self.root(depth)
        if token.lstrip("\\") in _FUNCTIONS:
            return self.function(token.lstrip("\\"), depth)
        return self.letter(token)

    def number(self, token: str) -> Node:
        """A number; with a fraction of digits right behind it, a mixed number."""
        value = Fraction(token)
        following = self.tokens[self.place : self.place + 7]
        if (
            "." not in token
            and following[:2] == [r"\frac", "{"]
            and following[3:5] == ["}", "{"]
            and following[6] == "}"
        ):
            above, below = following[2], following[5]
            if (
                above is not None
                and below is not None
                and above.isdigit()
                and below.isdigit()
                and int(above) < int(below)
            ):
                self.place += 7
                value += Fraction(int(above), int(below))
        return lambda _: value

    def argument(self, depth: int) -> Node:
        """What a command takes: a group in braces, or the one thing that follows."""
        if self.take("{"):
            inside = self.sum(depth + 1)
            self.need("}")
            return inside
        if depth > DEEPEST:
            raise _NotReadError
        return self.atom(depth + 1)

    def root(self, depth: int) -> Node:
        index: Node | None = None
        if self.take("["):
            index = self.sum(depth + 1)
            self.need("]")
        inside = self.argument(depth)
        if index is None:
            return lambda at: cmath.sqrt(inside(at))
        return lambda at: _rooted(inside(at), index(at))

    def function(self, name: str, depth: int) -> Node:
        function = _FUNCTIONS[name]
        base = power = None
        if name == "log" and self.take("_"):
            base = self.argument(depth)
        if self.take("^"):
            power = self.argument(depth)
        inside = self.argument(depth) if self.here in _OPENS else self.product(depth + 1)  # \sin 2x

        def value(at: Mapping[str, float]) -> Value:
            result = cmath.log(inside(at)) / cmath.log(base(at)) if base else function(inside(at))
            return _powered(result, power(at)) if power else result

        return value

    def letter(self, token: str) -> Node:
        if token in _CONSTANTS:
            constant = _CONSTANTS[token]
            return lambda _: constant
        if not (len(token) == 1 and token.isalpha()) and token not in _LETTERS:
            raise _NotReadError
        name = token
        if self.take("_"):
            name += "_" + self.subscript()
        self.letters.add(name)
        return lambda at: complex(at[name])

    def subscript(self) -> str:
        if not self.take("{"):
            return self.take() or ""
        inside = []
        while (token := self.take()) not in ("}", None):
            inside.append(str(token))
        return "".join(inside)


def _letters_apart(tokens: list[str]) -> list[str]:
    """Runs of plain letters are functions, pi, or at most two letters multiplied; longer runs are words, and no expression."""
    apart: list[str] = []
    for token in tokens:
        if not token.isalpha() or len(token) == 1 or token in _FUNCTIONS or token in _CONSTANTS:
            apart.append(token)
        elif apart and apart[-1] in ("_", "{") and len(apart) > 1 and (apart[-1] == "_" or apart[-2] == "_"):
            apart.append(token)  # a subscript may be a word
        elif len(token) == 2:
            apart += token
        else:
            raise _NotReadError
    return apart


def _bounded(value: Value) -> Value:
    """The value itself; floating-point once it is too long to stay exact."""
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        return complex(value)
    return value


def _magnitude(value: Value) -> Value:
    return abs(value) if isinstance(value, Fraction) else complex(abs(value))


def _negated(node: Node) -> Node:
    return lambda at: -node(at)


def _powered(base: Value, exponent: Value) -> Value:
    if base == 0 and exponent == 0:
        raise ValueError("0^0 has no value")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if exponent.denominator == 1 and abs(exponent.numerator) * size <= MOST_BITS:
            return base**exponent.numerator
    return complex(base) ** complex(exponent)


def _rooted(value: Value, index: Value) -> Value:
    """The root as real analysis has it: an odd root of a negative number is negative."""
    power, value = 1 / complex(index), complex(value)
    if index.imag == 0 and index.real % 2 == 1 and value.imag == 0 and value.real < 0:
        return -complex((-value) ** power)
    return complex(value**power)


def _factorial(node: Node) -> Node:
    def value(at: Mapping[str, float]) -> Value:
        number = node(at)
        if not isinstance(number, Fraction) or number.denominator != 1 or not 0 <= number <= LARGEST_FACTORIAL:
            raise ValueError("no factorial of that")
        return Fraction(math.factorial(number.numerator))

    return value
