"""``python -m e5v_jax.evaluate analyse``: what prompt and training do to the embedding space."""

import gc
import json
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from e5v_jax.atomic import new_folder
from e5v_jax.data.images import load_image
from e5v_jax.evaluate import retrieval, sts
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.config import AnalyseArgs
from e5v_jax.evaluate.files import ImageRef, as_input
from e5v_jax.evaluate.plots import PROJECTIONS, Panel, draw_projection
from e5v_jax.evaluate.report import markdown_table, print_table, settings_table
from e5v_jax.evaluate.scores import Score, compare, summarise
from e5v_jax.evaluate.space import measure_gap
from e5v_jax.presets import E5_V
from e5v_jax.prompts import IMAGE, STS, TEXT

FULL = "full prompt"
BLANK = "full prompt, blank images"


def _take_away(full: str) -> dict[str, str]:
    """Return the paper's prompt with less and less taken away, always inside the chat template."""
    return {
        "no prompt": full.partition("\n")[0],
        'without "in one word"': full.replace(" in one word", ""),
        FULL: full,
    }


STS_PROMPTS = _take_away(STS)
PROMPTS = {name: (text, _take_away(IMAGE)[name]) for name, text in _take_away(TEXT).items()}
_STS_TASK = "stsb"
_DRAWN = 1000  # most images in a plot, each with its first caption
_GREY = (122, 116, 104)  # CLIP's mean colour: what the vision tower sees is zero

_HEADINGS = {  # of columns; others are the keys of analysis.json
    "uniformity_texts": "uniformity, texts",
    "uniformity_images": "uniformity, images",
    "spearman": "Spearman",
    "interval": "95 % interval",
}
_NOTE = (
    "Prompts are always inside the chat template: `no prompt` is the bare text or image in it. "
    "Blank images are grey and of the same size. Alignment and uniformity are Wang & Isola's "
    "(2020; alpha 2, t 2), the centroid distance is Liang et al.'s modality gap (2022); recall in "
    "percent. Plots show the first caption of each image."
)


@dataclass
class _Findings:
    template: str = ""
    images: list[dict[str, Any]] = field(default_factory=list)
    recall: list[dict[str, Any]] = field(default_factory=list)
    differences: list[dict[str, Any]] = field(default_factory=list)
    sts: list[dict[str, Any]] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)


def analyse(args: AnalyseArgs) -> None:
    """Analyse, print and write; ``args.output`` appears only when whole.

    Raises cli.UsageError: a flag has a value that cannot be; OSError, ValueError: one line naming
    file, row or folder; ImportError: matplotlib or scikit-learn is missing.
    """
    args.check()
    check = args.text_check()
    pictures = pairs = None  # read before the models, which take minutes to load
    if args.data is not None:
        for library in ("matplotlib", "sklearn"):
            if find_spec(library) is None:
                raise ImportError(f"{library} is needed to plot: pip install 'e5v-jax[analyse]'")
        pictures = retrieval.take(retrieval.load_captioned(args.data, check), args.stride)
    if args.sts is not None:
        pairs = sts.load_task(args.sts, _STS_TASK, args.stride, check)
    models = {"as given": args}
    if args.adapter is not None:
        models = {"before training": replace(args, adapter=None), "after training": args}

    with new_folder(args.output) as folder:
        found = _Findings()
        for name, model_args in models.items():
            _analyse_model(model_args, name, pictures, pairs, found)
            gc.collect()  # modules refer to each other in cycles: their weights would stay
        settings = {**args.describe(), "template": found.template, "stride": args.stride}
        text = f"# Analysis\n\n{settings_table(settings)}"
        tables = {
            "Texts against images": found.images,
            "Recall, with its 95 % interval": found.recall,
            "Recall minus that of the full prompt, paired": found.differences,
            "STS-B": found.sts,
        }
        for title, rows in tables.items():
            if rows:
                headings = [_HEADINGS.get(key, key.replace("_", " ")) for key in rows[0]]
                cells = [[_cell(*item) for item in row.items()] for row in rows]
                print_table(headings, cells, caption=title)
                text += f"\n## {title}\n\n{markdown_table(headings, cells)}"
        text += f"\n{_NOTE}\n"
        for projection in PROJECTIONS if found.panels else ():
            draw_projection(projection, found.panels, folder / projection.file)
            text += f"\n![{projection.title}]({projection.file})\n"
        content = {
            "settings": settings,
            "images": found.images,
            "recall": found.recall,
            "recall_minus_full_prompt": found.differences,
            "sts": found.sts,
        }
        (folder / "analysis.json").write_text(json.dumps(content, indent=2) + "\n")
        (folder / "analysis.md").write_text(text, encoding="utf-8")


