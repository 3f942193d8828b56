"""Collate: a list of chat examples in, one padded (or packed) batch of tensors with proven labels out."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vlm_dft.alignment import Ints
from vlm_dft.batches import Encoded, Side, select
from vlm_dft.cards import nearest
from vlm_dft.chat import SIZE_SETTINGS, Example, Sample, as_example, is_trained, media_settings
from vlm_dft.dummy_image import DummyImage
from vlm_dft.errors import MaskError, RowError
from vlm_dft.explain import Explained, explain_row
from vlm_dft.fitting import POLICIES, fit
from vlm_dft.kinds import FORMAT_STRINGS, TokenKinds
from vlm_dft.markers import media_parts
from vlm_dft.marking import Marked, Turn, mark_responses, mark_suffix, suffix_prompt
from vlm_dft.masking import StraddleError, cover, cut_at, prove, token_targets, turn_settings
from vlm_dft.measuring import Measured, measure
from vlm_dft.media import image_size, open_image
from vlm_dft.objectives import IGNORE, OBJECTIVES
from vlm_dft.packing import find_mrope, flatten_packs, pack_batch
from vlm_dft.processing import Processing, Rendered
from vlm_dft.qwen_images import QwenImages
from vlm_dft.sources import DEFAULT_ACCESS, MediaAccess
from vlm_dft.templates import BREAK, ChatTemplate
from vlm_dft.video import open_video, qwen_video

PROMPT_PROOFS = 4  # samples per source whose prompt ids are compared with the inference prompt's
TooLong = Literal["raise", "drop", "shorten_answer", "downscale"]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A batch with its labels [B, L], and where each came from."""

    names: list[str]
    sources: list[str]
    marked: list[Marked]
    encoded: Encoded
    labels: Tensor
    runs: list[list[Ints]]  # of each row and trained turn: positions of its targets among the row's tokens


