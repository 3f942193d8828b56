"""Judge: a response, its record and its benchmark in, a Score out, where the official protocol has a language model decide.

Any OpenAI-compatible endpoint can be the judge. MathVista and LogicVista have it extract the answer, and compare by rule; MathVerse
has it extract and judge. Other benchmarks have no judge: their rule scores. Every reply is kept in a file, by the hash of
model and prompt, so that a second scoring asks nothing. It is never the default, and `Score.decided_by` says who decided.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_dft.errors import ConfigError
from vlm_dft.judge_prompts import (
    logicvista_prompt,
    mathverse_extraction_prompt,
    mathverse_judgement_prompt,
    mathvista_prompt,
)
from vlm_dft.official.mathvista import score_extraction, short_circuit
from vlm_dft.scoring import score_response
from vlm_dft.verdicts import Score

LONGEST_WAIT = 60.0  # seconds between two tries
GONE = 3  # judgements in a row without a reply, after which each further one is tried once
WRONG_SETUP = (401, 403, 404)  # no number of tries helps: the key, the address or the model's name is wrong

Check = Callable[[str], bool]


class JudgeSilentError(Exception):
    """The judge gave no usable reply, after all tries."""


class Judge:
    """A language model that extracts or judges. Safe to use from several threads.

    base_url, model: of any OpenAI-compatible server. cache: the folder of its replies. api_key: else OPENAI_API_KEY, if any.
    tries: of one request, with waits that double from `wait` seconds, or what the server asks for. counts: what was "asked", found
    "cached", and "failed" (the rule decided then).
    """

    def __init__(
        self, base_url: str, model: str, cache: Path, api_key: str | None = None,
        *, tries: int = 5, wait: float = 1.0, timeout: float = 120.0,
    ) -> None:  # fmt: skip
        self.model = model
        self.tries = tries
        self.wait = wait
        self.counts: Counter[str] = Counter()
        self._client = _client(base_url, api_key or os.environ.get("OPENAI_API_KEY") or "none", timeout)
        self._replies = _Replies(Path(cache) / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', model)}.jsonl")
        self._lock = threading.Lock()
        self._silent = 0  # judgements in a row that got no reply

    def score(self, response: str, record: Mapping[str, Any], benchmark: str) -> Score:
        """The judge's Score where the benchmark's protocol has a judge; the official rule's otherwise, and where the judge fails.

        Raises ConfigError where the server refuses key, address or model.
        """
        if benchmark not in PROTOCOLS or not response.strip():
            return score_response(response, record, benchmark=benchmark)
        try:
            return PROTOCOLS[benchmark](self, response, record)
        except JudgeSilentError:
            score = score_response(response, record, benchmark=benchmark)
            return replace(score, rule=f"{score.rule} (the judge gave no reply)")

    def summary(self) -> str:
        """Who decided, in one line for a report."""
        said = f"{self.model}: {self.counts['asked']:,} asked, {self.counts['cached']:,} from the cache"
        return said + (
            f", {self.counts['failed']:,} without a reply, decided by the rule" if self.counts["failed"] else ""
        )

    def ask(self, prompt: str, usable: Check = bool) -> str:
        """The reply to a prompt, from the cache if it is there. Raises JudgeSilentError after the last try."""
        key = hashlib.sha256(f"{self.model}\0{prompt}".encode()).hexdigest()
        reply = self._replies.get(key)
        if reply is not None:
            with self._lock:
                self.counts["cached"] += 1
            return reply
        reply = self._ask(prompt, usable)
        with self._lock:
            self.counts["asked" if reply is not None else "failed"] += 1
            self._silent = 0 if reply is not None else self._silent + 1
        if reply is None:
            raise JudgeSilentError
        self._replies.put(key, reply)
        return reply

    def _ask(self, prompt: str, usable: Check) -> str | None:
        tries = self.tries if self._silent < GONE else 1
        for attempt in range(tries):
            reply, asked_wait = self._request(prompt)
            if reply is not None and usable(reply):
                return reply
            if attempt + 1 < tries:
                backoff = self.wait * 2**attempt * (1 + random.random() / 4)
                time.sleep(min(LONGEST_WAIT, asked_wait if asked_wait is not None else backoff))
        return None

    def _request(self, prompt: str) -> tuple[str | None, float | None]:
        """One request: (the reply or None, the seconds that the server asks to wait or None)."""
        from openai import APIStatusError, OpenAIError

        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=256
            )
            return str(answer.choices[0].message.content or "").strip(), None
        except APIStatusError as error:
            if error.status_code in WRONG_SETUP:
                said = str(error.message).replace(
                    self._client.api_key, "the key"
                )  # servers repeat a key that they refuse
                raise ConfigError(
                    f"The judge {self.model!r} at {self._client.base_url} answers {error.status_code} ({said}). "
                    "Check the address, the model's name and the key."
                ) from error
            return None, _seconds(error.response.headers.get("retry-after"))
        except (OpenAIError, ValueError, TypeError, AttributeError, IndexError):  # a reply that is not of the protocol
            return None, None


def _client(base_url: str, api_key: str, timeout: float) -> Any:
    try:
        from openai import OpenAI
    except ModuleNotFoundError as error:
        raise ConfigError('A judge needs the openai package: pip install "vlm-dft[serve]".') from error
    return OpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0)


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None  # a date: the own backoff does


class _Replies:
    """Replies of a judge in a file of JSON lines, each synced to disk before it counts; a torn last line is asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self.torn = bool(text) and not text.endswith("\n")
        self.known: dict[str, str] = {}
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self.known[row["key"]] = row["reply"]
            except (ValueError, TypeError, KeyError):
                continue

    def get(self, key: str) -> str | None:
        return self.known.get(key)

    def put(self, key: str, reply: str) -> None:
        line = json.dumps({"key": key, "reply": reply}) + "\n"
        with self.lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + line if self.torn else line)
                file.flush()
                os.fsync(file.fileno())
            self.torn = False
            self.known[key] = reply


