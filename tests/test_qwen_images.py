"""Qwen-VL's image path, against the Hugging Face image processor and qwen_vl_utils: every bit of it."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.io import decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from vlm_dft.qwen_images import QwenImages

LIMITS = {"shortest_edge": 4 * 28 * 28, "longest_edge": 60 * 28 * 28}
SIDES = st.integers(1, 400)
LONG = st.tuples(st.integers(1, 6), st.floats(150, 200), st.booleans()).map(
    lambda drawn: (drawn[0], int(drawn[0] * drawn[1]))[:: 1 if drawn[2] else -1]
)
SIZES = st.one_of(st.tuples(SIDES, SIDES).filter(lambda size: max(size) <= 200 * min(size)), LONG)  # (height, width)


def image_processor(patch_size: int = 14, **settings: Any) -> Any:
    """The image processor of Qwen2-VL and Qwen2.5-VL (14), or of Qwen3-VL (16)."""
    from transformers import Qwen2VLImageProcessor

    if patch_size == 16:
        settings = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings}
    return Qwen2VLImageProcessor(**{"size": dict(LIMITS), **settings})


def path_of(processor: Any, **options: Any) -> QwenImages:
    found = QwenImages.of(processor, **options)
    assert found is not None
    return found


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Noise, with a smooth part and flat parts in pure black and white, where bicubic over- and undershoots."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draw)
    pixels[height // 2 :, : width // 2] = 255
    pixels[height // 2 :, width // 2 :] = 0
    return Image.fromarray(pixels.numpy())


def as_tensor(image: Image.Image) -> Tensor:
    """Channels first in memory."""
    return transforms.pil_to_tensor(image)


def equal(found: tuple[Tensor, Tensor], expected: Any) -> bool:
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64
    return torch.equal(found[0], expected["pixel_values"]) and torch.equal(found[1], expected["image_grid_thw"])


@pytest.fixture(scope="module", params=[14, 16], ids=["Qwen2.5-VL", "Qwen3-VL"])
def theirs(request: pytest.FixtureRequest) -> Any:
    return image_processor(request.param)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(SIZES, min_size=1, max_size=3), seed=st.integers(0, 99))
@example(sizes=[(1, 1), (1, 200), (200, 1)], seed=0)
@example(sizes=[(112, 140), (112, 140), (128, 160)], seed=1)  # not resized at patch size 14, and at 16
@example(sizes=[(3, 3), (4, 3), (3, 1)], seed=2)
def test_pictures_of_any_size_give_the_tensors_of_the_image_processor(
    theirs: Any, sizes: list[tuple[int, int]], seed: int
) -> None:
    images = [picture(*size, seed + k) for k, size in enumerate(sizes)]
    ours = path_of(theirs)
    expected = theirs(images=images, return_tensors="pt")
    assert equal(ours(images), expected)
    planar = [as_tensor(image) for image in images]
    assert equal(ours(planar), expected)
    interleaved = [tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1) for tensor in planar]
    assert equal(ours(interleaved), expected)
    assert [ours.grid(*size) for size in sizes] == [tuple(row) for row in expected["image_grid_thw"].tolist()]


def test_a_picture_of_many_blocks_and_one_of_many_frames() -> None:
    for settings_ in (
        {"size": {"shortest_edge": 56**2, "longest_edge": 4_000_000}},
        {"temporal_patch_size": 1},
        {"merge_size": 4},
    ):
        theirs = image_processor(**settings_)
        images = [picture(1100, 1300), picture(90, 700)]
        assert equal(path_of(theirs)(images), theirs(images=images, return_tensors="pt"))


def test_every_level_of_every_channel_becomes_the_float_of_the_processor(theirs: Any) -> None:
    side = theirs.patch_size * theirs.merge_size
    levels = torch.arange(4 * side * side).remainder(256).to(torch.uint8).view(2 * side, 2 * side)
    tensor = torch.stack([levels, levels.flip(0), levels.T])
    assert all(len(channel.unique()) == 256 for channel in tensor)
    assert equal(path_of(theirs)([tensor]), theirs(images=[tensor], return_tensors="pt"))


def test_real_pictures_give_the_tensors_of_the_image_processor(shared: Path, theirs: Any) -> None:
    files = sorted((shared / "tabmwp/data/tabmwp/tables").glob("*.png"))[:60]
    assert files
    images = [Image.open(file).convert("RGB") for file in files]
    theirs = image_processor(theirs.patch_size, size={"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28})
    ours = path_of(theirs)
    expected = theirs(images=images, return_tensors="pt")
    assert equal(ours(images), expected)
    assert equal(ours([decode_image(str(file)) for file in files]), expected)


def test_each_picture_may_have_its_own_limits(theirs: Any) -> None:
    images = [picture(90, 130), picture(90, 130), picture(300, 500)]
    keys = [{}, {"min_pixels": 40_000, "max_pixels": 50_000}, {"max_pixels": 20_000}]
    values, grids = path_of(theirs)(images, keys)
    sizes = [
        LIMITS,
        {"shortest_edge": 40_000, "longest_edge": 50_000},
        {"shortest_edge": LIMITS["shortest_edge"], "longest_edge": 20_000},
    ]
    one_by_one = [theirs(images=[i], size=s, return_tensors="pt") for i, s in zip(images, sizes, strict=True)]
    assert torch.equal(values, torch.cat([one["pixel_values"] for one in one_by_one]))
    assert torch.equal(grids, torch.cat([one["image_grid_thw"] for one in one_by_one]))
    with pytest.raises(TypeError, match="max_pixel"):
        path_of(theirs)(images[:1], [{"max_pixel": 3}])
    with pytest.raises(ValueError, match="shorter"):
        path_of(theirs)(images, keys[:1])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 400), st.integers(8, 400)), seed=st.integers(0, 99),
    keys=st.one_of(
        st.just({}),
        st.fixed_dictionaries({}, optional={"min_pixels": st.integers(1, 40_000), "max_pixels": st.integers(40_000, 200_000)}),
        st.fixed_dictionaries({"resized_height": st.integers(1, 300), "resized_width": st.integers(60, 200)}),
    ),
)  # fmt: skip
@example(size=(10, 1000), seed=0, keys={})  # a side that transformers rounds to 0 and qwen_vl_utils does not
def test_pillow_mode_gives_what_qwen_vl_utils_and_then_the_processor_give(
    theirs: Any, size: tuple[int, int], seed: int, keys: dict[str, int]
) -> None:
    vision = pytest.importorskip("qwen_vl_utils")
    image = picture(*size, seed)
    part = {"type": "image", "image": image, **keys}
    resized, _ = vision.process_vision_info([{"role": "user", "content": [part]}], image_patch_size=theirs.patch_size)
    expected = theirs(images=resized, do_resize=False, return_tensors="pt")
    ours = path_of(theirs, resize="pillow")
    assert equal(ours([image], [keys]), expected)
    assert equal(ours([as_tensor(image)], [keys]), expected)


def test_pillow_mode_over_real_pictures(shared: Path, theirs: Any) -> None:
    vision = pytest.importorskip("qwen_vl_utils")
    files = sorted((shared / "tabmwp/data/tabmwp/tables").glob("*.png"))[60:80]
    keys = {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
    parts = [{"type": "image", "image": str(file), **keys} for file in files]
    resized, _ = vision.process_vision_info([{"role": "user", "content": parts}], image_patch_size=theirs.patch_size)
    ours = replace(path_of(theirs, resize="pillow"), **keys)
    found = ours([Image.open(file).convert("RGB") for file in files])
    assert equal(found, theirs(images=resized, do_resize=False, return_tensors="pt"))


def test_a_given_size_is_that_size_in_processor_mode_too(theirs: Any) -> None:
    image = picture(77, 130)
    side = theirs.patch_size * theirs.merge_size
    scaled = transforms.resize(as_tensor(image), [3 * side, 5 * side], interpolation=InterpolationMode.BICUBIC)
    expected = theirs(images=[scaled], do_resize=False, return_tensors="pt")
    keys = {"resized_height": 3 * side + 5, "resized_width": 5 * side - 5, "max_pixels": 1}
    assert equal(path_of(theirs)([image], [keys]), expected)


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 5000), width=st.integers(1, 5000), low=st.integers(1, 10**6), more=st.integers(0, 10**7),
)  # fmt: skip
def test_the_grid_is_what_the_processor_counts(height: int, width: int, low: int, more: int) -> None:
    theirs = image_processor()
    ours = path_of(theirs)
    limits = {"min_pixels": low, "max_pixels": low + more}
    if max(height, width) / min(height, width) > 200:
        refusals = []
        for count in (theirs.get_number_of_image_patches, lambda h, w, keys: ours.grid(h, w, **keys)):
            with pytest.raises(ValueError, match="aspect ratio must be smaller than 200, got") as refusal:
                count(height, width, limits)
            refusals.append(str(refusal.value))
        assert refusals[0] == refusals[1]
        return
    expected = theirs.get_number_of_image_patches(height, width, limits)
    frames, rows, columns = ours.grid(height, width, **limits)
    assert frames == 1 and rows * columns == expected


def test_impossible_sizes_are_refused(theirs: Any) -> None:
    ours = path_of(theirs)
    with pytest.raises(ValueError, match="aspect ratio must be smaller than 200, got 201.0"):
        ours([picture(1, 201)])
    with pytest.raises(ValueError, match="0 < min_pixels <= max_pixels"):
        ours.grid(30, 30, min_pixels=9000, max_pixels=8000)
    with pytest.raises(ValueError, match="found 0 x 30 pixels"):
        ours.grid(0, 30)
    with pytest.raises(ValueError, match="together, or neither"):
        ours.grid(30, 30, resized_height=56)
    with pytest.raises(ValueError, match="leave no row of tokens"):
        path_of(theirs, resize="pillow").grid(10, 1000, min_pixels=1, max_pixels=10_000)


def test_the_order_and_the_company_of_pictures_change_nothing(theirs: Any) -> None:
    ours = path_of(theirs)
    images = [picture(60 + 13 * k, 200 - 17 * k, k) for k in range(6)] + [picture(60, 200, 9)]
    alone = [ours([image]) for image in images]
    order = list(range(len(images)))
    random.Random(0).shuffle(order)
    values, grids = ours([images[k] for k in order])
    assert torch.equal(values, torch.cat([alone[k][0] for k in order]))
    assert torch.equal(grids, torch.cat([alone[k][1] for k in order]))
    values, grids = ours([])
    assert values.shape == (0, alone[0][0].shape[1]) and grids.shape == (0, 3)


def test_pictures_are_not_changed_and_share_no_memory_with_the_result(theirs: Any) -> None:
    side = theirs.patch_size * theirs.merge_size
    image, tensor = picture(2 * side, 3 * side), as_tensor(picture(70, 90))
    before = image.tobytes(), tensor.clone()
    values, _ = path_of(theirs)([image, tensor, tensor[:, 1:-1, 2:-1]])
    values.zero_()
    assert image.tobytes() == before[0] and torch.equal(tensor, before[1])


def test_a_cropped_view_of_a_tensor_is_read_as_what_it_shows(theirs: Any) -> None:
    crop = as_tensor(picture(70, 90))[:, 1:-1, 2:-1]
    assert equal(path_of(theirs)([crop]), theirs(images=[crop], return_tensors="pt"))


@pytest.mark.parametrize("resize", ["processor", "pillow"])
def test_a_pickled_copy_is_equal_and_gives_the_same(theirs: Any, resize: Any) -> None:
    ours = path_of(theirs, resize=resize)
    copy = pickle.loads(pickle.dumps(ours))
    assert copy == ours
    assert torch.equal(copy([picture(50, 70)])[0], ours([picture(50, 70)])[0])


@pytest.mark.parametrize("resize", ["processor", "pillow"])
def test_the_self_test_passes_and_notices_a_processor_that_computes_something_else(theirs: Any, resize: Any) -> None:
    ours = path_of(theirs, resize=resize)
    ours.self_test(theirs)
    other = image_processor(theirs.patch_size, image_mean=[0.5, 0.5, 0.5 + 1e-6])
    with pytest.raises(RuntimeError, match="disagree on pixel_values"):
        ours.self_test(other)


def test_the_embedded_processor_is_reproduced(processor: Any) -> None:
    ours = path_of(processor)
    assert (ours.min_pixels, ours.max_pixels) == (56 * 56, 448 * 448)
    ours.self_test(processor)


@pytest.mark.parametrize(
    "settings_",
    [
        {"do_resize": False}, {"do_rescale": False}, {"do_normalize": False}, {"resample": 2},
        {"size": {"shortest_edge": 5000, "longest_edge": 4000}}, {"device": "cpu"},
    ],
)  # fmt: skip
def test_settings_that_are_not_reproduced_give_none(settings_: dict[str, Any]) -> None:
    assert QwenImages.of(image_processor(**settings_)) is None


def test_other_image_processors_give_none() -> None:
    from transformers import CLIPImageProcessor, Qwen2VLImageProcessorPil

    assert QwenImages.of(Qwen2VLImageProcessorPil()) is None
    assert QwenImages.of(CLIPImageProcessor()) is None
    assert QwenImages.of(object()) is None
    assert QwenImages.of(image_processor(merge_size=4), resize="pillow") is None
    with pytest.raises(ValueError, match="'processor' or 'pillow', found 'torch'"):
        QwenImages.of(image_processor(), resize="torch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (Image.new("L", (30, 30)), "mode L"),
        (Image.new("RGBA", (30, 30)), "mode RGBA"),
        (torch.zeros(3, 30, 30), "torch.float32"),
        (torch.zeros(30, 30, 3, dtype=torch.uint8), r"\(30, 30, 3\)"),
        ("picture.png", "found str"),
    ],
)
def test_pictures_that_are_not_rgb_are_refused(image: Any, found: str) -> None:
    with pytest.raises(TypeError, match=found):
        path_of(image_processor())([image])


def test_a_transparent_colour_is_refused() -> None:
    image = picture(30, 30)
    image.info["transparency"] = (1, 2, 3)
    with pytest.raises(TypeError, match="RGB with transparency"):
        path_of(image_processor())([image])


def test_importing_it_imports_neither_transformers_nor_qwen_vl_utils() -> None:
    code = "import sys, vlm_dft.qwen_images; print({'transformers', 'qwen_vl_utils', 'torchvision'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
