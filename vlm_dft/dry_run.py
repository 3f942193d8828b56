"""Dry run: a plan in; everything a run would be, in numbers and in words, out. Loads no model, downloads nothing.

torch and transformers are imported only to measure rows that are here, with a processor that is here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.config import TrainConfig
from vlm_dft.dimensions import Dimensions, dimensions_of
from vlm_dft.engines import DDP, Engine, check_engine, filled
from vlm_dft.errors import UserError
from vlm_dft.locate import base_model, resolve_model
from vlm_dft.memory import GB, estimate, gpu_bytes, host_bytes, largest_micro_batch
from vlm_dft.mixture_cards import Source, sources_in
from vlm_dft.mixture_rows import mixed_places
from vlm_dft.preflight import Plan
from vlm_dft.recipes import recipe_root
from vlm_dft.rows import files_of, read_rows

if TYPE_CHECKING:
    from vlm_dft.measuring import Measured

SAMPLE = 32  # rows that are measured
LOOKED = 1024  # that are looked at for them, where the first are left out


def look_ahead(plan: Plan, words: Sequence[str] = ()) -> dict[str, Any]:
    """Every number of the run, for --json: batch, rows, steps, tokens, schedule, engine, launch, memory."""
    config, engine = plan.config, check_engine(plan.config)
    rows, sample, mixture = _rows(plan)
    model = dimensions_of(config.model)
    settings = filled(engine, config, model.hidden if model else None, half=config.precision in ("auto", "bf16"))
    steps = config.steps(rows) if rows else None
    return {
        "config": config.as_dict(),
        "batch": {
            "processes": config.processes, "micro_batch": config.micro_batch, "accumulation": config.accumulation,
            "batch_size": config.batch_size,
        },
        "rows": rows,
        "steps": steps,
        **({"mixture": mixture} if mixture else {}),
        "tokens": _tokens(config, sample),
        "schedule": _schedule(config, steps),
        "engine": {"name": engine.name, "kind": engine.kind, "settings": settings},
        "launch": launch_line(config, engine, words),
        "memory": _memory(config, model, engine, settings, sample),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Look:
    """What is known of a source without reading it: its rows, and what its first ones measure or why they were not measured."""

    name: str
    rows: int | None
    sample: dict[str, Any]


def _look(source: Source, config: TrainConfig) -> _Look:
    card = source.card
    rows = int(card["rows"]) if card.get("rows") else None
    try:
        here = "prepared" not in card["source"] and _drawn(card) and _copied(source)
        root = recipe_root(card, source.data) if here else None
    except UserError as error:
        return _Look(source.name, _limited(rows, config), {"why": str(error)})
    if "prepared" in card["source"]:
        return _Look(source.name, _limited(rows, config), _stored(str(card["source"]["prepared"])))
    if root is None:
        why = "the rows are on the hub" if "hub" in card["source"] else "the drawn set is made by the first run"
        return _Look(source.name, _limited(rows, config), {"why": why})
    where_from = f"Recipe {card['name']!r}"
    if rows is None:
        rows = sum(1 for _ in read_rows(card["source"], root, where=where_from, broken=lambda row_id, error: None))
    place = Path(base_model(resolve_model(config.model)))
    if not any((place / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return _Look(source.name, _limited(rows, config), {"why": f"the processor of {config.model} is not here"})
    return _Look(source.name, _limited(rows, config), _measure(config, source))


def _stored(url: str) -> dict[str, Any]:
    """What all rows of a prepared set measure, as they did when it was prepared."""
    from vlm_dft.prepared import open_prepared

    if "://" in url and not url.startswith("file://"):
        return {"why": "the prepared rows are not on this machine"}
    return open_prepared(url).measures or {"why": "the rows were prepared unmeasured"}


def _sources(plan: Plan) -> list[Source]:
    """The recipe's sources; a mixture's sub-folders are those of a folder that is still to be said."""
    nowhere = "DATA" if "mixture" in plan.recipe else None
    return sources_in(plan.recipe, plan.config.data or nowhere)


def _rows(plan: Plan) -> tuple[int | None, dict[str, Any], list[dict[str, Any]]]:
    """(rows of an epoch, what a sample of them measures, and of a mixture what each source is expected to give)."""
    card, config = plan.recipe, plan.config
    looks = [_look(source, config) for source in _sources(plan)]
    if "mixture" not in card:
        return looks[0].rows, looks[0].sample, []
    unknown = next((look for look in looks if not look.rows), None)
    if unknown is not None:
        return None, {"why": f"how many rows {unknown.name} has is not known: {unknown.sample.get('why')}"}, []
    measured = all("why" not in look.sample for look in looks)
    if not measured and any(map(_by_tokens, _entries(card))):
        why = next(f"{look.name}: {look.sample['why']}" for look in looks if "why" in look.sample)
        return None, {"why": why}, []
    response, tokens = (
        [[round(look.sample[kind]) if measured else 1] * int(look.rows or 0) for look in looks]
        for kind in ("response", "tokens")
    )
    drawn = mixed_places(card, response, config.seed, tokens=tokens)
    counts = [int((drawn.source == k).sum()) for k in range(len(looks))]
    found = [_expected(look, count, measured) for look, count in zip(looks, counts, strict=True)]
    if not measured:
        why = next(f"{look.name}: {look.sample['why']}" for look in looks if "why" in look.sample)
        return sum(counts), {"why": why}, found
    names = ("tokens", "media", "response")
    means = {
        name: sum(n * look.sample[name] for n, look in zip(counts, looks, strict=True)) / sum(counts) for name in names
    }
    most = {name: max(look.sample[name] for look in looks) for name in ("longest", "most_media")}
    seen = {name: sum(look.sample[name] for look in looks) for name in ("sample", "looked_at")}
    return sum(counts), {**seen, **means, **most}, found


def _expected(look: _Look, count: int, measured: bool) -> dict[str, Any]:
    """What a source of a mixture gives an epoch."""
    kinds = ("tokens", "response") if measured else ()
    return {
        "name": look.name,
        "rows": look.rows,
        "examples": count,
        **{k: round(count * look.sample[k]) for k in kinds},
    }


def _entries(card: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The entries of a mixture and of those in it."""
    for entry in card["mixture"]:
        yield entry
        if "mixture" in entry["card"]:
            yield from _entries(entry["card"])


