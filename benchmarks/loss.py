"""Loss: shapes of heads and batches in; time, memory and exactness of the DFT loss against the floor and the peers out.

    python benchmarks/loss.py [--rounds 3] [--threads 1] [--shapes small|full] [--only VARIANT,...]
                              [--markdown benchmarks/loss.md] [--json FILE]

One measurement is one forward and backward pass in a process of its own, forked from the one that drew the inputs, after a
pass over a few rows that loads libraries and a touch of as much memory as a pass may ask for; variants are interleaved over
rounds, every second round in reverse. Time: CPU seconds of all threads of the process, and wall. Peak memory: the kernel's
own mark (VmHWM, reset through /proc/self/clear_refs before the pass, so Linux only) minus what was resident before and minus
the gradients the pass leaves
behind. Buffers that are handed in (the floor's, an existing weight gradient) are inputs; so a pass that peaks before it makes
its weight gradient has that room for free. Reading the mark costs nothing: time and memory come from the same pass.

The floor is the three matrix products over response rows into preallocated memory, with no loss at all. In bf16 there are two:
products in bf16 (fast where the CPU has instructions for them, some 27 times slower than fp32 where not), and in fp32.

Peers: TRL's kernel is the real one, called as its SFTTrainer does on a CPU (pip install 'trl>=1.16'). The others are formulas
written here from what their code computes; Liger's own kernels are for GPUs. torch's linear_cross_entropy gives DFT through
reduction="none"; its NLL, which needs one product less, is listed too. A GPU would rank all of them differently.
An hour and a half and 10 GB with full shapes, two rounds and a limit of 60 s; half a minute with small ones, which only show that everything runs.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_dft.linear_loss import fused_linear_loss
from vlm_dft.objectives import IGNORE

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MB = 1e6


class Shape(NamedTuple):
    vocabulary: int
    hidden: int
    rows: int
    share: float  # of rows that are response tokens

    @property
    def targets(self) -> int:
        return round(self.rows * self.share)

    def __str__(self) -> str:
        return f"V {self.vocabulary:,}, H {self.hidden:,}, N {self.rows:,}, {self.share:.0%} response"


class Sizes(NamedTuple):
    timed: tuple[Shape, ...]
    exact: Shape
    growth: tuple[Shape, ...]


V = 151_936  # Qwen's
SIZES = {
    "full": Sizes((Shape(V, 2048, 1024, 0.2), Shape(V, 2048, 1024, 1.0), Shape(V, 512, 4096, 0.25)),
                  Shape(V, 512, 256, 1.0), tuple(Shape(V, 64, n, 1.0) for n in (256, 1024, 4096))),
    "small": Sizes((Shape(8192, 256, 512, 0.25),),
                   Shape(8192, 256, 64, 1.0), tuple(Shape(8192, 64, n, 1.0) for n in (256, 1024, 4096))),
}  # fmt: skip
WARM = Shape(512, 64, 32, 0.5)  # loads libraries, so that they cost neither time nor memory


@dataclass
class Case:
    """Inputs of a pass; its gradients are found in hidden.grad, and in weight.grad or weight_grad."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]; -100 where there is no response token
    weight_grad: Tensor | None = None  # [V, H] fp32, of the variants that add to an existing gradient

    def responses(self) -> tuple[Tensor, Tensor]:
        """Hidden states [n, H] and targets [n] of response rows alone."""
        rows = self.targets != IGNORE
        return self.hidden[rows], self.targets[rows]


