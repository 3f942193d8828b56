"""Model card: the files of a run folder in, a README.md of facts out. What is not known is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlm_dft.accounting import TITLES, account_cells
from vlm_dft.locate import EMBEDDED
from vlm_dft.reporting import percent, table_rows
from vlm_dft.runs import write_text


def write_card(folder: Path, source: Path, exported: Mapping[str, Any] | None = None) -> None:
    """Write README.md into `folder` from what `source` (a run folder, an objective's folder or a checkpoint) says."""
    write_text(folder / "README.md", model_card(read_facts(source), exported))


def read_facts(source: Path) -> dict[str, Any]:
    """What a run left in its folder, the one above it (of several objectives) and its last checkpoint."""
    places = [source, source.parent]
    facts: dict[str, Any] = {"name": source.name if source.name else "model"}
    for name in (
        "config.yaml",
        "recipe.yaml",
        "benchmark.yaml",
        "accounting.json",
        "versions.json",
        "parts.json",
        "report.json",
    ):
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is not None:
            text = found.read_text(encoding="utf-8")
            facts[found.stem] = yaml.safe_load(text) if found.suffix == ".yaml" else json.loads(text)
    report = facts.get("report", {})
    names = report.get("training", {})
    from vlm_dft.runs import path_name

    facts["objective"] = next((o for o in names if len(names) == 1 or path_name(o) == source.name), None)
    if facts["objective"] is None:
        objectives = facts.get("config", {}).get("objective") or []
        facts["objective"] = next((o for o in objectives if len(objectives) == 1 or path_name(o) == source.name), None)
    return facts


def model_card(facts: Mapping[str, Any], exported: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown with the front matter of the hub."""
    config = facts.get("config", {})
    adapter = exported["adapter"] if exported else bool(config.get("lora"))
    base = str(config.get("model") or (exported or {}).get("base") or "")
    blocks = [_front(base, adapter, facts), f"# {facts['name']}"]
    objective = facts.get("objective")
    if base:
        said = f"`{base}`, fine-tuned with vlm-dft"
        said += f", objective `{objective}`" if objective else ""
        blocks.append(said + (" (a LoRA adapter)." if adapter else "."))
    for title, rows in (
        ("Data", _data(facts)), ("Training", _training(facts)), ("Parts", _parts(facts)), ("Made with", _versions(facts)),
        ("Export", _export(exported, facts)),
    ):  # fmt: skip
        if rows:
            blocks += [f"## {title}", _table(("", ""), rows) if isinstance(rows[0], tuple) else "\n".join(rows)]
        if title == "Data" and (sources := _sources(facts)):
            blocks.append(sources)
    evaluation = _evaluation(facts)
    if evaluation:
        blocks += ["## Evaluation", evaluation]
    done = facts.get("report", {}).get("training", {}).get(objective, {})
    inside = (
        f"THIS_FOLDER/{Path(str(done['checkpoint'])).name}"
        if done.get("checkpoint") and not exported
        else "THIS_FOLDER"
    )
    blocks += ["## Use", _use(base, adapter, inside)]
    return "\n\n".join(blocks) + "\n"


def _licence_of(base: str) -> str | None:
    """The licence that the base model's own card states, where that card is on this machine; data have licences of their own."""
    from huggingface_hub import try_to_load_from_cache

    path: Any = Path(base) / "README.md"
    if not path.is_file() and base.count("/") == 1:
        path = try_to_load_from_cache(base, "README.md")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    pieces = Path(path).read_text(encoding="utf-8").split("---\n")
    front = yaml.safe_load(pieces[1]) if len(pieces) > 2 and not pieces[0] else None
    found = front.get("license") if isinstance(front, dict) else None
    return str(found) if found else None


def _front(base: str, adapter: bool, facts: Mapping[str, Any]) -> str:
    front: dict[str, Any] = {}
    if base and base not in EMBEDDED and not Path(base).is_absolute() and not Path(base).is_dir():
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if adapter else "finetune"
    front |= {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "image-text-to-text"}
    front["tags"] = ["vlm-dft", "vision-language", *(["lora"] if facts.get("config", {}).get("lora") else [])]
    licence = _licence_of(base)
    if licence:
        front["license"] = licence
    return "---\n" + yaml.safe_dump(front, sort_keys=False).rstrip() + "\n---"


def _data(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    recipe = facts.get("recipe", {})
    accounting = facts.get("accounting", {})
    total = accounting.get("total", {})
    rows = [("recipe", f"{recipe['name']}: {str(recipe.get('description', '')).strip()}")] if recipe.get("name") else []
    if recipe.get("licence"):
        rows.append(("licence of the data", str(recipe["licence"])))
    if total:
        examples = f", {total['examples']:,} examples an epoch" if total["examples"] != total["used"] else ""
        rows.append(("rows", f"{total['read']:,} read, {total['used']:,} used{examples}"))
        rows += [("dropped", f"{count:,}: {reason}") for reason, count in total["dropped"].items()]
        rows += [("changed", f"{count:,}: {effect}") for effect, count in total["changed"].items()]
        if total.get("duplicates"):
            rows.append(("the same as an earlier row", f"{total['duplicates']:,}"))
        rows.append(("tokens", ", ".join(f"{count:,} {kind}" for kind, count in total["tokens"].items())))
        rows.append(("fingerprint of the examples", f"`{total['fingerprint'][:16]}`"))
    return rows


def _sources(facts: Mapping[str, Any]) -> str:
    """What each source of a mixture gave."""
    sources = facts.get("accounting", {}).get("sources", [])
    if len(sources) < 2:
        return ""
    rows = [(source["source"], source.get("licence", ""), *account_cells(source)) for source in sources]
    said = "Tokens of an epoch; the share is that of the response tokens.\n\n"
    return said + _table(("source", "licence", *TITLES), rows)


def _training(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    config = facts.get("config", {})
    if not config:
        return []
    done = facts.get("report", {}).get("training", {}).get(facts.get("objective"), {})
    each = config["micro_batch"] * config["processes"]
    rows = [("objective", f"`{facts['objective']}`")] if facts.get("objective") else []
    rows += (
        [("loss", f"`{yaml.safe_dump(config['loss'], default_flow_style=True).strip()}`")] if config.get("loss") else []
    )
    if done.get("steps"):
        reached = done.get("step", done["steps"])
        why = f" of {done['steps']:,}, {done['reason']}" if reached != done["steps"] else ""
        rows.append(("optimiser steps", f"{reached:,}{why}"))
    found = done.get("evaluations")
    if found and Path(str(done["checkpoint"])).name != f"checkpoint-{found['last']['step']}":
        best, last = (
            f"{percent(found[k]['score'], found[k]['stderr'])} at step {found[k]['step']:,}" for k in ("best", "last")
        )
        said = f"the best of those evaluated while training ({found['decides']}, {found['best']['count']} samples, in %: {best}; last: {last})"
        rows.append(("checkpoint", f"`{Path(str(done['checkpoint'])).name}`, {said}"))
    if int((config.get("trainer") or {}).get("max_steps", -1)) < 1:
        rows.append(("epochs", f"{config['epochs']:g}"))
    rows += [
        ("batch", f"{config['batch_size']} examples = {config['processes']} processes x {config['micro_batch']} x "
                  f"{config['batch_size'] // each} accumulated"),
        ("learning rate", f"{config['learning_rate']:g}, warm-up over {config['warmup']:.0%} of the steps"),
        ("longest example", f"{config['max_length']:,} tokens"), ("seed", str(config["seed"])),
    ]  # fmt: skip
    rows += [("engine", str(config["engine"]))] if config.get("engine") else []
    rows += [(name, str(value)) for name, value in (config.get("trainer") or {}).items()]
    last = done.get("last", {})
    for key in ("loss", "nll", "mean_p"):
        if isinstance(last.get(key), float):
            rows.append((f"{key.replace('_', ' ')} of the last logged steps", f"{last[key]:.4f}"))
    return rows


def _parts(facts: Mapping[str, Any]) -> list[str]:
    plan = facts.get("parts", {})
    if not plan:
        return []
    cells = []
    for part, row in plan["parts"].items():
        moves = row.get("trainable", 0)
        proved = plan.get("proved", {}).get(part, {})
        cells.append(
            (part, f"{row['parameters']:,}", f"{moves:,}" if moves else "frozen", str(row.get("lora_modules", "")),
             f"{row['learning_rate']:g}" if "learning_rate" in row else "",
             f"{row['weight_decay']:g}" if "weight_decay" in row else "", row["weights"],
             f"step {proved['step']}" if proved else "")
        )  # fmt: skip
    titles = (
        "part",
        "parameters",
        "trained",
        "LoRA modules",
        "learning rate",
        "weight decay",
        "weights",
        "gradient seen",
    )
    said = [_table(titles, cells), "", f"Precision: {plan['precision']}."]
    lora = plan.get("lora")
    if lora:
        targets = ", ".join(f"`{pattern}`" for found in lora["targets"].values() for pattern in found)
        said += ["", f"LoRA: rank {lora['rank']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, on {targets}."]
    return said


def _versions(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = facts.get("versions", {})
    rows = [(name, version) for name, version in found.get("packages", {}).items() if version]
    rows += [("python", found["python"])] if found.get("python") else []
    rows += [("commit of vlm-dft", f"`{found['commit']}`")] if found.get("commit") else []
    gpus = found.get("environment", {}).get("gpus") or []
    rows += [("GPUs", ", ".join(gpus))] if gpus else []
    return rows


def _export(exported: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not exported or exported.get("adapter"):
        return []
    rows = [("dtype", exported["dtype"])]
    quantised = facts.get("config", {}).get("parts", {}).get("quantize")
    if exported.get("merged"):
        rows.append(
            (
                "adapter",
                "merged into the base"
                + (f", which was trained on in {quantised} and is not quantised here" if quantised else ""),
            )
        )
    rows += [
        (f"logits on pictures, {what}", f"differ by {value:.1e} of their size")
        for what, value in exported.get("agreement", {}).items()
    ]
    kept = exported.get("untouched")
    rows += [("parameters as in the base, bit for bit", f"{kept['identical']:,}")] if kept else []
    return rows


def _evaluation(facts: Mapping[str, Any]) -> str:
    report = facts.get("report", {})
    if not report.get("runs"):
        return ""
    runs = [run for run in report["runs"] if run == "base" or run == facts.get("objective")]
    titles = (f"{facts['benchmark']['name']}" if facts.get("benchmark", {}).get("name") else "split", "n", *runs)
    rows = []
    for row in table_rows(report):
        name = row["split"] if row["group"] is None else f"{row['split']}, {row['value']}"
        cells = [percent(row["cells"][run]["accuracy"], row["cells"][run]["stderr"]) for run in runs]
        rows.append((name, str(row["count"]), *cells))
    return "Accuracy in % ± standard error, of n samples.\n\n" + _table(titles, rows)


def _use(base: str, adapter: bool, folder: str) -> str:
    if adapter:
        name = (
            "BASE" if not base or base in EMBEDDED or Path(base).is_absolute() else base
        )  # a hub id means the same everywhere
        load = (
            "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'base = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto")\n'
            f'model = PeftModel.from_pretrained(base, "{folder}")\n'
        )
    else:
        load = (
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'model = AutoModelForImageTextToText.from_pretrained("{folder}", dtype="auto")\n'
        )
    return f'```python\n{load}processor = AutoProcessor.from_pretrained("{folder}")\n```'


def _table(titles: tuple[str, ...], rows: list[Any]) -> str:
    def line(cells: Any) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(titles), "|" + "---|" * len(titles), *map(line, rows)])
