"""Attend: a packed row's queries, keys and values in, each segment's own causal attention out; and the proof of isolation."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from vlm_dft.errors import ModelError
from vlm_dft.packing import PACKED_KEYS, find_mrope, pack_batch

SEGMENTS = "vlm_dft_segments"  # the name under which transformers knows this attention

TOLERANCES = {
    torch.float64: (1e-3, 1e-4),
    torch.float32: (1e-3, 1e-4),
    torch.bfloat16: (0.15, 1e-2),
    torch.float16: (0.05, 1e-2),
}
"""Largest relative difference of a token's last hidden state: packed against alone (other shapes, so other roundings), and
packed behind one neighbour against packed behind another of the same length (the same shapes: nothing but a leak differs)."""

_dense_allowed = True  # False while check_packing looks whether the segments reach the attention


class _Deferred:
    """The mask of a row whose positions restart, built only by an attention that is given no segments."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.mask: Tensor | None = None

    def dense(self) -> Tensor | None:
        """The [1, 1, N, N] mask that sdpa would have had."""
        if not _dense_allowed:
            raise ModelError("cu_seq_lens_q did not reach the language model's attention, which then costs N x N.")
        if self.mask is None:
            self.mask = AttentionMaskInterface()["sdpa"](**self.arguments)
        return self.mask


def segment_mask(**arguments: Any) -> Any:
    """sdpa's mask, except that a packed row's is put off: [N, N] is built only if its segments are not known."""
    packed = (  # transformers lets a causal mask be skipped except where positions restart (or for masks of one's own)
        not arguments.get("allow_is_causal_skip", True)
        and arguments.get("attention_mask") is None
        and arguments.get("local_size") is None
        and not arguments.get("use_vmap", False)
        and arguments["batch_size"] == 1
        and arguments["q_length"] == arguments["kv_length"] > 1
    )
    return _Deferred(arguments) if packed else AttentionMaskInterface()["sdpa"](**arguments)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, once per segment where `cu_seq_lens_q` [S + 1] is given; as it is where not.

    query: [1, heads, N, d]; key, value: [1, key heads, N, d]. Returns [1, N, heads, d].
    """
    sdpa = AttentionInterface()["sdpa"]
    if cu_seq_lens_q is None:
        mask = attention_mask.dense() if isinstance(attention_mask, _Deferred) else attention_mask
        output, _ = sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)
        return output, None
    if attention_mask is not None and not isinstance(attention_mask, _Deferred):
        raise ModelError(
            f"A packed row came with a mask of shape {list(attention_mask.shape)} and with segments. Expected no "
            "attention_mask: pack_batch takes it out."
        )
    lengths = _lengths(cu_seq_lens_q)
    pieces = [
        sdpa(module, q, k, v, None, dropout=dropout, scaling=scaling, **kwargs)[0]
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, 1), None


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, segment_mask)


def use_segment_attention(model: Any) -> Any:
    """Switch a model's language model from sdpa to attention by segment; the vision tower stays. Returns the model.

    Without segments (padded batches, generation) it is stock sdpa. Raises ModelError for a model that has another
    attention, or one that is not plain causal attention (sliding windows, linear layers).
    """
    text = model.config.get_text_config()
    if text._attn_implementation == SEGMENTS:
        return model
    name = type(model).__name__
    if text._attn_implementation != "sdpa":
        raise ModelError(
            f"Attention by segment replaces sdpa, but {name}'s language model has {text._attn_implementation!r}"
            f"{', which isolates packed samples itself' if 'flash' in str(text._attn_implementation) else ''}."
        )
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds or not getattr(text, "is_causal", True):
        raise ModelError(
            f"{name} has {', '.join(sorted(kinds)) or 'bidirectional attention'}; attention by segment does full causal "
            "attention only. Train it without packing."
        )
    part = next((key for key in model.config.sub_configs if getattr(model.config, key, None) is text), None)
    model.set_attn_implementation(SEGMENTS if part is None else {part: SEGMENTS})
    if text._attn_implementation != SEGMENTS:
        raise ModelError(f"{name} does not let its attention be chosen (transformers' AttentionInterface).")
    return model


def check_packing(model: Any, collator: Any) -> dict[str, Any]:
    """Prove on this model that packed samples do not see each other; raises ModelError with the size of the leak.

    Two samples with small drawn pictures are packed in one row. The last hidden states of each must be those of the
    sample alone, and those of the second must not change when the first becomes another one of the same length.
    collator: a ChatCollator, packing or not. Runs where the model is and in the autocast it is called in, without
    gradients; the model's modes, gradients and caches, and the random state, are as before.
    Returns the differences and tolerances. The collator's limit and counts are left out of it.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model  # under PEFT
    base, parameter = whole.base_model, next(whole.parameters())
    attention = str(whole.config.get_text_config()._attn_implementation)
    context, dtype = _precision(parameter, attention)
    first, second, other = _samples()
    collator = collator.apart() if hasattr(collator, "apart") else collator
    with _undisturbed(model), torch.no_grad(), context:
        packed, swapped = (_packed(collator, [neighbour, second]) for neighbour in (first, other))
        try:
            with _segments_required(attention == SEGMENTS and "cu_seq_lens_q" in packed):
                together, behind_other = (_hidden(base, inputs, parameter) for inputs in (packed, swapped))
        except TypeError as error:
            raise ModelError(f"{type(whole).__name__} does not take a packed row: {error}") from error
        singles = [_hidden(base, _alone(collator([row])), parameter) for row in (first, second)]
    name = f"{type(whole).__name__} with {attention} attention"
    if len(together) != sum(map(len, singles)):
        raise ModelError(f"{name}: {len(together)} packed tokens of samples of {[len(s) for s in singles]} tokens.")
    own = together[-len(singles[1]) :]
    found = (_worst(together, torch.cat(singles)), _worst(own, behind_other[-len(own) :]))
    for difference, tolerance, what in zip(
        found, TOLERANCES[dtype], ("alone and packed", "behind one sample and behind another"), strict=True
    ):
        if not difference <= tolerance:  # nan fails
            raise ModelError(
                f"Packing leaks in {name}: the hidden states of a token differ by {difference:.2g} of their size between "
                f"{what}; expected at most {tolerance:g} in {str(dtype)[6:]}. Train without packing."
            )
    return {
        "model": type(whole).__name__,
        "attention": attention,
        "dtype": str(dtype)[6:],
        "tokens": [len(s) for s in singles],
        "alone": found[0],
        "neighbour": found[1],
        "tolerance": list(TOLERANCES[dtype]),
    }


