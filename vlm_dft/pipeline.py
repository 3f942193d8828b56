"""The front door: a plan in; data measured, prior gauged, models trained and evaluated, a reported run folder out."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from vlm_dft.as_trained import system_of, with_system
from vlm_dft.benchmarks import load_benchmark
from vlm_dft.cards import nearest
from vlm_dft.chat import Example, Sample
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError
from vlm_dft.evaluating import load_for_answers
from vlm_dft.explain import mask_report
from vlm_dft.finishing import read_finished
from vlm_dft.gathering import Gathered, gather, say_account
from vlm_dft.generation import generate
from vlm_dft.kinds import MEANING
from vlm_dft.loss_head import attach_loss
from vlm_dft.metrics import summarise
from vlm_dft.mixed import places_by_source
from vlm_dft.mixture_cards import entry_objectives, sources_in
from vlm_dft.model_card import write_card
from vlm_dft.models import device_kind, load_model, load_processor
from vlm_dft.predictions import score_predictions
from vlm_dft.preflight import Plan
from vlm_dft.probing import gauge
from vlm_dft.progress import read_metrics
from vlm_dft.recipes import said_format, said_source
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
    gathered = gather_for(config, plan.recipe, processor, echo)
    examples = gathered.examples
    check_sources(config, plan.recipe, examples)
    prior: dict[str, Any] = {}
    if first:
        _check_same_data(output, gathered.fingerprint)
        masks, prior = _kept_look(output) or _look_before(config, processor, examples, echo)
        write_provenance(output, config)  # now that the data are known to be good: a failed start claims nothing
        for kind, card in (("recipe", plan.recipe), ("benchmark", plan.benchmark)):
            if card is not None:
                write_text(output / f"{kind}.yaml", yaml.safe_dump(card, sort_keys=False))
        write_json(output / "accounting.json", gathered.accounting)
        write_json(output / "mask_report.json", masks)
        write_json(output / "prior.json", prior)
    trained = {}
    for objective in config.objective:
        echo(f"[3/4] training: {objective}, {config.steps(len(examples))} steps of {config.batch_size} examples")
        at = time.monotonic()
        checkpoint = train_objective(
            config, objective, examples, plan.folder(objective), lengths=gathered.lengths, echo=echo if first else None
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
    report = _evaluate_all(plan, prior, trained, gathered.accounting, echo)
    for objective in config.objective:
        write_card(plan.folder(objective), plan.folder(objective))
    _show(report, output, echo)
    echo(f"done in {time.monotonic() - started:.0f} s")
    return report


def read_parts(folder: Path) -> dict[str, Any]:
    """{"parts": what parts.json says of each part} of a trained objective's folder."""
    file = folder / "parts.json"
    return {"parts": json.loads(file.read_text(encoding="utf-8"))["parts"]} if file.is_file() else {}


def gather_for(config: TrainConfig, card: Mapping[str, Any], processor: Any, echo: Echo) -> Gathered:
    """What a config trains on, how it is read and its account said."""
    for one in sources_in(card, config.data):
        echo(f"      {one.name}: {said_source(one.card, one.data)}; format {said_format(one.card, one.data)}")
    gathered = gather(
        card, config.data, make_collator(processor, config), seed=config.seed, echo=echo, **config.rows
    )  # fmt: skip
    say_account(gathered.accounting, echo)
    return gathered


def check_sources(config: TrainConfig, card: Mapping[str, Any], examples: Sequence[Example]) -> None:
    """Refuse an objective for a source that no row is of, or that has another: it would not be trained so. Raises ConfigError."""
    known, own = places_by_source(examples), entry_objectives(card)
    for source, objective in config.collator.get("source_objectives", {}).items():
        if source in own and own[source] != objective:
            raise ConfigError(
                f"source_objectives trains {source!r} with {objective}, the mixture's card with {own[source]}. Take it out of one of them."
            )
        if source not in known:
            raise ConfigError(
                f"source_objectives names {source!r}, but no row is of that source.{nearest(source, known)} Sources: "
                f"{', '.join(known)}."
            )


def _check_same_data(output: Path, now: str) -> None:
    """Refuse to continue a run on other data than it was begun with."""
    before = output / "accounting.json"
    if begun(output) and before.is_file():
        said = json.loads(before.read_text(encoding="utf-8"))
        found = (said.get("total") or said["sources"][0])["fingerprint"]  # the latter in folders of earlier versions
        if found != now:
            raise ConfigError(
                f"OUTPUT {str(output)!r} was begun on other rows (fingerprint {found[:12]}, now {now[:12]}): "
                "the recipe or its files have changed. Choose another OUTPUT=, or remove that folder."
            )


