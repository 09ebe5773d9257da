"""convert.to_hf and adapters: what transformers and peft load is what was converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from hf_models import TEXT_RECIPES, Case, build_text, build_tokenizer, picture
from peft import LoraConfig, PeftModel, get_peft_model
from test_convert import LAYOUTS, copy_tokenizer, write_layout
from transformers import (
    AutoModelForCausalLM,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)

from e5v_jax import E5V
from e5v_jax.checkpoints import from_hf, to_hf
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.loading import abstract_model, dotted
from e5v_jax.checkpoints.peft import Adapter, read_adapter, write_adapter
from e5v_jax.checkpoints.tokenizer import TOKENIZER_FILES
from e5v_jax.nn.layers import Build, LoRAConfig, LoRAParam, Precision
from e5v_jax.runtime import Runtime
from e5v_jax.sharding import make_mesh
from e5v_jax.train import checkpoint, identity
from e5v_jax.train.config import TrainConfig

Llava = Callable[[str], Case]


def import_(src: Path, dst: Path, **options: Any) -> Path:
    from_hf.convert(from_hf.Args(str(src), dst, **options))
    return dst


def export(src: Path, dst: Path, **options: Any) -> Path:
    to_hf.convert(to_hf.Args(src, dst, **options))
    return dst


def load(folder: Path) -> PreTrainedModel:
    """As a user would; nothing missing, nothing left over, and no tensor of the wrong shape."""
    text_only = json.loads((folder / "config.json").read_text())["model_type"] != "llava_next"
    cls = AutoModelForCausalLM if text_only else LlavaNextForConditionalGeneration
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def assert_equal(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Every tensor, by name, to the bit."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.fixture(params=["llama-gqa", "llama-tied", *(f"text {name}" for name in TEXT_RECIPES)])
def case(request: pytest.FixtureRequest, llava: Llava, tmp_path: Path) -> Case:
    """LLaVA-NeXT and text-only, untied and tied."""
    kind, _, name = request.param.rpartition(" ")
    return build_text(TEXT_RECIPES[name], tmp_path / "hf") if kind else llava(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_round_trip_is_exact(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    source = case.folder
    if dtype != torch.float32:
        source = tmp_path / "source"
        load(case.folder).to(dtype).save_pretrained(source)
        copy_tokenizer(case, source)
    back = export(import_(source, tmp_path / "ours"), tmp_path / "back")
    assert_equal(load(back), load(source))
    for file in source.iterdir():  # config.json, generation_config.json, the tokenizer
        if file.suffix == ".json":
            expected = json.loads(file.read_text())
            for part in ("text_config", "vision_config"):  # transformers' .to(dtype) forgets them
                if "dtype" in expected.get(part, {}):
                    expected[part]["dtype"] = expected["dtype"]
            assert json.loads((back / file.name).read_text()) == expected
    assert {file.name for file in back.iterdir()} <= {
        "config.json",
        "model.safetensors",
        *TOKENIZER_FILES,
        *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
        *("1_Pooling", "2_Normalize"),  # test_sentence_transformers.py
        "README.md",  # test_model_card.py
    }


def test_mistral_round_trip(llava: Llava, tmp_path: Path) -> None:
    source = llava("mistral").folder
    back = export(import_(source, tmp_path / "ours"), tmp_path / "back")
    assert_equal(load(back), load(source))


def test_shards(llava: Llava, tmp_path: Path) -> None:
    source = ConvertedFolder(import_(llava("llama-gqa").folder, tmp_path / "ours"))
    (tmp_path / "back").mkdir()
    limit = 100_000
    to_hf.write_hf(tmp_path / "back", source, None, shard_bytes=limit)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    seen = {}
    for file in files:
        tensors = safetensors.numpy.load_file(file)
        assert sum(array.nbytes for array in tensors.values()) <= limit
        seen.update(dict.fromkeys(tensors, file.name))
        with safetensors.safe_open(file, "numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
    model = load(tmp_path / "back")
    assert_equal(model, llava("llama-gqa").torch_model)
    total = sum(4 * parameter.numel() for parameter in model.parameters())
    assert index == {"metadata": {"total_size": total}, "weight_map": seen}
    assert total / limit <= len(files) <= 1.5 * total / limit


def test_cast_folder_says_its_dtype(llava: Llava, tmp_path: Path) -> None:
    case = llava("llama-gqa")
    ours = import_(case.folder, tmp_path / "ours", dtype="bfloat16")
    found = load(export(ours, tmp_path / "back"))
    assert found.dtype == torch.bfloat16
    assert_equal(found, load(case.folder).to(torch.bfloat16))


def test_original_llava_becomes_llava_next(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = llava("llama-gqa")
    write_layout(case, tmp_path / "src", LAYOUTS["3-original"], sharded=True)
    back = export(import_(tmp_path / "src", tmp_path / "ours"), tmp_path / "back")
    found = load(back)
    assert_equal(found, case.torch_model)
    image = picture(40, 60)
    exported = Case(back, case.template, found)
    np.testing.assert_allclose(
        exported.torch_embed([image]), case.torch_embed([image]), atol=1e-6
    )  # same config too: the weights alone would not give that
    assert "embedding table" not in capsys.readouterr().out


def test_image_token_outside_the_table_is_said(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in lmms-lab's checkpoints; transformers would fail with an IndexError."""
    case = llava("llama-gqa")
    write_layout(case, tmp_path / "src", LAYOUTS["3-original"], sharded=False)
    tokenizer = build_tokenizer(case.template, with_image=False)
    tokenizer.add_tokens([f"<{i}>" for i in range(277 - len(tokenizer))], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "src")  # as long as the table: <image> is the next
    back = export(import_(tmp_path / "src", tmp_path / "ours"), tmp_path / "back")
    assert "resize_token_embeddings(278)" in capsys.readouterr().out
    assert load(back).config.image_token_id == 277


