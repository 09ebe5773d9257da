"""convert.from_hf: every layout of a Hugging Face checkpoint gives the same converted folder."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_models import TEXT_RECIPES, Case, build_text, build_tokenizer, picture
from transformers import AutoTokenizer

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf
from e5v_jax.checkpoints.converted import ConvertedFolder, read_info
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.families.llava_next.config import (
    ORIGINAL_IMAGE_TOKEN,
    LlavaNextConfig,
    transformers_layout,
)
from e5v_jax.nn.config import UnsupportedModelError, transformers_config
from e5v_jax.nn.text_config import TextConfig

Llava = Callable[[str], Case]
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint keeps its five sections."""

    text: str
    head: str
    vision: str
    projector: str
    newline: str
    original: bool = False  # the original LLaVA code's config and projector names
    old: bool = False  # transformers 4's config, and buffers that it saved


V4 = Layout(
    "language_model.model.",
    "language_model.",
    "vision_tower.vision_model.",
    "multi_modal_projector.",
    "",
    old=True,
)
LAYOUTS = {
    "1-transformers-4": V4,
    "1-transformers-5-saved": Layout(
        "language_model.model.", "language_model.", "vision_tower.", "multi_modal_projector.", ""
    ),
    "2-in-memory": Layout(
        "model.language_model.", "", "model.vision_tower.", "model.multi_modal_projector.", "model."
    ),
    "2-with-vision_model": Layout(
        "model.language_model.",
        "",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.",
    ),
    "3-original": Layout(
        "model.",
        "",
        "model.vision_tower.vision_tower.vision_model.",
        "model.mm_projector.",
        "model.",
        original=True,
    ),
}


def sections(folder: Path) -> dict[str, Tensors]:
    """The tensors that transformers 5.23 saved, by section and name inside it."""
    found: dict[str, Tensors] = {
        name: {} for name in ("text", "head", "vision", "projector", "newline")
    }
    prefixes = {
        "language_model.model.": "text",
        "language_model.": "head",
        "vision_tower.": "vision",
        "multi_modal_projector.": "projector",
        "model.": "text",
        "": "newline",
    }
    for key, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        prefix = next(p for p in prefixes if key.startswith(p))
        section = "head" if key == "lm_head.weight" else prefixes[prefix]
        found[section][key.removeprefix(prefix)] = array
    return found


def rename(parts: dict[str, Tensors], layout: Layout) -> Tensors:
    """A checkpoint in ``layout``."""
    tensors = {}
    for section, arrays in parts.items():
        for name, array in arrays.items():
            if section == "projector" and layout.original:
                name = name.replace("linear_1", "0").replace("linear_2", "2")
            tensors[getattr(layout, section) + name] = array
    if layout.old or layout.original:  # buffers that old versions saved
        positions = np.arange(17)[None]  # int64
        tensors[layout.vision + "embeddings.position_ids"] = positions
    if layout.old:
        inv_freq = np.ones(8, np.float32)
        tensors[layout.text + "layers.0.self_attn.rotary_emb.inv_freq"] = inv_freq
    return tensors


