"""LLaVA-NeXT with each kind of vision tower against transformers', and what is refused of them."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from flax import nnx
from hf_models import TOWER_RECIPES, Case, picture
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    Dinov2Config,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import abstract_model, load_model
from e5v_jax.dryrun.flops import traced_flops
from e5v_jax.families.llava_next import LLAVA_NEXT
from e5v_jax.families.llava_next.config import LlavaNextConfig
from e5v_jax.families.llava_next.tiling import tile_image
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.nn.vision_config import VisionConfig
from e5v_jax.nn.vision_tower import VisionTower, tower_parameters
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

Llava = Callable[[str], Case]
IMAGES = [picture(70, 45), picture(8, 200)]
BOTH: dict[str, Any] = {"text": "make it blue", "image": picture(61, 33)}
ITEMS: list[Any] = ["A dog sits on Müller's sofa 🎉", *IMAGES, BOTH]
EMPTY = Build(Precision(np.float32, np.float32), Runtime.on(make_mesh(data=-1, fsdp=1)))


@pytest.fixture(scope="module", params=TOWER_RECIPES)
def case(request: pytest.FixtureRequest, llava: Llava) -> Case:
    return llava(request.param)


def test_embeddings_equal_torch(case: Case) -> None:
    """In fp32 to 1e-5, whatever is in the batch."""
    expected = np.concatenate([case.torch_embed([item]) for item in ITEMS])
    cosine = expected @ expected.T - np.eye(len(ITEMS))
    assert cosine.max() < 0.99  # the items are told apart
    found = case.e5v.encode(ITEMS, batch_size=8)
    assert np.abs(found - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["siglip", "dinov2-giant"])
def test_bf16(name: str, llava: Llava) -> None:
    """Against PyTorch in fp32: the error is our rounding alone."""
    case = llava(name)
    items = [IMAGES[0], BOTH]
    expected = np.concatenate([case.torch_embed([item]) for item in items])
    cosine = (case.load("bfloat16").encode(items, batch_size=8) * expected).sum(axis=1)
    assert cosine.min() >= 0.999
    assert cosine.max() < 1 - 1e-6  # it did run in bf16


def pixels_of(case: Case) -> tuple[np.ndarray, torch.Tensor]:
    """One image as our tiles and as transformers' pixel values."""
    config = case.e5v.config
    tiles = tile_image(
        IMAGES[0],
        image_size=config.vision.image_size,
        grid_pinpoints=config.image_grid_pinpoints,
    ).tiles
    return tiles, case.torch_inputs([IMAGES[0]])["pixel_values"][0]


@torch.no_grad()
def test_each_block(case: Case) -> None:
    tower, (tiles, pixels) = case.module.vision_tower, pixels_of(case)
    states = case.torch_model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    found = jax.jit(VisionTower.embed)(tower, tiles)
    depth = max(case.e5v.config.feature_depths)
    assert tower.layers.layer_norm1.scale.shape[0] == depth < len(states)
    step = jax.jit(lambda layers, i, x: jax.tree.map(lambda a: a[i], layers)(x))
    for i, expected in enumerate(states[: depth + 1]):
        assert found.shape == expected.shape
        assert np.abs(np.asarray(found) - expected.numpy()).max() <= 1e-5 * expected.abs().max()
        if i < depth:
            found = step(tower.layers, i, expected.numpy())


