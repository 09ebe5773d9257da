"""README.md of what ``e5v-export`` writes: a model card, as the Hugging Face hub shows it.

What it was made of and how, its prompts, scores with their intervals, and how five libraries use it
(:mod:`e5v_jax.checkpoints.usage`).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e5v_jax.atomic import write_whole
from e5v_jax.checkpoints.adapters import find_run, read_run_info
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.json_file import read_json
from e5v_jax.checkpoints.usage import Usage

FILE = "README.md"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_DATASETS = {  # a corpus by its name at tensorflow-datasets, or its file's -> at the hub
    "snli": "stanfordnlp/snli",
    "multi_nli": "nyu-mll/multi_nli",
    "nli_for_simcse.csv": "princeton-nlp/datasets-for-simcse",
}
_SHOWN = ("preset", "template", "dtype", "quantize", "stride", "device", "e5v-jax", "jax")
"""Settings of an evaluation that a reader of its scores needs; paths are nobody's business."""
_NO_SCORES = """\
None: nothing was measured for this card. `e5v-export --scores FOLDER` takes those of an evaluation
(`e5v-evaluate --output FOLDER`)."""


@dataclass(frozen=True)
class Scores:
    """What an evaluation measured: its settings, and a row per figure, all in percent."""

    settings: Mapping[str, Any]
    rows: list[dict[str, Any]]  # task, label, metric, items, value, low, high


def read_scores(folder: Path) -> Scores:
    """Read the ``results.json`` of an evaluation's output folder.

    Raises FileNotFoundError: there is none; ValueError: it is damaged, or holds no score.
    """
    file = folder / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; expected the --output folder of an evaluation")
    match read_json(file, todo="run the evaluation again"):
        case {"settings": dict(settings), "results": [_, *_] as rows}:
            pass
        case _:
            raise ValueError(f'{file}: expected "settings" and at least one of "results"')
    for number, row in enumerate(rows):
        for name in ("task", "label", "metric", "items", "value", "low", "high"):
            value = row.get(name) if isinstance(row, dict) else None
            is_number = isinstance(value, float | int) and math.isfinite(value)
            if not (is_number if name in ("value", "low", "high") else isinstance(value, str)):
                raise ValueError(f"{file}: results[{number}]: {name} is {value!r}")
    return Scores(settings, rows)


def check_adapter(scores: Scores, adapter: Path | None, *, given: bool) -> None:
    """Refuse scores of the bare model for an adapter, and the other way round.

    ``given`` is whether the adapter was named; one that a model carries is named in no evaluation.
    Raises ValueError: says which.
    """
    measured = scores.settings.get("adapter")
    if measured is None and given:
        raise ValueError(f"--scores: measured without an adapter, but {adapter} is exported")
    if measured is not None and adapter is None:
        raise ValueError(f"--scores: measured with the adapter {measured}, but none is exported")


