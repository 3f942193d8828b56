"""Generation: a model, a processor and Samples in, predictions.jsonl out; batched, greedy or drawn, resumable."""

from __future__ import annotations

import gc
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_dft.bars import Bar
from vlm_dft.chat import Sample
from vlm_dft.collators import ChatCollator
from vlm_dft.decoding import GREEDY, Decoding
from vlm_dft.errors import ImageError, ModelError
from vlm_dft.fingerprints import digest, fingerprint, settings_of
from vlm_dft.media import image_size
from vlm_dft.prediction_file import ALONE, PredictionFile, Share, longest, row_of

PIXELS_PER_TOKEN = 784  # 28 x 28; only to order prompts by length, where the processor does not tell
CHARACTERS_PER_TOKEN = 3
AHEAD = 2  # batches whose pictures are read and processed while the model answers another
SMALL = (
    20_000_000  # parameters; below, threads wait for each other longer than they work (19 s against 1 s on busy cores)
)
NO_ROOM = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # as CUDA, the CPU and cuBLAS say it

Place = tuple[int, int]  # of a response: the sample's, and the draw
Batch = Sequence[Place]
Say = Callable[[str], Any]


@dataclass(slots=True)
class Asked:
    """Prompts to be answered, and how. limit: most tokens of a response. together: see `answers`."""

    model: Any
    collator: ChatCollator
    samples: Sequence[Sample]
    decoding: Decoding
    limit: int
    together: bool = False
    prompts: Sequence[str] = ()  # the texts, before their media are opened
    costs: Sequence[float] = ()  # of each sample's prompt, in tokens, roughly
    room: float = float("inf")  # rows x tokens that fit, as far as running out of memory has told
    halved: int = 0  # batches that did not fit
    say: Say = lambda text: None
    lock: Any = field(default_factory=threading.Lock)  # held around the tokenizer: its backend is one for all threads

    def size(self, batch: Batch) -> float:
        """Rows x tokens of a batch, padding and responses included."""
        return len(batch) * (max(self.costs[k] for k, _ in batch) + self.limit)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        with self.lock:
            return self.collator.prompts([self.samples[k] for k, _ in batch])


