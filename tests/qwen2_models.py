"""Random tiny models of Qwen2-VL, Qwen2.5-VL and Qwen2.5-Omni's thinker, and their oracle."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hf_models import picture, randomise
from PIL import Image
from qwen_models import SPECIAL, QwenCase, build_qwen_tokenizer, reference_resize
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen2_5_omni_thinker": (Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration),
}
_VISION = {
    "qwen2_vl": {"depth": 3, "embed_dim": 48, "mlp_ratio": 3, "num_heads": 3},
    "qwen2_5_vl": {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 3,
        "window_size": 32,  # 4 x 4 tokens
        "fullatt_block_indexes": [1, 3],
    },
}
_VISION["qwen2_5_omni_thinker"] = _VISION["qwen2_5_vl"]
_AUDIO = {
    "encoder_layers": 1,
    "d_model": 16,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "num_mel_bins": 8,
}


@dataclass(frozen=True)
class OldRecipe:
    """One random model of the generations before Qwen3-VL."""

    kind: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    tied: bool = False
    seed: int = 0

    def config(self) -> Any:
        ids = {name: 256 + i for i, name in enumerate(SPECIAL)}
        text = {
            "vocab_size": 277,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 0.02,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 50000.0,
                "mrope_section": [4, 2, 2],
            },
            "tie_word_embeddings": self.tied,
            **self.text,
        }
        width = "hidden_size" if self.kind == "qwen2_vl" else "out_hidden_size"
        vision = {"patch_size": 4, width: text["hidden_size"], **_VISION[self.kind], **self.vision}
        is_omni = self.kind == "qwen2_5_omni_thinker"
        image, video = ("image_token_index", "video_token_index") if is_omni else (
            "image_token_id", "video_token_id")  # fmt: skip
        sound = {"audio_config": {**_AUDIO, "output_dim": text["hidden_size"]}} if is_omni else {}
        config = CLASSES[self.kind][0](
            text_config=text,
            vision_config=vision,
            **sound,
            **{image: ids["<|image_pad|>"], video: ids["<|video_pad|>"]},
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=self.tied,
        )
        config._attn_implementation = "eager"
        return config


_ODD_TEXT = {
    "hidden_size": 40,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "intermediate_size": 56,
    "vocab_size": 263,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [1, 2, 1],
    },
}
RECIPES = {
    "qwen2": OldRecipe("qwen2_vl", seed=41),
    "qwen2.5": OldRecipe("qwen2_5_vl", tied=True, seed=42),
    "odd": OldRecipe(
        "qwen2_5_vl",
        text=_ODD_TEXT,
        vision={
            "hidden_size": 72,
            "num_heads": 2,
            "patch_size": 6,
            "depth": 3,
            "window_size": 37,  # 3 x 3 tokens, and a pixel
            "fullatt_block_indexes": [0],
            "rope_parameters": {"rope_type": "axial", "rope_theta": 300.0},
        },
        seed=43,
    ),
    "omni": OldRecipe("qwen2_5_omni_thinker", seed=44),
}


@dataclass
class OldCase(QwenCase):
    """A checkpoint folder, PyTorch's model of it and ours."""

    positions: str = "mrope"  # or "1d"
    first_pixels: tuple[int, int] | None = None

    def torch_image(self, image: Image.Image) -> tuple[torch.Tensor, list[int]]:
        if self.first_pixels is not None:
            vision = self.torch_model.config.vision_config
            factor = vision.patch_size * vision.spatial_merge_size
            size = reference_resize(image.height, image.width, factor, *self.first_pixels)
            image = image.convert("RGB").resize(size[::-1])
        return super().torch_image(image)

    @torch.no_grad()
    def torch_states(self, prompt: str, image: Image.Image | None = None) -> torch.Tensor:
        """Last hidden states fp32 [L, D] of a filled prompt."""
        model = self.torch_model.model
        model.rope_deltas = None  # of the call before
        inputs = self.torch_inputs(prompt, image)
        if "Omni" in type(model).__name__:
            inputs.pop("mm_token_type_ids", None)
        if self.positions == "mrope":
            return model(**inputs).last_hidden_state[0].float()
        # as gme_inference.py: features into the embeddings, no positions
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        if image is not None:
            features = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            mask = inputs["input_ids"] == self.torch_model.config.image_token_id
            embeds[mask] = features.pooler_output
        mask = inputs["attention_mask"]
        out = model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=None)
        return out.last_hidden_state[0].float()

    def torch_vector(self, prompt: str, image: Image.Image | None = None) -> np.ndarray:
        """fp32 [D], normalised, at the last token of a filled prompt."""
        last = self.torch_states(prompt, image)[-1]
        return torch.nn.functional.normalize(last, dim=-1).numpy()


def build_old(recipe: OldRecipe, folder: Path) -> OldCase:
    """Make, save and wrap a random model."""
    with torch.no_grad():
        model = CLASSES[recipe.kind][1](recipe.config()).eval()
        randomise(model, recipe.seed)
    model.tie_weights()
    model.save_pretrained(folder)
    build_qwen_tokenizer().save_pretrained(folder)
    return OldCase(folder, model)


TEXTS = ["A dog sits.", "Fußball 🎉!"]
IMAGES: list[Any] = [
    picture(70, 45),  # portrait, 9 x 6 tokens of 8 pixels: windows of 4 x 4 are cut off
    picture(40, 56),
    picture(32, 64),  # two whole windows
    picture(6, 200),  # thin, and less than the least
    picture(400, 2),  # 200 to 1
    picture(1, 1),
    picture(3, 100),
    picture(100, 90),  # larger than the cap of 50 tokens
    picture(33, 31, 2),
]
MAX_TOKENS = 50  # all images in the smallest bucket: one program
