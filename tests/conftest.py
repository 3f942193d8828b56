"""Shared by the tests: the embedded processor and model, small drawn rows, and the real data pack where there is one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside the checkout")
    return SHARED / "data"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ.setdefault("VLM_DFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def processor() -> Any:
    """The embedded model's processor."""
    from vlm_dft.models import load_processor

    return load_processor("tiny")


@pytest.fixture
def model() -> Any:
    """A fresh copy of the embedded model."""
    from vlm_dft.models import load_model

    return load_model("tiny")


@pytest.fixture(scope="session")
def drawn() -> list[Any]:
    """Forty drawn training examples of unequal response length."""
    from vlm_dft.recipes import load_recipe, read_recipe

    return load_recipe(read_recipe("drawn"), None, limit=40)[0]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print "families x checks" after a run that held test_families.py: what is right, refused by name, and wrong."""
    cells: dict[tuple[str, str], list[str]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            place, _, test = getattr(report, "nodeid", "").partition("::test_")
            if test and place.endswith("test_families.py"):
                check, _, parameters = test.removesuffix("]").partition("[")
                mark = {"passed": ".", "skipped": "s"}.get(outcome, "F")
                refused = mark == "." and any(name == "refused" for name, _ in report.user_properties)
                cells.setdefault((_family(parameters), check), []).append("r" if refused else mark)
    if not cells:
        return
    checks = sorted({check for _, check in cells}, key=lambda check: (("", check) in cells, check))
    families = sorted({family for family, _ in cells if family})
    write = terminalreporter.write_line
    terminalreporter.section("families x checks: . ok, r refused with a clear error, s skipped, F failed")
    write(" " * 18 + "".join(f"{k + 1:3}" for k, check in enumerate(checks) if ("", check) not in cells))
    for family in families:
        marks = [cells.get((family, check), [" "]) for check in checks if ("", check) not in cells]
        write(f"{family:18}" + "".join(f"{_worst(mark):>3}" for mark in marks))
    for k, check in enumerate(checks):
        own = f" ({_worst(cells['', check])})" if ("", check) in cells else ""
        write(f"{k + 1:3} {check.replace('_', ' ')}{own}")


def _family(parameters: str) -> str:
    from processors import BUILDERS

    return next((part for part in parameters.split("-") if part in BUILDERS or part.endswith("_full")), "")


def _worst(marks: list[str]) -> str:
    return next(mark for mark in "Frs. " if mark in marks)
