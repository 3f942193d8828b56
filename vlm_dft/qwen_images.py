"""Qwen-VL's image path: RGB pictures in, pixel_values [patches, C*T*P*P] and image_grid_thw [n, 3] out.

The very tensors of the Hugging Face image processor, in about half its time: pictures are resized as four bytes a pixel,
become floats in one pass over blocks that stay in the cache, and are gathered into the patches of all frames at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from vlm_dft.chat import IMAGE_SETTINGS

KEYS = IMAGE_SETTINGS  # Qwen's message keys that set an image's size
BLOCK = 100_000  # pixels made float at a time: 1.2 MB; larger blocks leave the second-level cache
BITS = torch.tensor([[0xFF], [0xFF00], [0xFF0000]], dtype=torch.int32)  # where a pixel's red, green and blue are
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

Resize = Literal["processor", "pillow"]


@dataclass(frozen=True)
class QwenImages:
    """Resize, normalise and cut pictures into patches. Make it with `QwenImages.of(processor)`.

    resize: "processor", torchvision's uint8 bicubic, equal to `processor.image_processor(images)`; or "pillow", equal to
        qwen_vl_utils.process_vision_info and then the processor with do_resize=False. On table pictures 0.6 % of the
        values differ, most by one level in 255 and a few by up to 25; very long pictures differ in size. "processor"
        takes a third of the time.
    min_pixels, max_pixels: areas in pixels between which a picture is brought where it has no limits of its own.
    mean, std: in levels of 0 to 255, the float32 values that the processor computes with.
    """

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: Resize = "processor"

    @classmethod
    def of(cls, processor: Any, *, resize: Resize = "processor") -> QwenImages | None:
        """The image path of a processor, or None where its image processor is not one that this module reproduces.

        The area limits are the processor's; with resize="pillow" they are qwen_vl_utils' own, 4 to 16384 tokens, as
        that library does not look at the processor.
        """
        if resize not in ("processor", "pillow"):
            raise ValueError(f"resize must be 'processor' or 'pillow', found {resize!r}.")
        theirs = getattr(processor, "image_processor", processor)
        if type(theirs).__name__ != "Qwen2VLImageProcessor" or getattr(theirs, "backend", None) != "torchvision":
            return None
        steps = all(getattr(theirs, step, None) is True for step in ("do_resize", "do_rescale", "do_normalize"))
        unusual = any(getattr(theirs, name, None) is not None for name in ("device", "input_data_format"))
        if not steps or unusual or theirs.resample != BICUBIC or sys.byteorder != "little":
            return None
        low, high = theirs.size["shortest_edge"], theirs.size["longest_edge"]
        mean, std = (
            (torch.tensor(value) * (1.0 / theirs.rescale_factor)).float()  # in the default dtype first, as they do
            for value in (theirs.image_mean, theirs.image_std)
        )
        if not (low and high and low <= high and mean.shape == std.shape == (3,)):
            return None
        if resize == "pillow" and theirs.merge_size != 2:  # qwen_vl_utils knows no other
            return None
        ours = cls(
            theirs.patch_size, theirs.temporal_patch_size, theirs.merge_size, low, high,
            tuple(mean.tolist()), tuple(std.tolist()), resize,
        )  # fmt: skip
        low, high = ours._their_limits
        return replace(ours, min_pixels=low, max_pixels=high) if resize == "pillow" else ours

    def grid(
        self,
        height: int,
        width: int,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        resized_height: int | None = None,
        resized_width: int | None = None,
    ) -> tuple[int, int, int]:
        """(time, height, width) in patches of a picture of that many pixels, decoding none.

        min_pixels, max_pixels: in place of the defaults, for this picture. resized_height, resized_width: both or none;
        wins over the areas, and is rounded to whole tokens as qwen_vl_utils does. Raises ValueError.
        """
        rule = self.resize
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if (resized_height is None) != (resized_width is None):
            raise ValueError("Give resized_height and resized_width together, or neither.")
        if resized_height is not None and resized_width is not None:
            rule, height, width = "pillow", resized_height, resized_width
            low, high = self._their_limits
        if min(height, width) < 1 or not 0 < low <= high:
            raise ValueError(
                f"Expected at least one pixel and 0 < min_pixels <= max_pixels, found {height} x {width} pixels, "
                f"min_pixels {low}, max_pixels {high}."
            )
        height, width = smart_resize(height, width, self._factor, low, high, rule=rule)
        return 1, height // self.patch_size, width // self.patch_size

    def __call__(
        self, images: Sequence[Image.Image | Tensor], keys: Sequence[Mapping[str, int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """pixel_values (float32) and image_grid_thw (int64) of RGB PIL images or uint8 tensors [3, H, W].

        keys: for each image a mapping with any of KEYS, its own size. Tensors are fastest as torchvision decodes them
        (channels last in memory). Raises TypeError for another kind of picture, ValueError as `grid` does.
        """
        grids = []
        for image, own in zip(images, [{}] * len(images) if keys is None else keys, strict=True):
            grids.append(self.grid(*_height_width(image), **own))
        counts = [height * width for _, height, width in grids]
        # Channel c's byte is left where it is in its int32: 256^c times the level. Powers of two are exact in float, so
        # subtracting 256^c * mean and dividing by 256^c * std rounds as the processor's (level - mean) / std does.
        # A product with 1 / std would round differently.
        scale = torch.tensor([[1.0], [256.0], [65536.0]], dtype=torch.float32)
        mean, std = (torch.tensor(value, dtype=torch.float32)[:, None] * scale for value in (self.mean, self.std))
        size = 3 * self.temporal_patch_size * self.patch_size**2
        patches = torch.empty(sum(counts), size, dtype=torch.float32)
        for image, (_, height, width), out in zip(images, grids, patches.split(counts), strict=True):
            pixels = self._resized(image, height * self.patch_size, width * self.patch_size)
            self._write(pixels, out, mean, std)
        return patches, torch.tensor(grids, dtype=torch.long).view(-1, 3)

    def self_test(self, processor: Any) -> None:
        """Raise RuntimeError where drawn pictures do not come out as the processor's own code makes them, bit for bit."""
        theirs = getattr(processor, "image_processor", processor)
        side = self._factor
        draw = torch.Generator().manual_seed(0)
        low, high = 4 * side**2, 16 * side**2
        sizes = {  # (height, width): scaled down, up, hardly, not at all, to many more pixels, a long one
            (5 * side + 3, 6 * side - 5), (side - 1, side + 2), (2 * side + 1, 3 * side - 1), (3 * side, 4 * side), (2, 5),
            (7, 10 * side),
        }  # fmt: skip
        images: list[Image.Image | Tensor] = []
        for height, width in sorted(sizes):
            pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=draw)
            images += [Image.fromarray(pixels.numpy()), pixels.permute(2, 0, 1)]
        values, grids = self(images, [{"min_pixels": low, "max_pixels": high}] * len(images))
        if self.resize == "pillow":
            scaled = []
            for image, (_, rows, columns) in zip(images, grids.tolist(), strict=True):
                pil = image if isinstance(image, Image.Image) else _as_pil(image)
                scaled.append(pil.resize((columns * self.patch_size, rows * self.patch_size)))
            expected = theirs(images=scaled, do_resize=False, return_tensors="pt")
        else:
            size = {"shortest_edge": low, "longest_edge": high}
            expected = theirs(images=images, size=size, return_tensors="pt")
        for name, found in (("pixel_values", values), ("image_grid_thw", grids)):
            if not torch.equal(found, expected[name]):
                raise RuntimeError(
                    f"QwenImages and {type(theirs).__name__} disagree on {name}: this version of transformers or torch "
                    "computes something else. Call the processor itself, and report it with both versions."
                )

    @property
    def _factor(self) -> int:
        """Pixels along one side of a token."""
        return self.patch_size * self.merge_size

    @property
    def _their_limits(self) -> tuple[int, int]:
        """qwen_vl_utils' default areas: IMAGE_MIN_TOKEN_NUM and IMAGE_MAX_TOKEN_NUM tokens."""
        return 4 * self._factor**2, 16384 * self._factor**2

    def _resized(self, image: Image.Image | Tensor, height: int, width: int) -> Tensor:
        """The picture as pixels, int32 [height, width]."""
        if self.resize == "pillow":
            image = image if isinstance(image, Image.Image) else _as_pil(image)
            return _pixels(image.resize((width, height)))  # bicubic is Pillow's default for RGB
        pixels = _pixels(image)
        if pixels.shape == (height, width):
            return pixels
        h, w = pixels.shape
        # Four channels, channels last: the layout that torch's uint8 kernel works in, so it repacks nothing.
        packed = pixels.view(torch.uint8).as_strided((1, 4, h, w), (4 * h * w, 1, 4 * w, 4))
        scaled = functional.interpolate(
            packed, size=(height, width), mode="bicubic", align_corners=False, antialias=True
        )
        return scaled[0].permute(1, 2, 0).contiguous().view(torch.int32).squeeze(-1)

    def _write(self, pixels: Tensor, out: Tensor, mean: Tensor, std: Tensor) -> None:
        """Normalise pixels, int32 [height, width], and cut them into patches, in the merger's order: out [N, C*T*P*P]."""
        patch = self.patch_size
        band = self._factor * pixels.shape[1]  # pixels in one row of tokens
        bands = pixels.view(-1, 1, band)
        block = max(1, BLOCK // band)
        runs = 3 * band // patch  # a run is `patch` floats; so many are in the three planes of a band
        order = _order(pixels.shape[1], patch, self.temporal_patch_size, self.merge_size)
        order = order + torch.arange(min(block, len(bands)), dtype=torch.int32)[:, None] * runs
        for some, target in zip(bands.split(block), out.view(len(bands), -1, patch).split(block), strict=True):
            levels = some & BITS  # [bands, C, band]
            planes = levels.view(torch.float32).copy_(levels)  # int32 to float32 in place: 4 bytes both
            planes.sub_(mean).div_(std)
            index = order[: len(some)].view(-1)
            torch.index_select(planes.view(-1, patch), 0, index, out=target.view(-1, patch))


@lru_cache(maxsize=64)
def _order(width: int, patch: int, frames: int, merge: int) -> Tensor:
    """Which runs of `patch` floats of a band's three planes follow one another in pixel_values, each once a frame."""
    across = width // (patch * merge)
    runs = torch.arange(3 * merge * merge * patch * across, dtype=torch.int32).view(3, merge, patch, across, merge)
    return runs.permute(3, 1, 4, 0, 2).unsqueeze(4).expand(-1, -1, -1, -1, frames, -1).flatten()


def rules_of(images: QwenImages, settings: Sequence[Mapping[str, Any]], resize: Resize) -> list[QwenImages]:
    """How each picture is resized: one with settings of its own as qwen_vl_utils does, within the processor's limits."""
    pillow = replace(images, resize="pillow")
    return [pillow if own or resize == "pillow" else images for own in settings]


def patches(
    images: QwenImages, opened: Sequence[Any], settings: Sequence[Mapping[str, Any]], resize: Resize
) -> tuple[Tensor, Tensor]:
    """pixel_values and image_grid_thw of pictures, each by its own rule."""
    rules = rules_of(images, settings, resize)
    if all(rule is rules[0] for rule in rules):
        return rules[0](opened, settings)
    parts = [rule([one], [own]) for rule, one, own in zip(rules, opened, settings, strict=True)]
    return torch.cat([values for values, _ in parts]), torch.cat([grid for _, grid in parts])


def resized(
    images: QwenImages, opened: Sequence[Image.Image], settings: Sequence[Mapping[str, Any]], resize: Resize
) -> list[Tensor]:
    """Pictures resized by the same rules, uint8 [3, H, W], for a processor that must not resize them again."""
    found = []
    for rule, image, own in zip(rules_of(images, settings, resize), opened, settings, strict=True):
        _, rows, columns = rule.grid(image.height, image.width, **own)
        size = (rows * rule.patch_size, columns * rule.patch_size)
        if rule.resize == "pillow":
            image = image.resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if size != tuple(pixels.shape[1:]):
            pixels = torch.nn.functional.interpolate(pixels[None].contiguous(), size, mode="bicubic", antialias=True)[0]
        found.append(pixels)
    return found


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, *, rule: Resize = "processor"
) -> tuple[int, int]:
    """(height, width) in multiples of factor, of an area within the limits, near the same aspect ratio.

    Two rules under one name: transformers lets a side round to 0 (so that the area is then raised to min_pixels) and
    keeps a token when scaling down; qwen_vl_utils ("pillow") keeps a token when rounding, and may scale down to 0.
    """
    ratio = max(height, width) / min(height, width)
    if ratio > 200:
        raise ValueError(f"absolute aspect ratio must be smaller than 200, got {ratio}")
    least_rounded, least_scaled = (factor, 0) if rule == "pillow" else (0, factor)
    h, w = (max(least_rounded, round(side / factor) * factor) for side in (height, width))
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(least_scaled, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    if min(h, w) == 0:
        raise ValueError(f"{height} x {width} pixels in at most {max_pixels} leave no row of tokens. Raise max_pixels.")
    return h, w


def _height_width(image: object) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        if image.mode == "RGB" and "transparency" not in image.info:
            return image.height, image.width
        found = f"a PIL image of mode {image.mode}{' with transparency' if 'transparency' in image.info else ''}"
    elif isinstance(image, Tensor):
        if image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3 and image.device.type == "cpu":
            return image.shape[1], image.shape[2]
        found = f"a tensor of {image.dtype}, shape {tuple(image.shape)}, on {image.device}"
    else:
        found = type(image).__name__
    raise TypeError(
        f"Expected an RGB PIL image or a uint8 CPU tensor [3, H, W], found {found}. media.open_image gives RGB."
    )


def _pixels(image: Image.Image | Tensor) -> Tensor:
    """A fresh int32 [H, W] of R + 256 G + 65536 B, with anything in the high byte."""
    if isinstance(image, Image.Image):
        data = bytearray(image.tobytes("raw", "RGBX"))
        return torch.frombuffer(data, dtype=torch.int32).view(image.height, image.width)
    levels = image.permute(1, 2, 0).reshape(-1).numpy()  # no copy for what torchvision decodes
    pixels = np.empty(len(levels) // 3, np.int32)
    # Four bytes from every third on: the fourth is the next pixel's red. The last pixel has no fourth byte to read.
    pixels[:-1] = np.ndarray(len(pixels) - 1, np.int32, levels, strides=(3,))
    pixels[-1:].view(np.uint8)[:3] = levels[-3:]
    return torch.from_numpy(pixels).view(image.shape[1:])


def _as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
