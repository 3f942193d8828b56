"""Evaluating: benchmarks and a model in; predictions, scores and results, a folder a benchmark, and one report out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from vlm_dft.as_trained import Asking, asking_of, with_system
from vlm_dft.benchmarks import load_benchmark, read_benchmark
from vlm_dft.chat import Sample
from vlm_dft.decoding import GREEDY, Decoding
from vlm_dft.errors import ConfigError
from vlm_dft.fingerprints import settings_of
from vlm_dft.locate import resolve_model
from vlm_dft.prediction_file import ALONE, HOW, Share, check_settings, longest, meta_of
from vlm_dft.predictions import score_predictions
from vlm_dft.runs import hold, write_json
from vlm_dft.serving import Server, ask_server, check_server

Echo = Callable[[Any], None]
Splits = dict[str, list[Sample]]
ENGINES = ("transformers", "openai")
PREDICTIONS, SCORES, RESULTS = "predictions.jsonl", "scores.jsonl", "results.json"


@dataclass(frozen=True, slots=True)
class EvalConfig:
    """One evaluation: what is asked, of whom, and how."""

    benchmarks: Sequence[str]
    "Cards in eval/, or .yaml files of one's own."
    model: str
    "'tiny', a checkpoint folder (LoRA too) or a hub id; with engine openai the name that the server knows."
    output: Path
    data: Mapping[str, str] = field(default_factory=dict)
    "{benchmark: the folder of its files}; under '' the folder of all that are not named."
    protocol: str = "official"
    "The prompts: official, or another that the card has."
    limit: int | None = None
    "Only the first samples of each split."
    engine: str = "transformers"
    base_url: str | None = None
    concurrency: int = 32
    "Requests at once, with engine openai."
    decoding: Decoding = GREEDY
    max_new_tokens: int | None = None
    "Most tokens of a response; None: the card's."
    batch_size: int = 32
    "Prompts answered at once; halved where memory does not suffice."
    min_pixels: int | None = None
    max_pixels: int | None = None
    as_trained: str | None = None
    "A run folder whose pixels, system prompt and template are used; None: the model's own run, where it has one."
    judge: Any = None
    "What decides where a benchmark's official protocol asks a language model; None: rules alone."

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, found {self.engine!r}.")
        for name in ("limit", "batch_size", "max_new_tokens", "concurrency", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}.")


@dataclass(frozen=True, slots=True)
class Prepared:
    """An evaluation whose cards, files, settings and folders were found to be good."""

    config: EvalConfig
    asking: Asking
    splits: dict[str, Splits]  # by the benchmark's name, as all that follows
    metrics: dict[str, Sequence[str]]  # names of its card's own metrics
    found: dict[str, dict[str, Any]]
    """{"sources": each split's layout, folder, rows, expected; "remarks": sentences}"""


def prepare(config: EvalConfig) -> Prepared:
    """Read all cards and rows, and check all that can be wrong before anything slow is loaded. Raises a UserError; no torch."""
    if config.engine == "openai":
        check_server(config.base_url)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "engine openai asks many things at once by itself: start one process (its server may have many)."
            )
    else:
        resolve_model(config.model)
    asking = asking_of(config.as_trained or config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    if config.as_trained and asking.run is None:
        raise ConfigError(
            f"--as-trained {config.as_trained!r}: no run's config.yaml there. Expected the folder of a training run."
        )
    cards = [read_benchmark(name) for name in config.benchmarks]  # every card before any row
    names = [str(card["name"]) for card in cards]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))}: named twice. Name each benchmark once.")
    if unknown := sorted(set(config.data) - {"", *names, *config.benchmarks}):
        raise ConfigError(
            f"--data names {unknown[0]!r}, which is not evaluated. Expected a folder, or NAME=FOLDER with NAME of {', '.join(names)}."
        )
    _check_output(config.output)
    splits, found = {}, {}
    for name, card in zip(names, config.benchmarks, strict=True):
        data = config.data.get(name, config.data.get(card, config.data.get("")))
        loaded = load_benchmark(card, data, config.limit, config.protocol)
        found[name] = {
            "sources": loaded.sources,
            "remarks": [*loaded.remarks, *_cut(name, loaded.sources, config.limit)],
        }
        splits[name] = with_system(loaded, asking.system)
        samples = _flat(splits[name])
        limit = config.max_new_tokens or longest(samples)
        known = {"engine": config.engine, **_settings(config), **settings_of(samples, config.decoding, limit)}
        check_settings(config.output / name / PREDICTIONS, known)
    _claim(config.output)  # last: what is refused leaves nothing behind
    metrics = {name: card.get("metrics") or () for name, card in zip(names, cards, strict=True)}
    return Prepared(config, asking, splits, metrics, found)


