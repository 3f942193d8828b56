"""Settings: later layers win, and what is unknown, mistyped or contradictory is refused before anything is loaded."""

from pathlib import Path

import pytest

from vlm_dft.config import TrainConfig, read_config_file, resolve_config, training_arguments
from vlm_dft.errors import ConfigError


def resolve(**settings: object) -> TrainConfig:
    return resolve_config(("command line", settings))


def test_the_defaults_are_the_papers_where_it_states_them() -> None:
    config = TrainConfig()
    assert (config.learning_rate, config.epochs, config.objective) == (5e-5, 1.0, ["dft"])


def test_later_layers_win_and_words_become_numbers() -> None:
    config = resolve_config(
        ("recipe", {"epochs": 3, "learning_rate": 1e-3}),
        ("file", {"learning_rate": "2e-4"}),
        ("command line", {"lora": "8"}),
    )
    assert (config.epochs, config.learning_rate, config.lora) == (3.0, 2e-4, 8)


def test_objectives_may_be_several_words() -> None:
    assert resolve(objective="dft,nll").objective == ["dft", "nll"]


def test_anything_else_that_the_trainer_knows_is_passed_through_in_its_type() -> None:
    config = resolve(logging_steps="5", lr_scheduler_type="linear", adam_beta1="0.8", trainer={"max_steps": "7"})
    assert config.trainer == {"logging_steps": 5, "lr_scheduler_type": "linear", "adam_beta1": 0.8, "max_steps": 7}
    assert config.steps(1000) == 7


def test_trainer_fields_are_those_of_the_installed_transformers() -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    assert set(training_arguments()) == {f.name for f in fields(TrainingArguments)}


def test_steps_are_whole_batches_of_every_epoch() -> None:
    config = resolve(batch_size=8, micro_batch=2, epochs=1.5)
    assert (config.accumulation, config.steps(17)) == (4, 5)  # ceil(1.5 x ceil(17 / 8))


def test_a_recipes_micro_batch_shrinks_to_fit_the_processes_and_ones_own_does_not() -> None:
    recipe = ("recipe 'drawn'", {"batch_size": 16, "micro_batch": 16})
    config = resolve_config(recipe, ("command line", {"processes": 8}))
    assert (config.micro_batch, config.accumulation) == (2, 1)
    with pytest.raises(ConfigError, match="16 is not a multiple"):
        resolve_config(recipe, ("command line", {"processes": 8, "micro_batch": 16}))


def test_lora_does_not_train_the_parts_of_a_recipe_but_those_that_are_asked_for() -> None:
    recipe = ("recipe 'drawn'", {"train_parts": ["vision", "language"]})
    assert resolve_config(recipe, ("command line", {"lora": 8})).train_parts == []
    assert resolve_config(recipe, ("command line", {"lora": 8, "train_parts": "merger"})).train_parts == ["merger"]
    assert resolve_config(recipe, ("file", {"lora": 8, "parts": {"train_parts": ["merger"]}})).train_parts == ["merger"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), "inf", "nan", "-inf"])
