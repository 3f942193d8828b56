"""Other people's loops: a SmolVLM, which is no Qwen, trained with our collator and loss in PyTorch, in Trainer and in TRL."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import build_processor
from torch.utils.data import DataLoader

from vlm_dft import ChatCollator, dft_loss
from vlm_dft.errors import ImageError, RowError

torch.set_num_threads(1)
README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
HUB = "HuggingFaceTB/SmolVLM-256M-Instruct"

PLAIN_LOOP = """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlm_dft import ChatCollator, dft_loss

name = "HuggingFaceTB/SmolVLM-256M-Instruct"
model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)
loader = torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=ChatCollator(AutoProcessor.from_pretrained(name)))
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
for batch in loader:
    labels = batch.pop("labels")
    loss = dft_loss(model(**batch), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""

HF_TRAINER = next(c for c in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "Trainer(" in c)
TRL = '''
from datasets import Dataset
from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer
from vlm_dft import ChatCollator, dft_loss

name = "HuggingFaceTB/SmolVLM-256M-Instruct"
processor = AutoProcessor.from_pretrained(name)
arguments = SFTConfig("runs/smolvlm", bf16=False, remove_unused_columns=False,  # bf16=True on a GPU that has it
                      dataset_kwargs={"skip_prepare_dataset": True})
trainer = SFTTrainer(name, arguments, train_dataset=Dataset.from_list(rows), processing_class=processor,
                     data_collator=ChatCollator(processor), compute_loss_func=dft_loss)
trainer.train()
'''  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SmolVLM of 60,000 parameters with its processor, saved as the hub would hold it, and a picture.

    Its weights are random but for a few steps of plain cross-entropy on the rows: where every p is 1 / vocabulary, DFT
    gives no token any weight, and its loss -p log p first rises (up to p = 1 / e).
    """
    pytest.importorskip("num2words")
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    processor = build_processor("smolvlm")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = processor.tokenizer
    config = SmolVLMConfig(
        image_token_id=ids.convert_tokens_to_ids("<image>"), pad_token_id=ids.pad_token_id, scale_factor=2,
        vision_config={**small, "image_size": 56, "patch_size": 14},
        text_config={**small, "model_type": "llama", "vocab_size": len(ids), "num_key_value_heads": 2,
                     "pad_token_id": ids.pad_token_id, "eos_token_id": ids.eos_token_id},
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("smolvlm")
    noise = np.random.default_rng(0).integers(0, 256, (56, 112, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path / "chart.png")
    model = SmolVLMForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        model(**ChatCollator(processor)(rows_of(path))).loss.backward()  # transformers' own loss, of our labels
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """A row with a picture and a long answer, and one of text alone with a short one."""
    asked, said = "<image>How tall is the red bar?", "red 6, black 3. Answer: 6"
    return [
        {
            "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}],
            "images": [str(folder / "chart.png")],
        },
        {
            "messages": [{"role": "user", "content": "Say no."}, {"role": "assistant", "content": "No."}],
            "images": [],
        },
    ]


def load(folder: Path) -> tuple[Any, ChatCollator]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, ChatCollator(AutoProcessor.from_pretrained(folder))


def nll(model: Any, collate: ChatCollator, rows: list[dict[str, Any]]) -> float:
    """Plain cross-entropy of the targets, by PyTorch."""
    batch = collate(rows)
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        return float(torch.nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels.flatten()))


def arguments(path: Path, **words: Any) -> Any:
    from transformers import TrainingArguments

    words = {"per_device_train_batch_size": 2, "learning_rate": 3e-3, "lr_scheduler_type": "constant"} | words
    return TrainingArguments(
        str(path), remove_unused_columns=False, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1,
        **words,
    )  # fmt: skip


# A plain loop


def test_in_a_plain_loop_the_loss_of_two_rows_goes_down(folder: Path) -> None:
    model, collate = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows, losses = rows_of(folder), []
    before = nll(model, collate, rows)
    for _ in range(30):
        for batch in DataLoader(rows, batch_size=2, collate_fn=collate):
            labels = batch.pop("labels")
            loss = dft_loss(model(**batch), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert nll(model, collate, rows) < before / 2


def test_the_vision_tower_is_trained_through_the_pictures(folder: Path) -> None:
    """So the pixels reach the model: a row of text alone gives its tower no gradient."""
    for row, some in zip(rows_of(folder), (True, False), strict=True):
        model, collate = load(folder)
        batch = collate([row])
        dft_loss(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]).backward()
        grad = model.model.vision_model.embeddings.patch_embedding.weight.grad
        assert (grad is not None and bool(grad.abs().sum() > 0)) is some


def test_what_it_learned_is_what_it_answers(folder: Path) -> None:
    model, collate = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = rows_of(folder)
    for _ in range(60):
        batch = collate(rows)
        labels = batch.pop("labels")
        dft_loss(model(**batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = collate.prompts([{**row, "messages": row["messages"][:1]} for row in rows])
    ends = collate.tokenizer.eos_token_id
    said = model.eval().generate(**asked, max_new_tokens=40, do_sample=False, eos_token_id=ends)
    texts = collate.tokenizer.batch_decode(said[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [text.strip() for text in texts] == ["red 6, black 3. Answer: 6", "No."]


# transformers.Trainer


def test_the_trainer_of_transformers_takes_collator_and_loss_as_they_are(folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    model, collate = load(folder)
    rows = rows_of(folder)
    trainer = Trainer(
        model, arguments(tmp_path, max_steps=30), data_collator=collate, train_dataset=rows, compute_loss_func=dft_loss
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = collate(rows)
    fresh, _ = load(folder)
    first = dft_loss(fresh(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])
    assert losses[0] == pytest.approx(first.item(), rel=1e-3)
    assert losses[-1] < losses[0] / 2 and nll(model, collate, rows) < nll(fresh, collate, rows) / 2


def test_two_accumulated_rows_of_unequal_answers_are_the_step_of_both_at_once(folder: Path, tmp_path: Path) -> None:
    """Trainer counts the targets of the whole step for a compute_loss_func, and dft_loss divides by them."""
    from transformers import Trainer

    weights = []
    for micro, accumulated in ((2, 1), (1, 2)):
        model, collate = load(folder)
        args = arguments(
            tmp_path / str(micro), max_steps=1, per_device_train_batch_size=micro, optim="sgd", learning_rate=1.0,
            gradient_accumulation_steps=accumulated, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=collate, train_dataset=rows_of(folder), compute_loss_func=dft_loss)
        trainer.train()
        weights.append(model.lm_head.weight.detach().clone())
    before, _ = load(folder)
    moved = (weights[0] - before.lm_head.weight).abs().max()
    assert moved > 1e-3 and (weights[0] - weights[1]).abs().max() < 1e-3 * moved


def test_evaluating_in_the_trainer_gives_the_loss_of_the_rows(folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    model, collate = load(folder)
    rows = rows_of(folder)
    trainer = Trainer(model, arguments(tmp_path), data_collator=collate, eval_dataset=rows, compute_loss_func=dft_loss)
    batch = collate(rows)
    labels = batch.pop("labels")
    expected = dft_loss(model(**batch), labels).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_columns_that_a_trainer_removed_are_missed_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    """Trainer's default, the commonest mistake with a collator of one's own."""
    from transformers import Trainer

    model, collate = load(folder)
    args = arguments(tmp_path, max_steps=1)
    args.remove_unused_columns = True
    trainer = Trainer(model, args, data_collator=collate, train_dataset=rows_of(folder), compute_loss_func=dft_loss)
    with pytest.raises(RowError, match="expected a key 'messages'.*remove_unused_columns=False"):
        trainer.train()


def test_a_broken_picture_in_a_trainers_worker_is_reported_with_its_row(folder: Path, tmp_path: Path) -> None:
    from transformers import Trainer

    model, collate = load(folder)
    (tmp_path / "cut.png").write_bytes((folder / "chart.png").read_bytes()[:5000])
    row = {**rows_of(folder)[0], "id": "row-17", "images": [str(tmp_path / "cut.png")]}
    args = arguments(tmp_path, max_steps=1, dataloader_num_workers=1)
    trainer = Trainer(model, args, data_collator=collate, train_dataset=[row, row], compute_loss_func=dft_loss)
    with pytest.raises(ImageError, match="row-17, image 0: .*cut.png' is not a readable image: damaged or cut short"):
        trainer.train()


# TRL


@pytest.mark.parametrize("pictures", [True, False])
def test_the_sft_trainer_of_trl_takes_collator_and_loss(folder: Path, tmp_path: Path, pictures: bool) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model, collate = load(folder)
    rows = rows_of(folder)
    rows = rows if pictures else [{"messages": row["messages"]} for row in rows[1:]] * 2
    args = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=2, max_steps=30, learning_rate=3e-3, lr_scheduler_type="constant",
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", logging_steps=1, remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), data_collator=collate, processing_class=collate.processor,
        compute_loss_func=dft_loss,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = collate(rows)
    fresh, _ = load(folder)
    first = dft_loss(fresh(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])
    assert losses[0] == pytest.approx(first.item(), rel=1e-3)
    assert losses[-1] < losses[0] / 2 and nll(model, collate, rows) < nll(fresh, collate, rows) / 2


# The README


@pytest.mark.parametrize("code", [PLAIN_LOOP, HF_TRAINER, TRL], ids=["plain", "trainer", "trl"])
def test_the_snippets_run_as_printed(folder: Path, tmp_path: Path, monkeypatch: Any, code: str) -> None:
    """With a local folder in place of the hub's id."""
    if code is TRL:
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    assert code.count(HUB) == 1
    names: dict[str, Any] = {"rows": rows_of(folder)}
    exec(compile(code.replace(HUB, str(folder)), "README.md", "exec"), names)
    model = names["trainer"].model if "trainer" in names else names["model"]
    fresh, _ = load(folder)
    assert not torch.equal(model.lm_head.weight, fresh.lm_head.weight)
