"""The family: the objectives' own functions in; their weight w and pull w(1-p) over p, as one plot, out.

    python benchmarks/objectives.py [--out benchmarks/objectives.svg]

The weights are those that training uses, for a target of probability p where the other tokens share 1 - p evenly (100 of
them: eaft and deft look at the whole distribution). Seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vlm_dft.objectives import OBJECTIVES, TokenStats
from vlm_dft.report_charts import lines_figure, standalone

OTHERS = 100


def weights(steps: int = 200) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """p [steps + 1], and the weights of every objective there."""
    p = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    masses = torch.cat([p[:, None], ((1 - p) / OTHERS)[:, None].expand(-1, OTHERS)], dim=1)
    stats = TokenStats(p.log(), lambda: (masses, torch.ones_like(p)))
    return p, {name: objective(stats) for name, objective in OBJECTIVES.items()}


def main() -> None:
    """Draw the weights of every objective over p."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".svg"))
    out = parser.parse_args().out
    p, found = weights()
    lines = {name: list(zip(p.tolist(), w.tolist(), strict=True)) for name, w in found.items()}
    figure = lines_figure(lines, "weight of a token's -log p, by its probability", "p of the target", "w")
    out.write_text(standalone(figure), encoding="utf-8")
    print(f"w at p =        {'  '.join(f'{value:5.2f}' for value in (0.01, 0.1, 0.3679, 0.5, 0.9, 0.99))}")
    for name, w in found.items():
        print(
            f"{name:<12}    {'  '.join(f'{w[round(value * 200)].item():5.2f}' for value in (0.01, 0.1, 0.3679, 0.5, 0.9, 0.99))}"
        )
    print(f"plot: {out}")


if __name__ == "__main__":
    main()
