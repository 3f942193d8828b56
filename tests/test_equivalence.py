"""Equivalence: literal pairs that are and are not the same, and pairs whose sameness sympy or exact fractions decide."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.equivalence import equivalent
from vlm_dft.expressions import read_expression
from vlm_dft.latex_text import latex_text
from vlm_dft.quantities import read_quantity
from vlm_dft.symbolic import harmless

SAME = [
    (r"$25\pi$ cm$^2$", r"25 \pi"), ("25 pi square cm", r"25\pi"),
    ("1,234", "1234"), ("$1,234.50", "1234.5"), (r"\$5", "5"), ("5 USD", "$5"), ("−3", "-3"), ("+7", "7"), ("007", "7"), (".5", "0.5"),
    ("50%", "0.5"), ("50%", "50"), ("50", "50%"), (r"10\%", "10"), ("50 percent", "50%"),
    (r"\frac{1}{2}", "0.5"), (r"\dfrac12", "1/2"), ("3 1/2", "3.5"), (r"3\frac{1}{2}", "7/2"), ("2½", "5/2"), ("-1/2", r"-\frac{1}{2}"),
    ("3.2e5", r"3.2 \times 10^5"), ("3.2 x 10^{5}", "320000"), ("1e-3", "0.001"), ("twenty-five", "25"), ("Seven", "7"),
    ("5 cm", "5"), ("0.5 m", "50 cm"), ("50 cm^2", "0.005 m^2"), ("2 hours", "120 minutes"), ("1 kg", "1000 g"), ("12 apples", "12"),
    ("5 million", "5000000"), (r"25\pi \text{ cm}^2", r"25\pi"), (r"5\sqrt{2} meters", r"5\sqrt2"), (r"2.5{cm}", "2.5"),
    (r"$\frac{90}{23}^{\circ}$", "90/23"), ("69{degrees}", "69"), ("118掳T", "118°T"), ("60°", "60"), ("\x0crac{36}{13}", "36/13"),
    (r"2\sqrt{3}-2", r"-2+2\sqrt3"), (r"\frac{\sqrt{3}}{3}", r"1/\sqrt{3}"), (r"\sqrt[3]{8}", "2"), ("√2", r"\sqrt{2}"),
    (r"\frac{1}{3}-\frac{1}{3^{1009}}", r"$\frac{3^{1008}-1}{3^{1009}}$"), ("2^{100}", "1267650600228229401496703205376"), ("6-5i", "-5i+6"),
    ("x^2+2x+1", "(x+1)^2"), (r"\sin^2 x + \cos^2 x", "1"), ("|-3|", "3"), ("4!", "24"), (r"\log_2 8", "3"), ("x_1 + x_2", "x_2+x_1"),
    ("x = 3", "3"), ("3", "x=3"), (r"\theta = 30^\circ", "30"), ("area = 12 cm", "12"), ("y=2x+1", "2x-y+1=0"), ("1+1=2", "2"),
    ("[2014, 2016]", "2014, 2016"), ("{1,2}", "2, 1"), (r"\{1,2\}", "{2,1}"), ("3 or 5", "5, 3"), ("3 and 5", "3, 5"), ("(1/2, 3)", "(0.5, 3)"),
    (r"(0,1]", r"\left(0,1\right]"), ("x>3", r"(3,\infty)"), (r"-2 \le x \le 7", "[-2,7]"), (r"x \in [-2,7]", "[-2, 7]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3, \infty) \cup (-\infty, 2)"), (r"1\pm\sqrt2", r"1+\sqrt{2}, 1-\sqrt{2}"),
    ("9:00 A.M.", "9:00 am"), ("50.27 cm", r"Circumference $=50.27 \mathrm{~cm}$"), ("y>-3x", "$y>-3 x$"), ("2:3", "2/3"),
    ("The cat.", "cat"), (r"\text{None of these}", "none of these"), (r"\boxed{5}", "5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac{4}{2} \end{pmatrix}"), ("**42**", "42"), ("$x$", "x"),
]  # fmt: skip

DIFFERENT = [
    ("50", "0.5"), ("4.1", "4.14"), ("4", "4.14"), ("7.5", "7"), ("12.5", r"4\pi"), ("no", "on"), ("act", "cat"), ("x=3", "y=3"),
    ("(0,1)", "[0,1]"), ("2x", "2"), ("2 pi", "2"), ("5 kg", "5 m"), ("$5", "€5"), ("3", "three hundred"), ("", "5"),
    ("1/3", r"$\frac{3^{1008}-1}{3^{1009}}$"), ("I cannot say", r"2\sqrt{3}"), ("A", "a"), ("1,2,3", "123"), ("4.53", "4.5"), ("8.04", "8.0"),
    ("x", "xy"), ("x<3", r"(3,\infty)"), ("(1,2)", "(2,1)"),
    ("[1, 2]", "[1, 2, 3]"), ("1, 1", "1, 2"), ("1/0", "1/0.0"), ("0.00", "0.001"), ("-5", "5"), ("5 cm", "5 cm^2"), ("x+1", "x-1"),
    ("5 or 6", "5"), ("10^5", "10^6"), ("1e5", "1e6"), (r"\frac{1}{0}", "0"), ("3 apples", "3 pears"), ("y=2x", "y=3x"), ("0", "no"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_these_answers_say_what_the_gold_says(answer: str, gold: str) -> None:
    assert equivalent(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_these_answers_do_not(answer: str, gold: str) -> None:
    assert not equivalent(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold", "precision", "same"),
    [
        ("1.24", "1.2", 1, True), ("1.26", "1.2", 1, False), ("1.25", "1.2", 1, True), ("1.25", "1.3", 1, True), ("5.04", "5.0", 1, True),
        ("4", "3.9", 1, False), ("0.333", "1/3", 3, True), ("9.0004", "9", 3, True), ("9.01", "9", 3, False),
    ],
)  # fmt: skip
def test_with_a_precision_the_answer_is_rounded_to_it(answer: str, gold: str, precision: int, same: bool) -> None:
    assert equivalent(answer, gold, precision=precision) == same


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [
        ("12.57", r"4\pi", True), ("12.56", r"4\pi", False), ("0.33", "1/3", True), ("0.3", "1/3", False), ("15.6", r"11\sqrt{2}", True),
        ("16", r"11\sqrt{2}", False), ("1.299", "1.3", True), ("1.31", "1.3", False), ("3.14159", "3.14", True), ("0.886", "0.8862", True),
        (r"\frac{3\sqrt{3}}{4}", "1.3", True), ("4.999", "5", False), ("5.000", "5", True),
    ],
)  # fmt: skip
def test_a_decimal_is_right_when_it_is_the_gold_rounded_well_enough(answer: str, gold: str, same: bool) -> None:
    assert equivalent(answer, gold) == same


def test_the_unit_of_the_record_counts_where_the_gold_has_none() -> None:
    assert equivalent("0.5 m", "50", unit="cm")
    assert not equivalent("0.5 m", "0.5", unit="cm")
    assert equivalent("$3", "3", unit="$") and equivalent("3 tanks", "3", unit="tanks")


@given(
    st.fractions(max_denominator=997, min_value=-1000, max_value=1000),
    st.fractions(max_denominator=997, min_value=-1000, max_value=1000),
)
def test_fractions_are_the_same_when_exact_arithmetic_says_so(one: Fraction, other: Fraction) -> None:
    latex = rf"{'-' if one < 0 else ''}\frac{{{abs(one.numerator) * 3}}}{{{one.denominator * 3}}}"
    assert equivalent(latex, f"{other.numerator}/{other.denominator}") == (one == other)
    assert equivalent(latex, f"{one.numerator}/{one.denominator}")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_decimal_reads_as_its_exact_fraction_with_and_without_commas(number: Fraction) -> None:
    for text in (f"{number:f}", f"{number:,f}"):
        quantity = read_quantity(text)
        assert quantity is not None and quantity.value == Fraction(number) and quantity.places == 3


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(["x", "y", "2", "3", "7", r"\pi"])
    left, right = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    return rng.choice(
        [
            f"({left}+{right})", f"({left}-{right})", f"{left} \\cdot {right}", rf"\frac{{{left}}}{{{right}}}", rf"\sqrt{{{left}}}",
            f"({left})^2", f"({left}) \\cdot ({right})",
        ]
    )  # fmt: skip


def test_expressions_have_the_values_that_sympy_gives_them() -> None:
    import sympy
    from latex2sympy2_extended import latex2sympy

    rng = random.Random(3)
    compared = 0
    for _ in range(14):
        text = random_expression(rng, 3)
        ours = read_expression(text)
        assert ours is not None, text
        theirs = latex2sympy(text)
        point = {"x": 0.83, "y": 1.94}
        value = complex(theirs.subs({sympy.Symbol(name): at for name, at in point.items()}).evalf())
        mine = ours.at(point)
        if not (math.isfinite(value.real) and math.isfinite(value.imag)) or mine is None:
            continue
        assert complex(mine) == pytest.approx(value, rel=1e-9, abs=1e-9), text
        compared += 1
    assert compared > 9


def test_expanded_and_factored_polynomials_of_sympy_are_the_same_and_neighbours_are_not() -> None:
    import sympy

    x, y = sympy.symbols("x y")
    rng = random.Random(5)
    for _ in range(25):
        a, b, c = (rng.randint(1, 9) for _ in range(3))
        factored = (a * x + b * y) * (x - c) ** 2
        expanded = sympy.expand(factored)
        assert equivalent(sympy.latex(expanded), sympy.latex(factored))
        assert not equivalent(sympy.latex(expanded + 1), sympy.latex(factored))


@pytest.mark.parametrize(
    "text",
    ["9^{9^9}", r"\sum_{n=1}^{\infty} n", "(x+y+z)^{50}", "((x+1)^3)^3", "1" * 30, "(" * 9 + "x" + ")" * 9, "99!", "x" * 200, "exit()", r"\int x"],
)  # fmt: skip
def test_what_sympy_might_not_finish_never_reaches_it(text: str) -> None:
    assert not harmless(text)


def test_math_verify_is_asked_only_where_nothing_cheaper_reads_the_answer() -> None:
    code = (
        "import sys\nfrom vlm_dft.equivalence import equivalent\n"
        "assert equivalent('50%', '0.5') and equivalent('x^2-1', '(x-1)(x+1)') and not equivalent('(1,2]', '[1,2]')\n"
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)\n"
        "from vlm_dft.equivalence import equivalent as same\n"
        "assert same(r'\\begin{pmatrix}1\\\\2\\end{pmatrix}', r'\\begin{pmatrix}1\\\\\\frac{4}{2}\\end{pmatrix}') and 'math_verify' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_answers_are_compared_in_any_thread() -> None:
    found: list[bool] = []
    matrix = r"\begin{pmatrix}1\\2\end{pmatrix}"
    thread = threading.Thread(target=lambda: found.append(equivalent(matrix, matrix.replace("2", r"\frac{4}{2}"))))
    thread.start()
    thread.join()
    assert found == [True]


def test_latex_text_takes_off_what_does_not_matter() -> None:
    assert latex_text(r"$\boxed{\left( \dfrac{1}{2} \right)}$.") == r"( \frac{1}{2} )"
    assert latex_text("**$5.00**") == "$5.00"


PIECES = r"\frac \sqrt { } ^ ( ) 9 x \pm \cup , = - ! | _".split()


@settings(max_examples=80, deadline=None)
@given(
    st.text(max_size=60) | st.text(alphabet="0123456789+-*/^(){}[]|\\,.%$ xe=<>", max_size=60)
    | st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.sampled_from(["5", "3.14", r"2\sqrt{3}-2", "[1, 2]", "x=3", r"(0,\infty)", "blue"]),
)  # fmt: skip
def test_any_text_is_compared_quickly_and_without_an_error(answer: str, gold: str) -> None:
    begun = time.process_time()
    assert isinstance(equivalent(answer, gold), bool)
    assert isinstance(equivalent(gold, answer), bool)
    assert time.process_time() - begun < 1
