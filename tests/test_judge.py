"""Judge: a real local server of the protocol, obedient, failing, rate-limiting and babbling; what is asked, kept and decided."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vlm_dft.errors import ConfigError
from vlm_dft.judge import Judge, JudgeSilentError
from vlm_dft.scoring import Score, score_response

pytest.importorskip("openai")

Reply = tuple[int, dict[str, str], bytes]
INTEGER = {
    "question": "How many?",
    "choices": None,
    "question_type": "free_form",
    "answer_type": "integer",
    "gold_answer": "7",
}
LETTER = {
    "question": "Which?",
    "choices": None,
    "question_type": "multi_choice",
    "answer_type": "letter",
    "gold_answer": "B, D",
}
OPEN = {
    "question": "How long?",
    "choices": None,
    "question_type": "free_form",
    "answer_type": None,
    "gold_answer": "0.5 m",
}


def said(text: str | None) -> Reply:
    body = {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
    }  # fmt: skip
    return 200, {}, json.dumps(body).encode()


class Server:
    """An HTTP server in a thread; `answer` maps the number of the request and its prompt to a reply."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer: Callable[[int, str], Reply] = lambda number, prompt: said("7")
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server.requests.append({"path": self.path, "key": self.headers["authorization"], **body})
                status, headers, payload = server.answer(len(server.requests), body["messages"][-1]["content"])
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    yield served
    served.http.shutdown()
    served.http.server_close()


def judge_of(server: Server, cache: Path, **how: Any) -> Judge:
    return Judge(server.url, "a/judge", cache, "secret", **{"wait": 0.001, "tries": 3, **how})


def test_the_judge_extracts_and_the_official_rule_compares(server: Server, tmp_path: Path) -> None:
    server.answer = lambda number, prompt: said("7")
    score = judge_of(server, tmp_path).score("The 5 and the 2 make it seven or so.", INTEGER, "mathvista")
    assert score == Score(True, "7", "extracted by the judge", "a/judge")
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
    assert request["temperature"] == 0 and request["model"] == "a/judge"
    prompt = request["messages"][0]["content"]
    assert prompt.count("Extracted answer:") == 6 and "seven or so" in prompt and prompt.endswith("Extracted answer:")


def test_what_the_official_short_circuits_decide_is_not_asked(server: Server, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path)
    assert judge.score("7", INTEGER, "mathvista").correct
    assert judge.score("", INTEGER, "mathvista").decided_by == "rule"
    assert server.requests == []


def test_mathverse_is_extracted_and_then_judged(server: Server, tmp_path: Path) -> None:
    server.answer = lambda number, prompt: said("50 cm" if prompt.endswith("Extracted answer:") else "1")
    score = judge_of(server, tmp_path).score("So it is 50 cm long.", OPEN, "mathverse")
    assert score == Score(True, "50 cm", "extracted and judged by the judge", "a/judge")
    judged = server.requests[1]["messages"][0]["content"]
    assert len(server.requests) == 2 and "Standard answer: 0.5 m\nModel's answer: 50 cm\nJudgement:" in judged
    assert judged.count("Judgement:") == 6
    server.answer = lambda number, prompt: said("null" if prompt.endswith("Extracted answer:") else "0")
    assert judge_of(server, tmp_path).score("I do not know.", OPEN, "mathverse").extracted is None


@pytest.mark.parametrize(
    ("reply", "correct", "extracted"), [("[D, B]", True, "b, d"), ("[B]", False, "b"), ("[ZZZZZ]", False, None)]
)
def test_logicvista_s_letters_must_be_all_and_only_the_gold_ones(
    server: Server, tmp_path: Path, reply: str, correct: bool, extracted: str | None
) -> None:
    server.answer = lambda number, prompt: said(reply)
    score = judge_of(server, tmp_path).score("B as well as D", LETTER, "logicvista")
    assert (score.correct, score.extracted, score.decided_by) == (correct, extracted, "a/judge")


def test_a_second_run_asks_nothing_and_a_torn_line_is_asked_again(server: Server, tmp_path: Path) -> None:
    responses = [f"They are {n} plus {n}." for n in range(5)]
    first = judge_of(server, tmp_path)
    scores = [first.score(response, INTEGER, "mathvista") for response in responses]
    assert len(server.requests) == 5 and first.counts == {"asked": 5}
    second = judge_of(server, tmp_path)
    assert [second.score(response, INTEGER, "mathvista") for response in responses] == scores
    assert len(server.requests) == 5 and second.counts == {"cached": 5}
    assert second.summary() == "a/judge: 0 asked, 5 from the cache"
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])  # as a kill leaves it
    third = judge_of(server, tmp_path)
    assert [third.score(response, INTEGER, "mathvista") for response in responses] == scores
    assert third.counts == {"cached": 4, "asked": 1}
    assert [third.score(response, INTEGER, "mathvista") for response in responses] == scores and len(
        server.requests
    ) == 6
    assert judge_of(server, tmp_path)._replies.known.keys() == third._replies.known.keys()


def test_another_model_s_replies_are_not_taken(server: Server, tmp_path: Path) -> None:
    judge_of(server, tmp_path).score("Say 3 or 4.", INTEGER, "mathvista")
    Judge(server.url, "other", tmp_path, "k").score("Say 3 or 4.", INTEGER, "mathvista")
    assert [request["model"] for request in server.requests] == ["a/judge", "other"]


