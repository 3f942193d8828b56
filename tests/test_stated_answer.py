"""What a response states: literal responses, one general rule each, and what is read in them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.answers import Kind, stated_answer

ANGLES = ["30°", "45°", "60°", "90°"]
COLOURS = ["red", "green", "blue"]
VERDICT = ["Yes", "No"]
NONE = None

CHOICES: list[tuple[str, list[str] | None, str | None]] = [
    # in any dress
    ("B", NONE, "B"), ("b", NONE, "B"), ("(b)", NONE, "B"), ("B.", NONE, "B"), ("**B**", NONE, "B"), ("$B$", NONE, "B"),
    ("[B]", NONE, "B"), ("B) green", COLOURS, "B"), ("B: green", COLOURS, "B"), (r"$\boxed{\text{B}}$", NONE, "B"),
    (r"\boxed{\textbf{(C)}~60^\circ}", ANGLES, "C"), (r"\boxed{60^\circ}", ANGLES, "C"), (r"\( \boxed{B} \)", NONE, "B"),
    ("<answer>B</answer>", NONE, "B"), ('{"answer": "B"}', NONE, "B"), ("{'final_answer': 'C'}", NONE, "C"),
    # announced
    ("**Answer: B**", NONE, "B"), ("Answer:\nA", NONE, "A"), ("### Final Answer\n\n**B**", NONE, "B"), ("Ans. (C)", NONE, "C"),
    ("The answer is: **C. 60°**\n\nExplanation: A is wrong, B is too small.", ANGLES, "C"),
    ("Answer: B\n\nExplanation: The other options A, C, D are incorrect.", NONE, "B"),
    ("Hence, (B) is the correct answer.", NONE, "B"), ("Choice B is right.", NONE, "B"), ("I choose B", NONE, "B"),
    ("So x is about 21.\n\nC", NONE, "C"), ("La réponse est B.", NONE, "B"),
    ("答案：C", NONE, "C"), ("答案是B", NONE, "B"), ("故选：B。", NONE, "B"), ("所以，正确答案是选项D。", NONE, "D"),
    ("【答案】C", NONE, "C"), ("所以∠D的度数为D。", ANGLES, "D"), ("此题选择B选项。", NONE, "B"), ("∠D的度数是60°，选项B正确。", ANGLES, "B"),
    ("Therefore, C.", NONE, "C"), ("The shape is a white circle, as shown in B.", NONE, "B"), ("綜上所述，答案為C", NONE, "C"),
    ("Ｃ", NONE, "C"), ("It can't be A or C. It must be B.", NONE, "B"), ("It cannot be determined.", NONE, NONE),
    ("The missing one is D, because A has too many dots and B too few.", NONE, "D"), ("I believe it's D.", NONE, "D"),
    ("Looking at options A, B and C, none stands out.", NONE, NONE), ("综上，D项符合。", NONE, "D"), ("颜色是green。", COLOURS, "B"),
    # the option's text, or its number
    ("The length is 5√3.", ["5", "7"], NONE), ("Green absorbs it, so the color is blue (C).", COLOURS, "C"),
    ("Green.", COLOURS, "B"), ("The color is green.", COLOURS, "B"), ("Therefore, x = 60.", ANGLES, "C"),
    ("So the measure is $60^{\\circ}$.", ANGLES, "C"), ("10 + 10 + 10 + 10 = 40.", ["10", "40"], "B"),
    ("The length is 3.0.", ["1", "2", "3"], "C"),
    # yes and no
    ("No, there are not.", VERDICT, "B"), ("Yes, there are fewer cars.", VERDICT, "A"), ("True", VERDICT, "A"),
    # the last word counts, thoughts do not
    ("<think>Answer: A? No.</think>\n\nThe angle is 60°.\n\n**Answer: C**", ANGLES, "C"),
    ("<think>Maybe the answer is B, but", NONE, NONE), ("<think>So the answer is B.</think>", NONE, "B"),
    ("The answer is B. No, wait. The answer is C.", NONE, "C"),
    ("The answer is (B).\n\nQuestion: What is it?\nThe answer is (A).", NONE, "B"),  # a further question is another's
    # negation
    ("The answer is not A but B.", NONE, "B"), ("It is not red. It is green.", COLOURS, "B"),
    ("The ball is green and not red.", COLOURS, "B"), ("Option A is incorrect. Therefore, the correct option is C.", NONE, "C"),
    ("A. 30° - incorrect\nB. 45° - incorrect\nC. 60° - correct\nD. 90° - incorrect", ANGLES, "C"),
    # asides
    ("The most affected would be the blue ones, as they feed the red ones and the green ones.", COLOURS, "C"),
    # a list of options is no answer, and neither is a name, an alternative, a refusal
    ("A. red\nB. green\nC. blue\n\nThe ball in the image is blue.", COLOURS, "C"),
    ("(A) red\n(B) green\n(C) blue", COLOURS, NONE), ("It could be A or B.", NONE, NONE), ("The answer is A or B.", NONE, NONE),
    ("A triangle has three sides.", NONE, NONE), ("So the measure of angle D is 20.", NONE, NONE),
    ("I cannot determine the answer from the image.", COLOURS, NONE), ("", COLOURS, NONE),
]  # fmt: skip

NUMBERS: list[tuple[str, str | None, str | None]] = [
    ("\\boxed{42}", NONE, "42"), ("The answer is $\\boxed{1{,}234}$.", NONE, "1234"), ("Final answer: $1,234.50", NONE, "1234.50"),
    ("#### 1,000", NONE, "1000"), ("Answer: 12 cm", NONE, "12"), ("x = -3 cm^2", NONE, "-3"), ("答案是12。", NONE, "12"),
    (r"$\frac{3}{4}$", NONE, "3/4"), ("It is 50%", NONE, "50%"), ("about 1.5 × 10^3 N", NONE, "1.5e3"), ("It is 3√5.", NONE, "3√5"),
    ("<think>2+2=5?</think>\n4", NONE, "4"), ("So there are twenty-one apples.", NONE, "21"), ("The area is 36π.", NONE, "36π"),
    (r"It is 3 \frac{1}{2} inches.", NONE, "7/2"), ("So 2 1/4 cups are left.", NONE, "9/4"),
    ("Therefore, the sum is 12 + 15 = **27**.", NONE, "27"), ("The change is -26 km/h.", NONE, "-26"),
    ("There are 3 cars and 2 buses, so there are 5 vehicles in total.", NONE, "5"),
    ("It is 6.53V and the current across it is 0.00139A.", NONE, "6.53"), ("The range is from 1 to 7.", NONE, "7"),
    ("There are 3 bars with values smaller than 9.", "How many bars have values smaller than 9?", "3"),
    ("There are three of them below 8.", "How many algorithms are lower than 8?", "3"),
    ("The model has 9 dots. There are 3 dots in each group.", "The model has 9 dots. There are (_) dots in each group.", "3"),
    ("3 dots in each group.", "9 dots are divided into 3 groups. How many are in each group?", "3"),
    ("There are no red cars left.", "How many objects are left?", "0"),
    ("To find the gap of these two people I need more information.", "What is the gap?", NONE),
    ("In 1990 there is no data, so we cannot determine the difference.", "What is the difference?", NONE),
    ("图中共有7个物体,其中3个是红色,因此剩下4个物体。", "How many objects are left?", "4"),
    ("9 is the correct count, as A has 87 and B has 96.", NONE, "9"), ("It is not 69 but 25.", NONE, "25"),
    ("Out of 54, 22 fit.", NONE, "22"), ("If you remove 93 from 167, you are left with 74.", NONE, "74"),
    ("The value in 2001 was 32 units, and in 1987 it was 62.", NONE, "32"), ("I see 7 people: 4 men and 3 women.", NONE, "7"),
    ("There are 3 men and 4 women, so 7 in total.", NONE, "7"), ("**7** people are in the image: 3 men, 4 women.", NONE, "7"),
    ("no idea", NONE, NONE),
]  # fmt: skip

WRITTEN: list[tuple[Kind, str, str | None]] = [
    ("expression", r"So it is \boxed{\frac{\sqrt{3}}{2}}. This result is nice.", r"\frac{\sqrt{3}}{2}"),
    ("expression", "The answer is $x^2 + 1$ for every x.", "x^2 + 1"), ("text", "<answer>red car</answer>", "red car"),
    ("text", "Answer: quarter past three.", "quarter past three"), ("text", "7:30 PM", "7:30 PM"),
    ("text", "Long. " * 30, NONE), ("list", "The list is [1, 2, 3].", "[1, 2, 3]"), ("list", "The answer is 1, 2, 3.", "[1, 2, 3]"),
    ("list", "none", NONE), ("expression", r"\boxed{3\sqrt{3} \text{ cm}^2}", r"3\sqrt{3} \text{ cm}^2"),
    ("expression", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("expression", r"The area is \(25\pi\) square centimeters.", r"25\pi"), ("expression", "The fraction is 3/4.", "3/4"),
    ("expression", "所以直线方程为 y = 2x + 1。", "y = 2x + 1"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "choices", "letter"), CHOICES)
def test_a_response_states_an_option(response: str, choices: list[str] | None, letter: str | None) -> None:
    assert stated_answer(response, choices=choices, kind="choice").answer == letter


@pytest.mark.parametrize(("response", "question", "number"), NUMBERS)
def test_a_response_states_a_number(response: str, question: str | None, number: str | None) -> None:
    assert stated_answer(response, kind="number", question=question).answer == number


@pytest.mark.parametrize(("kind", "response", "answer"), WRITTEN)
def test_a_response_states_what_is_written(kind: Kind, response: str, answer: str | None) -> None:
    assert stated_answer(response, kind=kind).answer == answer


def test_the_rule_that_read_the_answer_is_named() -> None:
    responses = [
        r"\boxed{B}",
        "<answer>B</answer>",
        "The answer is B.",
        "B. green",
        "A\n...\nSo it is option B.",
        "I cannot tell.",
    ]
    rules = ["boxed", "answer tag", "announced", "leading option", "concluding sentence", "abstains"]
    assert [stated_answer(one, kind="choice").rule for one in responses] == rules


@pytest.mark.parametrize("kind", ["choice", "number"])
@pytest.mark.parametrize(
    "piece",
    ["9", "1,", "{", "(A) ", r"\boxed{", r"\frac{1}{", "the answer is ", "A, ", "=1", "the ", "选", "(A) x\n(B) y\n", "cannot be "],
)  # fmt: skip
def test_a_megabyte_of_anything_is_read_in_bounded_processor_time(kind: Kind, piece: str) -> None:
    response = piece * (1_000_000 // len(piece))
    start = time.process_time()
    stated_answer(
        response, choices=["red", "(c)", "60°", "It would decrease."], kind=kind, question="Which of 3? " * 99
    )
    assert time.process_time() - start < 1


HOSTILE = st.text(st.sampled_from("AB(). \n{}\\$^_*=/%-123٣²½①选答案是：√π\ud800\x00") | st.characters(), max_size=60)


@settings(max_examples=150, deadline=None)
@given(HOSTILE, st.none() | st.lists(HOSTILE, min_size=1, max_size=5), HOSTILE)
def test_no_response_raises(response: str, choices: list[str] | None, question: str) -> None:
    for kind in ("choice", "number", "list", "text", "expression"):
        found = stated_answer(response, choices=choices, kind=kind, question=question)  # type: ignore[arg-type]
        assert found.answer is None or found.answer