def changed_folder(folder: Path, out: Path, change: dict[str, Any], file: str) -> Path:
    """The checkpoint with other values in a JSON file; ``a.b`` is a key inside ``a``."""
    out.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != file and not (out / path.name).exists():
            (out / path.name).symlink_to(path)
    settings = json.loads((folder / file).read_text())
    for key, value in change.items():
        *parents, last = key.split(".")
        inside = settings
        for parent in parents:
            inside = inside[parent]
        inside[last] = value
    (out / file).write_text(json.dumps(settings))
    return out


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "layer"), [("siglip", -2), ("siglip", 1), ("dinov2", -1), ("dinov2", 1)]
)
@pytest.mark.slow
def test_feature_layers(name: str, layer: int, llava: Llava, tmp_path: Path) -> None:
    """What the projector makes of the layer asked for, the class token left out if there is one."""
    case = llava(name)
    folder = changed_folder(case.folder, tmp_path, {"vision_feature_layer": layer}, "config.json")
    module = load_model(open_source(folder), EMPTY)
    tiles, pixels = pixels_of(case)
    found = jax.jit(lambda m, x: m.image_features(x, 1))(module, tiles)[0, :-1]  # [T*P, D]
    model = case.torch_model.model
    states = model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
    first = 0 if case.torch_model.config.vision_feature_select_strategy == "full" else 1
    expected = model.multi_modal_projector(states[:, first:]).flatten(0, 1)
    assert np.abs(np.asarray(found) - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def test_wrong_strategies_fail_in_transformers_too(llava: Llava) -> None:
    """Which is why they are refused by name; see REFUSED."""
    for name, wrong in (("siglip", "default"), ("dinov2", "full"), ("clip-layers", "full")):
        case = llava(name)
        inputs = case.torch_inputs([IMAGES[0]])
        with pytest.raises(RuntimeError, match="size of the tensor"):
            case.torch_model.model.get_image_features(
                inputs["pixel_values"], inputs["image_sizes"], vision_feature_select_strategy=wrong
            )


def convert(source: Path, out: Path) -> Path:
    from_hf.convert(from_hf.Args(str(source), out))
    return out


def test_conversion_and_round_trip(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The converted folder holds what the checkpoint does, and goes back to the same bits."""
    folder = convert(case.folder, tmp_path / "ours")
    ours, source = ConvertedFolder(folder), open_source(case.folder)
    assert ours.config == case.e5v.config == source.config
    names = list(ours.shapes())
    for name, found, expected in zip(names, ours.read(names), source.read(names), strict=True):
        np.testing.assert_array_equal(found, expected, err_msg=name, strict=True)
    to_hf.convert(to_hf.Args(folder, tmp_path / "back"))
    # nor is a head or a mask token missed that the configuration does not ask for
    assert "starts it at random" not in capsys.readouterr().out
    back = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    theirs = case.torch_model.state_dict()
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(back[name], tensor), name
    for file in case.folder.glob("*.json"):
        assert json.loads((tmp_path / "back" / file.name).read_text()) == json.loads(
            file.read_text()
        )


def test_a_converted_folder_embeds_as_the_checkpoint(llava: Llava, tmp_path: Path) -> None:
    case = llava("siglip")
    found = E5V.from_pretrained(convert(case.folder, tmp_path / "ours"), dtype="float32")
    np.testing.assert_array_equal(
        found.encode([BOTH], batch_size=8), case.e5v.encode([BOTH], batch_size=8)
    )


def test_folders_converted_before(llava: Llava, tmp_path: Path) -> None:
    """Which say nothing of the kind of tower, its biases and the pixels' mean: CLIP's."""
    folder = convert(llava("llama-gqa").folder, tmp_path / "ours")
    expected = ConvertedFolder(folder).config
    info = json.loads((folder / "config.json").read_text())
    for name in ("model_type", "qkv_bias", "use_swiglu_ffn", "image_mean", "image_std"):
        del info["model"]["vision"][name]
    (folder / "config.json").write_text(json.dumps(info))
    assert ConvertedFolder(folder).config == expected


def test_pixels_are_normalised_as_the_processor_file_says(llava: Llava, tmp_path: Path) -> None:
    """In either file; without one, or without the key, as the class of transformers does."""
    case = llava("siglip")
    vision = open_source(case.folder).config.vision
    assert (vision.image_mean, vision.image_std) == ((0.5, 0.5, 0.5), (0.5, 0.3, 0.7))
    clip = LlavaNextImageProcessorPil()
    file = "preprocessor_config.json"
    changed_folder(case.folder, tmp_path, {"image_mean": None}, file)
    settings = json.loads((tmp_path / file).read_text())
    for name in ("image_mean", "image_std"):
        del settings[name]
    (tmp_path / file).write_text(json.dumps(settings))
    for _ in range(2):
        vision = open_source(tmp_path).config.vision
        assert (list(vision.image_mean), list(vision.image_std)) == (
            list(clip.image_mean),
            list(clip.image_std),
        )
        (tmp_path / file).unlink(missing_ok=True)
    case.processor.save_pretrained(tmp_path)  # as transformers 5 does, in processor_config.json
    assert open_source(tmp_path).config.vision.image_mean == (0.5, 0.5, 0.5)
    folder = convert(tmp_path, tmp_path / "ours")
    changed_folder(
        folder, folder, {"image_processor.image_mean": [0.4] * 3}, "processor_config.json"
    )
    with pytest.raises(
        ValueError, match=r"image_mean is \[0.4, 0.4, 0.4\]: only \[0.5, 0.5, 0.5\]"
    ):
        ConvertedFolder(folder)


P, C = "preprocessor_config.json", "config.json"
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("siglip", C, {"vision_feature_select_strategy": "default"}, "only 'full' fits a tower"),
    ("dinov2", C, {"vision_feature_select_strategy": "full"}, "only 'default' fits a tower"),
    ("dinov2", C, {"vision_config.model_type": "dinov2_with_registers"}, "'dinov2_with_registers'"),
    ("siglip", C, {"vision_config.model_type": "siglip2_vision_model"}, "'siglip2_vision_model'"),
    ("siglip", C, {"vision_config.num_channels": 1}, "vision_config.num_channels is 1"),
    ("siglip", C, {"vision_config.tie_last_hidden_states": True}, "tie_last_hidden_states is True"),
    ("dinov2", C, {"vision_config.head_dim": 24}, "vision_config.head_dim is 24"),
    ("dinov2", C, {"vision_config.hidden_act": "relu"}, "hidden_act 'relu': expected 'quick_gelu'"),
    ("dinov2", C, {"vision_config.image_size": [28, 42]}, "image_size is [28, 42]"),
    ("siglip", C, {"vision_config.patch_size": 31}, "image_size is 30: less than patch_size 31"),
    ("siglip", C, {"vision_config.num_attention_heads": 5}, "144 is not a multiple of"),
    ("siglip", C, {"vision_config.patch_size": 6}, "patch_embedding.weight: shape [144, 3, 7, 7]"),
    ("dinov2", C, {"vision_config.patch_size": 14}, "shape [48, 3, 7, 7]"),
    ("dinov2", C, {"vision_config.mlp_ratio": 4}, "shape [144], the configuration asks for [192]"),
    ("dinov2", C, {"vision_config.qkv_bias": False}, "key.bias: one too many"),
    ("dinov2", C, {"vision_config.use_swiglu_ffn": True}, "mlp.fc1.bias: one too many"),
    ("dinov2", C, {"vision_config.num_hidden_layers": 2}, "out_features must be"),
    ("dinov2", C, {"vision_config.model_type": "clip_vision_model"}, "image_mean is [0.485, "),
    ("siglip", C, {"vision_feature_layer": [-1, 4]}, "vision_feature_layer is [-1, 4]: expected 1"),
    ("siglip", C, {"vision_feature_layer": []}, "vision_feature_layer is []: expected 1 to 3"),
    ("siglip", C, {"vision_feature_layer": 0}, "vision_feature_layer is 0: expected 1 to 3"),
    ("siglip", C, {"vision_feature_layer": [-1, 1]}, "linear_1.weight: shape [64, 144]"),
    ("siglip", P, {"image_mean": [0.5, 0.5]}, f"{P}: image_mean is [0.5, 0.5]: expected three"),
    ("siglip", P, {"image_mean": 0.5}, f"{P}: image_mean is 0.5: expected three numbers"),
    (
        "siglip",
        P,
        {"image_std": [0.5, 0, 0.5]},
        "image_std is [0.5, 0, 0.5]: expected three numbers",
    ),
    ("dinov2", P, {"image_std": [0.5, math.nan, 0.5]}, "image_std is [0.5, nan, 0.5]: expected"),
    ("dinov2", P, {"resample": 2}, "resample is 2: only 3 is supported"),
    ("dinov2", P, {"rescale_factor": 1 / 127.5}, "rescale_factor is 0.00784"),
    ("siglip", P, {"image_processor_type": "SiglipImageProcessor"}, "image_processor_type is "),
    ("siglip", P, {"size": {"shortest_edge": 28}}, "size is {'shortest_edge': 28}"),
]


@pytest.mark.parametrize(("name", "file", "change", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_refused_by_name(
    name: str, file: str, change: dict[str, Any], message: str, llava: Llava, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        open_source(changed_folder(llava(name).folder, tmp_path, change, file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_original_layout_has_clip_alone(llava: Llava) -> None:
    """Its code deletes SigLIP's last block and resizes tiles in ways of its own."""
    raw = json.loads((llava("siglip").folder / "config.json").read_text())
    original = {
        **raw["text_config"],
        "model_type": "llava_llama",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": raw["image_grid_pinpoints"],
        "mm_hidden_size": 144,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -1,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "vision_config": raw["vision_config"],
    }
    message = "^vision_config.model_type 'siglip_vision_model': beside mm_vision_tower only 'clip"
    with pytest.raises(ValueError, match=message):
        LlavaNextConfig.from_hf(original)


def test_settings_around_the_image_processor(llava: Llava, tmp_path: Path) -> None:
    """How many tokens the processor of transformers counts besides the patches."""
    llava("siglip").processor.save_pretrained(tmp_path)
    for key, value in (
        ("num_additional_image_tokens", 1),
        ("vision_feature_select_strategy", "default"),
    ):
        config = llava("siglip").e5v.config
        settings = json.loads((tmp_path / "processor_config.json").read_text()) | {key: value}
        with pytest.raises(ValueError, match=f"^{key} is {value!r}: only"):
            del settings["image_processor"]
            LLAVA_NEXT.check_preprocessor(config, settings)


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("dinov2", "vision_tower.encoder.layer.0.layer_scale1.lambda1", "drop"),
        ("siglip", "vision_tower.embeddings.patch_embedding.bias", "drop"),
        ("dinov2", "vision_tower.embeddings.cls_token", "nan"),
        ("dinov2", "vision_tower.encoder.layer.0.layer_scale2.lambda1", "nan"),
        ("siglip", "vision_tower.embeddings.register_tokens", "add"),
        ("dinov2", "vision_tower.embeddings.position_embeddings", "short"),
    ],
)
@pytest.mark.slow
def test_bad_weights(name: str, key: str, change: str, llava: Llava, tmp_path: Path) -> None:
    source, out = llava(name).folder, tmp_path / "bad"
    out.mkdir()
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    for path in source.iterdir():
        if path.suffix == ".json":
            (out / path.name).symlink_to(path)
    if change == "drop":
        del tensors[key]
    elif change == "add":
        tensors[key] = np.ones((1, 4, 144), np.float32)
    elif change == "short":
        tensors[key] = np.ascontiguousarray(tensors[key][:, :10])
    else:
        tensors[key].reshape(-1)[3] = np.nan
    safetensors.numpy.save_file(tensors, out / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        convert(out, tmp_path / "ours")
    assert key.removeprefix("vision_tower.") in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "ours").exists()


