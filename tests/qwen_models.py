"""Random tiny Qwen-VL models made with transformers, saved like a checkpoint, and their oracle.

Images go to PyTorch as the authors' script sends them: on white, resized by qwen-vl-utils' rule
with Pillow, cut by transformers' own processor without its resizing.
"""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from hf_models import CHAT_TOKENS, prompt_of, randomise
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from e5v_jax import E5V
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.encode.e5v import Dtype
from e5v_jax.families.qwen_vl.model import QwenVL
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>")  # fmt: skip
assert set(CHAT_TOKENS["chatml"]) < set(SPECIAL)


def build_qwen_tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens, then Qwen's special ones. ``ends``: it appends ``<|endoftext|>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(list(SPECIAL))
    if ends:
        end = (SPECIAL[0], backend.token_to_id(SPECIAL[0]))
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {end[0]}", special_tokens=[end]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@dataclass(frozen=True)
class QwenRecipe:
    """One random model. Small numbers that all differ, so that no two axes can be mixed up."""

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    seed: int = 0

    def config(self) -> Qwen3VLConfig:
        ids = {name: 256 + i for i, name in enumerate(SPECIAL)}
        text = {
            "vocab_size": 277,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 0.02,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": self.tied,
        }
        vision = {
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_heads": 3,
            "patch_size": 4,
            "num_position_embeddings": 25,
            "deepstack_visual_indexes": [0, 2],
            "out_hidden_size": self.text.get("hidden_size", text["hidden_size"]),
        }
        config = Qwen3VLConfig(
            text_config={**text, **self.text},
            vision_config={**vision, **self.vision},
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=self.tied,
        )
        config._attn_implementation = "eager"
        return config


QWEN3_RECIPES = {
    "deep-3": QwenRecipe(
        vision={"deepstack_visual_indexes": [0, 1, 3]}, text={"num_hidden_layers": 3}, seed=31
    ),
    "tied": QwenRecipe(tied=True, seed=32),
    "odd": QwenRecipe(
        text={
            "hidden_size": 40,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "head_dim": 24,
            "intermediate_size": 56,
            "vocab_size": 263,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 5, 3],
                "mrope_interleaved": True,
            },
        },
        vision={
            "hidden_size": 72,
            "num_heads": 2,
            "patch_size": 6,
            "depth": 3,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [1],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 300.0},
        },
        seed=33,
    ),
}


def reference_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """``smart_resize`` of qwen-vl-utils 0.0.14."""
    if max(height, width) / min(height, width) > 200:
        raise ValueError("absolute aspect ratio must be smaller than 200")
    h_bar = max(factor, round(height / factor) * factor)
    w_bar = max(factor, round(width / factor) * factor)
    if h_bar * w_bar > max_pixels:
        beta = math.sqrt((height * width) / max_pixels)
        h_bar = math.floor(height / beta / factor) * factor
        w_bar = math.floor(width / beta / factor) * factor
    elif h_bar * w_bar < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h_bar = math.ceil(height * beta / factor) * factor
        w_bar = math.ceil(width * beta / factor) * factor
    return h_bar, w_bar


