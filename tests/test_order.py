"""The order of rows: whichever way a step is split, it has the rows of plain shuffling, each once, and silent places cost nothing."""

import copy
import pickle
from collections import Counter
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from transformers import TrainingArguments

from vlm_dft.collators import ChatCollator
from vlm_dft.config import resolve_config
from vlm_dft.errors import ConfigError
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model
from vlm_dft.order import Silent, SilentCollator, Split, StepSampler, WithSilentPlaces, deal
from vlm_dft.trainer import DFTTrainer

torch.set_num_threads(1)
SPLITS = (Split(8), Split(4, 1, 2), Split(1, 1, 8), Split(4, 2), Split(2, 2, 2), Split(1, 8), Split(2, 4))  # of eight


def batches(sampler: Any, split: Split, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of each process, by accelerate's own sharding."""
    sampler.set_epoch(epoch)
    whole = BatchSampler(sampler, split.micro_batch, drop_last=False)
    if split.processes == 1:
        return [list(whole)]
    return [list(BatchSamplerShard(whole, split.processes, k)) for k in range(split.processes)]


def steps(shards: list[list[list[int]]], split: Split) -> list[list[int]]:
    """The places of each optimiser step, over processes and accumulated micro-batches."""
    found = []
    for start in range(0, len(shards[0]), split.accumulation):
        taken = [batch for shard in shards for batch in shard[start : start + split.accumulation]]
        found.append(list(chain(*taken)))
    return found


def stock_steps(examples: int, seed: int, epoch: int, size: int) -> list[set[int]]:
    """What accelerate's own sampler draws, a step at a time."""
    sampler = SeedableRandomSampler(range(examples), data_seed=seed, generator=torch.Generator())
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    return [set(drawn[k : k + size]) for k in range(0, examples, size)]


@pytest.mark.parametrize("examples", [1, 7, 8, 17, 21, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_every_step_has_the_rows_of_plain_shuffling_however_it_is_split(examples: int, packed: bool) -> None:
    lengths = [(37 * k) % 53 + 1 for k in range(examples)]
    for split, epoch, own in product(SPLITS, (0, 3), (lengths, None)):
        sampler = StepSampler(examples, split, seed=5, lengths=own, packed=packed)
        shards = batches(sampler, split, epoch)
        assert len({len(shard) for shard in shards}) == 1 and len(sampler) == sum(
            len(batch) for batch in chain(*shards)
        )
        spoken = [[place for place in step if place < examples] for step in steps(shards, split)]
        assert [set(step) for step in spoken] == stock_steps(examples, 5, epoch, 8), split
        assert sorted(chain(*spoken)) == list(range(examples))  # each once


@pytest.mark.parametrize("split", SPLITS)
def test_the_rows_of_a_last_step_are_spread_over_its_micro_batches(split: Split) -> None:
    for examples in (1, 3, 5, 7):
        shards = batches(StepSampler(examples, split, seed=0), split)
        spoken = [sum(place < examples for place in batch) for shard in shards for batch in shard]
        assert max(spoken) - min(spoken) <= 1 and sum(spoken) == examples
        assert len(shards[0]) == -(-examples // split.pass_size)


def test_rows_of_like_length_share_a_padded_micro_batch_and_their_totals_are_alike_in_packed_ones() -> None:
    lengths, split = [10, 90, 20, 80, 30, 70, 40, 60], Split(2, 2, 2)
    padded = [sorted(lengths[k] for k in batch) for shard in batches_of(lengths, split, False) for batch in shard]
    assert sorted(padded) == [[10, 20], [30, 40], [60, 70], [80, 90]]
    packed = [sum(lengths[k] for k in batch) for shard in batches_of(lengths, split, True) for batch in shard]
    assert packed == [100] * 4
    whole = [sum(lengths[k] for batch in shard for k in batch) for shard in batches_of(lengths, split, False)]
    assert max(whole) - min(whole) <= 80  # 150 + 50 and 130 + 70, not 150 + 130 and 70 + 50


def batches_of(lengths: list[int], split: Split, packed: bool) -> list[list[list[int]]]:
    return batches(StepSampler(len(lengths), split, seed=1, lengths=lengths, packed=packed), split)


def padding(lengths: list[int], shards: list[list[list[int]]]) -> int:
    return sum(
        max(lengths[k] for k in batch) * len(batch) - sum(lengths[k] for k in batch)
        for shard in shards for batch in shard
    )  # fmt: skip


def test_dealing_by_length_leaves_a_fraction_of_the_padding() -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = (torch.rand(256, generator=draw).pow(2) * 900 + 100).long().tolist()
    split = Split(4, 2, 4)
    assert padding(lengths, batches_of(lengths, split, False)) < 0.4 * padding(
        lengths, batches(StepSampler(256, split, seed=1), split)
    )


def test_a_sequential_order_stays_the_datas_own() -> None:
    sampler = StepSampler(5, Split(2, 2), seed=3, lengths=[5, 1, 4, 2, 3], shuffle=False)
    assert list(sampler) == [0, 1, 2, 3, 4, 5, 5, 5]


def test_an_epoch_is_a_function_of_the_seed_and_its_number() -> None:
    first, second = (StepSampler(21, Split(2, 2, 2), seed=9, lengths=list(range(1, 22))) for _ in range(2))
    for epoch in (2, 0, 1):
        second.set_epoch(epoch)
    first.set_epoch(1)
    assert list(first) == list(second)
    second.set_epoch(2)
    assert list(first) != list(second)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.sampled_from(SPLITS), st.booleans())
@settings(max_examples=200, deadline=None)
def test_places_hold_every_row_once_and_fewer_silent_ones_than_a_pass(
    lengths: list[int], split: Split, packed: bool
) -> None:
    places = deal(list(reversed(range(len(lengths)))), split, lengths, packed=packed)
    counted = Counter(places)
    silent = counted.pop(len(lengths), 0)
    assert counted == dict.fromkeys(range(len(lengths)), 1) and silent < split.pass_size
    assert len(places) % split.pass_size == 0


def test_lengths_of_another_number_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="one length for each of 3 examples, found 2"):
        deal([0, 1, 2], Split(2), [4, 4])


# --- Silent places in a data set and a collator -----------------------------------------------------------------------


def test_a_silent_place_is_left_out_of_a_batch_with_other_rows(processor: Any, drawn: list[Any]) -> None:
    rows, collate = WithSilentPlaces(drawn[:5]), SilentCollator(ChatCollator(processor))
    batch, expected = collate(rows.__getitems__([3, 5, 5, 1])), ChatCollator(processor)([drawn[3], drawn[1]])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[k], expected[k]) for k in batch)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_of_silent_places_is_one_short_row_without_a_target(
    packing: bool, processor: Any, drawn: list[Any]
) -> None:
    collator = ChatCollator(
        processor, packing=packing, tag_sources=["drawn"], source_objectives={drawn[0].source: "nll"}
    )
    lengths = [collator.measure(row).tokens for row in drawn[:5]]
    batch = SilentCollator(collator)([WithSilentPlaces(drawn[:5], lengths)[5]] * 3)
    assert batch["input_ids"].numel() == min(lengths)
    assert batch["silent"] is True  # so that its tokens are not counted
    assert (batch["labels"] == -100).all() and (batch["token_kinds"] == 0).all()
    assert (batch["source_ids"] == -1).all() and (batch["objective_ids"] == -1).all()
    assert "pixel_values" in batch  # it goes through all that other rows go through


