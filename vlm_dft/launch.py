"""Launch: torchrun's words in, the processes run, their own exit status out (torchrun's is 1 whatever they say, with a traceback)."""

from __future__ import annotations

import os
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

GRACE = 180  # seconds to save and leave after SIGTERM until SIGKILL; torchrun's 30 are few. TORCH_ELASTIC_SHUTDOWN_TIMEOUT sets it


def main(words: list[str] | None = None) -> int:
    """Run torchrun: 0, the status of the process that failed first (128 + signal if one ended it), or 128 + our own signal."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    try:
        run.main(words)
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode  # that process has said why
        return status if status > 0 else 128 - status
    return 0


if __name__ == "__main__":
    sys.exit(main())