def _by_tokens(entry: Mapping[str, Any]) -> bool:
    return bool({"share", "cap_tokens"} & set(entry))


def _copied(source: Source) -> bool:
    """Whether the rows of a set on the hub are here, in a copy; those of any other source are."""
    if "hub" not in source.card["source"]:
        return True
    root = Path(source.data).expanduser() if source.data else None
    return root is not None and root.is_dir() and bool(files_of(source.card["source"], root, where=source.name))


def _drawn(card: Mapping[str, Any]) -> bool:
    """Whether an embedded set has been drawn already; any other source has."""
    if "embedded" not in card["source"]:
        return True
    from vlm_dft.embedded.drawn import cache_root, generator_version

    return any(path.is_dir() for path in cache_root().glob(f"*{generator_version()}*"))


def _limited(rows: int | None, config: TrainConfig) -> int | None:
    return min(rows, config.limit) if rows and config.limit else rows


def _measure(config: TrainConfig, source: Source) -> dict[str, Any]:
    """What the first rows that would be trained on measure. Raises RowError for one that training would refuse."""
    from vlm_dft.examining import examine
    from vlm_dft.models import load_processor
    from vlm_dft.training import make_collator

    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    collator = make_collator(processor, config)
    drop = (config.rows.get("bad_rows") or source.card.get("bad_rows", "refuse")) == "drop"
    found: list[Measured] = []
    looked, why = 0, ""
    limit = min(config.limit or LOOKED, LOOKED)
    with closing(examine(source.card, source.data, collator=collator, limit=limit)) as rows:
        for one in rows:
            looked += 1
            if one.outcome.error is not None and not drop:
                raise one.outcome.error
            if one.outcome.example is not None and one.measured is not None:
                found.append(one.measured)
            why = why or one.outcome.dropped or (one.outcome.error.reason if one.outcome.error is not None else "")
            if len(found) == SAMPLE:
                break
    if not found:
        return {"why": f"none of the first {looked:,} rows is used" + (f": {why}" if why else "")}
    count = len(found)
    return {
        "sample": count, "looked_at": looked, "tokens": sum(row.tokens for row in found) / count, "media": sum(row.media for row in found) / count,
        "response": sum(row.targets for row in found) / count, "longest": max(row.tokens for row in found),
        "most_media": max(row.media for row in found),
    }  # fmt: skip


def _tokens(config: TrainConfig, sample: dict[str, Any]) -> dict[str, Any]:
    if "why" in sample:
        return sample
    names = ("tokens", "media", "response")
    return {**sample, "per_step": {name: round(sample[name] * config.batch_size) for name in names}}


