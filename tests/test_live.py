"""The live view: fits every terminal, draws over nothing, leaves the terminal clean, and is plain lines in a log file."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_dft import live
from vlm_dft.bars import Bar, can_draw
from vlm_dft.cli import main
from vlm_dft.diagnostics import EDGES
from vlm_dft.live import Known, View, draw, plain_line, sparkline
from vlm_dft.pace import Pace, clock_text, timing
from vlm_dft.progress import read_metrics

ROOT = Path(__file__).resolve().parent.parent
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
BINS = [f"{a:g}-{b:g}" for a, b in zip(EDGES, EDGES[1:], strict=False)]  # noqa: RUF007
LOGS = {
    "epoch": 1.5, "loss": 0.4132, "nll": 0.512, "mean_p": 0.712, "learning_rate": 4.1e-5, "grad_norm": 0.83,
    **{f"p_histogram/{name}": 1 / len(BINS) for name in BINS},
}  # fmt: skip


def known(**changes: Any) -> Known:
    settings: dict[str, Any] = {
        "title": "floor(minimum=0.1) on a-long-recipe, Qwen2.5-VL-7B-Instruct", "steps": 256, "step": 120, "now": "training",
        "seconds": 75.0, "left": 200.0, "step_seconds": 0.33, "memory": "71.2 GiB GPU", "logs": LOGS,
        "timing": {"response_tokens_per_second": 1234.0, "tokens_per_second": 20111.0},
        "curves": {"loss": [1.0, 0.5, 0.4], "nll": [2.0, 1.0, 0.5], "mean_p": [0.2, 0.5, 0.7]},
        "scores": ("test 62.5 ± 8.6 %, ood 40.0", "step 100, 32 samples of each; best 62.5 at step 100"),
        "alarms": ["digit tokens of charts starve since step 40: mean p 0.021, pull 3.1% of SFT's"],
    }  # fmt: skip
    return Known(**{**settings, **changes})


def test_the_view_is_never_wider_than_the_terminal_and_never_as_high() -> None:
    for seen in (known(), known(alarms=["x" * 300] * 9), Known("dft", 5)):
        for width in (1, 5, 19, 20, 33, 40, 63, 64, 65, 79, 80, 120, 160):
            for height in (1, 3, 4, 8, 12, 24, 50):
                lines = draw(seen, width, height)
                assert all(line.cell_len <= width for line in lines) and len(lines) < max(height, 2), (width, height)


def test_one_screen_of_80_by_24_holds_everything() -> None:
    text = "\n".join(line.plain for line in draw(known(), 80, 24))
    for said in (
        "step 120/256", "47%", "epoch 1.50", "training", "1:15 gone", "3:20 left", "0.4132", "0.5120", "0.712", "4.1e-05", "0.83",
        "1,234", "20,111", "0.33", "71.2 GiB GPU", "▁", "█", "8%", "test 62.5 ± 8.6 %", "best 62.5 at step 100", "! digit tokens of charts",
    ):  # fmt: skip
        assert said in text, said


def test_where_room_is_short_the_alarm_stays_and_the_histogram_goes() -> None:
    text = "\n".join(line.plain for line in draw(known(), 80, 12))
    assert "! digit tokens" in text and "step 120/256" in text and "bin" not in text


def test_a_sparkline_goes_from_the_lowest_to_the_highest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█" and sparkline([3.0], 5) == "▄" and sparkline([], 5) == ""
    assert sparkline([1.0, float("nan"), 2.0], 5) == "▁█" and len(sparkline(list(range(1000)), 30)) == 30


def test_times_read_as_people_write_them() -> None:
    assert [clock_text(s) for s in (0, 200, 3800, 90000, None)] == ["0:00", "3:20", "1:03:20", "1 d 01:00", "?"]


class Clock:
    def __init__(self) -> None:
        self.at = 1000.0

    def __call__(self) -> float:
        return self.at


def steps(pace: Pace, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        clock.at += each
        pace.stepped(pace.step + 1)


def test_the_time_left_counts_neither_the_slow_first_step_nor_the_pauses_of_before() -> None:
    clock = Clock()
    pace = Pace({"saving": 10}, clock)
    pace.begin(0, 20)
    assert pace.left() is None
    steps(pace, clock, 60.0)
    assert pace.left() == 19 * 60.0  # nothing better is known yet
    steps(pace, clock, *[2.0] * 9)
    assert pace.left() == 10 * 2.0
    for _ in range(3):  # told how far it is
        pace.now("saving")
        clock.at += 10.0
    pace.now("training")
    assert pace.seconds_per_step() == 2.0 and pace.trained() == 60.0 + 18.0
    assert pace.left() == 10 * 2.0 + 30.0  # one more save, as long as the one before
    steps(pace, clock, 2.0)
    assert pace.left() == 9 * 2.0 + 30.0


def test_one_step_that_hung_is_no_forecast() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    pace.begin(100, 1000)  # a run that goes on
    steps(pace, clock, 50.0, *[1.0] * 19, 600.0)
    assert pace.left() == (1000 - 121) * 1.0


def test_speed_is_of_training_alone_and_of_the_tokens_of_all_processes() -> None:
    clock = Clock()
    pace = Pace(clock=clock)
    pace.begin(0, 10)
    clock.at += 2.0
    pace.now("evaluating")
    clock.at += 100.0
    found = timing(pace, {"response_tokens": 100, "input_tokens": 1000})
    assert (found["seconds"], found["response_tokens_per_second"], found["tokens_per_second"]) == (2.0, 50.0, 500.0)
    pace.now("training")
    clock.at += 4.0
    assert timing(pace, {"response_tokens": 100})["response_tokens_per_second"] == 25.0


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_pictures_are_drawn_only_where_they_are_wanted() -> None:
    good = {"TERM": "xterm-256color"}
    assert can_draw(Terminal(), good)
    for more in ({"TERM": "dumb"}, {"NO_COLOR": "1"}, {"CI": "true"}):
        assert not can_draw(Terminal(), {**good, **more})
    assert not can_draw(Terminal(), {}) and not can_draw(io.StringIO(), good)


def test_ten_thousand_logged_steps_are_about_a_hundred_plain_lines() -> None:
    said: list[str] = []
    view = View(Known("dft", 10_000), said.append, io.StringIO())
    with view.shown():
        for step in range(1, 10_001):
            view.known.step, view.known.logs = step, {"loss": 1 / step}
            view.logged()
    assert 40 <= len(said) <= 42 and said[0].startswith("      step 1/10000  loss 1.0000")
    assert said[-1].startswith("      step 10000/10000")


def test_a_plain_line_says_what_matters() -> None:
    expected = "step 120/256  loss 0.4132  nll 0.5120  p 0.712  1,234 response tok/s  ETA 3:20"
    assert plain_line(known()) == expected


def test_drawing_takes_no_more_than_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a picture takes 10 ms the next one comes 2 s later, however many steps there are in between."""
    monkeypatch.setenv("TERM", "xterm")
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    clock, drawn = Clock(), []
    monkeypatch.setattr(live.time, "monotonic", clock)
    view = View(known(), print, Terminal())
    assert view._live is not None

    def slow() -> None:
        clock.at += 0.01
        drawn.append(clock.at)

    monkeypatch.setattr(view._live, "refresh", slow)
    for _ in range(1000):
        clock.at += 0.01
        view.refresh()
    gaps = [b - a for a, b in zip(drawn, drawn[1:], strict=False)]  # noqa: RUF007
    assert len(drawn) == 5 and min(gaps) >= 2.0


