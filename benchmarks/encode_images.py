"""Images a second: E5V.encode and transformers side by side, on the same photographs and threads.

    python benchmarks/encode_images.py --images shared/data/flickr8k --limit 24
    python benchmarks/encode_images.py --images shared/data/flickr8k --limit 100 --family qwen3_vl

A random model in fp32 with a decoder of SmolLM2-135M's size: LLaVA-NeXT with a tower of CLIP
ViT-B/16's size at 336 px, or Qwen3-VL with one of ViT-S/16's, at native resolution. Both sides
decode, resize and cut the files themselves; PyTorch takes one image at a time or several of about
one length (--batch-size), padded to the longest. Repetitions alternate.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from encode_side_by_side import Notes, Run, Side, compare, print_table, serve

from e5v_jax.prompts import PROMPTS, TEMPLATES, fill

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # random models

Family = Literal["llava_next", "qwen3_vl"]
Inputs = Callable[[list[Path]], dict[str, Any]]


@dataclass(frozen=True)
class Args:
    """Compare E5V.encode with PyTorch transformers on photographs."""

    images: Path
    """Folder that is searched for .jpg files."""
    family: Family = "llava_next"
    """Of the random model."""
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
    """Folder to make the random model in, as hf/ and converted/, and keep it."""
    side: Side | None = None
    """Be one side (the command starts itself so)."""


def find_images(args: Args) -> list[Path]:
    """``args.limit`` files, evenly spaced in the order of their names."""
    paths = sorted(args.images.rglob("*.jpg"))
    return [paths[i * len(paths) // args.limit] for i in range(min(args.limit, len(paths)))]


def make_model(folder: Path, *, family: Family = "llava_next", tiny: bool = False) -> None:
    """A random model as a Hugging Face folder; the tokenizer's tokens are bytes."""
    from hf_models import Recipe, build_llava
    from qwen_models import QwenRecipe, build_qwen3_vl

    text = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    text |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    if family == "llava_next":
        vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        vision |= {"num_attention_heads": 12, "image_size": 336, "patch_size": 16}
        large = Recipe(template="chatml", text=text, vision=vision)
        build_llava(Recipe(template="chatml") if tiny else large, folder)
        return
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e6}
    rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    tower: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1536, "depth": 12}
    tower |= {"num_heads": 6, "patch_size": 16, "num_position_embeddings": 2304}
    tower |= {"deepstack_visual_indexes": [2, 5, 8]}
    recipe = QwenRecipe(text={**text, "head_dim": 64, "rope_parameters": rope}, vision=tower)
    build_qwen3_vl(QwenRecipe() if tiny else recipe, folder)


def open_ours(model_folder: Path, images: list[Path]) -> tuple[Run, Notes]:
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


def open_llava(args: Args, model_folder: Path) -> tuple[Any, Inputs]:
    """transformers' LLaVA-NeXT, and what it is called with for some images."""
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

    model = LlavaNextForConditionalGeneration.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    config: Any = model.config
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

    def inputs(paths: list[Path]) -> dict[str, Any]:
        batch = processor(
            text=[prompt] * len(paths),
            images=[Image.open(path).convert("RGB") for path in paths],
            return_tensors="pt",
            padding=True,
        )
        batch.pop("token_type_ids", None)
        return dict(batch)

    return model.eval().model, inputs


def open_qwen(args: Args, model_folder: Path) -> tuple[Any, Inputs]:
    """transformers' Qwen3-VL, and what it is called with for some images."""
    import torch
    from PIL import Image
    from qwen_models import QwenCase
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(
        model_folder, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    case = QwenCase(model_folder, model)
    prompt = fill(PROMPTS["image"], template=TEMPLATES["chatml"])

    def inputs(paths: list[Path]) -> dict[str, Any]:
        rows = [case.torch_inputs(prompt, Image.open(path)) for path in paths]
        longest = max(row["input_ids"].shape[1] for row in rows)
        batch = {
            name: torch.cat([row[name] for row in rows])
            for name in ("pixel_values", "image_grid_thw")
        }
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):  # padded on the left
            padded = [
                torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0))
                for row in rows
            ]
            batch[name] = torch.cat(padded)
        return batch

    return model.model, inputs


def open_reference(args: Args, model_folder: Path, images: list[Path]) -> tuple[Run, Notes]:
    """transformers' processor and model, used as the reference is: left padding, last token."""
    import torch
    from PIL import Image

    torch.set_num_threads(args.threads)
    model, inputs = (open_llava if args.family == "llava_next" else open_qwen)(args, model_folder)

    def pixels(path: Path) -> tuple[float, int]:
        with Image.open(path) as image:
            return image.height / image.width, image.height  # of one shape, of one length

    @torch.inference_mode()
    def encode() -> np.ndarray:
        order = sorted(range(len(images)), key=lambda i: pixels(images[i]))
        width = model.config.text_config.hidden_size
        vectors = np.zeros((len(images), width), np.float32)
        for start in range(0, len(order), args.batch_size):
            rows = order[start : start + args.batch_size]
            if args.family == "qwen3_vl":
                model.rope_deltas = None  # of the batch before
            batch = inputs([images[i] for i in rows])
            hidden = model(**batch, use_cache=False).last_hidden_state[:, -1]
            vectors[rows] = torch.nn.functional.normalize(hidden, dim=-1).numpy()
        return vectors

    return encode, lambda: {"attention": "sdpa", "batch": args.batch_size}


def main(args: Args) -> None:
    """Be one side, or start both and compare them."""
    images = find_images(args)
    if args.side is not None:
        assert args.model is not None
        hf, converted = args.model / "hf", args.model / "converted"
        if args.side == "e5v-jax":
            serve(lambda: open_ours(converted, images))
        else:
            serve(lambda: open_reference(args, hf, images))
        return
    with tempfile.TemporaryDirectory() if args.model is None else nullcontext(args.model) as folder:
        hf, converted = Path(folder) / "hf", Path(folder) / "converted"
        make_model(hf, family=args.family, tiny=args.tiny)
        command = [sys.executable, "-m", "convert.from_hf", str(hf), str(converted)]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
        results = compare(args.repetitions, Path(folder), "--model", str(folder))
        print_table("images", len(images), results)


if __name__ == "__main__":
    main(tyro.cli(Args))
