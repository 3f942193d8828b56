"""The dry run: every number of a run before it, on paper for the published models, from rows and a processor where they are here."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.cli import main

PAPER = "--model Qwen/Qwen2.5-VL-7B-Instruct --recipe wethink --engine zero3 --nproc 8".split()


def look(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """(the numbers, the text) of a dry run."""
    file = tmp_path / "numbers.json"
    assert main(["train", *words, "--dry-run", "--json", str(file)]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def test_the_paper_s_setting_on_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, out = look(tmp_path, capsys, *PAPER)
    assert found["batch"] == {"processes": 8, "micro_batch": 1, "accumulation": 16, "batch_size": 128}
    assert (found["rows"], found["steps"]) == (126000, 985)  # ceil(126,000 / 128)
    assert found["tokens"] == {"why": "the rows are on the hub"}
    assert (
        found["schedule"] == "learning rate 5e-05 after a rise of 99 steps, then down to 0 along a cosine at step 985"
    )
    zero = found["engine"]["settings"]["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_param_persistence_threshold"]) == (3584**2, 35840)
    memory = found["memory"]
    assert memory["parts"] == {"vision": 631975680, "merger": 44574464, "language": 7070619136, "head": 544997376}
    assert memory["fits"] and memory["gpu"] == 80e9 and "80 GB assumed" in memory["gpu_from"]
    assert sum(memory["items"].values()) < memory["total"] < 1.05 * sum(memory["items"].values()) + 1.6e9
    for line in (
        "# global batch: 8 processes x 1 examples x 16 accumulated = 128", "# steps: about 985 for 126,000 rows", '"stage": 3',
        "# tokens: not estimated, the rows are on the hub", "# engine: zero3, every auto filled", "fits; 80 GB a GPU",
        "vlm-dft-launch --standalone --nproc_per_node 8 -m vlm_dft.cli train --model Qwen/Qwen2.5-VL-7B-Instruct --recipe wethink --engine zero3 "
        "--processes 8", "no model was loaded, nothing was downloaded",
    ):  # fmt: skip
        assert line in out


def test_a_model_too_large_is_said_not_to_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, out = look(tmp_path, capsys, "--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--recipe", "wethink")
    assert not found["memory"]["fits"] and "does NOT fit: more GPUs under zero3 or fsdp2, zero3_offload, LORA=" in out


def test_a_model_of_unknown_size_is_said_to_be_unknown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, out = look(
        tmp_path, capsys, "--model", "someone/else", "--recipe", "wethink", "--engine", "zero3", "--nproc", "8"
    )
    assert "the sizes of someone/else are not known" in found["memory"]["why"] and "# memory: not estimated" in out
    assert (
        "reduce_bucket_size, stage3_prefetch_bucket_size, stage3_param_persistence_threshold when the model's config is here"
        in out
    )


def test_tokens_are_estimated_from_rows_that_are_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the collator's own count, a picture's tokens among them."""
    from PIL import Image

    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    row = {
        "messages": [{"role": "user", "content": "<image>How many?"}, {"role": "assistant", "content": "Two bars."}],
        "images": ["a.png"],
    }
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({**row, "id": k}) + "\n" for k in range(40)))
    found, out = look(
        tmp_path,
        capsys,
        "--recipe",
        str(tmp_path / "own.jsonl"),
        "--data",
        str(tmp_path),
        "--batch_size",
        "4",
        "--epochs",
        "2",
    )
    tokens = found["tokens"]
    assert (found["rows"], found["steps"], tokens["sample"], tokens["media"]) == (40, 20, 32, 4)
    assert tokens["per_step"] == {name: 4 * tokens[name] for name in ("tokens", "media", "response")}
    assert (
        f"# tokens: about {4 * tokens['tokens']:,.0f} a step (16 of images" in out and "estimated from 32 rows" in out
    )


