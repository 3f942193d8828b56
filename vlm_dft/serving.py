"""Serving: Samples and an OpenAI-compatible server in; predictions.jsonl out, many requests at once, each tried again, resumable."""

from __future__ import annotations

import asyncio
import email.utils
import importlib.util
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_dft.bars import Bar
from vlm_dft.chat import Sample
from vlm_dft.decoding import GREEDY, Decoding
from vlm_dft.errors import ConfigError, ModelError
from vlm_dft.fingerprints import digest, settings_of
from vlm_dft.pictures import data_uri
from vlm_dft.prediction_file import PredictionFile, longest, row_of

if TYPE_CHECKING:
    from vlm_dft.qwen_images import QwenImages

KEY = "OPENAI_API_KEY"  # in the environment; sent to the server alone, never written
AGAIN = (408, 409, 425, 429)  # and 5xx: statuses that another try may not meet
REFUSED = (401, 403, 404)  # the same for every request
LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
MOST_ASKED = 600.0  # seconds that a server's Retry-After is followed for
SHOWN = 5  # failures that are said in full
OURS = {"repetition_penalty": 1.0}  # else vLLM and SGLang take the model's own, which Qwen2.5-VL sets to 1.05
UNKNOWN = re.compile(r"repetition_penalty|top_k|unrecogni[sz]ed|unknown|unexpected|extra", re.IGNORECASE)
NOTHING_SAID = (
    "length",
    "content_filter",
)  # all of it was thought, or withheld: an empty response, which another try repeats
FINISH = {"stop": "stop", "length": "length", "eos": "stop", "stop_sequence": "stop", "max_tokens": "length"}


class NoServer(ModelError):
    """A server that no request can succeed with: not there, or it refuses everyone."""


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, and how patiently."""

    base_url: str
    model: str
    concurrency: int = 32
    "Requests at once."
    retries: int = 6
    "Further tries of a request, the waits doubling from first_wait."
    first_wait: float = 1.0
    timeout: float = 600.0
    "Seconds of one try."


@dataclass(slots=True)
class _Run:
    server: Server
    client: Any
    samples: Sequence[Sample]
    decoding: Decoding
    limit: int
    rule: QwenImages | None
    failures: dict[tuple[str, int], str] = field(default_factory=dict)
    not_before: float = 0.0  # time.monotonic() until when the server wants nobody to ask
    lost: int = 0  # requests in a row that got no answer in all their tries
    ours: dict[str, Any] = field(default_factory=dict)  # settings outside OpenAI's, until the server refuses them


def check_server(base_url: str | None) -> str:
    """The server's address. Raises ConfigError where there is none, or the client is not installed."""
    address = base_url or os.environ.get("OPENAI_BASE_URL")
    if not address or not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"engine openai needs the server's address, found {address!r}. Give --base-url, such as http://localhost:8000/v1."
        )
    if importlib.util.find_spec("openai") is None:
        raise ConfigError(
            "engine openai needs the openai package, which is not installed. Run: pip install 'vlm-dft[serve]'"
        )
    return address


