"""What the loss saw of its tokens, summed up: over pieces, processes and sources, and the alarms that follow from it."""

import json
import math

import pytest
import torch

from vlm_dft import diagnostics
from vlm_dft.diagnostics import COLUMNS, GROUPS, StarvationAlarms, TokenDiagnostics, p_histogram
from vlm_dft.kinds import KINDS


def tokens(count: int, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    p = torch.rand(count, generator=draw).square()
    stats = {"log_p": p.log(), "weight": p.sqrt(), "entropy": torch.rand(count, generator=draw)}
    return stats, torch.randint(0, 32, (count,), generator=draw), torch.randint(-1, 2, (count,), generator=draw)


def test_pieces_and_processes_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    stats, kinds, sources = tokens(1000)
    whole = TokenDiagnostics(["a", "b"])
    whole.add(stats, kinds, sources)
    expected, sums = whole.summary()
    monkeypatch.setattr(diagnostics, "FOLD", 300)  # so that some of it is summed up before it is asked for
    parts = [TokenDiagnostics(["a", "b"]) for _ in range(2)]
    for k in range(10):
        cut = slice(100 * k, 100 * k + 100)
        parts[k % 2].add({name: value[cut] for name, value in stats.items()}, kinds[cut], sources[cut])
    assert len(parts[0].seen) < 5
    gathered: list[torch.Tensor] = []
    parts[0].summary(lambda x: gathered.append(x) or x)  # type: ignore[func-returns-value]
    found, parts_sums = parts[1].summary(lambda x: x + gathered[0])
    assert torch.allclose(parts_sums, sums)
    assert found == pytest.approx(expected)
    assert parts[1].summary()[0] == {}  # and nothing is counted twice


def test_a_source_is_counted_apart_and_tokens_of_none_in_the_total_alone() -> None:
    stats, kinds, sources = tokens(500)
    diagnosed = TokenDiagnostics(["a", "b"])
    diagnosed.add(stats, kinds, sources)
    found, sums = diagnosed.summary()
    p = stats["log_p"].double().exp()
    assert found["response_tokens"] == 500 and sums.shape == (3, len(GROUPS), len(COLUMNS))
    for k, source in enumerate("ab"):
        assert found[f"source/{source}/tokens"] == int((sources == k).sum())
        assert found[f"source/{source}/mean_p"] == pytest.approx(p[sources == k].mean().item())
    assert int((sources == -1).sum()) == int(sums[2, 0, 0])
    for name, bit in KINDS.items():
        assert found[f"kind/{name}/mean_p"] == pytest.approx(p[(kinds & bit) != 0].mean().item())


def test_the_edges_of_the_histogram_belong_to_the_bin_above_and_one_to_the_last() -> None:
    found = p_histogram(torch.tensor([0.0, 1e-4, 0.00099, 0.01, 0.1, 0.1999, 0.9, 1.0], dtype=torch.float64))
    counts = {name: round(8 * share) for name, share in found.items() if share}
    assert counts == {"0-0.0001": 1, "0.0001-0.001": 2, "0.01-0.1": 1, "0.1-0.2": 2, "0.9-1": 2}
    assert next(iter(found)) == "0-0.0001" and len(found) == 13


@pytest.mark.parametrize("count", [1, 2, 9, 1000])
def test_the_median_is_right_to_the_width_of_a_bin(count: int) -> None:
    stats, _, _ = tokens(count, seed=count)
    diagnosed = TokenDiagnostics()
    diagnosed.add(stats)
    p = stats["log_p"].double().exp().sort().values
    low, high = p[(count - 1) // 2].item(), p[count // 2].item()
    assert low - 0.005 <= diagnosed.summary()[0]["median_p"] <= high + 0.005


def log_of(p: float, weight: float, kind: str, count: int = 20) -> torch.Tensor:
    """The sums of a log in which `count` tokens of a kind have the same p and weight, and as many others are certain."""
    diagnosed = TokenDiagnostics(["a"])
    stats = {
        "log_p": torch.tensor([p] * count + [0.999] * count).log(),
        "weight": torch.tensor([weight] * count + [0.999] * count),
        "entropy": torch.ones(2 * count),
    }
    kinds = torch.tensor([KINDS[kind]] * count + [0] * count)
    diagnosed.add(stats, kinds, torch.zeros(2 * count, dtype=torch.long))
    return diagnosed.summary()[1]


def test_an_alarm_needs_low_p_and_little_pull_for_three_logs_in_a_row() -> None:
    starved, fed, learnt = log_of(1e-3, 1e-3, "end"), log_of(1e-3, 0.5, "end"), log_of(0.6, 0.6, "end")
    for logs, steps in (
        ([starved] * 5, [3]),
        ([starved, starved, learnt, starved, starved, starved], [6]),
        ([fed] * 5, []),
        ([learnt] * 5, []),
        ([log_of(1e-3, 1e-3, "end", count=5)] * 5, []),  # too few to judge by, and joined to two that are enough
        ([log_of(1e-3, 1e-3, "end", count=5)] * 7, [6]),
        ([starved] * 3 + [learnt] + [starved] * 3, [3]),  # once
    ):
        watch = StarvationAlarms(["a"])
        alarms = [alarm for step, log in enumerate(logs, 1) for alarm in watch.check(step, log) if alarm.kind == "end"]
        assert [alarm.step for alarm in alarms] == steps
    watch = StarvationAlarms(["a"])
    (alarm,) = [a for step in (10, 20, 30) for a in watch.check(step, starved) if a.kind == "end"]
    assert alarm.message == (
        "starved at step 30: end-of-turn tokens of source a have mean p 0.001, 100% of 20 are below 0.1, and they get 0.1% of "
        "the pull of SFT; the model does not learn to stop. --full_weight end gives these tokens the weight 1; "
        "OBJECTIVE='floor(minimum=0.1)' or 'mix(share=0.2)' keeps a pull on every token; --source_objectives a=nll trains this "
        "source by plain SFT."
    )


def test_sources_that_are_too_small_one_by_one_are_watched_together() -> None:
    names = [f"s{k}" for k in range(10)]
    diagnosed, watch = TokenDiagnostics(names), StarvationAlarms(names)
    found = []
    for step in (1, 2, 3):
        p = torch.full((30,), 1e-3)
        diagnosed.add(
            {"log_p": p.log(), "weight": p, "entropy": p}, torch.zeros(30, dtype=torch.long), torch.arange(30) % 10
        )
        found += watch.check(step, diagnosed.summary()[1])
    assert [(alarm.source, alarm.kind, alarm.tokens) for alarm in found] == [("", "all", 30)]
    assert "response tokens have mean p 0.001" in found[0].message and "SOURCE=nll" in found[0].message


def test_the_watch_goes_on_from_its_state() -> None:
    starved, few = log_of(1e-3, 1e-3, "end"), log_of(1e-3, 1e-3, "digit", count=5)
    whole, first, second = (StarvationAlarms(["a"]) for _ in range(3))
    logs = [starved + few] * 6
    expected = [(a.step, a.kind) for k, log in enumerate(logs) for a in whole.check(k, log)]
    found = [(a.step, a.kind) for k, log in enumerate(logs[:3]) for a in first.check(k, log)]
    second.restore(json.loads(json.dumps(first.state())))
    found += [(a.step, a.kind) for k, log in enumerate(logs[3:], 3) for a in second.check(k, log)]
    assert found == expected and len(found) == 3  # end, digit and all together


def test_what_is_not_a_number_is_in_no_bin() -> None:
    found = p_histogram(torch.tensor([0.5, float("nan"), 0.95]))
    assert found["0.5-0.6"] == 0.5 and found["0.9-1"] == 0.5
    nothing = TokenDiagnostics()
    nan = torch.full((3,), float("nan"))
    nothing.add({"log_p": nan, "weight": nan, "entropy": nan})
    assert math.isnan(nothing.summary()[0]["median_p"])
