"""The command line: mistakes are answered at once and in words, the dry run prints the paper's setting, help is quick."""

import subprocess
import sys
from pathlib import Path

import pytest

from vlm_dft.cli import main


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error that a command ends with; nothing of torch may have been needed for it."""
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_a_flag_that_there_is_not_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "drawn", "--model", "tiny", "--output", "x", "--limt", "3"])
    assert "unrecognized arguments: --limt 3. Did you mean '--limit'?" in capsys.readouterr().err


def test_the_folder_of_a_run_names_its_checkpoints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for step in (6, 64, 8):
        (tmp_path / f"dft/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"dft/checkpoint-{step}/config.json").touch()
    for folder in (tmp_path, tmp_path / "dft"):  # of several objectives, and of one
        error = fails(capsys, "evaluate", "drawn", "--model", str(folder), "--output", str(tmp_path / "out"))
        assert f"Give the folder of a checkpoint, such as {tmp_path / 'dft' / 'checkpoint-64'}." in error


PAPER = [
    "train",
    "--model",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "--recipe",
    "wethink",
    "--engine",
    "zero2",
    "--nproc",
    "8",
]


def test_the_dry_run_prints_the_papers_setting_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*PAPER, "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "model: Qwen/Qwen2.5-VL-3B-Instruct",
        "recipe: wethink",
        "epochs: 1.0",
        "learning_rate: 5.0e-05",
        "engine: zero2",
    ):
        assert line in out
    assert "8 processes x 1 examples x 16 accumulated = 128" in out
    assert '"stage": 2' in out and "no model was loaded, nothing was downloaded" in out
    assert not list(tmp_path.iterdir())


def test_the_dry_run_imports_neither_torch_nor_transformers() -> None:
    code = f"import sys; from vlm_dft.cli import main; main({[*PAPER, '--dry-run']!r}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "datasets", "deepspeed"} & {m.split(".")[0] for m in done.stderr.split()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "dfft"], "Unknown objective 'dfft'. Did you mean 'dft'?"),
        (["--recipe", "drawn_niosy"], "Unknown recipe 'drawn_niosy'. Did you mean 'drawn_noisy'?"),
        (["--benchmark", "tabmpw"], "Unknown benchmark 'tabmpw'. Did you mean 'tabmwp'?"),
        (["--learning_rte", "1"], "unknown setting 'learning_rte'. Did you mean 'learning_rate'?"),
        (["--engine", "zero9"], "No engine 'zero9'. Did you mean"),
        (["--recipe", "tabmwp"], "Say where they are: --data DIR"),
        (["--recipe", "tabmwp", "--data", "nowhere"], "no data folder at 'nowhere'"),
        (["--model", "nowhere"], "No model at 'nowhere'"),
        (["--model", "./nowhere/model"], "No model at './nowhere/model'"),
        (["--nproc", "2"], "nproc is 2, but 1 processes run"),
        (["absent.yaml"], "No configuration file at 'absent.yaml'"),
    ],
)
def test_a_mistake_is_answered_in_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "train", *words)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_not_a_model_says_what_it_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "expected config.json (or adapter_config.json) in it, found notes.txt" in fails(
        capsys, "train", "--model", str(tmp_path)
    )


def test_an_output_folder_of_something_else_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "not empty and not a run folder" in fails(capsys, "train", "--output", str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_folder_of_another_run_names_what_differs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from vlm_dft.config import resolve_config
    from vlm_dft.preflight import check_run
    from vlm_dft.runs import write_provenance

    plan = check_run(resolve_config(("test", {"output": str(tmp_path / "run")})))
    write_provenance(plan.output, plan.config)
    (plan.output / "checkpoint-3").mkdir()  # something to lose
    message = fails(capsys, "train", "--output", str(tmp_path / "run"), "--objective", "nll", "--seed", "7")
    assert "objective: ['dft'] there, ['nll'] now" in message and "seed: 0 there, 7 now" in message


def test_a_place_that_cannot_be_written_to_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Cannot write to OUTPUT" in fails(capsys, "train", "--output", str(tmp_path / "file" / "run"))


def test_settings_come_as_words_with_or_without_an_equals_sign(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text("batch_size: 16\nepochs: 3\n")
    words = [
        "--micro_batch=4",
        "--epochs",
        "2",
        "--logging-steps",
        "5",
        "--bf16-full-eval",
        "--output",
        "x",
        "--dry-run",
    ]
    assert main(["train", str(tmp_path / "my.yaml"), *words]) == 0
    out = capsys.readouterr().out
    for line in ("batch_size: 16", "micro_batch: 4", "epochs: 2.0", "logging_steps: 5", "bf16_full_eval: true"):
        assert line in out


def test_processes_and_the_dry_run_may_be_called_as_on_the_command_line_or_as_settings_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "my.yaml").write_text("nproc: 2\nbatch_size: 16\n")
    assert main(["train", str(tmp_path / "my.yaml"), "--recipe", "wethink", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "processes: 2\n" in out and "dry run: no model was loaded" in out and "--dry_run" not in out


def test_cards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0 and main(["benchmarks"]) == 0
    out = capsys.readouterr().out
    assert "tabmwp" in out and "wethink" in out and "drawn" in out


def test_a_missing_benchmark_folder_for_evaluate_is_said_before_loading(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data DIR" in fails(capsys, "evaluate", "tabmwp", "--model", "tiny", "--output", "x")
