"""Hostile responses: what could hang, crash or be executed by a scorer, by name; and a record of each kind of answer."""

from __future__ import annotations

from typing import Any


def hostile_responses(target: str) -> dict[str, str]:
    """Responses that no scorer may take a second for; those that hold code would make the file `target`."""
    code = f'__import__("os").system("touch {target}")'
    return {
        "tower": "9**9**9**9", "boxed tower": r"\boxed{9^{9^{9^{9^{9}}}}}", "Answer: tower": "The answer is 9**9**9**9**9",
        "open fractions": "\\frac{" * 10**5, "nested fractions": "\\boxed{" + "\\frac{1}{" * 10**4 + "1" + "}" * 10**4 + "}",
        "nested braces": "\\boxed{" + "{" * 10**4 + "}" * 10**4 + "}", "open boxes": "\\boxed{" * 20_000,
        "30 roots": "\\boxed{" + "\\sqrt{2+" * 30 + "2" + "}" * 30 + "}", "power of a sum": r"\boxed{(x+y+z)^{999}}",
        "factorials": r"\boxed{99999!!!!}", "division by zero": r"\boxed{\frac{1}{0}}",
        "1e999": "1e999", "tiny": "The answer is 1e-999999999", "infinity": r"\boxed{-inf}", "nan": "nan",
        "a megabyte of digits": "1" * 10**6, "boxed digits": "\\boxed{" + "7" * 10**6 + "}",
        "control characters": "".join(map(chr, range(32))) * 100, "zero byte": "\0", "surrogates": "\ud800\udfff" * 1000 + "The answer is \ud800",
        "200k characters": "word " * 40_000, "50k commas": "1," * 50_000, "100k letters": "a" * 100_000, "50k options": "(A) " * 50_000,
        "200k spaces": " " * 200_000, "100k newlines": "\n" * 100_000, "100k equals": "=" * 100_000, "50k slashes": "1/" * 50_000,
        "100k backslashes": "\\" * 100_000, "100k dollars": "$" * 100_000, "100k brackets": "(" * 100_000, "50k minus": "-1" * 50_000,
        "20k announcements": "the answer is " * 20_000, "20k tags": "<answer>" * 20_000, "20k thoughts": "<think>" * 20_000,
        "open JSON": '{"short answer": ' * 10_000, "halves": "½" * 50_000, "other digits": "٣٤٥", "empty": "",
        "code": code, "boxed code": rf"\boxed{{{code}}}", "code in JSON": f'{{"short answer": "{code}"}}'.replace('"touch', "'touch"),
        "exit": "exit()", "boxed exit": r"\boxed{exit()}", "answer exit": "The answer is exit().",
    }  # fmt: skip


def record(gold: str, answer_type: str, **more: Any) -> dict[str, Any]:
    blank = {
        "choices": None,
        "question_type": "free_form",
        "question": "How many of the 3?",
        "unit": None,
        "precision": None,
    }
    return {**blank, "gold_answer": gold, "answer_type": answer_type, **more}


RECORDS = [
    record("2", "text", choices=["1", "2", "3", "4"], question_type="multi_choice"),
    record("D", "choice", choices=list("ABCDE"), question_type="multi_choice"),
    record("3.5", "float", unit="cm", precision=1),
    record(r"$\frac{3^{1008}-1}{3^{1009}}$", "expression"),
    record("[1, 2]", "list"),
]
