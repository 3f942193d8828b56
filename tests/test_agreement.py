"""Processes that read other rows than each other end together, with both counts, before a step is taken."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
import torch.multiprocessing as mp

from vlm_dft.agreement import check_same_examples
from vlm_dft.errors import ConfigError


class Rows(list[int]):
    """Examples with a fingerprint."""

    fingerprint = ""


def gathered(rank: int, folder: str, prints: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    rows = Rows(range(3 + rank * (prints[0] != prints[1])))
    rows.fingerprint = prints[rank]
    try:
        check_same_examples(rows, SimpleNamespace(world_size=2))
        said = "same"
    except ConfigError as error:
        said = str(error)
    Path(folder, f"said-{rank}").write_text(said)
    dist.destroy_process_group()


def said_of(folder: Path, prints: list[str]) -> list[str]:
    folder.mkdir()
    mp.spawn(gathered, (str(folder), prints), nprocs=2)
    return [(folder / f"said-{rank}").read_text() for rank in range(2)]


def test_processes_with_other_rows_all_say_so_and_those_with_the_same_go_on(tmp_path: Path) -> None:
    assert said_of(tmp_path / "same", ["a", "a"]) == ["same", "same"]
    one, other = said_of(tmp_path / "other", ["a", "b"])
    assert (
        one == other and "process 0 3 examples (fingerprint a)" in one and "process 1 4 examples (fingerprint b)" in one
    )


def test_one_process_has_nothing_to_agree_on() -> None:
    alone: Any = SimpleNamespace(world_size=1)
    check_same_examples([], alone)
