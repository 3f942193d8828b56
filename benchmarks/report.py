"""Report: 5,000 samples with pictures and two runs' responses in; the page's size, its build time and how fast it opens out.

    python benchmarks/report.py [--samples 5000] [--rounds 5] [--data ../shared/data] [--markdown benchmarks/report.md]

Pictures and responses are real: every picture of the data pack, mirrored and turned where there are fewer than samples so
that none is held twice; responses of real models, joined until they are as long as reasoning is (1,500 characters); the
verdicts are drawn at random, and mean nothing. Every round starts a Chromium of its own and opens the page from the disk.
Opened: from the navigation to the first painted frame with its samples, told by the page's own clock and by ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import CHROMIUM, browser  # noqa: E402
from made_evaluation import make_report, make_rows, make_samples, real_pictures  # noqa: E402

from vlm_dft.evaluation_report import write_evaluation  # noqa: E402

LENGTH = 1_500  # characters of a response, about
ACTIONS = {
    "filter: dft right, base wrong": "document.querySelector('#chips [data-key=\"1-0\"]').click()",
    "next page": "document.querySelector('.pager .on').click()",
    "search all texts": "(() => {const q = document.querySelector('#q'); q.value = 'triangle'; set({q: 'triangle'})})()",
    "back to all": "set({show: 'all', q: ''})",
}


def distinct(pictures: list[str], count: int, folder: Path) -> list[str]:
    """`count` different pictures: those on disk, then copies of them, mirrored and turned."""
    turns = [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180]
    found = list(pictures[:count])
    for k in range(count - len(found)):
        path = folder / f"{k}.jpg"
        picture = Image.open(pictures[k % len(pictures)]).convert("RGB")
        picture.thumbnail((800, 800))
        picture.transpose(turns[k // len(pictures) % len(turns)]).save(path, quality=90)
        found.append(str(path))
    return found


def joined(responses: list[str]) -> list[str]:
    """Real responses, one after the other until they are LENGTH long."""
    found, held = [], ""
    for response in responses:
        held += response + "\n\n"
        if len(held) >= LENGTH:
            found.append(held)
            held = ""
    return found


def opened(page: Path, folder: Path) -> dict[str, float]:
    """Seconds of one opening in a fresh browser, and of what a reader does then."""
    with browser(folder) as view:
        view.size(1200, 900)
        start = time.perf_counter()
        view.open(page)  # waits for a frame after the load
        found = {"opened, our clock": time.perf_counter() - start}
        found["opened, the page's clock"] = view.run("performance.getEntriesByName('drawn')[0].startTime") / 1000
        found["shown"] = view.run("document.querySelectorAll('#list article').length")
        for name, action in ACTIONS.items():
            then = "requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)))"
            script = f"new Promise(done => {{const start = performance.now(); {action}; {then}}})"
            found[name] = view.run(script) / 1000
        assert view.errors == [] and view.requests == [page.resolve().as_uri()]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("No chromium, chromium-browser or google-chrome on PATH.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = real_pictures(options.data)
        used = distinct(pictures, options.samples, folder)
        gold = [json.loads(line) for line in (options.data / "scoring_gold" / "dev.jsonl").read_text().splitlines()]
        half = options.samples // 2
        samples = make_samples(used[:half], {"mathvista": half})
        samples |= make_samples(used[half:], {"mathvision": options.samples - half})
        for sample, row in zip((s for found in samples.values() for s in found), gold, strict=False):
            sample.record["question"] = row["question"]
        scores, responses = make_rows(samples, {"base": 0.5, "dft": 0.55}, joined([row["response"] for row in gold]))
        report = make_report(scores, folder / "runs")
        start, spent = time.perf_counter(), time.process_time()
        write_evaluation(folder / "report", report, samples=samples, scores=scores, responses=responses)
        built: dict[str, Any] = {"wall": time.perf_counter() - start, "cpu": time.process_time() - spent}
        page = folder / "report" / "report.html"
        size, text = page.stat().st_size, page.read_text(encoding="utf-8")
        rounds = [opened(page, folder / f"profile-{k}") for k in range(options.rounds)]
    notes = [line.split("</li>")[0] for line in text.split("<ul class=notes>")[-1].split("</ul>")[0].split("<li>")[1:]]
    show(options, rounds, built, size, text.count("data:image/webp"), min(len(pictures), options.samples), notes)


def show(
    options: Any,
    rounds: list[dict[str, float]],
    built: dict[str, Any],
    size: int,
    held: int,
    real: int,
    notes: list[str],
) -> None:
    """Print the figures, and write them down where asked to."""
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    lines = [f"| {options.samples:,} samples, 2 runs | median, s | from | to |", "|---|---|---|---|"]
    for name in (name for name in rounds[0] if name != "shown"):
        values = [found[name] for found in rounds]
        lines.append(f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |")
    lines += ["", f"Page {size / 1e6:.1f} MB with {held:,} pictures ({real:,} real, the others mirrored or turned copies of them); built in "
              f"{built['wall']:.1f} s ({built['cpu']:.1f} s of CPU). {len(rounds)} rounds, a fresh headless Chromium each; commit "
              f"{commit.stdout.strip()}.", *(["", "The page itself says: " + " ".join(notes)] if notes else [])]  # fmt: skip
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text(
            "# Report: how fast a page of samples opens\n\n`python benchmarks/report.py`\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
