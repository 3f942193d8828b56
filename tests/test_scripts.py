"""The shell scripts, run in a copy of the repository with a stub Python on a bare PATH: no network, no pip."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"))
TOOLS = "bash dirname awk env grep tail tr paste mkdir rm touch mktemp cp sleep".split()

# Behaves as the environment variables say, and writes down what it was asked.
PYTHON = f"""#!{shutil.which("bash")}
here=$(dirname "$0")
echo "$*" >> "$ASKED"
case "$*" in
  --version) echo "Python $VERSION" ;;
  *"version_info < (3, 11)"*) [[ $VERSION == 3.11* ]] ;;
  *ensurepip*) exit "$NO_VENV" ;;
  *find_spec*) exit 1 ;;
  *installed.py*) [[ -e $here/done ]] || {{ echo torch; exit 1; }} ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip install"*)
    [[ $PIP_SAYS != killed ]] || kill -KILL $PPID
    sleep "$PIP_TAKES"
    [[ -z $PIP_SAYS ]] || {{ echo "$PIP_SAYS" >> "$5"; exit 1; }}
    touch "$here/done" ;;
  "-m pip --version") ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
DF = f"""#!{shutil.which("bash")}
echo 'Filesystem 1024-blocks Used Available'
echo "disk 0 0 $((FREE_GB * 1048576))"
"""
SET_UP = 'source scripts/setup.sh; set_up dev; echo "$PATH"'


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A computer with a copy of the repository, coreutils, and the stub Python."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.bin, self.asked = folder / "repo", folder / "bin", folder / "asked"
        shutil.copytree(ROOT / "scripts", self.repo / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        self.bin.mkdir()
        self.asked.touch()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)
        write_program(self.bin / "python3.11", PYTHON)
        write_program(self.bin / "df", DF)

    def environment(self, settings: dict[str, str]) -> dict[str, str]:
        defaults = {"VERSION": "3.11.9", "NO_VENV": "0", "PIP_SAYS": "", "PIP_TAKES": "0", "FREE_GB": "100"}
        return {"PATH": str(self.bin), "HOME": str(self.repo), "ASKED": str(self.asked)} | defaults | settings

    def start(self, command: str, **settings: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-c", command], cwd=self.repo, env=self.environment(settings), text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, command: str = SET_UP, **settings: str) -> subprocess.CompletedProcess[str]:
        with self.start(command, **settings) as process:
            out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def pip_calls(self) -> list[str]:
        return [line for line in self.asked.read_text().splitlines() if line.startswith("-m pip install")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_every_script_stops_at_the_first_error(script: Path) -> None:
    assert "\nset -euo pipefail\n" in (ROOT / script).read_text()


def test_first_run_makes_an_environment_and_says_so(machine: Machine) -> None:
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert "No virtual environment is active: making .venv with Python 3.11.9." in done.stderr
    assert [call.split()[-1] for call in machine.pip_calls()] == [f"{machine.repo}[dev]"]
    assert done.stdout.startswith(f"{machine.repo}/.venv/bin:")
    assert not (machine.repo / ".venv/.installing").exists()


def test_second_run_calls_no_pip_and_says_nothing(machine: Machine) -> None:
    machine.run()
    again = machine.run()
    assert (again.returncode, again.stderr) == (0, "")
    assert len(machine.pip_calls()) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"VERSION": "3.9.2"}, "Expected Python 3.11 or newer. Found: python3.11 is Python 3.9.2;"),
        ({"PYTHON": "python4"}, "Expected Python 3.11 or newer. Found: none (looked for python4)."),
        (
            {"NO_VENV": "1"},
            "Expected a Python with the modules venv and ensurepip. Without them: python3.11.",
        ),
        ({"FREE_GB": "5"}, "Expected 12 GB free"),
    ],
)
def test_a_machine_that_cannot_is_told_before_anything_is_made(
    machine: Machine, settings: dict[str, str], expected: str
) -> None:
    failed = machine.run(**settings)
    assert failed.returncode == 1
    assert expected in failed.stderr
    assert not (machine.repo / ".venv").exists()
    assert machine.pip_calls() == []


