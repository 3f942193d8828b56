"""Training: a config, examples and a model in, a run folder with metrics and whole checkpoints out."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from vlm_dft.adapters import quantization_of
from vlm_dft.agreement import agreed, check_same_examples
from vlm_dft.arguments import fit_fsdp, training_arguments_of
from vlm_dft.as_trained import system_of, with_system
from vlm_dft.benchmarks import load_benchmark
from vlm_dft.boards import Boards
from vlm_dft.chat import Example
from vlm_dft.checkpoints import check_room, expected_bytes, newest_whole
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig, recomputed_parts
from vlm_dft.engines import check_devices, check_runs, find_engine
from vlm_dft.errors import ModelError, RowError
from vlm_dft.families import find_family, part_of
from vlm_dft.finishing import finish, finished_lines, read_finished
from vlm_dft.lazy import at_places
from vlm_dft.live import Known, View
from vlm_dft.locate import base_model, resolve_model
from vlm_dft.loss_head import Kl, attach_loss, check_loss
from vlm_dft.mixed import media_of, sources_of
from vlm_dft.models import (
    check_precision,
    choose_attention,
    device_kind,
    load_model,
    load_processor,
)
from vlm_dft.pace import Pace
from vlm_dft.parts import Parts, draw_parts, prepare_parts
from vlm_dft.progress import Metrics
from vlm_dft.proof import SEEING, GradientProof
from vlm_dft.recipes import read_recipe
from vlm_dft.recompute import use_recompute
from vlm_dft.runs import sweep, write_json
from vlm_dft.segment_attention import check_packing, use_segment_attention
from vlm_dft.sources import MediaAccess
from vlm_dft.stopping import StopOnSignal, Stopped
from vlm_dft.trainer import DFTTrainer
from vlm_dft.vision_attention import (
    check_window_attention,
    stop_window_attention,
    use_window_attention,
    uses_window_attention,
    window_samples,
)
from vlm_dft.vision_cache import KeyedCollator, VisionCache
from vlm_dft.watching import DEFAULT_LIMIT, Watch


class _Rows(Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, k: int) -> Example:
        return self.examples[k]

    def __getitems__(self, places: list[int]) -> list[Example]:
        return at_places(self.examples, places)


class _Loss(TrainerCallback):
    """Refuses to train a model whose own logits are not what the attached loss makes of its hidden states. Raises ModelError."""

    def __init__(self, collator: ChatCollator) -> None:
        asked, said = {"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Two red bars: 12."}
        other = collator.apart()
        other.packing, other.tag_sources = False, None
        try:
            self.batch = other([Example([asked, said])])
        except RowError:  # PaliGemma has no rows without a picture
            seen = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Well?"}]}
            self.batch = other([Example([seen, said], images=[Image.new("RGB", (56, 56))])])

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_loss(model, self.batch)


class _Packing(TrainerCallback):
    """Refuses to train on packed rows with a model in which one sample sees another. Raises ModelError."""

    def __init__(self, collator: ChatCollator) -> None:
        self.collator = collator

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_packing(model, self.collator)


class _Windows(TrainerCallback):
    """Goes back to stock sdpa, and says so, where vision attention by window length is not what it was."""

    def __init__(self, collator: ChatCollator, say: Callable[[str], Any]) -> None:
        other = collator.apart()
        other.packing, other.tag_sources = False, None
        self.batch, self.say = other(window_samples()), say

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        try:
            check_window_attention(model, self.batch)
        except ModelError as error:
            stop_window_attention(model)
            self.say(f"      vision attention back to window by window: {error}")


def checks_of(model: Any, collator: ChatCollator, say: Callable[[str], Any]) -> list[TrainerCallback]:
    """What is proven of a model before its first step."""
    windows = uses_window_attention(model)
    return [
        _Loss(collator),
        *([_Packing(collator)] if collator.packing else []),
        *([_Windows(collator, say)] if windows else []),
    ]


def make_collator(processor: Any, config: TrainConfig, **changes: Any) -> ChatCollator:
    """The collator of a run: what is too long is dropped unless the config says otherwise."""
    words = {"too_long": "drop", **config.collator, **changes}
    hosts = words.pop("hosts", ())
    for name in ("min_pixels", "max_pixels"):  # of the processor
        words.pop(name, None)
    access = MediaAccess(hosts=frozenset([hosts] if isinstance(hosts, str) else hosts))
    return ChatCollator(processor, max_length=config.max_length, access=access, **words)


def _timing(model: Any) -> dict[str, Any]:
    """What the collator cannot know of a model: Qwen2.5-VL's temporal positions per second of a video."""
    vision = getattr(model.config, "vision_config", None)
    found = getattr(vision, "tokens_per_second", None)
    return {} if found is None else {"tokens_per_second": found}


