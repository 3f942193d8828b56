"""One GPU: a random Qwen2.5-VL of the 3B's shape and table pictures in; time and memory of the loss and of a training step out.

    python benchmarks/gpu.py --data DIR [--size 3b|small] [--rounds 5] [--markdown benchmarks/gpu.md]

No weights of the real model are needed: shapes decide time and memory, not values. Times are wall, synchronised, the median
of interleaved rounds after one that is not counted; memory is the allocator's peak over what was allocated before. A step is
forward, loss and backward in bf16 autocast over fp32 weights, as the trainer does, without the optimiser. "stock" is the
library's model with the logits of every row and the formula of dft_loss; Liger's kernel has DFT as use_token_scaling.
Runs on a CPU too with --size small, which only shows that everything runs. The 3B takes about 40 GB and three minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluate import SHAPES
from train_step import choose_rows

from vlm_dft import dft_loss, fused_linear_loss
from vlm_dft.objectives import IGNORE

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
Step = Callable[[], Any]
SIZES = {
    "3b": {"loss": (8192, 2048, 151_936), "batch": 8},
    "small": {"loss": (256, 64, 1000), "batch": 4},
}  # rows, H, V
SHARE = 0.2  # of the loss's rows that are response tokens


def make_model(size: str) -> Any:
    """A random model of this shape that knows the embedded processor's special tokens, fp32, on the device."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(SHAPES[size]["text"])
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    own = {
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": 626,
        "pad_token_id": 627,
        "tie_word_embeddings": True,
    }
    config = Qwen2_5_VLConfig(
        text_config={**text, **own}, vision_config={**SHAPES[size]["vision"], "window_size": 112}, image_token_id=638,
        video_token_id=639, vision_start_token_id=635, vision_end_token_id=636, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")


def measure(steps: dict[str, Step], clear: Step, rounds: int) -> dict[str, dict[str, float]]:
    """{name: {"ms", "mb"}}: the median time and the greatest memory over the one before. A way that fails is {}."""
    found: dict[str, dict[str, list[float]]] = {name: {"ms": [], "mb": []} for name in steps}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            if name in failed:
                continue
            clear()
            if GPU:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before, start = torch.cuda.memory_allocated() if GPU else 0, time.perf_counter()
            try:
                steps[name]()
            except Exception as error:  # noqa: BLE001  # a peer that cannot: the table says so
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                continue
            if GPU:
                torch.cuda.synchronize()
            if turn:
                found[name]["ms"].append(1000 * (time.perf_counter() - start))
                found[name]["mb"].append((torch.cuda.max_memory_allocated() - before) / 1e6 if GPU else 0.0)
    clear()
    for name, why in failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    return {
        n: {"ms": statistics.median(f["ms"]), "mb": max(f["mb"])} if n not in failed else {} for n, f in found.items()
    }


def loss_steps(size: str) -> tuple[dict[str, Step], Step]:
    """The ways to the DFT loss of bf16 hidden states and a bf16 head, forward and backward."""
    rows, width, vocabulary = SIZES[size]["loss"]
    draw = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(rows, width, generator=draw, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=draw, device=DEVICE) / width**0.5).bfloat16().requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=draw, device=DEVICE)
    targets[torch.rand(rows, generator=draw, device=DEVICE) > SHARE] = IGNORE
    kept = targets != IGNORE
    n = int(kept.sum())

    def floor() -> None:
        h, w = hidden.detach()[kept], weight.detach()
        g = h @ w.T
        _ = g @ w, g.T @ h

    def full() -> None:
        dft_loss((hidden @ weight.T)[None], torch.cat([targets.new_full((1,), IGNORE), targets[:-1]])[None]).backward()

    def ours() -> None:
        fused_linear_loss(hidden, weight, targets).backward()

    def trl() -> None:
        from loss import trl_kernel

        kernel, chunk = trl_kernel()
        log_p = kernel.apply(
            hidden, weight, None, targets.clamp(min=0), 1.0, chunk, None, 1.0, ("log_probs", "entropy", "is_top1")
        )[0]
        log_p = log_p.masked_fill(~kept, 0)
        (-(log_p * log_p.exp().detach()).sum() / n).backward()

    def liger() -> None:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        liger_fused_linear_cross_entropy(hidden, weight, targets, use_token_scaling=True).backward()

    def clear() -> None:
        hidden.grad = weight.grad = None

    ways = {"floor: three matrix products over response rows": floor, "ours": ours, "all logits, dft_loss": full}
    for package, way in (("trl", trl), ("liger_kernel", liger)):
        if importlib.util.find_spec(package):
            ways[f"{package}'s kernel, all rows"] = way
    return ways, clear


