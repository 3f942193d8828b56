"""One forward and backward pass on table pictures: CPU seconds and memory of every way of computing the loss, as JSON.

Run by train_step.py, with the Python of TRL's environment where there is one (TRL's own kernel is then one of the ways):
`python step_alone.py JOB.json`. Each measurement is in a process of its own, forked from the one that loaded the model.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loss import llama_factory, trl_kernel
from torch import Tensor
from train_peers import cpu, resident

from vlm_dft.chat import Example
from vlm_dft.collators import ChatCollator
from vlm_dft.embedding import give_in_place_gradient
from vlm_dft.loss_head import attach_loss, response_hidden
from vlm_dft.models import freeze_parts, load_model, load_processor
from vlm_dft.objectives import IGNORE
from vlm_dft.recompute import use_recompute
from vlm_dft.segment_attention import use_segment_attention
from vlm_dft.vision_attention import stop_window_attention, use_window_attention
from vlm_dft.vision_cache import KEYS, KeyedCollator, VisionCache

Batch = dict[str, Any]
Loss = Callable[[Any, Batch], Tensor]


def examples_of(rows: list[dict[str, str]]) -> list[Example]:
    """The job's rows as our examples."""
    found = []
    for row in rows:
        asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}
        said = {"role": "assistant", "content": row["response"]}
        found.append(Example([asked, said], images=[Path(row["image"])], source="tabmwp"))
    return found


def ours(model: Any, batch: Batch) -> Tensor:
    return model(**batch, objective="dft")["loss"]  # type: ignore[no-any-return]


def full_logits(model: Any, batch: Batch) -> Tensor:
    """Logits of every row; LLaMA-Factory's formula, the fastest of those in loss.py."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    return llama_factory(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def response_rows(model: Any, batch: Batch) -> Tensor:
    """Logits of response rows, and autograd."""
    labels = batch["labels"]
    hidden = response_hidden(model, labels, {key: value for key, value in batch.items() if key != "labels"})
    return llama_factory(model.lm_head(hidden), labels[:, 1:][labels[:, 1:] != IGNORE])


def trl_head(model: Any, batch: Batch) -> Tensor:
    """As TRL's SFTTrainer does off the GPU: its kernel on every row."""
    kernel, chunk = trl_kernel()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    mask = targets != IGNORE
    outputs = ("log_probs", "entropy", "is_top1")
    log_p = kernel.apply(hidden, model.lm_head.weight, None, targets.clamp(min=0), 1.0, chunk, None, 1.0, outputs)[0]
    log_p = log_p.masked_fill(~mask, 0)
    return (-log_p * log_p.exp().detach()).sum() / mask.sum()


LOSSES: dict[str, tuple[Loss, bool]] = {  # name -> loss, whether on packed rows
    "ours, packed": (ours, True),
    "ours, padded": (ours, False),
    "padded, response rows' logits": (response_rows, False),
    "padded, all logits": (full_logits, False),
    "padded, TRL's head": (trl_head, False),
}
CACHED = {"no cache": None, "a picture's first time": 0, "pictures known": 1}
RECOMPUTED = {"none": (), "vision": ("vision",), "language": ("language",), "both": ("vision", "language")}


def step(model: Any, batches: list[Batch], loss_of: Loss) -> dict[str, Any]:
    """CPU seconds of a pass over each batch, after one over the first that is not counted; peak memory over weights and kept gradients."""
    losses = []
    for k, batch in enumerate([batches[0], *batches]):
        if k == 1:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            state, start = resident("VmRSS"), cpu()
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
    return {"seconds": cpu() - start, "over": resident("VmHWM") - state, "loss": sum(losses[1:]) / len(batches)}


def cached(model: Any, batch: Batch, times: int | None) -> dict[str, float]:
    """CPU seconds of a pass with the tower frozen: without a cache (None), or with one that saw the batch so many times."""
    cache = None if times is None else VisionCache(1e9)
    for _ in range(2):  # libraries are warm
        for _ in range((times or 0) + 1):
            inputs, start = dict(batch), cpu()
            keys = inputs.pop(KEYS)
            if cache is not None:
                features = cache.features(model, keys, inputs.pop("pixel_values"), inputs["image_grid_thw"])
                inputs["mm_encoder_outputs"] = {"image": features}
            model.zero_grad()
            ours(model, inputs).backward()
            seconds = cpu() - start
        cache = None if cache is None else VisionCache(1e9)
    return {"seconds": seconds}


