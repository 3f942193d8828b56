"""The front door: a plan in; data measured, prior gauged, models trained and evaluated, a reported run folder out."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from vlm_dft.bars import Bar
from vlm_dft.benchmarks import load_benchmark, score_predictions
from vlm_dft.cards import nearest
from vlm_dft.chat import Example, Sample
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError, RowError
from vlm_dft.explain import mask_report
from vlm_dft.finishing import read_finished
from vlm_dft.fitting import fit
from vlm_dft.generation import generate
from vlm_dft.kinds import MEANING
from vlm_dft.loss_head import attach_loss
from vlm_dft.metrics import summarise
from vlm_dft.model_card import write_card
from vlm_dft.models import device_kind, load_model, load_processor
from vlm_dft.preflight import Plan
from vlm_dft.probing import gauge
from vlm_dft.progress import read_metrics
from vlm_dft.recipes import Accounting, load_recipe
from vlm_dft.reporting import report_table, write_report
from vlm_dft.runs import begun, hold, write_json, write_provenance, write_text
from vlm_dft.training import leave_engines, make_collator, train_objective

Echo = Callable[[Any], None]
GAUGE_EXAMPLES = 256  # spread evenly over the training set: the standard error of mean p is then about 0.005
SHOWN_MASKS = 8  # samples whose masks mask_report.json spells out


def run(plan: Plan, *, echo: Echo) -> dict[str, Any]:
    """Everything the front door does. Returns the report; a finished run is only shown again."""
    output = plan.output
    if (output / "report.json").is_file():
        report: dict[str, Any] = json.loads((output / "report.json").read_text(encoding="utf-8"))
        echo(f"{output} is finished. Its result (remove the folder, or set OUTPUT=, to run again):")
        _show(report, output, echo)
        return report
    first = int(os.environ.get("RANK", "0")) == 0
    with hold(output) if first else nullcontext():
        return _run(plan, first, echo)


def _run(plan: Plan, first: bool, echo: Echo) -> dict[str, Any]:
    config, output = plan.config, plan.output
    started = time.monotonic()
    echo(f"[1/4] data: {config.recipe}, {plan.recipe['description'].strip()}")
    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    examples, account = load_recipe(plan.recipe, config.data, limit=config.limit)
    examples = keep_fitting(examples, account, make_collator(processor, config))
    echo(f"      {_account_line(account)}")
    check_sources(config, examples)
    prior: dict[str, Any] = {}
    account.fingerprint = fingerprint(examples)
    if first:
        _check_same_data(output, account)
        masks, prior = _kept_look(output) or _look_before(config, processor, examples, echo)
        write_provenance(output, config)  # now that the data are known to be good: a failed start claims nothing
        for kind, card in (("recipe", plan.recipe), ("benchmark", plan.benchmark)):
            if card is not None:
                write_text(output / f"{kind}.yaml", yaml.safe_dump(card, sort_keys=False))
        write_json(output / "accounting.json", {"sources": [account.as_dict()]})
        write_json(output / "mask_report.json", masks)
        write_json(output / "prior.json", prior)
    trained = {}
    for objective in config.objective:
        echo(f"[3/4] training: {objective}, {config.steps(len(examples))} steps of {config.batch_size} examples")
        at = time.monotonic()
        checkpoint = train_objective(
            config, objective, examples, plan.folder(objective), lengths=account.lengths, echo=echo if first else None
        )
        finished = (read_finished(plan.folder(objective)) or {}) if first else {}
        trained[objective] = {
            **finished,
            "checkpoint": str(checkpoint),
            "seconds": round(time.monotonic() - at, 1),
            **read_parts(plan.folder(objective)),
        }
    leave_engines()
    if not first:
        return {}
    report = _evaluate_all(plan, prior, trained, account, echo)
    for objective in config.objective:
        write_card(plan.folder(objective), plan.folder(objective))
    _show(report, output, echo)
    echo(f"done in {time.monotonic() - started:.0f} s")
    return report


def read_parts(folder: Path) -> dict[str, Any]:
    """{"parts": what parts.json says of each part} of a trained objective's folder."""
    file = folder / "parts.json"
    return {"parts": json.loads(file.read_text(encoding="utf-8"))["parts"]} if file.is_file() else {}


def check_sources(config: TrainConfig, examples: Sequence[Example]) -> None:
    """Refuse an objective for a source that no row is of: it would be trained otherwise in silence. Raises ConfigError."""
    known = dict.fromkeys(example.source for example in examples)
    for source in config.collator.get("source_objectives", {}):
        if source not in known:
            raise ConfigError(
                f"source_objectives names {source!r}, but no row is of that source.{nearest(source, known)} Sources: "
                f"{', '.join(known)}."
            )


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of what is trained on, in order: messages, tools, and media (files by their size in bytes)."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.source, example.messages, example.tools], default=str).encode())
        for source in (*example.images, *example.videos):
            digest.update(_identity(source))
    return digest.hexdigest()


