"""The wheel and the sdist, built, installed elsewhere and looked into; and every import is declared."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CARDS = {
    "recipe": sorted(path.stem for path in ROOT.glob("data_recipes/*.yaml")),
    "benchmark": sorted(path.stem for path in ROOT.glob("eval/*.yaml")),
}
DISTRIBUTION = {
    "charset_normalizer": "charset-normalizer",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "flash_attn": "flash-attn",
    "liger_kernel": "liger-kernel",
    "math_verify": "math-verify",
}

LIST_CARDS = """
import json, yaml, vlm_dft
from vlm_dft.cards import list_cards
def read(path): return {"path": str(path), "keys": sorted(yaml.safe_load(path.read_text(encoding="utf-8")))}
cards = {kind: {name: read(path) for name, path in list_cards(kind).items()} for kind in ("recipe", "benchmark")}
print(json.dumps({"home": vlm_dft.__file__, "cards": cards}))
"""


def build(kind: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "build",
        f"--{kind}",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_the_package_its_cards_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"vlm_dft", "vlm_dft-0.1.0.dist-info"}
    assert "vlm_dft/py.typed" in names
    assert "vlm_dft/embedded/tiny-qwen2.5-vl/model.safetensors" in names
    assert "vlm_dft-0.1.0.dist-info/licenses/LICENSE" in names
    cards = {name for name in names if name.startswith("vlm_dft/_cards/")}
    assert not [name for name in cards if name.endswith(".py")]
    assert {f"vlm_dft/_cards/data_recipes/{name}.yaml" for name in CARDS["recipe"]} <= cards
    assert {f"vlm_dft/_cards/eval/{name}.yaml" for name in CARDS["benchmark"]} <= cards
    assert "vlm_dft/_cards/engines/zero2.json" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_wheel_is_under_12_megabytes(wheel: Path) -> None:
    assert wheel.stat().st_size < 12e6


def test_wheel_installed_elsewhere_finds_every_card(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", LIST_CARDS], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    seen = json.loads(done.stdout)
    assert seen["home"] == str(site / "vlm_dft/__init__.py")
    for kind, names in CARDS.items():
        assert sorted(seen["cards"][kind]) == names
        for card in seen["cards"][kind].values():
            assert Path(card["path"]).is_relative_to(site / "vlm_dft/_cards")
            assert {"description", "licence"} <= set(card["keys"])


def test_sdist_is_complete(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for needed in ("LICENSE", "README.md", "pyproject.toml", "scripts/setup.sh", "tests/test_packaging.py"):
        assert needed in names
    assert {f"data_recipes/{name}.yaml" for name in CARDS["recipe"]} <= names
    assert not [name for name in names if name.startswith((".venv/", "runs/", "dist/"))]


@pytest.mark.parametrize("folder", ["data_recipes", "eval"])
def test_cards_hold_no_code(folder: str) -> None:
    assert {path.suffix for path in (ROOT / folder).rglob("*") if path.is_file()} <= {".yaml", ".md"}


def imported() -> set[str]:
    """Top-level names of everything that the package imports, wherever the import stands."""
    names = set()
    for path in (ROOT / "vlm_dft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(str(node.module).split(".")[0])
    return names - set(sys.stdlib_module_names) - {"vlm_dft"}


def test_everything_imported_is_declared() -> None:
    lines = list(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        lines += extra
    declared = {re.split(r"[<>=;\[ ]", line)[0].lower() for line in lines}
    assert {DISTRIBUTION.get(name, name).lower() for name in imported()} <= declared


def test_the_package_says_the_version_of_pyproject() -> None:
    import vlm_dft

    assert vlm_dft.__version__ == PROJECT["version"]
