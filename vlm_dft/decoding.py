"""Decoding: how a token is chosen in; the draws of every sample, and the numbers that decide them, out. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_dft.errors import ConfigError

SEEDS = 2**31 - 1  # servers take seeds that fit 32 signed bits


@dataclass(frozen=True, slots=True)
class Decoding:
    """Greedy (temperature 0), or several draws of each sample. Raises ConfigError for what cannot be."""

    samples: int = 1
    "Responses to each sample, drawn apart."
    temperature: float = 0.0
    "0: the most likely token each time."
    top_p: float = 1.0
    "Draw from the most likely tokens that together have this probability."
    seed: int = 0
    "Of every draw, with the sample's id and the draw's number: nothing else decides it."

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples must be at least 1, found {self.samples}.")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"temperature must lie in [0, 100], found {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], found {self.top_p}.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2^63), found {self.seed}.")
        if self.samples > 1 and self.greedy:
            raise ConfigError(
                f"{self.samples} greedy responses to a sample would be the same. Set a temperature above 0, such as 1.0."
            )
        if self.greedy and self.top_p != 1:
            raise ConfigError(f"top_p = {self.top_p} belongs to draws: set a temperature above 0, or leave it out.")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def as_dict(self) -> dict[str, Any]:
        """What decides the responses; of a greedy one, that it is."""
        return {"temperature": 0.0, "samples": 1} if self.greedy else asdict(self)

    def draws(self, samples: int) -> list[tuple[int, int]]:
        """(place of a sample, draw) of every response, in the order of predictions.jsonl."""
        return [(k, draw) for k in range(samples) for draw in range(self.samples)]

    def key(self, identity: str, draw: int) -> int:
        """128 bits that belong to one draw of one sample."""
        said = f"{self.seed}\0{draw}\0{identity}".encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(said).digest()[:16], "little")

    def server_seed(self, identity: str, draw: int) -> int:
        """The seed that a server is asked to draw with."""
        return self.key(identity, draw) % SEEDS

    def uniforms(self, asked: Iterable[tuple[str, int]], steps: int) -> NDArray[np.float64]:
        """[len(asked), steps] numbers in [0, 1) that choose the tokens of each (id, draw)."""
        return np.stack([np.random.Generator(np.random.Philox(key=self.key(*one))).random(steps) for one in asked])


GREEDY = Decoding()
