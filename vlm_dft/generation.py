"""Generation: a model, a processor and Samples in, predictions.jsonl out; batched, greedy, resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_dft.bars import Bar
from vlm_dft.chat import Sample
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import ConfigError, ImageError
from vlm_dft.media import image_size
from vlm_dft.runs import write_json, write_text

PIXELS_PER_TOKEN = 784  # 28 x 28; only to order prompts by length
CHARACTERS_PER_TOKEN = 3
SMALL = (
    20_000_000  # parameters; below, threads wait for each other longer than they work (19 s against 1 s on busy cores)
)


def generate(
    model: Any,
    collator: ChatCollator,
    samples: Sequence[Sample],
    path: Path,
    *,
    model_name: str = "",
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    title: str = "generating",
    show: bool = True,
) -> list[dict[str, Any]]:
    """Answer every sample greedily, asked as the collator trains it, and write its row to `path`, in the samples' order. Returns the rows.

    Rows are appended as batches finish; a run that was killed goes on where it stopped. What decides the responses
    (model, benchmark, prompts, length) is kept in predictions.meta.json beside `path`, and a change of it is refused.
    max_new_tokens: default the benchmark card's. batch_size: prompts at once; batches are the same in every run.
    """
    limit = max_new_tokens or max(int(sample.record["max_new_tokens"]) for sample in samples)
    prompts = [collator.prompt_text(sample) for sample in samples]
    _check_settings(path, _settings(model, model_name, samples, prompts, limit))
    done = {row["id"]: row for row in _read_whole_rows(path)}
    with path.open("a", encoding="utf-8") as file:
        for batch in _batches(samples, prompts, batch_size, title if show else None):
            missing = [k for k in batch if samples[k].id not in done]
            if not missing:
                continue
            with _few_threads(model):
                answers = _answer(model, collator, [samples[k] for k in batch], limit)
            for k, answer in zip(batch, answers, strict=True):
                if k in missing:
                    row = done[samples[k].id] = _row(samples[k], answer)
                    file.write(_line(row))
            file.flush()
    rows = [done[sample.id] for sample in samples]
    write_text(path, "".join(map(_line, rows)))
    return rows


def answers(
    model: Any,
    collator: ChatCollator,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    together: bool = False,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> list[dict[str, Any]]:
    """The rows that `generate` would write, for a model in memory, in the samples' order; nothing is written.

    together: every process answers the same samples, since their engine gathers the weights of a layer when all ask for it.
    on_batch: called with the number of samples that are answered.
    """
    if not samples:
        return []
    limit = max_new_tokens or max(int(sample.record["max_new_tokens"]) for sample in samples)
    found: dict[int, dict[str, Any]] = {}
    for batch in _batches(samples, [collator.prompt_text(sample) for sample in samples], batch_size, None):
        with _few_threads(model):
            rows = _answer(model, collator, [samples[k] for k in batch], limit, together=together)
        found |= {k: _row(samples[k], row) for k, row in zip(batch, rows, strict=True)}
        on_batch(len(found))
    return [found[k] for k in range(len(samples))]


def _row(sample: Sample, answer: dict[str, Any]) -> dict[str, Any]:
    return {"id": sample.id, "benchmark": sample.benchmark, "split": sample.split, **answer}


@torch.no_grad()  # not inference_mode: an engine that gathers weights in it could not train with them afterwards
def _answer(
    model: Any, collator: ChatCollator, samples: Sequence[Sample], limit: int, *, together: bool = False
) -> list[dict[str, Any]]:
    from transformers import GenerationConfig

    processor, inputs = collator.processor, collator.prompts(samples)
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    moved = {k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in moved.items()}
    ends = end_ids(model, processor)
    greedy = GenerationConfig(  # every value set: an absent one would be taken from the model's own, which samples
        max_new_tokens=limit, do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0,
        top_k=50, eos_token_id=ends, pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    was_training = model.training
    model.eval()
    try:
        output = model.generate(**moved, generation_config=greedy, synced_gpus=together)
    finally:
        model.train(was_training)
    width = moved["input_ids"].shape[1]
    return [_read_answer(ids, ends, processor) for ids in output[:, width:].tolist()]


@contextmanager
def _few_threads(model: Any) -> Iterator[None]:
    """One thread for a small model on the CPU, images included; the number that was set before is put back."""
    threads = torch.get_num_threads()
    if next(model.parameters()).device.type == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def end_ids(model: Any, processor: Any) -> list[int]:
    """The ids that end a response: the model's own and its tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = [own] if isinstance(own, int) else list(own or [])
    return sorted({*found, processor.tokenizer.eos_token_id} - {None})