def draw(shape: Shape, dtype: torch.dtype) -> Case:
    """Logits are about N(0, 1); in every second row the target stands out, by so much that p is spread over (0.002, 1)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape.vocabulary, shape.hidden, generator=generator).div_(math.sqrt(shape.hidden))
    hidden = torch.randn(shape.rows, shape.hidden, generator=generator)
    targets = torch.randint(shape.vocabulary, (shape.rows,), generator=generator)
    lift = math.log(shape.vocabulary) + 0.5 - 6 + 14 * torch.rand(len(targets[::2]), 1, generator=generator)
    hidden[::2] += lift * weight[targets[::2]]
    order = torch.randperm(shape.rows, generator=generator)
    targets[order[shape.targets :]] = IGNORE
    return Case(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets)


class NotAvailable(Exception):
    """A variant that cannot run here, and why."""


Step = Callable[[], Tensor | None]  # one forward and backward pass; the loss, detached
Setup = Callable[[Case], Step]  # what is not measured: buffers that are handed in, and imports
LossOfLogits = Callable[[Tensor, Tensor], Tensor]  # logits [N, V], targets [N] -> scalar


def touched(*size: int, dtype: torch.dtype) -> Tensor:
    """Zeros in memory that is resident already."""
    return torch.empty(size, dtype=dtype).fill_(0)


def floor(case: Case, dtype: torch.dtype | None = None) -> Step:
    """h W^T, G W and G^T h over response rows, outputs preallocated."""
    dtype = dtype or case.hidden.dtype
    hidden, weight = case.responses()[0].detach().to(dtype), case.weight.detach().to(dtype)
    tile, grad_hidden, grad_weight = (
        touched(*size, dtype=dtype) for size in ((len(hidden), len(weight)), hidden.shape, weight.shape)
    )

    def step() -> None:
        torch.mm(hidden, weight.T, out=tile)
        torch.mm(tile, weight, out=grad_hidden)
        torch.mm(tile.T, hidden, out=grad_weight)

    return step


def ours(case: Case, *, in_place: bool = False, **options: Any) -> Step:
    """fused_linear_loss on all rows; it selects the response rows itself."""
    if in_place:
        options["weight_grad"] = case.weight_grad = touched(*case.weight.shape, dtype=torch.float32)

    def step() -> Tensor:
        found = fused_linear_loss(case.hidden, case.weight, case.targets, objective="dft", **options)
        loss = found[0] if isinstance(found, tuple) else found
        loss.backward()
        return loss.detach()

    return step


def full_logits(loss_of: LossOfLogits, *, responses_only: bool = False) -> Setup:
    """Autograd through all logits of the rows; they are alive until the end, as in a model's outputs."""

    def setup(case: Case) -> Step:
        def step() -> Tensor:
            hidden, targets = case.responses() if responses_only else (case.hidden, case.targets)
            logits = F.linear(hidden, case.weight)
            loss = loss_of(logits, targets)
            loss.backward()
            return loss.detach()

        return step

    return setup


def official(logits: Tensor, targets: Tensor) -> Tensor:
    """Wu et al.'s trainer: cross entropy, then softmax a second time with a graph that nothing uses."""
    logits, mask, gold = logits.float(), targets != IGNORE, targets.clamp(min=0)
    nll = F.cross_entropy(logits, gold, reduction="none")
    probabilities = logits.softmax(-1)
    return (nll * probabilities.gather(1, gold[:, None]).squeeze(1).detach() * mask).sum() / mask.sum()


def llama_factory(logits: Tensor, targets: Tensor) -> Tensor:
    nll = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")[targets != IGNORE]
    return (nll * (-nll.detach()).exp()).mean()


def ms_swift(logits: Tensor, targets: Tensor) -> Tensor:
    nll = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")
    return nll.mul_((-nll.detach()).exp()).sum() / (targets != IGNORE).sum()


@functools.cache
def trl_kernel() -> tuple[Any, int]:
    """TRL's autograd function for log p, and the vocabulary's chunk that its fused head uses."""
    if importlib.util.find_spec("trl") is None:
        raise NotAvailable("not installed: pip install 'trl>=1.16'")
    try:
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction
    except ImportError as error:
        raise NotAvailable(f"trl {importlib.metadata.version('trl')} has no such kernel: {error}") from error
    return _ChunkedLogProbFunction, _CHUNKED_LOGPROB_CHUNK_SIZE