@dataclass(frozen=True)
class ModelCard:
    """What a card says of an export."""

    usage: Usage
    source: ConvertedFolder
    adapter: Path | None
    """That was merged or written: a PEFT folder, a run, or a checkpoint of one."""
    scores: Scores | None = None

    @property
    def base(self) -> str | None:
        """The hub id that the weights are from; None: they are from a folder or file."""
        source = self.source.info.source
        here = Path(source).exists() or Path(source).is_absolute()
        return source if _HUB_ID.fullmatch(source) and not here else None

    def write(self, folder: Path) -> bool:
        """Write README.md whole into ``folder``, unless it has one, which is the user's own.

        Returns whether it was written.
        """
        if (folder / FILE).exists():
            return False
        write_whole(folder / FILE, lambda file: file.write(self.text().encode()))
        return True

    def text(self) -> str:
        """The card: YAML between lines of dashes, then Markdown."""
        head = "".join(f"{name}: {json.dumps(value)}\n" for name, value in self._front().items())
        sections = {
            f"# {self.usage.name}": self._about(),
            "## Prompts": self.usage.prompts(),
            "## Use": self._use(),
            "## Training": self._training(),
            "## Scores": self._scores(),
            "## Licence": self._licence(),
        }
        body = "\n".join(f"{title}\n\n{text}\n" for title, text in sections.items())
        return f"---\n{head}---\n\n{body}"

    def _front(self) -> dict[str, Any]:
        """The front matter; a value of JSON is one of YAML."""
        usage = self.usage
        relation = "adapter" if usage.alone else "finetune" if self.adapter else None
        library = "sentence-transformers" if usage.problem is None else "transformers"
        tags = ["e5-v", "e5v-jax", "feature-extraction", "sentence-similarity"]
        tags += ["peft", "lora"] if usage.alone else [library]
        front = {
            "base_model": self.base,
            "base_model_relation": relation if self.base else None,
            "license": "other",
            "license_name": "as-the-base-model",
            "license_link": f"https://huggingface.co/{self.base}" if self.base else None,
            "datasets": sorted({_DATASETS[name] for name in self._data() if name in _DATASETS}),
            "tags": tags,
            "library_name": "peft" if usage.alone else library,
            "pipeline_tag": "feature-extraction" if usage.images else "sentence-similarity",
            "model-index": self._index(),
        }
        return {name: value for name, value in front.items() if value}

    def _index(self) -> list[dict[str, Any]]:
        """The scores as the hub's front matter has them."""
        if self.scores is None:
            return []
        results = [
            {
                "task": {"type": "feature-extraction"},
                "dataset": {"type": row["task"], "name": row["label"]},
                "metrics": [
                    {
                        "type": re.sub(r"\W+", "_", row["metric"].lower()),
                        "name": f"{row['metric']}, 95 % interval {row['low']:.2f} to "
                        f"{row['high']:.2f}",
                        "value": round(row["value"], 2),
                    }
                ],
            }
            for row in self.scores.rows
        ]
        return [{"name": self.usage.name, "results": results}]

    def _about(self) -> str:
        kinds = "texts, images and texts with an image" if self.usage.images else "texts"
        width = self.source.config.text.hidden_size
        what = "A LoRA adapter that makes embeddings" if self.usage.alone else "Embeddings"
        revision = self.source.info.revision
        at = f", revision `{revision}`" if revision else ""
        name = self.base or Path(self.source.info.source).name
        base = f"[{name}](https://huggingface.co/{name})" if self.base else f"`{name}`"
        made = "trained in a run" if self._run() else "the base model's, as they are"
        weights = "" if self.adapter else f" The weights are {made}."
        return (
            f"{what} of {kinds} in one space: {width} numbers of unit length, compared by their "
            f"cosine. Base model: {base}{at}.{weights}\n\n"
            "Written by e5v-jax, a JAX implementation of [E5-V](https://arxiv.org/abs/2407.12580)."
        )

    def _use(self) -> str:
        if self.base is not None or not self.usage.alone:
            return self.usage.text(self.base or "")
        name = Path(self.source.info.source).name
        return f"`BASE` stands for the base model, `{name}`.\n\n{self.usage.text('BASE')}"

    def _run(self) -> dict[str, Any] | None:
        """The configuration of the training run that left the weights, if it lies beside them."""
        if self.adapter is None:
            folder = self.source.folder
            places = [folder.parent] if folder.name == "model" else []
        else:
            places = [find_run(self.adapter)[0], self.adapter.parent]
        for place in places:
            if (place / "run.json").is_file():
                return dict(read_run_info(place)["config"])
        return None

    def _data(self) -> list[str]:
        """Names of what the run was trained on: a corpus, or files without their folders."""
        data = (self._run() or {}).get("data", {})
        paths = data.get("path") or []
        found = [data.get("tfds"), *(paths if isinstance(paths, list) else [paths])]
        return [str(name).rsplit("/", 1)[-1] for name in found if name]

    def _training(self) -> str:
        config = self._run()
        if config is None:
            if self.adapter is None:
                return "None for this export."
            return "Not recorded: no run of e5v-jax (`run.json`) lies beside the adapter."
        optimizer, loss = config.get("optimizer") or {}, config.get("loss") or {}
        rows = {
            "data": ", ".join(f"`{name}`" for name in self._data()),
            "rows a step": config.get("batch_size"),
            "steps at most": config.get("max_steps"),
            "epochs": config.get("num_epochs"),
            "learning rate": optimizer.get("learning_rate"),
            "temperature": loss.get("temperature"),
            "LoRA rank": (config.get("lora") or {}).get("rank", "all weights were trained"),
            "base in": config.get("quantize") or config.get("dtype"),
        }
        lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
        return (
            "Contrastive (InfoNCE, other rows of a step and hard negatives), the vision tower "
            "untouched.\n\n" + "\n".join(["| | |", "|---|---|", *lines])
        )

    def _scores(self) -> str:
        if self.scores is None:
            return _NO_SCORES
        table = ["| task | metric | items | score | 95 % interval |", "|---|---|---:|---:|---:|"]
        for row in self.scores.rows:
            said = [row[name].replace("|", r"\|") for name in ("label", "metric", "items")]
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            table.append(f"| {' | '.join(said)} | {row['value']:.2f} | {interval} |")
        found = self.scores.settings
        settings = [f"{name} {found[name]}" for name in _SHOWN if found.get(name) is not None]
        return "\n".join(
            [*table, "", f"Percent; bootstrap over the items. Measured with {', '.join(settings)}."]
        )

    def _licence(self) -> str:
        whose = f"[{self.base}](https://huggingface.co/{self.base})" if self.base else "its base"
        return (
            f"The weights are under the licence of {whose}, and of what else they were trained on: "
            "look it up and fill in `license` above before you publish this folder. e5v-jax itself "
            "is Apache-2.0."
        )
