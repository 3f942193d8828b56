"""Training speed: table pictures and a small Qwen2.5-VL in; response tokens per CPU second and memory, ours and the peers', out.

    python benchmarks/train_step.py --data ../shared/data/tabmwp [--peers] [--rounds 3] [--quick]
                                    [--markdown benchmarks/train_step.md] [--json FILE]

Whole trainers: TRL 1.16's SFTTrainer, ms-swift 4.6 (with all logits, and with use_logits_to_keep) and LLaMA-Factory 0.9.5, each in
an environment of its own, which --peers makes below the cache folder ($VLM_DFT_CACHE or ~/.cache/vlm_dft; 2 GB; torch is shared
with this one, so that all compute with the same), each run in a process of its own, one after the other, rounds interleaved.
The same model, rows, order, batch, steps, AdamW and one thread; see train_peers.py for what is counted. Response tokens
are those of the rows, as ours counts them; what each trainer saw (tokens, targets, loss) stands beside its speed.
The step alone: a forward and backward pass on one batch, by the way the loss is computed (step_alone.py).
CPU seconds, since machines are shared; only ratios within one run count. About 25 minutes with three rounds on an idle
core, 3 minutes with --quick (a vocabulary of 8k for the whole trainers, one round). Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
PEERS = {"trl": ["trl==1.16.0"], "swift": ["ms-swift==4.6.0"], "llamafactory": ["llamafactory==0.9.5"]}
WAYS = {  # name -> (script, its argument, environment)
    "ours, packed": ("train_ours.py", "ours_packed", None),
    "ours, padded": ("train_ours.py", "ours", None),
    "TRL 1.16, loss_type=dft": ("train_peers.py", "trl", "trl"),
    "ms-swift 4.6": ("train_peers.py", "swift", "swift"),
    "ms-swift 4.6, logits_to_keep": ("train_peers.py", "swift_keep", "swift"),
    "LLaMA-Factory 0.9.5": ("train_peers.py", "llamafactory", "llamafactory"),
}
BATCH = 8


def cache() -> Path:
    """Where the peers' environments are."""
    return Path(os.environ.get("VLM_DFT_CACHE", Path.home() / ".cache" / "vlm_dft")) / "peers"


def python_of(peer: str) -> Path:
    return cache() / peer / "bin" / "python"


