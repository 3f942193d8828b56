"""Features of pictures that come again: computed once, the same loss and gradients, never for a tower that is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_packing import CLASSES, make_model
from test_training import config_of
from torch import nn

from vlm_dft import ChatCollator
from vlm_dft.config import resolve_config
from vlm_dft.errors import ConfigError
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import add_lora, freeze_parts, load_model
from vlm_dft.progress import read_metrics
from vlm_dft.training import train_objective
from vlm_dft.vision_cache import KEYS, KeyedCollator, VisionCache, picture_keys, why_not_cached

torch.set_num_threads(1)
ROOM = 1e9


def frozen(model: Any) -> Any:
    freeze_parts(model, {"language", "head"})
    return attach_loss(model).train()


def loss_and_gradients(model: Any, batch: dict[str, Any], cache: VisionCache | None) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    inputs = dict(batch)
    keys = inputs.pop(KEYS)
    if cache is not None:
        features = cache.features(model, keys, inputs.pop("pixel_values"), inputs["image_grid_thw"])
        inputs["mm_encoder_outputs"] = {"image": features}
    loss = model(**inputs, objective="dft")["loss"]
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["embedded", *CLASSES])
def test_loss_and_gradients_are_those_without_a_cache(
    kind: str, packing: bool, processor: Any, drawn: list[Any]
) -> None:
    """A picture alone and the same one among others differ by rounding; what comes out of the cache is the same bits again."""
    model = frozen(load_model("tiny", dtype=torch.float64) if kind == "embedded" else make_model(kind).double())
    batch = KeyedCollator(ChatCollator(processor, packing=packing))(drawn[:4])
    batch = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in batch.items()}
    plain, gradients = loss_and_gradients(model, batch, None)
    cache = VisionCache(ROOM)
    first, second = (loss_and_gradients(model, batch, cache) for _ in range(2))
    assert first[0] == pytest.approx(plain, rel=1e-12) and set(first[1]) == set(gradients)
    assert all((first[1][n] - g).norm() <= 1e-9 * g.norm() for n, g in gradients.items())
    assert second[0] == first[0] and all(torch.equal(second[1][n], g) for n, g in first[1].items())
    pictures = len(batch["image_grid_thw"])
    assert (cache.misses, cache.hits) == (pictures, pictures)


def test_a_picture_is_known_in_another_batch_and_its_features_do_not_depend_on_neighbours(
    processor: Any, drawn: list[Any]
) -> None:
    collate = KeyedCollator(ChatCollator(processor))
    model = frozen(load_model("tiny"))
    cache, fresh = VisionCache(ROOM), VisionCache(ROOM)
    for rows in (drawn[:3], [drawn[5], drawn[1]]):
        batch = collate(rows)
        found = cache.features(model, batch[KEYS], batch["pixel_values"], batch["image_grid_thw"])
    assert cache.hits == 1  # drawn[1] in its second batch
    apart = fresh.features(model, batch[KEYS], batch["pixel_values"], batch["image_grid_thw"])
    assert all(torch.equal(a, b) for a, b in zip(found.pooler_output, apart.pooler_output, strict=True))


def test_keys_are_of_the_content_the_shape_and_nothing_else() -> None:
    pixels = torch.arange(24 * 1176, dtype=torch.float32).view(24, 1176)
    grids = torch.tensor([[1, 2, 6], [1, 6, 2]])
    keys = picture_keys(torch.cat([pixels[:12], pixels[:12]]), grids)
    assert keys.shape == (2, 2) and not torch.equal(keys[0], keys[1])  # the same patches in another shape
    same = picture_keys(torch.cat([pixels[12:], pixels[:12]]), grids.flip(0))
    assert torch.equal(same[1], keys[0])  # elsewhere in another batch
    other = pixels[:12].clone()
    other[11, 1175] += 1e-3
    assert not torch.equal(picture_keys(other, grids[:1])[0], keys[0])


def test_memory_is_bounded_and_what_is_in_stays(processor: Any, drawn: list[Any]) -> None:
    model = frozen(load_model("tiny"))
    batch = KeyedCollator(ChatCollator(processor))(drawn[:6])
    one = 4 * 128 * int(batch["image_grid_thw"][0].prod()) // 4  # bytes of the first picture's features, [tokens, 128]
    cache = VisionCache(one * 1.5)
    for _ in range(2):
        cache.features(model, batch[KEYS], batch["pixel_values"], batch["image_grid_thw"])
    assert one <= cache.bytes <= cache.limit and 1 <= len(cache.known) < 6
    assert cache.hits >= len(cache.known)


def test_a_tower_that_changes_or_drops_out_is_refused() -> None:
    model = load_model("tiny")
    freeze_parts(model, {"language", "merger"})
    assert "merger" in why_not_cached(model, sharded=False) and "is trained" in why_not_cached(model, sharded=False)
    freeze_parts(model, {"language"})
    assert why_not_cached(model, sharded=False) == ""
    assert "shards" in why_not_cached(model, sharded=True)
    model.model.visual.blocks[0].mlp.dropout = nn.Dropout(0.1)
    assert "drops out" in why_not_cached(model, sharded=False)
    assert why_not_cached(add_lora(load_model("tiny"), 2), sharded=False) == ""


def test_settings_that_contradict_it_are_refused_before_a_model_is_loaded() -> None:
    assert resolve_config(("test", {"vision_cache": "2"})).parts["vision_cache"] == 2.0
    with pytest.raises(ConfigError, match="vision or merger is trained"):
        resolve_config(("test", {"vision_cache": 1, "train_parts": "merger,language"}))
    with pytest.raises(ConfigError, match="engine shards it"):
        resolve_config(("test", {"vision_cache": 1, "engine": "zero2", "processes": 2, "batch_size": 8}))


def test_a_run_over_two_epochs_learns_the_same_and_says_what_it_saved(drawn: list[Any], tmp_path: Path) -> None:
    said: list[str] = []
    losses = []
    for room in (0, 1):
        config = config_of(epochs=2, vision_cache=room, logging_steps=1)
        train_objective(config, "dft", drawn[:16], tmp_path / str(room), echo=said.append)
        losses.append([row["loss"] for row in read_metrics(tmp_path / str(room) / "metrics.jsonl")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4
    pictures = sum(len(example.images) for example in drawn[:16])
    assert any(f"50% of {2 * pictures} pictures were known" in str(line) for line in said)


def test_the_collator_in_it_is_still_itself(processor: Any) -> None:
    collator = ChatCollator(processor)
    keyed = KeyedCollator(collator)
    assert keyed.processor is processor and keyed.packing == collator.packing
    assert KEYS not in keyed(
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    )
