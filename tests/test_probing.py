"""The capability gauge: summary numbers against literals, thresholds, and batches that do not change it."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from vlm_dft.chat import Example
from vlm_dft.cli import main
from vlm_dft.collators import ChatCollator
from vlm_dft.kinds import KINDS
from vlm_dft.loss_head import attach_loss
from vlm_dft.models import load_model
from vlm_dft.probing import _summary, gauge, predict, token_summary


def test_the_summary_of_two_responses_is_what_one_computes_by_hand() -> None:
    found = token_summary(torch.tensor([1.0, 0.5, 0.05, 0.95]).log(), [2, 2])
    assert (found["tokens"], found["responses"]) == (4, 2)
    assert found["mean_p"] == pytest.approx(0.625)
    assert found["stderr_p"] == pytest.approx(0.125)  # means 0.75 and 0.5: half their difference
    assert (found["share_p_below_0.1"], found["share_p_above_0.9"]) == (0.25, 0.5)
    assert found["nll"] == pytest.approx((0.6931 + 2.9957 + 0.0513) / 4, abs=1e-4)


def test_no_token_has_no_summary() -> None:
    with pytest.raises(ValueError, match="at least one token, found 0"):
        token_summary(torch.empty(0), [])


@pytest.mark.parametrize(
    ("mean_p", "starved", "prior"),
    [
        (0.97, 0.02, "strong"),
        (0.5, 0.0, "strong"),
        (0.58, 0.37, "weak"),
        (0.02, 0.9, "weak"),
        (0.3, 0.04, "middle"),
        (0.8, 0.1, "middle"),
    ],
)
def test_a_prior_is_strong_only_if_few_tokens_are_starved(mean_p: float, starved: float, prior: str) -> None:
    found, words = predict(mean_p, starved)
    assert found == prior and words.startswith(f"{prior} prior (mean p {mean_p:.2f}, {starved:.0%} of the tokens below")


def test_the_gauge_does_not_depend_on_the_batches_and_leaves_the_model_alone(processor: Any, drawn: list[Any]) -> None:
    model, collator = attach_loss(load_model("tiny")), ChatCollator(processor)
    before = [p.clone() for p in model.parameters()]
    whole = gauge(model, [collator(drawn[:12])])
    parts = gauge(model, [collator(drawn[k : k + 3]) for k in range(0, 12, 3)])
    assert whole["mean_p"] == pytest.approx(parts["mean_p"], rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_each_source_is_gauged_as_if_it_were_alone(processor: Any, drawn: list[Any]) -> None:
    rows = [replace(row, source="even" if k % 2 == 0 else "odd") for k, row in enumerate(drawn[:12])]
    model = attach_loss(load_model("tiny"))
    tagged = ChatCollator(processor, tag_sources=["even", "odd"])
    both = gauge(model, [tagged(rows[:5]), tagged(rows[5:])], sources=["even", "odd"], blank=True)
    assert list(both["sources"]) == ["even", "odd"] and both["responses"] == 12
    for source, found in both["sources"].items():
        alone = gauge(model, [ChatCollator(processor)([r for r in rows if r.source == source])], blank=True)
        for name in ("tokens", "mean_p", "stderr_p", "median_p", "nll", "share_p_below_0.1"):
            assert found[name] == pytest.approx(alone[name], rel=1e-5), name
        assert found["histogram"] == pytest.approx(alone["histogram"])
        assert found["blank"]["gain"] == pytest.approx(alone["blank"]["gain"], rel=1e-4)


def test_a_blank_picture_takes_away_what_the_model_sees(processor: Any, drawn: list[Any]) -> None:
    model, batch = attach_loss(load_model("tiny")), ChatCollator(processor)(drawn[:8])
    found = gauge(model, [batch], blank=True)["blank"]
    with torch.no_grad():
        grey = model(**{**batch, "pixel_values": 0 * batch["pixel_values"]}, objective="nll")["log_p"].double().exp()
        real = model(**batch, objective="nll")["log_p"].double().exp()
    assert found["mean_p"] == pytest.approx(grey.mean().item(), rel=1e-6)
    assert found["median_p"] == pytest.approx(grey.median().item(), rel=1e-6)
    assert found["gain"] == pytest.approx((real - grey).mean().item(), rel=1e-6)
    assert found["looking"] and found["gain"] > 0.2
    text_only = [Example([{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}])]
    assert gauge(model, [ChatCollator(processor)(text_only)], blank=True)["blank"] is None


def test_a_model_that_answers_from_the_text_alone_is_said_not_to_look(processor: Any, drawn: list[Any]) -> None:
    asked = [
        replace(row, messages=[row.messages[0], {"role": "assistant", "content": "Answer: 3"}]) for row in drawn[:8]
    ]
    model = attach_loss(load_model("tiny"))
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.zero_()  # blind
    found = gauge(model, [ChatCollator(processor)(asked)], blank=True)["blank"]
    assert found["gain"] == pytest.approx(0, abs=1e-6) and not found["looking"]


def test_starved_kinds_are_named_where_dft_is_recommended_all_the_same() -> None:
    """Ten responses of twenty tokens, all certain but the one that ends them."""
    p = torch.full((20,), 0.99)
    p[-1] = 1e-4
    kinds = torch.zeros(20, dtype=torch.long)
    kinds[-1] = KINDS["end"]
    found = _summary([{"log_p": p.log(), "kinds": kinds} for _ in range(10)])
    assert found["share_p_below_0.1"] == pytest.approx(0.05)
    assert (found["prior"], found["objective"], found["full_weight"]) == ("middle", "floor(minimum=0.1)", ["end"])
    assert found["kinds"] == {"end": {"tokens": 10, "mean_p": pytest.approx(1e-4), "share_p_below_0.1": 1.0}}


@pytest.mark.parametrize(
    ("recipe", "objective", "prior"), [("drawn_noisy", "dft", "strong"), ("drawn_new", "nll", "weak")]
)
def test_the_command_recommends_dft_where_it_wins_and_sft_where_it_does_not(
    recipe: str, objective: str, prior: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: str(tmp_path / name) for name in ("found.json", "found.svg")}
    words = ["probe", recipe, "-n", "40", "--json", files["found.json"], "--plot", files["found.svg"]]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{recipe}: {prior} prior" in said and f"recommended: OBJECTIVE='{objective}'" in said
    assert "the model looks at the pictures" in said
    found = json.loads(Path(files["found.json"]).read_text())
    assert found["sources"][recipe]["objective"] == objective and found["sources"][recipe]["responses"] == 40
    assert sum(found["histogram"].values()) == pytest.approx(1)
    svg = ElementTree.parse(files["found.svg"]).getroot()
    assert svg.tag.endswith("svg") and len(list(svg.iter("{http://www.w3.org/2000/svg}rect"))) > 13


def test_a_file_of_several_sources_is_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"source": source, "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": answer}]}
        for source, answer in (("a", "Answer: 3"), ("b", "zebra <answer>")) for _ in range(9)
    ]  # fmt: skip
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["probe", str(path)]) == 0
    said = capsys.readouterr().out
    assert "all sources" in said and "no pictures" in said and "in one run" not in said
    assert "format tokens: mean p 0.00" in said and "DFT starves them" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "Unknown recipe 'nothing'"),
        (["drawn", "-n", "0"], "Expected -n of at least 1, found 0"),
        (["drawn", "--plot", "no/such/folder/x.svg"], "--plot 'no/such/folder/x.svg': expected the name of a file"),
        (["drawn", "--model", "no/such/model"], "no/such/model"),
        (
            ["drawn", "--model", "nobody/nothing-at-all"],
            "Cannot load 'nobody/nothing-at-all': .* Is the name right, the hub reach",
        ),
        (["drawn", "--max_length", "3"], "2,040 over max_length = 3 tokens"),
    ],
)
def test_a_probe_that_cannot_be_made_says_why(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", *words]) == 2
    assert re.search(message.replace("/", "."), capsys.readouterr().err)


def test_rows_without_a_picture_are_not_said_to_look_away(processor: Any, drawn: list[Any]) -> None:
    said = Example([{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}], source="text")
    model, collator = attach_loss(load_model("tiny")), ChatCollator(processor, tag_sources=["drawn", "text"])
    mixed = gauge(model, [collator([*drawn[:3], *[said] * 5])], sources=["drawn", "text"], blank=True)
    alone = gauge(model, [collator(drawn[:3])], sources=["drawn", "text"], blank=True)
    assert mixed["sources"]["text"]["blank"] is None
    assert mixed["sources"]["drawn"]["blank"]["gain"] == pytest.approx(alone["blank"]["gain"], rel=1e-4)
    assert mixed["blank"]["gain"] == pytest.approx(
        alone["blank"]["gain"], rel=1e-4
    )  # not thinned by rows that have none
