"""Probing: a model and batches that it was not trained on in; its p of the response tokens, and the objective that fits, out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_dft.diagnostics import ENOUGH, STARVED_SHARE, p_histogram
from vlm_dft.kinds import KINDS
from vlm_dft.objectives import IGNORE

STRONG, WEAK = 0.5, 0.1  # mean p of the responses: DFT holds above, SFT wins below (arXiv 2508.05629, 2510.00526)
STARVED_FEW, STARVED_MANY = 0.05, 0.2  # share of tokens with p < 0.1; ours, from the embedded recipes (README)
LOOKING = 0.02  # gain in mean p by the picture, below which (or below 2 standard errors) the model is said not to look
PIXELS = ("pixel_values", "pixel_values_videos")
RECOMMENDED = {"strong": "dft", "middle": "floor(minimum=0.1)", "weak": "nll"}


def token_summary(log_p: Tensor, lengths: Sequence[int]) -> dict[str, float | int]:
    """Summary of log p [n] of response tokens under one model; `lengths`: tokens of each response, in order (sum n).

    stderr_p is that of a mean over responses: the tokens of one response are not independent.
    """
    if log_p.numel() == 0 or sum(lengths) != log_p.numel():
        raise ValueError(
            f"Expected the log p of responses of at least one token, found {log_p.numel()} of {sum(lengths)}."
        )
    p = log_p.double().exp()
    mean, count = p.mean(), len(lengths)
    excess = torch.stack([(part - mean).sum() for part in p.split(list(lengths))])  # of a ratio of sums
    spread = (excess.square().sum() * count / max(1, count - 1)).sqrt() / p.numel()
    return {
        "tokens": log_p.numel(),
        "responses": count,
        "mean_p": mean.item(),
        "stderr_p": spread.item(),
        "median_p": p.median().item(),
        "share_p_below_0.1": (p < 0.1).double().mean().item(),
        "share_p_above_0.9": (p > 0.9).double().mean().item(),
        "nll": -log_p.double().mean().item(),
    }


@torch.no_grad()
def gauge(
    model: Any, batches: Iterable[Mapping[str, Any]], *, sources: Sequence[str] = (), blank: bool = False
) -> dict[str, Any]:
    """The capability gauge: a model's p of the response tokens of batches, before any training on them.

    The model has the fused loss attached (loss_head.attach_loss). sources: ChatCollator's `tag_sources`, for the kinds of
    tokens and for each source apart. blank: also with every picture made the mean grey, to see whether it is looked at.
    Returns the summary of all tokens and, under "sources", of each source: token_summary, "prior" ("strong", "middle",
    "weak"), "prediction" (what to expect of DFT against SFT), "objective" and "full_weight" (what is recommended),
    "histogram" {bin: share}, "kinds" {kind: tokens, mean_p, share_p_below_0.1}, and "blank" {mean_p, median_p, gain,
    stderr_gain, looking, histogram} or None where there was no picture.
    """
    model.eval()
    device = next(model.parameters()).device
    rows: list[dict[str, Any]] = []
    for batch in batches:
        inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        kinds, owners = inputs.pop("token_kinds", None), inputs.pop("source_ids", None)
        for key in ("loss_weights", "objective_ids"):
            inputs.pop(key, None)
        targets = inputs["labels"][:, 1:] != IGNORE
        lengths = targets.sum(1).tolist()
        found = {"log_p": model(**inputs, objective="nll")["log_p"]}
        if blank and any(key in inputs for key in PIXELS):
            empty = {key: torch.zeros_like(inputs[key]) for key in PIXELS if key in inputs}
            found["blank"] = model(**{**inputs, **empty}, objective="nll")["log_p"]
        if kinds is not None and owners is not None:
            found |= {"kinds": kinds[:, 1:][targets], "owner": owners[:, 1:][targets]}
        pieces = {key: value.cpu().split(lengths) for key, value in found.items()}
        types = inputs.get("mm_token_type_ids")
        pictured = [True] * len(lengths) if types is None else (types > 0).any(1).tolist()  # one row may have none
        rows += [
            {key: value[k] for key, value in pieces.items() if key != "blank" or pictured[k]}
            for k, length in enumerate(lengths) if length
        ]  # fmt: skip
    apart = {
        source: _summary([row for row in rows if "owner" in row and int(row["owner"][0]) == k])
        for k, source in enumerate(sources)
        if any("owner" in row and int(row["owner"][0]) == k for row in rows)
    }
    return {**_summary(rows), "sources": apart}


def _summary(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """What gauge returns of some responses: {"log_p", "blank", "kinds" [n]} each."""
    log_p = torch.cat([row["log_p"] for row in rows])
    found: dict[str, Any] = token_summary(log_p, [len(row["log_p"]) for row in rows])
    kinds: dict[str, dict[str, float]] = {}
    if rows and "kinds" in rows[0]:
        bits, p = torch.cat([row["kinds"] for row in rows]), log_p.double().exp()
        for kind, bit in KINDS.items():
            own = p[(bits & bit) != 0]
            if len(own):
                share = (own < 0.1).double().mean().item()
                kinds[kind] = {"tokens": len(own), "mean_p": own.mean().item(), "share_p_below_0.1": share}
    prior, prediction = predict(found["mean_p"], found["share_p_below_0.1"])
    starved = [
        kind for kind, row in kinds.items() if row["tokens"] >= ENOUGH and row["share_p_below_0.1"] > STARVED_SHARE
    ]
    return {
        **found,
        "prior": prior,
        "prediction": prediction,
        "objective": RECOMMENDED[prior],
        "full_weight": starved if prior != "weak" else [],
        "histogram": p_histogram(log_p.exp()),
        "kinds": kinds,
        "blank": _looking([row for row in rows if "blank" in row]),
    }


def _looking(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Any] | None:
    """What the picture adds to mean p: the same tokens with it and with a blank one; the error is that over responses."""
    if not rows:
        return None
    gains = [row["log_p"].double().exp() - row["blank"].double().exp() for row in rows]
    gain = torch.cat(gains).mean()
    tokens, count = sum(map(len, gains)), len(gains)
    excess = torch.stack([(part - gain).sum() for part in gains])
    error = float((excess.square().sum() * count / max(1, count - 1)).sqrt() / tokens)
    p = torch.cat([row["blank"].double().exp() for row in rows])
    looking = float(gain) >= LOOKING and float(gain) > 2 * error
    return {
        "mean_p": p.mean().item(),
        "median_p": p.median().item(),
        "gain": float(gain),
        "stderr_gain": error,
        "looking": looking,
        "histogram": p_histogram(p),
    }


def predict(mean_p: float, starved: float) -> tuple[str, str]:
    """("strong" | "middle" | "weak", what to expect) from the mean p and the share of response tokens with p < 0.1.

    The mean alone misleads where responses are long and regular: easy tokens lift it, while the few that carry the new
    skill may all be starved. So both have to be good for a strong prior, and either can make it weak.
    """
    found = f"mean p {mean_p:.2f}, {starved:.0%} of the tokens below p = 0.1"
    if mean_p < WEAK or starved > STARVED_MANY:
        return "weak", (
            f"weak prior ({found}): DFT weighs a token by its p, so what is new here hardly pulls. Plain SFT is expected to "
            "learn it faster; use OBJECTIVE=nll."
        )
    if mean_p >= STRONG and starved < STARVED_FEW:
        return "strong", (
            f"strong prior ({found}): DFT is expected to keep what the model knows and to resist wrong labels, which have "
            "low p; plain SFT to follow them."
        )
    return "middle", (
        f"middle prior ({found}): neither is expected to win clearly; the more tokens are below 0.1, the more SFT is "
        "favoured. Compare with OBJECTIVE=dft,nll."
    )
