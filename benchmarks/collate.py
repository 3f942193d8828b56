"""Collating speed: table pictures in; samples per CPU second of ChatCollator against the floor and TRL's collator out.

    python benchmarks/collate.py --data path/to/PromptPG [--rounds 7] [--markdown benchmarks/collate.md]

The floor decodes the pictures and calls the processor once, on texts that are already rendered. Everything runs on the
same rows, interleaved in one process, CPU time of one thread, medians over rounds; "two workers" is a DataLoader's wall time.
TRL is compared where it is installed (pip install trl==1.16.0), the full-size Qwen tokenizer where dashscope is.
Processors are transformers' own classes at their released picture sizes; only the small tokenizers are ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from processors import build_processor, full_qwen_processor  # noqa: E402

from vlm_dft.chat import Example  # noqa: E402
from vlm_dft.collators import ChatCollator  # noqa: E402
from vlm_dft.media import open_image  # noqa: E402
from vlm_dft.recipes import load_recipe, read_recipe  # noqa: E402

BATCH = 8
Collate = Callable[[Sequence[Example]], Any]


def released_sizes(family: str) -> Any:
    """A family's processor with the picture size of its released checkpoints."""
    processor = build_processor(family)
    images = processor.image_processor
    if family == "llava":  # CLIP ViT-L/14-336
        images.size, images.crop_size = {"shortest_edge": 336}, {"height": 336, "width": 336}
    elif family == "gemma3":
        images.size = {"height": 896, "width": 896}
    elif family == "smolvlm":
        images.size, images.max_image_size = {"longest_edge": 2048}, {"longest_edge": 512}
    elif family == "internvl":
        images.size = {"height": 448, "width": 448}
    return processor


def floor(collator: ChatCollator, rows: Sequence[Example]) -> Collate:
    """Decode, then one processor call on texts rendered beforehand."""
    processor, nested = collator.processor, collator.processing.nested
    texts = {row.id: collator.mark(row, row.id).text for row in rows}
    bos = collator.tokenizer.bos_token
    extra = {"add_special_tokens": False} if bos and next(iter(texts.values())).startswith(bos) else {}

    def collate(batch: Sequence[Example]) -> Any:
        images = [[open_image(image) for image in row.images] for row in batch]
        given = {"images": images if nested else [i for row in images for i in row]} if any(images) else {}
        return processor(text=[texts[row.id] for row in batch], padding=True, padding_side="right",
                         return_tensors="pt", **extra, **given)  # fmt: skip

    return collate


def floor_and_text(collator: ChatCollator, rows: Sequence[Example]) -> Collate:
    """The floor, and the rendered texts tokenised once more: what it takes to know which characters each token came from."""
    base, text = floor(collator, rows), tokenise(collator, rows)
    return lambda batch: (base(batch), text(batch))


def tokenise(collator: ChatCollator, rows: Sequence[Example]) -> Collate:
    """Bare tokenisation of texts rendered beforehand."""
    texts = {row.id: collator.mark(row, row.id).text for row in rows}
    return lambda batch: collator.tokenizer([texts[row.id] for row in batch], padding=True, return_tensors="pt")


