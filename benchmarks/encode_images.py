"""Images a second: E5V.encode and transformers side by side, on the same photographs and threads.

    python benchmarks/encode_images.py --images shared/data/flickr8k --limit 24

A random LLaVA-NeXT in fp32: a tower of CLIP ViT-B/16's size at 336 px, a decoder of SmolLM2-135M's.
Both decode, resize and tile the files themselves; PyTorch takes one image at a time or several of
about one length (--batch-size), padded to the longest. Repetitions alternate.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from encode_side_by_side import Side, compare, print_table, serve

from e5v_jax.prompts import PROMPTS, TEMPLATES, fill

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # hf_models: random LLaVA folders

Encode = Callable[[], np.ndarray]
Notes = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Args:
    """Compare E5V.encode with PyTorch transformers on photographs."""

    images: Path
    """Folder that is searched for .jpg files."""
    limit: int = 24
    """Only so many images, spread over all."""
    repetitions: int = 3
    """Timed runs of each, after one that is not timed."""
    batch_size: int = 1
    """PyTorch's; ours go by tokens."""
    threads: int = 2
    """PyTorch's; XLA takes all of the machine's."""
    tiny: bool = False
    """A model small enough for a test."""
    model: Path | None = None
    """Folder with the random model, as hf/ and converted/; by default it is made."""
    side: Side | None = None
    """Be one side (the command starts itself so)."""


def find_images(args: Args) -> list[Path]:
    """``args.limit`` files, evenly spaced in the order of their names."""
    paths = sorted(args.images.rglob("*.jpg"))
    return [paths[i * len(paths) // args.limit] for i in range(min(args.limit, len(paths)))]


def make_model(folder: Path, *, tiny: bool) -> None:
    """A random LLaVA-NeXT as a Hugging Face folder; the tokenizer's tokens are bytes."""
    from hf_models import Recipe, build_llava

    if tiny:
        build_llava(Recipe(template="chatml"), folder)
        return
    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision |= {"num_attention_heads": 12, "image_size": 336, "patch_size": 16}
    build_llava(Recipe(template="chatml", text=text, vision=vision), folder)


def open_ours(model_folder: Path, images: list[Path]) -> tuple[Encode, Notes]:
    """E5V.encode and its figures."""
    from e5v_jax import E5V

    model = E5V.from_pretrained(model_folder, dtype="float32")

    def notes() -> dict[str, Any]:
        compilations = model.statistics.compilations
        return {
            "padding": f"{100 * model.statistics.padding:.1f} %",
            "compilations": f"{len(compilations)} ({sum(compilations.values()):.1f} s)",
        }

    return lambda: model.encode(images, show_progress_bar=False), notes


def open_reference(args: Args, model_folder: Path, images: list[Path]) -> tuple[Encode, Notes]:
    """transformers' processor and model, used as the reference is: left padding, last token."""
    import torch
    from PIL import Image
    from transformers import (
        LlavaNextForConditionalGeneration,
        LlavaNextProcessor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    torch.set_num_threads(args.threads)
    model = LlavaNextForConditionalGeneration.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model = model.eval().model
    config = model.config
    side = config.vision_config.image_size
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_grid_pinpoints=config.image_grid_pinpoints,
        ),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(model_folder, padding_side="left"),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
    )
    prompt = fill(PROMPTS["image"], template=TEMPLATES["chatml"])

    def pixels(path: Path) -> tuple[float, int]:
        with Image.open(path) as image:
            return image.height / image.width, image.height  # of one shape, of one length

    @torch.inference_mode()
    def encode() -> np.ndarray:
        order = sorted(range(len(images)), key=lambda i: pixels(images[i]))
        vectors = np.zeros((len(images), config.text_config.hidden_size), np.float32)
        for start in range(0, len(order), args.batch_size):
            rows = order[start : start + args.batch_size]
            batch = processor(
                text=[prompt] * len(rows),
                images=[Image.open(images[i]).convert("RGB") for i in rows],
                return_tensors="pt",
                padding=True,
            )
            batch.pop("token_type_ids", None)
            hidden = model(**batch, use_cache=False).last_hidden_state[:, -1]
            vectors[rows] = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        return vectors

    return encode, lambda: {"attention": "sdpa", "batch": args.batch_size}


def main(args: Args) -> None:
    """Be one side, or start both and compare them."""
    images = find_images(args)
    if args.side is not None:
        assert args.model is not None
        if args.side == "e5v-jax":
            serve(lambda: open_ours(args.model / "converted", images))
        else:
            serve(lambda: open_reference(args, args.model / "hf", images))
        return
    with tempfile.TemporaryDirectory() as folder:
        hf, converted = Path(folder) / "hf", Path(folder) / "converted"
        make_model(hf, tiny=args.tiny)
        command = [sys.executable, "-m", "convert.from_hf", str(hf), str(converted)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        results = compare(args.repetitions, Path(folder), "--model", folder)
        print_table("images", len(images), results)


if __name__ == "__main__":
    main(tyro.cli(Args))