def _identity(source: Any) -> bytes:
    """What tells a media source from another: a file's size, a text, bytes, a picture's pixels, each frame of a list."""
    if isinstance(source, (list, tuple)):
        return b"".join(map(_identity, source))
    if isinstance(source, (str, Path)) and os.path.isfile(source):
        return str(Path(source).stat().st_size).encode()
    if isinstance(source, Mapping):
        return _identity(source.get("bytes") or source.get("path"))
    pixels = getattr(source, "tobytes", None)
    return source if isinstance(source, bytes) else pixels() if callable(pixels) else str(source).encode()


def _check_same_data(output: Path, account: Accounting) -> None:
    """Refuse to continue a run on other data than it was begun with."""
    before = output / "accounting.json"
    if begun(output) and before.is_file():
        found = json.loads(before.read_text(encoding="utf-8"))["sources"][0]["fingerprint"]
        if found != account.fingerprint:
            raise ConfigError(
                f"OUTPUT {str(output)!r} was begun on other rows (fingerprint {found[:12]}, now {account.fingerprint[:12]}): "
                "the recipe or its files have changed. Choose another OUTPUT=, or remove that folder."
            )


def keep_fitting(examples: Sequence[Example], account: Accounting, collator: ChatCollator) -> list[Example]:
    """Measure every example, fit those over max_length by the collator's `too_long`, and account for all that was done."""
    kept, limit = [], collator.max_length or 0
    for example in _bar(examples, "measuring"):
        measured, fitted = collator.measure(example), example
        if limit and measured.tokens > limit:
            found, effect = fit(collator, example, f"{example.source} row {example.id}")
            if found is None:
                account.drop(effect.removeprefix("dropped: "), example.id)
                continue
            account.changed.setdefault(effect, []).append(example.id)
            measured, fitted = collator.measure(found), found
        cut = max(0, measured.tokens - limit) if limit else 0
        unlearnt = max(0, measured.ends - limit) if limit else 0
        account.used += 1
        account.sources[example.source] += 1
        account.notes.update(measured.notes)
        account.lengths.append(measured.tokens - cut)
        account.tokens.update(all=measured.tokens - cut, media=measured.media, response=measured.targets - unlearnt)
        kept.append(fitted)
    if not kept:
        raise RowError(f"All {account.read} rows of {account.source} are over max_length = {limit} tokens. Raise it.")
    return kept