def generate(
    model: Any, collator: ChatCollator, samples: Sequence[Sample], path: Path, *, model_name: str = "",
    decoding: Decoding = GREEDY, max_new_tokens: int | None = None, batch_size: int = 32, settings: Mapping[str, Any] | None = None,
    share: Share = ALONE, title: str = "generating", show: bool = True, say: Say = lambda text: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Answer every sample, asked as the collator trains it, and write its rows to `path`, in the samples' order. Returns the rows.

    Rows are appended as batches finish; a run that was killed goes on where it stopped. What decides the responses
    (weights, prompts, pictures, decoding, length, and the `settings` given) is kept in predictions.meta.json beside
    `path`, and a change of it is refused. A batch that does not fit into memory is halved, and so are its like.
    max_new_tokens: default the benchmark card's. batch_size: prompts at once; batches are the same in every run.
    share: with several processes each answers its share of the batches; the first returns all rows, the others none.
    """
    asked = _asked(model, collator, samples, decoding, max_new_tokens, say=say)
    found = {"engine": "transformers", **(settings or {}), **_settings(asked)}
    order = [(samples[k].id, draw) for k, draw in decoding.draws(len(samples))]
    how = {"batch_size": batch_size, "processes": share.world}
    with PredictionFile(path, found, order, model=model_name, how=how, share=share) as file:
        mine = _batches(asked, batch_size)[share.rank :: share.world]
        missing = set(file.missing)
        unfinished = [batch for batch in mine if any((samples[k].id, draw) in missing for k, draw in batch)]
        with Bar(sum(map(len, mine)), title if show else None, unit="response") as bar:
            bar.update(sum(map(len, mine)) - sum(map(len, unfinished)))
            with closing(_answered(asked, unfinished)) as answered:
                for batch, rows in answered:
                    file.add(rows)
                    bar.update(len(batch))
        file.how["halved_batches"] = file.how.get("halved_batches", 0) + share.total(asked.halved)
        return file.finish()


def answers(
    model: Any,
    collator: ChatCollator,
    samples: Sequence[Sample],
    *,
    decoding: Decoding = GREEDY,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    together: bool = False,
    on_batch: Callable[[int], Any] = lambda done: None,
) -> list[dict[str, Any]]:
    """The rows that `generate` would write, for a model in memory, in their order; nothing is written.

    together: every process answers the same samples, since their engine gathers the weights of a layer when all ask for it.
    on_batch: called with the number of responses that are there.
    """
    if not samples:
        return []
    asked = _asked(model, collator, samples, decoding, max_new_tokens, together=together)
    found: dict[Place, dict[str, Any]] = {}
    with closing(_answered(asked, _batches(asked, batch_size))) as answered:
        for batch, rows in answered:
            found |= dict(zip(batch, rows, strict=True))
            on_batch(len(found))
    return [found[place] for place in decoding.draws(len(samples))]


def _asked(
    model: Any, collator: ChatCollator, samples: Sequence[Sample], decoding: Decoding, limit: int | None, **more: Any
) -> Asked:
    prompts = [collator.prompt_text(sample) for sample in samples]
    costs = [_cost(collator, sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)]
    limit = limit or longest(samples)
    return Asked(model, collator, samples, decoding, limit, prompts=prompts, costs=costs, **more)


def _settings(asked: Asked) -> dict[str, Any]:
    """What decides the responses."""
    collator, images = asked.collator, getattr(asked.collator.processor, "image_processor", None)
    return {
        **settings_of(asked.samples, asked.decoding, asked.limit),
        "weights": fingerprint(asked.model),
        "dtype": str(asked.model.dtype).removeprefix("torch."),
        "prompts": digest(asked.prompts),
        "pixels": {**dict(getattr(images, "size", None) or {}), "resize": collator.processing.resize},
    }


def _batches(asked: Asked, size: int) -> list[Batch]:
    """Places of responses, longest prompts first, cut into batches of all of them: a resumed run makes the same ones."""
    order = sorted(asked.decoding.draws(len(asked.samples)), key=lambda place: (-asked.costs[place[0]], place))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _answered(asked: Asked, batches: Sequence[Batch]) -> Generator[tuple[Batch, list[dict[str, Any]]]]:
    """(places, their rows), a batch at a time, or parts of it where it does not fit."""
    with _few_threads(asked.model):
        for batch, inputs in _prefetched(asked.inputs, batches):
            parts: deque[tuple[Batch, dict[str, Any] | None]] = deque([(batch, inputs)])
            del inputs  # only `parts` holds them, so that a batch that does not fit is let go of
            while parts:
                part, ready = parts.popleft()
                if len(part) > 1 and asked.size(part) > asked.room:
                    parts.extendleft(reversed([(half, None) for half in _halves(part)]))
                    continue
                rows = _answer_if_it_fits(asked, part, ready if ready is not None else asked.inputs(part))
                if rows is not None:
                    yield part, rows
                    continue
                ready = None
                _make_room(asked, part)
                parts.extendleft(reversed([(half, None) for half in _halves(part)]))


def _halves(batch: Batch) -> list[Batch]:
    middle = (len(batch) + 1) // 2
    return [batch[:middle], batch[middle:]]


def _make_room(asked: Asked, batch: Batch) -> None:
    """Note that a batch did not fit. Raises ModelError for a single prompt."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    if len(batch) == 1:
        sample = asked.samples[batch[0][0]]
        raise ModelError(
            f"{sample.benchmark} {sample.split} {sample.id}: memory does not suffice for this prompt alone (about "
            f"{asked.costs[batch[0][0]]:.0f} tokens and up to {asked.limit} of a response). Lower max_pixels or max_new_tokens, or "
            "free memory: is something else on this device?"
        )
    if not asked.halved:
        asked.say(
            f"memory does not suffice for a batch of {len(batch)}: batches as large are halved, the rows stay the same"
        )
    asked.halved += 1
    asked.room = asked.size(batch) * 0.51


def _answer_if_it_fits(asked: Asked, batch: Batch, inputs: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of a batch; None where memory ran out. What the failed pass held is let go of with the error."""
    try:
        return _answer(asked, batch, inputs)
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU's is a plain one
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(said in str(error) for said in NO_ROOM)
        if not short or asked.together:  # together, the other processes would wait for this one
            raise
        return None


def _prefetched(
    work: Callable[[Batch], dict[str, Any]], batches: Sequence[Batch]
) -> Iterator[tuple[Batch, dict[str, Any]]]:
    """(batch, work(batch)) in order, up to AHEAD of them made by a thread while the caller is busy with one.

    A thread, not processes: decoding and resizing let other threads run, and a batch of pictures need not pass through a
    container's small shared memory. One, since a tokenizer is not for several at a time.
    """
    if len(batches) < 2:
        yield from ((batch, work(batch)) for batch in batches)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, "pictures", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting: deque[tuple[Batch, Future[dict[str, Any]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(work, batch)))
            if len(waiting) > AHEAD:
                first, made = waiting.popleft()
                ready = made.result()
                torch.set_num_threads(threads)  # for threads that begin later, whom the pool's 1 would reach
                yield first, ready
        while waiting:
            first, made = waiting.popleft()
            yield first, made.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


@torch.no_grad()  # not inference_mode: an engine that gathers weights in it could not train with them afterwards
def _answer(asked: Asked, batch: Batch, inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a batch, by the library's generate."""
    from transformers import GenerationConfig

    model, processor = asked.model, asked.collator.processor
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
    moved = {k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in moved.items()}
    ends = end_ids(model, processor)
    plain = GenerationConfig(  # every value set: an absent one would be taken from the model's own, which samples
        max_new_tokens=asked.limit, do_sample=False, num_beams=1, repetition_penalty=1.0, temperature=1.0, top_p=1.0,
        top_k=50, eos_token_id=ends, pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    width, drawn = moved["input_ids"].shape[1], _drawn(asked, batch, moved["input_ids"])
    was_training = model.training
    model.eval()
    try:
        output = model.generate(**moved, generation_config=plain, synced_gpus=asked.together, **drawn)
    finally:
        model.train(was_training)
    with asked.lock:
        said = [_read_answer(ids, ends, processor) for ids in output[:, width:].tolist()]
    return [row_of(asked.samples[k], draw, answer) for (k, draw), answer in zip(batch, said, strict=True)]


def _drawn(asked: Asked, batch: Batch, input_ids: Tensor) -> dict[str, Any]:
    """What generate needs to draw; nothing where it is greedy."""
    if asked.decoding.greedy:
        return {}
    from vlm_dft.drawing import SeededDraws

    numbers = asked.decoding.uniforms([(asked.samples[k].id, draw) for k, draw in batch], asked.limit)
    uniforms = torch.from_numpy(numbers).to(input_ids.device)
    draws = SeededDraws(
        uniforms, input_ids.shape[1], temperature=asked.decoding.temperature, top_p=asked.decoding.top_p
    )
    return {"logits_processor": [draws]}


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


def _cost(collator: ChatCollator, sample: Sample, prompt: str) -> float:
    """Tokens of a prompt, roughly: of its pictures as the processor makes them where it says so, else by their areas."""
    return len(prompt) / CHARACTERS_PER_TOKEN + sum(_tokens(collator, image) for image in sample.images)


def _tokens(collator: ChatCollator, image: Any) -> float:
    """Tokens of a picture, from its file's header where it is a file."""
    try:
        size = image_size(image, access=collator.access)
        if collator.processing.fast is not None:
            return collator.processing.media_tokens([size], [{}])[0]
    except (ImageError, ValueError):
        return 0  # said when it is opened, with the sample's name
    return size[0] * size[1] / PIXELS_PER_TOKEN
