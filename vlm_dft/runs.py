"""Run folders: a checked config in, a folder that belongs to this run alone out, with all that is needed to repeat it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from vlm_dft.checkpoints import STAGING
from vlm_dft.config import TrainConfig
from vlm_dft.errors import ConfigError

LOCK = ".lock"  # in a run folder: held by the run
PLACES_ONLY = {
    "output",
    "processes",
    "micro_batch",
}  # may change between a run and its continuation: not the result
PACKAGES = (
    "vlm-dft",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "deepspeed",
    "flash-attn",
)


VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|HF_HUB|TRANSFORMERS|ACCELERATE|DS|FSDP|TOKENIZERS|VLM_DFT)_|(LOCAL_)?WORLD_SIZE$"
)
SECRET = re.compile(
    r"TOKEN(?!IZ)|KEY|SECRET|PASSWORD|CREDENTIAL|ENDPOINT|ADDR|HOST|ERROR_FILE|RUN_ID|PATH|CACHE|HOME|DIR"
)


def default_output(config: TrainConfig) -> str:
    """runs/RECIPE-MODEL-OBJECTIVE, each shortened to its last path component."""
    model = Path(config.model).name.lower()
    return f"runs/{Path(config.recipe).stem}-{model}-{'+'.join(map(path_name, config.objective))}"


def path_name(objective: str) -> str:
    """An objective's name as a folder's: "floor(minimum=0.2)" is floor-minimum=0.2."""
    return re.sub(r"[^\w.=+]+", "-", objective).strip("-")


def claim_folder(output: Path, config: TrainConfig) -> None:
    """Make the run folder, or check that it is this run's. Raises ConfigError for another's, or one we cannot write to."""
    written = output / "config.yaml"
    if output.exists() and not output.is_dir():
        raise ConfigError(f"OUTPUT {str(output)!r} is a file. Expected a folder.")
    if written.is_file():
        _check_same(output, config)
    elif output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
        raise ConfigError(
            f"OUTPUT {str(output)!r} is not empty and not a run folder (no config.yaml). Choose another OUTPUT, or empty it."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"Cannot write to OUTPUT {str(output)!r}: {error.strerror}. Choose another OUTPUT=."
        ) from error


@contextmanager
def hold(output: Path) -> Iterator[None]:
    """Hold a run folder against other processes; the kernel lets go of it with this one. Raises ConfigError if it is held.

    A POSIX lock: forked data loaders do not inherit it, and NFS knows it where its lock service runs.
    """
    with (output / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"Cannot lock {str(output / LOCK)!r}: {error.strerror}. Choose another OUTPUT=."
                ) from error
            file.seek(0)
            raise ConfigError(
                f"OUTPUT {str(output)!r} is in use by another run ({file.read().strip() or 'unknown'}). Wait for it, stop it, or "
                "choose another OUTPUT=."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        sweep(output)
        try:
            yield
        finally:
            if [path.name for path in output.iterdir()] == [LOCK]:  # a start that failed claims nothing
                (output / LOCK).unlink()
                output.rmdir()


def sweep(folder: Path) -> None:
    """Remove what a killed process was writing aside: files (write_text), and the checkpoint that it did not end."""
    for path in folder.glob(".*.[0-9]*"):
        if path.is_file():
            path.unlink()
    shutil.rmtree(folder / STAGING, ignore_errors=True)


def write_provenance(output: Path, config: TrainConfig) -> None:
    """Write config.yaml (resolved) and versions.json (packages, commit, machine)."""
    import yaml

    write_text(output / "config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
    now, file = versions(), output / "versions.json"
    if not (begun(output) and file.is_file()):
        write_json(file, now)
        return
    before = json.loads(
        file.read_text(encoding="utf-8")
    )  # of the first session; later ones follow it where they differ
    sessions = [before, *before.get("continued", [])]
    if any(sessions[-1].get(key) != now[key] for key in ("packages", "commit", "python", "machine", "environment")):
        write_json(file, {**before, "continued": [*before.get("continued", []), now]})


def begun(output: Path) -> bool:
    """Whether a run folder holds a checkpoint: what was only started claims nothing."""
    return any(output.glob("checkpoint-*")) or any(output.glob("*/checkpoint-*"))


def versions() -> dict[str, Any]:
    """Versions of the packages a result depends on, the git commit of a checkout, and the machine."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {
        "packages": found,
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "environment": environment(),
        "command": sys.argv,
    }


def environment() -> dict[str, Any]:
    """What a result or its speed may depend on: variables, launcher, GPUs, driver, CUDA. No host's name, no secrets."""
    variables = {k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k) and not SECRET.search(k)}
    found: dict[str, Any] = {"variables": variables, "launcher": _launcher()}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30).stdout
        lines = [line.split(", ") for line in said.splitlines() if ", " in line]
        found |= {"gpus": [line[0] for line in lines], "driver": lines[0][1]} if lines else {}
    if "torch" in sys.modules:
        found["cuda"] = sys.modules["torch"].version.cuda
    return found


def _launcher() -> str:
    if os.environ.get("ACCELERATE_MIXED_PRECISION"):
        return "accelerate"
    if os.environ.get("TORCHELASTIC_RUN_ID"):
        return "torchrun"
    return "deepspeed" if "WORLD_SIZE" in os.environ and "CROSS_RANK" in os.environ else "python"


def write_text(path: Path, text: str, *, sync: bool = False) -> None:
    """Write a file whole or not at all; with sync a power cut included."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open(
            "w", encoding="utf-8", errors="backslashreplace"
        ) as file:  # half a surrogate pair: an escape of JSON
            file.write(text)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # of a full disk: it does not say whose file it was
        raise (error if error.filename else OSError(error.errno, error.strerror, str(path))) from None
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _check_same(output: Path, config: TrainConfig) -> None:
    import yaml

    if not begun(output):
        return
    before: Mapping[str, Any] = yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8")) or {}
    now = config.as_dict()
    for settings in (before.get("rows") or {}, now["rows"]):
        settings.pop("workers", None)  # the same rows, sooner or later
    changed = [k for k in now if k not in PLACES_ONLY and before.get(k) != now[k]]
    if changed:
        differences = ", ".join(f"{k}: {before.get(k)!r} there, {now[k]!r} now" for k in changed)
        raise ConfigError(
            f"OUTPUT {str(output)!r} holds another run ({differences}). Choose another OUTPUT=, or remove that folder."
        )


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")
