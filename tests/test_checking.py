"""Checking: every row is looked at, faults are told by kind, and what is shared with a benchmark is found again."""

import io
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from vlm_dft.chat import Example
from vlm_dft.check_report import Findings, advice, report, statistics
from vlm_dft.checking import Checked, LookAt, PictureFacts, RowFacts, check, count_rows, kind_of, rows_at, spread
from vlm_dft.collators import ChatCollator
from vlm_dft.config import TrainConfig
from vlm_dft.contamination import (
    LOOK,
    LOOKS,
    PICTURE,
    QUESTION,
    SAME,
    TEXT,
    overlaps,
    reachable,
    read_items,
    split_cards,
)
from vlm_dft.duplicates import Print
from vlm_dft.errors import RowError, UserError
from vlm_dft.examining import Examined
from vlm_dft.measuring import Measured
from vlm_dft.recipes import Outcome, read_recipe
from vlm_dft.recurring import recurring
from vlm_dft.sources import MediaAccess

ACCESS = MediaAccess()


def picture(k: int) -> Image.Image:
    """A picture that looks like no other k's."""
    drawn = Image.new("RGB", (140, 112), "white")
    pen = ImageDraw.Draw(drawn)
    for bar in range(5):
        height = 10 + 90 * ((k * (bar + 2) * 7 + bar * 5 + k * k) % 11) // 10
        pen.rectangle([6 + 27 * bar, 108 - height, 26 + 27 * bar, 108], fill=(30 * bar, 100, 180 - 20 * bar))
    return drawn


def row(row_id: str, image: str | None, question: str = "", answer: str = "It is blue.") -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"{'<image>' if image else ''}{question or f'Which bar of {row_id} is highest?'}"}
    ]
    return {
        "id": row_id,
        "messages": [*turns, {"role": "assistant", "content": answer}],
        "images": [image] if image else [],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures, a.png to j.png."""
    for k, name in enumerate("abcdefghij"):
        picture(k).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def checked_rows(folder: Path, processor: Any) -> Callable[..., tuple[Checked, dict[str, Any]]]:
    """Rows -> what a check of them finds, and their card."""

    def run(*rows: Any, workers: int = 0, **options: Any) -> tuple[Checked, dict[str, Any]]:
        lines = (json.dumps(one) if isinstance(one, dict) else one for one in rows)
        (folder / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        card = read_recipe(str(folder / "rows.jsonl"))
        collator = ChatCollator(processor)
        return check(card, None, collator=collator, access=ACCESS, workers=workers, **options), card

    return run


Run = Callable[..., tuple[Checked, dict[str, Any]]]


def broken_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of which every other one cannot be used."""
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "page.jpg").write_text("<!doctype html><html>404</html>")
    bad = [
        row("cut", "cut.png"), row("lfs", "lfs.png"), row("page", "page.jpg"), row("gone", "gone.png"),
        row("away", "../away.png"), row("url", "https://example.org/a.png"), row("silent", "a.png", answer=""),
        row("two", "a.png", "<image> and what?"), {"id": "wizard", "messages": [{"role": "wizard", "content": "x"}]},
        {"id": "bare"},
    ]  # fmt: skip
    return [one for k, wrong in enumerate(bad) for one in (wrong, row(f"good {k}", f"{'abcdefghij'[k]}.png"))]