@pytest.mark.parametrize(
    "name",
    ["batch_size", "limit", "seed", "lora", "max_pixels", "eval_limit", "max_steps", "save_steps", "save_total_limit"],
)
def test_what_is_no_finite_number_is_refused_where_a_whole_one_is_asked(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        resolve(**{name: value})


def test_words_of_the_command_line_may_be_yaml_s_lists_and_mappings() -> None:
    config = resolve(lora=4, lora_targets=r"[q_proj, layers\.0\.up_proj]", template_options='{"a": 1, "b": no}')
    assert config.parts["lora_targets"] == ["q_proj", r"layers\.0\.up_proj"]
    assert config.collator["template_options"] == {"a": 1, "b": False}
    assert resolve(lora=4, lora_targets="[qk]_proj").parts["lora_targets"] == ["[qk]_proj"]  # not YAML: an expression


@pytest.mark.parametrize("null", [None, "null"])
def test_null_is_not_set_whatever_a_recipe_says(null: str | None) -> None:
    recipe = ("recipe 'x'", {"lora_parts": "vision", "recompute": "none", "train_parts": "merger"})
    config = resolve_config(recipe, ("file", {"lora": 8, "lora_parts": null, "recompute": null, "train_parts": null}))
    assert (config.lora_parts, config.parts, config.train_parts) == (["language"], {}, [])
    assert resolve(train_parts=null).train_parts == ["language", "head"] and resolve().lora_parts == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, r"unknown setting 'learning_rat'. Did you mean 'learning_rate'\?"),
        ({"objective": "dfft"}, r"Unknown objective 'dfft'. Did you mean 'dft'\? Choose one of chord, deft, dft"),
        ({"objective": "floor(minimum=3)"}, "minimum must be a number from 0 to 1, found '3'"),
        ({"objective": "floor(minimum=0.2),floor( minimum=.20 )"}, "expected one or several different names"),
        (
            {"source_objectives": "ocr=floor(minimum=0.2)"},
            r"gives 'ocr' the unknown objective 'floor\(minimum=0.2\)'.*without par",
        ),
        ({"objective": "dft,dft"}, "expected one or several different names"),
        (
            {"kl": 0.1},
            "kl and kl_direction belong together, found kl = 0.1 and kl_direction = None. Directions: forward = KL",
        ),
        ({"kl_direction": "forward"}, "kl and kl_direction belong together"),
        ({"kl": 0.1, "kl_direction": "up"}, "kl_direction must be one of forward = KL.* found 'up'"),
        ({"kl": -1, "kl_direction": "forward"}, "kl must be a number, 0 or more, found -1"),
        ({"kl": 0.1, "kl_direction": "forward", "engine": "zero3"}, "kl without LoRA keeps a whole copy"),
        ({"full_weight": "end,stop"}, "full_weight takes kinds of tokens, found 'stop'"),
        ({"source_objectives": "ocr=nlll"}, "gives 'ocr' the unknown objective 'nlll'. Did you mean 'nll'"),
        ({"source_objectives": "ocr"}, "source_objectives must be source=objective"),
        ({"loss": {"klx": 1}}, "unknown setting 'klx' of loss. Did you mean 'kl'"),
        ({"max_pixels": "-4"}, "max_pixels must be a whole number above 0 or null, found '-4'"),
        ({"objective": ""}, "expected one or several"),
        (
            {"batch_size": 10, "micro_batch": 4},
            "batch_size = 10 is not a multiple of micro_batch x processes = 4 x 1 = 4. Nearest: 8",
        ),
        ({"epochs": "many"}, "epochs must be of type float, found 'many'"),
        ({"batch_size": "2.5"}, "batch_size must be of type int"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"epochs": "nan"}, "epochs must be positive and finite"),
        ({"max_steps": "many"}, "max_steps must be a whole number"),
        ({"gradient_checkpointing": "false"}, "gradient_checkpointing is set by recompute"),
        ({"activation_checkpointing": True}, "activation_checkpointing is set by recompute"),
        ({"per_device_train_batch_size": 4}, "is set by batch_size and micro_batch"),
        ({"label_smoothing_factor": 0.1}, "smoothed labels are not DFT"),
        ({"train_parts": "vision,tongue"}, "train_parts: expected some of vision, merger, language, head"),
        ({"precision": "fp8"}, "precision: expected one of auto"),
        ({"model": None}, "model must not be empty"),
        ({"template_options": "a=1"}, "template_options must be a mapping, say '{name: value}', found 'a=1'"),
        ({"template_options": [1]}, "template_options must be a mapping"),
    ],
)
def test_a_wrong_setting_says_what_was_expected(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**settings)


def test_the_policies_of_the_configuration_are_those_of_the_collator() -> None:
    from vlm_dft.fitting import POLICIES
    from vlm_dft.settings import TOO_LONG

    assert tuple(POLICIES) == TOO_LONG


def test_what_is_added_to_the_objective_is_read_from_words_and_from_a_file() -> None:
    words = {
        "objective": "mix(share=0.2),dft", "kl": "0.03", "kl_direction": "reverse", "full_weight": "end, format",
        "source_objectives": "ocr=nll,math=dft", "format_strings": "<a>,</a>", "max_pixels": "3136",
    }  # fmt: skip
    file = {"objective": ["mix(share=0.2)", "dft"], "loss": {"kl": 0.03, "kl_direction": "reverse", "full_weight": ["end", "format"]},
            "collator": {"source_objectives": {"ocr": "nll", "math": "dft"}, "format_strings": ["<a>", "</a>"], "max_pixels": 3136}}  # fmt: skip
    one, two = resolve_config(("words", words)), resolve_config(("file", file))
    assert one == two
    assert one.loss == {"kl": 0.03, "kl_direction": "reverse", "full_weight": ["end", "format"]}
    assert one.objective == ["mix(share=0.2)", "dft"] and one.max_pixels == 3136 and one.min_pixels is None
    assert resolve_config(("saved", one.as_dict())) == one  # as config.yaml gives it back


def test_what_a_card_adds_can_be_switched_off() -> None:
    card = {"kl": 0.1, "kl_direction": "forward", "full_weight": "end", "source_objectives": {"a": "nll"}}
    off = {"kl": "0", "full_weight": "none", "source_objectives": "none"}
    config = resolve_config(("recipe 'x'", card), ("command line", off))
    assert config.loss == {"full_weight": []} and config.collator == {"source_objectives": {}}


def test_what_is_said_of_rows_is_a_group_with_flat_names() -> None:
    config = resolve(limit="100", bad_rows="drop", workers="3")
    assert config.rows == {"limit": 100, "bad_rows": "drop", "workers": 3} and config.limit == 100
    assert resolve(rows={"limit": 5}).limit == 5 and resolve().limit is None
    with pytest.raises(ConfigError, match="unknown setting 'bad_row' of rows. Did you mean 'bad_rows'?"):
        resolve(rows={"bad_row": "drop"})
    for value in (0, -1, "many"):
        with pytest.raises(ConfigError, match="limit must be a whole number above 0"):
            resolve(limit=value)


def test_a_recipe_card_in_place_of_settings_is_met_with_the_flag(tmp_path: Path) -> None:
    card = tmp_path / "own.yaml"
    for what in ("source: {files: [rows.csv]}", "mixture: [{recipe: drawn}]"):
        card.write_text(f"description: x\nlicence: y\n{what}\n")
        with pytest.raises(ConfigError, match="is a recipe card, .* Train on it with --recipe"):
            read_config_file(str(card))
