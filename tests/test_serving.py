"""Asking a server: a real one in this process, which limits, fails, stammers and hangs up."""

from __future__ import annotations

import base64
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_generation import sample

from vlm_dft.as_trained import Asking
from vlm_dft.decoding import Decoding
from vlm_dft.errors import ConfigError
from vlm_dft.pictures import data_uri, resizer
from vlm_dft.prediction_file import check_settings
from vlm_dft.serving import NoServer, Server, ask_server, check_server

QUICK = {"first_wait": 0.01, "retries": 3}


@dataclass
class Fake:
    """A server: what it says to the so many-th try of a sample, and what it was asked."""

    url: str = ""
    reply: Callable[[str, int, dict[str, Any]], Any] = lambda text, attempt, asked: text
    tries: Counter[str] = field(default_factory=Counter)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    most: int = 0  # requests at once
    now: int = 0


@pytest.fixture
def fake() -> Iterator[Fake]:
    state, lock = Fake(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None: ...

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, json.dumps({"object": "list", "data": [{"id": "tuned", "object": "model"}]}).encode())

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = asked["messages"][-1]["content"]
            text = parts if isinstance(parts, str) else "".join(p.get("text", "") for p in parts)
            with lock:
                state.tries[text] += 1
                state.asked.append(asked)
                state.keys.append(self.headers.get("Authorization"))
                state.at.append(time.monotonic())
                state.now += 1
                state.most = max(state.most, state.now)
                attempt = state.tries[text]
            found = state.reply(text, attempt, asked)
            with lock:
                state.now -= 1
            if found is None:
                self.close_connection = True
                return
            if isinstance(found, str):
                choice = {"index": 0, "message": {"role": "assistant", "content": found}, "finish_reason": "stop"}
                found = (200, {"id": "x", "object": "chat.completion", "created": 1, "model": "tuned", "choices": [choice],
                               "usage": {"prompt_tokens": 1, "completion_tokens": len(found), "total_tokens": 9}}, {})  # fmt: skip
            status, body, headers = found
            self.send(status, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield state
    server.shutdown()


@pytest.fixture
def samples() -> list[Any]:
    return [sample(k, f"question {k}") for k in range(6)]


def ask(fake: Fake, samples: list[Any], path: Path, **words: Any) -> Any:
    server = Server(fake.url, "tuned", **{**QUICK, **words.pop("server", {})})
    return ask_server(server, samples, path, show=False, **words)


def test_a_server_s_answers_are_kept_in_the_samples_order(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    fake.reply = lambda text, attempt, asked: time.sleep(0.05 * ("0" in text)) or f"answer to {text}"
    rows, failures = ask(fake, samples, tmp_path / "predictions.jsonl")
    assert not failures
    assert rows[4] == {"id": "s4", "draw": 0, "benchmark": "drawn", "split": "test", "response": "answer to question 4",
                       "finish": "stop", "tokens": 20}  # fmt: skip
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [f"s{k}" for k in range(6)]
    asked = fake.asked[0]
    assert (asked["model"], asked["max_tokens"], asked["temperature"], "seed" in asked) == ("tuned", 12, 0, False)
    ask(fake, samples, tmp_path / "predictions.jsonl")
    assert sum(fake.tries.values()) == 6  # nothing is asked twice


def test_the_server_is_sent_the_very_pixels(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    ask(fake, samples[:1], tmp_path / "p.jsonl")
    image, text = fake.asked[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "question 0"}
    header, _, content = image["image_url"]["url"].partition(",")
    assert header == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(content)))
    assert np.array_equal(np.array(sent), np.array(samples[0].images[0]))


def test_pictures_are_resized_as_in_training(processor: Any) -> None:
    """What the collator makes of the picture is what the processor makes of the one that is sent, told not to resize."""
    from vlm_dft.collators import ChatCollator
    from vlm_dft.models import load_processor

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (277, 421, 3), np.uint8))
    row = {
        "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}],
        "images": [noise],
    }
    trained = ChatCollator(load_processor("tiny", max_pixels=50_176)).prompts([row])
    uri = data_uri(noise, resizer(Asking(max_pixels=50_176), "served-name"), where="x")
    sent = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert sent.size[0] % 28 == sent.size[1] % 28 == 0 and sent.size[0] * sent.size[1] <= 50_176
    served = processor.image_processor(images=[sent], return_tensors="pt")  # the server's own, whose limits are wide
    assert torch.equal(served["pixel_values"], trained["pixel_values"])
    assert resizer(Asking(), "served-name") is None