def _schedule(config: TrainConfig, steps: int | None) -> str:
    kind = str(config.trainer.get("lr_scheduler_type", "cosine"))
    rise = (
        f"{config.warmup:.0%} of the steps"
        if steps is None
        else f"{-(-int(config.warmup * steps * 1e6) // 10**6)} steps"
    )
    end = {"cosine": "down to 0 along a cosine", "linear": "down to 0 in a line", "constant": "constant"}.get(
        kind, kind
    )
    return f"learning rate {config.learning_rate:g} after a rise of {rise}, then {end}{f' at step {steps:,}' if steps else ''}"


def launch_line(config: TrainConfig, engine: Engine, words: Sequence[str] = ()) -> str:
    """The command that starts the processes, as scripts/train_qwenvl.sh would (it reads the same variables)."""
    given, skip = list[str](), False
    for word in words or ("train", "..."):
        if not skip and word not in ("--dry-run", "--dry_run") and not word.startswith("--json"):
            given.append("--processes" if word == "--nproc" else word)  # torchrun would take --nproc for its own
        skip = word == "--json"
    nodes, port, hosts = _nodes(), os.environ.get("MASTER_PORT", "29500"), os.environ.get("HOSTFILE")
    if hosts:
        start = ["deepspeed", "--hostfile", hosts, "--master_port", port, "--no_local_rank", "--module", "vlm_dft.cli"]
    elif nodes > 1:
        rank, address = os.environ.get("NODE_RANK", "RANK"), os.environ.get("MASTER_ADDR", "ADDRESS")
        start = [
            "vlm-dft-launch",
            "--nnodes",
            str(nodes),
            "--node_rank",
            rank,
            "--master_addr",
            address,
            "--master_port",
            port,
        ]
        start += ["--nproc_per_node", str(config.processes // nodes), "-m", "vlm_dft.cli"]
    elif config.processes > 1 or engine is not DDP:
        start = ["vlm-dft-launch", "--standalone", "--nproc_per_node", str(config.processes), "-m", "vlm_dft.cli"]
    else:
        start = ["vlm-dft"]
    return shlex.join([*start, *given])


def _nodes() -> int:
    """The machines of the run, by NNODES or by the lines of HOSTFILE."""
    hosts = Path(os.environ.get("HOSTFILE") or ".")
    if hosts.is_file():
        lines = map(str.strip, hosts.read_text(encoding="utf-8").splitlines())
        return max(1, sum(bool(line) and not line.startswith("#") for line in lines))
    return int(os.environ.get("NNODES") or 1)


def _memory(
    config: TrainConfig, model: Dimensions | None, engine: Engine, settings: dict[str, Any], sample: dict[str, Any]
) -> dict[str, Any]:
    if model is None:
        return {
            "why": f"the sizes of {config.model} are not known: no config.json here, and not in vlm_dft/dimensions.json"
        }
    micro, assumed = largest_micro_batch(config, model, sample.get("most_media"))
    found = estimate(config, model, engine, settings, micro)
    size, where = gpu_bytes()
    node, host = found.host * -(-config.processes // _nodes()), host_bytes()
    return {
        **found.as_dict(), "parts": model.parts, "sizes_from": model.source, "micro_batch": assumed, "gpu": size, "gpu_from": where,
        "fits": found.total <= size and node <= host, "host_of_node": node, "host_here": host,
    }  # fmt: skip


def describe(plan: Plan, found: dict[str, Any]) -> str:
    """The same in words: settings, batch arithmetic, steps, tokens, schedule, engine, memory."""
    import yaml

    config, card, batch = plan.config, plan.recipe, found["batch"]
    lines = [
        f"# {card['name']}: {str(card['description']).strip()}",
        yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip(),
        "",
        f"# global batch: {batch['processes']} processes x {batch['micro_batch']} examples x {batch['accumulation']} accumulated "
        f"= {batch['batch_size']}",
        *_source_lines(card, found.get("mixture", [])),
    ]
    if found["rows"]:
        lasting = "" if int(config.trainer.get("max_steps", -1)) > 0 else f" and {config.epochs:g} epochs"
        said = "about" if lasting else "max_steps says"
        lines.append(f"# steps: {said} {found['steps']:,} for {found['rows']:,} rows{lasting}")
    lines += [*_token_lines(found["tokens"]), f"# schedule: {found['schedule']}"]
    lines += [f"# {_optimiser(config)}"]
    if plan.benchmark is None:
        lines.append("# evaluation: none, the recipe names no benchmark; BENCHMARK= chooses one")
    if config.data is None and any(
        one.card.get("image_root") and "hub" in one.card["source"] for one in _sources(plan)
    ):
        lines.append("# still to say: DATA=, the folder with the images (see the notes)")
    if card.get("notes"):
        lines.append(f"# notes: {str(card['notes']).strip()}")
    lines += _engine_lines(found["engine"])
    lines += [f"# launched by: {found['launch']}", *_memory_lines(found["memory"])]
    lines += [f"# attention: {config.attention or 'flash-attn where it is installed and fits the GPU, else sdpa'}"]
    return "\n".join([*lines, "# dry run: no model was loaded, nothing was downloaded"])


def _source_lines(card: Mapping[str, Any], mixture: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the rows come from; of a mixture what each source gives an epoch."""
    import yaml

    if "mixture" not in card:
        return [f"# source: {yaml.safe_dump(dict(card['source']), default_flow_style=True).strip()}"]
    lines = [
        f"# mixture, {card.get('order', 'shuffled')}:"
        + ("" if mixture else " " + ", ".join(e["name"] for e in card["mixture"]))
    ]
    all_tokens, all_response = (sum(one.get(kind, 0) for one in mixture) for kind in ("tokens", "response"))
    for one in mixture:
        said = f"#   {one['name']}: {one['examples']:,} examples of {one['rows']:,} rows"
        if all_tokens:
            said += (
                f", about {one['tokens']:,} tokens ({one['tokens'] / all_tokens:.1%}), {one['response']:,} of responses "
                f"({one['response'] / all_response:.1%})"
            )
        lines.append(said)
    return lines


def _token_lines(tokens: dict[str, Any]) -> list[str]:
    if "why" in tokens:
        return [f"# tokens: not estimated, {tokens['why']}"]
    step, left_out = tokens["per_step"], tokens["looked_at"] - tokens["sample"]
    also = f"; {left_out:,} of {tokens['looked_at']:,} rows looked at are not used" if left_out else ""
    return [
        f"# tokens: about {step['tokens']:,} a step ({step['media']:,} of images, {step['response']:,} of responses), estimated from "
        f"{tokens['sample']} rows; the longest of them has {tokens['longest']:,}{also}"
    ]


def _optimiser(config: TrainConfig) -> str:
    get = config.trainer.get
    return (
        f"optimiser: {get('optim', 'AdamW')}, betas {get('adam_beta1', 0.9)} and {get('adam_beta2', 0.95)}, weight decay "
        f"{get('weight_decay', 0.01)}, gradient norm clipped to {get('max_grad_norm', 1.0)}"
    )


def _engine_lines(engine: dict[str, Any]) -> list[str]:
    import json

    if engine["kind"] == "ddp":
        return ["# engine: none, DDP where there are several processes"]
    autos = [key for key, value in engine["settings"].get("zero_optimization", {}).items() if value == "auto"]
    after = f"; {', '.join(autos)} when the model's config is here" if autos else ""
    wrapped = "; transformer_layer_cls_to_wrap from the model" if engine["kind"] == "fsdp" else ""
    return [f"# engine: {engine['name']}, every auto filled{after}{wrapped}", json.dumps(engine["settings"], indent=2)]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    if "why" in memory:
        return [f"# memory: not estimated, {memory['why']}"]
    parts = ", ".join(f"{part} {count:,}" for part, count in memory["parts"].items() if count)
    lines = [
        f"# parameters: {sum(memory['parts'].values()):,} ({parts}), by {memory['sizes_from']}",
        f"# memory of a GPU at the largest micro-batch, {memory['micro_batch']}:",
        *(f"#   {_size(size)}  {name}" for name, size in memory["items"].items()),
        f"#   {_size(memory['total'])}  in all, with 5% and 1.5 GB for fragmentation, context and NCCL (an allowance)",
    ]
    if memory["host"]:
        lines.append(
            f"#   {_size(memory['host'])}  in the host's memory for each process, {memory['host_of_node'] / GB:.0f} GB for all of a machine "
            f"(this one has {memory['host_here'] / GB:.0f} GB)"
        )
    lines += [f"#   note: {note}" for note in memory["notes"]]
    verdict = "fits"
    if memory["total"] > memory["gpu"]:
        verdict = "does NOT fit: more GPUs under zero3 or fsdp2, zero3_offload, LORA=, or a shorter max_length"
    elif not memory["fits"]:
        verdict = "does NOT fit the host's memory: more machines, an engine that offloads less, or LORA="
    return [*lines, f"#   {verdict}; {memory['gpu'] / GB:.0f} GB a GPU ({memory['gpu_from']})"]


def _size(count: int) -> str:
    return f"{count / GB:7.2f} GB" if count >= GB / 10 else f"{count / 10**6:7.2f} MB"
