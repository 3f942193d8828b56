"""Export: a run folder or checkpoint in, a plain Hugging Face folder out, proved to be the model that was trained."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_dft.chat import Example
from vlm_dft.checkpoints import newest_whole
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.families import find_family, part_of
from vlm_dft.finishing import read_finished
from vlm_dft.locate import base_model, resolve_model
from vlm_dft.models import load_model, load_processor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
"""Largest size of the difference of logits over the size of the logits, by the dtype that is written. Measured on the embedded
model: 8e-7 in fp32, 1e-2 in bf16."""
SAMPLES = 4  # drawn pictures with questions on which logits are compared
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: a checkpoint, the run folder it lies in (None: none), and the model it was trained from."""

    checkpoint: Path
    run: Path | None
    base: str
    adapter: bool
    start: str  # what it was trained from: the base, or an adapter merged into it
    half: bool = False  # trained from in bf16


def find_source(name: str) -> Source:
    """The checkpoint that a run folder or a checkpoint folder stands for: the best one where the run kept it, else the last.

    Raises ConfigError for anything else; loads nothing.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"No folder at {name!r}. Expected a run folder or one of its checkpoints.")
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        checkpoint, run = folder, folder.parent if (folder.parent / "parts.json").is_file() else None
    else:
        finished = read_finished(folder)
        found = folder / str(finished["checkpoint"]) if finished else newest_whole(folder)[0]
        if found is None:
            below = sorted(path.parent.name for path in folder.glob("*/parts.json"))
            hint = (
                f"It holds the objectives {', '.join(below)}: name one of those folders." if below else "Train first."
            )
            raise ConfigError(f"{name!r} holds no whole checkpoint. {hint}")
        checkpoint, run = found, folder
    adapter = (checkpoint / "adapter_config.json").is_file()
    if adapter:
        base = base_model(str(checkpoint))
        return Source(checkpoint, run, base, adapter, base)
    start, precision = _start_of(run)
    return Source(checkpoint, run, base_model(start) if start else "", adapter, start, precision == "pure_bf16")


def check_export(name: str, out: Path, *, merge: bool, dtype: str | None) -> Source:
    """Every mistake that can be found without loading a model. Raises ConfigError."""
    source = find_source(name)
    if merge and not source.adapter:
        raise ConfigError(
            f"{source.checkpoint} holds no LoRA adapter, so there is nothing to merge. Leave out --merge."
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, found {dtype!r}.")
    if dtype is not None and source.adapter and not merge:
        raise ConfigError(
            "--dtype is for whole weights; an adapter is exported as it is. Use --merge, or leave it out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"{str(out)!r} exists and is not an empty folder. Nothing is overwritten: choose another name."
        )
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{str(out.absolute().parent)!r} does not exist. Make it first, or choose another place.")
    return source


def export(
    name: str,
    out: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    echo: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Write a checkpoint as a plain folder: weights, processor, generation settings, chat template and model card.

    merge: an adapter is merged into its base (for QLoRA the one that is not quantised), in fp32. dtype: "fp32" or "bf16";
    None: that of the checkpoint, or of the base that is merged into. Returns what was checked. Raises ModelError, and writes
    nothing, where the folder would not be the model that was trained.
    """
    source = check_export(name, out, merge=merge, dtype=dtype)
    echo(f"exporting {source.checkpoint}" + (f", merged into {source.base}" if merge else ""))
    processor = load_processor(str(source.checkpoint))
    with _aside(out) as folder:
        if source.adapter and not merge:
            found: dict[str, Any] = {"merged": False, "adapter": True}
            for file in ADAPTER_FILES:
                shutil.copyfile(source.checkpoint / file, folder / file)
        else:
            found = _whole(source, folder, None if dtype is None else DTYPES[dtype], processor, echo)
        processor.save_pretrained(folder)
        from vlm_dft.model_card import write_card

        write_card(
            folder, source.run or source.checkpoint, exported={"base": source.base, "adapter": source.adapter, **found}
        )
    found = {"source": str(source.checkpoint), "base": source.base, "output": str(out), **found}
    found["bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return found


def _whole(
    source: Source, folder: Path, dtype: torch.dtype | None, processor: Any, echo: Callable[[str], Any]
) -> dict[str, Any]:
    """Save whole weights and prove them: by their logits on pictures, their names, and what must not have changed."""
    dtype = dtype or _stored_dtype(source.base if source.adapter else str(source.checkpoint))
    batch = picture_batch(processor)
    model, agreement = _load(source, batch)
    expected = logits_of(model, batch)
    names = set(dict(model.named_parameters()))
    model = model.to(dtype)
    model.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    del model
    gc.collect()
    saved, missing = _plain_load(folder)
    if missing:
        raise ModelError(
            f"The written folder does not load as it should: {missing}. Nothing was kept; please report this."
        )
    lost = sorted(names ^ set(dict(saved.named_parameters())))
    if lost:
        raise ModelError(
            f"{len(lost)} parameters differ in name from the model's: {', '.join(lost[:5])}. Nothing was kept."
        )
    agreement["reloaded"] = relative_difference(logits_of(saved.float(), batch), expected)
    for what, value in agreement.items():
        limit = TOLERANCES[torch.float32 if what == "merged" else dtype]
        if not value <= limit:
            raise ModelError(
                f"The logits on {SAMPLES} pictures of the {what} model differ by {value:.3g} of their size from those of the trained one; "
                f"{str(dtype)[6:]} allows {limit:g}. Nothing was written."
            )
    kept = _check_untouched(source, saved, dtype)
    said = ", ".join(f"{what} {value:.1e}" for what, value in agreement.items())
    echo(f"logits on {SAMPLES} pictures agree: {said} (at most {TOLERANCES[dtype]:g} in {str(dtype)[6:]})")
    if kept is not None:
        echo(
            f"{kept['identical']:,} parameters that were not trained are the base's bit for bit, {kept['vision']:,} of them of vision"
        )
    return {
        "merged": source.adapter, "adapter": False, "dtype": str(dtype)[6:], "parameters": len(names),
        "agreement": agreement, "tolerance": TOLERANCES[dtype], "untouched": kept,
    }  # fmt: skip


def _load(source: Source, batch: Mapping[str, Any]) -> tuple[Any, dict[str, float]]:
    """The trained model in fp32, an adapter merged into it; and how much merging changed the logits."""
    from transformers import AutoModelForImageTextToText

    if not source.adapter:
        return AutoModelForImageTextToText.from_pretrained(source.checkpoint, dtype=torch.float32).eval(), {}
    from peft import PeftModel

    base = AutoModelForImageTextToText.from_pretrained(source.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(source.checkpoint)).eval()
    before = logits_of(adapted, batch)
    merged = adapted.merge_and_unload().eval()
    return merged, {"merged": relative_difference(logits_of(merged, batch), before)}


def _plain_load(folder: Path) -> tuple[Any, str]:
    """A folder as transformers alone loads it; and what it missed or did not expect, or ""."""
    from transformers import AutoModelForImageTextToText

    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    said = [
        f"{key.replace('_', ' ')} {sorted(map(str, info[key]))[:5]}"
        for key in ("missing_keys", "unexpected_keys")
        if info[key]
    ]
    return model.eval(), "; ".join(said)


def _check_untouched(source: Source, saved: Any, dtype: torch.dtype) -> dict[str, int] | None:
    """Every parameter that was not to be trained is that of the start, bit for bit. Raises ModelError; None where no start is known."""
    if not source.start:
        return None
    base = load_model(source.start, dtype=torch.bfloat16 if source.half else torch.float32)
    trained = _trained_names(source, base)
    theirs, identical, vision = dict(saved.named_parameters()), 0, 0
    lost, changed = [], []
    family = find_family(base)
    for name, parameter in base.named_parameters():
        if name not in theirs:
            lost.append(name)
        elif name not in trained:
            same = torch.equal(parameter.detach().to(dtype).float(), theirs[name].detach().float())
            identical += same
            vision += same and part_of(name, family) in ("vision", "merger")
            changed += [] if same else [name]
    if lost or changed:
        what = f"lost {', '.join(lost[:5])}" if lost else f"changed {', '.join(changed[:5])}, which were not trained"
        raise ModelError(f"The written model has {what} ({len(lost) + len(changed)} parameters). Nothing was kept.")
    return {"identical": identical, "vision": vision}


def _trained_names(source: Source, base: Any) -> set[str]:
    """Names of the base's parameters that training may have changed."""
    names = [name for name, _ in base.named_parameters()]
    if source.adapter:
        from safetensors import safe_open

        with safe_open(source.checkpoint / ADAPTER_FILES[1], "pt") as file:
            keys = [key.removeprefix("base_model.model.") for key in file.keys()]  # noqa: SIM118  # not a dict
        layers = {key.split(".lora_")[0] for key in keys if ".lora_" in key}
        whole = {key for key in keys if ".lora_" not in key}
        return {name for name in names if name in whole or name.rpartition(".")[0] in layers}
    plan = _read(source.run / "parts.json") if source.run else {}
    rows = plan.get("parts")
    family = find_family(base)
    return {name for name in names if rows is None or rows.get(part_of(name, family), {}).get("trainable")}


def picture_batch(processor: Any, count: int = SAMPLES) -> dict[str, Any]:
    """Drawn pictures with questions and answers, as a model is given them."""
    from vlm_dft.recipes import load_recipe, read_recipe

    rows = load_recipe(read_recipe("drawn"), None, limit=count)[0]
    examples = [
        Example(
            [
                {"role": "user", "content": [*({"type": "image"} for _ in row.images), {"type": "text", "text": "What do you see?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Two red bars: 12."}]},
            ],
            images=row.images,
        )
        for row in rows
    ]  # fmt: skip
    batch: dict[str, Any] = ChatCollator(processor)(examples)
    return {key: value for key, value in batch.items() if key != "labels"}


@torch.no_grad()
def logits_of(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """[n, V] logits in fp32 of all tokens that are not padding."""
    inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    found: Tensor = model(**inputs).logits.float()
    return found[inputs["attention_mask"].bool()].cpu()


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Size of the difference over the size of what is expected, both without each row's mean, which changes no probability."""
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


def _stored_dtype(name: str) -> torch.dtype:
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(name), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _start_of(run: Path | None) -> tuple[str, str]:
    """(the model that a run was trained from, its precision), where its folder or the one above says so; "" where not."""
    import yaml

    for folder in (run, run.parent) if run else ():
        if (folder / "config.yaml").is_file():
            found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) or {}
            if found.get("model"):
                return resolve_model(str(found["model"])), str(found.get("precision", "auto"))
    return "", ""


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


@contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is renamed to it when all went well, and removed when not."""
    out = out.absolute()
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes for the owner alone
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        os.rename(folder, out)  # over an empty folder, or none; never over a full one
    finally:
        shutil.rmtree(folder, ignore_errors=True)