# --- sizes ---------------------------------------------------------------------------------------

SO400M = SiglipVisionConfig(
    hidden_size=1152,
    intermediate_size=4304,
    num_hidden_layers=27,
    num_attention_heads=16,
    image_size=384,
    patch_size=14,
)


def dinov2(width: int, layers: int, heads: int, **more: Any) -> Dinov2Config:
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=518,
        **more,
    )


PUBLISHED = {
    "siglip-so400m": (SO400M, 27),
    "siglip-so400m, 26 blocks": (SO400M, 26),
    "dinov2-small": (dinov2(384, 12, 6), 12),
    "dinov2-base": (dinov2(768, 12, 12), 11),
    "dinov2-large": (dinov2(1024, 24, 16), 24),
    "dinov2-giant": (dinov2(1536, 40, 24, use_swiglu_ffn=True), 40),
    "clip-vit-large-336": (
        CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        23,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_towers(name: str) -> None:
    hf, depth = PUBLISHED[name]
    config = VisionConfig.from_hf(hf)
    with torch.device("meta"):
        theirs = AutoModel.from_config(hf)
    sizes = {key: x.numel() for key, x in theirs.named_parameters()}
    rows = tower_parameters(config, depth)
    stored = sum(
        math.prod(row.shape) * (1 if row.layers is None else row.layers + row.unused_layers)
        for row in rows
    )
    assert stored == sum(sizes.values())  # what an export holds
    unused = ("post_layernorm.", "layernorm.", "head.", "embeddings.mask_token")
    layers = [f".{i}." for i in range(depth, hf.num_hidden_layers)]
    needed = {
        key: size
        for key, size in sizes.items()
        if not key.startswith(unused) and not any(layer in key for layer in layers)
    }
    module = jax.eval_shape(lambda: VisionTower(config, (depth,), EMPTY, rngs=nnx.Rngs(0)))
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module)))
    assert found == sum(needed.values())