@dataclass
class QwenCase:
    """A checkpoint folder, PyTorch's model of it and ours."""

    folder: Path
    torch_model: Any
    max_tokens: int = 1800  # of an image
    preset: str | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.folder)

    def torch_image(self, image: Image.Image) -> tuple[torch.Tensor, list[int]]:
        """Patches fp32 [P, 3*2*p*p] and the grid [1, rows, columns]."""
        vision = self.torch_model.config.vision_config
        is_new = vision.model_type == "qwen3_vl_vision"  # the class's default is of those before
        factor = vision.patch_size * vision.spatial_merge_size
        if image.mode == "RGBA":
            white = Image.new("RGB", image.size, (255, 255, 255))
            white.paste(image, mask=image.split()[3])
            image = white
        image = image.convert("RGB")
        limits = (4 * factor**2, self.max_tokens * factor**2)
        height, width = reference_resize(image.height, image.width, factor, *limits)
        scaling: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        processor = Qwen2VLImageProcessorPil(
            do_resize=False,
            **(scaling if is_new else {}),
            patch_size=vision.patch_size,
            temporal_patch_size=2,
            merge_size=vision.spatial_merge_size,
        )
        out = processor([image.resize((width, height))], return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"][0].tolist()

    def torch_inputs(self, prompt: str, image: Image.Image | None) -> dict[str, torch.Tensor]:
        """What the model is called with; ``<image>`` in ``prompt`` is the image."""
        merged, inputs = self.torch_model.config.vision_config.spatial_merge_size**2, {}
        if image is not None:
            pixels, grid = self.torch_image(image)
            pads = "<|image_pad|>" * (math.prod(grid) // merged)
            prompt = prompt.replace("<image>", f"<|vision_start|>{pads}<|vision_end|>")
            inputs = {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        kinds = (ids == self.torch_model.config.image_token_id).int()
        if image is not None:
            inputs["mm_token_type_ids"] = kinds
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}

    @torch.no_grad()
    def torch_vector(self, prompt: str, image: Image.Image | None = None) -> np.ndarray:
        """fp32 [D], normalised, at the last token of a filled prompt."""
        self.torch_model.model.rope_deltas = None  # of the call before
        out = self.torch_model.model(**self.torch_inputs(prompt, image)).last_hidden_state
        return torch.nn.functional.normalize(out[0, -1].float(), dim=-1).numpy()

    def torch_embed(self, items: list[Any]) -> np.ndarray:
        """fp32 [N, D], with E5-V's prompts in chatml, each alone."""
        return np.stack([self.torch_vector(*prompt_of(item, "chatml")) for item in items])

    def load(self, dtype: Dtype = "float32", **options: Any) -> E5V:
        """A fresh E5V of the folder."""
        vision = self.torch_model.config.vision_config
        token = (vision.patch_size * vision.spatial_merge_size) ** 2  # pixels
        limits = {"min_pixels": 4 * token, "max_pixels": self.max_tokens * token}
        options = {"preset": self.preset, **limits, **options}
        return E5V.from_pretrained(self.folder, dtype=dtype, **options)

    @cached_property
    def e5v(self) -> E5V:
        """In fp32, shared by the tests of a session: do not change it."""
        return self.load()

    @cached_property
    def module(self) -> QwenVL:
        """The flax module in fp32, for tests of its parts."""
        precision = Precision(param=np.float32, compute=np.float32)
        runtime = Runtime.on(make_mesh(data=-1, fsdp=1))
        module: QwenVL = load_model(open_source(self.folder), Build(precision, runtime))
        return module


def build_qwen3_vl(recipe: QwenRecipe, folder: Path, *, ends: bool = False) -> QwenCase:
    """Make, save and wrap a random Qwen3-VL model."""
    model = Qwen3VLForConditionalGeneration(recipe.config()).eval()
    randomise(model, recipe.seed)
    model.tie_weights()
    model.save_pretrained(folder)
    build_qwen_tokenizer(ends=ends).save_pretrained(folder)
    return QwenCase(folder, model)


def with_config(case: QwenCase, folder: Path, changes: dict[str, Any]) -> Path:
    """The case's weights in ``folder``; fields of its config, by dotted names, are as told."""
    raw = json.loads((case.folder / "config.json").read_text())
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        (raw[section] if section else raw)[name] = value
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors").symlink_to(case.folder / "model.safetensors")
    return folder


def assert_same_files(
    theirs: Path, exported: Path, *, without: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """Equal bits and configurations, but for tensors that begin ``without``; gives the tensors."""
    before, after = (
        safetensors.numpy.load_file(x / "model.safetensors") for x in (theirs, exported)
    )
    before = {key: x for key, x in before.items() if not key.startswith(without)}
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array, err_msg=key, strict=True)
    configs = [json.loads((x / "config.json").read_text()) for x in (theirs, exported)]
    assert configs[0] == configs[1]
    return before
