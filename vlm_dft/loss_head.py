"""Loss head: a Hugging Face model in; the same model with a forward that returns the fused loss of response rows out.

The loss lives in the output head's own forward: a call through the module is what makes DeepSpeed and FSDP gather its weight.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from vlm_dft.anchor import Anchor, Direction, check_direction
from vlm_dft.errors import ModelError
from vlm_dft.last_layer import last_rows_alone
from vlm_dft.linear_loss import fused_linear_loss
from vlm_dft.objectives import IGNORE, Objective
from vlm_dft.packing import PACKED_KEYS

TAGS = ("token_kinds", "source_ids")  # of ChatCollator's tag_sources: for diagnostics, not for the model


@dataclass(frozen=True, slots=True)
class Kl:
    """A KL term to the starting model: see anchor.Anchor for strength and direction.

    hidden, weight, bias: of the reference, where it is a model of its own; None: the model itself, its adapters switched off.
    """

    strength: float
    direction: Direction
    hidden: Tensor | None = None  # [n, H], of the target rows
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Compatibility:
    """CADFT's sample-level factor exp(-beta * max(0, z)), z of the sample's mean NLL (arXiv 2606.11206).

    mean, deviation: of the mean NLLs of samples; deviation 0 makes every factor 1.
    """

    beta: float
    mean: float
    deviation: float

    def factors(self, log_p: Tensor, samples: Tensor) -> Tensor:
        """[n] factors of tokens from their log p [n] and the index [n] of each one's sample."""
        mean_nll = -sample_means(log_p, samples)
        z = (mean_nll - self.mean) / self.deviation if self.deviation > 0 else torch.zeros_like(mean_nll)
        return (-self.beta * z.clamp(min=0)).exp()[samples]


def sample_means(values: Tensor, samples: Tensor) -> Tensor:
    """[S], the mean of values [n] over the tokens of each sample, by index [n]; 0 for one without tokens."""
    count = int(samples.max()) + 1 if samples.numel() else 0
    sums = values.new_zeros(count).index_add_(0, samples, values)
    return sums / torch.bincount(samples, minlength=count).clamp(min=1)


class _Head(Protocol):
    weight: Tensor
    bias: Tensor | None


class LossMixin:
    """An output head whose forward returns, given `targets`, the loss and its statistics instead of logits."""

    soft_cap: float | None = None
    in_place = (
        False  # the weight's gradient goes straight into weight.grad: one process, no engine that reduces or shards
    )
    _kept: Tensor | None = None

    def forward(self, hidden: Tensor, *args: Any, targets: Tensor | None = None, **settings: Any) -> Any:
        """Logits; with targets [n] {"loss": scalar, "log_p", "weight", "entropy" [n] (and "kl" [n])}."""
        if targets is None:
            return super().forward(hidden, *args, **settings)  # type: ignore[misc]
        base, low_rank = self._terms(hidden)
        anchor, reference = settings.pop("kl", None), settings.pop("reference", None)
        if anchor is not None:
            weight, bias = (base.weight, base.bias) if anchor.weight is None else (anchor.weight, anchor.bias)
            held = reference if anchor.hidden is None else anchor.hidden
            settings["anchor"] = Anchor(held, weight, anchor.strength, anchor.direction, bias, self.soft_cap)
        compatibility, samples = settings.pop("compatibility", None), settings.pop("samples", None)
        common: dict[str, Any] = {"bias": base.bias, "low_rank": low_rank, "soft_cap": self.soft_cap}
        if compatibility is not None:
            with torch.no_grad():  # a sample's factor must be known before the gradients of its tokens are formed
                _, seen = fused_linear_loss(hidden, base.weight, targets, objective="nll", return_stats=True, **common)
            factors = compatibility.factors(seen.log_p, samples)
            given = settings.get("token_weights")
            settings["token_weights"] = factors if given is None else given * factors
        loss, stats = fused_linear_loss(
            hidden, base.weight, targets, weight_grad=self._weight_grad(base), return_stats=True, **common, **settings
        )
        found = {"loss": loss, "log_p": stats.log_p, "weight": stats.weight, "entropy": stats.entropy}
        return found if stats.kl is None else {**found, "kl": stats.kl}

    def _terms(self, hidden: Tensor) -> tuple[_Head, tuple[Tensor, Tensor] | None]:
        """The layer with weight and bias, and the low-rank term of an adapter."""
        return cast(_Head, self), None

    def _weight_grad(self, base: _Head) -> Tensor | None:
        """weight.grad to add to, made of last step's buffer where an optimiser has taken it away; None: autograd's way."""
        weight = base.weight
        if not (self.in_place and torch.is_grad_enabled() and weight.requires_grad and weight.dtype.itemsize >= 4):
            return None
        if weight.grad is None:
            fits = self._kept is not None and self._kept.shape == weight.shape and self._kept.device == weight.device
            weight.grad = self._kept.zero_() if fits and self._kept is not None else torch.zeros_like(weight)
        self._kept = weight.grad
        return weight.grad