def trl_collate(processor: Any) -> Collate | None:
    """TRL's collator on the same messages, its pictures decoded as in the floor; None where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    theirs = DataCollatorForVisionLanguageModeling(processor)
    return lambda batch: theirs(
        [{"messages": row.messages, "images": [open_image(i) for i in row.images]} for row in batch]
    )


def seconds(collate: Collate, batches: Sequence[Sequence[Example]]) -> float:
    """CPU seconds per sample."""
    start = time.process_time()
    for batch in batches:
        collate(batch)
    return (time.process_time() - start) / sum(map(len, batches))


def workers(collate: Collate, rows: Sequence[Example]) -> float:
    """Wall seconds per sample of a DataLoader with two workers, after its first batch."""
    loader = iter(DataLoader(rows, batch_size=BATCH, collate_fn=collate, num_workers=2))  # type: ignore[arg-type]
    next(loader)
    start = time.perf_counter()
    count = sum(1 for _ in loader)
    return (time.perf_counter() - start) / (count * BATCH)


def compare(title: str, ways: dict[str, Collate], rows: list[Example], rounds: int, base: str) -> list[str]:
    """A markdown row per way: ms CPU per sample, speed relative to the base, and the same with two workers."""
    batches = [rows[k : k + BATCH] for k in range(0, len(rows), BATCH)]
    for collate in ways.values():
        collate(batches[0])  # self-tests, caches
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, collate in ways.items():
            cpu[name].append(seconds(collate, batches))
    wall = {name: statistics.median(workers(collate, rows) for _ in range(3)) for name, collate in ways.items()}
    middle = {name: statistics.median(values) for name, values in cpu.items()}
    ratio = {
        name: statistics.median(b / v for b, v in zip(cpu[base], values, strict=True)) for name, values in cpu.items()
    }
    return [
        f"| {title} | {name} | {1e3 * middle[name]:.2f} | {ratio[name]:.2f} | {1e3 * wall[name]:.2f} | {wall[base] / wall[name]:.2f} |"
        for name in ways
    ]


def memory(collator: ChatCollator, rows: Sequence[Example], passes: int = 4) -> list[float]:
    """Peak resident MiB of this process after each pass over the rows."""
    peaks = []
    for _ in range(passes):
        for k in range(0, len(rows), BATCH):
            collator(rows[k : k + BATCH])
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder that holds data/tabmwp")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, _ = load_recipe(read_recipe("tabmwp"), options.data, limit=options.rows)
    words = [Example([{**m, "content": [p for p in m["content"] if p["type"] == "text"]} if not isinstance(m["content"], str)
                      else m for m in row.messages], id=row.id) for row in rows]  # fmt: skip
    qwen = full_qwen_processor() if importlib.util.find_spec("dashscope") else build_processor("qwen2_5_vl")
    lines = [
        "| processor | way | ms CPU per sample | speed, floor = 1 | two workers, ms | floor = 1 |",
        "|---|---|---|---|---|---|",
    ]

    collator = ChatCollator(qwen)
    trl = trl_collate(qwen)
    slow = ChatCollator(qwen)
    slow.processing.__dict__["fast"] = None  # the same collator without its own picture code
    pillow = ChatCollator(qwen, resize="pillow")
    ways = {"floor": floor(collator, rows), "floor and one tokenisation": floor_and_text(collator, rows),
            "ChatCollator": collator, "ChatCollator, processor's own picture code": slow,
            'ChatCollator, resize="pillow"': pillow, "ChatCollator, packed": ChatCollator(qwen, packing=True)}  # fmt: skip
    if trl is not None:
        ways["TRL"] = trl
    lines += compare("Qwen2.5-VL", ways, rows, options.rounds, "floor")
    peaks = memory(collator, rows)
    text = {"bare tokenisation": tokenise(collator, words), "ChatCollator": ChatCollator(qwen)}
    lines += compare("Qwen2.5-VL, text-only rows", text, words, options.rounds, "bare tokenisation")
    for family in ("llava", "smolvlm", "internvl", "gemma3"):
        other, some = ChatCollator(released_sizes(family)), rows[: options.rows // 4 if family == "smolvlm" else None]
        ways = {
            "floor": floor(other, some),
            "floor and one tokenisation": floor_and_text(other, some),
            "ChatCollator": other,
        }
        lines += compare(family, ways, some, max(3, options.rounds // 2), "floor")
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", *(["trl"] if trl else []))
    )
    lines += ["", f"{len(rows)} rows of TabMWP, batches of {BATCH}, {options.rounds} rounds; {versions}; commit {commit.stdout.strip()}.",
              f"Peak resident memory after 1 to {len(peaks)} passes over the rows: "
              + ", ".join(f"{peak:,.0f}" for peak in peaks) + " MiB."]  # fmt: skip
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
