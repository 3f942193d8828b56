"""Inspecting: what the terminal, the page and the JSON say of real rows is what the collator trains on."""

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_dft.cli import main
from vlm_dft.collators import ChatCollator
from vlm_dft.explain import token_texts
from vlm_dft.inspection import inspect_rows, turn_lines, visible
from vlm_dft.models import load_processor

ROWS: list[dict[str, Any]] = [
    {
        "id": "fine",
        "messages": [
            {"role": "user", "content": 'Say </script><b>hi</b> & "q" \x1b[31m\u202e'},
            {"role": "assistant", "content": "</script><b>é</b> <|im_end|>\n× 你好"},
        ],
    },
    {"id": "broken", "messages": [{"role": "user", "content": "no answer"}]},
    {
        "id": "two turns",
        "images": ["red.png"],
        "messages": [
            {"role": "user", "content": "<image>a?"},
            {"role": "assistant", "content": "first", "train": False},
            {"role": "user", "content": "b?"},
            {"role": "assistant", "content": "second"},
        ],
    },
]


@pytest.fixture
def conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of a file of three conversations: one of awkward characters, one broken, one with a picture."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    Image.new("RGB", (60, 110), "red").save(tmp_path / "red.png")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return str(tmp_path / "rows.jsonl")


class Page(HTMLParser):
    """The elements of a page, and its token spans as [class of the run, title, text]."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[list[str]] = []
        self._open: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        found = dict(attrs)
        if tag == "span":
            run = self._open[-1].get("class") or "" if self._open else ""
            if run.startswith("run ") and "title" in found:
                self.tokens.append([run, str(found["title"]), ""])
            self._open.append(found)

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and any("title" in found for found in self._open):
            self.tokens[-1][2] += data


def test_the_terminal_shows_a_drawn_row_with_its_trained_tokens_between_marks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["inspect", "drawn", "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "<|im_start|>system↵\nYou are a helpful assistant.<|im_end|>↵\n<|im_start|>user↵\n"
        "<|vision_start|><|image_pad|> ×16 (112×112 px)<|vision_end|>What is the value of the second bar?<|im_end|>↵\n"
        "<|im_start|>assistant↵\n⟦green 4, red 3. red 3. Answer: 3<|im_end|>⟧↵\n"
    ) in out
    assert (
        "68 tokens, 17 trained (25.0%): 32 prompt, 18 media, 16 response, 1 end of turn, 1 template after the answer; "
        "media: 112×112 px"
    ) in out
    assert re.search(r"message 1: 17 targets, found by generation prompt", out)
    assert "1 sample: 68 tokens, 18 of media, 17 trained (25.0%)" in out


def test_a_row_that_fails_is_shown_and_counted_and_the_others_are_shown(
    capsys: pytest.CaptureFixture[str], conversations: str
) -> None:
    assert main(["inspect", conversations]) == 1
    out = capsys.readouterr().out
    assert "✗ cannot be trained on: rows broken: no assistant message to train on (roles: ['user'])." in out
    assert "1 of 3 rows cannot be trained on" in out
    assert "⟦</script><b>é</b> <|im_end|>↵\n× 你好<|im_end|>⟧↵" in out
    assert "note: literal control token kept as text" in out
    assert "assistant↵\nfirst<|im_end|>↵" in out and "⟦second<|im_end|>⟧↵" in out
    assert main(["inspect", conversations, "--start", "2"]) == 0


def test_what_a_terminal_would_obey_is_shown_by_its_number(
    capsys: pytest.CaptureFixture[str], conversations: str
) -> None:
    main(["inspect", conversations, "-n", "1"])
    out = capsys.readouterr().out
    assert '"q" <U+001B>[31m<U+202E><|im_end|>↵' in out and "\x1b" not in out and "\u202e" not in out
    assert visible("a\u200b\ud800b\n\tc👩‍👧") == "a<U+200B><U+D800>b↵\n\tc👩‍👧"


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_come_on_a_terminal_only_and_no_color_turns_them_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", no_color)
    assert main(["inspect", "drawn", "-n", "1"]) == 0
    out = capsys.readouterr().out
    assert bool(re.search(r"\x1b\[[\d;]*(38|48);5;\d+m", out)) is coloured
    assert "⟦" in out and "⟧" in out


def test_a_long_prompt_is_shortened_in_the_middle_unless_full_and_an_answer_never(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked, answer = "start " + "so " * 500 + "end", "word " * 400 + "done"
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
    (tmp_path / "long.json").write_text(json.dumps([row]))
    main(["inspect", str(tmp_path / "long.json")])
    out = capsys.readouterr().out
    assert re.search(r"start so.* \[…[\d,]+ tokens of the prompt not shown, see --full…\] .*so end<\|im_end\|>", out)
    assert answer in out and asked not in out
    main(["inspect", str(tmp_path / "long.json"), "--full"])
    assert asked in capsys.readouterr().out


def test_a_row_over_max_length_is_dropped_cut_or_fails_as_too_long_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", "drawn", "-n", "1", "--max-length", "60"]
    assert main(words) == 0
    assert "– dropped: over max_length = 60 tokens (68 found)" in capsys.readouterr().out
    assert main([*words, "--too-long", "shorten_answer"]) == 0
    out = capsys.readouterr().out
    assert "⟦green 4, red 3. red ⟧" in out and "note: answer shortened to max_length = 60 tokens" in out
    assert main([*words, "--too-long", "raise"]) == 1
    assert (
        "✗ cannot be trained on: drawn train-grey_bars-0020: 68 tokens, over max_length = 60."
        in capsys.readouterr().out
    )


def test_the_page_is_whole_escaped_and_asks_for_nothing(conversations: str, tmp_path: Path) -> None:
    assert main(["inspect", conversations, "--html", str(tmp_path / "page.html")]) == 1
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("</script>") == 1 and "script" in page.tags and "b" not in page.tags
    assert "\x1b" not in text and "\u202e" not in text and "&lt;U+202E&gt;" in text
    assert all(value.startswith(("data:image/png;base64,", "#row")) for key, value in page.attributes
               if key in ("src", "href") and value is not None)  # fmt: skip
    assert "default-src 'none'" in text and "@import" not in text and "url(" not in text
    assert "rows broken: no assistant message to train on" in text
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_every_token_on_the_page_says_its_position_id_and_reason(conversations: str, tmp_path: Path) -> None:
    main(["inspect", conversations, "--start", "2", "--html", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    tokens = Page(text).tokens
    assert tokens[0] == ["run r0", "“<|im_start|>”\nposition 0\nid 628\nprompt, not trained", "<|im_start|>"]
    chip = next(token for token in tokens if "image_pad" in token[1])
    assert chip == [
        "run r1", "“<|image_pad|>” ×8\npositions 15 to 22\nid 638\nmedia, not trained", "<|image_pad|> ×8image 1 · 56×112 px",
    ]  # fmt: skip
    assert [t[2] for t in tokens if t[0] in ("run r2", "run r3")] == ["se", "c", "on", "d", "<|im_end|>"]
    assert tokens[-2][1].endswith("\nid 626\nend of turn, trained") and tokens[-1][0] == "run r4"
    picture = re.search(r"base64,([^']+)'", text)
    assert picture is not None
    assert Image.open(io.BytesIO(base64.b64decode(picture[1]))).size == (56, 112)  # as the processor resizes it


def test_the_json_is_the_mask_report_and_the_failures(conversations: str, tmp_path: Path) -> None:
    assert main(["inspect", conversations, "--json", str(tmp_path / "out.json")]) == 1
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["failed"] == [
        {"sample": "rows broken", "error": "rows broken: no assistant message to train on (roles: ['user'])."}
    ]
    assert [row["sample"] for row in found["samples"]] == ["rows fine", "rows two turns"]
    assert found["dropped"] == [] and len(found["hash"]) == 64
    assert [run["text"] for run in found["samples"][0]["runs"]][1:3] == [
        "</script><b>é</b> <|im_end|>\n× 你好",
        "<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing_such"], "Unknown recipe 'nothing_such'"),
        (["drawn", "-n", "0"], "Expected -n of at least 1"),
        (["drawn", "--model", "nowhere"], "No model at 'nowhere'"),
        (["drawn", "--too-long", "cut"], "too_long must be one of raise, drop, shorten_answer, downscale"),
        (
            ["drawn", "--html", "nowhere/page.html"],
            "--html 'nowhere/page.html': expected the name of a file in a folder",
        ),
        (["tabmwp"], "Say where they are: --data DIR"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["inspect", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_start_behind_the_last_row_says_how_many_there_are(
    capsys: pytest.CaptureFixture[str], conversations: str
) -> None:
    assert main(["inspect", conversations, "--start", "3"]) == 2
    assert "Recipe 'rows' has 3 rows, so none at --start 3 (the first is 0)." in capsys.readouterr().err


def test_help_imports_neither_torch_nor_rich() -> None:
    code = "import sys, contextlib\nfrom vlm_dft.cli import main\nwith contextlib.suppress(SystemExit): main(['inspect', '--help'])\n"
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--too-long" in done.stdout
    assert not {"torch", "transformers", "numpy", "rich"} & {name.split(".")[0] for name in done.stderr.split()}


def test_the_texts_of_tokens_join_to_the_whole_text_though_characters_are_split() -> None:
    from vlm_dft.models import load_processor

    tokenizer = load_processor("tiny").tokenizer
    ids = tokenizer("4 × 你")["input_ids"]
    assert token_texts(ids, tokenizer.decode) == ["4", " ", "×", "", " ", "你", "", ""]


def test_a_turn_says_its_own_weight_and_objective() -> None:
    from vlm_dft import ChatCollator
    from vlm_dft.models import load_processor

    asked = {"role": "user", "content": "a"}
    answered = {"role": "assistant", "content": "b", "weight": 0.5, "objective": "nll"}
    (line,) = turn_lines(ChatCollator(load_processor("tiny")).explain({"messages": [asked, answered]}))
    assert line.startswith("message 1: 2 targets, found by ") and line.endswith(", weight 0.5, objective nll")


def test_a_filtered_row_is_shown_as_dropped_and_what_was_done_to_others_is_noted(tmp_path: Path) -> None:
    rows = [{"q": "q", "a": "So.", "g": 1}, {"q": "q", "a": "So.", "g": 2}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    card = {"name": "mine", "source": {"files": ["rows.jsonl"]}, "prompt": "{q}", "response": "{a}", "ending": "The answer is {g}.",
            "keep": {"g": {"min": 2}}}  # fmt: skip
    first, second = inspect_rows(card, str(tmp_path), ChatCollator(load_processor("tiny")))
    assert first.dropped == "filtered: g is not at least 2" and first.explained is None
    assert second.explained is not None and "ending appended" in second.explained.notes