def test_less_room_can_be_asked_for(machine: Machine) -> None:
    assert machine.run(FREE_GB="5", MIN_FREE_GB="3").returncode == 0


@pytest.mark.parametrize(
    ("pip_says", "expected"),
    [
        ("ERROR: [Errno 28] No space left on device", "The disk is full"),
        (
            "NewConnectionError: Temporary failure in name resolution",
            "Check the network, the proxy (HTTPS_PROXY)",
        ),
        (
            "ERROR: No matching distribution found for torch",
            "the package index (PIP_INDEX_URL; pip config list)",
        ),
        ("error: subprocess-exited-with-error", "pip failed: see its words above; all of them are in "),
    ],
)
def test_a_failing_pip_is_explained_and_tried_again(machine: Machine, pip_says: str, expected: str) -> None:
    failed = machine.run(PIP_SAYS=pip_says)
    assert failed.returncode == 1
    assert expected in failed.stderr
    again = machine.run()
    assert again.returncode == 0
    assert len(machine.pip_calls()) == 2


def test_an_installation_cut_short_is_not_trusted(machine: Machine) -> None:
    killed = machine.run(PIP_SAYS="killed")
    assert killed.returncode != 0
    (machine.repo / ".venv/bin/done").touch()  # what pip had put there looks whole
    again = machine.run()
    assert "cut short: making .venv anew" in again.stderr
    assert len(machine.pip_calls()) == 2
    assert machine.run().stderr == ""


def test_a_failed_addition_leaves_a_whole_environment_whole(machine: Machine) -> None:
    machine.run()
    (machine.repo / ".venv/bin/done").unlink()  # say, pyproject.toml asks for more now
    assert machine.run(PIP_SAYS="NewConnectionError").returncode == 1
    assert "anew" not in machine.run().stderr


def test_an_addition_cut_short_is_not_trusted(machine: Machine) -> None:
    machine.run()
    (machine.repo / ".venv/bin/done").unlink()
    machine.run(PIP_SAYS="killed")
    assert "cut short: making .venv anew" in machine.run().stderr


def test_two_at_once_install_once(machine: Machine) -> None:
    first = machine.start(SET_UP, PIP_TAKES="2")
    while not machine.pip_calls():
        time.sleep(0.05)
    second = machine.run()
    first.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (0, 0)
    assert "Another set-up is running here: waiting for it." in second.stderr
    assert len(machine.pip_calls()) == 1


def test_the_active_environment_is_used(machine: Machine, tmp_path: Path) -> None:
    own = tmp_path / "own"
    write_program(own / "bin/python", PYTHON)
    done = machine.run(VIRTUAL_ENV=str(own))
    assert done.returncode == 0, done.stderr
    assert f"Using the active environment {own}" in done.stderr
    assert done.stdout.startswith(f"{own}/bin:")
    assert not (machine.repo / ".venv").exists()


def test_an_active_environment_that_is_too_old_is_named(machine: Machine, tmp_path: Path) -> None:
    own = tmp_path / "own"
    write_program(own / "bin/python", PYTHON)
    failed = machine.run(VIRTUAL_ENV=str(own), VERSION="3.9.2")
    assert failed.returncode == 1
    assert f"Expected Python 3.11 or newer in the active environment {own}. Found Python 3.9.2." in failed.stderr


def test_conda_is_used_except_its_base(machine: Machine, tmp_path: Path) -> None:
    own = tmp_path / "own"
    write_program(own / "bin/python", PYTHON)
    machine.run(CONDA_PREFIX=str(own), CONDA_DEFAULT_ENV="base")
    assert (machine.repo / ".venv").exists()
    machine.run(CONDA_PREFIX=str(own), CONDA_DEFAULT_ENV="vlm")
    assert (own / "bin/done").exists()


# What the front door calls ----------------------------------------------------------------------------------------