def test_missing_lm_head_is_said(
    llava: Llava, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = llava("llama-gqa")
    case.torch_model.model.language_model.save_pretrained(tmp_path / "src")
    copy_tokenizer(case, tmp_path / "src")
    export(import_(tmp_path / "src", tmp_path / "ours"), tmp_path / "back")
    assert "the source had no lm_head.weight," in capsys.readouterr().out
    with pytest.raises(AssertionError, match=r"missing_keys.*lm_head\.weight"):
        load(tmp_path / "back")


# Adapters ------------------------------------------------------------------------------------


@torch.no_grad()
def make_peft(case: Case, folder: Path, **options: Any) -> PeftModel:
    """A peft model of the checkpoint with random factors; its adapter is saved in ``folder``."""
    if case.torch_model.config.model_type == "llava_next":  # or the tower's q_proj has them too
        targets = r"model\.language_model.*\.(q_proj|o_proj|down_proj)"
    else:
        targets = ["q_proj", "o_proj", "down_proj"]
    config = LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets, **options})
    model = get_peft_model(load(case.folder), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def random_adapter(ours: Path, rank: int = 3) -> Adapter:
    """Factors for every linear map of every layer, none of them zero."""
    source = ConvertedFolder(ours)
    lora = LoRAConfig(rank=rank, alpha=5.0, dropout=0.1)
    precision = Precision(param=np.float32, compute=np.float32)
    build = Build(precision, Runtime.on(make_mesh()), lora)
    model = abstract_model(source.family, source.config, build, load_vision=False)
    rng = np.random.default_rng(0)
    return Adapter(
        lora,
        {
            dotted(path): rng.normal(0, 0.2, leaf.shape).astype(np.float32)
            for path, leaf in nnx.to_flat_state(nnx.split(model, LoRAParam, ...)[1])
        },
    )


def assert_close(found: torch.nn.Module, expected: torch.nn.Module, atol: float) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_merge_equals_peft(case: Case, tmp_path: Path, use_rslora: bool) -> None:
    model = make_peft(case, tmp_path / "adapter", use_rslora=use_rslora)
    expected = model.merge_and_unload()
    start = load(case.folder).state_dict()
    moved = [k for k, v in expected.state_dict().items() if (v - start[k]).abs().max() > 1e-2]
    layers = case.torch_model.config.get_text_config().num_hidden_layers
    assert len(moved) == 3 * layers
    ours = import_(case.folder, tmp_path / "ours")
    exported = export(ours, tmp_path / "exported", adapter=tmp_path / "adapter")
    assert_close(load(exported), expected, 1e-6)
    merged = import_(case.folder, tmp_path / "merged", adapter=tmp_path / "adapter", merge=True)
    assert not (merged / "adapter").exists()
    assert_equal(load(export(merged, tmp_path / "back")), load(exported))


def test_carried_adapter_is_merged_or_written(llava: Llava, tmp_path: Path) -> None:
    case = llava("llama-gqa")
    model = make_peft(case, tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.pt").write_bytes(b"large")  # of a training checkpoint
    ours = import_(case.folder, tmp_path / "ours", adapter=tmp_path / "adapter")
    assert {f.name for f in (ours / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    image = picture(40, 60)
    expected = Case(case.folder, case.template, model).torch_embed([image])
    assert np.abs(expected - case.torch_embed([image])).max() > 1e-2
    encoded = E5V.from_pretrained(ours, dtype="float32").encode([image])
    np.testing.assert_allclose(encoded, expected, atol=1e-5)
    merged = load(export(ours, tmp_path / "merged", merge=True))
    np.testing.assert_allclose(
        Case(case.folder, case.template, merged).torch_embed([image]), expected, atol=1e-5
    )
    again = PeftModel.from_pretrained(
        load(case.folder), export(ours, tmp_path / "peft", peft=True)
    ).eval()
    np.testing.assert_allclose(
        Case(case.folder, case.template, again).torch_embed([image]), expected, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_adapter_in_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """As most published ones are; NumPy has no bfloat16 of its own."""
    case = build_text(TEXT_RECIPES["llama"], tmp_path / "hf")
    make_peft(case, tmp_path / "wide").to(dtype).save_pretrained(tmp_path / "adapter")
    stored = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    reference = PeftModel.from_pretrained(load(case.folder), tmp_path / "adapter").eval()
    expected = Case(case.folder, case.template, reference).torch_embed(["A dog sits."])
    assert np.abs(expected - case.torch_embed(["A dog sits."])).max() > 1e-2
    merged = import_(case.folder, tmp_path / "merged", adapter=tmp_path / "adapter", merge=True)
    for folder, options in ((case.folder, {"adapter": tmp_path / "adapter"}), (merged, {})):
        model = E5V.from_pretrained(folder, dtype="float32", **options)
        np.testing.assert_allclose(model.encode(["A dog sits."]), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"layers_to_transform": 2, "layers_pattern": "layers", "target_modules": ["v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": r".*layers\.[02]\.self_attn\..*"},
    ],
    ids=["some layers", "one layer", "all but one", "pattern"],
)
def test_adapter_of_some_modules(tmp_path: Path, options: dict[str, Any]) -> None:
    case = build_text(TEXT_RECIPES["llama"], tmp_path / "hf")
    model = make_peft(case, tmp_path / "adapter", **options)
    merged = import_(case.folder, tmp_path / "merged", adapter=tmp_path / "adapter", merge=True)
    expected = model.merge_and_unload()
    assert_close(load(export(merged, tmp_path / "back")), expected, 1e-6)


def test_merge_rounds_once(llava: Llava, tmp_path: Path) -> None:
    """The sum is taken in fp32 and rounded to the stored dtype, to nothing else before."""
    case = llava("llama-gqa")
    half = tmp_path / "half"
    load(case.folder).to(torch.bfloat16).save_pretrained(half)
    copy_tokenizer(case, half)
    make_peft(case, tmp_path / "adapter")
    base = load(half).float()  # bf16 values, fp32 arithmetic
    exact = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload().state_dict()
    ours = import_(half, tmp_path / "ours")
    found = load(export(ours, tmp_path / "out", adapter=tmp_path / "adapter")).state_dict()
    for name, tensor in exact.items():
        differs = found[name] != tensor.to(torch.bfloat16)
        # of two fp32 sums that differ in their last bit, one in thousands falls on the other side
        assert differs.float().mean() < 1e-3, name
    wide = import_(half, tmp_path / "wide", dtype="float32", adapter=tmp_path / "adapter",
                   merge=True)  # fmt: skip
    for name, tensor in load(export(wide, tmp_path / "out32")).state_dict().items():
        torch.testing.assert_close(tensor, exact[name], atol=1e-6, rtol=0)


def test_peft_loads_our_adapter(case: Case, tmp_path: Path) -> None:
    ours = import_(case.folder, tmp_path / "ours")
    adapter = random_adapter(ours)
    source = ConvertedFolder(ours)
    write_adapter(tmp_path / "adapter", adapter, source.table)
    folder = export(ours, tmp_path / "peft", adapter=tmp_path / "adapter", peft=True)
    assert {f.name for f in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model = PeftModel.from_pretrained(load(case.folder), folder).eval()
    result = model.load_adapter(folder, "again")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    factors = {n: p for n, p in model.named_parameters() if "lora_" in n and ".default." in n}
    assert len(factors) == 2 * 7 * ConvertedFolder(ours).config.text.num_hidden_layers
    assert all(p.abs().max() > 0 for p in factors.values())
    assert not any("vision_tower" in name for name in factors)
    item = picture(40, 60) if "image" in source.config.modalities else "A dog sits."
    expected = Case(case.folder, case.template, model).torch_embed([item])
    found = E5V.from_pretrained(ours, adapter=folder, dtype="float32").encode([item])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # and what is read back is what was written
    again = read_adapter(folder, source.table)
    assert again.lora == adapter.lora
    for path, values in adapter.values.items():
        np.testing.assert_array_equal(again.values[path], values)


@pytest.mark.parametrize("peft", [False, True], ids=["merge", "peft"])
def test_adapter_of_a_training_run(llava: Llava, tmp_path: Path, peft: bool) -> None:
    case = llava("llama-gqa")
    ours = import_(case.folder, tmp_path / "ours")
    adapter = random_adapter(ours)
    run = TrainConfig(model=ours, output=tmp_path / "run", lora=adapter.lora)
    identity.write_run_info(run.output, identity.run_info(run, "hash", "data"))
    with checkpoint.open_checkpoints(run) as checkpoints:
        flat = [(tuple(p.split(".")), LoRAParam(v)) for p, v in adapter.values.items()]
        state = nnx.from_flat_state(flat)
        checkpoints.save(4, state, optax.EmptyState(), {"i": 1}, last=True)
    out = export(ours, tmp_path / "out", adapter=tmp_path / "run", peft=peft)
    write_adapter(tmp_path / "adapter", adapter, ConvertedFolder(ours).table)
    reference = PeftModel.from_pretrained(load(case.folder), tmp_path / "adapter")
    found = PeftModel.from_pretrained(load(case.folder), out).merge_and_unload() if peft else None
    assert_close(found or load(out), reference.merge_and_unload(), 1e-6)
    if peft:
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(case.folder)