def train_steps(size: str, data: str) -> tuple[dict[str, Step], Step, dict[str, Any]]:
    """The ways through a batch of table pictures: ours packed and padded, the library's model padded."""
    from step_alone import examples_of

    from vlm_dft.collators import ChatCollator
    from vlm_dft.loss_head import attach_loss
    from vlm_dft.models import load_processor
    from vlm_dft.recompute import use_recompute
    from vlm_dft.segment_attention import use_segment_attention
    from vlm_dft.vision_attention import stop_window_attention, use_window_attention

    processor, examples = load_processor("tiny"), examples_of(choose_rows(data, SIZES[size]["batch"]))

    def moved(batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}

    packed, padded = (moved(ChatCollator(processor, packing=flag)(examples)) for flag in (True, False))
    model = attach_loss(make_model(size)).train()

    def prepare(parts: tuple[str, ...], segments: bool) -> None:
        use_recompute(model, parts)
        stop_window_attention(model)
        model.set_attn_implementation("sdpa")
        if segments:
            use_window_attention(model)
            use_segment_attention(model)

    def ours(batch: dict[str, Any], *, packing: bool, parts: tuple[str, ...] = ()) -> None:
        prepare(parts, packing)
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch, objective="dft")["loss"]
        loss.backward()

    def stock() -> None:
        prepare((), False)
        inputs = {k: v for k, v in padded.items() if k != "labels"}
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(**inputs, use_cache=False).logits
        dft_loss(logits, padded["labels"]).backward()

    ways: dict[str, Step] = {
        "ours, packed": lambda: ours(packed, packing=True),
        "ours, packed, both parts recomputed": lambda: ours(packed, packing=True, parts=("vision", "language")),
        "ours, padded": lambda: ours(padded, packing=False),
        "stock, padded, all logits": stock,
    }
    facts = {
        "rows": len(examples), "tokens": int(padded["attention_mask"].sum()), "padded": padded["input_ids"].numel(),
        "targets": int((padded["labels"][:, 1:] != IGNORE).sum()), "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    return ways, lambda: model.zero_grad(set_to_none=True), facts


def table(found: dict[str, dict[str, float]], over: str, tokens: int | None = None) -> list[str]:
    """Markdown: ms, the ratio to the way `over`, memory, and response tokens a second."""
    first = found[over]["ms"]
    more = "| response tokens/s |" if tokens else "|"
    lines = [
        f"| way | ms | {over.split(':')[0]} = 1 | peak, MB {more}",
        "|---|---|---|---|" + ("---|" if tokens else ""),
    ]
    for name, f in found.items():
        if not f:
            lines.append(f"| {name} | fails | | |" + (" |" if tokens else ""))
            continue
        rate = f" {1000 * tokens / f['ms']:,.0f} |" if tokens else ""
        lines.append(f"| {name} | {f['ms']:.1f} | {f['ms'] / first:.2f} | {f['mb']:,.0f} |{rate}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder that holds data/tabmwp")
    parser.add_argument("--size", choices=SIZES, default="3b" if GPU else "small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if GPU else "CPU"
    from vlm_dft.runs import versions

    said = versions()
    packages = ", ".join(
        f"{p} {said['packages'].get(p)}"
        for p in ("torch", "transformers", "trl", "liger-kernel")
        if said["packages"].get(p)
    )
    lines = ["# One GPU", "", f"`python benchmarks/gpu.py --size {options.size} --rounds {options.rounds}`, commit {said.get('commit')}; "
             f"{device}; {packages}.", "Medians of interleaved rounds; random weights (see the script's first lines).", ""]  # fmt: skip
    rows, width, vocabulary = SIZES[options.size]["loss"]
    ways, clear = loss_steps(options.size)
    lines += [f"## The DFT loss, bf16: N {rows:,} ({SHARE:.0%} response), H {width:,}, V {vocabulary:,}", ""]
    lines += table(measure(ways, clear, options.rounds), next(iter(ways)))
    del ways, clear
    if GPU:
        torch.cuda.empty_cache()
    ways, clear, facts = train_steps(options.size, options.data)
    lines += ["", f"## A step of a Qwen2.5-VL with {facts['parameters'] / 1e9:.2f}e9 parameters, all trained", "",
              f"{facts['rows']} table pictures, {facts['tokens']:,} tokens ({facts['padded']:,} padded), {facts['targets']:,} of "
              "them response tokens.", ""]  # fmt: skip
    lines += table(measure(ways, clear, options.rounds), "stock, padded, all logits", facts["targets"])
    text = "\n".join(lines) + "\n"
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
