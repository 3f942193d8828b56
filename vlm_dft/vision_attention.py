"""Vision attention: a tower's packed windows in, the same attention out in one sdpa call per window length, not one per window.

Towers that pack pictures in one row tell their windows by `cu_seqlens`; on sdpa, transformers splits the row and calls the
attention window by window. Found by that argument, not by name: Qwen2-VL, 2.5 and 3, GLM-4V, Video-LLaMA 3 and others.
"""

from __future__ import annotations

import inspect
import weakref
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from vlm_dft.errors import ModelError

WINDOWS = "vlm_dft_windows"  # the name under which transformers knows this attention
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Largest relative difference of a picture token's features between this attention and sdpa window by window: roundings differ."""


class _Plan(NamedTuple):
    groups: list[tuple[int, int]]  # (length, windows of it), in the sorted row
    order: Tensor | None  # [N], places in the row, sorted by the length of their window; None: as it is
    back: Tensor | None  # [N], its inverse


class _Permute(torch.autograd.Function):
    """Rows of a tensor in another order; autograd's own way back would add into zeros instead of permuting."""

    @staticmethod
    def forward(context: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        context.save_for_backward(order, back)
        return rows.index_select(0, order)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        order, back = context.saved_tensors
        return cast(Tensor, _Permute.apply(grad, back, order)), None, None


def window_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, once per length of window where the module was told its windows; as it is where not.

    query, key, value: [1, heads, N, d]. Returns [1, N, heads, d].
    """
    sdpa, plan = AttentionInterface()["sdpa"], module.__dict__.pop("window_plan", None)
    if plan is None or attention_mask is not None:
        output, _ = sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return output, None
    global _calls
    _calls += 1
    rows = [states[0].transpose(0, 1) for states in (query, key, value)]  # [N, heads, d]
    if plan.order is not None:
        rows = [_Permute.apply(states, plan.order, plan.back) for states in rows]
    pieces, start = [], 0
    for length, count in plan.groups:
        q, k, v = (r[start : start + length * count].unflatten(0, (count, length)).transpose(1, 2) for r in rows)
        output, _ = sdpa(module, q, k, v, None, dropout=dropout, scaling=scaling, **kwargs)  # [count, length, heads, d]
        pieces.append(output.flatten(0, 1))
        start += length * count
    joined = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    if plan.back is not None:
        joined = _Permute.apply(joined, plan.back, plan.order)
    return joined.unsqueeze(0), None


AttentionInterface.register(WINDOWS, window_attention)
AttentionMaskInterface.register(WINDOWS, AttentionMaskInterface()["sdpa"])

_calls = 0  # of window_attention with windows, for the check
_plans: dict[int, tuple[weakref.ref[Tensor], int, _Plan]] = {}


def _plan(bounds: Tensor) -> _Plan:
    """How to group the windows of cu_seqlens [S + 1]; made once for all layers, since reading the lengths waits for a GPU."""
    known = _plans.get(id(bounds))
    if known is not None and known[0]() is bounds and known[1] == bounds._version:
        return known[2]
    lengths = bounds.diff().tolist()
    counts = {length: lengths.count(length) for length in sorted(set(lengths) - {0}, reverse=True)}
    order = back = None
    if any(a < b for a, b in pairwise(lengths)):
        of_place = torch.repeat_interleave(bounds.diff(), bounds.diff())
        order = of_place.argsort(descending=True, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
    for stale in [place for place, (alive, _, _) in _plans.items() if alive() is None]:
        del _plans[stale]
    plan = _Plan(list(counts.items()), order, back)
    _plans[id(bounds)] = (weakref.ref(bounds), bounds._version, plan)
    return plan


def _tell_windows(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """Before an attention runs: keep its windows for window_attention, and hand it the row as one window."""
    bounds = kwargs.get("cu_seqlens")
    module.__dict__.pop("window_plan", None)
    if bounds is None or len(bounds) < 2 or cast(Any, module).config._attn_implementation != WINDOWS:
        return None
    plan = _plan(bounds)
    module.__dict__["window_plan"] = plan
    tokens = sum(length * count for length, count in plan.groups)
    return args, {**kwargs, "cu_seqlens": torch.tensor([0, tokens], dtype=bounds.dtype)}  # on the CPU: split reads it


def find_window_attentions(model: Any) -> list[Any]:
    """The attention modules that are given `cu_seqlens` and take transformers' attention functions."""
    return [
        module
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
        and hasattr(module, "is_causal")
        and "cu_seqlens" in inspect.signature(type(module).forward).parameters
    ]


def use_window_attention(model: Any) -> str:
    """Switch a model's vision tower from sdpa to attention by window length. Returns why not; "" where it was done."""
    whole = _bare(model)
    attentions = find_window_attentions(whole)
    if not attentions:
        return "no part of this model packs its windows in a row (cu_seqlens)"
    configs = {id(module.config): module.config for module in attentions}
    names = {key for key in whole.config.sub_configs if id(getattr(whole.config, key, None)) in configs}
    if len(names) != len(configs):
        return "the attention of its vision tower cannot be chosen apart"
    found = {config._attn_implementation for config in configs.values()}
    if found == {WINDOWS}:
        return ""
    if found != {"sdpa"}:
        return f"its attention is {', '.join(sorted(map(str, found)))}, not sdpa"
    whole.set_attn_implementation(dict.fromkeys(names, WINDOWS))
    for module in attentions:
        module.window_hook = module.register_forward_pre_hook(_tell_windows, with_kwargs=True)
    return ""


def uses_window_attention(model: Any) -> bool:
    """Whether use_window_attention is in force."""
    return any(module.config._attn_implementation == WINDOWS for module in find_window_attentions(_bare(model)))


def stop_window_attention(model: Any) -> None:
    """Back to transformers' sdpa."""
    whole = _bare(model)
    attentions = [module for module in find_window_attentions(whole) if hasattr(module, "window_hook")]
    for module in attentions:
        module.window_hook.remove()
        del module.window_hook
    configs = [module.config for module in attentions]
    names = [key for key in whole.config.sub_configs if any(getattr(whole.config, key, None) is c for c in configs)]
    whole.set_attn_implementation(dict.fromkeys(names, "sdpa"))


def window_samples() -> list[dict[str, Any]]:
    """Two rows with pictures of several windows, not all of one length."""
    rows = []
    for size, turned in (((252, 140), 0), ((140, 196), 90)):
        picture = Image.merge("RGB", [Image.linear_gradient("L").rotate(turned + k).resize(size) for k in (0, 90, 180)])
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What do you see?"}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": "a slope"}]}
        rows.append({"messages": [user, reply], "images": [picture], "source": "window self-test", "id": str(size)})
    return rows