def ask_server(
    server: Server, samples: Sequence[Sample], path: Path, *, decoding: Decoding = GREEDY, max_new_tokens: int | None = None,
    rule: QwenImages | None = None, settings: Mapping[str, Any] | None = None, title: str = "generating", show: bool = True,
    say: Callable[[str], Any] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[tuple[str, int], str]]:  # fmt: skip
    """(rows of predictions.jsonl, {(id, draw): why} of the requests that failed), with `path` written as `generate` does.

    A request that fails is tried again; one that keeps failing is left out and said, and is asked again when the same is
    run again. rule: what resizes pictures (pictures.resizer). Raises NoServer where none can succeed: what is there stays.
    """
    limit = max_new_tokens or longest(samples)
    pixels = (
        None if rule is None else [rule.min_pixels, rule.max_pixels, rule.patch_size * rule.merge_size, rule.resize]
    )
    found = {
        "engine": "openai", **(settings or {}), **settings_of(samples, decoding, limit), "served_model": server.model,
        "prompts": digest(sample.messages for sample in samples), "pixels": pixels,
    }  # fmt: skip
    order = [(samples[k].id, draw) for k, draw in decoding.draws(len(samples))]
    with PredictionFile(path, found, order, model=server.model, how={"concurrency": server.concurrency}) as file:
        missing = set(file.missing)
        places = deque(p for p in decoding.draws(len(samples)) if (samples[p[0]].id, p[1]) in missing)
        with Bar(len(order), title if show else None, unit="response") as bar:
            bar.update(len(order) - len(places))
            run = asyncio.run(_ask_all(server, samples, decoding, limit, rule, places, file, bar))
        failures = run.failures
        if not run.ours and not file.how.get("own_settings"):
            file.how["own_settings"] = True
            say(f"the server takes none of {', '.join(OURS)}: responses are drawn with its own")
        for key in list(failures)[:SHOWN]:
            say(f"{samples[0].benchmark} {key[0]} (draw {key[1]}): no response: {failures[key]}")
        file.how["failed"] = len(failures)
        return file.finish(), failures


async def _ask_all(
    server: Server, samples: Sequence[Sample], decoding: Decoding, limit: int, rule: QwenImages | None,
    places: deque[tuple[int, int]], file: PredictionFile, bar: Bar,
) -> _Run:  # fmt: skip
    """Ask for every place, so many at once; keep what comes as it comes."""
    import openai

    client = openai.AsyncOpenAI(
        base_url=server.base_url, api_key=os.environ.get(KEY) or "none", max_retries=0, timeout=server.timeout
    )
    ours = OURS if decoding.greedy else {**OURS, "top_k": -1}
    run = _Run(server, client, samples, decoding, limit, rule, ours=dict(ours))

    async def work() -> None:
        while places:
            k, draw = places.popleft()
            answer = await _answer(run, samples[k], draw)
            if answer is not None:
                file.add([row_of(samples[k], draw, answer)])
                bar.update()

    async with client:
        if places:
            await _check_model(run)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(server.concurrency, len(places))):
                    group.create_task(work())
        except (
            BaseExceptionGroup
        ) as errors:  # the first that a request raised; the others were cancelled, or met the same
            raise errors.exceptions[0] from None
    return run


async def _check_model(run: _Run) -> None:
    """Ask the server what it serves, before thousands of requests. Raises NoServer; one that cannot tell is taken at its word."""
    import openai

    try:
        served = [model.id async for model in run.client.with_options(timeout=30.0, max_retries=2).models.list()]
    except openai.APIConnectionError as error:
        raise NoServer(f"No server answers at {run.server.base_url} ({error.__cause__ or error}). Is it up?") from error
    except openai.APIStatusError as error:
        if error.status_code in (401, 403):
            raise NoServer(_refusal(run, error)) from error
        return
    except Exception:  # noqa: BLE001  a list in a form of its own
        return
    if served and run.server.model not in served:
        raise NoServer(
            f"The server at {run.server.base_url} does not serve {run.server.model!r}. It serves: {', '.join(served[:8])}. Give its "
            "name as --model."
        )


async def _answer(run: _Run, sample: Sample, draw: int) -> dict[str, Any] | None:
    """What is said of one response; None, and the reason in run.failures, where all tries failed."""
    import openai

    request = await _request(run, sample, draw)
    why = ""
    for attempt in range(run.server.retries + 1):
        await asyncio.sleep(max(0.0, run.not_before - time.monotonic()))
        wait = min(LONGEST_WAIT, run.server.first_wait * 2**attempt)
        try:
            answer = await _ask(run, request)
            run.lost = 0
            return answer
        except openai.APIStatusError as error:
            why = f"status {error.status_code}: {_short(error.message)}"
            if error.status_code in REFUSED:
                raise NoServer(_refusal(run, error)) from error
            if error.status_code < 500 and error.status_code not in AGAIN:
                run.lost = 0
                break  # this request, and not the server, is the matter
            asked = _retry_after(error.response.headers)
            if error.status_code == 429 or asked:
                wait = min(MOST_ASKED, max(asked, wait))
                run.not_before = max(run.not_before, time.monotonic() + wait)  # for all
        except openai.APIConnectionError as error:  # a timeout too
            why = _short(f"{type(error).__name__}: {error.__cause__ or error}")
        except (ValueError, TypeError, AttributeError, LookupError, openai.APIError) as error:
            why = f"an answer that is none of a chat completion ({_short(str(error))})"
        if attempt < run.server.retries:
            await asyncio.sleep(wait)
        else:
            run.lost += 1
    run.failures[sample.id, draw] = why
    if run.lost >= min(run.server.concurrency, len(run.samples)):
        raise NoServer(f"The server at {run.server.base_url} has stopped answering ({why}). The same command goes on.")
    return None


