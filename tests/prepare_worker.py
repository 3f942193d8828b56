"""Run by test_prepared.py in a process of its own: prepares the rows of a folder in small shards, to be killed or raced.

python tests/prepare_worker.py DATA OUTPUT [WORKERS [SECONDS TO REST AT EACH ROW [FILE TO TOUCH ONCE IT, OR A WORKER, WORKS]]]
"""

import multiprocessing
import signal
import sys
import time
from pathlib import Path

from vlm_dft import preparing
from vlm_dft.chat import Example
from vlm_dft.recipes import read_recipe
from vlm_dft.shards import Pack

words = sys.argv[1:]
data, output, workers, rest, begun = [*words, *["0", "0", ""][len(words) - 2 :]]
preparing.SHARD_PLACES = 40
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs us in the background has it ignored


class Slowly(Pack):
    """Packs with a rest, so that a kill falls somewhere in the work."""

    def __call__(self, example: Example):  # type: ignore[no-untyped-def]
        if begun and (workers == "0" or multiprocessing.parent_process() is not None):
            Path(begun).touch()
        time.sleep(float(rest))
        return super().__call__(example)


preparing.Pack = Slowly  # type: ignore[misc]
card = read_recipe(str(Path(data) / "card.yaml"))
preparing.prepare(card, data, output, workers=int(workers), echo=lambda line: sys.stdout.write(f"{line}\n"))
