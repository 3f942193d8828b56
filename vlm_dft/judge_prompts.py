"""Judge prompts: a question, a response, an extracted answer and a gold answer in; the text that a judge is asked with out.

The structure is that of the official code, the words and examples are our own: MathVista's extraction with five worked examples
(evaluation/extract_answer.py, prompts/ext_ans.py), MathVerse's extraction with six and its judgement with five
(extract_answer_s1.py, score_answer_s2.py, prompts.py), LogicVista's list of letters (eval/extract_accuracy.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 24_000  # characters of a response that are shown; of a longer one, its beginning and its end

_HINTS = {
    "integer": "Give the final value as a whole number.",
    "float 1": "Give the final value with one decimal place.",
    "float 2": "Give the final value with two decimal places.",
    "list": "Give the final list.",
    "choice": "Give the letter of the right option.",
}
_VALUES = (  # the form asked for, a question, a reply to it, what is to be extracted
    ("integer", "How many blue squares are drawn?", "Three in the top row and one below make 4 blue squares.", "4"),
    ("float 1", "What part of the bar is shaded?", "Of 5 equal parts 3 are shaded, which is 0.6 of the bar.", "0.6"),
    ("float 2", "How much does a kilogram cost?", "Half a kilogram is $1.18, a whole one thus $2.36.", "2.36"),
    (
        "list",
        "Between which years did the curve fall?",
        "It falls from 2003 on until 2007, hence [2003, 2007].",
        "[2003, 2007]",
    ),
    (
        "choice",
        "Which angle is the largest?\nChoices:\n(A) angle P\n(B) angle Q\n(C) angle R",
        "Angle Q lies opposite the longest side; it is the largest one. That is option (B).",
        "B",
    ),
)
_FINDS = (
    ("The perimeter is thus 14 + 10 = 24 cm.", "24 cm"),
    ("Since AB is parallel to CD the two angles are equal, so I choose option C.", "C"),
    ("The graph meets the axis where y = 0, and so x = -2.", "x = -2"),
    ("All in all it follows that the range is (0, 5].", "(0, 5]"),
    ("The picture is too small for me to read the lengths.", "null"),
    ("D. Rotating the figure by a quarter turn gives the one on the right.", "D"),
)
_JUDGED = (
    ("What is the length of the ladder?\nChoices:\nA: 3 m\nB: 5 m\nC: 6 m\nD: 8 m", "B", "B", "1"),
    ("What is the length of the ladder?\nChoices:\nA: 3 m\nB: 5 m\nC: 6 m\nD: 8 m", "B", "8 m", "0"),
    ("How wide is the river?", "0.5 m", "50 cm", "1"),
    ("What is the equation of the line?", "y = 3x - 1", "y = 3x + 1", "0"),
    ("How large is the angle at O?", "35°", "null", "0"),
)


def mathvista_prompt(response: str, record: Mapping[str, Any]) -> str:
    """Five worked examples, then this question and response: the judge writes the answer alone."""
    lines = [
        "Read each reply to a question, and write down the answer that it gives, without anything else, in the form asked for."
    ]
    lines += [
        f"{_HINTS[form]}\nQuestion: {question}\n\nReply: {reply}\n\nExtracted answer: {found}"
        for form, question, reply, found in _VALUES
    ]
    choices = "".join(
        f"\n({letter}) {text}" for letter, text in zip("ABCDEFGHIJ", record.get("choices") or (), strict=False)
    )
    question = f"{record.get('question', '')}" + (f"\nChoices:{choices}" if choices else "")
    lines.append(f"{_wanted(record)}\nQuestion: {question}\n\nReply: {shown(response)}\n\nExtracted answer:")
    return "\n\n".join(lines)


def mathverse_extraction_prompt(response: str, record: Mapping[str, Any]) -> str:
    """Six worked examples, then this response: the judge writes the answer alone, or null."""
    lines = ["Write down only the final answer that a reply gives. Write null if it gives none."]
    lines += [
        f"{number}. Reply: '{reply}'\nExtracted answer: {found}" for number, (reply, found) in enumerate(_FINDS, 1)
    ]
    lines.append(f"{len(_FINDS) + 1}. Reply: '{shown(response)}'\nExtracted answer:")
    return "\n\n".join(lines)


def mathverse_judgement_prompt(extraction: str, record: Mapping[str, Any]) -> str:
    """Five worked judgements, then this question, its gold answer and what was extracted: the judge writes 0 or 1."""
    lines = [
        "Say whether the model's answer to the question agrees with the standard answer. For options the letters must be the same; "
        "for open questions, the meaning (0.5 m is 50 cm). Write 1 if it agrees, 0 if it does not, and nothing else."
    ]
    cases = [*_JUDGED, (str(record.get("question", "")), str(record["gold_answer"]), extraction, "")]
    lines += [
        f"Question: {question}\nStandard answer: {gold}\nModel's answer: {found}\nJudgement: {verdict}".rstrip()
        for question, gold, found, verdict in cases
    ]
    return "\n\n".join(lines)


def logicvista_prompt(response: str, record: Mapping[str, Any]) -> str:
    """The question and the response: the judge writes the letters chosen, or ZZZZZ."""
    return (
        "Which option or options does the reply to the following question choose? Write their letters alone, as a list such as "
        "[A] or [B, D]; write [ZZZZZ] if it chooses none.\n\n"
        f"Question: {record.get('question', '')}\n\nReply: {shown(response)}\n\nLetters:"
    )


def shown(response: str) -> str:
    """A response as it is shown to a judge: bounded, and without what cannot be sent."""
    text = response.encode("utf-8", "replace").decode("utf-8")
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 2]}\n[...]\n{text[-LONGEST // 2 :]}"


def _wanted(record: Mapping[str, Any]) -> str:
    """The form of answer that a MathVista question asks for, as in its hint."""
    if record.get("choices"):
        return _HINTS["choice"]
    if record.get("answer_type") == "float":
        return _HINTS["float 2" if record.get("precision") == 2 else "float 1"]
    return _HINTS["integer" if record.get("answer_type") == "integer" else "list"]
