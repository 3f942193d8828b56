"""Crash: runs killed at random moments in; a table of where each was killed and whether it ended as the uninterrupted run out.

    python benchmarks/crash.py [--kills 20] [--seed 20251125] [--markdown benchmarks/crash.md]

Trains the embedded model for 20 steps (with dropout, AdamW, cosine schedule, clipping, accumulation, a shuffled epoch every five
steps) and answers 12 samples; kills the process with SIGKILL at a random moment, some of them again, and runs the same thing until
it ends. Compared byte for byte: the rows of metrics.jsonl, the final weights, the predictions. About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20251125)
    parser.add_argument("--markdown")
    asked = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            str(ROOT / "tests/crash_worker.py"),
            folder,
            json.dumps({"kills": asked.kills, "seed": asked.seed}),
        ]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    runs = json.loads(done.stdout.splitlines()[-1])["runs"]
    right = sum(not run["wrong"] for run in runs)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    lines = [
        "# Killed and continued", "",
        f"`python benchmarks/crash.py --kills {asked.kills} --seed {asked.seed}`, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, commit {commit.stdout.strip()}. **{right} of {len(runs)} runs ended as the uninterrupted one**: every row "
        f"of `metrics.jsonl`, the final weights and the predictions, byte for byte. {sum(len(run['killed']) for run in runs)} kills in all.", "",
        "| run | killed | ended |", "|---|---|---|",
        *(f"| {run['variant']} | {'; then '.join(run['killed'])} | {'identical' if not run['wrong'] else 'NOT: ' + ', '.join(run['wrong'])} |"
          for run in runs),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    if asked.markdown:
        Path(asked.markdown).write_text(text, encoding="utf-8")
    sys.exit(right != len(runs))


if __name__ == "__main__":
    main()