def front_door(machine: Machine, arguments: str, **settings: str) -> list[str]:
    """The words of the one command that train_qwenvl.sh runs, with an environment that is ready."""
    env = machine.repo.parent / "env"
    write_program(env / "bin/python", PYTHON)
    (env / "bin/done").touch()
    for program in ("vlm-dft", "vlm-dft-launch", "deepspeed"):
        write_program(env / f"bin/{program}", f'#!{shutil.which("bash")}\nprintf "%s\\n" {program} "$@"\n')
    done = machine.run(f"bash scripts/train_qwenvl.sh {arguments}", VIRTUAL_ENV=str(env), **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refused(machine: Machine, **settings: str) -> str:
    """What train_qwenvl.sh says before it ends without having set up or started anything."""
    done = machine.run("bash scripts/train_qwenvl.sh", **settings)
    assert done.returncode == 1 and machine.asked.read_text() == ""
    return done.stderr


def test_front_door_leaves_what_is_not_set_to_the_program(machine: Machine) -> None:
    assert front_door(machine, "") == ["vlm-dft", "train"]


def test_front_door_passes_variables_and_words_on(machine: Machine) -> None:
    words = front_door(
        machine, "my.yaml --set seed=3 'two words'",
        MODEL="a b", RECIPE="tabmwp", DATA="d", OBJECTIVE="dft,nll", BENCHMARK="tabmwp", OUTPUT="o", LORA="16",
        EXTRA="--epochs 2 --save_steps 5",
    )  # fmt: skip
    assert words == [
        *"vlm-dft train my.yaml --set seed=3".split(),
        "two words",
        *["--model", "a b"],
        *"--recipe tabmwp --data d --objective dft,nll --benchmark tabmwp --output o --lora 16".split(),
        *"--epochs 2 --save_steps 5".split(),
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"NPROC": "1"}, "vlm-dft train --processes 1"),
        ({"NPROC": "2"}, "vlm-dft-launch --standalone --nproc_per_node 2 -m vlm_dft.cli train --processes 2"),
        (
            {"ENGINE": "zero3"},
            "vlm-dft-launch --standalone --nproc_per_node 1 -m vlm_dft.cli train --engine zero3",
        ),
        (
            {"ENGINE": "zero3_offload", "NPROC": "8"},
            "vlm-dft-launch --standalone --nproc_per_node 8 -m vlm_dft.cli train --engine zero3_offload --processes 8",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "NPROC": "8", "ENGINE": "fsdp2"},
            "vlm-dft-launch --nnodes 2 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500 --nproc_per_node 8 -m vlm_dft.cli "
            "train --engine fsdp2 --processes 16",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29733"},
            "vlm-dft-launch --nnodes 2 --node_rank 0 --master_addr 127.0.0.1 --master_port 29733 --nproc_per_node 1 -m vlm_dft.cli "
            "train --processes 2",
        ),
    ],
)
def test_front_door_launches_several_processes(machine: Machine, settings: dict[str, str], expected: str) -> None:
    assert front_door(machine, "", **settings) == expected.split()


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        ("--engine zero3 --nproc 2 --epochs 3", {}),
        ("--engine=zero3 --epochs 3", {"NPROC": "2"}),
        ("--epochs 3 --processes=2", {"ENGINE": "zero3"}),
        ("--epochs 3", {"EXTRA": "--nproc 2 --engine zero3"}),
    ],
)
def test_front_door_reads_what_chooses_the_launcher_from_the_words_too(
    machine: Machine, words: str, settings: dict[str, str]
) -> None:
    expected = (
        "vlm-dft-launch --standalone --nproc_per_node 2 -m vlm_dft.cli train --epochs 3 --engine zero3 --processes 2"
    )
    assert front_door(machine, words, **settings) == expected.split()


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        ("--nproc 4", {"NPROC": "2"}, "NPROC=2, but --nproc 4. Leave out one of them."),
        ("--nproc 4", {"NNODES": "2"}, "On several nodes NPROC= says the processes of each. Leave out --nproc 4."),
        ("--engine", {}, "--engine needs a value."),
    ],
)
def test_front_door_refuses_words_that_contradict_the_variables(
    machine: Machine, words: str, settings: dict[str, str], said: str
) -> None:
    done = machine.run(f"bash scripts/train_qwenvl.sh {words}", **settings)
    assert done.returncode == 1 and said in done.stderr


