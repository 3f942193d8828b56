"""Run by test_distributed.py: groups of cases in; the weights, logs and engine of each trained case out, one file a case.

Everything is imported once and the processes of a group are forked: a launch costs ten times as much as a case.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException, start_processes
from transformers import Trainer, TrainingArguments, set_seed

from vlm_dft import ChatCollator, dft_loss
from vlm_dft.chat import Example
from vlm_dft.kinds import KINDS
from vlm_dft.loss_head import Kl, attach_loss
from vlm_dft.models import add_lora, load_model, load_processor
from vlm_dft.objectives import IGNORE, OBJECTIVES
from vlm_dft.recipes import load_recipe, read_recipe
from vlm_dft.trainer import DFTTrainer

CASE: dict[str, Any] = {
    "objective": "dft", "rows": "drawn", "steps": 1, "micro_batch": 8, "accumulation": 1, "dtype": "float64", "by": "ours",
    "model": "tiny", "learning_rate": 0.05, "activation_checkpointing": False, "lora": 0, "kl": None, "cadft": 0.0,
    "full_weight": [],
}  # fmt: skip
"""What a case is unless it says otherwise. by: "ours" (DFTTrainer), "stock" (Trainer with dft_loss) or "hand". model: "tiny",
whose head is its embeddings', or "untied"."""

