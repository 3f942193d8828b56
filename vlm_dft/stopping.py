"""Stopping: a signal in, a saved checkpoint and the end of training after the current optimiser step out, in all processes at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from vlm_dft.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(UserError):
    """A run that was ended by a signal and continues from its last checkpoint; `status` is the exit status (143, 130)."""

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.status = 128 + received


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which SIGTERM or SIGINT came; a second SIGINT interrupts at once.

    Every process hears of it at the same step: a number is exchanged over gloo after each, so that no GPU waits.
    """

    def __init__(self) -> None:
        self.received = 0  # the signal, of any process
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
        if int(os.environ.get("RANK", "0")) == 0:  # not by print, in whose midst the signal may have come
            os.write(
                2, f"\n{signal.Signals(number).name}: saving after this step. Ctrl-C once more ends at once.\n".encode()
            )

    def agree(self) -> int:
        """The signal that any process has heard; all must call."""
        if self._group is not None:
            heard = torch.tensor(self.received)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX, group=self._group)
            self.received = int(heard)
        return self.received

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class PatientWorker:
    """Starts a data loader's worker that outlives what is sent to everyone (SIGTERM of a launcher or scheduler, Ctrl-C).

    The step that is to be saved needs its batches. The process that made it may still end it.
    """

    def __init__(self, seed: Callable[[int], Any] | None) -> None:
        self.seed = seed

    def __call__(self, worker: int) -> None:
        if self.seed is not None:
            self.seed(worker)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=_wait_for, args=(os.getppid(),), daemon=True).start()


def _wait_for(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