def test_front_door_shows_its_command_so_that_a_shell_takes_it(machine: Machine) -> None:
    front_door(machine, "", DATA="my pictures", OBJECTIVE="floor(minimum=0.1)")  # makes env
    done = machine.run(
        "bash scripts/train_qwenvl.sh", DATA="my pictures", OBJECTIVE="floor(minimum=0.1)",
        VIRTUAL_ENV=str(machine.repo.parent / "env"),
    )  # fmt: skip
    line = next(line for line in done.stderr.splitlines() if line.startswith("+ "))
    assert shlex.split(line) == ["+", "vlm-dft", "train", "--data", "my pictures", "--objective", "floor(minimum=0.1)"]


def test_front_door_starts_the_nodes_of_a_hostfile(machine: Machine) -> None:
    (machine.repo / "hosts").write_text("# two nodes\nworker-0 slots=8\n\nworker-1 slots=4\n")
    words = front_door(machine, "", HOSTFILE="hosts", ENGINE="fsdp2", MASTER_ADDR="10.0.0.1", HF_TOKEN="secret")
    assert (
        words
        == (
            "deepspeed --master_addr 10.0.0.1 --hostfile hosts --master_port 29500 --no_local_rank --module vlm_dft.cli "
            "train --engine fsdp2 --processes 12"
        ).split()
    )


def test_deepspeed_s_launcher_is_given_the_variables_that_ssh_does_not_carry(machine: Machine) -> None:
    (machine.repo / "hosts").write_text("worker-0 slots=2\n")
    env = machine.repo.parent / "env"
    front_door(machine, "", HOSTFILE="hosts")  # makes env
    shown = machine.repo.parent / "shown"
    write_program(
        env / "bin/deepspeed",
        f'#!{shutil.which("bash")}\necho "$DS_ENV_FILE" >{shown}; grep . "$DS_ENV_FILE" >>{shown}; exit 3\n',
    )
    done = machine.run(
        "bash scripts/train_qwenvl.sh", VIRTUAL_ENV=str(env), HOSTFILE="hosts", HF_HUB_OFFLINE="1", SECRET="x"
    )
    file, *lines = shown.read_text().splitlines()
    assert done.returncode == 3 and sorted(lines) == ["HF_HUB_OFFLINE=1", "TOKENIZERS_PARALLELISM=false"]
    assert not Path(file).exists()


