r"""A number in LaTeX or plain text in, the int or float that MATH-Vision's authors compare out; None where their code raises.

They compute `eval(str(latex2sympy(text)))` (latex2sympy2 1.9.1), which may hang, and whose parser cannot be installed beside
others. This reads the part of that grammar whose value can be a number, executes nothing, and is bounded. What it keeps:
a text is read as far as it goes ("12. the side" and "5 trees" are 12 and 5), juxtaposition is a product that binds more
tightly than "/" ("1\frac{1}{2}" is 0.5, "1/2\pi" is 0.16), `2^12` is a power of twelve, "12:30" is a quotient, "2<3" is 1;
a letter, `\ln`, `|x|`, a lone `e`, "%" or a degree sign is no number; an int stays an int until something is divided.
What it does otherwise, on purpose: `\gcd`, `\lcm`, `\det`, `\operatorname`, `\tau`, `e^{\ln x}`, a value "at" a point, binomials of
fractions and what passes the bounds below (where the official code is slow or does not return) are no numbers. "x=3" is none
either: officially it is 3 until the first "d" before a letter in any answer of the run, and an error from then on. And in
`-\frac{1}{2\pi}` a denominator keeps its brackets, which the official printer loses where a product is negative.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction

LONGEST = 1000  # characters of an expression
DEEPEST = 40  # expressions within expressions
MOST_BITS = 20_000  # of an integer: about 6,000 digits
LARGEST_FACTORIAL = 1000

Number = int | float


class NotANumber(Exception):
    """The text has no value under the official rule."""


_FLOORS = {"\\lfloor": "\\rfloor", "\\llcorner": "\\lrcorner"}
_BRACKETS = {"(": ")", "{": "}", "[": "]", "\\{": "\\}", **_FLOORS}
_BRACKETS |= {f"\\l{name}": f"\\r{name}" for name in ("group", "brace", "brack")}
_LEFTS = {"\\left": "\\right", "\\mleft": "\\mright"}
_INVERSES: dict[str, Callable[[float], float]] = {
    f"\\{name}": getattr(math, f"a{name}") for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")
}
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    **{name: getattr(math, name[1:]) for name in (*_INVERSES, "\\exp", "\\floor")},
    **{f"\\arc{name[1:]}": inverse for name, inverse in _INVERSES.items()},
    **{f"\\ar{name[1:]}": inverse for name, inverse in _INVERSES.items() if name.endswith("h")},
    "\\log": math.log10,  # without a base
}
_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    **dict.fromkeys(("\\le", "\\leq", "\\leqslant"), operator.le),
    **dict.fromkeys(("\\ge", "\\geq", "\\geqslant"), operator.ge),
}
_TIMES = {"*", "\\times", "\\cdot"}
_OVER = {"/", "\\over", "\\div", ":"}
_BINOMIALS = {"\\binom", "\\tbinom", "\\dbinom"}
_TRANSPOSES = {"'", "^{\\top}"}
_PLAIN = {*_BRACKETS, *_LEFTS, *_BINOMIALS, "\\pi", "\\frac"}  # what begins a factor, functions aside
_STARTS = {*_PLAIN, *_FUNCTIONS, "e", "\\sqrt"}
_ENDS = (  # other tokens of the official lexer; none may follow a number: where one does, reading ends and the number stands
    "arsinh arcsinh arcosh arccosh artanh arctanh gcd lcm floor ceil eye zeros ones cols rows diag norm rank trace tr rref "
    "hstack vstack orth ortho orthogonal orthogonalize nullspace eig eigen diagonalize eigenvals eigenvalues eigenvects "
    "eigenvectors svd matrix pmatrix bmatrix vmatrix \\rvert \\rceil \\urcorner \\to \\rightarrow \\longrightarrow \\choose "
    "\\xrightarrow \\leftrightarrow <-> <=> & \\\\ _ . \\end{matrix} \\end{pmatrix} \\end{bmatrix} \\end{vmatrix}"
).split()
_WORDS = {*_STARTS, *_BRACKETS.values(), *_LEFTS.values(), *_RELATIONS, *_TIMES, *_OVER, *_TRANSPOSES, *_ENDS, *"+-^!"}
_TOKEN = re.compile(
    r"[ \t\r\n]*(?:(?P<number>(?:\d*(?:,\d{3})*\.\d+|\d+(?:,\d{3})*)(?:\\%)?)|"
    rf"(?P<word>{'|'.join(map(re.escape, sorted(_WORDS, key=len, reverse=True)))})|(?P<end>\Z))",
    re.ASCII,
)
_PERMUTATION = re.compile(r"\(([a-z0-9+\-*/\\ ]+?)\)_{([a-z0-9+\-*/\\ ]+?)}")
_SPACING = re.compile(r"\\displaystyle|\\q?quad|~|\\,|\$")


def latex_number(text: str) -> Number | None:
    r"""The value of a text, not yet rounded; None for no number. latex_number(r"\frac{\sqrt{3}}{2}") is 0.866...

    Letter case does not matter: the official rule compares in lower case.
    """
    if len(text) > LONGEST:
        return None
    text = text.lower().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _PERMUTATION.sub(r"\\frac{(\1)!}{((\1)-(\2))!}", text)
    try:
        return _Reading(_SPACING.sub(" ", text)).value()
    except (NotANumber, ArithmeticError, ValueError, TypeError):
        return None


class _Product:
    """Numerators over denominators, divided at the very end, as the official text has them. `under` None: nothing divides."""

    __slots__ = ("over", "under")

    def __init__(self, over: Number, under: Number | None = None) -> None:
        self.over, self.under = over, under

    def __mul__(self, other: _Product) -> _Product:
        unders = [under for under in (self.under, other.under) if under is not None]
        return _Product(_bounded(self.over * other.over), _bounded(math.prod(unders)) if unders else None)

    @property
    def number(self) -> Number:
        return self.over if self.under is None else self.over / self.under


class _Reading:
    """One pass over one text, a token at a time. A letter, or a sign that the official lexer does not know, ends it: no number."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0
        self.advance()

    def advance(self) -> None:
        found = _TOKEN.match(self.text, self.place)
        if found is None:
            raise NotANumber(f"not part of a number: {self.text[self.place : self.place + 20]!r}")
        self.place, self.kind = found.end(), found.lastgroup
        self.token = found[found.lastgroup or 0]

    def take(self, token: str) -> None:
        if self.token != token or self.kind == "end":
            raise NotANumber(f"expected {token!r}, found {self.token!r}")
        self.advance()

    def value(self) -> Number:
        """A sum, or a comparison of sums as 1 or 0. What follows it, not to be read on, is no matter."""
        value = self.sum()
        while relation := _RELATIONS.get(self.token):
            self.advance()
            value = int(relation(value, self.sum()))
        return value

    def sum(self) -> Number:
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotANumber(f"deeper than {DEEPEST}")
        value = self.product().number
        while (sign := self.token) in ("+", "-"):
            self.advance()
            term = self.product().number
            value = _bounded(value + term if sign == "+" else value - term)
        self.depth -= 1
        return value

    def product(self, starts: set[str] = _STARTS) -> _Product:
        """Signed factors with signs between. starts: what may be juxtaposed; a function's bare argument holds no second function."""
        value = self.factors(starts)
        while (sign := self.token) in _TIMES or sign in _OVER:
            self.advance()
            other = self.factors(starts)
            value = value * other if sign in _TIMES else _Product(value.number, other.number)
        return value

    def factors(self, starts: set[str]) -> _Product:
        sign = 1
        while self.token in ("+", "-"):
            sign = -sign if self.token == "-" else sign
            self.advance()
        value = self.postfix()
        while self.kind == "number" or self.token in starts:
            value = value * self.postfix()
        return value if sign > 0 else _Product(-value.over, value.under)

    def postfix(self) -> _Product:
        value = self.power()
        while self.token == "!" or self.token in _TRANSPOSES:
            value = _Product(_factorial(value.number)) if self.token == "!" else value
            self.advance()
        return value

    def power(self) -> _Product:
        value = self.atom()
        while self.token == "^":
            value = _power(value.number, self.script())
            if self.token == "_":  # an index after an exponent is read over
                self.script()
        return value

    def script(self) -> Number:
        """What follows "^" or "_": one number (all its digits), pi, or braces."""
        self.advance()
        if self.token == "{":
            return self.group()
        if self.kind != "number" and self.token != "\\pi":
            raise NotANumber(f"no exponent: {self.token!r}")
        return self.atom().number

    def atom(self) -> _Product:
        token = self.token
        if self.kind == "number":
            self.advance()
            return _Product(_literal(token))
        if token in _BRACKETS or token in _LEFTS:
            return _Product(self.group())
        if token in _FUNCTIONS:
            return self.function()
        if token not in _STARTS:
            raise NotANumber(f"nothing begins with {token!r}")
        self.advance()
        if token == "\\pi":
            return _Product(math.pi)
        if token == "e":
            if self.token != "^":
                raise NotANumber("a lone e")  # officially the unknown name E
            return _Product(_exponential(self.script()))
        if token == "\\sqrt":
            return self.root()
        upper, lower = self.braces(), self.braces()
        return _Product(_binomial(upper, lower)) if token in _BINOMIALS else _Product(upper, lower)

    def braces(self) -> Number:
        self.take("{")
        value = self.sum()
        self.take("}")
        return value

    def group(self) -> Number:
        right = _LEFTS.get(self.token)
        if right:
            self.advance()
        left = self.token
        if left not in _BRACKETS:
            raise NotANumber(f"no bracket: {left!r}")
        self.advance()
        value = self.sum()
        if left == "{" and self.token == "\\choose" and not right:
            self.advance()
            value = _binomial(value, self.sum())
        if right:
            self.take(right)
        self.take(_BRACKETS[left])
        return math.floor(value) if left in _FLOORS else value

    def root(self) -> _Product:
        index: Number = 2
        if self.token == "[":
            self.advance()
            index = self.sum()
            self.take("]")
        exponent = 1 / index
        return _power(self.braces(), int(exponent) if exponent == int(exponent) else exponent)

    def function(self) -> _Product:
        name, scripts = self.token, dict[str, Number]()
        self.advance()
        while self.token in ("_", "^") and self.token not in scripts:
            place = self.token
            scripts[place] = self.script()
        if self.token == "(" or (self.token in _LEFTS and self.text.startswith("(", self.place)):
            argument = self.group()
        else:
            self.depth += 1  # without brackets functions nest too
            if self.depth > DEEPEST:
                raise NotANumber(f"deeper than {DEEPEST}")
            argument = self.product(_PLAIN).number
            self.depth -= 1
        exponent = scripts.get("^", 0)
        if exponent == -1 and name in _INVERSES:
            return _Product(_INVERSES[name](argument))
        if name == "\\log":
            value: Number = math.log(argument, scripts.get("_", 10))
        else:
            value = _exponential(argument) if name == "\\exp" else _FUNCTIONS[name](argument)
        return _power(value, exponent) if exponent else _Product(value)