def _analyse_model(
    args: AnalyseArgs,
    model: str,
    pictures: retrieval.CaptionedImages | None,
    pairs: sts.StsPairs | None,
    found: _Findings,
) -> None:
    """Add what one model shows; a function of its own, so that the model is gone at its end."""
    encoder = args.load_encoder()
    found.template = encoder.template
    if encoder.preset is not E5_V:
        raise ValueError(
            f"{args.model}: analyse takes E5-V's prompts apart, preset {encoder.preset.name} has "
            "others; give --preset e5-v to see what E5-V's do here"
        )
    if pictures is not None:
        _analyse_images(encoder, model, pictures, found)
    if pairs is not None:  # Spearman for each prompt, sentences cleaned as in the paper
        for prompt, words in STS_PROMPTS.items():
            encode = partial(encoder.embed, prompt=words, make=str, normalize=False)
            score = sts.score_tasks(encode, {_STS_TASK: pairs})[_STS_TASK]
            value, *interval = summarise([score])
            row = {"model": model, "prompt": prompt, "pairs": len(score.items)}
            found.sts.append({**row, "spearman": value, "interval": interval})


def _analyse_images(
    encoder: CachedEncoder, model: str, data: retrieval.CaptionedImages, found: _Findings
) -> None:
    """Add gap and recall for each prompt and for blanked images, and panels with and without it."""
    captions, image_of = data.flat()
    first = np.unique(image_of, return_index=True)[1][:_DRAWN]  # the first caption of each image
    scores: dict[str, list[Score]] = {}
    for prompt, (text_prompt, image_prompt) in [*PROMPTS.items(), (BLANK, PROMPTS[FULL])]:
        texts = encoder.embed(captions, prompt=text_prompt, make=str)
        make = blank if prompt == BLANK else as_input
        images = encoder.embed(data.images, prompt=image_prompt, make=make)
        scores[prompt] = retrieval.score_vectors("images", texts, images, image_of, "")
        gap = measure_gap(texts, images, image_of)._asdict()
        found.images.append({"model": model, "prompt": prompt, **gap})
        if prompt in (next(iter(PROMPTS)), FULL):
            found.panels.append(Panel(f"{model}, {prompt}", texts[first], images[:_DRAWN]))
    for prompt, own in scores.items():
        row = {"model": model, "prompt": prompt}
        found.recall.append(row | {score.metric: summarise([score]) for score in own})
        if prompt != FULL:
            pairs = zip(scores[FULL], own, strict=True)
            found.differences.append(row | {b.metric: compare(a, b)[:3] for a, b in pairs})


def blank(image: ImageRef) -> Image.Image:
    """Make a grey picture of the same size: the same tokens, and nothing to see."""
    return Image.new("RGB", load_image(as_input(image)).size, _GREY)


def _cell(name: str, value: Any) -> str:
    if name == "interval":
        return f"{value[0]:.2f} to {value[1]:.2f}"
    if isinstance(value, tuple):  # a value and the ends of its interval
        return "{:.1f} ({:.1f} to {:.1f})".format(*value)
    if isinstance(value, float):
        return f"{value:.2f}" if name == "spearman" else f"{value:.3f}"
    return str(value)