def test_deepspeed_s_launcher_takes_the_words(tmp_path: Path) -> None:
    runner = pytest.importorskip("deepspeed.launcher.runner")
    words = "--master_addr a --hostfile h --master_port 29500 --no_local_rank --module vlm_dft.cli train --engine zero3".split()
    parsed = runner.parse_args(words)
    assert parsed.module and parsed.no_local_rank and parsed.user_script == "vlm_dft.cli"
    assert parsed.user_args == ["train", "--engine", "zero3"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"NNODES": "2"}, "NNODES=2 needs NODE_RANK (0 to 1, another on each node) and MASTER_ADDR (of node 0)."),
        ({"NNODES": "2", "NODE_RANK": "0"}, "needs NODE_RANK (0 to 1, another on each node) and MASTER_ADDR"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2, expected 0 to 1: NNODES=2."),
        ({"NODE_RANK": "1"}, "NODE_RANK=1 without NNODES."),
        ({"NPROC": "all"}, "Expected whole numbers. Found NNODES=1 NPROC=all"),
        ({"NPROC": "0"}, "Expected whole numbers. Found NNODES=1 NPROC=0"),
        ({"HOSTFILE": "nowhere"}, "No file at HOSTFILE=nowhere."),
        ({"HOSTFILE": "bad"}, "Expected lines of `name slots=8` in HOSTFILE=bad"),
        ({"HOSTFILE": "good", "NNODES": "2"}, "HOSTFILE names the nodes: leave out NNODES"),
        ({"HOSTFILE": "good", "NPROC": "4"}, "HOSTFILE has 8 slots, NPROC says 4. Leave out NPROC."),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_variables_of_several_nodes_that_do_not_fit_are_refused(
    machine: Machine, settings: dict[str, str], said: str
) -> None:
    (machine.repo / "good").write_text("worker-0 slots=8\n")
    (machine.repo / "bad").write_text("worker-0 slots=8\nworker-1 8\n")
    assert said in refused(machine, **settings)


@pytest.mark.parametrize(
    ("settings", "extras"),
    [
        ({}, ""),
        ({"NPROC": "8"}, ""),
        ({"ENGINE": "fsdp2", "NPROC": "8"}, ""),
        ({"ENGINE": "fsdp.json"}, ""),
        ({"ENGINE": "zero3_offload"}, "[deepspeed]"),
        ({"ENGINE": "zero.json"}, "[deepspeed]"),
        ({"HOSTFILE": "hosts", "ENGINE": "fsdp2"}, "[deepspeed]"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_deepspeed_is_installed_for_what_needs_it(machine: Machine, settings: dict[str, str], extras: str) -> None:
    (machine.repo / "hosts").write_text("worker-0 slots=2\n")
    (machine.repo / "fsdp.json").write_text('{"fsdp": true, "fsdp_config": {}}')
    (machine.repo / "zero.json").write_text('{"zero_optimization": {"stage": 1}}')
    machine.run("bash scripts/train_qwenvl.sh", **settings)
    assert [call.split()[-1] for call in machine.pip_calls()] == [f"{machine.repo}{extras}"]


def test_torchrun_takes_none_of_our_words_for_its_own(machine: Machine) -> None:
    from torch.distributed.run import get_args_parser

    words = front_door(machine, "--max_steps 3", NPROC="2", ENGINE="zero2", OUTPUT="o", LORA="8", DATA="d")
    parsed = get_args_parser().parse_args(words[1:])
    assert parsed.training_script_args == words[words.index("train") :]


def test_dry_run_launches_no_processes(machine: Machine) -> None:
    words = front_door(machine, "--dry-run", NPROC="8", ENGINE="zero2")
    assert words == "vlm-dft train --dry-run --engine zero2 --processes 8".split()


def dry_run(words: str) -> str:
    """What the program itself prints, without a hub."""
    done = subprocess.run(
        [sys.executable, "-m", "vlm_dft.cli", "train", "--dry-run", *words.split()],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dry_run_of_the_paper_s_setting_prints_the_resolved_run() -> None:
    printed = dry_run("--model Qwen/Qwen2.5-VL-3B-Instruct --recipe wethink --engine zero2 --processes 8")
    assert re.search(r"learning_rate: 5(\.0)?e-05", printed)
    assert re.search(r"epochs\W+1", printed)
    for expected in ("Qwen/Qwen2.5-VL-3B-Instruct", "wethink", "zero2"):
        assert expected in printed


def test_dry_run_takes_settings_as_further_words() -> None:
    assert re.search(r"epochs\W+2", dry_run("--epochs 2"))


# What is installed ------------------------------------------------------------------------------------------------


def load_installed():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("installed", ROOT / "scripts/installed.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_requirement_is_met_missing_outdated_or_for_another_platform() -> None:
    lacks = load_installed().lacks_requirement
    assert lacks("pytest>=1") is None
    assert lacks("no-such-distribution>=1") == "no-such-distribution"
    assert lacks("pytest>=999").endswith("expected >=999)")
    assert lacks("no-such-distribution; sys_platform == 'none'") is None


@pytest.mark.parametrize(
    ("direct_url", "complaint"),
    [
        ('{{"url": "file://{root}", "dir_info": {{"editable": true}}}}', None),
        ('{{"url": "file:///elsewhere"}}', "vlm-dft (found one from /elsewhere, expected {root})"),
        (None, "vlm-dft (found one from an index, expected {root})"),
    ],
)
def test_an_installation_of_another_checkout_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct_url: str | None, complaint: str | None
) -> None:
    info = tmp_path / "vlm_dft-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: vlm-dft\nVersion: 0.1.0\n")
    if direct_url:
        (info / "direct_url.json").write_text(direct_url.format(root=ROOT))
    monkeypatch.syspath_prepend(tmp_path)
    expected = complaint.format(root=ROOT) if complaint else None
    assert load_installed().lacks_package(ROOT) == expected