def tower(model: Any, grids: Tensor, patches: Tensor) -> dict[str, float]:
    """CPU seconds of the vision tower, forward and backward."""
    for repeat in range(2):
        start = cpu() if repeat else 0.0
        model.zero_grad()
        features = model.get_image_features(patches, grids, return_dict=True).pooler_output
        torch.cat(list(features)).square().mean().backward()
    return {"seconds": cpu() - start}


def apart(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, Any]:
    """The function's result, computed in a forked process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function(*args)))
    process.start()
    found = receiver.recv()
    process.join()
    return dict(found)


def prepared(folder: str, *, packed: bool, parts: tuple[str, ...] = ()) -> Any:
    model = attach_loss(load_model(folder))
    use_window_attention(model)
    if packed:
        use_segment_attention(model)
    use_recompute(model, parts)
    embedding = give_in_place_gradient(model.get_input_embeddings())
    model.get_output_embeddings().in_place = True
    if embedding is not None:
        embedding.in_place = True
    return model.train()


def stock(folder: str) -> Any:
    return attach_loss(load_model(folder)).train()  # its logits and hidden states are the model's own


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    began, processor, size = time.perf_counter(), load_processor(job["model"]), job["batch"]
    examples = examples_of(job["rows"])
    batches = {
        packed: [ChatCollator(processor, packing=packed)(examples[k : k + size]) for k in range(0, len(examples), size)]
        for packed in (False, True)
    }
    found: dict[str, Any] = {"rows": len(examples), "steps": {}, "recompute": {}, "cached": {}, "tower": {}}
    found["targets"] = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches[False])
    found["tokens"] = sum(int(batch["attention_mask"].sum()) for batch in batches[False])
    found["padded"] = sum(batch["input_ids"].numel() for batch in batches[False])
    models = {
        "packed": prepared(job["model"], packed=True),
        "padded": prepared(job["model"], packed=False),
        "stock": stock(job["model"]),
    }
    names = [name for name in LOSSES if job["trl"] or "TRL" not in name]
    for turn in range(job["rounds"]):
        for name in names[:: 1 if turn % 2 else -1]:
            loss_of, packed = LOSSES[name]
            model = models["packed" if packed else "padded" if loss_of is ours else "stock"]
            found["steps"].setdefault(name, []).append(apart(step, model, batches[packed], loss_of))
    if job["parts"]:
        for name, parts in RECOMPUTED.items():
            use_recompute(models["packed"], parts)
            found["recompute"][name] = [
                apart(step, models["packed"], batches[True], ours) for _ in range(job["rounds"])
            ]
        frozen, keyed = (
            prepared(job["model"], packed=True),
            KeyedCollator(ChatCollator(processor, packing=True))(examples[:size]),
        )
        freeze_parts(frozen, {"language", "head"})
        for turn in range(job["rounds"]):
            for name, times in list(CACHED.items())[:: 1 if turn % 2 else -1]:
                found["cached"].setdefault(name, []).append(apart(cached, frozen, keyed, times))
        images = batches[False][0]["image_grid_thw"], batches[False][0]["pixel_values"]
        large = torch.tensor([[1, 74, 74]])
        pictures = {
            f"{job['batch']} table pictures": images,
            "one picture of 1024 x 1024": (large, torch.randn(74 * 74, 1176)),
        }
        for turn in range(job["rounds"]):
            for name, (grids, patches) in pictures.items():
                for way in ("window by window", "by length")[:: 1 if turn % 2 else -1]:
                    (stop_window_attention if way == "window by window" else use_window_attention)(models["padded"])
                    found["tower"].setdefault(f"{name}: {way}", []).append(
                        apart(tower, models["padded"], grids, patches)
                    )
    found["wall"] = time.perf_counter() - began
    Path(job["result"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
