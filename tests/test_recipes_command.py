"""vlm-dft recipes: cards listed, a recipe checked from the command line, its page self-contained and harmless."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw
from rich.console import Console

from vlm_dft.check_tables import mixture_tables, tables
from vlm_dft.cli import main

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)> [red]not markup[/red] \x1b[31m \u202e'


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Six rows of which two cannot be used, one is there twice, and one is written by an enemy."""
    for k in range(4):
        drawn = Image.new("RGB", (150, 100), "white")
        for bar in range(5):
            ImageDraw.Draw(drawn).rectangle(
                [9 + 28 * bar, 90 - (17 * (k + 1) * (bar + 1)) % 80, 30 + 28 * bar, 90], fill=(40 * k, 90, 99)
            )
        drawn.save(tmp_path / f"{k}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) * 2 // 3])
    said = [
        ("first", "0.png", "What is shown?", "Bars."), ("again", "0.png", "what is  shown", "Bars."), ("enemy", "1.png", EVIL, EVIL),
        ("cut", "3.png", "What is it?", "Bars."), (EVIL, "gone.png", "What is it?", "Bars."), ("last", "2.png", "How many?", "Five."),
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    turns = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for _, _, asked, answer in said
    ]
    lines = [
        {"id": name, "images": [image], "messages": own} for (name, image, _, _), own in zip(said, turns, strict=True)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def check(*words: Any) -> int:
    return main(["recipes", "check", *map(str, words), "--workers", "0"])


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


@pytest.mark.parametrize(
    "words", [["recipes", "--help"], ["recipes", "check", "--help"], ["recipes", "list", "--help"]]
)
def test_help_answers_at_once_and_without_torch(words: list[str]) -> None:
    code = (
        f"import sys, contextlib\nfrom vlm_dft.cli import main\nwith contextlib.suppress(SystemExit): main({words!r})\n"
    )
    code += "print(*sys.modules, file=sys.stderr)"
    times = []
    for _ in range(3):
        began = time.monotonic()
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.monotonic() - began)
    assert not {"torch", "transformers", "numpy", "datasets", "imagehash", "scipy"} & set(found.stderr.split())
    assert min(times) < 0.5


def test_cards_are_listed_with_and_without_the_word(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "--json", str(tmp_path / "a.json")]) == 0
    plain = capsys.readouterr().out
    assert main(["recipes", "list", "--json", str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().out == plain and "tabmwp" in plain
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_a_check_says_what_is_wrong_and_its_exit_status_too(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    assert check(rows, "--against", "none", "--json", rows.with_name("told.json")) == 1
    out = capsys.readouterr().out
    for said in (
        "rows: 6 rows read (all), 4 usable, 2 cannot be used", "image damaged or cut short", "image missing", "first = again",
        "compared with no benchmark (--against none)", "→ 2 of 6 rows cannot be used.",
    ):  # fmt: skip
        assert said in out
    assert "\x1b" not in out and "<U+202E>" in out and "[red]not markup[/red]" in out
    told = json.loads(rows.with_name("told.json").read_text())
    assert told["rows"] == {"read": 6, "usable": 4, "faulty": 2, "dropped": 0}
    assert told["duplicates"]["rows"]["ids"] == [["first", "again"]]


def test_a_set_without_faults_has_the_status_0(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "check", "drawn_new", "-n", "20", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "20 rows read (a sample spread evenly over 800), 20 usable" in out
    assert "compared with drawn: 0 of its 1,260 items are in the set" in out
    assert "not compared with tabmwp: " in out


def test_all_rows_are_looked_at_only_where_that_is_asked_for(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    assert check(rows, "-n", "2", "--against", "none") == 1  # the first and the fourth
    assert "2 rows read (a sample spread evenly over 6)" in capsys.readouterr().out
    assert check(rows, "--all", "--against", "none") == 1
    assert "6 rows read (all)" in capsys.readouterr().out


def test_the_first_rows_are_taken_where_their_number_is_not_cheap_to_know(
    capsys: pytest.CaptureFixture[str], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_dft.checking.CHEAP", 10)
    assert check(rows, "-n", "3", "--against", "none") == 0
    assert "3 rows read (the first 3; their number is not known)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "0"], "Expected -n of at least 1, found 0"),
        (["--against", "tabmwb"], "Did you mean 'tabmwp'?"),
        (["--against", "tabmwp"], "--benchmark-data DIR"),
        (["--html", "no/such/folder/x.html"], "--html 'no/such/folder/x.html': expected the name of a file"),
    ],
)
def test_what_is_asked_wrongly_is_said_before_the_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], said: str
) -> None:
    assert check("drawn_new", *words) == 2
    assert said in capsys.readouterr().err


def test_the_page_holds_everything_in_itself_and_no_script_of_a_row(
    capsys: pytest.CaptureFixture[str], rows: Path
) -> None:
    page = rows.with_name("page.html")
    check(rows, "--against", "drawn", "--html", page)
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object", "link", "base", "form")]
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("src", "data:image/")).startswith("data:image/") and "href" not in attributes
    assert "default-src 'none'" in text and "alert(&quot;x&quot;)" in text and "\u202e" not in text
    assert sum(tag == "img" for tag, _ in found.tags) >= 6  # the damaged one as far as it goes, the pair, the extremes
    assert "damaged: as far as it can be read" in text and "image missing" in text
    assert sum(tag == "svg" for tag, _ in found.tags) == 6


def test_the_page_shows_pairs_with_benchmark_items(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from vlm_dft.embedded.drawn import drawn_folder

    line = json.loads((drawn_folder() / "test.jsonl").read_text().splitlines()[7])
    turns = [{"role": "user", "content": line["question"].upper()}, {"role": "assistant", "content": "4"}]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"id": "stolen", "messages": turns, "images": [str(drawn_folder() / line["image"])]}) + "\n"
    )
    assert (
        check(tmp_path / "rows.jsonl", "--data", drawn_folder(), "--against", "drawn", "--html", tmp_path / "page.html")
        == 0
    )
    out = capsys.readouterr().out
    assert f"stolen = test/{line['id']}" in out and "compared with drawn: 1 of its 1,260 items are in the set" in out
    text = (tmp_path / "page.html").read_text()
    section = text[text.index("Shared with benchmarks") :]
    assert (
        len(re.findall("<img ", section)) == 2
        and line["id"] in section
        and "same picture, same question: 1 row" in section
    )


