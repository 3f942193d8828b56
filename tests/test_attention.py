"""The choice of attention: flash-attn where it is installed and fits, and the reason where not; a forced one that cannot is refused."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest
import torch

from vlm_dft.config import resolve_config
from vlm_dft.errors import ModelError
from vlm_dft.models import choose_attention, takes_flash
from vlm_dft.preflight import check_run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 8.0, and packages that import: all that the choice looks at."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for name in ("flash_attn", "flash_attn_interface"):
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        package.flash_attn_varlen_func = object()  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, package)


@pytest.mark.usefixtures("gpu")
def test_flash_attention_is_chosen_where_it_fits() -> None:
    assert choose_attention(None, "cuda", True, "tiny") == ("flash_attention_2", "flash-attn is installed and fits")
    assert choose_attention("sdpa", "cuda", True, "tiny") == ("sdpa", "asked for")
    assert choose_attention("flash_attention_2", "cuda", True, "tiny") == ("flash_attention_2", "asked for")


@pytest.mark.usefixtures("gpu")
def test_what_flash_attention_lacks_is_the_reason_for_sdpa_and_an_error_where_it_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def both(device: str, half: bool, said: str) -> None:
        assert choose_attention(None, device, half, "tiny") == ("sdpa", said)
        with pytest.raises(ModelError, match="attention = flash_attention_2 cannot work: .*Use attention sdpa"):
            choose_attention("flash_attention_2", device, half, "tiny")

    both("cpu", True, "flash-attn needs a GPU and half precision, this run is on cpu")
    both("cuda", False, "flash-attn needs a GPU and half precision, this run is on cuda in fp32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    both("cuda", True, "it is made for GPUs of compute capability 8.0 or more, this one has 7.5")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("vlm_dft.models.takes_flash", lambda name: False)
    both("cuda", True, "the layers of tiny do not take it")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert choose_attention(None, "cuda", True, "tiny")[1].startswith("its package does not import (")


@pytest.mark.usefixtures("gpu")
def test_flash_attention_3_is_taken_when_asked_for_on_hopper_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="it is made for Hopper GPUs, 9.0, this one has 8.0"):
        choose_attention("flash_attention_3", "cuda", True, "tiny")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert choose_attention("flash_attention_3", "cuda", True, "tiny") == ("flash_attention_3", "asked for")
    assert choose_attention(None, "cuda", True, "tiny")[0] == "flash_attention_2"


def test_a_family_says_whether_its_layers_take_flash_attention() -> None:
    assert takes_flash("tiny")


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_a_forced_flash_attention_without_its_package_is_refused_before_a_run_begins(
    attention: str, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    name = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attention]
    config = resolve_config(("test", {"attention": attention, "output": str(tmp_path / "run")}))
    with pytest.raises(ModelError, match=f"attention = {attention} needs the package {name}, which is not installed"):
        check_run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_half_precision_without_a_gpu_is_refused_before_a_run_begins(precision: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = resolve_config(("test", {"precision": precision, "output": str(tmp_path / "run")}))
    with pytest.raises(ModelError, match=f"precision = {precision} needs a GPU, found none"):
        check_run(config)
