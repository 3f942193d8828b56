"""A run ends in the same weights however its steps are split: every objective, engine, split, layout and optimiser.

21 rows in steps of eight, shuffled, four steps: the third has five rows, the fourth is of a second epoch. benchmarks/decomposition.md
has the whole product; here each objective meets each engine and each split, and half of the layouts and optimisers in each.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from group_runs import SPLITS, Found, Plan, Results, run_plan
from loss_worker import differences

from vlm_dft.objectives import OBJECTIVES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
torch.set_num_threads(1)

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
DTYPES = {"none": "float64", "ddp": "float64", "fsdp2": "float64", "zero2": "float32", "zero3": "float32"}
"""DeepSpeed keeps its weights in fp32. Where float64 is exact, what fp32 leaves is rounding."""
EXACT = 1e-10  # of the whole movement, in float64. Measured: 1e-12
ONE = 1e-8  # of the largest movement of a weight, in float64. Measured: 4e-10 by AdamW, whose eps meets a gradient as small
WEIGHTS = (
    1e-6  # of the largest weight, in fp32. Measured: 1e-7 by SGD, 6e-7 by AdamW (which divides small by small numbers)
)
ROUNDING = 1e-4  # of the whole movement, in fp32. Measured: 4e-5

SHORT = {"rows": "21", "steps": 4, "strategy": "random", "model": "untied"}
WORDS = {"rows": "words", "steps": 3, "model": "untied", "dummy_image": True}


def name_of(objective: str, packed: bool, adamw: bool, dtype: str) -> str:
    return f"{objective} {'packed' if packed else 'padded'} {'adamw' if adamw else 'sgd'} {dtype}"


MATRIX: dict[str, dict[str, Any]] = {
    name_of(objective, packed, adamw, dtype): {
        **SHORT, "objective": objective, "packing": packed, "optim": "adamw" if adamw else "sgd", "dtype": dtype,
    }
    for objective, packed, adamw, dtype in product(OBJECTIVES, (False, True), (False, True), ("float64", "float32"))
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    f"{name} {dtype}": {**case, "dtype": dtype}
    for dtype in ("float64", "float32")
    for name, case in {
        "one left": {**SHORT, "rows": "17", "learning_rate": 0.02},  # the last step has one row, and one process none
        "words": WORDS,
        "words packed": {**WORDS, "packing": True},
        "words recomputed": {**WORDS, "activation_checkpointing": True},
        "words frozen": {**WORDS, "frozen": ["vision", "merger"]},
        "words mixed": {**SHORT, "rows": "21 words", "dummy_image": True},
        "nothing but words": {**WORDS, "rows": "nothing but words", "objective": "nll"},
    }.items()
}


def chosen(engine: str, split: str) -> tuple[str, ...]:
    """Of every objective one layout and one optimiser; the other ones with another split or engine."""
    s, e = list(SPLITS).index(split), ("none", *ENGINES).index(engine)
    return tuple(
        name_of(objective, (k + s) % 2 == 0, (k // 2 + s + e) % 2 == 0, DTYPES[engine])
        for k, objective in enumerate(OBJECTIVES)
    )


def others(engine: str) -> tuple[str, ...]:
    return tuple(name for name in OTHERS if name.endswith(DTYPES[engine]))


def reference(case: str) -> str:
    """The case on one process, in one batch, padded, activations kept, and no dummy image."""
    return case.replace("packed ", "padded " if case in MATRIX else "").replace("recomputed ", "")


PLAN: Plan = [
    ("none", "1x2x4", chosen("none", "1x2x4")),
    *((engine, split, chosen(engine, split)) for engine in ENGINES for split in ("2x1x4", "2x2x2")),
    *((engine, "2x1x4", others(engine)) for engine in ENGINES),
]
REFERENCES = tuple(dict.fromkeys(reference(case) for _, _, cases in PLAN for case in cases))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """(engine, split, case) -> what became of it; all are run at the first call for this fixture."""
    cases = {**MATRIX, **OTHERS}
    alone = {f"none 1x1x8 {case}": {**cases[case], "dummy_image": False} for case in REFERENCES}
    return run_plan(PLAN, cases, tmp_path_factory.mktemp("results"), 200, **alone)


def check(found: Found, expected: Found, case: str) -> None:
    far = differences(found, expected)
    if case.endswith("float64"):
        assert far["norm"] < EXACT and far["of_update"] < ONE, (case, far)
    else:
        assert far["of_weights"] < WEIGHTS and far["norm"] < ROUNDING, (case, far)


def test_the_plan_covers_every_pair() -> None:
    cells = [(engine, split, *case.split(" ")[:3]) for engine, split, cases in PLAN for case in cases if case in MATRIX]
    for engine, split in product(ENGINES, ("2x1x4", "2x2x2")):
        for objective in OBJECTIVES:
            assert any(cell[:3] == (engine, split, objective) for cell in cells)
        for layout, optimiser in product(("packed", "padded"), ("sgd", "adamw")):
            assert any(cell[:2] == (engine, split) and cell[3:] == (layout, optimiser) for cell in cells)
    for objective, layout, optimiser in product(OBJECTIVES, ("packed", "padded"), ("sgd", "adamw")):
        assert any(cell[2:] == (objective, layout, optimiser) for cell in cells), (objective, layout, optimiser)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accumulated_micro_batches_end_in_the_weights_of_one_batch(objective: str, results: Results) -> None:
    case = next(case for case in chosen("none", "1x2x4") if case.split()[0] == objective)
    check(results("none", "1x2x4", case), results("none", "1x1x8", reference(case)), case)


@pytest.mark.parametrize("split", ["2x1x4", "2x2x2"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_end_in_the_weights_of_one(objective: str, engine: str, split: str, results: Results) -> None:
    case = next(case for case in chosen(engine, split) if case.split()[0] == objective)
    check(results(engine, split, case), results("none", "1x1x8", reference(case)), case)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
@pytest.mark.parametrize("split", ["2x1x4", "2x2x2"])
def test_each_process_sees_its_share_of_the_rows_and_no_row_twice(engine: str, split: str, results: Results) -> None:
    """By the ids of the rows collated: every step's are those of plain shuffling, dealt evenly, the last step's five too."""
    whole = [row for batch in results("none", "1x1x8", REFERENCES[0])["seen"][0] for row in batch]
    assert len(set(whole[:21])) == 21
    seen, accumulation = results(engine, split, chosen(engine, split)[0])["seen"], SPLITS[split].get("accumulation", 1)
    assert len(seen) == 2
    for step, start in enumerate(range(0, 21, 8)):
        mine = [process[step * accumulation : (step + 1) * accumulation] for process in seen]
        counts = [sum(map(len, batches)) for batches in mine]
        assert sorted(row for batches in mine for batch in batches for row in batch) == sorted(
            whole[start : min(start + 8, 21)]
        )
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name.removesuffix(" float64") for name in OTHERS if name.endswith("float64")])
def test_a_process_without_a_row_or_without_a_picture_neither_hangs_nor_distorts(
    name: str, engine: str, results: Results
) -> None:
    """The vision tower trained (padded, packed, its activations computed again) and frozen; pictures in some rows or in none.

    Without dummy images ZeRO-2, ZeRO-3 and FSDP2 abort here, and DDP hangs where activations are computed again.
    """
    case = f"{name} {DTYPES[engine]}"
    check(results(engine, "2x1x4", case), results("none", "1x1x8", reference(case)), case)