def evaluate(prepared: Prepared, *, echo: Echo) -> tuple[dict[str, Any], int]:
    """(the report, the number of responses that could not be had). Of several processes only the first has a report."""
    config = prepared.config
    share = _join() if config.engine == "transformers" else ALONE
    with hold(config.output) if share.rank == 0 else nullcontext():
        if said := prepared.asking.said():
            echo(said)
        if share.rank == 0:
            for remark in [remark for found in prepared.found.values() for remark in found["remarks"]]:
                echo(remark)
        answer, failed = _answerer(prepared, share, echo), 0
        for name, splits in prepared.splits.items():
            folder = config.output / name
            folder.mkdir(exist_ok=True)
            failures = answer(name, _flat(splits), folder / PREDICTIONS)
            failed += failures
            if share.rank:
                continue
            if failures:
                echo(
                    f"{name}: {failures:,} responses are missing, so it is not scored. The same command asks for them again; "
                    f"`vlm-dft score {folder} --benchmark {name} --allow-partial` scores what is there."
                )
                (folder / RESULTS).unlink(missing_ok=True)
            else:
                _score(prepared, name, folder, echo)
        share.wait()
        return (_report(prepared, echo), failed) if share.rank == 0 else ({}, 0)


def load_for_answers(name: str) -> Any:
    """A model to generate with: bf16 on a GPU, fp32 elsewhere; a LoRA checkpoint as its base with the adapters on it."""
    import torch

    from vlm_dft.models import device_kind, load_model
    from vlm_dft.vision_attention import use_window_attention

    gpu = device_kind() == "cuda"
    model = load_model(name, dtype=torch.bfloat16 if gpu else torch.float32, merge=False)
    use_window_attention(model)  # a vision tower that it does not fit stays as it is
    return model.to(device_kind())


def _answerer(prepared: Prepared, share: Share, echo: Echo) -> Callable[[str, list[Sample], Path], int]:
    """What answers samples into a file and returns the number of those it could not: one model for all benchmarks."""
    config, asking = prepared.config, prepared.asking
    words: dict[str, Any] = {
        "decoding": config.decoding, "max_new_tokens": config.max_new_tokens, "settings": _settings(config), "say": echo,
    }  # fmt: skip
    if config.engine == "openai":
        from vlm_dft.pictures import resizer

        server = Server(check_server(config.base_url), config.model, concurrency=config.concurrency)
        rule = resizer(asking, config.as_trained or config.model)

        def ask(name: str, samples: list[Sample], path: Path) -> int:
            return len(ask_server(server, samples, path, rule=rule, title=name, **words)[1])

        return ask
    from vlm_dft.collators import ChatCollator
    from vlm_dft.generation import generate
    from vlm_dft.models import load_processor

    processor = load_processor(config.model, min_pixels=asking.min_pixels, max_pixels=asking.max_pixels)
    collator = ChatCollator(
        processor, resize=asking.resize, template_options=asking.template_options  # type: ignore[arg-type]
    )  # fmt: skip
    model = load_for_answers(config.model)

    def answer(name: str, samples: list[Sample], path: Path) -> int:
        generate(
            model, collator, samples, path, model_name=config.model, batch_size=config.batch_size, share=share, title=name, **words
        )  # fmt: skip
        return 0

    return answer