def _literal(text: str) -> Number:
    """'1,234' an int, '4.0' the int 4, '0.5' a float, '50\\%' 0.5."""
    value = Fraction(text.removesuffix("\\%").replace(",", "")) / (100 if text.endswith("%") else 1)
    return value.numerator if value.denominator == 1 else value.numerator / value.denominator


def _bounded(value: Number) -> Number:
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise NotANumber(f"an integer of {value.bit_length()} bits; at most {MOST_BITS} are computed")
    return value


def _power(base: Number, exponent: Number) -> _Product:
    size = abs(exponent)
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * size > MOST_BITS and abs(base) > 1:
        raise NotANumber(f"a power of more than {MOST_BITS} bits")
    value = math.sqrt(base) if size == 0.5 else base**size
    if isinstance(value, complex):
        raise NotANumber("a complex number")
    return _Product(1, value) if exponent < 0 else _Product(value)


def _exponential(exponent: Number) -> Number:
    if exponent == 1:
        raise NotANumber("e to the power of one, officially the unknown name E")
    return math.exp(exponent) if exponent else 1


def _factorial(value: Number) -> int:
    if not isinstance(value, int) or not 0 <= value <= LARGEST_FACTORIAL:
        raise NotANumber(f"the factorial of {value:.6g}")
    return math.factorial(value)


def _binomial(upper: Number, lower: Number) -> int:
    if not isinstance(upper, int) or not isinstance(lower, int) or max(abs(upper), abs(lower)) > LARGEST_FACTORIAL:
        raise NotANumber("a binomial of no small integers")
    if lower < 0:
        return 0
    return math.comb(upper, lower) if upper >= 0 else (-1) ** lower * math.comb(lower - upper - 1, lower)
