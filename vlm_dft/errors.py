"""Errors: what a user can put right. Each message says what was expected, what was found, and what to do."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STALE = 600  # seconds after which another launch may have had the same number

HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ue000-\uf8ff\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)


class UserError(ValueError):
    """Base of every error that is not a bug of ours; the command line prints it without a traceback."""


class CardError(UserError):
    """A card that does not exist or does not say what a card must say."""


class ConfigError(UserError):
    """A setting that is unknown, of the wrong kind, or contradicts another."""


class ModelError(UserError):
    """A model name or folder that cannot be used."""


class RowError(UserError):
    """A data row that cannot become an example; the message names the row, what was expected and what was found.

    reason: the fault in a few words that are the same for every row that has it ("image missing"), for counting.
    """

    reason: str = "cannot be used"

    def __init__(self, message: str, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class ImageError(RowError):
    """An image that is missing, unreadable or not an image."""

    reason = "image missing or unreadable"


class MaskError(RowError):
    """A response mask that could not be made or failed its proof. Names the sample, the check, expected and found."""

    reason = "response mask cannot be proved"


def printable(text: str) -> str:
    """A text in which what a terminal would obey, and what nobody would see, is shown by its number: <U+001B>."""
    return HIDDEN.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def first_to_say(message: str) -> bool:
    """Whether no other process of this launch has shown this error: what all of them meet is shown once."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    launch = [str(os.getppid()), *(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT"))]
    digest = hashlib.sha256("\n".join([*launch, message]).encode()).hexdigest()[:16]
    said = Path(tempfile.gettempdir()) / f"vlm-dft-error-{digest}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return time.time() - said.stat().st_mtime > STALE
    except OSError:
        return True
    return True


@contextmanager
def naming(names: Sequence[str]) -> Iterator[None]:
    """Give a processor's own refusal (an aspect ratio over 200, say) the names of the samples it was about."""
    try:
        yield
    except RowError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
        raise RowError(f"{', '.join(names)}: the processor refuses it: {error}") from error