class LossLinear(LossMixin, nn.Linear):  # type: ignore[misc]  # whose forward takes more
    """A linear head with the loss."""


class _LossLora(LossMixin):
    """A head under a LoRA adapter of peft, with the loss: the adapter is a low-rank term of the logits, never merged."""

    def _terms(self, hidden: Tensor) -> tuple[_Head, tuple[Tensor, Tensor] | None]:
        layer: Any = self
        base: _Head = layer.get_base_layer()
        if layer.disable_adapters or layer.merged or not layer.active_adapters:
            return base, None
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        variant = getattr(layer, "lora_variant", {})
        if len(names) != 1 or names[0] in variant or getattr(layer, "fan_in_fan_out", False):
            raise ModelError(
                f"The output head has the adapters {names}{' with a variant such as DoRA' if variant else ''}. Expected one "
                "plain LoRA adapter. Take the head out of target_modules, or use a plain one."
            )
        a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
        if b.bias is not None:
            raise ModelError("The LoRA adapter of the output head has a bias (lora_bias=True), expected none.")
        rows = layer.lora_dropout[names[0]](hidden.to(a.weight.dtype))
        return base, (a(rows) * layer.scaling[names[0]], b.weight)


def give_loss(head: Any) -> Any:
    """Turn an output head into one with the loss, in place: its class is changed, its hooks and its weights are not."""
    if isinstance(head, LossMixin):
        return head
    if hasattr(head, "modules_to_save"):  # peft's, of a head trained whole beside adapters: it passes everything on
        for own in _held(head):
            give_loss(own)
        return head
    if type(head) is nn.Linear:
        head.__class__ = LossLinear
        return head
    if (
        type(head).__module__.startswith("peft.")
        and hasattr(head, "lora_A")
        and isinstance(head.get_base_layer(), nn.Linear)
    ):
        cap = getattr(head.get_base_layer(), "soft_cap", None)
        head.__class__ = type(f"Loss{type(head).__name__}", (_LossLora, type(head)), {})
        head.soft_cap = cap
        return head
    raise ModelError(
        f"Expected the output head to be a plain nn.Linear, or one with a LoRA adapter, found {type(head).__name__}. "
        "Attach the loss before the model is wrapped or quantised."
    )


def _held(head: Any) -> list[Any]:
    """The heads in peft's wrapper of one that is trained whole; else the head."""
    return [head.original_module, *head.modules_to_save.values()] if hasattr(head, "modules_to_save") else [head]