def trl(case: Case, *, responses_only: bool = False) -> Step:
    """As add_fused_lm_head and SFTTrainer.compute_loss do; off the GPU they score every row, and mask afterwards."""
    kernel, chunk = trl_kernel()
    outputs = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for, for its logs

    def step() -> Tensor:
        hidden, targets = case.responses() if responses_only else (case.hidden, case.targets)
        mask = targets != IGNORE
        log_p = kernel.apply(hidden, case.weight, None, targets.clamp(min=0), 1.0, chunk, None, 1.0, outputs)[0]
        log_p = log_p.masked_fill(~mask, 0)
        loss = (-log_p * log_p.exp().detach()).sum() / mask.sum().clamp(min=1)
        loss.backward()
        return loss.detach()

    return step


def liger(case: Case) -> Step:
    """use_token_scaling: chunks of rows as small as Liger makes them, softmax twice, a [V, H] product added per chunk."""
    hidden, weight, targets = case.hidden.detach(), case.weight.detach(), case.targets
    size = math.ceil(len(hidden) / math.ceil(len(weight) / hidden.shape[1]))
    size = min(len(hidden), 1 << (size - 1).bit_length())

    def step() -> Tensor:
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        loss, count = torch.zeros(()), (targets != IGNORE).sum()
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            used, gold = targets[part] != IGNORE, targets[part, None].clamp(min=0)
            logits = hidden[part] @ weight.T
            scale = logits.softmax(-1).gather(1, gold).squeeze(1) * used  # in the dtype of the logits
            log_p = logits.float().log_softmax(-1)
            loss -= (log_p.gather(1, gold).squeeze(1) * scale).sum() / count
            slope = log_p.exp_().scatter_add_(1, gold, log_p.new_full(gold.shape, -1)).mul_(used[:, None] / count)
            slope = slope.to(logits.dtype) * scale[:, None]
            grad_hidden[part] = slope @ weight
            grad_weight += torch.mm(slope.T, hidden[part]).float()
        case.hidden.grad, case.weight.grad = grad_hidden, grad_weight
        return loss

    return step


def torch_loss(case: Case, *, dft: bool, chunk: int | None = None) -> Step:
    """linear_cross_entropy on response rows; DFT through reduction="none", which forms the logits again in the backward."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotAvailable(f"torch {torch.__version__} has no linear_cross_entropy: pip install 'torch>=2.14'")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)

    def step() -> Tensor:
        hidden, targets = case.responses()
        reduction = "none" if dft else "mean"
        nll = F.linear_cross_entropy(hidden, case.weight, targets, reduction=reduction, options=options)
        loss = (nll * (-nll.detach()).exp()).mean() if dft else nll
        loss.backward()
        return loss.detach()

    return step


@dataclass(frozen=True)
class Variant:
    name: str
    setup: Setup
    objective: str | None = "dft"  # None: no loss


VARIANTS: dict[str, Variant] = {
    "floor": Variant("floor: three matrix products", floor, None),
    "floor_fp32": Variant("floor, products in fp32", functools.partial(floor, dtype=torch.float32), None),
    "ours": Variant("ours, fresh weight gradient", ours),
    "ours_in_place": Variant("ours, added to an existing weight gradient", functools.partial(ours, in_place=True)),
    "ours_stats": Variant("ours, fresh, with return_stats", functools.partial(ours, return_stats=True)),
    "official": Variant("official formula, full logits", full_logits(official)),
    "llama_factory": Variant("LLaMA-Factory's formula, full logits", full_logits(llama_factory)),
    "ms_swift": Variant("ms-swift's formula, full logits", full_logits(ms_swift)),
    "ms_swift_keep": Variant("ms-swift's formula, response rows (logits_to_keep)", full_logits(ms_swift, responses_only=True)),
    "trl_all": Variant("TRL's kernel, all rows, as it does on a CPU", trl),
    "trl_responses": Variant("TRL's kernel, response rows", functools.partial(trl, responses_only=True)),
    "liger_formula": Variant("Liger's formula in torch, all rows", liger),
    "torch_dft": Variant("torch linear_cross_entropy, response rows, reduction none", functools.partial(torch_loss, dft=True)),
    "torch_dft_256": Variant("torch linear_cross_entropy, the same, batch_chunk_size=256", functools.partial(torch_loss, dft=True, chunk=256)),
    "torch_nll": Variant("torch linear_cross_entropy, response rows, **NLL**", functools.partial(torch_loss, dft=False), "nll"),
    "torch_nll_256": Variant("torch linear_cross_entropy, **NLL**, batch_chunk_size=256", functools.partial(torch_loss, dft=False, chunk=256), "nll"),
}  # fmt: skip


class Reference(NamedTuple):
    loss: float
    grad_hidden: Tensor  # [N, H] float64
    grad_weight: Tensor  # [V, H] float64


def reference(case: Case, objective: str) -> Reference:
    """Loss and gradients in float64 of the inputs as they are: gradient of the logits = w / n * (softmax - onehot)."""
    rows = case.targets != IGNORE
    hidden, weight, gold = case.hidden.detach()[rows].double(), case.weight.detach().double(), case.targets[rows, None]
    log_p = (hidden @ weight.T).log_softmax(-1)
    nll = -log_p.gather(1, gold)
    scale = ((-nll).exp() if objective == "dft" else torch.ones_like(nll)) / len(gold)
    slope = log_p.exp_().scatter_add_(1, gold, torch.full_like(nll, -1)).mul_(scale)
    grad_hidden = torch.zeros(case.hidden.shape, dtype=torch.float64)
    grad_hidden[rows] = slope @ weight
    return Reference(float((scale * nll).sum()), grad_hidden, slope.T @ hidden)


def relative(found: Tensor, expected: Tensor) -> float:
    """Size of the difference over size."""
    return float((found.double() - expected).norm() / expected.norm())


@dataclass
class Measurement:
    """Of one pass, or why there is none."""

    variant: str
    shape: Shape
    dtype: str
    cpu: float = math.nan  # seconds, all threads
    wall: float = math.nan  # seconds
    peak: float = math.nan  # MB over inputs and gradients
    errors: list[float] = field(default_factory=list)  # relative: loss, gradient of hidden, of weight
    note: str = ""


def record(one: Measurement) -> dict[str, Any]:
    """A measurement for JSON, which knows no NaN."""
    fields = asdict(one) | {"shape": one.shape._asdict()}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in fields.items()}


def memory(line: str) -> float:
    """MB, a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.split(f"{line}:")[1].split()[0]) * 1024 / MB