def test_a_colour_jpeg_is_sent_as_it_is_and_a_turned_one_upright(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(tmp_path / "b.jpg", exif=turned)
    plain, upright = (data_uri(tmp_path / name, None, where="x") for name in ("a.jpg", "b.jpg"))
    assert base64.b64decode(plain.partition(",")[2]) == (tmp_path / "a.jpg").read_bytes()
    assert Image.open(io.BytesIO(base64.b64decode(upright.partition(",")[2]))).size == (10, 20)


def test_failures_that_pass_are_asked_again(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    garbage: list[Any] = [
        (500, {"error": {"message": "worker died"}}, {}),
        (200, b"<html>proxy</html>", {}),
        (200, {"choices": []}, {}),
        (200, {"id": "x", "object": "chat.completion", "choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, {}),
        None,  # hangs up
        (429, {"error": {"message": "slow down"}}, {}),
    ]  # fmt: skip
    fake.reply = lambda text, attempt, asked: "fine" if attempt > 1 else garbage[int(text[-1])]
    rows, failures = ask(fake, samples, tmp_path / "p.jsonl")
    assert not failures and [row["response"] for row in rows] == ["fine"] * 6
    assert set(fake.tries.values()) == {2}


def test_a_server_that_asks_to_wait_is_given_the_time_by_all_requests(
    fake: Fake, samples: list[Any], tmp_path: Path
) -> None:
    limited = (429, {"error": {"message": "rate limit"}}, {"Retry_After": "0.4"})
    fake.reply = lambda text, attempt, asked: limited if len(fake.asked) == 1 else "fine"
    rows, failures = ask(fake, samples, tmp_path / "p.jsonl", server={"concurrency": 1})
    assert not failures and len(rows) == 6
    assert fake.at[1] - fake.at[0] >= 0.4 and fake.most == 1


def test_requests_go_out_at_once_but_not_more_than_allowed(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    fake.reply = lambda text, attempt, asked: time.sleep(0.1) or "fine"
    ask(fake, samples, tmp_path / "p.jsonl", server={"concurrency": 3})
    assert fake.most == 3


def test_what_keeps_failing_is_said_and_asked_again_the_next_time(
    fake: Fake, samples: list[Any], tmp_path: Path
) -> None:
    said: list[str] = []
    bad = (400, {"error": {"message": "the prompt has 9000 tokens, the model takes 4096: no extra ones"}}, {})
    worse = (503, {"error": {"message": "overloaded"}}, {})
    fake.reply = lambda text, attempt, asked: {"2": bad, "4": worse}.get(text[-1], "fine")
    rows, failures = ask(fake, samples, tmp_path / "predictions.jsonl", say=said.append)
    assert [row["id"] for row in rows] == ["s0", "s1", "s3", "s5"]
    assert list(failures) == [("s2", 0), ("s4", 0)]
    assert fake.tries["question 2"] == 2 and fake.tries["question 4"] == 4  # the first is no better the next time
    assert len(said) == 2 and re.search(r"drawn s2 \(draw 0\): no response: status 400: .*9000 tokens", said[0])
    fake.reply = lambda text, attempt, asked: f"answer to {text}"
    before = sum(fake.tries.values())
    rows, failures = ask(fake, samples, tmp_path / "predictions.jsonl")
    assert [row["id"] for row in rows] == [f"s{k}" for k in range(6)] and not failures
    assert sum(fake.tries.values()) == before + 2
    assert rows[0]["response"] == "fine" and rows[2]["response"] == "answer to question 2"


def test_a_server_that_refuses_everybody_ends_the_run_at_once(
    fake: Fake, samples: list[Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    fake.reply = lambda text, attempt, asked: (401, {"error": {"message": "bad key: sk-secret-of-the-test"}}, {})
    with pytest.raises(NoServer, match=r"wants a key \(status 401.*Set OPENAI_API_KEY in the environment") as error:
        ask(fake, samples, tmp_path / "predictions.jsonl", server={"concurrency": 1})
    assert "secret" not in str(error.value)
    assert len(fake.asked) == 1 and fake.keys == ["Bearer sk-secret-of-the-test"]
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"secret" not in written and b"127.0.0.1" not in written


def test_a_server_that_is_not_there_or_serves_another_model_is_said_before_any_request(
    fake: Fake, samples: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(NoServer, match="does not serve 'base'. It serves: tuned. Give its name as --model"):
        ask_server(Server(fake.url, "base"), samples, tmp_path / "p.jsonl", show=False)
    with pytest.raises(NoServer, match=r"No server answers at http://127.0.0.1:9/v1 .* Is it up\?"):
        ask_server(Server("http://127.0.0.1:9/v1", "tuned"), samples, tmp_path / "q.jsonl", show=False)
    assert not fake.asked


def test_a_server_that_goes_away_ends_the_run_and_keeps_what_it_said(
    fake: Fake, samples: list[Any], tmp_path: Path
) -> None:
    fake.reply = lambda text, attempt, asked: "fine" if text in ("question 0", "question 1") else None
    with pytest.raises(NoServer, match=r"has stopped answering .* The same command goes on"):
        ask(fake, samples, tmp_path / "p.jsonl", server={"concurrency": 1, "retries": 1})
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2


def test_a_server_that_only_fails_ends_the_run(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    fake.reply = lambda text, attempt, asked: (500, {"error": {"message": "the engine is dead"}}, {})
    with pytest.raises(NoServer, match="has stopped answering .*the engine is dead"):
        ask(fake, samples, tmp_path / "p.jsonl", server={"concurrency": 2, "retries": 1})
    assert len(fake.tries) < len(samples)


def test_a_withheld_response_is_empty_and_says_why_and_is_not_asked_again(
    fake: Fake, samples: list[Any], tmp_path: Path
) -> None:
    choice = {"index": 0, "message": {"role": "assistant", "content": None}, "finish_reason": "content_filter"}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "tuned", "choices": [choice]}
    fake.reply = lambda text, attempt, asked: (200, body, {})
    rows, failures = ask(fake, samples, tmp_path / "p.jsonl")
    assert not failures and len(fake.asked) == len(samples)
    assert {(row["response"], row["finish"]) for row in rows} == {("", "content_filter")}


def test_a_model_s_own_penalty_is_switched_off_and_a_server_that_knows_none_is_asked_without(
    fake: Fake, samples: list[Any], tmp_path: Path
) -> None:
    ask(fake, samples, tmp_path / "a.jsonl")
    assert {asked.get("repetition_penalty") for asked in fake.asked} == {1.0}
    fake.asked.clear()
    refused = (400, {"error": {"message": "Unrecognized request argument supplied: repetition_penalty"}}, {})
    fake.reply = lambda text, attempt, asked: refused if "repetition_penalty" in asked else "fine"
    said: list[str] = []
    rows, failures = ask(fake, samples, tmp_path / "b.jsonl", say=said.append, server={"concurrency": 1})
    assert len(rows) == 6 and not failures and len(fake.asked) == 7
    assert said == ["the server takes none of repetition_penalty: responses are drawn with its own"]


def test_draws_have_seeds_of_their_own(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    rows, _ = ask(fake, samples, tmp_path / "p.jsonl", decoding=Decoding(3, 0.7, 0.9, seed=5))
    assert [(row["id"], row["draw"]) for row in rows[:4]] == [("s0", 0), ("s0", 1), ("s0", 2), ("s1", 0)]
    assert len({asked["seed"] for asked in fake.asked}) == 18
    assert {(asked["temperature"], asked["top_p"]) for asked in fake.asked} == {(0.7, 0.9)}


def test_changed_settings_are_refused(fake: Fake, samples: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    ask(fake, samples, path)
    with pytest.raises(ConfigError, match=r"pixels: None there, \[3136, 50176, 28, 'processor'\] now"):
        ask(fake, samples, path, rule=resizer(Asking(max_pixels=50_176), "x"))
    with pytest.raises(ConfigError, match=r"settings \(samples: 6 there, 5 now\)"):
        ask(fake, samples[:5], path)
    with pytest.raises(ConfigError, match="engine: 'openai' there, 'transformers' now"):
        check_settings(path, {"engine": "transformers"})


def test_an_address_and_the_client_are_asked_for(monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="needs the server's address, found None. Give --base-url"):
        check_server(None)
    with pytest.raises(ConfigError, match="found 'localhost:8000'"):
        check_server("localhost:8000")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-dft\[serve\]'"):
        check_server("http://localhost:8000/v1")