def test_silent_places_travel_to_workers_of_a_loader(processor: Any, drawn: list[Any]) -> None:
    collate = SilentCollator(ChatCollator(processor))
    assert pickle.loads(pickle.dumps(WithSilentPlaces(drawn[:3])))[3] == Silent(drawn[0])
    loader = DataLoader(
        WithSilentPlaces(drawn[:3]), batch_size=2, sampler=StepSampler(3, Split(2), seed=0), num_workers=1,
        collate_fn=collate, multiprocessing_context="spawn",
    )  # fmt: skip
    assert sorted(len(batch["input_ids"]) for batch in loader) == [1, 2]


def test_a_data_set_that_reads_many_rows_at_once_still_does() -> None:
    class Batched(list[int]):
        def __getitems__(self, places: list[int]) -> list[int]:
            asked.append(places)
            return [self[k] for k in places]

    asked: list[list[int]] = []
    rows = WithSilentPlaces(Batched([10, 11, 12]))
    assert rows.__getitems__([2, 3, 0]) == [12, Silent(10), 10] and asked == [[2, 0]] and len(rows) == 3


# --- The Trainer's arithmetic and what it refuses ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Any:
    return attach_loss(load_model("tiny"))


def trainer_of(model: Any, rows: Any, folder: Path, collate: Any = None, **words: Any) -> DFTTrainer:
    arguments = TrainingArguments(
        str(folder), use_cpu=True, remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True,
        label_names=["labels"], dataloader_pin_memory=False, **words,
    )  # fmt: skip
    return DFTTrainer(model, arguments, collate, rows, objective="dft")


