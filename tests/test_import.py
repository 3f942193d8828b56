"""The promise "reuse our collators in your own project": importing them pulls in none of the heavy libraries."""

import subprocess
import sys

import pytest


def loaded_after(code: str) -> set[str]:
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.split(".")[0] for name in out.stdout.split()}


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert not {"torch", "transformers", "datasets", "peft", "numpy"} & loaded_after("import vlm_dft")


def test_the_collator_and_the_losses_do_not_import_transformers() -> None:
    code = "from vlm_dft import ChatCollator, Example, OBJECTIVES, attach_loss, dft_loss, fused_linear_loss"
    assert not {"transformers", "datasets", "peft", "deepspeed", "accelerate"} & loaded_after(code)


def test_scoring_does_not_import_torch() -> None:
    assert not {"torch", "transformers"} & loaded_after("from vlm_dft import score_response")


def test_help_and_the_checks_before_a_run_do_not_import_torch() -> None:
    code = "from vlm_dft.cli import _parser; _parser(); import vlm_dft.preflight"
    assert not {"torch", "transformers", "datasets", "numpy"} & loaded_after(code)


def test_every_public_name_is_found_and_others_are_not() -> None:
    import vlm_dft

    assert all(getattr(vlm_dft, name) is not None for name in vlm_dft.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        vlm_dft.nothing  # noqa: B018
