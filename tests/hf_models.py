"""Random tiny models made with transformers, saved like a checkpoint, and PyTorch's embeddings.

Nothing stays at a neutral value: norms are not ones, biases not zeros, epsilons are large enough to
count, so that a mistake anywhere moves the embedding by far more than the tolerance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from e5v_jax import E5V
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.encode.e5v import Dtype
from e5v_jax.families.llava_next.model import LlavaNext
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

# The prompts of E5-V once more, so that a change in e5v_jax.prompts shows.
TEMPLATES = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n \n",
    "mistral": "[INST] {} [/INST]",
    "vicuna": "A chat between a curious human and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the human's questions. USER: {} "
    "ASSISTANT:",
    "chatml": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}
CHAT_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": (),
    "vicuna": (),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def prompt_of(item: Any, template: str) -> tuple[str, Image.Image | None]:
    """The filled prompt and the image of a str, an image, or ``{"text": ..., "image": ...}``."""
    if isinstance(item, dict):
        inside = (
            f'<image>Modify this image with "{item["text"]}", desribe modified image in one word:'
        )
        image = item["image"]
    elif isinstance(item, str):
        inside, image = f"{item}\nSummary above sentence in one word: ", None
    else:
        inside, image = "<image>\nSummary above image in one word: ", item
    head, tail = TEMPLATES[template].split("{}")
    if inside.endswith(" ") and tail.startswith(" "):
        inside = inside[:-1]  # "word: [/INST]", one space
    return head + inside + tail, image


def build_tokenizer(template: str, *, with_image: bool = True) -> PreTrainedTokenizerFast:
    """Bytes as tokens, then BOS, EOS, the template's chat tokens and ``<image>``, the last id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", *CHAT_TOKENS[template], *(["<image>"] if with_image else [])]
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    tokenizer.pad_token = "</s>"
    if template == "vicuna":
        tokenizer.chat_template = "USER: {{ messages[0]['content'] }} ASSISTANT:"
    return tokenizer


TextConfig = LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config
TEXT_MODELS: dict[type[TextConfig], Any] = {
    LlamaConfig: LlamaForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}


@dataclass(frozen=True)
class Recipe:
    """One random model. Small numbers that all differ, so that no two axes can be mixed up."""

    text_class: type[TextConfig] = LlamaConfig
    template: str = "llama3"
    text: dict[str, Any] = field(default_factory=dict)
    tower: type[CLIPVisionConfig] | type[SiglipVisionConfig] | type[Dinov2Config] = CLIPVisionConfig
    vision: dict[str, Any] = field(default_factory=dict)
    feature_layer: int | list[int] = -2
    image_mean: tuple[float, float, float] | None = None  # None leaves the processor's file out
    tied: bool = False
    pinpoints: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # in tiles
    seed: int = 0

    def text_config(self) -> TextConfig:
        options: dict[str, Any] = {
            "vocab_size": 277,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 0.02,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            "tie_word_embeddings": self.tied,
            "attn_implementation": "eager",
        }
        if self.text_class is MistralConfig:
            options["sliding_window"] = None
        return self.text_class(**{**options, **self.text})

    def llava_config(self) -> LlavaNextConfig:
        options: dict[str, Any] = {
            "hidden_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "image_size": 28,
            "patch_size": 7,
            "layer_norm_eps": 0.03,
            "attn_implementation": "eager",
        }
        if self.tower is not Dinov2Config:
            options["intermediate_size"] = 80
        if self.tower is CLIPVisionConfig:
            options["hidden_act"] = "quick_gelu"
        vision: Any = self.tower(**{**options, **self.vision})
        image_token: Any = build_tokenizer(self.template).convert_tokens_to_ids("<image>")
        side = vision.image_size
        return LlavaNextConfig(
            vision_config=vision,
            text_config=self.text_config(),
            image_token_index=image_token,
            image_grid_pinpoints=[[side * h, side * w] for h, w in self.pinpoints],
            vision_feature_layer=self.feature_layer,
            vision_feature_select_strategy=(
                "full" if self.tower is SiglipVisionConfig else "default"
            ),
            tie_word_embeddings=self.tied,
            attn_implementation="eager",  # type: ignore[call-arg]  # one of every configuration
        )