def test_several_nodes_are_launched_as_the_script_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("NNODES", "2"), ("NODE_RANK", "1"), ("MASTER_ADDR", "10.0.0.1")):
        monkeypatch.setenv(name, value)
    found, _ = look(tmp_path, capsys, "--recipe", "wethink", "--nproc", "16", "--batch_size", "64")
    assert found["launch"].startswith(
        "vlm-dft-launch --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 --nproc_per_node 8 -m vlm_dft.cli train"
    )
    monkeypatch.setenv("HOSTFILE", "hosts")
    assert look(tmp_path, capsys, "--recipe", "wethink")[0]["launch"].startswith(
        "deepspeed --hostfile hosts --master_port 29500"
    )


def test_the_launch_line_is_one_that_a_shell_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "wethink", "--objective", "floor(minimum=0.1)", "--output", str(tmp_path / "two words")]
    line = look(tmp_path, capsys, *words)[0]["launch"]
    assert shlex.split(line) == ["vlm-dft", "train", *words]


def test_max_steps_end_the_run_and_epochs_are_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, out = look(tmp_path, capsys, "--recipe", "wethink", "--max_steps", "7")
    assert found["steps"] == 7 and "# steps: max_steps says 7 for 126,000 rows\n" in out


def test_the_host_s_memory_is_that_of_all_processes_of_a_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--model Qwen/Qwen2.5-VL-7B-Instruct --recipe wethink --engine zero3_offload --nproc 8".split()
    memory = look(tmp_path, capsys, *words)[0]["memory"]
    assert memory["total"] < memory["gpu"] and memory["host_of_node"] == 8 * memory["host"]
    monkeypatch.setenv("NNODES", "2")
    assert look(tmp_path, capsys, *words)[0]["memory"]["host_of_node"] == 4 * memory["host"]
    for host, said in (
        (memory["host_of_node"] // 2, "fits; "),
        (memory["host_of_node"] // 2 - 1, "does NOT fit the host's memory"),
    ):
        monkeypatch.setattr("vlm_dft.dry_run.host_bytes", lambda host=host: host)
        found, out = look(tmp_path, capsys, *words)
        assert found["memory"]["fits"] == (said == "fits; ") and f"#   {said}" in out


def test_evaluation_while_training_without_a_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--recipe", "wethink", "--evaluate_every", "10", "--dry-run"]) == 2
    assert "evaluate_every needs a benchmark, and the recipe names none" in capsys.readouterr().err


def test_numbers_that_cannot_be_written_are_refused_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--json", "/nowhere/x.json"]) == 2
    assert "--json '/nowhere/x.json': expected the name of a file" in capsys.readouterr().err


def test_a_mixture_is_shown_with_rows_and_shares_before_anything_is_read_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers of 1 and of 3 words; half the response tokens each: three times as many rows of the short ones, near enough."""
    for name, answer, count in (("short", "Two.", 90), ("long", "One. One. One. One. One. One.", 90)):
        row = {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": answer}]}
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, "id": k}) + "\n" for k in range(count)))
    card = tmp_path / "mixed.yaml"
    entry = "{recipe: %s.jsonl, share: 0.5}"
    card.write_text(f"{{description: d, licence: x, mixture: [{entry % 'short'}, {entry % 'long'}]}}")
    found, out = look(tmp_path, capsys, "--recipe", str(card), "--data", str(tmp_path), "--batch_size", "10")
    short, long = found["mixture"]
    assert (short["name"], short["rows"], short["examples"]) == ("short", 90, 90) and 0 < long["examples"] < 45
    assert short["response"] == pytest.approx(long["response"], abs=long["response"] / long["examples"])
    assert found["rows"] == 90 + long["examples"] and found["steps"] == -(-found["rows"] // 10)
    assert "# mixture, shuffled:" in out and f"#   long: {long['examples']} examples of 90 rows, about" in out
    limited, _ = look(tmp_path, capsys, "--recipe", str(card), "--data", str(tmp_path), "--limit", "30")
    assert [one["rows"] for one in limited["mixture"]] == [30, 30]


def test_a_mixture_of_a_set_on_the_hub_says_what_it_cannot_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out = look(tmp_path, capsys, "--recipe", "visual_math_mixture")
    assert found["rows"] is None and "mixture" not in found and "# tokens: not estimated, " in out
    assert "# mixture, shuffled: tabmwp, wethink" in out


def test_a_dry_run_measures_the_rows_that_would_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Filtered rows are not measured; bad ones end it only where training would refuse them too."""
    rows = [{"q": "How many?", "a": "Two."}, {"q": "filtered", "a": "word " * 500}, {"q": "How many?", "a": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "half a {line\n")
    card = tmp_path / "card.yaml"
    text = 'description: d\nlicence: l\nsource: {files: [rows.jsonl]}\nprompt: "{q}"\nresponse: "{a}"\nkeep: {q: "How many?"}\n'
    card.write_text(text)
    words = ("--recipe", str(card), "--data", str(tmp_path))
    assert main(["train", *words, "--dry-run"]) == 2
    assert "card row 2: column 'a' is null" in capsys.readouterr().err
    for more, said in ((("--bad_rows", "drop"), text), ((), text + "bad_rows: drop\n")):
        card.write_text(said)
        found, out = look(tmp_path, capsys, *words, *more)
        tokens = found["tokens"]
        assert (tokens["sample"], tokens["looked_at"]) == (1, 4) and tokens["longest"] < 100
        assert "estimated from 1 rows; the longest of them has" in out and "3 of 4 rows looked at are not used" in out
    card.write_text(text.replace("How many?", "x") + "bad_rows: drop\n")
    found, _ = look(tmp_path, capsys, *words)
    assert found["tokens"] == {"why": "none of the first 4 rows is used: filtered: q is not 'x'"}


def test_rows_of_a_hub_set_are_measured_where_a_copy_of_them_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = tmp_path / "card.yaml"
    card.write_text('description: d\nlicence: l\nsource: {hub: own/set}\nprompt: "{q}"\nresponse: "{a}"\n')
    data = tmp_path / "data"
    data.mkdir()
    words = ("--recipe", str(card), "--data", str(data))
    assert look(tmp_path, capsys, *words)[0]["tokens"] == {"why": "the rows are on the hub"}
    (data / "train.jsonl").write_text('{"q": "How many?", "a": "Two."}\n' * 3)
    found, _ = look(tmp_path, capsys, *words)
    assert (found["rows"], found["tokens"]["sample"]) == (3, 3)


def test_a_prepared_set_says_what_all_its_rows_measure_and_rows_that_are_dropped_are_not_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "One. "}]
    rows = [{"id": str(k), "messages": [said[0], {**said[1], "content": "One. " * (k % 9)}]} for k in range(90)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # the first has no answer
    card = "description: d\nlicence: l\nsource: {files: [rows.jsonl]}\nbad_rows: drop\n"
    (tmp_path / "own.yaml").write_text(card)
    words = ["--data", str(tmp_path), "--recipe"]
    found, _ = look(tmp_path, capsys, *words, str(tmp_path / "own.yaml"))
    assert found["tokens"]["sample"] == 32 < found["tokens"]["looked_at"]
    out = str(tmp_path / "set")
    file = tmp_path / "made.json"
    assert (
        main(
            [
                "recipes",
                "prepare",
                str(tmp_path / "own.yaml"),
                "--data",
                str(tmp_path),
                "--output",
                out,
                "--json",
                str(file),
            ]
        )
        == 0
    )
    capsys.readouterr()
    made = json.loads(file.read_text())
    found, text = look(tmp_path, capsys, "--recipe", out)
    assert found["tokens"]["sample"] == found["rows"] == made["rows"] == 80 and "estimated from 80 rows" in text
    assert found["tokens"]["response"] == made["accounting"]["tokens"]["response"] / 80
    assert found["tokens"]["longest"] > found["tokens"]["tokens"] and found["tokens"]["most_media"] == 0