def warm_up(size: Shape) -> None:
    """Touch as much memory as a pass may ask for, and give it back: a pass then pays for its pages, not for a cold host."""
    touched(2 * size.vocabulary * size.hidden + 512 * size.vocabulary, dtype=torch.float32)


def fill_in(found: Measurement, variant: Variant, case: Case, exact: Reference | None) -> None:
    step = variant.setup(case)
    warm_up(found.shape)
    ctypes.CDLL(None).malloc_trim(0)  # freed memory is not kept resident, to be used again unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM = VmRSS
    resident, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    loss = step()
    found.cpu, found.wall = time.process_time() - cpu, time.perf_counter() - wall
    fresh = [g for g in (case.hidden.grad, case.weight.grad) if g is not None]
    if variant.objective is not None:
        found.peak = memory("VmHWM") - resident - sum(g.nbytes for g in fresh) / MB
    if exact is not None and loss is not None:
        grad_weight = case.weight.grad if case.weight_grad is None else case.weight_grad
        found.errors = [abs(loss.item() / exact.loss - 1), relative(case.hidden.grad, exact.grad_hidden),
                        relative(grad_weight, exact.grad_weight)]  # fmt: skip


def work(found: Measurement, case: Case, exact: Reference | None, threads: int, pipe: Connection) -> None:
    """In a process of its own: measure, and send the measurement."""
    Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")  # where memory ends, this process goes first
    torch.set_num_threads(threads)
    variant = VARIANTS[found.variant]
    try:
        variant.setup(draw(WARM, case.hidden.dtype))()
        fill_in(found, variant, case, exact)
    except NotAvailable as error:
        found.note = str(error)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        found.note = f"not available: {error}"
    pipe.send(found)