def prepare_model(config: TrainConfig) -> tuple[Any, Parts, str]:
    """The model to train, fused loss attached; its parts, frozen or LoRA added; and a line on the choices made."""
    check_precision(config.precision)
    attention, reason = choose_attention(config.attention, device_kind(), config.precision != "fp32", config.model)
    dtype = torch.bfloat16 if config.precision == "pure_bf16" else torch.float32
    quantization = None
    if kind := config.parts.get("quantize"):
        half = device_kind() == "cuda" and config.precision != "fp32"
        dtype = torch.bfloat16 if half else torch.float32
        quantization = quantization_of(kind, base_model(resolve_model(config.model)), half)
    model = load_model(config.model, dtype=dtype, attention=attention, quantization=quantization)
    attach_loss(model)
    if config.collator.get("packing") and attention == "sdpa":
        use_segment_attention(model)
        reason += ", segment by segment in packed rows"
    if attention == "sdpa":
        why_not = use_window_attention(model)
        reason += f", the vision tower by stock sdpa ({why_not})" if why_not else ", vision windows by length"
    model, parts = prepare_parts(model, config)
    recomputed = use_recompute(model, recomputed_parts(config.parts.get("recompute"), parts.moving, device_kind()))
    if recomputed:
        reason += f"; recomputed in the backward pass: {', '.join(recomputed)}"
    return model, parts, f"attention {attention} ({reason})"


def loss_terms(config: TrainConfig) -> dict[str, Any]:
    """What DFTTrainer is given of the config's `loss`: KL term and its reference, CADFT's beta, tokens of full weight."""
    loss = config.loss
    terms: dict[str, Any] = {"cadft": float(loss.get("cadft", 0.0)), "full_weight": loss.get("full_weight", ())}
    if loss.get("kl"):
        terms["kl"] = Kl(float(loss["kl"]), loss["kl_direction"])
        if not config.lora:
            terms["reference"] = load_model(
                config.model, dtype=torch.bfloat16 if device_kind() == "cuda" else torch.float32
            )
    return terms


def needs_dummy_image(model: Any, arguments: TrainingArguments, examples: Sequence[Example]) -> bool:
    """Whether a micro-batch of text alone would leave other processes waiting for the vision tower's parameters.

    They are reduced together if they are trained, and gathered together, trained or not, by ZeRO-3 and FSDP. Raises
    ModelError for pictures and videos together under these: the tower runs once for each, in some processes only.
    """
    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    split = getattr(arguments, "fsdp_plugin_args", None) is not None or (deepspeed is not None and deepspeed.is_zero3())
    if arguments.world_size == 1:
        return False
    has = media_of(examples)
    if split and has["images"] and has["videos"]:
        raise ModelError(
            "ZeRO-3 and FSDP gather the vision tower once for the pictures and once for the videos of a batch, and the processes "
            "would wait for each other where one has no videos. Train pictures and videos apart, or with zero2 or DDP."
        )
    family = find_family(model)
    towers = (p for name, p in model.named_parameters() if part_of(name, family) in ("vision", "merger"))
    trained = any(parameter.requires_grad for parameter in towers)
    return bool(has["text"] and (trained or (split and (has["images"] or has["videos"]))))