def old_config(config: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it: rope_theta on top, defaults left out, torch_dtype."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text["rope_scaling"] = None
    for key in ("attention_bias", "mlp_bias", "hidden_act"):
        text.pop(key, None)
    config["torch_dtype"] = config.pop("dtype")
    return config


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """As the original LLaVA code writes it: a Llama config with ``mm_*`` fields."""
    text = old_config(config)["text_config"]
    return {
        **text,
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": config["image_grid_pinpoints"],
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "a/tiny-one",
        "vision_config": config["vision_config"],
        "torch_dtype": "float32",
    }


def save(tensors: Tensors, folder: Path, *, sharded: bool) -> None:
    """One file, or three shards with an index; every third key to another one."""
    folder.mkdir(parents=True, exist_ok=True)
    if not sharded:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    keys = sorted(tensors)
    weight_map = {}
    for n in range(3):
        name = f"model-{n + 1:05}-of-00003.safetensors"
        safetensors.numpy.save_file({k: tensors[k] for k in keys[n::3]}, folder / name)
        weight_map.update(dict.fromkeys(keys[n::3], name))
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def copy_tokenizer(case: Case, folder: Path) -> None:
    for file in case.folder.glob("tokenizer*"):
        shutil.copy(file, folder)


def write_layout(case: Case, folder: Path, layout: Layout, *, sharded: bool) -> None:
    """Rewrite the checkpoint of ``case`` in another layout."""
    save(rename(sections(case.folder), layout), folder, sharded=sharded)
    config = json.loads((case.folder / "config.json").read_text())
    if layout.original:
        config = original_config(config)
    elif layout.old:
        config = old_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer(case.template, with_image=not layout.original)
    tokenizer.save_pretrained(folder)


def convert(src: Path, dst: Path, **options: Any) -> ConvertedFolder:
    from_hf.convert(from_hf.Args(str(src), dst, **options))
    return ConvertedFolder(dst)


@pytest.fixture(scope="module")
def plain(llava: Llava, tmp_path_factory: pytest.TempPathFactory) -> ConvertedFolder:
    """What transformers saved, converted."""
    return convert(llava("llama-gqa").folder, tmp_path_factory.mktemp("plain") / "c")


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_convert_to_the_same_parameters(
    llava: Llava, plain: ConvertedFolder, tmp_path: Path, name: str, sharded: bool
) -> None:
    write_layout(llava("llama-gqa"), tmp_path / "src", LAYOUTS[name], sharded=sharded)
    found = convert(tmp_path / "src", tmp_path / "dst")
    assert found.info.content_hash == plain.info.content_hash
    assert found.info.model == plain.info.model
    unused = [safetensors.numpy.load_file(f.folder / "unused.safetensors") for f in (found, plain)]
    assert unused[0].keys() == unused[1].keys()
    assert len(unused[0]) == 1 + 16 + 2  # lm_head, the last vision block, post_layernorm
    for key in unused[0]:
        np.testing.assert_array_equal(unused[0][key], unused[1][key])


def test_values_reach_their_parameters(llava: Llava, plain: ConvertedFolder) -> None:
    """The hash above only says that layouts agree; this says with what."""
    model = llava("llama-gqa").torch_model.model
    layer = model.language_model.layers[1]
    block = model.vision_tower.encoder.layers[1]
    expected = {
        "language_model.embed_tokens": model.language_model.embed_tokens.weight,
        "language_model.layers.1.mlp.down_proj.kernel": layer.mlp.down_proj.weight.T,
        "language_model.layers.1.input_layernorm.scale": layer.input_layernorm.weight,
        "vision_tower.layers.1.self_attn.v_proj.bias": block.self_attn.v_proj.bias,
        "multi_modal_projector.linear_2.kernel": model.multi_modal_projector.linear_2.weight.T,
        "image_newline": model.image_newline,
    }
    for name, array in zip(expected, plain.read(list(expected)), strict=True):
        np.testing.assert_array_equal(array, expected[name].detach().numpy())
    patches = model.vision_tower.embeddings.patch_embedding.weight.detach().numpy()
    (kernel,) = plain.read(["vision_tower.patch_embedding.kernel"])  # [3 * p * p, D]
    np.testing.assert_array_equal(kernel[7 * 7 + 2 * 7 + 3], patches[:, 1, 2, 3])
    assert plain.info.dtype == "float32"
    assert plain.info.model["text"]["rope_theta"] == 500000.0


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen3-tied"])
def test_text_only_layouts(tmp_path: Path, name: str, prefix: str, sharded: bool) -> None:
    case = build_text(TEXT_RECIPES[name], tmp_path / "hf")
    expected = convert(case.folder, tmp_path / "expected")
    save(rename(sections(case.folder), Layout(prefix, "", "", "", "")), tmp_path / "src",
         sharded=sharded)  # fmt: skip
    config = json.loads((case.folder / "config.json").read_text())
    (tmp_path / "src" / "config.json").write_text(json.dumps(old_config(config)))
    copy_tokenizer(case, tmp_path / "src")
    found = convert(tmp_path / "src", tmp_path / "dst")
    assert found.info.content_hash == expected.info.content_hash
    assert found.info.model == expected.info.model
    assert (found.folder / "unused.safetensors").is_file() == ("tied" not in name)  # lm_head
    assert found.config.modalities == ("text",)


def test_old_config_with_another_theta_is_read(llava: Llava) -> None:
    """10000 is the default of transformers: a reader that misses rope_theta would still pass."""
    config = json.loads((llava("llama-gqa").folder / "config.json").read_text())
    for theta in (1e6, 1e4):
        config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        assert LlavaNextConfig.from_hf(config).text.rope_theta == theta
        assert LlavaNextConfig.from_hf(old_config(config)) == LlavaNextConfig.from_hf(config)
        original = LlavaNextConfig.from_hf(original_config(config))
        assert original.text.rope_theta == theta


@pytest.mark.parametrize("kind", ["llama3", "dynamic"])
def test_original_config_keeps_its_scaling(llava: Llava, kind: str) -> None:
    """In what an export makes of it for transformers too; nothing there is ours alone."""
    raw = original_config(json.loads((llava("llama-gqa").folder / "config.json").read_text()))
    raw["rope_scaling"] = {"rope_type": kind, "factor": 8.0}
    if kind == "llama3":
        raw["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 64}  # fmt: skip
    config = LlavaNextConfig.from_hf(raw)
    exported = transformers_layout(raw, config)
    text = transformers_config(exported, "llava_next").text_config
    assert text.rope_parameters["rope_type"] == kind
    assert TextConfig.from_hf(text) == config.text
    assert (config.text.rope_scaling is None) == (kind == "dynamic")
    known = {"qkv_bias", "qk_norm", "mrope_section", "mrope_interleaved", "sliding_window"}
    assert not known & exported["text_config"].keys()


def test_original_config_names_its_tower(llava: Llava) -> None:
    """The real ones have no vision_config, only the name of OpenAI's tower."""
    config = original_config(json.loads((llava("llama-gqa").folder / "config.json").read_text()))
    del config["vision_config"]
    config |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    config["image_grid_pinpoints"] = [[336, 672]]
    vision = LlavaNextConfig.from_hf(config).vision
    assert vision is not None
    assert (vision.num_hidden_layers, vision.hidden_size, vision.num_patches) == (24, 1024, 576)
    config["mm_vision_tower"] = "google/siglip-so400m-patch14-384"
    with pytest.raises(UnsupportedModelError, match="siglip-so400m"):
        LlavaNextConfig.from_hf(config)


# config.json of lmms-lab/llama3-llava-next-8b, and what liuhaotian/llava-v1.6-vicuna-7b has besides
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "anyres",
    "image_crop_resolution": 224,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_split_resolution": 224,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "mm_hidden_size": 1024,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava_llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 8192,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "vision_tower_pretrained": None,
    "vocab_size": 128256,
}
OLDER = {
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "model_type": "llava",
    "pretrain_mm_mlp_adapter": None,
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": True,
}


def test_published_configs_of_the_original_code() -> None:
    for config in (PUBLISHED, {**PUBLISHED, **OLDER}):
        found = LlavaNextConfig.from_hf(config)
        assert (found.text.rope_theta, found.vision.num_patches) == (500000.0, 576)
        assert found.image_token_id == ORIGINAL_IMAGE_TOKEN


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mm_patch_merge_type": ...}, "mm_patch_merge_type is not there, which means 'flat'"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'"),
        ({"mm_patch_merge_type": "spatial_unpad_nobase"}, "mm_patch_merge_type is "),
        ({"mm_projector_type": ...}, "mm_projector_type is not there, which means 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "mm_projector_type is 'mlp3x_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
        ({"image_aspect_ratio": ...}, "image_aspect_ratio is not there, which means 'square'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'"),
        ({"mm_hidden_size": 1152}, "mm_hidden_size is 1152: the tower's vectors have 1024"),
        ({"s2": True}, "s2 is True"),
        ({"mm_frobnicate": 1}, "mm_frobnicate is 1: this key is not known"),
        ({"mm_vision_select_layer": ...}, "no 'mm_vision_select_layer'"),
        ({"mm_vision_select_layer": -26}, "vision_feature_layer is -26: expected 1 to 24"),
        ({"mm_vision_select_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\]"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints is "),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints is "),
        ({"image_grid_pinpoints": [[336, 700]]}, "multiples of the tower's image_size 336"),
    ],
)
def test_original_config_says_something_else(change: dict[str, Any], expected: str) -> None:
    """What LLaVA's code makes of a key, or of its absence, is refused unless it is done here."""
    config = {key: value for key, value in {**PUBLISHED, **change}.items() if value is not ...}
    with pytest.raises(ValueError, match=expected):
        LlavaNextConfig.from_hf(config)