@pytest.mark.parametrize("examples", [1, 7, 8, 20, 21, 24])
@pytest.mark.parametrize("epochs", [0.3, 1.0, 1.1, 2.5])
def test_the_steps_of_a_config_are_the_trainers(examples: int, epochs: float, small: Any, tmp_path: Path) -> None:
    for micro_batch in (1, 2, 4, 8):
        config = resolve_config(("test", {"batch_size": 8, "micro_batch": micro_batch, "epochs": epochs}))
        trainer = trainer_of(
            small, range(examples), tmp_path, lambda rows: {"rows": rows}, num_train_epochs=epochs,
            per_device_train_batch_size=micro_batch, gradient_accumulation_steps=config.accumulation,
        )  # fmt: skip
        loader = trainer.get_train_dataloader()
        assert trainer.set_initial_training_values(trainer.args, loader)[-1] == config.steps(examples)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_steps_of_a_config_do_not_depend_on_the_processes(processes: int) -> None:
    """Batches of each process by accelerate's own sharding, steps by the Trainer's formula."""
    for examples, micro_batch in product(range(1, 40), (1, 2)):
        config = resolve_config(("test", {"batch_size": 8, "micro_batch": micro_batch, "processes": processes}))
        split = Split(micro_batch, processes, config.accumulation)
        length = len(
            BatchSamplerShard(BatchSampler(StepSampler(examples, split, seed=0), micro_batch, False), processes)
        )
        assert -(-length // config.accumulation) == config.steps(examples)


def test_the_data_loader_draws_what_the_sampler_says_epoch_by_epoch(small: Any, tmp_path: Path) -> None:
    def collate(rows: list[int]) -> dict[str, Any]:
        return {"rows": torch.tensor(rows)}

    trainer = trainer_of(
        small, range(21), tmp_path, collate, per_device_train_batch_size=4, gradient_accumulation_steps=2, data_seed=3
    )
    loader = trainer.get_train_dataloader()
    assert trainer.train_dataset == range(21) and trainer.data_collator is collate  # as they were given
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        drawn = [batch["rows"].tolist() for batch in loader]
        assert sorted(chain(*drawn)) == list(range(21)) and [len(rows) for rows in drawn[:4]] == [4] * 4
        pairs = [set(chain(*drawn[k : k + 2])) for k in range(0, len(drawn), 2)]
        assert pairs == stock_steps(21, 3, epoch, 8)


def test_a_resumed_process_of_several_draws_the_rest_of_its_epoch(small: Any, tmp_path: Path) -> None:
    """As the Trainer skips: batches left out, then the epoch told, which must reach the sampler through three others."""
    for process in (0, 1):
        trainer = trainer_of(small, range(21), tmp_path, lambda rows: {"rows": torch.tensor(rows)},
                             per_device_train_batch_size=2, gradient_accumulation_steps=2)  # fmt: skip
        trainer.get_total_train_batch_size = lambda args: 8  # type: ignore[method-assign]
        trainer.accelerator.prepare = lambda loader, process=process: prepare_data_loader(  # type: ignore[method-assign]
            DataLoader(loader.dataset, batch_size=2, sampler=loader.sampler, collate_fn=loader.collate_fn),
            num_processes=2, process_index=process, put_on_device=False,
        )  # fmt: skip
        loader = trainer.get_train_dataloader()
        loader.set_epoch(1)
        whole = [batch["rows"].tolist() for batch in loader]
        resumed = skip_first_batches(trainer.get_train_dataloader(), 2)
        resumed.set_epoch(1)
        assert [batch["rows"].tolist() for batch in resumed] == whole[2:] and len(whole) == 6
        first = [batch["rows"].tolist() for batch in trainer.get_train_dataloader()]
        assert first != whole


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "depend on the number of processes"),
        ({"dataloader_drop_last": True}, "leaves examples out"),
        ({"accelerator_config": {"split_batches": True}}, "patches of pictures"),
        ({"accelerator_config": {"dispatch_batches": True}}, "patches of pictures"),
    ],
)
def test_what_would_make_a_step_another_is_refused(
    words: dict[str, Any], match: str, small: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=match):
        trainer_of(small, range(8), tmp_path, **copy.deepcopy(words))