def _score(prepared: Prepared, name: str, folder: Path, echo: Echo) -> None:
    """Score a benchmark's predictions and write its results.json."""
    from vlm_dft.metrics import summarise

    config, samples = prepared.config, _flat(prepared.splits[name])
    rows = score_predictions(samples, folder / PREDICTIONS, folder / SCORES, judge=config.judge)
    meta = json.loads(meta_of(folder / PREDICTIONS).read_text(encoding="utf-8"))
    result = {
        "benchmark": name, "model": config.model, "protocol": config.protocol, "data": config.data.get(name, config.data.get("")),
        "limit": config.limit, "engine": config.engine, "decoding": {**config.decoding.as_dict(), "max_new_tokens": meta["max_new_tokens"]},
        "generation": meta[HOW], "source": prepared.found[name],
        "judge": None if config.judge is None else config.judge.summary(), "splits": summarise(rows, prepared.metrics[name]),
    }  # fmt: skip
    write_json(folder / RESULTS, result)
    if result["judge"]:
        echo(f"{name}: judge {result['judge']}")


def _report(prepared: Prepared, echo: Echo) -> dict[str, Any]:
    """The report of what is in the folder: tables on the terminal, report.json and report.html."""
    from vlm_dft.comparing import compare_runs, read_runs
    from vlm_dft.evaluation_report import evaluation_tables, write_evaluation
    from vlm_dft.predictions import read_jsonl

    config = prepared.config
    scored = [name for name in prepared.splits if (config.output / name / RESULTS).is_file()]
    if not scored:
        return {}
    label = Path(config.model).name
    report: dict[str, Any] = compare_runs(read_runs([f"{label}={config.output}"]))
    rows = {
        file: {label: {name: read_jsonl(config.output / name / file) for name in scored}}
        for file in (SCORES, PREDICTIONS)
    }
    samples = {name: _flat(prepared.splits[name]) for name in scored}
    write_evaluation(config.output, report, samples=samples, scores=rows[SCORES], responses=rows[PREDICTIONS])
    for table in evaluation_tables(report):
        echo(table)
    echo(f"report: {config.output / 'report.json'}\n        {config.output / 'report.html'}")
    return report


def _cut(name: str, sources: Mapping[str, Mapping[str, Any]], limit: int | None) -> Iterator[str]:
    """That `limit` left samples out, which no table says."""
    if limit and any(one["rows"] == limit and (one["expected"] or limit + 1) > limit for one in sources.values()):
        yield f"{name}: the first {limit:,} samples of each split alone (limit), so its scores are not those of the whole set."


def _settings(config: EvalConfig) -> dict[str, Any]:
    return {"protocol": config.protocol}


def _flat(splits: Splits) -> list[Sample]:
    return [sample for samples in splits.values() for sample in samples]


def _check_output(output: Path) -> None:
    """Raise ConfigError for a file, and for the folder of a training run: its report would be lost."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {str(output)!r} is a file. Expected a folder.")
    if (output / "config.yaml").is_file() or any(output.glob("checkpoint-*")):  # the second: an objective's
        raise ConfigError(
            f"--output {str(output)!r} is the folder of a training run, whose report would be overwritten. Choose another, such as "
            f"{str(output / 'evaluation')!r}."
        )


def _claim(output: Path) -> None:
    """Make the folder, and try to write into it. Raises ConfigError."""
    probe = output / f".writable.{os.getpid()}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--output {str(output)!r} cannot be written to: {error.strerror}. Choose another."
        ) from error


def _join() -> Share:
    """This process's share of the work, as torchrun, accelerate launch or vlm-dft-launch started it; its GPU chosen."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return ALONE
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not torch.distributed.is_initialized():  # gloo: all they do is wait for each other, as long as an answer takes
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))

    def total(count: int) -> int:
        counts = torch.tensor(count)
        torch.distributed.all_reduce(counts)
        return int(counts)

    return Share(torch.distributed.get_rank(), world, torch.distributed.barrier, total)