def _read_answer(ids: list[int], ends: Sequence[int], processor: Any) -> dict[str, Any]:
    """The response up to its end token, how it finished, and its length in tokens (the end token counted)."""
    stop = next((k for k, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[:stop]
    text = processor.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return {
        "response": text,
        "finish": "length" if stop is None else "stop",
        "tokens": len(ids) if stop is None else stop + 1,
    }


def _batches(samples: Sequence[Sample], prompts: Sequence[str], size: int, title: str | None) -> Iterator[list[int]]:
    """Indices of samples, longest prompts first, cut into batches of all samples: a resumed run makes the same ones."""
    order = sorted(range(len(samples)), key=lambda k: (-_cost(samples[k], prompts[k]), k))
    with Bar(len(samples), title) as bar:
        for start in range(0, len(order), size):
            yield order[start : start + size]
            bar.update(len(order[start : start + size]))


def _cost(sample: Sample, prompt: str) -> float:
    return len(prompt) / CHARACTERS_PER_TOKEN + sum(map(_pixels, sample.images)) / PIXELS_PER_TOKEN


def _pixels(image: Any) -> int:
    """The area of an image, from the file's header where it is a file."""
    try:
        height, width = image_size(image)
    except ImageError:
        return 0  # said when it is opened, with the sample's name
    return height * width


def _settings(model: Any, name: str, samples: Sequence[Sample], prompts: Sequence[str], limit: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for sample, prompt in zip(samples, prompts, strict=True):
        sizes = [
            Path(i).stat().st_size if isinstance(i, (str, Path)) and Path(i).is_file() else 0 for i in sample.images
        ]
        digest.update(json.dumps([sample.id, sample.split, prompt, sizes]).encode())
    return {
        "model": name,
        "weights": fingerprint(model),
        "benchmark": ", ".join(dict.fromkeys(sample.benchmark for sample in samples)),
        "samples": len(samples),
        "prompts": digest.hexdigest()[:16],
        "max_new_tokens": limit,
        "decoding": "greedy",
    }


def fingerprint(model: Any, per_tensor: int = 64) -> str:
    """A hash of some values of every parameter: tells two checkpoints apart without reading them whole."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // per_tensor)][:per_tensor].float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings beside `path`, or refuse to continue a file that was made with others."""
    meta = path.with_name(f"{path.stem}.meta.json")
    if path.is_file() and path.stat().st_size:
        if not meta.is_file():
            raise ConfigError(
                f"{path} has no {meta.name} beside it: not ours to continue. Remove it, or choose another folder."
            )
        before = json.loads(meta.read_text(encoding="utf-8"))
        changed = [key for key in settings if before.get(key) != settings[key] and key != "model"]
        if changed:
            differences = "; ".join(f"{key}: {before.get(key)!r} there, {settings[key]!r} now" for key in changed)
            raise ConfigError(
                f"{path} was made with other settings ({differences}). "
                "Remove it to start over, or choose another folder."
            )
    write_json(meta, settings)


def _read_whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an unfinished file; a last line that was cut off while being written is taken out of it."""
    if not path.is_file():
        return []
    from vlm_dft.predictions import read_jsonl

    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return read_jsonl(path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