# --- In a terminal of its own ----------------------------------------------------------------------------------------

TALKING = """
import logging, sys, time, warnings
handler = logging.StreamHandler()  # keeps the stderr it begins with, as transformers' does
logging.getLogger("some.library").addHandler(handler)
sys.path.insert(0, {tests!r})
from test_live import known
from vlm_dft.live import View
view = View(known(), print)
with view.shown():
    for k in range(3):
        view.refresh(at_once=True)
        print("printed line", k)
        warnings.warn(f"warned of {{k}}")
        logging.getLogger("some.library").warning("logged line %d", k)
        sys.stderr.write(f"written line {{k}}\\n")
        time.sleep({pause})
    view.say("the alarm in words")
    view.refresh(at_once=True)
    {end}
print("after the view")
"""


def in_terminal(
    words: list[str],
    size: tuple[int, int] = (80, 40),
    act: Callable[[int, int, str], None] = lambda *_: None,
    **environment: str,
) -> tuple[int, str]:
    """Run Python in a terminal of (columns, rows). Returns the exit status and all that was written to the terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs us in the background has it ignored
        for name in ("CI", "NO_COLOR"):
            os.environ.pop(name, None)
        os.environ |= {
            "TERM": "xterm-256color",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        os.environ |= environment
        os.execv(sys.executable, [sys.executable, *words])
    resize(terminal, *size)
    written, ends = b"", time.monotonic() + 150
    while time.monotonic() < ends:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            written += piece
        act(pid, terminal, written.decode(errors="replace"))
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode(errors="replace")


def resize(terminal: int, columns: int, rows: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def script(tmp_path: Path, end: str = "pass", pause: float = 0.0) -> list[str]:
    (tmp_path / "talking.py").write_text(TALKING.format(tests=str(ROOT / "tests"), end=end, pause=pause))
    return [str(tmp_path / "talking.py")]


def test_what_libraries_say_stands_whole_above_the_view_and_the_view_is_there_once(tmp_path: Path) -> None:
    pyte = pytest.importorskip("pyte", reason="a terminal to look at: pip install pyte")
    status, written = in_terminal(script(tmp_path), (80, 60))
    screen = pyte.HistoryScreen(80, 60, history=1000)
    pyte.Stream(screen).feed(written)
    above = ["".join(char.data for char in line.values()) for line in screen.history.top]
    lines = [line.rstrip() for line in [*above, *screen.display]]
    assert status == 0
    for k in range(3):
        for said in (f"printed line {k}", f"logged line {k}", f"written line {k}"):
            assert lines.count(said) == 1, (said, lines)
        assert sum(f"warned of {k}" in line for line in lines) == 1
    views = [k for k, line in enumerate(lines) if "step 120/256" in line]
    assert len(views) == 1 and lines.index("      the alarm in words") < views[0] < lines.index("after the view")


@pytest.mark.parametrize("how", ["an exception", "an interrupt", "the end"])
def test_the_terminal_is_left_clean(how: str, tmp_path: Path) -> None:
    end = {
        "an exception": "raise RuntimeError('the disk is full')",
        "an interrupt": "time.sleep(60)",
        "the end": "pass",
    }[how]
    sent: list[int] = []

    def interrupt(pid: int, terminal: int, written: str) -> None:
        if how == "an interrupt" and "the alarm in words" in written and not sent:
            sent.append(1)
            os.kill(pid, signal.SIGINT)

    status, written = in_terminal(script(tmp_path, end), act=interrupt)
    assert HIDE in written and written.rindex(SHOW) > written.rindex(HIDE)
    after = written[written.rindex(SHOW) :]
    expected = {
        "an exception": "RuntimeError: the disk is full",
        "an interrupt": "KeyboardInterrupt",
        "the end": "after the view",
    }
    assert expected[how] in after and (status == 0) == (how == "the end")


def test_a_terminal_that_changes_its_size_is_followed(tmp_path: Path) -> None:
    sizes = [(30, 10), (3, 3), (200, 60), (1, 1)]

    def change(pid: int, terminal: int, written: str) -> None:
        if HIDE in written and sizes:
            resize(terminal, *sizes.pop())

    status, written = in_terminal(script(tmp_path, pause=0.5), act=change)
    assert status == 0 and not sizes and "Traceback" not in written


WORDS = [
    "train", "--batch_size", "8", "--micro_batch", "4", "--limit", "24", "--max_steps", "3", "--benchmark", "drawn", "--eval_limit",
    "1", "--evaluate_every", "2", "--watch_limit", "2", "--warmup", "0",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_shown_in_a_terminal(tmp_path: Path) -> None:
    status, written = in_terminal(["-m", "vlm_dft.cli", *WORDS, "--output", str(tmp_path / "run")])
    assert status == 0 and written.count(HIDE) == written.count(SHOW) >= 1
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    for said in (
        "step 3/3",
        "100%",
        "response tok/s",
        "p of the response tokens",
        "evaluating",
        "saving",
        "accuracy",
        "done",
    ):
        assert said in plain, said
    assert "3/3  loss" not in plain  # no plain lines besides


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a file", "a dumb terminal"])
def test_a_run_in_a_log_file_is_plain_lines_without_control_characters(how: str, tmp_path: Path) -> None:
    words = ["-m", "vlm_dft.cli", *WORDS, "--output", str(tmp_path / "run")]
    if how == "a file":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=170)
        status, written = done.returncode, done.stdout + done.stderr
    else:
        status, written = in_terminal(words, TERM="dumb", NO_COLOR="1")
        written = written.replace("\r\n", "\n")
    assert status == 0 and not re.findall(r"[\x00-\x08\x0b-\x1f\x7f]", written)
    assert re.search(
        r"^      step 3/3  loss \d\.\d{4}  nll \d.*  p \d.*  [\d,]+ response tok/s  ETA 0:00$", written, re.M
    )
    assert written.count("      accuracy test ") == 3  # before the first step, at step 2, at the last


def test_speed_and_memory_stand_apart_from_what_a_second_run_repeats(tmp_path: Path, capsys: Any) -> None:
    for name in ("a", "b"):
        assert main([*WORDS, "--output", str(tmp_path / name)]) == 0
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("a", "b")]
    times = [row.pop("timing") for found in rows for row in found]
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert all(
        {"seconds", "response_tokens_per_second", "tokens_per_second", "memory_gib"} <= set(found) for found in times
    )
    histories = [
        json.loads((tmp_path / name / "checkpoint-3/trainer_state.json").read_text())["log_history"]
        for name in ("a", "b")
    ]
    assert histories[0] == histories[1]
    for name in ("loss.svg", "p_histogram.svg"):
        assert (tmp_path / "a" / name).read_text().startswith("<svg")


def test_a_bar_in_a_log_file_says_its_end_and_nothing_without_a_title(capsys: Any) -> None:
    for title in ("base", None):
        with Bar(3, title) as bar:
            for _ in range(3):
                bar.update()
    assert capsys.readouterr().err == "      base: 3/3 samples, 0 s\n"
