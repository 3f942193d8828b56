"""Nothing is lost: kills at every step, memory that runs out, two processes at once, adapters beside their base."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generation import sample

from vlm_dft.adapters import add_lora
from vlm_dft.collators import ChatCollator
from vlm_dft.errors import ConfigError, ImageError, ModelError
from vlm_dft.generation import AHEAD, answers, generate
from vlm_dft.models import load_model, load_processor

torch.set_num_threads(1)  # processes are forked here


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("tiny")


@pytest.fixture
def samples() -> list[Any]:
    return [sample(k, "What is the total?" + " Say it." * k) for k in range(8)]


def forked(work: Callable[[], Any]) -> int:
    """Run it in a process of its own. Returns how that ended: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        try:
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(event: int, folder: Path) -> None:
    """Kill this process at the so many-th thing that it does to the files of a folder."""
    seen = [0]
    synced = os.fsync

    def count() -> None:
        seen[0] += 1
        if seen[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in ("open", "os.rename", "os.remove") and str(folder) in str(arguments[0]):
            count()

    def fsync(file: int) -> None:
        count()
        synced(file)

    sys.addaudithook(hook)
    os.fsync = fsync


def test_a_run_killed_at_any_step_ends_in_the_file_of_an_uninterrupted_one(
    model: Any, processor: Any, samples: list[Any], tmp_path: Path
) -> None:
    def run(folder: Path, event: int = 0) -> int:
        path = folder / "predictions.jsonl"

        def work() -> None:
            if event:
                die_at(event, folder)
            generate(model, ChatCollator(processor), samples[:5], path, batch_size=3, max_new_tokens=2, show=False)

        folder.mkdir(exist_ok=True)
        return forked(work)

    assert run(tmp_path / "whole") == 0
    whole = (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == [f"s{k}" for k in range(5)]
    kills = 0
    for event in range(1, 60, 2):
        folder = tmp_path / str(event)
        if run(folder, event) == 0:
            break
        kills += 1
        path = folder / "predictions.jsonl"
        if path.is_file() and event % 4 == 1 and (found := path.read_bytes()):
            path.write_bytes(found[: len(found) - event % 7])  # the last line only partly on the disk
        assert run(folder) == 0
        assert path.read_bytes() == whole
    assert 6 <= kills < 29  # it did come to its end: every second step was tried


@pytest.mark.parametrize("error", ["cuda", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_and_the_rows_are_the_same(
    model: Any, processor: Any, samples: list[Any], tmp_path: Path, monkeypatch: Any, error: str
) -> None:
    collator, said = ChatCollator(processor), list[str]()
    whole = generate(model, collator, samples, tmp_path / "whole.jsonl", batch_size=8, show=False)
    original, sizes = model.generate, list[int]()

    def small(**words: Any) -> Any:
        sizes.append(len(words["input_ids"]))
        if sizes[-1] > 3:
            if error == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return original(**words)

    monkeypatch.setattr(model, "generate", small)
    path = tmp_path / "small.jsonl"
    assert generate(model, collator, samples, path, batch_size=8, show=False, say=said.append) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sizes == [8, 4, 2, 2, 2, 2]  # what did not fit is not tried again at its size
    assert said == ["memory does not suffice for a batch of 8: batches as large are halved, the rows stay the same"]
    assert json.loads((tmp_path / "small.meta.json").read_text())["how"]["halved_batches"] == 2


def test_a_prompt_that_does_not_fit_alone_is_named(
    model: Any, processor: Any, samples: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    def none(**words: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(model, "generate", none)
    with pytest.raises(ModelError, match=r"drawn test s7: memory does not suffice for this prompt alone .* Lower max_"):
        generate(model, ChatCollator(processor), samples, tmp_path / "p.jsonl", show=False)


def test_other_errors_are_not_taken_for_memory(
    model: Any, processor: Any, samples: list[Any], monkeypatch: Any
) -> None:
    def broken(**words: Any) -> Any:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        answers(model, ChatCollator(processor), samples)


def test_pictures_are_read_while_the_model_runs(
    model: Any, processor: Any, samples: list[Any], monkeypatch: Any
) -> None:
    import threading

    collator, threads = ChatCollator(processor), set[str]()
    original, ahead = collator.prompts, threading.Semaphore(0)

    def prompts(rows: Any) -> Any:
        threads.add(threading.current_thread().name)
        made = original(rows)
        ahead.release()
        return made

    generated = model.generate

    def waiting(**words: Any) -> Any:
        if not waited:
            for _ in range(1 + AHEAD):  # they come while the model is here
                assert ahead.acquire(timeout=10)
        waited.append(True)
        return generated(**words)

    waited: list[bool] = []
    monkeypatch.setattr(collator, "prompts", prompts)
    monkeypatch.setattr(model, "generate", waiting)
    rows = answers(model, collator, samples, batch_size=2)
    assert [row["id"] for row in rows] == [f"s{k}" for k in range(8)] and len(waited) == 4
    assert all(name.startswith("pictures") for name in threads)
    assert torch.get_num_threads() == 1


def test_a_picture_that_breaks_in_the_other_thread_names_its_sample(
    model: Any, processor: Any, samples: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    samples[2] = sample(2, "?")
    samples[2].images[0] = tmp_path / "broken.png"
    with pytest.raises(ImageError, match=r"drawn test s2, image 0: .*not a readable image"):
        generate(model, ChatCollator(processor), samples, tmp_path / "p.jsonl", batch_size=2, show=False)


def test_two_processes_end_in_the_file_of_one(model: Any, processor: Any, samples: list[Any], tmp_path: Path) -> None:
    from vlm_dft.evaluating import _join

    def run(folder: Path, rank: int, port: int, die: bool) -> None:
        for name, value in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_PORT": port}.items():
            os.environ[name] = str(value)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        share, original = _join(), model.generate

        def generated(**words: Any) -> Any:
            if die and folder_rows(folder):  # a batch is kept
                os.kill(os.getpid(), signal.SIGKILL)
            return original(**words)

        model.generate = generated
        rows = generate(
            model, ChatCollator(processor), samples, folder / "predictions.jsonl", batch_size=1, max_new_tokens=4,
            show=False, share=share,
        )  # fmt: skip
        assert len(rows) == (0 if rank else 8)
        share.wait()

    def both(folder: Path, die: bool = False) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                try:
                    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                    run(folder, rank, port, die)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    def folder_rows(folder: Path) -> list[Path]:
        return [path for path in folder.glob("*part-*.jsonl") if path.stat().st_size]

    for name in ("one", "two", "killed"):
        (tmp_path / name).mkdir()
    generate(
        model, ChatCollator(processor), samples, tmp_path / "one" / "predictions.jsonl", batch_size=1, max_new_tokens=4,
        show=False,
    )  # fmt: skip
    one = (tmp_path / "one" / "predictions.jsonl").read_bytes()
    assert both(tmp_path / "two") == [0, 0]
    assert (tmp_path / "two" / "predictions.jsonl").read_bytes() == one
    assert not list((tmp_path / "two").glob("*part-*"))
    meta = json.loads((tmp_path / "two" / "predictions.meta.json").read_text())
    assert meta["how"]["processes"] == 2
    assert both(tmp_path / "killed", die=True) == [-9, -9]
    assert folder_rows(tmp_path / "killed")
    generate(  # and goes on in one process
        model, ChatCollator(processor), samples, tmp_path / "killed" / "predictions.jsonl", batch_size=1, max_new_tokens=4,
        show=False,
    )  # fmt: skip
    assert (tmp_path / "killed" / "predictions.jsonl").read_bytes() == one
    assert not list((tmp_path / "killed").glob("*part-*"))


def test_adapters_answer_beside_their_base_as_merged_into_it(
    processor: Any, samples: list[Any], tmp_path: Path
) -> None:
    adapted = add_lora(load_model("tiny"), 4)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    name = str(tmp_path / "adapter")
    beside, merged = load_model(name, merge=False), load_model(name)
    assert any("lora_A" in name for name, _ in beside.named_parameters())
    collator = ChatCollator(load_processor(name))
    found = generate(beside, collator, samples, tmp_path / "p.jsonl", show=False)
    assert found == answers(merged, collator, samples)
    assert found != answers(load_model("tiny"), collator, samples)
    with pytest.raises(ConfigError, match="weights: "):
        generate(load_model("tiny"), collator, samples, tmp_path / "p.jsonl", show=False)