def test_pictures_beyond_the_page_s_size_are_left_out_and_that_is_said(
    capsys: pytest.CaptureFixture[str], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_dft.check_html.BUDGET", 1000)
    page = rows.with_name("page.html")
    check(rows, "--against", "none", "--html", page)
    assert re.search(r"\d+ pictures were left out", page.read_text())


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_the_terminal(capsys: pytest.CaptureFixture[str], rows: Path, width: int) -> None:
    check(rows, "--against", "drawn", "--json", rows.with_name("told.json"))
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in tables(json.loads(rows.with_name("told.json").read_text())):
        console.print(part)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any("cannot be used" in line for line in lines) and not any(
        "…" in line for line in lines if "tokens" in line
    )


def mixture(folder: Path, *entries: str) -> Path:
    card = folder / "both.yaml"
    card.write_text("description: Two.\nlicence: own\nmixture:\n" + "".join(f"  - {{{one}}}\n" for one in entries))
    return card


def test_a_mixture_is_checked_source_by_source_and_summed_up(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    card = mixture(
        rows.parent, "recipe: rows.jsonl, repeat: 2", "recipe: drawn_new, name: again", "recipe: drawn_new, name: new"
    )
    page, told = rows.with_name("page.html"), rows.with_name("told.json")
    assert check(card, "-n", "20", "--against", "none", "--json", told, "--html", page) == 1  # two rows of six
    out = capsys.readouterr().out
    assert "rows: 6 rows read (all), 4 usable, 2 cannot be used" in out and "new: 20 rows read" in out
    found = json.loads(told.read_text())
    assert [(one["recipe"], one["rows"]["faulty"]) for one in found["sources"]] == [
        ("rows", 2),
        ("again", 0),
        ("new", 0),
    ]
    assert [(one["sources"], one["rows"]) for one in found["shared_between_sources"]] == [(["again", "new"], 20)]
    assert "→ 20 of the rows of new that were looked at ask what a row of again asks" in out
    summary = out[out.index("in benchmarks") :].splitlines()
    assert [line.split()[:3] for line in summary if line.strip()][2:5] == [
        ["rows", "6", "2"],
        ["again", "20", "0"],
        ["new", "20", "0"],
    ]
    text = page.read_text()
    assert text.count("<h2>Distributions</h2>") == 3 and "3 sources" in text and "20 of the rows of new" in text


def test_a_source_of_a_mixture_that_is_not_there_is_said_and_the_others_are_checked(
    capsys: pytest.CaptureFixture[str], rows: Path
) -> None:
    card = mixture(rows.parent, "recipe: drawn_new", "recipe: tabmwp, data: tables")
    assert (
        check(card, "--data", rows.parent, "-n", "5", "--against", "none", "--json", rows.with_name("told.json")) == 2
    )
    out = capsys.readouterr().out
    assert "drawn_new: 5 rows read" in out and "not checked: tabmwp: Recipe 'tabmwp': no data folder at" in out
    assert list(json.loads(rows.with_name("told.json").read_text())["not_checked"]) == ["tabmwp"]


def test_a_prepared_folder_is_checked_as_any_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        main(["recipes", "prepare", "drawn_new", "--limit", "12", "--workers", "0", "--output", str(tmp_path / "p")])
        == 0
    )
    assert check(tmp_path / "p", "--html", tmp_path / "page.html") == 0
    out = capsys.readouterr().out
    assert "drawn_new: 12 rows read (all), 12 usable" in out and "compared with drawn: 0 of" in out
    assert (
        "not compared with tabmwp: Benchmark 'tabmwp', split test reads local files. Say where they are: --benchmark-data"
        in out
    )


def test_half_a_surrogate_pair_stops_neither_json_nor_page(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    rows.write_text(rows.read_text().replace('"first"', '"\\ud83d"'))
    assert (
        check(rows, "--against", "none", "--json", rows.with_name("told.json"), "--html", rows.with_name("p.html")) == 1
    )
    assert json.loads(rows.with_name("told.json").read_text())["duplicates"]["rows"]["ids"] == [["\ud83d", "again"]]
    assert "&lt;U+D83D&gt;" in rows.with_name("p.html").read_text()


def test_a_long_id_hides_neither_the_message_nor_its_partner(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    long = {"first": "f" * 3000, "again": "g" * 36, "cut": "c" * 500}
    text = rows.read_text()
    for name, longer in long.items():
        text = text.replace(f'"{name}"', f'"{longer}"')
    rows.write_text(text)
    assert check(rows, "--against", "none") == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "damaged or cut short" in out.split("image damaged or cut short")[1]
    assert f"{'f' * 39}… = {'g' * 36}" in out


def test_the_columns_of_the_list_are_straight(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    width = max(len(line.split()[0]) for line in lines)
    assert width > 16 and all(line[width] == " " and line[width + 1] != " " for line in lines)


def test_the_summary_of_a_mixture_fits_80_columns(capsys: pytest.CaptureFixture[str], rows: Path) -> None:
    told = rows.with_name("told.json")
    check(
        mixture(rows.parent, "recipe: rows.jsonl", "recipe: drawn_new"), "-n", "9", "--against", "none", "--json", told
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in mixture_tables(json.loads(told.read_text())):
        console.print(part)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "benchmarks" in text


def test_where_no_row_can_be_read_the_reason_is_an_error_and_no_report(
    capsys: pytest.CaptureFixture[str], rows: Path
) -> None:
    rows.with_suffix(".json").write_text('[{"messages": ')
    assert check(rows.with_suffix(".json"), "--against", "none", "--json", rows.with_name("told.json")) == 2
    assert "error: " in capsys.readouterr().err and not rows.with_name("told.json").exists()


def test_a_check_says_where_the_rows_are_read_from_and_in_which_format(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    check(rows, "--data", rows.parent, "--against", "none", "--json", found)
    said = json.loads(found.read_text())
    assert said["read_from"] == "1 file: rows.jsonl"
    assert said["format"] == "messages: column 'messages' holds turns of role and content"
    assert f"rows of {said['read_from']}; format {said['format']}" in capsys.readouterr().out.replace("\n", "")
