"""What is prepared depends on the content of every file that its rows are in, however the card names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from vlm_dft.errors import ConfigError
from vlm_dft.preparing import prepare
from vlm_dft.recipes import read_recipe


def rows_of(answers: str) -> str:
    rows = [
        [{"role": "user", "content": f"{k}?"}, {"role": "assistant", "content": answer}]
        for k, answer in enumerate(answers)
    ]
    return "".join(json.dumps({"id": str(k), "messages": row}) + "\n" for k, row in enumerate(rows))


def test_a_pattern_of_files_is_prepared_and_each_of_them_decides_what_it_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(rows_of("ab"))
    card = {"description": "d", "licence": "mine", "source": {"files": ["*.jsonl"]}, "messages": None}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    read = read_recipe(str(tmp_path / "card.yaml"))
    assert prepare(read, str(tmp_path), tmp_path / "out")["rows"] == 4
    (tmp_path / "two.jsonl").write_text(rows_of("ac"))
    with pytest.raises(ConfigError, match="source.content"):
        prepare(read, str(tmp_path), tmp_path / "out")


def test_a_folder_that_datasets_wrote_is_prepared(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"question": "1?", "answer": "a"}, {"question": "2?", "answer": "b"}]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    card = {"description": "d", "licence": "mine", "source": {"files": ["saved"]}, "prompt": "{question}"}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({**card, "response": "{answer}"}))
    assert prepare(read_recipe(str(tmp_path / "card.yaml")), str(tmp_path), tmp_path / "out")["rows"] == 2
