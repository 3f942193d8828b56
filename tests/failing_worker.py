"""Run by test_engines_run.py under torchrun: the command line, in whose run one process (or all: ALL=1) meets a UserError."""

import os
import sys
import time

from vlm_dft import cli, pipeline
from vlm_dft.errors import RowError


def run(plan, *, echo):  # type: ignore[no-untyped-def]
    if os.environ["RANK"] == "1" or os.environ.get("ALL"):
        raise RowError("row 7 holds a picture of nothing")
    time.sleep(600)  # as a process does that waits in a collective


pipeline.run = run
sys.exit(cli.main(["train", "--processes", "2", "--benchmark", "none", "--output", sys.argv[1]]))