MALFORMED: list[Reply] = [
    (500, {}, b"{}"), (503, {}, b"down"), (429, {"retry-after": "0"}, b"{}"), (429, {"retry-after": "Wed, 1 Jan 2031"}, b"{}"),
    (200, {}, b"not json"), (200, {}, b"{}"), (200, {}, b'{"choices": []}'), (200, {}, b'{"choices": [{"message": null}]}'), (200, {}, b"[]"),
    said(None), said("  "),
]  # fmt: skip


@pytest.mark.parametrize("bad", MALFORMED)
def test_errors_limits_and_malformed_replies_are_tried_again(server: Server, tmp_path: Path, bad: Reply) -> None:
    server.answer = lambda number, prompt: bad if number < 3 else said("7")
    judge = judge_of(server, tmp_path)
    assert judge.score("Take 3 or 4 of them.", INTEGER, "mathvista").decided_by == "a/judge"
    assert len(server.requests) == 3 and judge.counts == {"asked": 1}


def test_the_wait_is_what_the_server_asks_for_and_else_doubles(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("vlm_dft.judge.time.sleep", waits.append)
    server.answer = lambda number, prompt: (429, {"retry-after": "3.5"}, b"{}") if number == 1 else (500, {}, b"{}")
    judge_of(server, tmp_path, tries=4, wait=1.0).score("3 or 4", INTEGER, "mathvista")
    assert waits[0] == 3.5 and 2 <= waits[1] <= 2.5 and 4 <= waits[2] <= 5


def test_after_the_last_try_the_rule_decides_and_it_is_counted_and_said(server: Server, tmp_path: Path) -> None:
    server.answer = lambda number, prompt: (500, {}, b"{}")
    judge = judge_of(server, tmp_path)
    response = "The answer is 7."
    score = judge.score(response, INTEGER, "mathvista")
    ruled = score_response(response, INTEGER, benchmark="mathvista")
    assert (score.correct, score.extracted, score.decided_by) == (ruled.correct, ruled.extracted, "rule")
    assert score.rule == f"{ruled.rule} (the judge gave no reply)"
    assert judge.counts == {"failed": 1} and "1 without a reply, decided by the rule" in judge.summary()
    server.answer = lambda number, prompt: said("7")  # and it is not remembered as an answer
    assert judge.score(response, INTEGER, "mathvista").decided_by == "a/judge"


def test_a_judgement_that_is_neither_0_nor_1_is_asked_again_and_never_taken(server: Server, tmp_path: Path) -> None:
    replies = {1: "50 cm", 2: "It agrees, I think: 10", 3: "0.", 4: "50 cm"}
    server.answer = lambda number, prompt: said(replies.get(number, "maybe"))
    assert judge_of(server, tmp_path).score("It is 50 cm.", OPEN, "mathverse").correct is False
    assert len(server.requests) == 3
    judge = judge_of(server, tmp_path)
    with pytest.raises(JudgeSilentError):
        judge.ask("judge this", lambda reply: reply in ("0", "1"))
    assert len(server.requests) == 6 and "judge this" not in judge._replies.known


def test_a_judge_that_is_gone_is_tried_once_a_response_after_three_silences(server: Server, tmp_path: Path) -> None:
    server.answer = lambda number, prompt: (503, {}, b"{}")
    judge = judge_of(server, tmp_path)
    for n in range(6):
        judge.score(f"It is {n} or so, or 9.", INTEGER, "mathvista")
    assert len(server.requests) == 3 * 3 + 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_key_address_or_model_stops_with_what_to_check(server: Server, tmp_path: Path, status: int) -> None:
    judge = judge_of(server, tmp_path)
    key = judge._client.api_key
    server.answer = lambda number, prompt: (status, {}, f'{{"error": {{"message": "no: {key}!"}}}}'.encode())
    with pytest.raises(
        ConfigError, match=rf"answers {status}.*Check the address, the model's name and the key"
    ) as error:
        judge.score("3 or 4", INTEGER, "mathvista")
    assert f"{key}!" not in str(error.value)
    assert len(server.requests) == 1


def test_benchmarks_without_a_judge_are_scored_by_their_rule(server: Server, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path)
    sample = {"gold_answer": "blue"}
    assert judge.score("Answer: blue", sample, "drawn") == score_response("Answer: blue", sample, benchmark="drawn")
    assert server.requests == []


def test_hostile_responses_are_sent_bounded_and_in_valid_unicode(server: Server, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path)
    assert judge.score("\ud800 or 3 or 4 " + "x" * 200_000, INTEGER, "mathvista").decided_by == "a/judge"
    assert len(server.requests[0]["messages"][0]["content"]) < 30_000


def test_many_threads_share_one_judge(server: Server, tmp_path: Path) -> None:
    judge = judge_of(server, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda n: judge.score(f"{n} and {n}", INTEGER, "mathvista"), range(40)))
    assert {score.decided_by for score in scores} == {"a/judge"} and judge.counts == {"asked": 40}
    assert len(judge_of(server, tmp_path)._replies.known) == 40