def evaluate(
    benchmark: str, *, model: str, output: Path, data: str | None = None, limit: int | None = None,
    batch_size: int = 32, min_pixels: int | None = None, max_pixels: int | None = None, echo: Echo,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate one model: predictions.jsonl, scores.jsonl and results.json in `output`. Returns {split: metrics}."""
    splits = load_benchmark(benchmark, data, limit=limit)
    output.mkdir(parents=True, exist_ok=True)
    loaded = load_for_answers(model)
    collator = ChatCollator(load_processor(model, min_pixels=min_pixels, max_pixels=max_pixels))
    result = _predict_and_score(loaded, collator, model, splits, output, batch_size)
    write_json(output / "results.json", {"benchmark": benchmark, "model": model, "splits": result})
    echo(report_table({"runs": {Path(model).name: result}}))
    return result


def load_for_answers(name: str) -> Any:
    """A model to generate with: bf16 on a GPU, fp32 elsewhere."""
    gpu = device_kind() == "cuda"
    return load_model(name, dtype=torch.bfloat16 if gpu else torch.float32).to(device_kind())


def _kept_look(output: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What was found before a run's first step, if it goes on: masks and prior."""
    files = [output / name for name in ("mask_report.json", "prior.json")]
    if not (begun(output) and all(file.is_file() for file in files)):
        return None
    masks, prior = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return masks, prior


def _look_before(
    config: TrainConfig, processor: Any, examples: list[Example], echo: Echo
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Spell out the first masks, and gauge the model's prior on the responses before it is trained on them."""
    masks = mask_report([make_collator(processor, config, packing=False).explain(e) for e in examples[:SHOWN_MASKS]])
    sources = Counter(example.source for example in examples)
    count = sum(min(GAUGE_EXAMPLES, rows) for rows in sources.values())
    echo(f"[2/4] prior of {config.model} on {count} of the responses, before training")
    found = gauge_examples(config, processor, examples)
    echo(f"      mean p of {found['tokens']:,} response tokens {found['mean_p']:.3f} ± {found['stderr_p']:.3f}; "
         f"below 0.1: {found['share_p_below_0.1']:.0%}\n      {found['prediction']}")  # fmt: skip
    if found["full_weight"]:
        kinds = ", ".join(MEANING[kind] for kind in found["full_weight"])
        echo(
            f"      most {kinds} are below p = 0.1: full_weight={','.join(found['full_weight'])} keeps DFT from starving them"
        )
    if found["blank"] and not found["blank"]["looking"]:
        echo(
            f"      a blank picture changes mean p by {-found['blank']['gain']:+.3f}: this model hardly looks at the pictures"
        )
    return masks, found


def gauge_examples(
    config: TrainConfig, processor: Any, examples: Sequence[Example], count: int = GAUGE_EXAMPLES
) -> dict[str, Any]:
    """Gauge the model's prior on so many examples of each source, spread evenly over it, with their pictures and without."""
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    chosen = [
        rows[k * len(rows) // n] for rows in by_source.values() for n in [min(count, len(rows))] for k in range(n)
    ]
    collator = make_collator(processor, config, packing=False, tag_sources=list(by_source))
    size = max(config.micro_batch, 8)
    model = attach_loss(load_model(config.model)).to(device_kind())
    batches = (collator(chosen[k : k + size]) for k in range(0, len(chosen), size))
    found = gauge(model, batches, sources=list(by_source), blank=True)
    del model
    gc.collect()
    return found


def _evaluate_all(
    plan: Plan, prior: dict[str, Any], trained: dict[str, Any], account: Accounting, echo: Echo
) -> dict[str, Any]:
    config, output = plan.config, plan.output
    runs: dict[str, Any] = {}
    splits: dict[str, list[Sample]] = {}
    if plan.benchmark is None:
        echo("[4/4] no evaluation: the recipe names no benchmark (BENCHMARK= chooses one)")
    else:
        name = str(plan.benchmark["name"])
        splits = load_benchmark(str(config.benchmark), config.data, limit=config.eval_limit)
        echo(f"[4/4] evaluation: {name}, {sum(map(len, splits.values())):,} samples per model")
        processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        collator = make_collator(processor, config, packing=False)
        models = {"base": config.model, **{o: trained[o]["checkpoint"] for o in trained}}
        for run_name, model in models.items():
            folder = output / "base" if run_name == "base" else plan.folder(run_name)
            folder.mkdir(exist_ok=True)
            loaded = load_for_answers(model)
            runs[run_name] = _predict_and_score(loaded, collator, model, splits, folder, 32, title=run_name)
            del loaded
            gc.collect()
    return write_report(
        output,
        runs=runs,
        training={o: {**row, "metrics": read_metrics(plan.folder(o) / "metrics.jsonl")} for o, row in trained.items()},
        gauge=prior,
        recipe=plan.recipe,
        config=config.as_dict(),
        accounting=account.as_dict(),
        samples=splits,
        folders={"base": output / "base", **{o: plan.folder(o) for o in trained}},
        watched={o: plan.folder(o) for o in trained},
    )


def probe(config: TrainConfig, card: Mapping[str, Any], *, count: int, echo: Echo) -> dict[str, Any]:
    """Gauge a model on a recipe without training it: probing.gauge's findings, and how many rows they are from."""
    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    examples, account = load_recipe(card, config.data, limit=config.limit)
    examples = keep_fitting(examples, account, make_collator(processor, config))
    echo(_account_line(account))
    found = gauge_examples(config, processor, examples, count)
    return {"recipe": config.recipe, "model": config.model, "accounting": account.as_dict(), **found}


def _predict_and_score(
    model: Any,
    collator: ChatCollator,
    name: str,
    splits: dict[str, list[Sample]],
    folder: Path,
    batch_size: int,
    title: str = "model",
) -> dict[str, Any]:
    samples = [sample for split in splits.values() for sample in split]
    generate(
        model, collator, samples, folder / "predictions.jsonl", model_name=name, batch_size=batch_size, title=title
    )
    return summarise(score_predictions(samples, folder / "predictions.jsonl", folder / "scores.jsonl"))


def _show(report: dict[str, Any], output: Path, echo: Echo) -> None:
    if report.get("runs"):
        echo(report_table(report))
    for objective, row in report["training"].items():
        echo(f"checkpoint ({objective}): {row['checkpoint']}")
    echo(f"report: {output / 'report.json'}\n        {output / 'report.html'}")


def _account_line(account: Accounting) -> str:
    tokens = account.tokens
    dropped = "; ".join(f"{len(ids)} dropped, {reason}" for reason, ids in account.dropped.items()) or "none dropped"
    said = [f"{len(ids):,} rows: {effect}" for effect, ids in account.changed.items()]
    said += [f"{count:,} rows: {note}" for note, count in account.notes.items()]
    line = (
        f"{account.read:,} rows read, {account.used:,} used, {dropped}; {tokens['all']:,} tokens, {tokens['media']:,} of "
        f"images, {tokens['response']:,} of responses"
    )
    return "\n      ".join([line, *said])


def _bar(items: Sequence[Example], title: str) -> Iterable[Example]:
    with Bar(len(items), title if len(items) >= 1000 else None, "row") as bar:
        for item in items:
            yield item
            bar.update()