def _kept_look(output: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What was found before a run's first step, if it goes on: masks and prior."""
    files = [output / name for name in ("mask_report.json", "prior.json")]
    if not (begun(output) and all(file.is_file() for file in files)):
        return None
    masks, prior = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return masks, prior


def _look_before(
    config: TrainConfig, processor: Any, examples: Sequence[Example], echo: Echo
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Spell out the first masks, and gauge the model's prior on the responses before it is trained on them."""
    masks = mask_report([make_collator(processor, config, packing=False).explain(e) for e in examples[:SHOWN_MASKS]])
    count = sum(min(GAUGE_EXAMPLES, len(places)) for places in places_by_source(examples).values())
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
    by_source = places_by_source(examples)
    chosen = [
        places[k * len(places) // n]
        for places in by_source.values()
        for n in [min(count, len(places))]
        for k in range(n)
    ]
    collator = make_collator(processor, config, packing=False, tag_sources=list(by_source))
    size = max(config.micro_batch, 8)
    model = attach_loss(load_model(config.model)).to(device_kind())
    batches = (collator([examples[j] for j in chosen[k : k + size]]) for k in range(0, len(chosen), size))
    found = gauge(model, batches, sources=list(by_source), blank=True)
    del model
    gc.collect()
    return found


def _evaluate_all(
    plan: Plan, prior: dict[str, Any], trained: dict[str, Any], accounting: Mapping[str, Any], echo: Echo
) -> dict[str, Any]:
    config, output = plan.config, plan.output
    runs: dict[str, Any] = {}
    splits: dict[str, list[Sample]] = {}
    if plan.benchmark is None:
        echo("[4/4] no evaluation: the recipe names no benchmark (BENCHMARK= chooses one)")
    else:
        name = str(plan.benchmark["name"])
        system = system_of(plan.recipe, config.data)
        splits = with_system(load_benchmark(str(config.benchmark), config.data, limit=config.eval_limit), system)
        echo(f"[4/4] evaluation: {name}, {sum(map(len, splits.values())):,} samples per model")
        processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
        collator = make_collator(processor, config, packing=False)
        models = {"base": config.model, **{o: trained[o]["checkpoint"] for o in trained}}
        for run_name, model in models.items():
            folder = output / "base" if run_name == "base" else plan.folder(run_name)
            folder.mkdir(exist_ok=True)
            loaded = load_for_answers(model)
            runs[run_name] = _predict_and_score(loaded, collator, model, splits, folder, run_name, echo)
            del loaded
            gc.collect()
    return write_report(
        output,
        runs=runs,
        training={o: {**row, "metrics": read_metrics(plan.folder(o) / "metrics.jsonl")} for o, row in trained.items()},
        gauge=prior,
        recipe=plan.recipe,
        config=config.as_dict(),
        accounting=accounting,
        samples=splits,
        folders={"base": output / "base", **{o: plan.folder(o) for o in trained}},
        watched={o: plan.folder(o) for o in trained},
    )


def probe(config: TrainConfig, card: Mapping[str, Any], *, count: int, echo: Echo) -> dict[str, Any]:
    """Gauge a model on a recipe without training it: probing.gauge's findings, and how many rows they are from."""
    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    gathered = gather_for(config, card, processor, echo)
    found = gauge_examples(config, processor, gathered.examples, count)
    return {"recipe": config.recipe, "model": config.model, "accounting": gathered.accounting, **found}


def _predict_and_score(
    model: Any, collator: ChatCollator, name: str, splits: dict[str, list[Sample]], folder: Path, title: str, echo: Echo
) -> dict[str, Any]:
    samples = [sample for split in splits.values() for sample in split]
    predictions = folder / "predictions.jsonl"
    generate(model, collator, samples, predictions, model_name=name, title=title, say=echo)
    return summarise(score_predictions(samples, predictions, folder / "scores.jsonl"))


def _show(report: dict[str, Any], output: Path, echo: Echo) -> None:
    if report.get("runs"):
        echo(report_table(report))
    for objective, row in report["training"].items():
        echo(f"checkpoint ({objective}): {row['checkpoint']}")
    echo(f"report: {output / 'report.json'}\n        {output / 'report.html'}")
