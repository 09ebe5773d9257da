"""``python -m e5v_jax.evaluate analyse``: what prompt and training do to the embedding space."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from e5v_jax import cli
from e5v_jax.evaluate.report import markdown_table, print_table, settings_table
from e5v_jax.evaluate.scores import summarise

if TYPE_CHECKING:
    from PIL import Image

    from e5v_jax.evaluate.embedding import Embedder
    from e5v_jax.evaluate.files import ImageRef
    from e5v_jax.evaluate.plots import Panel
    from e5v_jax.evaluate.retrieval import CaptionedImages
    from e5v_jax.evaluate.sts import StsPairs

# What is taken away from the prompt, always inside the chat template. The last is the paper's.
PROMPTS = {
    "no prompt": ("<sent>", "<image>"),
    'without "in one word"': (
        "<sent>\nSummary above sentence: ",
        "<image>\nSummary above image: ",
    ),
    "full prompt": (
        "<sent>\nSummary above sentence in one word: ",
        "<image>\nSummary above image in one word: ",
    ),
}
FULL = "full prompt"
BLANK = "full prompt, blank images"
STS_PROMPTS = {
    "no prompt": " <sent>",
    'without "in one word"': " <sent>\nSummary above sentence:",
    FULL: " <sent>\nSummary above sentence in one word:",
}
_STS_TASK = "stsb"
_DRAWN = 1000  # most images in a plot, each with its first caption
_GREY = (122, 116, 104)  # CLIP's mean colour: what the vision tower sees is zero

_GAP_HEADINGS = (
    "model",
    "prompt",
    "centroid distance",
    "matched cosine",
    "mismatched cosine",
    "alignment",
    "uniformity, texts",
    "uniformity, images",
    "image R@1",
    "text R@1",
)
_NOTE = (
    "Prompts are always inside the chat template: `no prompt` is the bare text or image in it. "
    "Blank images are grey and of the same size. Alignment and uniformity are Wang & Isola's "
    "(2020; alpha 2, t 2), the centroid distance is Liang et al.'s modality gap (2022); recall in "
    "percent. Plots show the first caption of each image."
)
_STS_HEADINGS = ("model", "prompt", "pairs", "Spearman", "95 % interval")


@dataclass(frozen=True)
class AnalyseArgs:
    """Show the embedding space: the gap between texts and images, what the parts of the prompt and
    the image itself contribute, before and after training; tables and plots."""

    model: str
    """Converted folder, Hugging Face folder or GGUF file, or a hub id."""
    output: Path
    """Folder to write analysis.json, analysis.md and the plots to; must be empty or not exist."""
    data: Path | None = None
    """Folder with captions.jsonl and its images, for gap, plots and blanked images."""
    sts: Path | None = None
    """Folder with STS/ in SentEval's layout, for the prompt ablation on STS-B."""
    adapter: Path | None = None
    """LoRA to compare with the bare model: a run folder of e5v_jax.train or a PEFT folder."""
    stride: int = 1
    """Take every n-th image and pair only."""
    cache: Path | None = None
    """Folder to keep embeddings in."""
    template: str | None = None
    """Chat template: llama3, mistral, phi3, chatml or vicuna; by default told from the model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of weights and arithmetic."""
    batch_size: int = 32
    """Inputs per device batch."""


def analyse(args: AnalyseArgs) -> None:
    """Analyse, print and write; ``args.output`` appears only when whole.

    Raises:
        cli.UsageError: a flag with a value that cannot be.
        OSError, ValueError: one line naming file, row or folder.
        ImportError: matplotlib or scikit-learn is missing.
    """
    if args.data is None and args.sts is None:
        raise cli.UsageError("--data or --sts: give images with captions, SentEval's STS, or both")
    for flag, value in (("--stride", args.stride), ("--batch-size", args.batch_size)):
        if value < 1:
            raise cli.UsageError(f"{flag}: {value}, expected at least 1")
    if args.data is not None:
        _check_plotting()

    from e5v_jax.atomic import new_folder
    from e5v_jax.evaluate import retrieval, sts
    from e5v_jax.evaluate.embedding import open_embedder
    from e5v_jax.evaluate.plots import PROJECTIONS, draw_projection

    # Before the models, which take minutes to load.
    pictures = None
    if args.data is not None:
        pictures = retrieval.take(retrieval.load_captioned(args.data), args.stride)
    pairs = None if args.sts is None else sts.load_task(args.sts, _STS_TASK, stride=args.stride)
    models: dict[str, Path | None] = {"before training": None, "after training": args.adapter}
    if args.adapter is None:
        models = {"as given": None}

    with new_folder(args.output) as folder:
        gaps: list[dict[str, Any]] = []
        correlations: list[dict[str, Any]] = []
        panels: list[Panel] = []
        for name, adapter in models.items():
            embedder = open_embedder(
                args.model,
                dtype=args.dtype,
                adapter=adapter,
                template=args.template,
                batch_size=args.batch_size,
                cache=args.cache,
            )
            if pictures is not None:
                rows, drawn = analyse_images(embedder, name, pictures)
                gaps += rows
                panels += drawn
            if pairs is not None:
                correlations += analyse_sts(embedder, name, pairs)
        settings = {
            "model": args.model,
            "adapter": None if args.adapter is None else str(args.adapter),
            "template": embedder.template,
            "dtype": args.dtype,
            "stride": args.stride,
        }
        text = f"# Analysis\n\n{settings_table(settings)}"
        for title, headings, found in (
            ("Texts against images", _GAP_HEADINGS, gaps),
            ("STS-B", _STS_HEADINGS, correlations),
        ):
            if found:
                cells = [_cells(row) for row in found]
                print_table(headings, cells, caption=title)
                text += f"\n## {title}\n\n{markdown_table(headings, cells)}"
        text += f"\n{_NOTE}\n"
        for projection in PROJECTIONS if panels else ():
            draw_projection(projection, panels, folder / projection.file)
            text += f"\n![{projection.title}]({projection.file})\n"
        content = {"settings": settings, "images": gaps, "sts": correlations}
        (folder / "analysis.json").write_text(json.dumps(content, indent=2) + "\n")
        (folder / "analysis.md").write_text(text, encoding="utf-8")