async def _ask(run: _Run, request: Mapping[str, Any]) -> dict[str, Any]:
    """One try. A server that knows only OpenAI's own settings is asked without the others, from then on."""
    import openai

    ours = dict(run.ours)
    try:
        return _read(await run.client.chat.completions.create(**request, extra_body=ours))
    except openai.APIStatusError as error:
        if not ours or error.status_code not in (400, 422) or not UNKNOWN.search(str(error.message)):
            raise
        answer = _read(await run.client.chat.completions.create(**request))
        run.ours = {}  # only now: a prompt that is refused either way says nothing of them
        return answer


async def _request(run: _Run, sample: Sample, draw: int) -> dict[str, Any]:
    decoding = run.decoding
    drawn = {} if decoding.greedy else {"top_p": decoding.top_p, "seed": decoding.server_seed(sample.id, draw)}
    return {
        "model": run.server.model, "messages": await asyncio.to_thread(_messages, sample, run.rule), "max_tokens": run.limit,
        "temperature": decoding.temperature, **drawn,
    }  # fmt: skip


def _messages(sample: Sample, rule: QwenImages | None) -> list[dict[str, Any]]:
    """A sample's messages as the server takes them, its pictures inside."""
    where, images = f"{sample.benchmark} {sample.split} {sample.id}", iter(enumerate(sample.images))
    found = []
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    k, image = next(images)
                    url = data_uri(image, rule, where=f"{where}, image {k}")
                    parts.append({"type": "image_url", "image_url": {"url": url}})
                else:
                    parts.append({"type": "text", "text": part["text"]})
            content = parts
        found.append({"role": message["role"], "content": content})
    return found


def _read(completion: Any) -> dict[str, Any]:
    """The response, how it finished, and its tokens. Raises ValueError for an answer that holds none."""
    choice = completion.choices[0]
    text, finish = choice.message.content, FINISH.get(str(choice.finish_reason), str(choice.finish_reason))
    if text is None and finish in NOTHING_SAID:
        text = ""
    if not isinstance(text, str):
        raise ValueError(f"its content is {text!r}, its finish {finish!r}")
    usage = getattr(completion, "usage", None)
    return {"response": text, "finish": finish, "tokens": getattr(usage, "completion_tokens", None)}


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait: as milliseconds, seconds or a date."""
    try:
        if said := headers.get("retry-after-ms"):
            return max(0.0, float(said) / 1000)
        said = headers.get("retry-after") or "0"
        if said.strip()[:1].isdigit():
            return float(said)
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except ValueError:
        return 0.0


def _refusal(run: _Run, error: Any) -> str:
    what = {401: "wants a key", 403: "refuses the key", 404: "knows no such model or address"}[error.status_code]
    do = "Is --model its name, and --base-url right?" if error.status_code == 404 else f"Set {KEY} in the environment."
    return f"The server at {run.server.base_url} {what} (status {error.status_code}: {_short(error.message)}). {do}"


def _short(text: str) -> str:
    said = " ".join(str(text).split())
    if key := os.environ.get(KEY):  # servers repeat a key that they refuse
        said = said.replace(key, f"${KEY}")
    return said if len(said) <= 160 else said[:157] + "..."
