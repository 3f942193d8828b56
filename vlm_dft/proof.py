"""Proof: the gradients of the first steps in, a confirmation that exactly the parts to be trained are trained out, or an error."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlm_dft.errors import ModelError
from vlm_dft.families import PARTS, part_of
from vlm_dft.loss_head import sample_indices
from vlm_dft.objectives import IGNORE
from vlm_dft.parts import Parts, plain_name

SEEING = ("vision", "merger")  # without a picture they have no gradient
IMAGE_IDS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
PIXELS = re.compile(r"pixel|image_patches|flattened_patches")
CHOSEN = re.compile(r"\.experts\.\d+\.")  # an expert that no token was sent to
KEY_BIAS = re.compile(
    r"\.(k_proj|key)\.bias$"
)  # without rotary positions what it adds to all keys changes no attention


class GradientProof:
    """Looks at every parameter's gradient after the first step's backward pass, and for what sees after the first with a picture.

    Raises ModelError for a frozen parameter with a gradient, or a trained one without. `found`: {part: {"step",
    "gradient_norm", ...}} of the parts proved so far; on_proved is called with it when there are new ones.
    """

    def __init__(self, parts: Parts, on_proved: Callable[[dict[str, Any]], Any] = lambda found: None) -> None:
        self.parts, self.on_proved = parts, on_proved
        self.found: dict[str, Any] = {}
        self._pictures = False  # in this step so far, on this process
        self._engine: Any = None

    @property
    def done(self) -> bool:
        """Whether every part that is trained has been proved."""
        return set(self.parts.moving) <= set(self.found)

    @contextmanager
    def watching(self, trainer: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Around one micro-batch of a Trainer: looks at the gradients when it was the step's last."""
        self._pictures = self._pictures or sees(inputs, trainer.model.config)
        deepspeed = trainer.is_deepspeed_enabled
        if deepspeed and self._engine is None:
            self._engine = trainer.model_wrapped
            step = self._engine.step  # called within the backward pass, and takes the gradients away

            def look_and_step(*args: Any, **kwargs: Any) -> Any:
                if not self.done:
                    self.look(trainer)
                return step(*args, **kwargs)

            self._engine.step = look_and_step
        yield
        if not deepspeed and trainer.accelerator.sync_gradients:
            self.look(trainer)

    def look(self, trainer: Any) -> None:
        """Judge the gradients as they stand; every process must call it."""
        pictures = torch.tensor(float(self._pictures), device=trainer.args.device)
        seen = bool(trainer.accelerator.reduce(pictures, "sum") > 0)
        self._pictures = False
        if self.found and not seen:
            return  # only what sees is left to prove
        norms = gradient_norms(trainer.accelerator.unwrap_model(trainer.model), trainer.is_deepspeed_enabled)
        step = trainer.state.global_step + 1
        if bad := [name for name, (_, norm) in norms.items() if norm is not None and not math.isfinite(norm)]:
            raise ModelError(
                f"After the backward pass of step {step}, {len(bad)} gradients are not finite numbers: {_first(bad)}. A picture or a "
                "weight is not a number, or the precision overflows; look at the rows with `vlm-dft inspect`, or use precision fp32."
            )
        self._refuse_strangers(norms, step)
        if not any(norm for _, norm in norms.values()):
            return  # a step without a target, or all of whose weights are 0, proves nothing
        new = [part for part in self.parts.moving if part not in self.found and (seen or part not in SEEING)]
        for part in new:
            self.found[part] = self._proved(part, norms, step)
        if new:
            self.on_proved(self.found)

    def _refuse_strangers(self, norms: Mapping[str, tuple[bool, float | None]], step: int) -> None:
        strange = [
            name for name, (wanted, norm) in norms.items() if (wanted or norm) and not self.parts.trains(name)
        ]  # fmt: skip
        if strange:
            raise ModelError(
                f"After the backward pass of step {step}, {len(strange)} parameters that were to stay frozen "
                f"{'have a gradient' if any(norms[name][1] for name in strange) else 'are being trained'}: {_first(strange)}. Trained are "
                f"{self._said()}. Has something set requires_grad since the model was prepared?"
            )

    def _proved(self, part: str, norms: Mapping[str, tuple[bool, float | None]], step: int) -> dict[str, Any]:
        own = {
            name: norm for name, (_, norm) in norms.items()
            if part_of(name, self.parts.family) == part and self.parts.trains(name)
        }  # fmt: skip
        without = [name for name, norm in own.items() if not norm and not self._may_lack(name, own)]
        if len(without) == len([name for name in own if not self._may_lack(name, own)]) or (
            without and self.parts.family.unused is not None
        ):
            raise ModelError(
                f"After the backward pass of step {step}, {len(without)} of {len(own)} trained parameters of {part} have no gradient: "
                f"{_first(without)}. Expected one for each: {self._said()}. Is this part's output detached, or does the model not "
                "use it? Leave out what cannot be trained."
            )
        total = sum(norm**2 for norm in own.values() if norm) ** 0.5
        found: dict[str, Any] = {"step": step, "gradient_norm": total, "parameters": len(own)}
        return {**found, "without_gradient": list(map(plain_name, without))} if without else found

    def _may_lack(self, name: str, own: Mapping[str, float | None]) -> bool:
        """LoRA's A while B is 0, an expert that was not chosen, a bias of keys, what the family never uses."""
        unused = self.parts.family.unused
        if CHOSEN.search(name) or KEY_BIAS.search(name) or (unused is not None and re.search(unused, name)):
            return True
        return ".lora_A." in name and bool(own.get(name.replace(".lora_A.", ".lora_B.")))

    def _said(self) -> str:
        whole = [part for part in PARTS if part in self.parts.trained]
        adapted = list(self.parts.adapters.modules) if self.parts.adapters is not None else []
        return " and ".join(
            [*([", ".join(whole)] if whole else []), *([f"LoRA on {', '.join(adapted)}"] if adapted else [])]
        )


