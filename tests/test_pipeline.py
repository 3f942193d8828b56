"""The front door in small: trained, evaluated and reported, finished runs shown again, real data through every part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from vlm_dft.cli import main
from vlm_dft.embedded.drawn import drawn_folder
from vlm_dft.progress import read_metrics

torch.set_num_threads(1)
SMALL = ["--batch_size", "8", "--micro_batch", "8", "--limit", "16", "--epochs", "1", "--eval_limit", "2"]


def run(*words: str) -> int:
    return main(["train", *words])


@pytest.mark.slow
def test_two_objectives_are_trained_evaluated_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert run(*SMALL, "--objective", "dft,nll", "--output", str(output)) == 0
    report = json.loads((output / "report.json").read_text())
    assert list(report["runs"]) == ["base", "dft", "nll"]
    for splits in report["runs"].values():
        assert list(splits) == ["test", "ood_large", "ood_colour", "ood_render"]
        assert all(row["count"] == 2 and 0 <= row["accuracy"] <= 1 and row["stderr"] >= 0 for row in splits.values())
    assert 0 < report["gauge"]["mean_p"] < 1 and "prior" in report["gauge"]["prediction"]
    for folder in (output / "dft", output / "nll", output / "base"):
        answers = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        assert [a["id"] for a in answers] == [s["id"] for s in scores] and len(answers) == 8
    first = [read_metrics(output / o / "metrics.jsonl")[0] for o in ("dft", "nll")]
    assert first[0]["nll"] == first[1]["nll"] and first[0]["loss"] < first[1]["loss"]  # same start, same order of data
    account = json.loads((output / "accounting.json").read_text())["sources"][0]
    assert (account["read"], account["used"], account["dropped"]) == (16, 16, {})
    assert json.loads((output / "mask_report.json").read_text())["samples"][0]["targets"] > 5
    assert "report.html" in {p.name for p in output.iterdir()} and (output / "dft" / "checkpoint-2").is_dir()
    card = (output / "dft" / "README.md").read_text()
    assert "| rows | 16 read, 16 used |" in card and "| drawn | n | base | dft |" in card
    assert report["training"]["dft"]["parts"]["language"]["trainable"] > 0
    capsys.readouterr()
    assert run(*SMALL, "--objective", "dft,nll", "--output", str(output)) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_long_row_is_dropped_and_accounted_for(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": text}]}
        for text in ("a", "b " * 300, "c")
    ]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    output = tmp_path / "run"
    words = ["--recipe", str(tmp_path / "chats.json"), "--max_length", "100", "--batch_size", "2", "--micro_batch", "2"]
    assert run(*words, "--output", str(output)) == 0
    account = json.loads((output / "accounting.json").read_text())["sources"][0]
    assert (account["read"], account["used"]) == (3, 2)
    assert account["dropped"] == {"over max_length = 100 tokens": {"rows": 1, "ids": ["1"]}}
    assert json.loads((output / "report.json").read_text())["runs"] == {}


def test_a_missing_image_names_its_row_before_any_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row: dict[str, Any] = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "images": ["gone.png"],
    }
    (tmp_path / "chats.jsonl").write_text(json.dumps(row))
    assert run("--recipe", str(tmp_path / "chats.jsonl"), "--output", str(tmp_path / "run")) == 2
    assert "chats row 0: no image file at" in capsys.readouterr().err


@pytest.mark.slow
def test_packing_is_a_word_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = {packing: tmp_path / packing for packing in ("true", "false")}
    rows = {}
    for packing, output in outputs.items():
        words = [
            "--recipe",
            "drawn",
            "--packing",
            packing,
            "--max_steps",
            "2",
            "--batch_size",
            "8",
            "--micro_batch",
            "4",
        ]
        assert run(*words, "--limit", "16", "--eval_limit", "2", "--output", str(output)) == 0
        assert ("segment by segment in packed rows" in capsys.readouterr().out) == (packing == "true")
        config = yaml.safe_load((output / "config.yaml").read_text())
        assert config["collator"] == {"packing": packing == "true"}
        report = json.loads((output / "report.json").read_text())
        assert report["runs"]["dft"]["test"]["count"] == 2
        rows[packing] = read_metrics(
            output / "dft" / "metrics.jsonl" if len(list(output.glob("dft"))) else output / "metrics.jsonl"
        )
    for key in ("step", "loss", "nll", "mean_p", "response_tokens"):
        assert [r[key] for r in rows["true"]] == pytest.approx([r[key] for r in rows["false"]], rel=1e-4), key


@pytest.mark.slow
def test_tabmwp_goes_through_every_part(shared: Path, tmp_path: Path) -> None:
    words = [
        "--recipe",
        "tabmwp",
        "--data",
        str(shared / "tabmwp"),
        "--limit",
        "8",
        "--batch_size",
        "4",
        "--micro_batch",
        "2",
    ]
    assert run(*words, "--epochs", "1", "--eval_limit", "3", "--output", str(tmp_path / "run")) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["runs"]["dft"]["test"]["count"] == 3
    assert report["accounting"]["total"]["tokens"]["media"] > 8 * 12


@pytest.mark.slow
def test_conversations_of_several_turns_are_trained_with_proofs_on(shared: Path, tmp_path: Path) -> None:
    words = ["--recipe", "sharegpt_demo", "--data", str(shared / "sharegpt_demo"), "--output", str(tmp_path / "run")]
    assert run(*words, "--epochs", "1") == 0
    samples = json.loads((tmp_path / "run" / "mask_report.json").read_text())["samples"]
    trained = [run["text"] for run in samples[0]["runs"] if run["reason"] in ("response", "end of turn")]
    assert trained == [
        "They're Kane and Gretzka from Bayern Munich.",
        "<|im_end|>",
        "They are celebrating on the soccer field.",
        "<|im_end|>",
    ]


def test_the_drawn_set_is_made_once() -> None:
    folder = drawn_folder()
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert drawn_folder() == folder and (folder / "train.jsonl").stat().st_mtime_ns == before


def test_a_file_of_sources_is_trained_as_it_says_and_a_source_of_no_row_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"source": source, "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes, 3."}]}
        for source in ("ocr", "math") for _ in range(8)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "--recipe",
        str(path),
        "--batch_size",
        "16",
        "--micro_batch",
        "8",
        "--max_steps",
        "2",
        "--objective",
        "floor(minimum=0.2),nll",
    ]
    assert run(*words, "--output", str(tmp_path / "x"), "--source_objectives", "orc=nll") == 2
    assert (
        "names 'orc', but no row is of that source. Did you mean 'ocr'? Sources: ocr, math." in capsys.readouterr().err
    )
    output = tmp_path / "run"
    more = ["--output", str(output), "--source_objectives", "ocr=nll", "--full_weight", "end", "--kl", "0.1"]
    assert run(*words, *more, "--kl_direction", "forward") == 0
    first = read_metrics(output / "floor-minimum=0.2" / "metrics.jsonl")[0]
    assert first["source/ocr/mean_weight"] == 1 and 0 < first["source/math/mean_weight"] < 1
    assert first["kind/end/mean_weight"] == 1
    assert json.loads((output / "accounting.json").read_text())["sources"][0]["used_by_source"] == {"ocr": 8, "math": 8}
    page = (output / "report.html").read_text()
    assert all(said in page for said in ("kl 0.1", "kl_direction forward", "full_weight end", "<dd>ocr nll</dd>"))
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["objective"] == ["floor(minimum=0.2)", "nll"] and config["collator"] == {
        "source_objectives": {"ocr": "nll"}
    }
    path.write_text("".join(json.dumps({**row, "source": "math"}) + "\n" for row in rows))
    assert run(*words, *more[:2], *more[4:], "--kl_direction", "forward") == 2  # other sources, other run
    assert "holds another run" in capsys.readouterr().err


def test_a_column_of_addresses_is_not_taken_for_sources(tmp_path: Path) -> None:
    from vlm_dft.recipes import load_recipe, read_recipe

    rows = [
        {"source": f"address {k}", "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]}
        for k in range(60)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, account = load_recipe(read_recipe(str(path)), None)
    assert {example.source for example in examples} == {"rows"}
    assert account.notes == {"60 different sources are too many to tell apart (at most 50)": 60}


def mixture(folder: Path, **more: Any) -> str:
    entries = [
        {"recipe": "drawn", "share": 0.5}, {"recipe": "drawn_new", "share": 0.3, "objective": "nll"},
        {"recipe": "drawn_noisy", "name": "noisy", "share": 0.2},
    ]  # fmt: skip
    card = {"description": "Three sets.", "licence": "Apache-2.0", "mixture": entries, "benchmark": "none", **more}
    (folder / "mixed.yaml").write_text(yaml.safe_dump(card))
    return str(folder / "mixed.yaml")


def test_a_mixture_is_trained_and_its_account_is_in_the_terminal_the_folder_the_card_and_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    words = [
        "--recipe",
        mixture(tmp_path),
        "--limit",
        "40",
        "--max_steps",
        "2",
        "--batch_size",
        "16",
        "--micro_batch",
        "8",
    ]
    assert run(*words, "--output", str(output)) == 0
    told = capsys.readouterr().out
    accounting = json.loads((output / "accounting.json").read_text())
    assert [source["source"] for source in accounting["sources"]] == ["drawn", "drawn_new", "noisy"]
    assert [source["read"] for source in accounting["sources"]] == [40, 40, 40]
    for source, share in zip(accounting["sources"], (0.5, 0.3, 0.2), strict=True):
        assert source["response_share"] == pytest.approx(share, abs=0.02)
        assert source["read"] == source["used"] + sum(rows["rows"] for rows in source["dropped"].values())
    total = accounting["total"]
    rows = [line.split() for line in told.splitlines() if line.startswith(("drawn", "noisy", "all "))]
    assert [row[0] for row in rows] == ["drawn", "drawn_new", "noisy", "all"] and rows[-1][1] == "120"
    assert "left out by the mixture's shares" in told
    first = read_metrics(output / "metrics.jsonl")[0]
    assert first["source/drawn_new/mean_weight"] == 1 and first["source/noisy/mean_weight"] < 1  # nll beside dft
    card = (output / "README.md").read_text()
    assert f"| rows | 120 read, {total['used']} used |" in card and "| source | licence | read | used |" in card
    assert "| noisy | Apache-2.0 | 40 |" in card
    page = (output / "report.html").read_text()
    assert "<h2>Data</h2>" in page and "<th>noisy</th><td>40</td>" in page
    kept = yaml.safe_load(
        (output / "recipe.yaml").read_text()
    )  # with the cards that it names: enough to repeat the run
    assert kept["mixture"][2]["card"]["source"] == {"embedded": "noisy.jsonl"}
    assert yaml.safe_load((output / "config.yaml").read_text())["rows"] == {"limit": 40}


def test_words_that_cannot_stand_beside_a_mixture_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, output = mixture(tmp_path, order="curriculum"), ["--output", str(tmp_path / "run")]
    assert run("--recipe", card, "--train_sampling_strategy", "random", *output) == 2
    assert "is a curriculum, but train_sampling_strategy = random shuffles it" in capsys.readouterr().err
    assert run("--recipe", card, "--limit", "5", "--source_objectives", "drawn_new=dft", *output) == 2
    said = "source_objectives trains 'drawn_new' with dft, the mixture's card with nll. Take it out of one of them."
    assert said in capsys.readouterr().err
    assert run("--recipe", card, "--bad_rows", "drpo", *output) == 2
    assert "bad_rows must be one of refuse, drop, found 'drpo'. Did you mean 'drop'?" in capsys.readouterr().err


def test_rows_that_cannot_be_used_are_dropped_where_the_command_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}
        for answer in ("a", "", "c")
    ]
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    words = [
        "--recipe",
        str(tmp_path / "chats.json"),
        "--batch_size",
        "2",
        "--micro_batch",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    assert run(*words) == 2
    assert "1 of 3 rows cannot be used: 1 " in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert run(*words, "--bad_rows", "drop", "--workers", "2") == 0
    (account,) = json.loads((tmp_path / "run" / "accounting.json").read_text())["sources"]
    assert (account["read"], account["used"], [rows["ids"] for rows in account["dropped"].values()]) == (3, 2, [["1"]])
    assert "1 rows dropped, " in capsys.readouterr().out
