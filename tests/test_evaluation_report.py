"""Evaluation report: what the page and the tables say, counted from random verdicts; the page is driven in headless Chromium."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from made_evaluation import make_report, make_rows, make_samples
from PIL import Image
from rich.console import Console

from vlm_dft import evaluation_samples
from vlm_dft.comparing import compare_runs, read_runs
from vlm_dft.conclusions import also_said, whole_rows
from vlm_dft.evaluation_cells import extra_rows
from vlm_dft.evaluation_html import render_evaluation
from vlm_dft.evaluation_report import evaluation_tables, write_evaluation
from vlm_dft.evaluation_samples import make_pictures, sample_blocks

HOSTILE = [
    "</script><script>document.title='taken'</script>",
    "<img src=http://127.0.0.1:9/x onerror=\"document.title='taken'\">",
    "<!-- <script> \x00 \x1b[31m \u2028 \ud83d & &amp; ' \" \\",
]
SKILL = {"base": 0.4, "sft": 0.5, "dft": 0.6}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to look at pages with")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three runs on two benchmarks, 90 samples, hostile responses and a long one among them."""
    pictures = [Image.effect_noise((900, 300), 40 + k).convert("RGB") for k in range(3)]
    samples = make_samples(pictures, {"mathvista": 60, "we<b>math": 30})
    scores, responses = make_rows(samples, SKILL, [*HOSTILE, "y" * 199_900, "so " * 20, ""])
    return {
        "report": make_report(scores, tmp_path_factory.mktemp("runs")),
        "samples": samples,
        "scores": scores,
        "responses": responses,
    }