def install(peer: str) -> str:
    """Make a peer's environment, which sees the packages of this one and has its own before them. Returns what went wrong."""
    if (cache() / peer / "ready").is_file():
        return ""
    shutil.rmtree(cache() / peer, ignore_errors=True)
    venv.create(cache() / peer, with_pip=True)
    site = next((cache() / peer / "lib").glob("python*/site-packages"))
    own = [path for path in sys.path if path.endswith("site-packages")]
    (site / "shared.pth").write_text(
        "".join(f"import site; site.addsitedir({path!r})\n" for path in own), encoding="utf-8"
    )
    done = subprocess.run([python_of(peer), "-m", "pip", "install", "-q", *PEERS[peer]], capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    (cache() / peer / "ready").touch()
    return ""


def make_model(folder: Path, vocabulary: int) -> None:
    """A random Qwen2.5-VL with the embedded processor: hidden 256, 4 layers, vision depth 4, tied as the 3B is."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from vlm_dft.models import load_processor

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
    text = {
        "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "bos_token_id": None,
        "eos_token_id": 626, "pad_token_id": 627, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 768, "out_hidden_size": 256,
        "fullatt_block_indexes": [3], "window_size": 112,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=638, video_token_id=639, vision_start_token_id=635,
        vision_end_token_id=636, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration._from_config(config).save_pretrained(folder)
    load_processor("tiny").save_pretrained(folder)


def choose_rows(data: str, count: int) -> list[dict[str, str]]:
    """The first rows of TabMWP, shuffled."""
    from vlm_dft.recipes import load_recipe, read_recipe

    if not (Path(data) / "data" / "tabmwp").is_dir():
        sys.exit(f"No TabMWP at {data}: expected the folder that holds data/tabmwp (github.com/lupantech/PromptPG).")
    examples, _ = load_recipe(read_recipe("tabmwp"), data)
    random.Random(0).shuffle(examples)
    rows: list[dict[str, str]] = []
    for example in examples[:count]:
        prompt = next(part["text"] for part in example.messages[0]["content"] if part["type"] == "text")
        image = str(Path(str(example.images[0])).resolve())
        rows.append({"image": image, "prompt": prompt, "response": example.messages[1]["content"]})
    return rows


def run(script: str, arguments: list[str], python: Path | str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The JSON that a script leaves for a job. Raises RuntimeError with the end of what it said."""
    output, result = folder / "output", folder / "result.json"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "output": str(output), "result": str(result)}), encoding="utf-8")
    result.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hf"),
    }  # fmt: skip
    command = [str(python), str(HERE / script), *arguments, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    if done.returncode or not result.is_file():
        raise RuntimeError(f"{script} {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[-600:]}")
    return dict(json.loads(result.read_text(encoding="utf-8")))


def rate(found: dict[str, Any], targets: list[int]) -> float:
    """Response tokens per CPU second after the first step, what was done with the rows before it shared out over the steps."""
    counted = sum(targets[1:])
    return float(counted / (found["seconds"] + found["rows"] * counted / sum(targets)))


def mean(values: list[float], digits: int = 0) -> str:
    """Mean and standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.{digits}f}{error}"


def whole_table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A markdown row per trainer."""
    columns = (
        "trainer", "response tokens per CPU s", "ours, packed is faster by", "ours, padded by", "peak RSS, MB", "ours, packed of it",
        "over RSS before step 1, MB", "tokens but padding", "targets", "loss of step 1",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]  # fmt: skip
    targets = next(iter(found.values()))[0]["targets"]  # the peers train a line feed after each end of turn too
    for name, runs in found.items():
        speed = [rate(r, targets) for r in runs]
        by = [
            mean([rate(own, targets) / other for own, other in zip(found[f"ours, {way}"], speed, strict=False)], 2)
            for way in ("packed", "padded")
        ]
        peaks, over = [r["peak"] / 1e6 for r in runs], [(r["peak"] - r["before"]) / 1e6 for r in runs]
        share = statistics.median(r["peak"] / 1e6 for r in found["ours, packed"]) / statistics.median(peaks)
        seen = f"{sum(runs[0]['tokens']):,} | {sum(runs[0]['targets']):,} | {runs[0]['losses'][0]:.4e}"
        lines.append(
            f"| {name} | {mean(speed)} | {by[0]} | {by[1]} | {mean(peaks)} | {share:.2f} | {mean(over)} | {seen} |"
        )
    return lines


def step_table(found: dict[str, Any]) -> list[str]:
    """A markdown row per way of computing the loss."""
    base = "padded, TRL's head" if "padded, TRL's head" in found["steps"] else "padded, all logits"
    lines = [
        f"| way | response tokens per CPU s | speed, {base} = 1 | peak over the state, MB | loss |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found["steps"].items():
        speed = [found["targets"] / r["seconds"] for r in runs]
        ratios = [b["seconds"] / r["seconds"] for r, b in zip(runs, found["steps"][base], strict=True)]
        lines.append(
            f"| {name} | {mean(speed)} | {mean(ratios, 2)} | {statistics.median(r['over'] for r in runs) / 1e6:,.0f} | {runs[0]['loss']:.6e} |"
        )
    return [
        *lines,
        "",
        f"{found['targets']:,} response tokens of {found['tokens']:,} in {found['rows']} rows, in batches of {BATCH} padded to {found['padded']:,}.",
    ]


def parts_tables(found: dict[str, Any]) -> list[str]:
    """What recomputing and the tower's attention cost."""
    lines = ["| recomputed | CPU s, 3 batches | peak over the state, MB |", "|---|---|---|"]
    for name, runs in found["recompute"].items():
        lines.append(
            f"| {name} | {mean([r['seconds'] for r in runs], 2)} | {statistics.median(r['over'] for r in runs) / 1e6:,.0f} |"
        )
    lines += ["", "| the tower frozen | CPU s a step |", "|---|---|"]
    lines += [f"| {name} | {mean([r['seconds'] for r in runs], 2)} |" for name, runs in found["cached"].items()]
    lines += ["", "| vision tower, forward and backward | CPU s |", "|---|---|"]
    return lines + [f"| {name} | {mean([r['seconds'] for r in runs], 3)} |" for name, runs in found["tower"].items()]


def overhead_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """A markdown row per way: shares of the CPU seconds of a training run after its first step."""
    names = list(dict.fromkeys(name for run_ in found.values() for name in run_["shares"]))
    lines = [f"| run | {' | '.join(names)} | everything else |", f"|---|{'---|' * len(names)}---|"]
    for way, run_ in found.items():
        shares = [run_["shares"].get(name, 0.0) / run_["seconds"] for name in names]
        lines.append(
            f"| {way} | {' | '.join(f'{100 * s:.1f} %' for s in shares)} | **{100 * (1 - sum(shares)):.1f} %** |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder that holds data/tabmwp")
    parser.add_argument("--peers", action="store_true", help="make the peers' environments with pip, and measure them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a whole trainer; the first is not counted")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=("whole", "step", "overhead"), help="measure one of the three")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    parser.add_argument("--json", type=Path, help="write every single measurement here")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    refused = (
        {peer: install(peer) for peer in PEERS} if options.peers else dict.fromkeys(PEERS, "not asked for (--peers)")
    )
    rows = choose_rows(options.data, BATCH * max(options.steps, 12))
    vocabularies = (8192,) if options.quick else (8192, 151_936)
    whole: dict[str, list[dict[str, Any]]] = {}
    steps: dict[int, dict[str, Any]] = {}
    overhead: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for vocabulary in vocabularies:
            make_model(folder / str(vocabulary), vocabulary)
            job = {"model": str(folder / str(vocabulary)), "batch": BATCH, "min_pixels": 3136, "max_pixels": 200_704}
            wanted = {options.only} if options.only else {"whole", "step", "overhead"}
            parts = {
                "rounds": rounds,
                "trl": not refused["trl"],
                "parts": vocabulary == 8192,
                "rows": rows[: BATCH * 3 if vocabulary == 8192 else BATCH],
            }
            if "step" in wanted:
                print(f"vocabulary {vocabulary:,}: the step alone", file=sys.stderr)
                python = sys.executable if refused["trl"] else python_of("trl")
                steps[vocabulary] = run("step_alone.py", [], python, {**job, **parts}, folder)
            for way in ("overhead", "overhead_packed") if "overhead" in wanted else ():
                print(f"vocabulary {vocabulary:,}: {way}", file=sys.stderr)
                count = BATCH * (12 if vocabulary == 8192 else 4)
                name = f"V {vocabulary:,}, {'packed' if 'packed' in way else 'padded'}, {count // BATCH} steps"
                overhead[name] = run("train_ours.py", [way], sys.executable, {**job, "rows": rows[:count]}, folder)
        for turn in range(rounds if "whole" in wanted else 0):
            for name, (script, way, peer) in list(WAYS.items())[:: 1 if turn % 2 else -1]:
                if peer is not None and refused[peer]:
                    continue
                print(f"round {turn + 1} of {rounds}: {name}", file=sys.stderr)
                try:
                    found = run(
                        script,
                        [way],
                        python_of(peer) if peer else sys.executable,
                        {**job, "rows": rows[: BATCH * options.steps]},
                        folder,
                    )
                except RuntimeError as error:
                    refused[peer or name] = str(error)
                    continue
                whole.setdefault(name, []).append(found)
    if options.json:
        options.json.write_text(json.dumps({"whole": whole, "steps": steps, "overhead": overhead}), encoding="utf-8")
    whole = {name: whole[name] for name in WAYS if name in whole}
    lines = report(options, rounds, vocabularies[-1], whole, steps, overhead, refused)
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def report(
    options: argparse.Namespace, rounds: int, vocabulary: int, whole: dict[str, list[dict[str, Any]]],
    steps: dict[int, dict[str, Any]], overhead: dict[str, dict[str, Any]], refused: dict[str, str],
) -> list[str]:  # fmt: skip
    """The tables, as markdown."""
    from importlib.metadata import version

    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
                  if line.startswith("model name")), platform.processor())  # fmt: skip
    lines = [
        "# Training speed",
        "",
        f"Made by `python benchmarks/train_step.py --peers{' --quick' if options.quick else ''}` on one core of an {model}, commit "
        f"{commit.stdout.strip()}; torch {version('torch')}, transformers {version('transformers')}. Means over {rounds} interleaved "
        f"round{'s, ± the standard error' if rounds > 1 else ''}; fp32, one thread. Random Qwen2.5-VL (hidden 256, 4 layers, vision depth 4, "
        "head tied), real TabMWP tables, shuffled, everything trained.",
    ]  # fmt: skip
    if whole:
        lines += [
            "",
            f"## Whole trainers, V = {vocabulary:,}, {options.steps} steps of {BATCH} rows, the first not counted",
            "",
            *whole_table(whole),
        ]
    if any(refused.values()):
        lines += ["", *(f"- {peer}: not measured: {why}" for peer, why in refused.items() if why)]
    for size, found in steps.items():
        lines += ["", f"## The step alone, V = {size:,}", "", *step_table(found)]
    if overhead:
        lines += ["", "## What is neither model, loss, optimiser nor collator", "", *overhead_table(overhead)]
    if steps:
        lines += ["", "## By part, V = 8,192, packed", "", *parts_tables(next(iter(steps.values())))]
    return lines


if __name__ == "__main__":
    main()
