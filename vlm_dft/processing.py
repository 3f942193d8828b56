"""Processing: rendered texts and opened media in; one padded batch, and the characters that each token came from, out."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlm_dft.alignment import Bools, Ints, Row, align, take, without_breaks
from vlm_dft.batches import Encoded, Layout, Side, join, padded, select
from vlm_dft.errors import RowError, naming
from vlm_dft.qwen_images import QwenImages, patches, resized, rules_of
from vlm_dft.templates import ANSWER, BREAK, USER, ChatTemplate
from vlm_dft.video import Video

Settings = dict[str, Any]
REMEMBERED = 4096  # image sizes whose tokens are not counted again
LOGGER = logging.getLogger("vlm_dft")


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sample ready for the processor: its text with one placeholder per medium, and its media, opened."""

    name: str
    text: str
    images: list[Any] = field(default_factory=list)  # PIL images, or uint8 tensors [3, H, W]
    settings: list[Settings] = field(default_factory=list)  # of each image; empty: the processor's own
    videos: list[Video] = field(default_factory=list)
    suffix: str | None = None  # the answer, for processors that take it apart from the prompt
    cuts: list[int] | None = None  # where answers begin and end, if nothing finer is asked of the tokens' characters


class Processing:
    """One processor call per batch, or the same tensors faster for the Qwen-VL image processors.

    What a processor wants (images as one list or as one per row, rows with and without images in one call) and whether it
    counts its tokens rightly is found by trying it on two small rows, once. The faster path is taken only if it gave the
    processor's tensors bit for bit.
    """

    def __init__(
        self, processor: Any, template: ChatTemplate, *, side: Side, resize: Literal["processor", "pillow"]
    ) -> None:
        self.processor, self.template, self.side, self.resize = processor, template, side, resize
        self.tokenizer = processor.tokenizer
        self._counted: dict[tuple[int, int], int] = {}  # (height, width) of an image -> its tokens

    def __call__(self, samples: Sequence[Rendered]) -> Encoded:
        """Process a batch. Raises RowError with the sample's name and the processor's own words where it refuses."""
        try:
            return self._process(samples)
        except RowError:
            for sample in samples if len(samples) > 1 else []:
                self._process([sample])  # raises for the one to blame, if there is one
            raise

    def _process(self, samples: Sequence[Rendered]) -> Encoded:
        plain = not any(s.videos or s.suffix is not None for s in samples)
        encoded = self._fast(samples) if plain and self.fast is not None else self._call(samples)
        if any(BREAK in s.text or BREAK in (s.suffix or "") for s in samples):
            texts = [s.text + (s.suffix or "") for s in samples]
            kept = [without_breaks(r, t, where=s.name) for r, t, s in zip(encoded.rows, texts, samples, strict=True)]
            encoded = select(encoded, kept, self.layout)
        return encoded

    @property
    def layout(self) -> Layout:
        """How rows are padded."""
        return Layout(self.side, int(self.tokenizer.pad_token_id or 0))

    @cached_property
    def takes_suffix(self) -> bool:
        """Whether the processor takes prompt and answer apart (PaliGemma) and has no chat template."""
        return not self.template.source and "suffix" in inspect.signature(type(self.processor).__call__).parameters

    @cached_property
    def fast(self) -> QwenImages | None:
        """The faster path, if the processor is one that it reproduces, proven on two drawn rows; else None, and said why."""
        images = QwenImages.of(self.processor)
        if images is None:
            return None
        try:
            images.self_test(self.processor)
            usual = copy.copy(self)
            usual.resize = "processor"
            fast, slow = usual._fast(self._probe(), images), usual._call(self._probe())
            asked = [{"role": "user", "content": USER}]
            prompt, said = self.template.render(asked, prompt=True), f"{ANSWER}, 3.5"
            whole = self.template.render([*asked, {"role": "assistant", "content": said}])
            held_apart = whole[: len(prompt)] + BREAK + whole[len(prompt) :]
            (apart,), (one,) = self._rows_apart([whole], [[len(prompt)]]), self.text_rows([held_apart], ["self-test"])
            if not np.array_equal(apart.ids, one.ids):
                raise ValueError("prompt and answer tokenised apart are not the text held apart there")
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            LOGGER.warning("the faster image path is off: it failed its comparison with the processor (%s)", error)
            return None
        same = set(fast.batch) == set(slow.batch) and all(torch.equal(fast.batch[k], slow.batch[k]) for k in fast.batch)
        if not same:
            LOGGER.warning(
                "the faster image path is off: its tensors are not those of %s", type(self.processor).__name__
            )
        return images if same else None

    @cached_property
    def nested(self) -> bool:
        """Whether images are given as one list per sample, as the processor's own chat call does; else as one flat list."""
        for nested in (True, False):
            try:
                self._raw(self._probe(), nested)
                return nested
            except Exception:  # noqa: BLE001  processors refuse in many ways; a real batch's refusal is reported
                continue
        return True  # Mllama refuses an empty list, and takes the lists of rows that all have images

    @cached_property
    def mixes(self) -> bool:
        """Whether rows with images and rows without may share one call; where not, they are processed apart and joined."""
        try:
            self._raw(self._probe(), self.nested)
        except Exception:  # noqa: BLE001  as above
            return False
        return True

    def _probe(self) -> list[Rendered]:
        """Two small rows of the self-tests: one of text alone, one with an image."""
        from PIL import Image

        image = Image.new("RGB", (112, 56), "red")
        if self.takes_suffix:
            text = f"{self.template.placeholder('image')}{USER}"
            two = f"{self.template.placeholder('image')}{text}"
            return [
                Rendered("a row of the self-test", text, [image], [{}], suffix=ANSWER),
                Rendered("a row of the self-test", two, [image, image], [{}, {}], suffix=ANSWER),
            ]
        text = self.template.render([{"role": "user", "content": USER}], prompt=True)
        return [Rendered("a row of the self-test", text), self.pictured(image)]

    def pictured(self, *images: Any) -> Rendered:
        """A short prompt with the pictures."""
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": USER}]
        text = self.template.render([{"role": "user", "content": content}], prompt=True)
        return Rendered("a row of the self-test", text, list(images), [{} for _ in images])

    @cached_property
    def counts(self) -> bool:
        """Whether the tokens of images can be told from their sizes: confirmed on one real image, and on two in a row.

        Where they cannot, a warning says so, and of the images' tokens it is proven that they are there, not how many.
        """
        from PIL import Image

        sizes = [(56, 112), (84, 84)]
        images = [Image.new("RGB", (width, height), "red") for height, width in sizes]
        try:
            for count in (1, 2):
                sample = self.pictured(*images[:count])
                expected = sum(self.media_tokens(sizes[:count], [{}] * count))
                found = self.placed(self([sample]).rows[0], sample)
                if found != expected:
                    raise ValueError(f"of {count} images it expects {expected} tokens and makes {found}")
        except Exception as error:  # noqa: BLE001  a processor that cannot count fails in its own way
            LOGGER.warning(
                "%s cannot tell the number of image tokens from the images' sizes (%s): rows are proven to have image "
                "tokens, not how many; measuring processes them",
                type(self.processor).__name__, " ".join(f"{type(error).__name__}: {error}".split())[:160],
            )  # fmt: skip
            return False
        return True

    def placed(self, row: Row, sample: Rendered) -> int:
        """Tokens of a row that stand where its text has an image placeholder."""
        own = self.template.placeholder("image") or ""
        there = np.zeros(len(row.ids), np.bool_)
        neighbours = re.finditer(f"(?:{re.escape(own)})+", sample.text)  # whose runs cannot be told apart
        for match in neighbours if own else ():
            there |= (row.start >= match.start()) & (row.end <= match.end())
        return int((there & row.media).sum())

    def media_tokens(self, sizes: Sequence[tuple[int, int]], settings: Sequence[Settings]) -> list[int]:
        """Tokens of images of the given (height, width), by the processor's own account."""
        if not sizes:
            return []
        if self.fast is not None:
            return [t * h * w // self.fast.merge_size**2 for t, h, w in self.grids(sizes, settings)]
        if unknown := [size for size in dict.fromkeys(sizes) if size not in self._counted]:
            counted = self.processor._get_num_multimodal_tokens(image_sizes=[list(size) for size in unknown])
            self._counted.update(zip(unknown, map(int, counted["num_image_tokens"]), strict=True))
        found = [self._counted[size] for size in sizes]
        if len(self._counted) > REMEMBERED:
            self._counted.clear()
        return found

    def grids(self, sizes: Sequence[tuple[int, int]], settings: Sequence[Settings]) -> list[tuple[int, int, int]]:
        """(time, height, width) in patches of images of the given (height, width) and settings; Qwen-VL's processors alone."""
        assert self.fast is not None
        rules = rules_of(self.fast, settings, self.resize)
        return [rule.grid(h, w, **own) for rule, (h, w), own in zip(rules, sizes, settings, strict=True)]

    def text_rows(self, texts: Sequence[str], names: Sequence[str], *, breaks: bool = False) -> list[Row]:
        """The tokens of texts whose placeholders have not grown; `media` marks the placeholders. Without those of BREAK."""
        bos, rows = self.tokenizer.bos_token, []
        encoded = self._backend().encode_batch(list(texts), add_special_tokens=not (bos and texts[0].startswith(bos)))
        for text, name, encoding in zip(texts, names, encoded, strict=True):
            ids, offsets = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
            row = Row(ids, offsets[:, 0], offsets[:, 1], self._placeholders[ids])
            rows.append(take(row, without_breaks(row, text, where=name)) if BREAK in text and not breaks else row)
        return rows

    def _rows_apart(self, texts: Sequence[str], cuts: Sequence[Sequence[int]]) -> list[Row]:
        """The tokens of texts, prompts and answers tokenised apart as they are at inference; each has its whole part's
        characters. Faster than text_rows by what offsets cost, and for byte-level tokenizers without a BOS alone."""
        parts = [
            [(a, b) for a, b in pairwise([0, *cut, len(text)]) if a < b] for text, cut in zip(texts, cuts, strict=True)
        ]
        backend = self._backend()
        encoded = iter(backend.encode_batch_fast([t[a:b] for t, p in zip(texts, parts, strict=True) for a, b in p],
                                                 add_special_tokens=False))  # fmt: skip
        rows = []
        for part in parts:
            pieces = [next(encoded).ids for _ in part]
            ids = np.array([i for piece in pieces for i in piece], np.int64)
            start, end = (np.repeat(edge, [len(piece) for piece in pieces]) for edge in zip(*part, strict=True))
            rows.append(Row(ids, start, end, self._placeholders[ids]))
        return rows

    def _backend(self) -> Any:
        """The Rust tokenizer, on which Hugging Face leaves the last call's settings behind."""
        backend = self.tokenizer.backend_tokenizer
        if backend.padding is not None:
            backend.no_padding()
        if backend.truncation is not None:
            backend.no_truncation()
        if backend.encode_special_tokens:
            backend.encode_special_tokens = False
        return backend

    @cached_property
    def _placeholders(self) -> Bools:
        """[vocabulary] which ids are placeholders of images or videos."""
        return self._table(
            i for kind in ("image", "video") for i in self.template.ids_of(self.template.placeholder(kind))
        )

    @cached_property
    def media(self) -> Bools:
        """[vocabulary] which ids stand for pixels or enclose them."""
        return self._table(self.template.media_ids)

    def _table(self, ids: Iterable[int]) -> Bools:
        table = np.zeros(len(self.tokenizer) + 1024, np.bool_)  # processors may add tokens after they were counted
        table[list(ids)] = True
        return table

    def _call(self, samples: Sequence[Rendered]) -> Encoded:
        """The Hugging Face processor, called once, its ids aligned with the texts."""
        pictured = [bool(s.images) for s in samples]
        if any(pictured) and not all(pictured) and not self.mixes:
            return self._apart(samples, pictured)
        names = [s.name for s in samples]
        with naming(names):
            batch = self._raw(samples, self.nested)
        batch.pop("labels", None)
        texts = self.text_rows([s.text for s in samples], names, breaks=True)
        columns = [np.flatnonzero(mask) for mask in batch["attention_mask"].numpy()]
        rows = []
        for k, (sample, text, column) in enumerate(zip(samples, texts, columns, strict=True)):
            ids = batch["input_ids"][k].numpy()[column]
            if sample.suffix is None:
                rows.append(align(ids, text, self.media, where=sample.name))
            else:
                second = batch["token_type_ids"][k].numpy()[column] == 1
                rows.append(self._suffix_row(sample, ids, text, second))
        return Encoded(batch, rows, columns)

    def _raw(self, samples: Sequence[Rendered], nested: bool) -> dict[str, Any]:
        texts = [s.text for s in samples]
        words: dict[str, Any] = {"padding": True, "padding_side": self.side, "return_tensors": "pt"}
        bos = self.tokenizer.bos_token
        if bos and texts[0].startswith(bos):
            words["add_special_tokens"] = False  # the template has written it
        if any(s.images for s in samples):
            settings = [own for s in samples for own in s.settings]
            self.check_settings(settings, samples[0].name)
            lists = [s.images for s in samples]
            if any(settings) or self.resize == "pillow":
                assert self.fast is not None  # check_settings has seen to it
                lists = [resized(self.fast, s.images, s.settings, self.resize) for s in samples]
                words["images_kwargs"] = {"do_resize": False}
            words["images"] = lists if nested else [image for images in lists for image in images]
        if any(s.videos for s in samples):
            words |= self._video_words([video for s in samples for video in s.videos])
        if samples[0].suffix is not None:
            words["suffix"] = [s.suffix for s in samples]
        return dict(self.processor(text=texts, **words))

    def check_settings(self, settings: Iterable[Settings], name: str) -> None:
        """Raise RowError for sizes that only Qwen-VL's processors take."""
        asked = next((own for own in settings if own), None)
        if asked is not None and self.fast is None:
            raise RowError(
                f"{name}: asks for {', '.join(asked)}. These settings are Qwen-VL's; {type(self.processor).__name__} has its "
                "own sizes. Take them out, or resize the picture."
            )

    def _video_words(self, videos: Sequence[Video]) -> dict[str, Any]:
        return {
            "videos": [video.frames for video in videos],
            "videos_kwargs": {
                "video_metadata": [video.metadata for video in videos],
                "do_sample_frames": False,
                **({"do_resize": False} if videos[0].frames.is_floating_point() else {}),  # qwen_video has done it
            },
        }

    def _suffix_row(self, sample: Rendered, ids: Ints, prompt: Row, second: Bools) -> Row:
        """A row of prompt + answer, of which the processor makes two segments, as one text: the answer after the prompt."""
        suffix = f"{sample.suffix}{self.tokenizer.eos_token}"
        (answer,) = self.text_rows([suffix], [sample.name], breaks=True)
        if len(answer.ids) > second.sum():  # the processor writes no beginning of sequence between the two
            answer = take(answer, np.arange(1, len(answer.ids)))
        first = align(ids[~second], prompt, self.media, where=sample.name)
        last = align(ids[second], answer, self.media, where=sample.name)
        by = len(sample.text)
        return Row(
            np.concatenate([first.ids, last.ids]),
            np.concatenate([first.start, last.start + by]),
            np.concatenate([first.end, last.end + by]),
            np.concatenate([first.media, last.media]),
        )

    def _apart(self, samples: Sequence[Rendered], pictured: Sequence[bool]) -> Encoded:
        """Rows with and without images in two calls, joined: for processors that refuse them in one (Mllama)."""
        with_images = self._call([s for s, has in zip(samples, pictured, strict=True) if has])
        without = self._call([s for s, has in zip(samples, pictured, strict=True) if not has])
        return join(with_images, without, list(pictured), self.layout)

    def _fast(self, samples: Sequence[Rendered], images: QwenImages | None = None) -> Encoded:
        """The tensors of the Qwen-VL processors: text tokenised with one placeholder per image, its id then repeated."""
        images = images or self.fast
        assert images is not None
        opened = [image for s in samples for image in s.images]
        settings = [setting for s in samples for setting in s.settings]
        pixels: dict[str, Tensor] = {}
        counts: list[int] = []
        if opened:
            with naming([s.name for s in samples]):
                values, grid = patches(images, opened, settings, self.resize)
            pixels = {"pixel_values": values, "image_grid_thw": grid}
            counts = (grid.prod(-1) // images.merge_size**2).tolist()
        image_id = int(self.processor.image_token_id)
        rows, taken = [], 0
        apart, whole = ([s for s in samples if (s.cuts is not None) == has] for has in (True, False))
        fine = iter(self.text_rows([s.text for s in whole], [s.name for s in whole], breaks=True) if whole else [])
        coarse = iter(self._rows_apart([s.text for s in apart], [s.cuts or [] for s in apart]) if apart else [])
        for sample in samples:
            row = next(fine if sample.cuts is None else coarse)
            mine = np.flatnonzero(row.ids == image_id)
            if len(mine) != len(sample.images):
                raise RowError(f"{sample.name}: {len(sample.images)} images, but the chat template placed {len(mine)}.")
            repeats = np.ones(len(row.ids), np.int64)
            repeats[mine] = counts[taken : taken + len(mine)]
            taken += len(mine)
            ids, start, end = (
                values.repeat(repeats) if len(mine) else values for values in (row.ids, row.start, row.end)
            )
            rows.append(Row(ids, start, end, self.media[ids]))
        batch, columns = padded(rows, self.layout)
        batch["mm_token_type_ids"] = (batch["input_ids"] == image_id).long()
        return Encoded({**batch, **pixels}, rows, columns)

    def seen_sizes(self, encoded: Encoded) -> dict[str, list[Any]]:
        """The size of every image (height, width) and video (frames, height, width) in pixels, as the model is given it."""
        batch, sizes = encoded.batch, dict[str, list[Any]]()
        for kind, unit in (("image", "image_processor"), ("video", "video_processor")):
            grid, own = batch.get(f"{kind}_grid_thw"), getattr(self.processor, unit, None)
            if grid is not None:
                patch = own.patch_size  # type: ignore[union-attr]
                sizes[f"{kind}s"] = [
                    ((t * own.temporal_patch_size,) if kind == "video" else ()) + (h * patch, w * patch)  # type: ignore[union-attr]
                    for t, h, w in grid.tolist()
                ]
        if "image_grid_thw" not in batch and "pixel_values" in batch and encoded.rows[0].media.any():
            sizes["images"] = [tuple(batch["pixel_values"].shape[-2:])]
        return sizes
