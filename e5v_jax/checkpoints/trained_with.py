"""How an adapter was trained: what prompts stood around its inputs, so that loading it says so too.

It lies beside the adapter's weights in a file of its own, as PEFT knows no such fields; of a run
folder without an adapter yet, or a checkpoint of one, it is in ``run.json``.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from e5v_jax.checkpoints.adapters import find_run, read_run_info
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.presets import Preset, find_preset
from e5v_jax.prompts import PROMPTS, TEMPLATES

FILE = "trained_with.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedWith:
    """The fields of a training run's ``data`` that its vectors depend on, by the same names."""

    prompt: str = "text"
    preset: str | None = None  # this and the others: None is what the model has
    template: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Of an adapter, a run or a checkpoint of one; None: nothing is said there.

        Raises ValueError: the file is damaged or of another version; names the field.
        """
        run, step = find_run(folder)
        is_run = (run / "run.json").is_file()
        file = (run / "adapter" if is_run and step is None else folder) / FILE
        if file.is_file():
            found = read_json(file)
            if unknown := set(found) - {field.name for field in dataclasses.fields(cls)}:
                message = f"{file}: unknown field {min(unknown)!r}: update e5v-jax to load it"
                raise ValueError(message)
            return cls._from(found, file)
        if is_run:
            return cls.of_run(run)
        return None

    @classmethod
    def of_run(cls, run: Path) -> Self:
        """What its ``run.json`` says. Raises ValueError: as :meth:`read`."""
        return cls._from(read_run_info(run)["config"]["data"], run / "run.json")

    @classmethod
    def _from(cls, found: Mapping[str, Any], file: Path) -> Self:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value, kind = found.get(field.name), int if field.name.endswith("pixels") else str
            if value is not None and type(value) is not kind:
                expected = f"expected {kind.__name__} or null; restore it from a copy"
                raise ValueError(f"{file}: {field.name} is {value!r}, {expected}")
            if value is not None:
                values[field.name] = value
        said = cls(**values)
        try:
            preset = find_preset(said.preset).with_pixels(said.min_pixels, said.max_pixels)
            preset.with_text_prompt(said.prompt)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return said

    def write(self, folder: Path) -> None:
        """Put it beside the weights of an adapter."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @property
    def note(self) -> str | None:
        """What to say where the weights go on without it; None: nothing is lost."""
        if self.prompt in ("text", "released"):
            return None
        flag = "--prompt-name" if self.prompt in PROMPTS else "--prompt"
        return f"texts were trained with another prompt: encode them with {flag} {self.prompt!r}"


def resolve_names(said: TrainedWith, base: ConvertedFolder) -> TrainedWith:
    """The same with the names of the preset and the template that ``base`` was trained with."""
    preset, tokenizer = find_preset(said.preset, *base.known_as), load_tokenizer(base.folder)
    template = base.family.processor(base.config, tokenizer, said.template, preset).template
    own = template not in TEMPLATES  # the preset's
    return dataclasses.replace(said, preset=preset.name, template=None if own else template)


def choose_inputs(
    adapter: Path | None,
    known_as: tuple[str, ...],
    *,
    preset: str | None,
    template: str | None,
    min_pixels: int | None,
    max_pixels: int | None,
) -> tuple[Preset, str | None]:
    """The preset and the template's name: those given, else the adapter's, else the model's.

    A preset that is given has its own prompts. Each field that the adapter was trained with
    otherwise is logged in a line. Raises ValueError: as :meth:`TrainedWith.read`, or the preset
    that is given is unknown.
    """
    said = (None if adapter is None else TrainedWith.read(adapter)) or TrainedWith()
    used = dataclasses.asdict(said)
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {"preset": preset, "template": template, **limits}
    if preset is not None:
        given["prompt"] = "released" if said.prompt == "released" else "text"
    for name, value in given.items():
        if value is None:
            continue
        if used[name] not in (None, value):
            told = "%s was trained with data.%s %r, here it is %r"
            _logger.warning(told, adapter, name, used[name], value)
        used[name] = value
    found = find_preset(used["preset"], *known_as)
    found = found.with_pixels(used["min_pixels"], used["max_pixels"])
    return found.with_text_prompt(used["prompt"]), used["template"]