def train_objective(
    config: TrainConfig,
    objective: str,
    examples: Sequence[Example],
    folder: Path,
    *,
    lengths: Sequence[int] | None = None,
    echo: Callable[[str], Any] | None = None,
) -> Path:
    """Train one objective into a folder, continuing from its last whole checkpoint. Returns the final checkpoint's path.

    lengths: tokens of each example, if they are known, by which the examples of a step are dealt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if int(os.environ.get("RANK", "0")) == 0:
        sweep(folder)
    if device_kind() == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which accelerate imports where it can, warns
    steps = config.steps(len(examples))
    finished = read_finished(folder) or finish(config, folder, steps)
    if finished is not None and finished["steps"] == steps:
        if echo is not None:
            for line in finished_lines(finished):
                echo(f"      {line}")
        return folder / str(finished["checkpoint"])
    last, passed_over = newest_whole(folder) if int(os.environ.get("RANK", "0")) == 0 else (None, [])
    arguments = training_arguments_of(config, folder, len(examples))
    if arguments.world_size != config.processes:
        raise ModelError(
            f"processes = {config.processes}, but {arguments.world_size} are running. Start several with NPROC= (torchrun)."
        )
    if arguments.n_gpu > 1:
        raise ModelError(
            "Several GPUs in one process would mean DataParallel. Start one process per GPU: NPROC=<GPUs>."
        )
    last = agreed(last, arguments)
    check_same_examples(examples, arguments)
    check_devices(find_engine(config.engine), device_kind())
    if arguments.deepspeed:
        import deepspeed

        deepspeed.init_distributed()  # ZeRO-3 splits the weights while they load, and must know the world by then
    processor = load_processor(config.model, min_pixels=config.min_pixels, max_pixels=config.max_pixels)
    set_seed(config.seed)  # LoRA draws its start
    model, parts, choices = prepare_model(config)
    fit_fsdp(arguments, model)
    sources = sources_of(examples)
    dummy = {"dummy_image": True} if needs_dummy_image(model, arguments, examples) else {}
    collator = make_collator(processor, config, tag_sources=sources, **_timing(model), **dummy)
    if echo is not None:
        echo(f"      {choices}")
        echo(draw_parts(parts))
        for line in passed_over:
            echo(f"      {line}")
        if dummy:
            echo("      batches of text alone carry a dummy image, since every process must use the vision tower")
        if last is not None:
            echo(f"      continuing from {last}")
    size = expected_bytes(model, adapter=bool(config.lora), optimiser=str(arguments.optim))
    warning = check_room(folder, size, arguments.save_total_limit) if arguments.should_save else None
    if warning and echo is not None:
        echo(f"      {warning}")

    seeing = [part for part in SEEING if part in parts.moving]
    if seeing and media_of(examples)["text"] == len(examples):
        raise ModelError(
            f"{' and '.join(seeing)} would be trained, but no row has a picture: nothing could move them. Leave them out of train_parts "
            "(or lora_parts)."
        )
    held = folder / "parts.json"  # of the run that goes on
    before = json.loads(held.read_text("utf-8"))["proved"] if last is not None and held.is_file() else {}

    def proved(found: dict[str, Any]) -> None:
        if arguments.process_index == 0:
            write_json(held, {**parts.as_dict(), "proved": {**before, **found}})

    proved({})
    stop = StopOnSignal()
    view = None
    if echo is not None:
        known = Known(f"{objective} on {Path(config.recipe).stem}, {Path(config.model).name}", steps)
        view = View(known, echo)
    metrics = Metrics(folder / "metrics.jsonl", Pace(_pauses(config, arguments)), view)
    watch = _watch(config, processor, folder)
    room = config.parts.get("vision_cache")
    cache = VisionCache(room * 1e9) if room else None
    proof = GradientProof(parts, proved)
    trainer = DFTTrainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(examples),
        data_collator=collator if cache is None else KeyedCollator(collator),
        vision_cache=cache,
        processing_class=processor,
        objective=objective,
        **loss_terms(config),
        sources=sources,
        lengths=lengths,
        parts=parts,
        proof=proof,
        on_alarm=metrics.say,
        on_activity=metrics.now,
        callbacks=[stop, *checks_of(model, collator, echo or (lambda line: None)), *([watch] if watch else [])],
    )
    trainer.callback_handler.callbacks.insert(0, metrics)  # before the loggers, which get the speed that it measures
    check_runs(find_engine(config.engine), trainer.accelerator.distributed_type.name)
    metrics.alarms = trainer.alarms
    metrics.boards = Boards(trainer.callback_handler.callbacks)
    if watch is not None:
        metrics.watches(watch)
        watch.trainer, trainer.watch, watch.stop = trainer, watch, stop
    trainer.remove_callback(PrinterCallback)
    try:
        with view.shown() if view is not None else nullcontext():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    finally:
        stop.restore()
        metrics.boards.close()
    if cache is not None and echo is not None:
        echo(f"      {cache.summary()}")
    finished = finish(config, folder, steps)
    reached = folder / f"checkpoint-{trainer.state.global_step}"
    unproved = [part for part in parts.moving if part not in {**before, **proof.found}]
    if unproved and trainer.state.global_step and echo is not None:
        echo(f"      {', '.join(unproved)}: no step had a gradient for it, so that nothing proves that it was trained")
    if stop.received:
        name = signal.Signals(stop.received).name
        raise Stopped(f"Stopped by {name}; {reached} is saved. The same command continues from it.", stop.received)
    if finished is None:
        raise ModelError(
            f"Training ended at {reached}, expected checkpoint-{steps}. Is max_steps or save_strategy overridden?"
        )
    if echo is not None and finished["evaluations"]:
        for line in finished_lines(finished):
            echo(f"      {line}")
    return folder / str(finished["checkpoint"])


def _watch(config: TrainConfig, processor: Any, folder: Path) -> Watch | None:
    """What evaluates while training, if the config says so. It asks as the evaluation after training does."""
    settings = config.evaluation
    if not settings.get("evaluate_every"):
        return None
    splits = with_system(
        load_benchmark(str(config.benchmark), config.data, limit=settings.get("watch_limit", DEFAULT_LIMIT)),
        system_of(read_recipe(config.recipe), config.data),
    )
    return Watch(
        splits, make_collator(processor, config, packing=False), folder, every=settings["evaluate_every"],
        keep_best=bool(settings.get("keep_best")), patience=settings.get("patience"),
    )  # fmt: skip


def _pauses(config: TrainConfig, arguments: Any) -> dict[str, int]:
    """Steps between two savings and two evaluations."""
    found = {"saving": int(arguments.save_steps)}
    if every := config.evaluation.get("evaluate_every"):
        found = {
            "evaluating": every,
            "saving": min(every, found["saving"]) if config.evaluation.get("keep_best") else found["saving"],
        }
    return found


def leave_engines() -> None:
    """Forget DeepSpeed and the process group, so that models loaded from now on are whole and in this process alone."""
    from accelerate.state import AcceleratorState, PartialState  # type: ignore[import-untyped]
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    PartialState._reset_state()