def test_original_keys_of_no_importance() -> None:
    """A feature is "patch" where nothing says so; the newline's place is that of videos."""
    expected = LlavaNextConfig.from_hf(PUBLISHED)
    config = {**PUBLISHED, "mm_newline_position": "no_token", "add_faster_video": True}
    del config["mm_vision_select_feature"], config["mm_resampler_type"]
    assert LlavaNextConfig.from_hf(config) == expected


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "relu"), ("model_type", "siglip_vision_model")]
)
def test_original_vision_config_is_checked(llava: Llava, key: str, value: str) -> None:
    """As that of transformers' layout is: once it was taken as it stood."""
    config = original_config(json.loads((llava("llama-gqa").folder / "config.json").read_text()))
    config["vision_config"] = {**config["vision_config"], key: value}
    with pytest.raises(UnsupportedModelError, match=f"vision_config.{key} '{value}'"):
        LlavaNextConfig.from_hf(config)


def test_original_llava_embeds_images(llava: Llava, tmp_path: Path) -> None:
    case = llava("llama-gqa")
    write_layout(case, tmp_path / "src", LAYOUTS["3-original"], sharded=False)
    assert "<image>" not in AutoTokenizer.from_pretrained(tmp_path / "src").get_vocab()
    folder = convert(tmp_path / "src", tmp_path / "dst")
    tokenizer = AutoTokenizer.from_pretrained(folder.folder)
    ids = tokenizer("<s>a<image>b", add_special_tokens=False)["input_ids"]
    assert ids[2] == folder.config.image_token_id == len(tokenizer) - 1
    model = E5V.from_pretrained(folder.folder, dtype="float32")
    for item in (picture(40, 60), "A dog sits."):
        reference = case.torch_embed([item])
        np.testing.assert_allclose(model.encode([item]), reference, atol=1e-5)
    assert read_info(folder.folder).model["image_token_id"] == tokenizer.convert_tokens_to_ids(
        "<image>"
    )