def _mathvista(judge: Judge, response: str, record: Mapping[str, Any]) -> Score:
    """The official short circuits first; then the judge extracts, and the official rule compares."""
    if short := short_circuit(response, record):
        return score_extraction(short.answer, record, rule=short.rule)
    extraction = judge.ask(mathvista_prompt(response, record))
    return replace(score_extraction(extraction, record, rule="extracted by the judge"), decided_by=judge.model)


def _mathverse(judge: Judge, response: str, record: Mapping[str, Any]) -> Score:
    """The judge extracts, and judges what it extracted: 0 or 1."""
    extraction = judge.ask(mathverse_extraction_prompt(response, record))
    verdict = judge.ask(
        mathverse_judgement_prompt(extraction, record), lambda reply: reply.strip(" .'\"") in ("0", "1")
    )
    found = None if extraction.strip(" .'\"").lower() == "null" else extraction
    return Score(verdict.strip(" .'\"") == "1", found, "extracted and judged by the judge", judge.model)


def _logicvista(judge: Judge, response: str, record: Mapping[str, Any]) -> Score:
    """The judge lists the letters; they must be all and only the gold ones."""
    reply = judge.ask(logicvista_prompt(response, record), lambda text: bool(_letters(text)) or "zzzz" in text.lower())
    letters = _letters(reply)
    gold = sorted(letter.strip().lower() for letter in str(record["gold_answer"]).split(","))
    return Score(letters == gold, ", ".join(letters) or None, "extracted by the judge", judge.model)


def _letters(reply: str) -> list[str]:
    return sorted({letter.lower() for letter in re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", reply)})


PROTOCOLS: dict[str, Callable[[Judge, str, Mapping[str, Any]], Score]] = {
    "logicvista": _logicvista, "mathverse": _mathverse, "mathvista": _mathvista,
}  # fmt: skip
"""The benchmarks whose official protocol has a judge."""
