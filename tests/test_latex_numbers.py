"""MATH-Vision's evaluator of LaTeX: literal values of the official one, exact arithmetic beside it, and texts made to break it."""

from __future__ import annotations

import math
import random
import time
from fractions import Fraction

import pytest

from vlm_dft.official.latex_numbers import latex_number

VALUES: dict[str, float | None] = {  # as eval(str(latex2sympy(text))) of latex2sympy2 1.9.1 gives them, run apart from this project
    "12": 12, "4.0": 4, "5.50": 5.5, ".5": 0.5, "1,234,567": 1234567, ",123.5": 123.5, "+5": 5, "-+-5": 5,
    "1,2345": 1234 * 5, "1.5.2": 1.5 * 0.2,
    r"\frac{1}{2}": 0.5, r"\dfrac{\frac{1}{2}}{3}": 1 / 6, r"1\frac{1}{2}": 0.5, r"\frac12": None, r"5\over 2": 2.5,
    "12:30": 0.4, r"1/2\pi": 1 / (2 * math.pi), "6/2(3)": 1.0, "(3)(4)/(2)(6)": 1.0, "2(3+4)5": 70, "2*-3": -6, "2--3": 5,
    "5-(2+3)": 0, r"6\div 4": 1.5, r"3 \times 10^{5}": 300000, r"3\cdot 2": 6,
    "2^12": 4096, "2^{3}^{2}": 64, "-2^{2}": -4, "2^{-1}": 0.5, "4^{-0.5}": 0.5, "2^(3)": None, "0^0": 1, "5^{}": None,
    r"2^\pi": 2**math.pi, "5^2_{3}": 25,
    r"\sqrt{2}": math.sqrt(2), r"\sqrt[3]{8}": 2.0, r"\sqrt[1]{8}": 8, r"\sqrt[3]{-8}": None, r"\sqrt{-4}": None, r"\sqrt3": None,
    r"\pi": math.pi, "e": None, "2e": None, "e^2": math.exp(2), "e^{1}": None, "e^{0}": 1, r"\exp(2)": math.exp(2), r"\exp(1)": None,
    r"\log 100": 2.0, r"\log_2 8": 3.0, r"\log_{10}(100)2": 4.0, r"\log(100)^2": 4.0, r"\ln 3": None, r"\log_28": None,
    r"\sin 30": math.sin(30), r"\sin(3)(4)": math.sin(3) * 4, r"\sin{(3)}2": math.sin(6), r"\sin 2*3": math.sin(6),
    r"\sin\cos 3": math.sin(math.cos(3)), r"\sin^2(3)": math.sin(3) ** 2, r"\sin^{-1}(0.5)": math.asin(0.5),
    r"\sin^{0}(3)": math.sin(3), r"\arctan 1": math.atan(1), r"\cot 1": None, r"\sinh 1": math.sinh(1),
    r"\sin\left(3\right)": math.sin(3), r"\sin 3 \cos 3": math.sin(3) * math.cos(3),
    "5!": 120, "3!!": 720, "2^{3}!": 40320, "3!^2": 6, "0.5!": None, "(-1)!": None, "5'": 5, r"5^{\top}": 5, "(5)_{3}": 60.0,
    r"\binom{6}{2}": 15, r"{6\choose 2}": 15, r"\binom{8}{0}": 1, r"\binom{2*3}{2}": 15, r"\lfloor 3.5\rfloor": 3,
    r"\lceil 3.5\rceil": None, "|3|": None,
    "[3]": 3, r"\{3\}": 3, r"\left(3\right)": 3, r"\left\{3\right\}": 3, "(2,3)": None, "3,5": None, "3;5": None,
    "2<3": 1, r"2\leq1": 0, "1<2<3": 1, "2=2": None, r"50\%": 0.5, r"100\%": 1, "50%": None, "45°": None, "≈5": None,
    # read as far as it goes
    "12.": 12, "12. the side": 12, "5)": 5, "5}": 5, "5&": 5, "5_2": 5, r"5\choose2": 5, r"5\to": 5, r"\pi_1": math.pi,
    "5 trees": 5, "5 ones": 5, "3 eyes": 3, "5 cm": None, "5 dogs": None, "5 north": None, "1{,}000": None, "(5": None, "5+": None,
    r"\$5": None, "$5$": 5, r"\text{5}": None, r"\infty": None, "1/0": None, "": None, ".": None,
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_a_text_has_the_value_of_the_official_evaluator(text: str) -> None:
    value = latex_number(text)
    if VALUES[text] is None:
        assert value is None
    else:
        assert value == pytest.approx(VALUES[text], rel=1e-12)
        assert isinstance(value, int) == isinstance(VALUES[text], int)  # in tuples "2" and "2.0" differ


def _sum(draw: random.Random, depth: int) -> tuple[str, Fraction]:
    """A random expression in LaTeX beside its exact value."""
    kind = draw.randrange(8) if depth else 0
    if kind < 2:
        digits = draw.choice(["7", "12", "0.5", "2.25", "1,024", "3.0"])
        return digits, Fraction(digits.replace(",", ""))
    (left, one), (right, two) = _sum(draw, depth - 1), _sum(draw, depth - 1)
    if kind == 2:
        return f"({left})+({right})", one + two
    if kind == 3:
        return f"({left})-({right})", one - two
    if kind == 4:
        return draw.choice(
            [f"({left})({right})", rf"\left({left}\right)\cdot({right})", f"[{left}]*{{{right}}}"]
        ), one * two
    if kind == 5 and two:
        return draw.choice([rf"\frac{{{left}}}{{{right}}}", f"({left})/({right})"]), one / two
    if kind == 6:
        power = draw.choice([0, 1, 2, 3])
        return f"({left})^{draw.choice([str(power), f'{{{power}}}'])}", one**power
    return f"-({left})", -one


def test_random_expressions_have_the_value_of_exact_fractions() -> None:
    draw = random.Random(5)
    for _ in range(1500):
        text, exact = _sum(draw, draw.choice([1, 2, 3]))
        value = latex_number(text)
        assert value is not None and math.isclose(value, exact, rel_tol=1e-9, abs_tol=1e-9), text


def test_roots_and_functions_have_the_values_that_sympy_finds() -> None:
    sympy = pytest.importorskip("sympy")
    two, three = sympy.Integer(2), sympy.Integer(3)
    for text, exact in {
        r"\frac{\sqrt{3}}{2}-\sqrt[3]{2}": sympy.sqrt(three) / 2 - sympy.cbrt(two),
        r"2\pi\sqrt{2}/3": 2 * sympy.pi * sympy.sqrt(two) / 3,
        r"e^{-2}+\log_{3} 2": sympy.exp(-2) + sympy.log(two, 3),
        r"\tan^{2}(2)\cos \frac{\pi}{3}": sympy.tan(two) ** 2 / 2,
        r"\arcsin(\frac{1}{3})+\cosh 2": sympy.asin(1 / three) + sympy.cosh(two),
    }.items():
        assert latex_number(text) == pytest.approx(float(exact), rel=1e-12), text


@pytest.mark.parametrize(
    "text",
    [
        "9^{9^{9^{9}}}", "9**9**9", "9!" * 50, "((9!)!)!", "2.5^99999", "1e999", "9" * 1_000_000, "(" * 900, "\\sin" * 240 + "1",
        "\\frac{" * 150 + "1", "\\sqrt{" * 100 + "2" + "}" * 100, "-" * 999 + "1", "(" * 300 + ")_{1}", "\\binom{999999}{499999}",
        "1," * 400, "\ud800", "__import__('os').system('false')", "\x00" * 500, "1000!" * 90, "9^{999}" * 140, "1/" * 400 + "3",
    ],
)  # fmt: skip
def test_a_text_made_to_break_an_evaluator_is_answered_at_once(text: str) -> None:
    started = time.process_time()
    latex_number(text)
    assert time.process_time() - started < 0.5


def test_no_soup_of_tokens_raises() -> None:
    draw = random.Random(6)
    tokens = "1 23 0.5 , . ( ) { } [ ] + - * / ^ _ ! ' e d \\pi \\frac \\sqrt \\sin \\log \\binom \\left \\right < \\le % & \\\\ x".split()
    for _ in range(3000):
        latex_number("".join(draw.choices(tokens, k=draw.randrange(1, 14))))
