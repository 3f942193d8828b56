"""Generation speed: pictures, questions and a small model in; responses per CPU second, ours and one by one, out.

    python benchmarks/evaluate.py [--data ../shared/data/tabmwp] [--size vocabulary|small|embedded|3b ...] [--rows 32] [--tokens 128]
                                  [--rounds 3] [--markdown benchmarks/evaluate.md]

One by one is what evaluation suites do by default (VLMEvalKit's way with a Transformers model): for each question the chat
template, the picture opened, the processor called, the library's generate with a batch of one, the text decoded. Ours is
generation.generate as `vlm-dft evaluate` calls it, with its files, syncs and settings, in batches of 32. The same model,
rows, prompts and pixels in one process on one thread, rounds interleaved; the greedy tokens are compared one by one and
must be the same (on a CPU in fp32; in bf16 on a GPU a batch rounds differently, and the share of equal responses is said).
CPU seconds, since machines are shared; on a GPU seconds, synchronised. "embedded" is the embedded model, whose responses end
by themselves, on its own drawn pictures; "small" a random Qwen2.5-VL (hidden 256, 4 layers, vision depth 4, vocabulary 8192)
that seldom ends before --tokens, and "vocabulary" the same with Qwen's vocabulary of 151,936; "3b"
random weights in the shape of Qwen2.5-VL-3B, in bf16, for a GPU of 24 GB or more.
Without --data, on the drawn pictures. About five minutes on an idle core.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlm_dft import generation
from vlm_dft.benchmarks import load_benchmark
from vlm_dft.chat import Sample
from vlm_dft.collators import ChatCollator
from vlm_dft.models import load_model, load_processor
from vlm_dft.runs import versions
from vlm_dft.vision_attention import use_window_attention

TARGET = 5.0  # times one by one; the embedded model's short answers, which end one after the other, are only said
OWN = generation._read_answer
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "text": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 8192, "mrope_section": [8, 12, 12]},
        "vision": {"depth": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 768, "out_hidden_size": 256,
                   "fullatt_block_indexes": [3]},
    },
    "3b": {
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                 "num_key_value_heads": 2, "vocab_size": 151_936, "mrope_section": [16, 24, 24]},
        "vision": {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 2048,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
    },
}  # fmt: skip
SHAPES["vocabulary"] = {**SHAPES["small"], "text": {**SHAPES["small"]["text"], "vocab_size": 151_936}}
GPU = torch.cuda.is_available()


def make_model(size: str) -> Any:
    """The embedded model, or a random one of this shape that knows the embedded processor's special tokens."""
    if size == "embedded":
        return load_model("tiny").to("cuda" if GPU else "cpu")
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(SHAPES[size]["text"])
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope_section")}
    own = {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": 626, "pad_token_id": 627}
    config = Qwen2_5_VLConfig(
        text_config={**text, **own, "tie_word_embeddings": False}, vision_config={**SHAPES[size]["vision"], "window_size": 112},
        image_token_id=638, video_token_id=639, vision_start_token_id=635, vision_end_token_id=636, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda" if GPU else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16 if GPU else torch.float32, attn_implementation="sdpa"
        )
    return model.eval()


def ids_as_text(ids: list[int], ends: Sequence[int], processor: Any) -> dict[str, Any]:
    """In place of generation's own for random models, whose ids are in no vocabulary."""
    stop = next((k for k, token in enumerate(ids) if token in ends), len(ids))
    return {
        "response": " ".join(map(str, ids[:stop])),
        "finish": "stop" if stop < len(ids) else "length",
        "tokens": min(stop + 1, len(ids)),
    }


@torch.no_grad()
def one_by_one(model: Any, processor: Any, samples: Sequence[Sample], tokens: int, read: Any) -> list[str]:
    """Responses, a batch of one at a time."""
    ends, said = generation.end_ids(model, processor), []
    for sample in samples:
        text = processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        images = [
            Image.open(image).convert("RGB") if isinstance(image, (str, Path)) else image for image in sample.images
        ]
        inputs = processor(text=[text], images=images or None, return_tensors="pt").to(model.device, model.dtype)
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
            eos_token_id=ends, pad_token_id=processor.tokenizer.pad_token_id,
        )  # fmt: skip
        said.append(read(output[0, inputs["input_ids"].shape[1] :].tolist(), ends, processor)["response"])
    return said


