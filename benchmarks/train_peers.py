"""One trainer, one process: a JSON job in (a model's folder, rows, steps), its CPU seconds, memory and loss as JSON out.

    PYTHON_OF_THE_PEER benchmarks/train_peers.py trl|swift|swift_keep|llamafactory JOB.json

Started by train_step.py with the Python of the peer's own environment; it imports nothing of vlm_dft. Every trainer is a
transformers.Trainer, so all are measured alike: from the end of step 1, which loads what is imported late, to the end of the
last step; where a trainer tokenises all rows before its first step (`rows`), that is shared out over the steps.
Without: imports, loading the model, putting the trainer together, saving. The learning rate is constant, the optimiser AdamW, order as in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SYSTEM = "You are a helpful assistant."  # as the embedded chat template begins
TRAINING = {
    "num_train_epochs": 1, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "weight_decay": 0.01, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "optim": "adamw_torch_fused", "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True,
    "dataloader_num_workers": 0, "dataloader_pin_memory": False, "bf16": False, "seed": 0, "disable_tqdm": True,
}  # fmt: skip


def cpu() -> float:
    """CPU seconds of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def resident(name: str) -> int:
    """VmRSS or VmHWM (its highest value since it was reset) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Watch:
    """Measures whatever transformers.Trainer runs next."""

    def __init__(self) -> None:
        self.ready = 0.0  # when the rows began to be prepared
        self.found: dict[str, Any] = {"rows": 0.0, "targets": [], "tokens": [], "patches": [], "losses": []}

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        from torch.utils.data import SequentialSampler
        from transformers import Trainer, TrainerCallback

        watch, found = self, self.found

        class Marks(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                found["prepared"], found["before"] = cpu() - watch.ready, resident("VmRSS")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:  # what loading the model needed is over
                    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                    found["first"], found["wall"] = cpu(), time.perf_counter()

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if "loss" in (logs or {}):
                    found["losses"].append(float(logs["loss"]))

            def on_train_end(self, *args: Any, **kwargs: Any) -> None:
                found["seconds"] = cpu() - found["first"]
                found["wall"] = time.perf_counter() - found["wall"]
                found["peak"] = resident("VmHWM")

        step, train = Trainer.training_step, Trainer.train

        def counted(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            shapes = {key: inputs[key].shape for key in ("input_ids", "pixel_values") if key in inputs}
            found["targets"].append(int((inputs["labels"][:, 1:] != -100).sum()))
            mask = inputs.get("attention_mask")
            found["tokens"].append(shapes["input_ids"].numel() if mask is None else int((mask != 0).sum()))
            found["patches"].append(shapes["pixel_values"][0] if "pixel_values" in shapes else 0)
            return step(trainer, model, inputs, *args, **kwargs)

        def marked(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            trainer.add_callback(Marks())
            return train(trainer, *args, **kwargs)

        Trainer.training_step, Trainer.train = counted, marked
        Trainer._get_train_sampler = lambda trainer, dataset=None: SequentialSampler(dataset or trainer.train_dataset)
        try:
            yield
        finally:
            Trainer.training_step, Trainer.train = step, train


def trl(job: dict[str, Any], watch: Watch) -> None:
    """TRL's SFTTrainer with loss_type="dft": its fused head."""
    from datasets import Dataset, Image, Sequence
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForImageTextToText.from_pretrained(job["model"], dtype="float32", attn_implementation="sdpa")
    processor = AutoProcessor.from_pretrained(job["model"])
    arguments = SFTConfig(**{
        **TRAINING, "output_dir": job["output"], "per_device_train_batch_size": job["batch"], "loss_type": "dft",
        "max_length": None, "gradient_checkpointing": False, "remove_unused_columns": False,
    })  # fmt: skip
    watch.ready = cpu()
    rows = [
        {
            "images": [row["image"]],
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in job["rows"]
    ]
    dataset = Dataset.from_list(rows).cast_column("images", Sequence(Image()))
    SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=processor).train()


def swift(job: dict[str, Any], watch: Watch, *, keep: bool = False) -> None:
    """ms-swift's sft with enable_dft_loss, all logits or (keep) the response rows' alone."""
    os.environ |= {"MAX_PIXELS": str(job["max_pixels"]), "MIN_PIXELS": str(job["min_pixels"])}
    from swift.arguments import SftArguments
    from swift.pipelines.train.sft import SwiftSft

    path = Path(job["output"]) / "rows.jsonl"
    path.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": f"<image>{row['prompt']}"},
                                 {"role": "assistant", "content": row["response"]}], "images": [row["image"]]}) + "\n"
        for row in job["rows"]), encoding="utf-8")  # fmt: skip
    own = {key: value for key, value in TRAINING.items() if key not in ("bf16", "use_cpu", "disable_tqdm")}
    arguments = SftArguments(**{
        **own, "model": job["model"], "model_type": "qwen2_5_vl", "template": "qwen2_5_vl", "system": SYSTEM, "output_dir": job["output"],
        "dataset": [str(path)], "dataset_shuffle": False, "train_dataloader_shuffle": False, "split_dataset_ratio": 0.0,
        "tuner_type": "full", "freeze_vit": False, "freeze_aligner": False, "torch_dtype": "float32", "attn_impl": "sdpa",
        "per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1, "enable_dft_loss": True,
        "use_logits_to_keep": keep, "gradient_checkpointing": False, "max_length": 100_000, "use_cpu": True,
        "load_from_cache_file": False, "warmup_ratio": 0.0,
    })  # fmt: skip
    pipeline = SwiftSft(arguments)
    pipeline.template.image_token_id = pipeline.tokenizer.convert_tokens_to_ids(
        "<|image_pad|>"
    )  # it knows that of Qwen's own alone
    watch.ready = cpu()
    pipeline.run()


def llamafactory(job: dict[str, Any], watch: Watch) -> None:
    """LLaMA-Factory's sft with use_dft_loss."""
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    folder = Path(job["output"]) / "data"
    folder.mkdir()
    rows = [{"messages": [{"role": "user", "content": f"<image>{row['prompt']}"},
                          {"role": "assistant", "content": row["response"]}], "images": [row["image"]]} for row in job["rows"]]  # fmt: skip
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    info = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    get, spent = workflow.get_dataset, 0.0

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = cpu()
        found = get(*args, **kwargs)
        spent += cpu() - start
        return found

    workflow.get_dataset = timed
    run_exp({
        **TRAINING, "stage": "sft", "do_train": True, "finetuning_type": "full", "model_name_or_path": job["model"],
        "template": "qwen2_vl", "dataset_dir": str(folder), "dataset": "rows", "cutoff_len": 100_000, "use_dft_loss": True,
        "freeze_vision_tower": False, "freeze_multi_modal_projector": False, "freeze_language_model": False,
        "image_max_pixels": job["max_pixels"], "image_min_pixels": job["min_pixels"], "flash_attn": "sdpa",
        "per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1, "disable_shuffling": True,
        "disable_gradient_checkpointing": True, "output_dir": str(Path(job["output"]) / "run"), "report_to": "none",
        "overwrite_cache": True, "ddp_timeout": 1800, "trust_remote_code": False, "fp16": False,
    })  # fmt: skip
    watch.found["rows"] = spent


PEERS = {
    "trl": trl,
    "swift": swift,
    "swift_keep": lambda job, watch: swift(job, watch, keep=True),
    "llamafactory": llamafactory,
}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    peer, path = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    watch = Watch()
    with watch.around():
        PEERS[peer](job, watch)
    Path(job["result"]).write_text(json.dumps(watch.found), encoding="utf-8")


if __name__ == "__main__":
    main()
