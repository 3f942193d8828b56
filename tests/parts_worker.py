"""Run by test_proof.py: loss_worker.py's cases with parts, rates of their own, the proof by gradients, and mistakes made on purpose.

Words: a folder with groups.json, as loss_worker.py takes it. A case has also: parts ({"whole": [...]} and/or
{"lora": [...]}), rates ({part: [learning rate, weight decay]}) and mistake ("unfrozen", "detached").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loss_worker
import torch
from transformers import set_seed

from vlm_dft.adapters import add_lora
from vlm_dft.chat import Example
from vlm_dft.errors import ModelError
from vlm_dft.families import PARTS, find_family
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model
from vlm_dft.parts import Parts, freeze_parts, parts_of
from vlm_dft.proof import GradientProof
from vlm_dft.trainer import DFTTrainer

loss_worker.CASE |= {"parts": {"whole": list(PARTS)}, "rates": {}, "mistake": None, "model": "untied", "steps": 2}
loss_worker.CASE |= {"dtype": "float32", "decay": 0.0}
one_run, all_rows = loss_worker.train, loss_worker.rows_of
now: dict[str, Any] = {}


def model_of(case: dict[str, Any], folder: Path) -> Any:
    name = case["model"] if case["model"] == "tiny" else str(folder / case["model"])
    model = attach_loss(load_model(name, dtype=getattr(torch, case["dtype"])))
    whole, adapted = (case["parts"].get(key, []) for key in ("whole", "lora"))
    family = find_family(model)
    whole = [part for part in whole if part in parts_of(model, family)]
    if adapted:
        set_seed(1)
        model = add_lora(model, 4, parts=adapted, whole=whole)
    else:
        freeze_parts(model, set(whole))
    rates = {part: case["rates"].get(part, [case["learning_rate"], case["decay"]]) for part in PARTS}
    now["parts"] = Parts(
        family, tuple(whole), model.adapters if adapted else None, {part: rates[part][0] for part in PARTS},
        {part: rates[part][1] for part in PARTS},
    )  # fmt: skip
    visual = model.get_base_model().model.visual if adapted else model.model.visual
    if case["mistake"] == "unfrozen":
        visual.blocks[1].norm1.weight.requires_grad_(True)
    if case["mistake"] == "detached":
        visual.merger.register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_(output.requires_grad)
        )
    return model


def trainer_of(*arguments: Any, **words: Any) -> DFTTrainer:
    arguments[1].weight_decay = now["case"]["decay"]
    now["proof"] = GradientProof(now["parts"])
    return DFTTrainer(*arguments, parts=now["parts"], proof=now["proof"], **words)


def train(engine: str, case: dict[str, Any], *more: Any) -> dict[str, Any]:
    now["case"] = case
    try:
        found = one_run(engine, case, *more)
    except ModelError as error:
        return {"refused": str(error)}
    return {**found, "proved": now["proof"].found}


def rows_of(examples: list[Example]) -> dict[str, list[Example]]:
    """Those of loss_worker.py, "late", whose first step has no picture, and "mute", whose first step has no target."""
    found = all_rows(examples)
    words = [
        Example([{"role": "user", "content": "Well?"}, {"role": "assistant", "content": f"{k} bars"}]) for k in range(8)
    ]
    return {**found, "late": [*words, *examples[8:]], "mute": [*found["silent"][4:12], *examples[8:]]}


loss_worker.model_of, loss_worker.DFTTrainer = model_of, trainer_of  # type: ignore[assignment, misc]
loss_worker.train, loss_worker.rows_of = train, rows_of

if __name__ == "__main__":
    loss_worker.main()