KINDS = {
    "image damaged or cut short": "cut", "git-LFS pointer in place of the file": "lfs", "not an image": "page",
    "image missing": "gone", "image outside the data folder": "away", "image is remote": "url",
    "the response is empty": "silent", "markers and media differ in number": "two",
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_is_looked_at_and_every_fault_has_its_kind(checked_rows: Run, folder: Path, workers: int) -> None:
    found, _ = checked_rows(*broken_rows(folder), workers=workers)
    told = {kind: fault.ids for kind, fault in found.faults.items()}
    assert {kind: told.pop(kind) for kind in KINDS} == {kind: [name] for kind, name in KINDS.items()}
    assert sorted(name for ids in told.values() for name in ids) == ["bare", "wizard"] and "cannot be used" not in told
    assert found.read == 20 and found.faulty == 10
    assert found.ids == [f"good {k}" for k in range(10)] and list(found.places) == list(range(1, 20, 2))
    assert all(len(column) == 10 for column in (found.tokens, found.media, found.response, found.prints))


def test_a_row_over_max_length_is_counted_and_looked_at_all_the_same(checked_rows: Run) -> None:
    found, card = checked_rows(row("long", "a.png", answer="word " * 300), row("short", "b.png"))
    config = TrainConfig(max_length=200)
    told = report(Findings(card, config, found, "all"))
    assert told["over_max_length"] == {"rows": 1, "ids": ["long"]} and told["pictures"]["count"] == 2
    assert any("1 of 2 rows: more than max_length = 200" in line and "dropped" in line for line in told["advice"])


def test_the_tokens_are_those_that_the_collator_makes(checked_rows: Run, folder: Path, processor: Any) -> None:
    found, _ = checked_rows(row("a", "a.png"))
    messages = [
        {"role": "user", "content": "<image>Which bar of a is highest?"},
        {"role": "assistant", "content": "It is blue."},
    ]
    batch = ChatCollator(processor)([Example(messages, [folder / "a.png"])])
    assert list(found.tokens) == [batch["input_ids"].shape[1]]
    assert list(found.response) == [int((batch["labels"] != -100).sum())]
    assert list(found.media) == [int((batch["input_ids"] == processor.image_token_id).sum())]


def test_what_is_odd_but_usable_is_remarked(checked_rows: Run, folder: Path) -> None:
    picture(1).save(folder / "liar.png", "JPEG")
    Image.new("RGBA", (60, 60), (0, 0, 0, 0)).save(folder / "clear.png")
    picture(2).convert("RGBA").save(folder / "opaque.png")
    Image.new("RGB", (9, 200), "red").save(folder / "thin.png")
    found, _ = checked_rows(
        row("liar", "liar.png"), row("clear", "clear.png"), row("opaque", "opaque.png"), row("thin", "thin.png"),
        row("lost", "a.png", "Who wrote Caf\ufffd?"), row("hidden", "a.png", "Who\u202e wrote it?"), row("mute", "b.png", " "),
    )  # fmt: skip
    assert found.faulty == 0
    assert found.remarks == {
        "picture named .png is JPEG": ["liar"],
        "picture with transparency, laid on white": ["clear"],
        "picture under 28 pixels a side": ["thin"],
        "picture over 10 times as long as wide": ["thin"],
        "text with U+FFFD: it was decoded wrongly somewhere": ["lost"],
        "text with invisible or control characters": ["hidden"],
        "no question beside the picture": ["mute"],
    }


def test_letters_are_told_by_script(checked_rows: Run) -> None:
    found, _ = checked_rows(row("1", "a.png", "Что это?"), row("2", "b.png", "这是什么?"), row("3", "c.png", "α + β"))
    assert found.scripts == {"LATIN": 3, "CYRILLIC": 1, "CJK": 1, "GREEK": 1}
    assert found.non_ascii == 6 + 4 + 2


def test_rows_before_a_file_breaks_off_are_checked_and_the_break_is_told(checked_rows: Run) -> None:
    rows = [row(str(k), "a.png", f"Question {k}?") for k in range(70)]
    for workers in (0, 2):
        found, _ = checked_rows(*rows, "{half a li", workers=workers)
        assert found.read >= 70 and found.ids == [str(k) for k in range(70)]
        assert found.stopped or found.faulty == 1  # as reading may or may not go on behind such a line


def test_a_sample_is_spread_evenly_over_all_rows(checked_rows: Run, folder: Path) -> None:
    rows = [row(str(k), None, f"Question {k}?") for k in range(40)]
    found, card = checked_rows(*rows, only=spread(40, 8))
    assert found.ids == ["0", "5", "10", "15", "20", "25", "30", "35"]
    assert count_rows(card, None) == 40 and spread(3, 8) == {0, 1, 2}
    assert all(len(spread(count, 7)) == 7 and max(spread(count, 7)) < count for count in range(7, 60))


def test_rows_that_recur_are_told_from_pictures_asked_about_again(checked_rows: Run, folder: Path) -> None:
    buffer = io.BytesIO()
    picture(3).save(buffer, "JPEG", quality=60)
    (folder / "d.jpg").write_bytes(buffer.getvalue())
    shutil.copy(folder / "a.png", folder / "copy.png")
    found, _ = checked_rows(
        row("a", "a.png", "What is it?"), row("a again", "copy.png", "what is  IT", "It is red."), row("a other", "a.png", "Why?"),
        row("d", "d.png", "How many?"), row("d jpeg", "d.jpg", "How many?"), row("b", "b.png", "How many?"),
        row("text", None, "Is it so?"), row("text again", None, "Is it so?"),
    )  # fmt: skip
    told = recurring(found)
    assert told.looks_count == 0
    names = [[found.ids[k] for k in group] for group in told.rows]
    assert names == [["a", "a again"], ["text", "text again"]] and told.extra == 2
    assert told.answers_differ == 1  # blue and red
    assert [[found.ids[k] for k in pair] for pair in told.alike] == [["d", "d jpeg"]] and told.alike_count == 1
    assert [[found.ids[k] for k in group] for group in told.pictures] == [["a", "a other"]]
    assert [[found.ids[k] for k in group] for group in told.questions] == [["d", "d jpeg", "b"]]


def test_a_look_alike_with_the_question_of_any_row_of_the_other_picture_is_perhaps_the_row_again(
    checked_rows: Run, folder: Path
) -> None:
    picture(3).save(folder / "d.jpg", quality=60)
    found, _ = checked_rows(
        row("d 1", "d.png", "One?"), row("d 2", "d.png", "Two?"), row("jpeg 2", "d.jpg", "Two?"), row("jpeg 3", "d.jpg", "Three?")
    )  # fmt: skip
    told = recurring(found)
    assert [[found.ids[k] for k in pair] for pair in told.alike] == [["d 2", "jpeg 2"]] and not told.looks


def test_the_examples_of_an_unrolled_conversation_are_not_duplicates_of_each_other(
    folder: Path, processor: Any
) -> None:
    turns = [{"role": role, "content": text} for k in "12" for role, text in (("user", f"{k}?"), ("assistant", "Yes."))]
    turns[0]["content"] = "<image>1?"
    (folder / "rows.jsonl").write_text(json.dumps({"id": "r", "messages": turns, "images": ["a.png"]}) + "\n")
    (folder / "card.yaml").write_text(
        "description: d\nlicence: none\nsource: {files: [rows.jsonl]}\nmessages: messages\nimages: images\nunroll: true\n"
    )
    found = check(read_recipe(str(folder / "card.yaml")), str(folder), collator=ChatCollator(processor), access=ACCESS)
    told = recurring(found)
    assert len(found.ids) == 2 and not (told.rows or told.pictures or told.questions)


BENCHMARK = """description: A benchmark of the test's own.
licence: none
splits: {{test: {{files: [items.json]}}}}
images: image
prompt: "Hint: answer with a word.\\nQuestion: {{question}}\\nChoices:\\n(A) yes (B) no"
answer: answer
{record}
scorer: drawn
max_new_tokens: 8
"""


@pytest.fixture
def benchmark(folder: Path) -> str:
    """A benchmark card over the pictures f to i and two texts."""
    items = [
        {"id": name, "image": [f"{name}.png"], "question": f"Which bar of {name} is highest?", "answer": "1"}
        for name in "fghi"
    ]
    items += [{"id": f"text {k}", "image": [], "question": f"How much is 3 + {k}?", "answer": "1"} for k in (1, 2)]
    (folder / "items.json").write_text(json.dumps(items))
    (folder / "own.yaml").write_text(BENCHMARK.format(record="record: {question: question}"))
    return str(folder / "own.yaml")


def test_benchmark_items_in_a_recipe_are_found_by_picture_and_question(
    checked_rows: Run, folder: Path, benchmark: str
) -> None:
    (folder / "bytes.png").write_bytes((folder / "f.png").read_bytes())
    picture(6).save(folder / "g.jpg", quality=50)  # g
    found, _ = checked_rows(
        row("fresh", "a.png"),
        row("exact", "bytes.png", "Which bar of f is highest?"),
        row("jpeg", "g.jpg", "Which bar of g is highest?"),
        row("form", "h.png", "  WHICH bar\nof h   is highest "),
        row("other question", "i.png", "What is the colour of the second bar?"),
        row(
            "instructed",
            "f.png",
            "Look at the chart.\nQuestion: Which bar of f is highest?\nThink step by step, then answer.",
        ),
        row("other look", "g.jpg", "And the second?"),
        row("other picture", "b.png", "Which bar of i is highest?"),
        row("text", None, "How much is 3 + 2?"),
        row("text of a picture", None, "Which bar of f is highest?"),
    )
    items = read_items(benchmark, str(folder), access=ACCESS)
    told = {
        what: [(found.ids[one.row], ["/".join(items.ids[k]) for k in one.items]) for one in rows]
        for what, rows in overlaps(found, items).items()
    }
    assert told == {
        SAME: [("exact", ["test/f"]), ("form", ["test/h"]), ("instructed", ["test/f"])],
        LOOKS: [("jpeg", ["test/g"])],
        TEXT: [("text", ["test/text 2"])],
        PICTURE: [("other question", ["test/i"])],
        LOOK: [("other look", ["test/g"])],
        QUESTION: [("other picture", ["test/i"]), ("text of a picture", ["test/f"])],
    }


def test_a_question_is_known_from_the_prompt_where_the_card_names_no_question_column(
    checked_rows: Run, folder: Path, benchmark: str
) -> None:
    Path(benchmark).write_text(BENCHMARK.format(record=""))
    items = read_items(benchmark, str(folder), access=ACCESS)
    found, _ = checked_rows(row("exact", "f.png", "which bar of f is highest"))
    assert list(overlaps(found, items)) == [SAME]


def test_items_that_cannot_be_read_are_counted_and_the_others_compared(folder: Path, benchmark: str) -> None:
    (folder / "f.png").unlink()
    items = read_items(benchmark, str(folder), access=ACCESS)
    assert len(items.ids) == 5 and len(items.unreadable) == 1 and items.unreadable[0].startswith("test/f: ")


def test_a_benchmark_that_cannot_be_read_is_named_with_the_reason_or_refused_where_it_was_asked_for(
    folder: Path,
) -> None:
    found, unread = reachable(None, None, access=ACCESS)
    assert [items.name for items in found] == ["drawn"] and "are: --benchmark-data DIR." in unread["tabmwp"]
    with pytest.raises(UserError, match="--against tabmwp: .*--benchmark-data DIR"):
        reachable(["tabmwp"], None, access=ACCESS)
    assert reachable([], None, access=ACCESS) == ([], {})


def test_a_benchmark_on_a_hub_is_not_downloaded_unasked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = BENCHMARK.format(record="").replace("{files: [items.json]}", "{hub: some/set}")
    (folder / "far.yaml").write_text(hub)
    monkeypatch.setattr("vlm_dft.contamination.list_cards", lambda kind: {str(folder / "far.yaml"): folder})
    found, unread = reachable(None, str(folder), access=ACCESS)
    assert found == [] and "it is on a hub" in next(iter(unread.values()))


def test_the_real_training_set_of_tables_does_not_hold_the_items_of_its_benchmark(shared: Path) -> None:
    folder = str(shared / "tabmwp")
    found = check(read_recipe("tabmwp"), folder, access=ACCESS, workers=2)
    assert (found.read, found.faulty) == (850, 0)
    told = overlaps(found, read_items("tabmwp", folder, access=ACCESS, workers=2))
    assert not {SAME, LOOKS, TEXT, PICTURE} & set(told)
    assert {found.ids[one.row] for one in told[QUESTION]} >= {"33", "565", "2614"}  # "... linear or nonlinear?"


def test_the_items_of_the_real_benchmark_are_found_where_they_are_trained_on(shared: Path) -> None:
    folder = str(shared / "tabmwp")
    items = read_items("tabmwp", folder, access=ACCESS, workers=2)
    recipe = read_recipe("tabmwp") | {"source": {"files": ["data/tabmwp/problems_test.json"]}}
    found = check(recipe, folder, access=ACCESS, workers=2)
    assert {what: len(rows) for what, rows in overlaps(found, items).items()} == {SAME: 180}


def facts(k: int) -> Examined:
    prints = (Print(k.to_bytes(16, "big"), k * 0x9E3779B97F4A7C15 % 2**64, k.to_bytes(32, "big"), 100, 200),)
    example = Example([{"role": "user", "content": f"{k}" * 500}], ["x" * 5000 + str(k)])
    found = RowFacts(tuple(PictureFacts(p, "PNG") for p in prints), k, (k,), k, 100, 0, ("LATIN",), ())
    return Examined(k, Outcome(str(k), example), Measured(300, 66, 100, 0, 0, 0), found)


def test_a_row_costs_a_few_hundred_bytes_however_large_it_is() -> None:
    checked, count = Checked(), 20_000
    tracemalloc.start()
    for k in range(count):
        checked.add(facts(k))
    each = tracemalloc.get_traced_memory()[0] / count
    tracemalloc.stop()
    assert each < 800  # so 100,000 rows take less than 80 MB


def test_the_reason_that_an_error_gives_goes_before_what_its_message_says() -> None:
    assert kind_of(RowError("row 1: no image file at 'x'")) == "image missing"
    assert kind_of(RowError("row 1: no image file at 'x'", "filed elsewhere")) == "filed elsewhere"
    assert kind_of(RowError("row 1: who knows")) == "cannot be used"


def test_rows_are_read_again_by_their_places(checked_rows: Run) -> None:
    _, card = checked_rows(*[row(str(k), "a.png") for k in range(9)])
    assert [(place, outcome.id) for place, _, outcome in rows_at(card, None, [7, 2])] == [(2, "2"), (7, "7")]


def test_a_histogram_counts_every_value_once() -> None:
    import numpy as np

    for values in ([5, 5, 5], [1, 2, 3, 1000], list(range(100)), [0, 0, 50_000]):
        found = statistics(np.array(values))
        assert sum(one["count"] for one in found["histogram"]) == len(values)
        assert found["histogram"][0]["from"] == min(values) and found["histogram"][-1]["to"] == max(values)
    assert statistics(np.array([], np.int64)) == {"count": 0}


def test_short_answers_are_said_to_be_unheard_only_where_they_are(checked_rows: Run) -> None:
    few = [row("short", "a.png", answer="7")] + [
        row(str(k), "a.png", f"{k}?", "one two three four five " * 20) for k in range(5)
    ]
    found, card = checked_rows(*few)
    lines = report(Findings(card, TrainConfig(), found, "all"))["advice"]
    assert any(line.startswith("16.7% of the rows (1) answer in at most 8 tokens") for line in lines)
    found, card = checked_rows(*few[1:])
    assert not any(
        "answer in at most" in line for line in report(Findings(card, TrainConfig(), found, "all"))["advice"]
    )


def test_the_report_is_json_and_advice_follows_from_it(checked_rows: Run, folder: Path, benchmark: str) -> None:
    found, card = checked_rows(*broken_rows(folder), row("exact", "f.png", "Which bar of f is highest?"))
    told = report(Findings(card, TrainConfig(), found, "all", [read_items(benchmark, str(folder), access=ACCESS)]))
    again = json.loads(json.dumps(told, allow_nan=False))
    assert advice(again) == again["advice"]
    assert again["advice"][:2] == [
        "10 of 21 rows cannot be used. Training refuses them: mend them, or leave them out (`bad_rows: drop`).",
        "1 row of the set is in own too (1 of its 6 items): once trained on, they are remembered, and accuracy on own says little. "
        "Take them out.",
    ]
    assert again["faults"]["not an image"]["ids"] == ["page"]
    assert again["contamination"]["benchmarks"]["own"]["overlaps"][SAME]["pairs"] == [
        {"row": "exact", "items": ["test/f"], "of": 1}
    ]


def test_facts_can_be_made_in_another_process(folder: Path) -> None:
    import pickle

    example = Example([{"role": "user", "content": [{"type": "image"}]}], [folder / "a.png"], id="1")
    look = pickle.loads(pickle.dumps(LookAt(ACCESS)))
    assert pickle.loads(pickle.dumps(look(example))) == look(example)


def test_a_benchmark_is_read_as_a_recipe_whose_answer_is_the_bare_question(benchmark: str) -> None:
    from vlm_dft.benchmarks import read_benchmark

    recipe = split_cards(read_benchmark(benchmark), str(Path(benchmark).parent))["test"]
    assert recipe["response"] == "{question}" and recipe["images"] == "image" and "answer" not in recipe


def test_an_id_that_an_earlier_row_has_is_told(tmp_path: Path) -> None:
    rows = [{"id": k, "question": "q", "answer": "a"} for k in (7, 7, 8, 7)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    card = {"name": "own", "source": {"files": ["rows.json"]}}
    found = check(card, str(tmp_path), access=MediaAccess())
    assert found.remarks["the same id as an earlier row"] == ["7", "7"]
