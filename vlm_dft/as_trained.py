"""As trained: a model's folder in; how its training run asked it (pixels, system prompt, chat template) out, so that it is asked so again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm_dft.chat import Sample
from vlm_dft.checkpoints import MANIFEST
from vlm_dft.errors import ConfigError, UserError

ABOVE = 3  # folders, a checkpoint's own and those above it, in which the run's config.yaml is looked for


@dataclass(frozen=True, slots=True)
class Asking:
    """How a model is asked. None and {}: as its processor and chat template do by themselves."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    resize: str = "processor"
    template_options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    run: Path | None = None
    moved: Path | None = None
    "A checkpoint of a run whose folder is not about it, so that how it was asked is not known."

    def said(self) -> str:
        """What differs from the model's own ways, in a line, or that it is not known; empty where nothing does."""
        if self.moved:
            return (
                f"{self.moved} was moved out of its run: asked with its processor's own pixels and no system prompt, unless --as-trained "
                "says which run it is of."
            )
        own = Asking()
        differs = {name: getattr(self, name) for name in PIXELS if getattr(self, name) != getattr(own, name)}
        words = [f"{name} = {value}" for name, value in differs.items()]
        words += [f"system prompt {self.system[:60]!r}"] if self.system else []
        return f"asked as in training ({self.run}): {', '.join(words)}" if words and self.run else ", ".join(words)


PIXELS = ("min_pixels", "max_pixels", "resize", "template_options")


def asking_of(model: str, *, min_pixels: int | None = None, max_pixels: int | None = None) -> Asking:
    """How the run that trained this model asked it; of a model of no run, what is given. Raises ConfigError where the two differ.

    A model that was trained on pictures of one size and is asked with others, or without its system prompt, answers worse
    than it can: its score would be of the asking.
    """
    found = _of_run(model)
    given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if found is None:
        moved = Path(model).expanduser()
        return Asking(**given, moved=moved if (moved / MANIFEST).is_file() else None)  # type: ignore[arg-type]
    for name, value in given.items():
        if value is not None and value != getattr(found, name):
            trained = getattr(found, name)
            raise ConfigError(
                f"{name} = {value}, but {found.run} trained this model with {name} = {trained or 'the processor' + chr(39) + 's own'}. "
                f"Leave --{name.replace('_', '-')} out: what the run used is taken over."
            )
    return found


def with_system(splits: Mapping[str, Sequence[Sample]], system: str | None) -> dict[str, list[Sample]]:
    """The samples with a system prompt before them; those that have one of their own keep it."""
    return {split: [_with_system(sample, system) for sample in samples] for split, samples in splits.items()}


def system_of(card: Mapping[str, Any], data: str | None = None) -> str | None:
    """The system prompt that all sources of a recipe train with; None where there is none, or not one alone."""
    from vlm_dft.mixture_cards import sources_in

    try:
        found = {one.card.get("system") for one in sources_in(card, data)}
    except UserError:  # its files have gone
        found = {card.get("system")}
    return found.pop() if len(found) == 1 else None


def _with_system(sample: Sample, system: str | None) -> Sample:
    if not system or sample.messages[0]["role"] == "system":
        return sample
    return replace(sample, messages=[{"role": "system", "content": system}, *sample.messages])


def _of_run(model: str) -> Asking | None:
    """What the config.yaml of a model's run says, with its recipe's system prompt; None for a model of no run."""
    import yaml

    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    for place in [folder.absolute(), *folder.absolute().parents][:ABOVE]:
        file = place / "config.yaml"
        if not file.is_file():
            continue
        try:
            config = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            recipe = (
                yaml.safe_load((place / "recipe.yaml").read_text(encoding="utf-8"))
                if (place / "recipe.yaml").is_file()
                else {}
            )
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{file}: not valid YAML ({error}). It says how the model was trained; repair it."
            ) from error
        if not isinstance(config, Mapping) or "recipe" not in config:  # not a run of ours
            continue
        collator = config.get("collator") or {}
        known = {name: collator[name] for name in PIXELS if collator.get(name) is not None}
        return Asking(**known, system=system_of(recipe or {}, config.get("data")), run=place)
    return None