def gradient_norms(model: Any, deepspeed: bool) -> dict[str, tuple[bool, float | None]]:
    """{parameter: (whether it requires a gradient, the norm of the one it has or None)}, of all processes' gradient."""
    names, norms = [], []
    wanted = {}
    for name, parameter in model.named_parameters():
        wanted[name] = parameter.requires_grad
        gradient = parameter.grad
        if deepspeed and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_grad

            gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            names.append(name)
            norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    values: list[float] = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []
    found = dict(zip(names, values, strict=True))
    return {name: (wanted[name], found.get(name)) for name in wanted}


def sees(inputs: Mapping[str, Any], config: Any) -> bool:
    """Whether some target of a batch comes after a picture of its own sample: then the vision tower must get a gradient."""
    if not any(PIXELS.search(key) and isinstance(value, Tensor) for key, value in inputs.items()):
        return False
    ids, labels = inputs["input_ids"], inputs["labels"]
    media = torch.zeros_like(ids, dtype=torch.bool)
    for name in IMAGE_IDS:
        token = getattr(config, name, None)
        if isinstance(token, int):
            media |= ids == token
    types = inputs.get("mm_token_type_ids")
    media = media if types is None else media | (types > 0)
    mask = inputs.get("attention_mask")
    media = media if mask is None or mask.shape != ids.shape else media & mask.bool()
    samples = sample_indices(labels, dict(inputs))
    number = samples + torch.arange(len(ids), device=ids.device).unsqueeze(1) * (int(samples.max()) + 1)
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    first = torch.full((int(number.max()) + 1,), ids.shape[1], device=ids.device)
    first = first.scatter_reduce(0, number[media], places[media], "amin")
    targets = labels != IGNORE
    return bool((places[targets] > first[number[targets]]).any())


def _first(names: list[str]) -> str:
    shown = ", ".join(map(plain_name, names[:4]))
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