FSDP2 = {
    "version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False, "state_dict_type": "FULL_STATE_DICT",
    "transformer_layer_cls_to_wrap": ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"],
}  # fmt: skip
ZERO = {
    "zero_allow_untested_optimizer": True,
    **dict.fromkeys(("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",  # else accelerate clips at 1.0
}
ENGINES: dict[str, dict[str, Any]] = {
    "none": {},
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": FSDP2},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}},
}
"""What TrainingArguments is given. Without the threshold of 0, ZeRO-3 splits no parameter as small as these."""


class Collate:
    """ChatCollator, but that rows of the source "silent" have no target: as a batch after a filter of one's own."""

    def __init__(self, processor: Any) -> None:
        self.collator = ChatCollator(processor, tag_sources=["even", "odd"], source_objectives={"other": "nll"})

    def __call__(self, rows: list[Example]) -> dict[str, Any]:
        batch = self.collator(rows)
        batch["labels"][[row.source == "silent" for row in rows]] = IGNORE
        return batch

    def plain(self, rows: list[Example]) -> dict[str, Any]:
        """Without the keys that are ours, which a stock model does not take."""
        return {k: v for k, v in self(rows).items() if k not in ("token_kinds", "source_ids")}


def rows_of(examples: list[Example]) -> dict[str, list[Example]]:
    """Kinds of rows, 24 of each: three steps of eight, of which a process takes four in a row, or every other two."""
    own: list[dict[str, Any]] = [{}, {"weight": 0.25}, {"objective": "nll"}, {"objective": "power", "weight": 3.0}]
    alone = [[{"role": "user", "content": "Well?"}, {"role": "assistant", "content": f"{k} bars"}] for k in range(24)]

    def rows(source: Callable[[int], str], fields: Callable[[int], dict[str, Any]] = lambda k: {}) -> list[Example]:
        return [
            replace(e, source=source(k), messages=[*e.messages[:-1], {**e.messages[-1], **fields(k)}])
            for k, e in enumerate(examples)
        ]

    return {
        "drawn": rows(lambda k: "odd" if k % 2 else "even"),
        "own": rows(lambda k: "other" if k % 3 == 1 else "even", lambda k: own[k % 4]),
        "silent": rows(lambda k: "silent" if 4 <= k < 16 else "even"),  # half of step 1, all of step 2
        "words": [Example(alone[k]) if k % 8 > 3 else e for k, e in enumerate(examples)],  # one process sees no picture
    }


def let_fsdp_run_on_cpu() -> None:
    """accelerate 1.15 takes FSDP for GPUs alone: on CPU, TrainingArguments(fsdp=True) stays DDP without a word."""
    original = AcceleratorState.__init__

    def accept(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = accept


def save_untied(folder: Path) -> None:
    """The model with a head of its own, as those of 7B and more have: engines shard and reduce it apart."""
    model = load_model("tiny")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder)


def model_of(case: dict[str, Any], folder: Path) -> Any:
    name = case["model"] if case["model"] == "tiny" else str(folder / case["model"])
    model = load_model(name, dtype=getattr(torch, case["dtype"]))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (case["model"] == "tiny")
    if case["by"] == "ours":
        attach_loss(model)
    if case["lora"]:
        set_seed(1)
        model = add_lora(model, case["lora"])
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero as peft makes it: then the KL term would be zero in the first step
                torch.nn.init.normal_(parameter, std=0.05)
    return model


def whole(model: Any) -> dict[str, Tensor]:
    """All parameters, gathered from what the processes hold of them; every process must call."""
    parameters = dict(model.named_parameters())
    if any(hasattr(p, "ds_id") for p in parameters.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            return {name: p.detach().clone() for name, p in parameters.items()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in parameters.items()}


def share_held(model: Any) -> float:
    """Share of the parameters that is in this process."""
    held = sizes = 0
    for p in model.parameters():
        mine = p.ds_tensor if hasattr(p, "ds_tensor") else p.to_local() if isinstance(p, DTensor) else p
        held, sizes = held + mine.numel(), sizes + getattr(p, "ds_numel", p.numel())
    return held / sizes


def train(engine: str, case: dict[str, Any], rows: list[Example], collate: Collate, folder: Path) -> dict[str, Any]:
    AcceleratorState._reset_state()  # of the case before
    arguments = TrainingArguments(
        str(folder / "run"), per_device_train_batch_size=case["micro_batch"], max_steps=case["steps"],
        gradient_accumulation_steps=case["accumulation"], activation_checkpointing=case["activation_checkpointing"],
        learning_rate=case["learning_rate"], lr_scheduler_type="constant", optim="sgd", weight_decay=0.0, max_grad_norm=0.0,
        use_cpu=True, dataloader_pin_memory=False, train_sampling_strategy="sequential", remove_unused_columns=False,
        label_names=["labels"], report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, **ENGINES[engine],
    )  # fmt: skip
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed()  # before the weights are loaded, as train_objective does
    model = model_of(case, folder)
    start = whole(model)
    if case["by"] == "stock":
        trainer = Trainer(model, arguments, collate.plain, rows, compute_loss_func=stock_loss)
    else:
        kl = None if case["kl"] is None else Kl(*case["kl"])
        frozen = None if kl is None or case["lora"] else load_model("tiny", dtype=getattr(torch, case["dtype"]))
        trainer = DFTTrainer(
            model, arguments, collate, rows, objective=case["objective"], kl=kl, reference=frozen, cadft=case["cadft"],
            full_weight=case["full_weight"], sources=["even", "odd"],
        )  # fmt: skip
    trainer.train()
    return {
        "start": start,
        "end": whole(model),
        "logs": [row for row in trainer.state.log_history if "loss" in row],
        "world_size": arguments.world_size,
        "engine": type(trainer.model_wrapped).__name__,
        "held": share_held(model),
        "checkpointed": sum(getattr(module, "gradient_checkpointing", False) for module in model.modules()),
    }


def stock_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return dft_loss(outputs, labels, num_items_in_batch=num_items_in_batch)


def by_hand(case: dict[str, Any], rows: list[Example], collate: Collate, folder: Path) -> dict[str, Any]:
    """A step of SGD on full logits, token by token: weight - rate x gradient of -sum(factor w log p) / targets, w = p^alpha."""
    model = model_of(case, folder)
    start, batch = whole(model), collate(rows[:8])
    labels, kinds, _ = (batch.pop(key) for key in ("labels", "token_kinds", "source_ids"))
    factors = batch.pop("loss_weights", torch.ones(labels.shape))
    own = batch.pop("objective_ids", torch.full_like(labels, -1))
    names, full = [*sorted(OBJECTIVES), case["objective"]], [KINDS[kind] for kind in case["full_weight"]]
    log_p = model(**batch).logits.log_softmax(-1)
    total, counts = torch.zeros((), dtype=torch.float64), [0] * 8
    for row, k in (labels != IGNORE).nonzero().tolist():
        value = log_p[row, k - 1, labels[row, k]]
        forced = any(int(kinds[row, k]) & bit for bit in full)
        alpha = {"nll": 0.0, "power": 0.5, "dft": 1.0}["nll" if forced else names[own[row, k]]]
        total = total - factors[row, k] * (alpha * value.detach()).exp() * value
        counts[row] += 1
    (total / sum(counts)).backward()
    end = {name: (p - case["learning_rate"] * p.grad).detach() for name, p in model.named_parameters()}
    return {"start": start, "end": end, "targets": counts}


def work(rank: int, group: dict[str, Any], rows: dict[str, list[Example]], processor: Any, port: int, out: str) -> None:
    """One process of a group."""
    engine, processes, folder = group["engine"], group["processes"], Path(out)
    if processes > 1:
        here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in here.items()}, MASTER_PORT=str(port))
    if engine == "fsdp2":
        let_fsdp_run_on_cpu()
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled, for minutes, and not used
    for name, changes in group["cases"].items():
        case = {**CASE, **changes}
        arguments = (case, rows[case["rows"]], Collate(processor), folder)
        found = by_hand(*arguments) if case["by"] == "hand" else train(engine, *arguments)
        if rank == 0:
            torch.save(found, folder / f"{name}.part")
            (folder / f"{name}.part").rename(folder / f"{name}.pt")
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo may abort while Python is taken down


def run_group(group: dict[str, Any], *shared: Any) -> None:
    """Fork a group's processes and wait. Raises if one fails, or hangs, with the others ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = start_processes(
        work, (group, *shared[:2], port, shared[2]), group["processes"], join=False, start_method="fork"
    )
    deadline = time.monotonic() + group["seconds"]
    while not running.join(1.0):
        if time.monotonic() > deadline:
            for process in running.processes:
                process.kill()
            raise TimeoutError(f"{group['engine']}: no end after {group['seconds']} s, in one of {[*group['cases']]}")


def main() -> None:
    torch.set_num_threads(1)
    processor, groups = load_processor("tiny"), json.loads(sys.argv[2])
    rows = rows_of(load_recipe(read_recipe("drawn"), None, limit=24)[0])
    save_untied(Path(sys.argv[1]) / "untied")  # and imports the model's modules before the processes are forked
    gc.freeze()  # accelerate collects garbage in every case, and half of a case's time went through what is imported
    failed = False
    for group in groups:
        try:
            try:
                run_group(group, rows, processor, sys.argv[1])
            except ProcessExitedException:  # a signal: a process that is forked from one that had threads may abort
                traceback.print_exc()
                run_group(group, rows, processor, sys.argv[1])
        except Exception:  # noqa: BLE001  # another engine's cases can still be told
            traceback.print_exc()
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