def attach_loss(model: Any) -> Any:
    """Give a Hugging Face model a forward that takes `labels`, `objective` and `num_items` and returns loss and statistics.

    With `objective` (a name or a function) the forward returns {"loss": scalar, "log_p": [n], "weight": [n], "entropy": [n]}
    from response rows alone, through the head module's own forward; without it the model is what it was. It also takes
    what ChatCollator adds (`loss_weights`, `objective_ids` [B, L], the keys of packed rows), `full_weight` [B, L] bool,
    `kl` (Kl; with adapters and no hidden states of its own, the reference is this model with them off, on the same
    inputs; adds "kl": [n]) and `compatibility`. Works before and after peft has wrapped the model or its head.
    Raises ModelError for a head that is neither a plain Linear nor one with plain LoRA.
    """
    if hasattr(model, "get_base_model"):  # peft's wrapper passes everything on to the model in it
        attach_loss(model.get_base_model())
        return model
    if not hasattr(model, "model") or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is not a decoder whose hidden states `model.model` gives to a head: the loss on response rows alone "
            "cannot be attached. Train it in a stock Trainer with dft_loss, which takes the logits as they are."
        )
    text = model.config.get_text_config()
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ModelError(
                f"{type(model).__name__} scales its logits ({name} = {getattr(text, name)}), which is not supported."
            )
    head = give_loss(model.get_output_embeddings())
    for own in _held(head):
        own.soft_cap = getattr(text, "final_logit_softcapping", None)
    original = model.forward
    keys = set(inspect.signature(type(model).forward).parameters)

    def forward(
        self: Any,
        *args: Any,
        labels: Any = None,
        objective: str | Objective | None = None,
        num_items: Any = None,
        loss_weights: Any = None,
        objective_ids: Any = None,
        full_weight: Any = None,
        kl: Kl | None = None,
        compatibility: Compatibility | None = None,
        **inputs: Any,
    ) -> Any:
        if objective is None:
            return original(*args, labels=labels, **inputs)
        if args or labels is None:
            raise TypeError("A forward with objective= takes keyword inputs and labels.")
        inputs = {key: value for key, value in inputs.items() if key not in TAGS}
        unknown = set(inputs) - keys - set(PACKED_KEYS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} takes no {sorted(unknown)}. Did the collator of another model make this batch?"
            )
        rows = labels[:, 1:] != IGNORE
        settings: dict[str, Any] = {"objective": objective, "num_items": num_items}
        for name, given in (
            ("token_weights", loss_weights),
            ("objective_ids", objective_ids),
            ("full_weight", full_weight),
        ):
            if given is not None:
                settings[name] = given[:, 1:][rows]
        if compatibility is not None:
            settings |= {"compatibility": compatibility, "samples": sample_indices(labels, inputs)[:, 1:][rows]}
        if kl is not None:
            check_direction(kl.direction, kl.strength)
            settings["kl"] = kl
            if kl.hidden is None:
                with adapters_off(self), torch.no_grad():
                    settings["reference"] = response_hidden(self, labels, inputs)
        head = give_loss(self.get_output_embeddings())  # peft may have wrapped it since
        return head(response_hidden(self, labels, inputs), targets=labels[:, 1:][rows], **settings)

    model.forward = types.MethodType(forward, model)
    model.gives_token_loss = True
    return model


@torch.no_grad()
def check_loss(model: Any, batch: dict[str, Any]) -> float:
    """The largest difference of a target's log p by the attached loss from that by the model's own logits.

    A family may do more to its logits than a head and a soft cap: what is trained must be what answers. Raises ModelError
    where they differ by more than rounding (0.1 in half precision, else 1e-3), in the mean over the targets.
    """
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            ours = model(**inputs, objective="nll")["log_p"]
            labels = inputs.pop("labels")
            logits = model(**inputs).logits[:, :-1].float()
    finally:
        model.train(was_training)
    rows = labels[:, 1:] != IGNORE
    own = logits[rows].log_softmax(-1).gather(1, labels[:, 1:][rows].unsqueeze(1)).squeeze(1)
    difference = (ours.float() - own).abs()
    half = device.type == "cuda" or next(model.parameters()).dtype.itemsize < 4
    if not float(difference.mean()) < (0.1 if half else 1e-3):
        raise ModelError(
            f"The attached loss is not that of {type(model).__name__}'s own logits: log p of {len(own)} tokens differs by "
            f"{float(difference.mean()):.3g} in the mean. Expected its logits to be the head's output (with a soft cap, if its config "
            "says so). Train it in a stock Trainer with dft_loss, which takes the logits as they are."
        )
    return float(difference.max())


def response_hidden(model: Any, labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[n, H], the last hidden states of the rows that predict a target; all vision inputs are passed on."""
    rows = nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1))  # [B, L]; the last predicts nothing
    with last_rows_alone(model, rows):
        hidden = model.model(**{**inputs, "use_cache": False}).last_hidden_state  # [B, L, H]
    return cast(Tensor, hidden[rows])


def sample_indices(labels: Tensor, inputs: dict[str, Any]) -> Tensor:
    """[B, L], which sample each token belongs to: its row, or in packed rows [1, L] its segment."""
    rows, length = labels.shape
    bounds = inputs.get("cu_seq_lens_q")
    if bounds is None:
        return torch.arange(rows, device=labels.device).unsqueeze(1).expand(rows, length)
    places = torch.arange(length, device=labels.device)
    return (torch.searchsorted(bounds.to(labels.device), places, right=True) - 1).unsqueeze(0)


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model without its LoRA adapters. Raises ModelError where it has none."""
    layers = [
        module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "_disable_adapters")
    ]
    if not layers:
        raise ModelError(
            "A KL term needs a reference: the model has no adapters to switch off. Train with LoRA, or give the starting "
            "model's own hidden states."
        )
    others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    if others:
        raise ModelError(
            f"With its adapters off the model is not the one that training began with: {others[0]} and {len(others) - 1} more are "
            "trained too. Train LoRA alone, or give the reference as a frozen copy."
        )
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:  # peft's own switch also sets requires_grad, under which engines have built their buckets
            layer._disable_adapters = True
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