def measure(
    key: str, shape: Shape, dtype: str, case: Case, options: argparse.Namespace, exact: Reference | None = None
) -> Measurement:
    """One pass of a variant in a forked process, which is ended after options.limit seconds."""
    found = Measurement(key, shape, dtype)
    fork = multiprocessing.get_context("fork")
    ours_end, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=work, args=(found, case, exact, options.threads, theirs))
    process.start()
    theirs.close()
    try:
        if ours_end.poll(options.limit):
            found = ours_end.recv()
        else:
            found.note = f"over {options.limit:g} s"
    except EOFError:  # it ended without an answer
        process.join()
        found.note = f"ended with {process.exitcode}" + (" (out of memory)" if process.exitcode == -9 else "")
    process.kill()
    process.join()
    told = found.note or f"{found.cpu:.3f} s, {found.peak:,.0f} MB {' '.join(f'{e:.1e}' for e in found.errors)}"
    print(f"{shape}, {dtype}, {key}: {told}", file=sys.stderr, flush=True)
    return found


def keys_of(options: argparse.Namespace, dtype: str) -> list[str]:
    """Variants asked for; the floors always, the fp32 floor beside bf16 only."""
    asked = ["floor", "floor_fp32", *options.only] if options.only else list(VARIANTS)
    return [key for key in VARIANTS if key in asked and (key != "floor_fp32" or dtype == "bf16")]


def timed(shape: Shape, dtype: str, options: argparse.Namespace) -> dict[str, list[Measurement]]:
    """Measurements of each variant, one a round; a variant that cannot run is tried once."""
    case = draw(shape, DTYPES[dtype])
    found: dict[str, list[Measurement]] = {key: [] for key in keys_of(options, dtype)}
    for k in range(options.rounds):
        for key in list(found)[:: -1 if k % 2 else 1]:
            if not any(one.note for one in found[key]):
                found[key].append(measure(key, shape, dtype, case, options))
    return found


def median(values: Iterable[float]) -> float:
    return statistics.median(values) if (values := list(values)) else math.nan


def over(found: dict[str, list[Measurement]], key: str, base: str) -> float:
    """Median over rounds of CPU time over the base's of the same round."""
    pairs = zip(found.get(key, []), found.get(base, []), strict=False)
    return median(a.cpu / b.cpu for a, b in pairs if not a.note and not b.note)