@pytest.fixture(scope="module")
def page(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_evaluation(
        folder, made["report"], samples=made["samples"], scores=made["scores"], responses=made["responses"]
    )
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def rows_of(made: dict[str, Any], run: str) -> list[dict[str, Any]]:
    return [row for rows in made["scores"][run].values() for row in rows]


def read_blocks(text: str) -> dict[str, Any]:
    found = re.findall(r"<script type=application/json id=([\w-]+)>(.*?)</script>", text, re.DOTALL)
    return {name: json.loads(value) for name, value in found}


def shown(page: Browser) -> int:
    said = page.run("document.querySelector('#said').textContent")
    return int(said.split(" samples")[0].split("of ")[-1].replace(",", ""))


def ids(page: Browser) -> list[str]:
    return list(page.run("[...document.querySelectorAll('#list article code')].map(box => box.textContent)"))


def test_the_report_in_json_is_the_report_and_holds_no_nan(made: dict[str, Any], tmp_path: Path) -> None:
    report = {**made["report"], "odd": {"infinite": float("inf"), "list": [float("nan"), 0.5]}}
    write_evaluation(tmp_path, report, samples={}, scores={}, responses={})
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found == {**made["report"], "odd": {"infinite": None, "list": [None, 0.5]}}
    assert "id=samples" not in (tmp_path / "report.html").read_text()


def test_every_text_of_a_sample_is_in_the_page_and_none_of_it_as_markup(made: dict[str, Any], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script>document" not in text and "<img src=http" not in text and "we<b>math" not in text
    entries = read_blocks(text)["data"]["samples"]
    assert len(entries) == 90
    first = entries[0]["answers"][0][0]
    assert first["response"] == made["responses"]["base"]["mathvista"][0]["response"]
    assert first["official"] == [0, "7", "last_line"] or first["official"][0] == 1
    third = entries[2]["answers"][1][0]["response"]
    assert third.startswith("<!-- <script> \x00 \x1b[31m \u2028 \ufffd & &amp; ' \" \\")  # but half a surrogate pair


def test_names_of_runs_groups_and_models_are_escaped(tmp_path: Path) -> None:
    name = "<img src onerror>\"'"
    samples = make_samples([], {"mathvista": 4})
    for k, sample in enumerate(samples["mathvista"]):
        sample.groups.update({f"{name} group": f"{name} value {k % 2}", "same": "everywhere"})
    scores, responses = make_rows(samples, {name: 0.5, "b": 0.5}, ["so"])
    report = make_report(scores, tmp_path / "runs")
    report["runs"]["b"]["model"] = f"{name} model"
    report["warnings"] = [f"{name} warning"]
    write_evaluation(tmp_path, report, samples=samples, scores=scores, responses=responses)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src" not in text and "by subject" in text and "by same" not in text  # which tells nothing apart
    for what in ("group", "value 1", "model", "warning"):
        assert f"&lt;img src onerror&gt;&quot;&#x27; {what}" in text


def test_the_page_compares_by_the_benchmarks_own_numbers_and_says_what_the_terminal_says(tmp_path: Path) -> None:
    samples = make_samples([], {"quiz": 40})
    scores, responses = make_rows(samples, {"a": 0.2, "b": 0.9}, ["so"])
    for run, found in scores.items():
        for k, row in enumerate(found["quiz"]):
            row["cluster"] = f"seed {k // 4}"
        said = {"benchmark": "quiz", "splits": {"testmini": {"extra": {"worst_case": {}}}}}
        (tmp_path / run).mkdir()
        (tmp_path / run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found["quiz"]))
        (tmp_path / run / "results.json").write_text(json.dumps(said))
    report = compare_runs(read_runs([str(tmp_path / run) for run in scores]))
    row = next(row for _, _, row in whole_rows(report, "official"))
    text = unescape(render_evaluation(report, samples=samples, scores=scores, responses=responses))
    own = text.partition("the benchmark's own numbers")[2].partition("</details>")[0]
    assert own.count("worst_case, worst") == 2  # by both rules
    more = list(also_said(report, row))
    assert more and all(f"<li>{line}</li>" in text for line in more)


def test_pictures_are_small_and_each_is_held_once(page: Path) -> None:
    blocks = read_blocks(page.read_text(encoding="utf-8"))
    assert len(blocks["pictures-0"]) == 3  # of 90 samples
    assert all(uri.startswith("data:image/webp;base64,") for uri in blocks["pictures-0"])
    assert [entry["pictures"] for entry in blocks["data"]["samples"][:4]] == [[0], [1], [2], [0]] or {
        tuple(entry["pictures"]) for entry in blocks["data"]["samples"]
    } == {(0,), (1,), (2,)}


def test_pictures_beyond_the_budget_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    draw = random.Random(0)
    noise = [Image.frombytes("RGB", (64, 64), draw.randbytes(64 * 64 * 3)) for _ in range(6)]
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    samples = make_samples([*noise, str(tmp_path / "broken.png")], {"mathvista": 7})
    whole = make_pictures(samples, [("mathvista", f"mathvista-{k}") for k in range(7)])
    size = max(len(uri) for uri in whole.uris) * 3 // 4
    assert (len(whole.uris), whole.left_out, whole.unreadable) == (6, 0, 1)
    monkeypatch.setattr(evaluation_samples, "PICTURE_BUDGET", 3 * size)
    scores, responses = make_rows(samples, {"a": 0.5}, ["so"])
    blocks, notes = sample_blocks(["a"], samples, scores, responses)
    assert len(read_blocks(blocks)["pictures-0"]) == 3
    assert any(note.startswith("3 of 6 pictures are left out") for note in notes)
    assert any("1 pictures could not be read" in note for note in notes)


def test_responses_are_shortened_when_all_of_them_pass_the_budget_and_the_page_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples = make_samples([], {"mathvista": 10})
    scores, responses = make_rows(samples, {"a": 0.5}, ["z" * 30_000, "z"])
    monkeypatch.setattr(evaluation_samples, "TEXT_BUDGET", 50_000)
    blocks, notes = sample_blocks(["a"], samples, scores, responses)
    found = [entry["answers"][0][0] for entry in read_blocks(blocks)["data"]["samples"]]
    assert [len(answer["response"]) for answer in found[::2]] == [8_005] * 5
    assert (
        found[0]["response"].startswith("zzz")
        and found[0]["response"][-60:] == responses["a"]["mathvista"][0]["response"][-60:]
    )
    assert found[0]["length"] > 30_000 and "length" not in found[1]
    assert "5 of 10 responses are shortened in this page to their beginning and end, 8,000 characters" in notes[0]


def test_without_the_benchmarks_data_the_verdicts_are_listed_all_the_same(made: dict[str, Any]) -> None:
    blocks, notes = sample_blocks(list(SKILL), {}, made["scores"], made["responses"])
    assert {entry["question"] for entry in read_blocks(blocks)["data"]["samples"]} == {None}
    assert "questions and pictures of 90 samples are not shown" in notes[0]


def test_the_tables_fit_eighty_columns_and_say_the_numbers(made: dict[str, Any], tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    for table in evaluation_tables(made["report"]):
        assert console.measure(table).minimum <= 80
        console.print(table)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "…" not in " ".join(lines)
    rows = made["scores"]["dft"]["mathvista"]
    right = sum(row["correct"] for row in rows)
    abstained = sum(row["extracted"] is None for row in rows)
    assert any(
        re.fullmatch(rf"dft 60 {100 * right / 60:.1f} ± .* {abstained}, {abstained} {abstained}", line)
        for line in lines
    )
    assert "we<b>math, testmini" in " ".join(lines)
    base = made["scores"]["base"]["mathvista"]
    won = sum(a["correct"] and not b["correct"] for a, b in zip(rows, base, strict=True))
    lost = sum(b["correct"] and not a["correct"] for a, b in zip(rows, base, strict=True))
    assert any(line.startswith("dft − base") and f" {won}, {lost} " in line for line in lines)


def test_one_benchmark_alone_is_told_by_group_in_the_terminal(tmp_path: Path) -> None:
    scores, _ = make_rows(make_samples([], {"mathvista": 30}), {"dft": 0.5}, ["so"])
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    for table in evaluation_tables(make_report(scores, tmp_path / "runs")):
        console.print(table)
    some = [row for row in scores["dft"]["mathvista"] if row["groups"]["subject"] == "algebra"]
    algebra, robust = ([verdict["correct"] for verdict in found] for found in (some, [row["robust"] for row in some]))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    row = rf"algebra 10 {10 * sum(algebra):.1f} ± \S+ {10 * sum(robust):.1f} ± \S+"  # of one run by both rules
    assert any(re.fullmatch(row, line) for line in lines)
    assert "run − against" not in " ".join(lines)


def test_a_benchmark_is_not_named_twice_for_its_one_split_nor_equal_comparisons_for_both_rules(tmp_path: Path) -> None:
    scores, _ = make_rows(make_samples([], {"mathvista:testmini": 30}), {"a": 0.5, "b": 0.7}, ["so"])
    for run in scores.values():
        for row in run["mathvista:testmini"]:
            row["robust"] |= {"correct": row["correct"]}
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    for table in evaluation_tables(make_report(scores, tmp_path / "runs")):
        console.print(table)
    text = console.export_text()
    assert "mathvista:testmini, testmini" not in text and "testmini, both" in text
    assert text.count("b − a") == 1


def test_further_metrics_are_rows_by_name_with_the_robust_value_where_it_differs() -> None:
    share = {"accuracy": 0.412, "stderr": 0.05, "low": 0.3, "high": 0.5, "count": 40}
    worst = {"worst": share, "robustness": {"value": 0.5, "stderr": 0.1}, "seeds": 60}
    four = {"counts": {"IK": 3}, "rates": {"IK": 0.075, "RM_loose": None}}
    extra = {
        "pass@2": {**share, "robust": {**share, "accuracy": 0.5}},
        "worst_case": {**worst, "robust": {**worst, "robustness": None}},
        "four_dimensional": four,
    }
    assert extra_rows({"runs": {"dft": {"extra": extra}, "sft": {"extra": {}}}}) == {
        "": {"pass@2": {"dft": ("41.2 ± 5.0", "50.0 ± 5.0")}},
        "worst case": {
            "worst": {"dft": ("41.2 ± 5.0", "")}, "robustness": {"dft": ("50.0 ± 10.0", "")}, "seeds": {"dft": ("60", "")},
        },
        "four dimensional": {"rates, IK": {"dft": ("7.5", "")}, "rates, RM loose": {"dft": ("", "")}},
    }  # fmt: skip


@needs_chromium
def test_filters_show_the_samples_that_they_name(made: dict[str, Any], page: Path, chromium: Browser) -> None:
    base, dft = rows_of(made, "base"), rows_of(made, "dft")
    every = list(zip(*(rows_of(made, run) for run in SKILL), strict=True))
    expected = {
        "show=2-0": [a["id"] for a, b in zip(dft, base, strict=True) if a["correct"] and not b["correct"]],
        "show=0-2&rule=robust": [
            b["id"] for a, b in zip(dft, base, strict=True) if b["robust"]["correct"] and not a["robust"]["correct"]
        ],
        "show=wrong": [rows[0]["id"] for rows in every if not any(row["correct"] for row in rows)],
        "show=abstained": [rows[0]["id"] for rows in every if any(row["extracted"] is None for row in rows)],
        "show=differ": [rows[0]["id"] for rows in every if any(r["correct"] != r["robust"]["correct"] for r in rows)],
        "split=we<b>math / testmini": [row["id"] for row in base if row["benchmark"] == "we<b>math"],
        "group=skills=arithmetic": [row["id"] for row in base if "arithmetic" in row["groups"]["skills"]],
        "q=FIGURE 17?": ["mathvista-17", "we<b>math-17"],
        "show=wrong&group=subject=algebra&q=figure 1": [
            rows[0]["id"] for k, rows in enumerate(every)
            if not any(row["correct"] for row in rows) and rows[0]["groups"]["subject"] == "algebra" and str(k % 60).startswith("1")
        ],
    }  # fmt: skip
    for anchor, names in expected.items():
        chromium.open(
            page, anchor=anchor.replace("<", "%3C").replace(">", "%3E").replace("?", "%3F").replace(" ", "%20")
        )
        assert (anchor, shown(chromium), ids(chromium)) == (anchor, len(names), names[:10])


@needs_chromium
def test_a_run_without_a_benchmark_has_no_response_to_its_samples_and_is_neither_right_nor_wrong(
    tmp_path: Path, chromium: Browser
) -> None:
    samples = make_samples([], {"mathvista": 6, "mathvision": 4})
    scores, responses = make_rows(samples, {"a": 1.0, "b": 0.0}, ["so"])
    del scores["b"]["mathvision"], responses["b"]["mathvision"]
    write_evaluation(
        tmp_path, make_report(scores, tmp_path / "runs"), samples=samples, scores=scores, responses=responses
    )
    right = [row["id"] for row in scores["a"]["mathvista"] if row["correct"]]
    chromium.open(tmp_path / "report.html", anchor="show=0-1")
    assert ids(chromium) == right
    chromium.open(tmp_path / "report.html", anchor="split=mathvision%20/%20testmini")
    assert chromium.run("document.querySelectorAll('.response.none').length") == shown(chromium) == 4


@needs_chromium
def test_nothing_is_fetched_run_or_complained_of(page: Path, chromium: Browser) -> None:
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.open(page)
    assert ids(chromium)[:2] == ["mathvista-0", "mathvista-1"]
    text = chromium.run("document.querySelector('#list').innerText")
    assert "</script><script>document.title='taken'</script>" in text and "<img src=http://127.0.0.1:9/x" in text
    assert chromium.run("document.title") == "base, sft and dft on mathvista, we<b>math"
    assert chromium.run("[...document.images].every(image => image.complete && image.naturalWidth === 640)")
    assert chromium.requests == [page.resolve().as_uri()] and chromium.errors == []


@needs_chromium
def test_a_long_response_is_shortened_until_asked_for(page: Path, chromium: Browser) -> None:
    chromium.open(page)
    box = "document.querySelectorAll('#list article')[3].querySelector('pre')"
    button = "document.querySelectorAll('#list article')[3].querySelector('.more')"
    short = chromium.run(f"{box}.textContent")
    assert short.startswith("y" * 700 + "\n\n⋯ 198,7") and short.endswith(".") and "The answer is" in short
    took = chromium.run(
        f"(() => {{const t = performance.now(); {button}.click(); {box}.scrollHeight; return performance.now() - t}})()"
    )
    assert chromium.run(f"{box}.textContent.length") > 199_900 and took < 2_000
    chromium.run(f"{button}.click()")
    assert chromium.run(f"{box}.textContent") == short


@needs_chromium
def test_keys_move_through_the_samples_and_the_address_keeps_the_place(page: Path, chromium: Browser) -> None:
    chromium.open(page)
    current = "document.querySelector('[aria-current=true] code').textContent"
    for _ in range(3):
        chromium.press("j")
    assert chromium.run(current) == "mathvista-2" and chromium.run("document.activeElement.tagName") == "ARTICLE"
    chromium.press("k")
    chromium.press("ArrowRight")
    assert ids(chromium)[0] == "mathvista-10" and chromium.run("location.hash") == "#at=11"
    chromium.run("document.querySelector('#chips [data-key=wrong]').click()")
    assert "show=wrong" in chromium.run("location.hash")
    chromium.press("/")
    chromium.press("j")
    assert chromium.run("document.activeElement.id + document.activeElement.value") == "qj"  # typed, not moved
    chromium.open(page, anchor="at=89")
    chromium.run("new Promise(done => setTimeout(done, 200))")  # what was typed before is not searched any more
    assert ids(chromium)[0] == "we<b>math-20" and chromium.run(current) == "we<b>math-28"


@needs_chromium
def test_the_page_is_usable_on_a_narrow_screen_and_named_for_screen_readers(page: Path, chromium: Browser) -> None:
    chromium.size(400, 800)
    chromium.open(page)
    assert chromium.run("document.documentElement.scrollWidth") <= 400
    unnamed = (
        "[...document.querySelectorAll('button, input, select, svg, article, img')]"
        ".filter(box => !(box.textContent.trim() || box.ariaLabel || box.alt || (box.labels && box.labels.length))).length"
    )
    assert chromium.run(unnamed) == 0
    chromium.size(1200, 900)


@needs_chromium
def test_draws_are_turned_over_and_a_run_is_right_where_most_of_them_are(
    made: dict[str, Any], tmp_path: Path, chromium: Browser
) -> None:
    samples = make_samples([], {"mathvista": 4})
    scores: dict[str, Any] = {"a": {"mathvista": []}}
    responses: dict[str, Any] = {"a": {"mathvista": []}}
    for k, sample in enumerate(samples["mathvista"]):
        for draw in range(3):
            some_scores, some_responses = make_rows(
                {"mathvista": [sample]}, {"a": float(draw < k)}, [f"draw {draw}"], 3
            )
            scores["a"]["mathvista"].append(
                {**some_scores["a"]["mathvista"][0], "draw": draw, "extracted": "1", "correct": draw < k}
            )
            responses["a"]["mathvista"].append({**some_responses["a"]["mathvista"][0], "draw": draw})
    write_evaluation(
        tmp_path, make_report(scores, tmp_path / "runs"), samples=samples, scores=scores, responses=responses
    )
    chromium.open(tmp_path / "report.html", anchor="show=right")
    assert ids(chromium) == ["mathvista-2", "mathvista-3"]
    assert "2 of 3 draws right" in chromium.run("document.querySelector('.draws').textContent")
    assert chromium.run("document.querySelector('pre').textContent").startswith("draw 0")
    chromium.run("document.querySelector('.draws .on').click()")
    assert chromium.run("document.querySelector('pre').textContent").startswith("draw 1")