@pytest.mark.parametrize("depths", [-1, (-2, 3)], ids=["one", "two"])
@pytest.mark.parametrize("name", ["siglip-so400m", "dinov2-base", "dinov2-giant"])
def test_image_cost_is_that_of_the_program(name: str, depths: Any) -> None:
    """To the last multiplication, on a TPU, where one block of queries holds those of a tile."""
    base = LLAVA_NEXT.architectures["llava-next-mistral-7b"]
    vision = VisionConfig.from_hf(PUBLISHED[name][0])
    side = vision.image_size
    config = LlavaNextConfig(base.text, vision, depths, 32000, ((side, 2 * side),))
    precision = Precision(jnp.bfloat16, jnp.bfloat16)
    runtime = dataclasses.replace(EMPTY.runtime, platform="tpu")
    build = dataclasses.replace(EMPTY, precision=precision, runtime=runtime)
    graph, state = nnx.split(abstract_model(LLAVA_NEXT, config, build))
    tiles = jax.ShapeDtypeStruct((3, side, side, 3), jnp.uint8)

    def run(state: nnx.State, tiles: jax.Array) -> jax.Array:
        features: jax.Array = nnx.merge(graph, state).image_features(tiles, 1)
        return features

    found = traced_flops(jax.make_jaxpr(run)(state, tiles))
    assert found == LLAVA_NEXT.image_cost(config, 1, 3, 2).flops