def clock(work: Callable[[Sequence[Sample]], list[str]], samples: Sequence[Sample]) -> tuple[float, list[str]]:
    """(CPU seconds, or seconds on a GPU; what was said)."""
    if GPU:
        torch.cuda.synchronize()
    now = time.perf_counter if GPU else time.process_time
    start = now()
    said = work(samples)
    if GPU:
        torch.cuda.synchronize()
    return now() - start, said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="the folder that holds data/tabmwp; without it, drawn pictures")
    parser.add_argument("--size", choices=("embedded", *SHAPES), nargs="+", default=["vocabulary", "embedded"])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--markdown", metavar="FILE", help="write the table here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for size in asked.size:
        found.append(measure(asked, size))
        print(found[-1]["text"], end="\n\n")
    if asked.markdown:
        text = "\n\n".join(["# Generation, batched and one by one", *(one["text"] for one in found)])
        Path(asked.markdown).write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if all(one["good"] for one in found) else 1)


def measure(asked: argparse.Namespace, size: str) -> dict[str, Any]:
    """Time both ways in turn; {"good": whether tokens and target hold, "text": the table}."""
    name = "tabmwp" if asked.data and size != "embedded" else "drawn"
    loaded = load_benchmark(name, asked.data, asked.rows * (1 if name == "drawn" else 3))
    samples = next(iter(loaded.values()))[: asked.rows]
    models = {way: make_model(size) for way in ("one by one", "ours")}
    model, processor = models["ours"], load_processor("tiny")
    use_window_attention(model)
    read = generation._read_answer = OWN if size == "embedded" else ids_as_text  # type: ignore[assignment]
    collator, seconds, said = ChatCollator(processor), {"one by one": [], "ours": []}, {}  # type: ignore[var-annotated]

    def ours(samples: Sequence[Sample]) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            rows = generation.generate(
                model, collator, samples, Path(folder) / "predictions.jsonl", max_new_tokens=asked.tokens,
                batch_size=asked.batch_size, show=False,
            )  # fmt: skip
        return [row["response"] for row in rows]

    ways = {
        "one by one": lambda rows: one_by_one(models["one by one"], processor, rows, asked.tokens, read),
        "ours": ours,
    }
    for turn in range(asked.rounds + 1):  # the first warms up, and is not counted
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            took, said[way] = clock(ways[way], samples if turn or GPU else samples[:2])
            if turn:
                seconds[way].append(took)
    same = sum(a == b for a, b in zip(said["one by one"], said["ours"], strict=True))
    each = {way: statistics.median(times) for way, times in seconds.items()}
    ratio = each["one by one"] / each["ours"]
    machine = platform.processor() or platform.machine()
    unit, where = ("s", torch.cuda.get_device_name()) if GPU else ("CPU-s", f"one thread of {machine}")
    good = (size == "embedded" or ratio >= TARGET) and (GPU or same == len(samples))
    text = "\n".join(
        [
            f"Model {size} ({model.num_parameters() / 1e6:.1f} M parameters), {len(samples)} rows of {name}, up to {asked.tokens} tokens, "
            f"batches of {asked.batch_size}, median of {asked.rounds} interleaved rounds; {where}; torch {torch.__version__}; commit "
            f"{versions()['commit']}.",
            "",
            f"| way | {unit} (each round) | responses per {unit} |",
            "|---|---|---|",
            *(
                f"| {way} | {each[way]:.2f} ({', '.join(f'{t:.2f}' for t in seconds[way])}) | {len(samples) / each[way]:.2f} |"
                for way in each
            ),
            "",
            f"Ours is {ratio:.1f} x as fast (target {TARGET:.0f}). The same greedy tokens in {same} of {len(samples)} responses "
            f"({len(set(said['ours']))} different ones).",
        ]
    )
    return {"good": good, "text": text}


if __name__ == "__main__":
    main()