@torch.no_grad()
def check_window_attention(model: Any, batch: dict[str, Any]) -> float:
    """The largest relative difference of a patch's features by window length from those window by window.

    batch: a collator's, of window_samples. Runs the whole model where it is, so that engines which shard it gather it. Raises
    ModelError where the features differ by more than rounding, or where the windows did not reach this attention.
    """
    whole = _bare(model)
    parameter = next(whole.parameters())
    inputs = {key: value.to(parameter.device) for key, value in batch.items() if key != "labels"}
    attentions = find_window_attentions(whole)
    configs = {id(module.config): module.config for module in attentions}.values()
    towers = [m for m in whole.modules() if isinstance(m, PreTrainedModel) and any(m.config is c for c in configs)]
    modes, seen = {module: module.training for module in whole.modules()}, list[Tensor]()
    kind, arithmetic = parameter.device.type, [parameter.dtype]

    def look(module: nn.Module, args: Any, found: Any) -> None:
        seen.append(_features(found))
        if torch.is_autocast_enabled(kind):  # accelerate puts the model's own forward into it
            arithmetic[0] = torch.get_autocast_dtype(kind)

    hooks = [tower.register_forward_hook(look) for tower in towers]
    whole.eval()
    try:
        before = _calls
        model(**inputs, use_cache=False)
        reached, ours = _calls - before, torch.cat(seen)
        seen.clear()
        for config in configs:
            config._attn_implementation = "sdpa"
        model(**inputs, use_cache=False)
        stock = torch.cat(seen)
    finally:
        for hook in hooks:
            hook.remove()
        for config in configs:
            config._attn_implementation = WINDOWS
        for module, mode in modes.items():
            module.training = mode
    name, dtype = type(whole).__name__, arithmetic[0]
    if reached < len(attentions):
        raise ModelError(f"{name}: cu_seqlens reached {reached} of the {len(attentions)} attentions of its tower.")
    worst = float(((ours - stock).norm(dim=-1) / stock.norm(dim=-1).clamp_min(1e-30)).max())
    if not worst <= TOLERANCES[dtype]:  # nan fails
        raise ModelError(
            f"attention by window length changes what {name} sees: the features of a patch differ by {worst:.2g} of their size "
            f"from sdpa window by window, expected at most {TOLERANCES[dtype]:g} in {str(dtype)[6:]}."
        )
    return worst


def _bare(model: Any) -> Any:
    """The model without peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _features(found: Any) -> Tensor:
    """[N, H], the last hidden states in a tower's output."""
    states = found.last_hidden_state if hasattr(found, "last_hidden_state") else found[0]
    return cast(Tensor, states.reshape(-1, states.shape[-1]).double())