def test_original_llava_whose_tokenizer_has_image(llava: Llava, tmp_path: Path) -> None:
    """Then that id counts, whatever the size of the embedding table."""
    write_layout(llava("llama-gqa"), tmp_path / "src", LAYOUTS["3-original"], sharded=False)
    tokenizer = build_tokenizer("llama3")
    tokenizer.add_tokens(["<more>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "src")
    folder = convert(tmp_path / "src", tmp_path / "dst")
    assert folder.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "src" / name).read_bytes()


@pytest.mark.parametrize("with_images", [False, True])
def test_a_folder_of_format_1_is_read(llava: Llava, tmp_path: Path, with_images: bool) -> None:
    """Which knew one family, and text-only models as that family without its tower."""
    source = (
        llava("llama-gqa") if with_images else build_text(TEXT_RECIPES["llama"], tmp_path / "hf")
    )
    folder = convert(source.folder, tmp_path / "dst").folder
    expected = ConvertedFolder(folder)
    info = json.loads((folder / "config.json").read_text())
    del info["model_type"]
    info["format_version"] = 1
    if not with_images:
        nothing = {"image_token_id": None, "image_grid_pinpoints": [], "vision_feature_layer": -2}
        info["model"] |= {"vision": None, **nothing}
    (folder / "config.json").write_text(json.dumps(info))
    found = ConvertedFolder(folder)
    assert found.info == expected.info
    assert (found.family, found.config) == (expected.family, expected.config)


def test_large_tokenizers_of_mistral_are_left_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers warns of a pattern that it keeps; we keep it too, without a word."""
    tokenizer = build_tokenizer("mistral")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {f"more{i}": 1000 + i for i in range(100_000)}
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    found = load_tokenizer(tmp_path)("It's 3:45, naïve.")["input_ids"]
    assert "regex" not in caplog.text
    assert found == AutoTokenizer.from_pretrained(tmp_path)("It's 3:45, naïve.")["input_ids"]
    assert "incorrect regex pattern" in caplog.text  # of transformers' own loading


def test_dtype(llava: Llava, tmp_path: Path) -> None:
    case = llava("llama-gqa")
    plain = convert(case.folder, tmp_path / "fp32")
    found = convert(case.folder, tmp_path / "bf16", dtype="bfloat16")
    assert found.info.dtype == "bfloat16"
    name = "language_model.layers.2.mlp.up_proj.kernel"
    (full,), (half,) = plain.read([name]), found.read([name])
    np.testing.assert_array_equal(half, full.astype(ml_dtypes.bfloat16))
    unused = safetensors.numpy.load_file(tmp_path / "bf16" / "unused.safetensors")
    assert {array.dtype.name for array in unused.values()} == {"bfloat16"}
    # the widest of a mixed checkpoint: no value is lost
    tensors = rename(sections(case.folder), V4)
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key].astype(ml_dtypes.bfloat16)
    save(tensors, tmp_path / "mixed", sharded=False)
    shutil.copy(case.folder / "config.json", tmp_path / "mixed")
    copy_tokenizer(case, tmp_path / "mixed")
    assert convert(tmp_path / "mixed", tmp_path / "m").info.dtype == "float32"


def test_files_beside_the_model_are_left_alone(llava: Llava, tmp_path: Path) -> None:
    """Mistral's repositories hold the weights once more, under other names."""
    case = llava("llama-gqa")
    shutil.copytree(case.folder, tmp_path / "src")
    other = {"layers.0.attention.wq.weight": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(other, tmp_path / "src" / "consolidated.safetensors")
    (tmp_path / "src" / "training_args.bin").write_bytes(b"pickle")
    assert open_source(tmp_path / "src").shapes() == open_source(case.folder).shapes()
    found = convert(tmp_path / "src", tmp_path / "dst")
    assert not list(found.folder.glob("*.bin"))
    assert (found.folder / "tokenizer.json").read_bytes() == (
        case.folder / "tokenizer.json"
    ).read_bytes()
    assert json.loads((found.folder / "hf_config.json").read_text()) == json.loads(
        (case.folder / "config.json").read_text()
    )