class ChatCollator:
    """Turn chat examples into a batch whose labels are the responses' tokens alone, and prove it for every sample.

    processor: any Hugging Face processor with a fast tokenizer and a chat template (or one that takes `suffix=`).
    max_length: longest sample in tokens, media included; None: no limit. Media are never cut.
    too_long: what becomes of a longer one: "raise" a MaskError; "drop" it; "shorten_answer": cut the last answer (its end
        of turn is then no target); "downscale" its images until it fits. All but the first are counted in `counts`.
    packing: one row [1, total] without padding, samples isolated (see packing.py for what the model must be given).
    padding_side: "right" for training; "left" gives the same loss.
    access: which files and hosts may be opened (sources.MediaAccess). Default: any local path, no host.
    resize: "processor", or "pillow" for the pixels that qwen-vl-utils gives when it is told the processor's limits as
        min_pixels and max_pixels (Qwen-VL only; a few values in a thousand differ). Images with settings of their own
        always take the latter.
    template_options: variables of the chat template, such as {"enable_thinking": False}.
    tokens_per_second: the model's `vision_config.tokens_per_second`, needed only to pack videos of Qwen2.5-VL.
    source_objectives: {source: name of OBJECTIVES} for the turns of a source that set no `objective` of their own.
    tag_sources: sources to tell apart. The batch then has `token_kinds` [B, L] (bits of kinds.KINDS at targets, else 0)
        and `source_ids` [B, L] (index into tag_sources at targets, else -1), for diagnostics and overrides.
    format_strings: texts whose tokens are of the kind "format" there.
    dummy_image: a batch without media gets one tiny picture that none of its tokens sees, for engines in which every process
        must use the vision tower in every pass (dummy_image.py). Raises ModelError where the processor cannot have one.

    Call it with a list of `Example`s or of dicts `{"messages": [...], "images": [...]}`. Returns `input_ids`,
    `attention_mask`, `labels` (all [B, L]) and every key the processor returned (`pixel_values`, `image_grid_thw`,
    `mm_token_type_ids` ...; without the last Qwen-VL loses M-RoPE in silence). Where a turn sets `weight` or `objective`,
    also `loss_weights` [B, L] (float) and `objective_ids` [B, L] (index into sorted OBJECTIVES, -1: the run's own).
    Inputs are not mutated. Raises MaskError or RowError naming the sample.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        too_long: TooLong = "raise",
        packing: bool = False,
        padding_side: Side = "right",
        access: MediaAccess = DEFAULT_ACCESS,
        resize: Literal["processor", "pillow"] = "processor",
        template_options: Mapping[str, Any] | None = None,
        tokens_per_second: float | None = None,
        source_objectives: Mapping[str, str] | None = None,
        tag_sources: Sequence[str] | None = None,
        format_strings: Sequence[str] = FORMAT_STRINGS,
        dummy_image: bool = False,
    ) -> None:
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"ChatCollator needs a processor with a fast tokenizer (character offsets), found "
                f"{type(processor).__name__} with {type(tokenizer).__name__}. Use AutoProcessor.from_pretrained(...)."
            )
        for name, value, known in (
            ("padding_side", padding_side, ("right", "left")),
            ("too_long", too_long, tuple(POLICIES)),
            ("resize", resize, ("processor", "pillow")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, found {value!r}.")
        if resize == "pillow" and QwenImages.of(processor) is None:
            raise ValueError(f"resize='pillow' is for the Qwen-VL image processors, found {type(processor).__name__}.")
        self.processor = processor
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.too_long = too_long
        self.packing = packing
        self.padding_side = padding_side
        self.access = access
        self.tokens_per_second = tokens_per_second
        self.source_objectives = dict(source_objectives or {})
        for source, name in self.source_objectives.items():
            if name not in OBJECTIVES:
                raise ValueError(
                    f"source_objectives: source {source!r} has the unknown objective {name!r}.{nearest(str(name), OBJECTIVES)} "
                    f"Known: {', '.join(OBJECTIVES)}."
                )
        self.tag_sources = None if tag_sources is None else list(tag_sources)
        self.kinds = TokenKinds(tokenizer, format_strings)
        self.template = ChatTemplate(processor, template_options)
        self.processing = Processing(processor, self.template, side=padding_side, resize=resize)
        if not self.template.source and not self.processing.takes_suffix:
            raise ValueError(f"{type(processor).__name__} has no chat template. Set processor.chat_template.")
        self.dummy = DummyImage(self.processing) if dummy_image else None
        self.counts: Counter[tuple[str, str]] = Counter()  # (source, what was done): of this process alone
        self._prompts_proved: Counter[str] = Counter()
        self._coarse = True  # targets need not know which characters each token came from, only which part of the text

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Collate a non-empty list of rows; with packing, rows may come as lists, which are packed in that order."""
        flat = flatten_packs(rows)
        if not flat:
            raise RowError("Expected at least one example to collate, found an empty list.")
        names = [_name(row, k) for k, row in enumerate(flat)]
        examples = [as_example(row, where=name) for row, name in zip(flat, names, strict=True)]
        done = self._collate(examples, names)
        batch = {
            **done.encoded.batch,
            "labels": done.labels,
            **turn_settings(
                done.marked, done.runs, done.encoded.columns, done.labels,
                [self.source_objectives.get(source) for source in done.sources],
            ),
            **({} if self.tag_sources is None else self._tags(done)),
        }  # fmt: skip
        if self.dummy is not None:
            batch = self.dummy(batch, own_row=self.packing)
        if not self.packing:
            return batch
        return pack_batch(batch, mrope=find_mrope(self.processor), tokens_per_second=self.tokens_per_second)

    def _tags(self, done: Labelled) -> dict[str, Tensor]:
        """What each target is, and which source it is of."""
        kinds, sources = torch.zeros_like(done.labels), torch.full_like(done.labels, -1)
        known = {source: k for k, source in enumerate(self.tag_sources or ())}
        for k, (row, runs) in enumerate(zip(done.encoded.rows, done.runs, strict=True)):
            for run in runs:
                columns = torch.from_numpy(done.encoded.columns[k][run])
                kinds[k, columns] = torch.from_numpy(self.kinds(row.ids[run]))
                sources[k, columns] = known.get(done.sources[k], -1)
        return {"token_kinds": kinds, "source_ids": sources}

    def mark(self, example: Example, name: str) -> Marked:
        """Render an example and find the characters of its responses. Raises MaskError or RowError."""
        if self.processing.takes_suffix:
            return mark_suffix(example, self.template, where=name)
        return mark_responses(example, self.template, where=name)

    def prompts(self, rows: Sequence[Any]) -> dict[str, Any]:
        """A batch ready for `model.generate` (padded on the left), from rows or Samples that end before the answer.

        The same rendering, escaping and resizing as in training: what a model is asked is what it was trained on.
        Raises RowError for a row that ends with an answer.
        """
        prepared = []
        for k, row in enumerate(rows):
            name = _name(row, k)
            example = as_example(_fields(row), where=name)
            if example.messages[-1]["role"] == "assistant":
                raise RowError(f"{name}: expected a row that ends before the answer, found one. Give messages[:-1].")
            prepared.append(self._prompt(example, name))
        return self._left(prepared).batch

    def prompt_text(self, row: Any) -> str:
        """The text that a row or Sample asks the model, before its media are opened."""
        name = _name(row, 0)
        example = as_example(_fields(row), where=name)
        messages, tools, _ = self.template.escape(example.messages, example.tools, where=name)
        if self.processing.takes_suffix:
            return suffix_prompt(messages, self.template, where=name)
        return self.template.render(messages, tools=tools, prompt=True, where=name)

    def measure(self, row: Any, image_sizes: Sequence[tuple[int, int]] | None = None) -> Measured:
        """Count the tokens of an example from its text and its images' headers. Raises like the call.

        image_sizes: [(height, width)] of its images where they are known; else their headers are read.
        """
        name = _name(row, 0)
        return measure(self, as_example(row, where=name), name, image_sizes)

    def apart(self) -> ChatCollator:
        """The same collator without limit on the length, whose counts and proofs are its own: for self-tests and looks."""
        other = copy.copy(self)
        other.counts, other._prompts_proved, other.max_length = Counter(), Counter(), None
        return other

    def explain(self, row: Any) -> Explained:
        """What the model sees of one example, token by token, with the reason why each is or is not trained."""
        name = _name(row, 0)
        fine = self.apart()
        fine._coarse, fine.max_length = False, self.max_length
        done = fine._collate([as_example(row, where=name)], [name])
        labels = done.labels[0].numpy()[done.encoded.columns[0]].tolist()
        seen = self.processing.seen_sizes(done.encoded)
        return explain_row(name, done.encoded.rows[0], labels, done.marked[0], self._decode, **seen)

    def _collate(self, examples: list[Example], names: list[str]) -> Labelled:
        done, limit = self._label(examples, names), self.max_length
        if limit is not None and any(len(row.ids) > limit for row in done.encoded.rows):
            done = self._fitted(examples, names, done, limit)
        for source, one in zip(done.sources, done.marked, strict=True):
            self.counts.update((source, note) for note in one.notes)
        return done

    def _fitted(self, examples: list[Example], names: list[str], done: Labelled, limit: int) -> Labelled:
        """The batch with rows over the limit dropped, cut or made of smaller images, as `too_long` says."""
        kept: list[tuple[Example, str, str]] = []
        for example, name, row in zip(examples, names, done.encoded.rows, strict=True):
            fitted, effect = fit(self, example, name) if len(row.ids) > limit else (example, "")
            if fitted is None:
                self.counts[example.source, effect] += 1
            else:
                kept.append((fitted, name, effect))
        if not kept:
            raise RowError(
                f"{', '.join(names)}: every row of the batch was dropped, being over max_length = {limit} tokens. Drop long "
                "rows before batching (ChatCollator.measure tells), or raise max_length."
            )
        done = self._label([example for example, _, _ in kept], [name for _, name, _ in kept])
        for one, (_, _, effect) in zip(done.marked, kept, strict=True):
            one.notes.extend([effect] if effect else [])
        return self._cut(done, limit) if any(len(row.ids) > limit for row in done.encoded.rows) else done

    def _cut(self, done: Labelled, limit: int) -> Labelled:
        """The batch with every row's last answer cut to the limit; no media token is (fit has seen to it)."""
        positions = [np.arange(min(len(row.ids), limit)) for row in done.encoded.rows]
        lost = [name for name, row in zip(done.names, done.encoded.rows, strict=True) if row.media[limit:].any()]
        if lost:
            raise MaskError(
                f"{lost[0]}: cutting it to max_length = {limit} would cut its media. Drop the row, or downscale."
            )
        encoded = select(done.encoded, positions, self.processing.layout)
        labels = np.full(encoded.batch["input_ids"].shape, IGNORE, np.int64)
        runs = [[run[run < limit] for run in row] for row in done.runs]
        for k, row in enumerate(encoded.rows):
            for run in runs[k]:
                labels[k, encoded.columns[k][run]] = row.ids[run]
        return replace(done, encoded=encoded, labels=torch.from_numpy(labels), runs=runs)

    def _label(
        self, examples: Sequence[Example], names: Sequence[str], marked: Sequence[Marked] | None = None
    ) -> Labelled:
        marked = marked or [self.mark(example, name) for example, name in zip(examples, names, strict=True)]
        rendered = [self.rendered(e, m, n) for e, m, n in zip(examples, marked, names, strict=True)]
        encoded = self.processing(rendered)
        for row, one in zip(encoded.rows, marked, strict=True):
            cover(row, one.markup)
        labels = np.full(encoded.batch["input_ids"].shape, IGNORE, np.int64)
        all_runs = []
        for k, (one, name, row) in enumerate(zip(marked, names, encoded.rows, strict=True)):
            try:
                runs = token_targets(row, one.spans, one.text, where=name)
            except StraddleError as error:
                return self._label(examples, names, [*marked[:k], cut_at(one, error), *marked[k + 1 :]])
            all_runs.append(runs)
            for run in runs:
                labels[k, encoded.columns[k][run]] = row.ids[run]
        targets = [row.ids[run].tolist() for row, runs in zip(encoded.rows, all_runs, strict=True) for run in runs]
        decoded = iter(self.tokenizer.backend_tokenizer.decode_batch(targets, skip_special_tokens=False))
        for name, one, row, runs in zip(names, marked, encoded.rows, all_runs, strict=True):
            prove(
                where=name, text=one.text, spans=one.spans, runs=runs, row=row, decoded=[next(decoded) for _ in runs],
                tokens=self.tokenizer.convert_ids_to_tokens, media=self.processing.media,
            )  # fmt: skip
        self._prove_media(encoded, rendered)
        self._prove_prompts(examples, rendered, marked, encoded, labels)
        return Labelled(
            list(names), [e.source for e in examples], list(marked), encoded, torch.from_numpy(labels), all_runs
        )

    def rendered(self, example: Example, marked: Marked, name: str) -> Rendered:
        """The example with its media opened."""
        settings = media_settings(example.messages, "image")
        images = [open_image(i, where=f"{name}, image {k}", access=self.access) for k, i in enumerate(example.images)]
        videos = []
        for k, (video, keys) in enumerate(zip(example.videos, media_settings(example.messages, "video"), strict=True)):
            where = f"{name}, video {k}"
            self.processing.check_settings([{key: v for key, v in keys.items() if key in SIZE_SETTINGS}], where)
            if self.processing.fast is not None:
                videos.append(qwen_video(video, where=where, access=self.access, keys=keys,
                                         patch_size=self.processor.image_processor.patch_size))  # fmt: skip
            else:
                videos.append(open_video(video, where=where, access=self.access, keys=keys))
        text, suffix = marked.text, None
        if self.processing.takes_suffix:  # which adds the end of sequence itself
            turn = marked.turns[0]
            text, suffix = text[: turn.start], text[turn.start : turn.end].removesuffix(self.tokenizer.eos_token)
        plain = self._coarse and BREAK not in text and not any(m > marked.turns[0].start for _, m in marked.markup)
        cuts = [at for turn in marked.turns for at in (turn.start, turn.end)] if plain else None
        return Rendered(name, text, images, settings, videos, suffix, cuts)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _prompt(self, example: Example, name: str) -> Rendered:
        """A conversation that ends before the answer, as the model is asked it at inference."""
        messages, tools, _ = self.template.escape(example.messages, example.tools, where=name)
        if self.processing.takes_suffix:
            text = suffix_prompt(messages, self.template, where=name)
        else:
            text = self.template.render(messages, tools=tools, prompt=True, where=name)
            self.template.check_texts(messages, text, where=name)
        return replace(
            self.rendered(example, Marked(text, [Turn(0, len(text), len(text), "prompt")]), name), suffix=None
        )

    @cached_property
    def _left(self) -> Processing:
        """The same processing, padded on the left."""
        other = copy.copy(self.processing)
        other.side = "left"
        return other

    def sizes(self, example: Example, name: str) -> list[tuple[int, int]]:
        """(height, width) of the example's images, from their headers."""
        return [image_size(i, where=f"{name}, image {k}", access=self.access) for k, i in enumerate(example.images)]

    def _prove_media(self, encoded: Encoded, rendered: Sequence[Rendered]) -> None:
        """Placeholders equal what the pixels imply, and the keys that carry M-RoPE are there."""
        batch = encoded.batch
        if getattr(self.processor, "return_mm_token_type_ids", False) and not {
            "mm_token_type_ids",
            "token_type_ids",
        } & set(batch):
            raise MaskError(
                f"{rendered[0].name}: the processor returned no mm_token_type_ids; without them M-RoPE is lost."
            )
        names = ", ".join(r.name for r in rendered)
        for kind in ("image", "video"):
            grid, merge = batch.get(f"{kind}_grid_thw"), getattr(self.processor.image_processor, "merge_size", None)
            if grid is not None and merge is not None:
                expected = int((grid.prod(-1) // merge**2).sum())
                found = int((batch["input_ids"] == getattr(self.processor, f"{kind}_token_id")).sum())
                self._equal(names, kind, expected, found)
        pictured = any(one.images for one in rendered)
        known = pictured and "image_grid_thw" not in batch and self.processing.counts
        sizes = [(i.height, i.width) for one in rendered for i in one.images] if known else []
        expected_of = iter(self.processing.media_tokens(sizes, [{}] * len(sizes)))
        for row, one in zip(encoded.rows, rendered, strict=True):
            if one.images and not row.media.any():
                raise MaskError(
                    f"{one.name}: {len(one.images)} images, but none of its {len(row.ids)} tokens stands for one."
                )
            if known and one.images:
                expected = sum(next(expected_of) for _ in one.images)
                self._equal(one.name, "image", expected, self.processing.placed(row, one))

    def _equal(self, names: str, kind: str, expected: int, found: int) -> None:
        if expected != found:
            raise MaskError(
                f"{names}: the pixels imply {expected} {kind} tokens, the ids hold {found}. Is the media text written twice, "
                "or was it cut?"
            )

    def _prove_prompts(
        self,
        examples: Sequence[Example],
        rendered: Sequence[Rendered],
        marked: Sequence[Marked],
        encoded: Encoded,
        labels: Ints,
    ) -> None:
        """For the first samples of each source: the ids before the last answer are the ids of the inference prompt."""
        for k, example in enumerate(examples):
            name = rendered[k].name
            if (
                self._prompts_proved[example.source] >= PROMPT_PROOFS
                or not is_trained(example.messages[-1])
                or not example.messages[1:]
            ):
                continue
            self._prompts_proved[example.source] += 1
            asked = example.messages[:-1]
            before = replace(
                example, messages=asked, images=example.images[: len(media_parts(asked, "image"))],
                videos=example.videos[: len(media_parts(asked, "video"))],
            )  # fmt: skip
            asked_for, trained_after = self._prompt(before, name), marked[k].text[: marked[k].turns[-1].start]
            if asked_for.text.replace(BREAK, "") == trained_after.replace(BREAK, ""):  # then cut where the row was cut
                cuts = rendered[k].cuts
                cuts = None if cuts is None else [at for at in cuts if at <= len(trained_after)]
                asked_for = replace(asked_for, text=trained_after.rstrip(BREAK), cuts=cuts)
            prompt = self._left([asked_for]).rows[0].ids
            row, trained = encoded.rows[k].ids, labels[k][encoded.columns[k]] != IGNORE
            if not np.array_equal(row[: len(prompt)], prompt) or not trained[len(prompt)]:
                raise MaskError(
                    f"{name}: the training prompt is not the inference prompt.\n  inference: "
                    f"{self._decode(prompt.tolist())[-160:]!r}\n  training:  {self._decode(row.tolist())[:400]!r}"
                )


def _fields(row: Any) -> Any:
    """A row of any kind as as_example takes it; a benchmark's Sample too."""
    if isinstance(row, Sample):
        return {"messages": row.messages, "images": row.images, "id": row.id, "source": f"{row.benchmark} {row.split}"}
    return row


def _name(row: Any, k: int) -> str:
    if isinstance(row, Sample):
        return f"{row.benchmark} {row.split} {row.id}"
    named = (row.get(key) if isinstance(row, Mapping) else getattr(row, key, None) for key in ("source", "id"))
    source, name = ("" if value is None else str(value) for value in named)
    return f"{source or 'example'} {name or k}"