def analyse_images(
    embedder: "Embedder", model: str, data: "CaptionedImages"
) -> "tuple[list[dict[str, Any]], list[Panel]]":
    """Gap and recall for each prompt and for blanked images; panels without and with the prompt.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    from e5v_jax.evaluate.files import load
    from e5v_jax.evaluate.plots import Panel
    from e5v_jax.evaluate.retrieval import score_vectors
    from e5v_jax.evaluate.space import measure_gap

    captions = [caption for group in data.captions for caption in group]
    image_of = np.repeat(np.arange(len(data.images)), [len(group) for group in data.captions])
    first = np.unique(image_of, return_index=True)[1][:_DRAWN]  # the first caption of each image
    rows, panels = [], []
    for prompt, (text_prompt, image_prompt) in [*PROMPTS.items(), (BLANK, PROMPTS[FULL])]:
        texts = embedder.embed(
            captions, prompt=text_prompt, make=str, where=lambda i: f"caption {captions[i]!r}"
        )
        images = embedder.embed(
            data.images,
            prompt=image_prompt,
            make=blank if prompt == BLANK else load,
            where=lambda i: str(data.images[i]),
        )
        recall = {
            score.metric: score.items.value()
            for score in score_vectors("images", texts, images, image_of, "")
            if score.metric.endswith("R@1")
        }
        gap = measure_gap(texts, images, image_of)
        rows.append({"model": model, "prompt": prompt, **gap.values(), **recall})
        if prompt in (next(iter(PROMPTS)), FULL):
            panels.append(Panel(f"{model}, {prompt}", texts[first], images[:_DRAWN]))
    return rows, panels


def analyse_sts(embedder: "Embedder", model: str, pairs: "StsPairs") -> list[dict[str, Any]]:
    """Spearman on STS-B for each prompt, sentences cleaned as in the paper.

    Raises:
        ValueError: see :meth:`Embedder.embed`.
    """
    from e5v_jax.evaluate.sts import score_tasks

    rows = []
    for prompt, instruction in STS_PROMPTS.items():

        def encode(sentences: list[str], instruction: str = instruction) -> np.ndarray:
            return embedder.embed(
                sentences,
                prompt=instruction,
                make=str,
                where=lambda i: f"sentence {sentences[i]!r}",
                normalize=False,  # rounding would break ties of the cosine
            )

        score = score_tasks(encode, {_STS_TASK: pairs})[_STS_TASK]
        value, low, high = summarise([score.score])
        rows.append(
            {
                "model": model,
                "prompt": prompt,
                "pairs": score.pairs,
                "spearman": value,
                "interval": [low, high],
            }
        )
    return rows


def blank(image: "ImageRef") -> "Image.Image":
    """A grey picture of the same size: the same tokens, and nothing to see."""
    from PIL import Image

    from e5v_jax.data.images import load_image
    from e5v_jax.evaluate.files import load

    return Image.new("RGB", load_image(load(image)).size, _GREY)


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    cells = []
    for name, value in row.items():
        if name == "interval":
            cells.append(f"{value[0]:.2f} to {value[1]:.2f}")
        elif isinstance(value, float):
            percent = "R@" in name or name == "spearman"
            cells.append(f"{value:.2f}" if percent else f"{value:.3f}")
        else:
            cells.append(str(value))
    return cells


def _check_plotting() -> None:
    try:
        import matplotlib  # noqa: F401  # only whether it is there, before hours of embedding
        import sklearn  # noqa: F401  # the same
    except ImportError as error:
        raise ImportError(
            f"{error.name} is needed to plot: pip install 'e5v-jax[analyse]'"
        ) from error