def show(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def time_table(found: dict[str, list[Measurement]], dtype: str) -> list[str]:
    """A markdown row per variant."""
    bases = ["floor", "floor_fp32"] if dtype == "bf16" else ["floor"]
    titles = ["floor = 1", "fp32 floor = 1"][: len(bases)]
    lines = [f"| variant | CPU s (lowest to highest) | {' | '.join(titles)} | wall s | peak, MB |",
             "|---" * (4 + len(bases)) + "|"]  # fmt: skip
    for key, ones in found.items():
        if note := "; ".join(one.note for one in ones if one.note):
            lines.append(f"| {VARIANTS[key].name} | {note} |" + " |" * (2 + len(bases)))
            continue
        cpu, ratios = [one.cpu for one in ones], [show(over(found, key, base), ".2f") for base in bases]
        lines.append(
            f"| {VARIANTS[key].name} | {median(cpu):.3f} ({min(cpu):.3f} to {max(cpu):.3f}) | {' | '.join(ratios)} | "
            f"{median(one.wall for one in ones):.3f} | {show(median(one.peak for one in ones), ',.0f')} |"
        )
    if not math.isnan(ratio := over(found, "ours_stats", "ours")):
        lines += ["", f"`return_stats=True` against the same without: {ratio - 1:+.1%} CPU time."]
    return lines


def exactness(shape: Shape, options: argparse.Namespace) -> tuple[list[str], list[Measurement]]:
    """A markdown row per variant, and the measurements: relative errors in fp32 and bf16."""
    found: dict[str, dict[str, Measurement]] = {}
    for dtype in DTYPES:
        case = draw(shape, DTYPES[dtype])
        for objective in ("dft", "nll"):
            keys = [key for key in keys_of(options, dtype) if VARIANTS[key].objective == objective]
            exact = reference(case, objective) if keys else None
            for key in keys:
                found.setdefault(key, {})[dtype] = measure(key, shape, dtype, case, options, exact)
    lines = ["| variant | fp32: loss | gradient of hidden | of weight | bf16: loss | gradient of hidden | of weight |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for key, ones in found.items():
        cells = [show(error, ".1e") for dtype in DTYPES for error in ones[dtype].errors or [math.nan] * 3]
        notes = {one.note for one in ones.values() if one.note}
        lines.append(f"| {VARIANTS[key].name}{''.join(f' ({note})' for note in notes)} | {' | '.join(cells)} |")
    return lines, [one for ones in found.values() for one in ones.values()]


def growth(shapes: Sequence[Shape], options: argparse.Namespace) -> tuple[list[str], list[Measurement]]:
    """A markdown row per number of response rows, and the measurements: our peak memory."""
    keys, found = [key for key in ("ours", "ours_in_place") if key in keys_of(options, "fp32")], []
    lines = ["| response rows | dtype | one tile [256, V] fp32, MB | " + " | ".join(f"{VARIANTS[key].name}, MB" for key in keys) + " |",
             "|---" * (3 + len(keys)) + "|"]  # fmt: skip
    for dtype in DTYPES if keys else {}:
        for shape in shapes:
            case = draw(shape, DTYPES[dtype])
            ones = [measure(key, shape, dtype, case, options) for key in keys]
            found += ones
            cells = [one.note or f"{one.peak:,.0f}" for one in ones]
            lines.append(f"| {shape.rows:,} | {dtype} | {256 * shape.vocabulary * 4 / MB:,.0f} | {' | '.join(cells)} |")
    return lines, found


def machine(options: argparse.Namespace) -> list[str]:
    """Where the numbers come from."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    instructions = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in about.get("flags", "")]
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = [
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "trl") if importlib.util.find_spec(name)
    ]
    return [
        f"Made by `python benchmarks/loss.py {' '.join(sys.argv[1:])}`, commit {commit.stdout.strip()}; {', '.join(versions)}.",
        f"{about.get('model name', 'CPU')}, {os.cpu_count()} cores, {', '.join(instructions)}; threads: {options.threads}.",
        f"Medians over {options.rounds} interleaved rounds, a process each; ratios are medians of each round's ratio.",
        "CPU seconds of all threads; peak memory over inputs and gradients, in MB of 10^6 bytes.",
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", choices=SIZES, default="full")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {','.join(VARIANTS)}; floors come along")
    parser.add_argument("--limit", type=float, default=600, help="wall seconds after which a pass is ended and told so")
    parser.add_argument("--markdown", type=Path, help="write the tables here too")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    options = parser.parse_args()
    if unknown := set(options.only or ()) - set(VARIANTS):
        parser.error(f"unknown variants {sorted(unknown)}; choose from {','.join(VARIANTS)}")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # threads of this process would not survive the forks
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    with contextlib.suppress(NotAvailable):
        trl_kernel()  # once, not in every process
    sizes, every = SIZES[options.shapes], []
    lines = ["# The DFT loss", "", *machine(options), "", "## (a) Forward and backward"]
    for shape in sizes.timed:
        for dtype in DTYPES:
            found = timed(shape, dtype, options)
            every += [one for ones in found.values() for one in ones]
            lines += ["", f"### {shape}, {dtype}", "", *time_table(found, dtype)]
    exact, ones = exactness(sizes.exact, options)
    lines += ["", "## (b) Exactness", "", f"Relative error against float64 of the same inputs: {sizes.exact}. Gradients: size of the "
              "difference over size. A gradient kept in bf16 cannot be closer than about 1.7e-3.", "", *exact]  # fmt: skip
    rows, more = growth(sizes.growth, options)
    if more:
        lines += ["", "## (c) Our peak memory over the number of response rows", "",
                  f"V {sizes.growth[0].vocabulary:,}, H {sizes.growth[0].hidden}.", "", *rows]  # fmt: skip
    every += [*ones, *more]
    print("\n".join(lines))
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json:
        content = {"machine": machine(options), "measurements": [record(one) for one in every]}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