_bounds: tuple[weakref.ref[Tensor], int, list[int]] | None = None


def _lengths(bounds: Tensor) -> list[int]:
    """Segment lengths of cu_seq_lens [S + 1]; read once for all layers, since reading waits for a GPU."""
    global _bounds
    if _bounds is None or _bounds[0]() is not bounds or _bounds[1] != bounds._version:
        _bounds = (weakref.ref(bounds), bounds._version, bounds.diff().tolist())
    return _bounds[2]


def _samples() -> list[dict[str, Any]]:
    """Two samples of different texts and pictures, and one with the first's size but other pixels and words."""
    rows = []
    for size, colours, words, answer in (
        ((84, 56), ("red", "blue"), "Which is left, red or blue?", "red left"),
        ((56, 112), ("green", "white"), "Say what you see here.", "a green bar on white"),
        ((84, 56), ("blue", "red"), "Which is left, blue or red?", "left red"),
    ):
        picture = Image.new("RGB", size, colours[1])
        ImageDraw.Draw(picture).rectangle((0, 0, size[0] // 2, size[1] // 3 * 2), fill=colours[0])
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        rows.append({"messages": [user, reply], "images": [picture], "source": "packing self-test", "id": words})
    return rows


def _packed(collator: Callable[[Sequence[Any]], dict[str, Any]], rows: list[Any]) -> dict[str, Any]:
    batch = collator(rows)
    if len(batch["input_ids"]) == 1:  # the collator packs by itself
        return batch
    processor = collator.processor  # type: ignore[attr-defined]
    return pack_batch(batch, mrope=find_mrope(processor))


def _alone(batch: Mapping[str, Any]) -> dict[str, Any]:
    """One sample as its makers run it: with a mask, and positions of the model's own making."""
    plain = {key: value for key, value in batch.items() if key not in PACKED_KEYS}
    return {**plain, "attention_mask": torch.ones_like(batch["input_ids"]), "use_cache": False}


def _hidden(base: Any, batch: Mapping[str, Any], like: Tensor) -> Tensor:
    """The last hidden states [tokens, H] of a one-row batch."""
    taken = {*inspect.signature(type(base).forward).parameters, *PACKED_KEYS}
    inputs = {
        key: value.to(like.device, like.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in batch.items()
        if key in taken
    }
    return base(**inputs).last_hidden_state[0].float()  # type: ignore[no-any-return]


def _worst(states: Tensor, expected: Tensor) -> float:
    """The largest difference of a token's state, relative to its size."""
    return float(((states - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())


def _precision(parameter: Tensor, attention: str) -> tuple[Any, torch.dtype]:
    """(context, precision of the arithmetic). flash-attn takes no fp32, so fp32 weights mean bf16 autocast."""
    kind = parameter.device.type
    if torch.is_autocast_enabled(kind):
        return nullcontext(), torch.get_autocast_dtype(kind)
    if "flash" in attention and parameter.dtype == torch.float32:
        return torch.autocast(kind, torch.bfloat16), torch.bfloat16
    return nullcontext(), parameter.dtype


@contextmanager
def _segments_required(required: bool) -> Iterator[None]:
    global _dense_allowed
    _dense_allowed = not required
    try:
        yield
    finally:
        _dense_allowed = True


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode and its cached rope_deltas outside."""
    modes = {module: module.training for module in model.modules()}
    deltas = {module: module.rope_deltas for module in modes if hasattr(module, "rope_deltas")}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module, delta in deltas.items():
            module.rope_deltas = delta