RECIPES = {
    "llama-gqa": Recipe(),
    "llama-tied": Recipe(
        text={"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 72},
        vision={"num_hidden_layers": 2, "hidden_act": "gelu"},
        tied=True,
        seed=1,
    ),
    "mistral": Recipe(
        MistralConfig,
        "mistral",
        text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "vocab_size": 288},
        vision={"num_hidden_layers": 2},
        seed=2,
    ),
    "vicuna": Recipe(  # no grouped queries
        template="vicuna",
        text={
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision={"image_size": 30, "patch_size": 6, "hidden_act": "gelu"},
        seed=3,
    ),
    "wide-heads": Recipe(  # 5 heads of 24 and one of keys: 120 columns for a width of 65
        text={
            "head_dim": 24,
            "hidden_size": 65,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "vocab_size": 263,
        },
        vision={"num_hidden_layers": 4, "image_size": 21},
        pinpoints=((2, 2), (1, 2), (3, 1), (1, 4), (2, 3)),
        seed=4,
    ),
    "narrow-heads": Recipe(
        MistralConfig,
        "mistral",
        text={
            "head_dim": 8,
            "num_hidden_layers": 2,
            "vocab_size": 259,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision={"num_attention_heads": 6},
        tied=True,
        seed=5,
    ),
}

TOWER_RECIPES = {
    "siglip": Recipe(  # two heads of 72; two pixels of a tile's side belong to no patch
        tower=SiglipVisionConfig,
        vision={"hidden_size": 144, "num_attention_heads": 2, "image_size": 30},
        feature_layer=-1,
        image_mean=(0.5, 0.5, 0.5),
        seed=20,
    ),
    "siglip-headless": Recipe(
        MistralConfig,
        "mistral",
        tower=SiglipVisionConfig,
        vision={"vision_use_head": False, "hidden_act": "gelu", "patch_size": 14},
        text={"vocab_size": 288},
        feature_layer=[-2, 3, 1],
        image_mean=(0.1, 0.9, 0.4),
        seed=11,
    ),
    "dinov2": Recipe(
        tower=Dinov2Config,
        vision={"mlp_ratio": 3},
        feature_layer=-2,
        image_mean=(0.485, 0.456, 0.406),
        seed=12,
    ),
    "dinov2-giant": Recipe(
        tower=Dinov2Config,
        vision={
            "use_swiglu_ffn": True,
            "qkv_bias": False,
            "use_mask_token": False,
            "hidden_size": 40,
            "num_attention_heads": 5,
            "image_size": 22,
        },
        tied=True,
        feature_layer=1,
        seed=13,
    ),
    "clip-layers": Recipe(feature_layer=[-1, -3], seed=24),
}
"""Of each kind of tower; ``llava_config`` says which feature layers go with them."""

TEXT_RECIPES = {
    "llama": Recipe(template="chatml", text={"vocab_size": 261}, seed=6),
    "llama-tied": Recipe(template="chatml", tied=True, seed=7),
    "mistral": Recipe(MistralConfig, "mistral", text={"head_dim": 24}, seed=8),
    "qwen2": Recipe(Qwen2Config, "chatml", seed=14),
    "qwen3-tied": Recipe(Qwen3Config, "chatml", text={"head_dim": 24}, tied=True, seed=15),
}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near one, biases and norms far from zero and one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            noise = 0.5 + torch.rand(parameter.shape, generator=generator)
        elif name.endswith("bias"):
            noise = 0.5 * noise
        elif name.endswith(("position_embeddings", "cls_token")):
            pass  # which DINOv2 has with three axes
        elif parameter.ndim > 1 and "embedding.weight" not in name and "embed_tokens" not in name:
            noise = 1.2 * noise / parameter[0].numel() ** 0.5
        elif "patch_embedding" in name:
            noise = noise / parameter[0].numel() ** 0.5
        parameter.copy_(noise)


@dataclass
class Case:
    """A checkpoint folder, PyTorch's model of it and ours."""

    folder: Path
    template: str
    torch_model: Any
    image_options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.folder, padding_side="left")

    @cached_property
    def processor(self) -> LlavaNextProcessor:
        config = self.torch_model.config
        side = config.vision_config.image_size
        strategy = config.vision_feature_select_strategy
        return LlavaNextProcessor(
            image_processor=LlavaNextImageProcessorPil(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_grid_pinpoints=config.image_grid_pinpoints,
                **self.image_options,
            ),
            tokenizer=self.tokenizer,
            patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=1 if strategy == "default" else 0,  # CLS
        )

    def torch_inputs(self, items: list[Any]) -> dict[str, torch.Tensor]:
        """What the reference's processor makes of items that all have an image, or all none."""
        prompts, images = zip(*(prompt_of(item, self.template) for item in items), strict=True)
        if images[0] is None:
            return dict(self.tokenizer(list(prompts), return_tensors="pt", padding=True))
        return dict(
            self.processor(
                text=list(prompts), images=list(images), return_tensors="pt", padding=True
            )
        )

    @torch.no_grad()
    def torch_embed(self, items: list[Any]) -> np.ndarray:
        """fp32 [N, D], normalised, of one left-padded batch, as the authors compute it."""
        inputs = self.torch_inputs(items)
        inputs.pop("token_type_ids", None)
        out = self.torch_model(**inputs, output_hidden_states=True, return_dict=True)
        last = out.hidden_states[-1][:, -1].float()  # [N, D]
        return torch.nn.functional.normalize(last, dim=-1).numpy()

    def load(self, dtype: Dtype = "float32") -> E5V:
        """A fresh E5V of the folder."""
        return E5V.from_pretrained(self.folder, dtype=dtype)

    @cached_property
    def e5v(self) -> E5V:
        """In fp32, shared by the tests of a session: do not change it."""
        return self.load()

    @cached_property
    def module(self) -> LlavaNext:
        """The flax module in fp32, for tests of its parts."""
        precision = Precision(param=np.float32, compute=np.float32)
        runtime = Runtime.on(make_mesh(data=-1, fsdp=1))
        return load_model(open_source(self.folder), Build(precision, runtime))


def build_llava(recipe: Recipe, folder: Path) -> Case:
    """Make, save and wrap a random LLaVA-NeXT model."""
    config = recipe.llava_config()
    model = LlavaNextForConditionalGeneration(config).eval()
    case = _save(model, recipe, folder, with_image=True)
    if recipe.image_mean is not None:
        case.image_options = {"image_mean": list(recipe.image_mean), "image_std": [0.5, 0.3, 0.7]}
        case.processor.image_processor.save_pretrained(folder)
    return case


def build_text(recipe: Recipe, folder: Path) -> Case:
    """Make, save and wrap a random text-only model."""
    config = recipe.text_config()
    model = TEXT_MODELS[recipe.text_class](config).eval()
    return _save(model, recipe, folder, with_image=False)


def _save(model: Any, recipe: Recipe, folder: Path, *, with_image: bool) -> Case:
    randomise(model, recipe.seed)
    model.tie_weights()
    model.save_pretrained(folder)
    build_tokenizer(recipe.template, with_image=with_image).save_pretrained(folder)
    return Case(folder, recipe.template, model)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A colour ramp with noise: every tile, row, column and channel looks different."""
    rng = np.random.default_rng([height, width, seed])
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramp = np.stack([255 * y, 255 * x, 255 * (1 - x * y)], axis=-1)  # [H, W, 3]
    noise = rng.uniform(-90, 90, (height, width, 3))
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


DOWN = "language_model.layers.mlp.down_proj.kernel"
EMBED = "language_model.embed_tokens"
NORM = "language_model.norm.scale"


@contextmanager
def changed(model: E5V, name: str, new: Callable[[Any], Any]) -> Iterator[None]:
    """Another parameter in a loaded model, for a while."""
    (leaf,) = (x for path, x in nnx.to_flat_state(model._state) if ".".join(map(str, path)) == name)
    before = leaf.get_value()
    leaf.set_value(new(before))
    yield
    leaf.set_value(before)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest of any entry, of fp32 arrays of one shape."""
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    return float(np.abs(ours - theirs).max())