def test_an_endless_data_set_is_trained_in_its_own_order_by_one_process(small: Any, tmp_path: Path) -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(5))

    def collate(rows: list[int]) -> dict[str, Any]:
        return {"rows": torch.tensor(rows), "pixel_values": torch.zeros(7, 3)}

    trainer = trainer_of(small, Stream(), tmp_path, collate, max_steps=2, per_device_train_batch_size=2)
    found = list(trainer.get_train_dataloader())
    assert [batch["rows"].tolist() for batch in found] == [[0, 1], [2, 3], [4]]
    assert all(batch["pixel_values"].shape == (7, 3) for batch in found)  # accelerate's own choice would cut them to 2


@pytest.mark.parametrize("packing", [False, True])
def test_the_trainer_deals_by_length_as_its_collator_packs_or_pads(
    packing: bool, small: Any, processor: Any, drawn: list[Any], tmp_path: Path
) -> None:
    collator = ChatCollator(processor, packing=packing)
    lengths = [collator.measure(row).tokens for row in drawn[:16]]
    trainer = trainer_of(small, drawn[:16], tmp_path, collator, per_device_train_batch_size=2,
                         gradient_accumulation_steps=4, data_seed=1)  # fmt: skip
    trainer.lengths = lengths
    expected = StepSampler(16, Split(2, 1, 4), seed=1, lengths=lengths, packed=packing)
    drawn_by_length = [lengths[k] for k in expected]
    batches = list(trainer.get_train_dataloader())
    if packing:
        assert [int(batch["cu_seq_lens_q"][-1]) for batch in batches] == [
            sum(drawn_by_length[k : k + 2]) for k in range(0, 16, 2)
        ]
    else:
        assert [batch["input_ids"].shape[1] for batch in batches] == [
            max(drawn_by_length[k : k + 2]) for k in range(0, 16, 2)
        ]
    assert drawn_by_length != [
        lengths[k] for k in StepSampler(16, Split(2, 1, 4), seed=1, lengths=lengths, packed=not packing)
    ]


def test_a_config_refuses_other_strategies_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="must be one of random, sequential, found 'group_by_length'"):
        resolve_config(("test", {"train_sampling_strategy": "group_by_length"}))
    assert resolve_config(("test", {"train_sampling_strategy": "sequential"})).trainer == {
        "train_sampling_strategy": "sequential"
    }
