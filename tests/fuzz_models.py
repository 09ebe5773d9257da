"""Malformed and unusual model files, made from a seed: what fuzz_outcomes.py looks at."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import test_gguf

from e5v_jax.checkpoints.gguf import CONFIG_KEYS

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 10**12, 2**64, 0.5, -0.5, 1.0, 1e30, 1e-30),
    *(float("nan"), float("inf"), float("-inf"), "", "64", "none", "é" * 300),
    *([], [1], ["a"], [[28, 56]], [[28.0, 56]], {}, {"a": 1}, {"rope_type": "linear"}),
)
NOT_OBJECTS = ("", "{", "null", "[]", '"x"', "3", "\ufeff{}", "[" * 100_000, '{"a":' * 990 + "1")
# Nobody computes with these: transformers may refuse a value, or fail later for it.
DONT_CARE = (
    *("architectures", "pad_token_id", "bos_token_id", "eos_token_id", "transformers_version"),
    *("dtype", "torch_dtype", "use_cache", "initializer_range", "pretraining_tp"),
    *("image_seq_length", "projection_dim", "attention_dropout", "_name_or_path"),
    *("task_type", "base_model_name_or_path", "megatron_config"),
)


@dataclass(frozen=True)
class Bad:
    """One case: which files are changed, and how."""

    kind: str
    name: str
    change: Callable[[Path], object]  # of a copy of the files

    @property
    def dont_care(self) -> bool:
        """Whether what is changed is listed as of no importance."""
        return self.name.split(" ")[0].split(".")[-1] in DONT_CARE


# --- how files are changed ------------------------------------------------------------------------


def edit_json(file: str, path: str, value: Any, folder: Path) -> None:
    """Set a value at a dotted path of keys; ``...`` removes it."""
    content = json.loads((folder / file).read_text())
    *parents, last = path.split(".")
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        place.pop(last, None)
    else:
        place[last] = value
    (folder / file).write_text(json.dumps(content))


def write(file: str, content: str | bytes, folder: Path) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file: str, part: float, folder: Path) -> None:
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(part * len(whole))])


def flip(file: str, part: float, folder: Path) -> None:
    whole = bytearray((folder / file).read_bytes())
    whole[int(part * (len(whole) - 1))] ^= 0x55
    (folder / file).write_bytes(whole)


def replace(file: str, kind: str, folder: Path) -> None:
    """Something else of the name of a file: nothing, a folder or a pipe."""
    if (folder / file).is_dir():
        shutil.rmtree(folder / file)
    else:
        (folder / file).unlink()
    if kind == "folder":
        (folder / file).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / file)


def edit_tensors(
    file: str, change: Callable[[dict[str, np.ndarray]], object], folder: Path
) -> None:
    tensors = safetensors.numpy.load_file(folder / file)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})


def short(value: Any) -> str:
    text = "(no key)" if value is ... else json.dumps(value)
    return text if len(text) < 30 else f"{text[:27]}..."


def values_of(kind: str, file: str, paths: list[str], values: tuple[Any, ...]) -> Iterator[Bad]:
    for path, value in product(paths, (*values, ...)):
        yield Bad(kind, f"{path} {short(value)}", partial(edit_json, file, path, value))


def files_of(kind: str, files: list[str]) -> Iterator[Bad]:
    """What can be wrong with any file of JSON."""
    for file in files:
        for text in NOT_OBJECTS:
            yield Bad(kind, f"{file} holds {text[:9]!r}", partial(write, file, text))
        yield Bad(kind, f"{file} holds bytes", partial(write, file, bytes(range(128, 256))))
        for part in (0.3, 0.7, 0.99):
            yield Bad(kind, f"{file} cut at {part}", partial(cut, file, part))
        for what in ("nothing", "folder", "pipe"):
            yield Bad(kind, f"{file} is {what}", partial(replace, file, what))


# --- the cases ------------------------------------------------------------------------------------

TEXT_KEYS = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters"),
    *("rope_parameters.rope_theta", "rope_parameters.rope_type", "rope_parameters.factor"),
    *("rope_theta", "rope_scaling", "max_position_embeddings", "model_type", "hidden_act"),
    *("attention_bias", "mlp_bias", "sliding_window", "tie_word_embeddings", "architectures"),
    *("pad_token_id", "attention_dropout", "initializer_range", "partial_rotary_factor"),
]
VISION_KEYS = [
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size", "layer_norm_eps", "hidden_act", "num_channels", "model_type"),
]
LLAVA_KEYS = [
    *("text_config", "vision_config", "vision_feature_layer", "image_token_index"),
    *("image_grid_pinpoints", "vision_feature_select_strategy", "projector_hidden_act"),
    *("multimodal_projector_bias", "image_seq_length", "model_type"),
    *(f"vision_config.{key}" for key in VISION_KEYS),
    *(f"text_config.{key}" for key in ("head_dim", "rms_norm_eps", "hidden_size", "model_type")),
]
ORIGINAL_KEYS = [
    *("mm_patch_merge_type", "mm_projector_type", "mm_vision_select_feature", "mm_vision_tower"),
    *("mm_vision_select_layer", "image_aspect_ratio", "image_grid_pinpoints", "mm_hidden_size"),
    *("mm_use_im_start_end", "mm_resampler_type", "mm_newline_position", "s2", "mm_frobnicate"),
    *("tune_mm_mlp_adapter", "mm_use_im_patch_token", "tokenizer_model_max_length"),
]
IMAGE_KEYS = [
    *("image_mean", "image_std", "rescale_factor", "resample", "do_normalize", "do_rescale"),
    *("do_resize", "do_convert_rgb", "do_center_crop", "do_pad", "size", "crop_size"),
    *("image_grid_pinpoints", "image_processor_type", "frobnicate"),
]
ADAPTER_KEYS = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "bias"),
    *("layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "init_lora_weights"),
    *("modules_to_save", "rank_pattern", "alpha_pattern", "peft_type", "task_type"),
    *("fan_in_fan_out", "frobnicate", "megatron_config", "base_model_name_or_path"),
]
CONVERTED_KEYS = [
    *("format_version", "model_type", "model", "dtype", "content_hash", "parameters", "source"),
    *("model.text", "model.text.rope_theta", "model.text.num_hidden_layers", "model.frobnicate"),
    *("model.text.rms_norm_eps", "model.text.head_dim", "revision", "frobnicate"),
]
GGUF_VALUES: tuple[Any, ...] = (
    *(None, 0, 1, 3, 2**31, 0.5, -0.5, 1e30, float("nan"), float("inf"), "x", True),
    *([1], ["a"]),
)
GGUF_KEYS = [*CONFIG_KEYS, "llama.attention.key_length", "llama.frobnicate", "split.count"]
GGUF_TOKENIZER_KEYS = [
    *("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"),
    *("padding_token_id", "add_bos_token", "scores"),
]
NUMBERS = (float("nan"), float("inf"), float("-inf"))
DOWN = "model.layers.1.mlp.down_proj.weight"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
TARGETS: tuple[Any, ...] = (
    ("target_modules", ["q_proj"]),
    ("target_modules", ["q_proj", "o_proj", "down_proj", "up_proj"]),
    ("target_modules", r".*\.(q_proj|o_proj|down_proj)"),
    ("target_modules", r".*layers\.[01]\..*(q_proj|o_proj|down_proj)"),
    ("target_modules", "all-linear"),
    ("target_modules", "("),
    ("exclude_modules", ["v_proj"]),
    ("exclude_modules", ["model.layers.0.self_attn.q_proj"]),
    ("exclude_modules", ".*down_proj"),
    ("layers_to_transform", [0, 1, 2]),
    ("layers_to_transform", [0]),
    ("layers_to_transform", [0, 1, 2, 9]),
    ("lora_alpha", 2.5),
    ("lora_alpha", -7),
)


def put(key: str, index: tuple[int, ...], value: float, tensors: dict[str, np.ndarray]) -> None:
    tensors[key] = tensors[key].copy()
    tensors[key][index] = value


def rename(old: str, new: str, tensors: dict[str, np.ndarray]) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


def rename_some(old: str, new: str, tensors: dict[str, np.ndarray]) -> None:
    key = next(key for key in sorted(tensors) if old in key)
    tensors[key.replace(old, new)] = tensors.pop(key)


def cast(dtype: Any, tensors: dict[str, np.ndarray]) -> None:
    tensors.update({key: array.astype(dtype) for key, array in tensors.items()})


def tensors_of(kind: str, file: str, key: str) -> Iterator[Bad]:
    edit = partial(partial, edit_tensors, file)
    for number in NUMBERS:
        yield Bad(kind, f"{key} has a {number}", edit(partial(put, key, (0, 1), number)))
        yield Bad(kind, f"{key} ends in {number}", edit(partial(put, key, (-1, -1), number)))
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float64, np.int8, bool):
        name = np.dtype(dtype).name
        yield Bad(kind, f"all in {name}", edit(partial(cast, dtype)))
    for part in (0.0, 0.001, 0.02, 0.5, 0.999):
        yield Bad(kind, f"{file} cut at {part}", partial(cut, file, part))
    for part in (0.0, 0.0001, 0.001, 0.004, 0.01):
        yield Bad(kind, f"{file} flipped at {part}", partial(flip, file, part))
    for what in ("nothing", "folder", "pipe"):
        yield Bad(kind, f"{file} is {what}", partial(replace, file, what))


def all_cases() -> dict[str, list[Bad]]:
    """Every case that can be, by kind."""
    config, image = "config.json", "preprocessor_config.json"
    adapter, factors = "adapter_config.json", "adapter_model.safetensors"
    names = [
        ("layers.1.", "layers.01."),
        ("model.model.layers", "model.layers"),
        ("model.model.layers", "model.language_model.model.layers"),
        ("model.model.layers", "model.model.language_model.layers"),
        ("base_model.model.", ""),
        ("layers.0.", "layers.9."),
        (".weight", ".default.weight"),
        ("lora_A", "lora_C"),
    ]
    edit = partial(partial, edit_tensors, factors)
    return {
        "config": [
            *values_of("config", config, TEXT_KEYS, ODD),
            *files_of("config", [config]),
        ],
        "llava config": list(values_of("llava config", config, LLAVA_KEYS, ODD)),
        "original config": list(
            values_of("original config", config, ORIGINAL_KEYS, (*ODD, "one_token", "perceiver"))
        ),
        "preprocessor": [
            *values_of("preprocessor", image, IMAGE_KEYS, (*ODD, 28, [0.5, 0.5, 0.5])),
            *files_of("preprocessor", [image]),
        ],
        "processor": [
            *(
                Bad("processor", f"image_processor.{path} {short(value)}", change)
                for path, value in product(IMAGE_KEYS, ODD)
                for change in [partial(edit_json, "processor_config.json",
                                       f"image_processor.{path}", value)]
            ),
            *values_of(
                "processor",
                "processor_config.json",
                ["image_processor", "patch_size", "image_token", "num_additional_image_tokens",
                 "vision_feature_select_strategy", "processor_class", "image_mean"],
                ODD,
            ),
            *files_of("processor", ["processor_config.json"]),
        ],
        "adapter": [
            *values_of("adapter", adapter, ADAPTER_KEYS, (*ODD, 10**9)),
            *(
                Bad("adapter", f"{key} {short(value)}", partial(edit_json, adapter, key, value))
                for key, value in TARGETS
            ),
            *files_of("adapter", [adapter]),
            *tensors_of("adapter", factors, LORA),
            *(
                Bad("adapter", f"{how.__name__} {old} to {new}", edit(partial(how, old, new)))
                for old, new in names
                for how in (rename, rename_some)
            ),
        ],
        "weights": [
            *tensors_of("weights", "model.safetensors", DOWN),
            *files_of("weights", ["model.safetensors.index.json"]),
        ],
        "tokenizer": [
            *files_of("tokenizer", ["tokenizer.json", "tokenizer_config.json"]),
            *files_of("tokenizer", ["special_tokens_map.json"]),
            *values_of("tokenizer", "tokenizer.json",
                       ["model", "model.vocab", "model.merges", "model.type", "added_tokens",
                        "pre_tokenizer", "post_processor", "normalizer", "version"], ODD),
            *values_of("tokenizer", "tokenizer_config.json",
                       ["tokenizer_class", "bos_token", "eos_token", "chat_template",
                        "add_bos_token", "fix_mistral_regex", "extra_special_tokens"], ODD),
        ],
        "gguf": list(gguf_cases()),
        "converted": [
            *values_of("converted", config, CONVERTED_KEYS, ODD),
            *files_of("converted", [config]),
            *(
                Bad("converted", f"params/{file} {what}", partial(damage_params, file, what))
                for file in ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt",
                             "state/d", "state", ".")
                for what in ("cut", "nothing", "empty")
            ),
        ],
    }  # fmt: skip


def damage_params(file: str, what: str, folder: Path) -> None:
    target = folder / "params" / file
    files = [target] if target.is_file() else sorted(f for f in target.rglob("*") if f.is_file())
    if what == "nothing" and target.is_dir():
        shutil.rmtree(target)
        return
    for one in files:
        if what == "nothing":
            one.unlink()
        else:
            one.write_bytes(one.read_bytes()[: 7 if what == "cut" else 0])


def rewrite_gguf(key: str, value: Any, folder: Path) -> None:
    test_gguf.write(folder / "model.gguf", {key: value})


def edit_gguf(change: Callable[[dict[str, np.ndarray]], object], folder: Path) -> None:
    tensors = test_gguf.gguf_tensors(test_gguf.hf_weights())
    change(tensors)
    test_gguf.write(folder / "model.gguf", tensors=tensors)


def gguf_cases() -> Iterator[Bad]:
    keys = [*GGUF_KEYS, *(f"tokenizer.ggml.{key}" for key in GGUF_TOKENIZER_KEYS)]
    for key, value in product(keys, GGUF_VALUES):
        yield Bad("gguf", f"{key} {short(value)}", partial(rewrite_gguf, key, value))
    for name in ("blk.1.ffn_down.weight", "token_embd.weight", "output_norm.weight"):
        for number in NUMBERS:
            index = (0,) if "norm" in name else (1, 2)
            change = partial(edit_gguf, partial(put, name, index, number))
            yield Bad("gguf", f"{name} has a {number}", change)
        change = partial(edit_gguf, partial(rename, name, "other"))
        yield Bad("gguf", f"{name} has another name", change)
    for part in (0.0, 0.001, 0.01, 0.1, 0.5, 0.999):
        yield Bad("gguf", f"model.gguf cut at {part}", partial(cut, "model.gguf", part))
        yield Bad("gguf", f"model.gguf flipped at {part}", partial(flip, "model.gguf", part / 9))
    for what in ("nothing", "folder", "pipe"):
        yield Bad("gguf", f"model.gguf is {what}", partial(replace, "model.gguf", what))


def draw(seed: int, count: int | None) -> list[Bad]:
    """``count`` cases of each kind, the same for a seed, or all."""
    chosen = []
    for kind, cases in all_cases().items():
        generator = random.Random(f"{seed} {kind}")
        chosen += generator.sample(cases, min(len(cases), count or len(cases)))
    return chosen
