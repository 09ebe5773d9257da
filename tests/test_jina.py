"""jina-embeddings-v4's own repository: a Qwen2.5-VL with three adapters and the mean of states."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hf_models import difference
from qwen2_models import IMAGES, MAX_TOKENS, TEXTS, OldCase

from e5v_jax import E5V
from e5v_jax.checkpoints.from_hf import Args, convert
from e5v_jax.checkpoints.hf_source import open_source
from e5v_jax.checkpoints.to_hf import Args as ExportArgs
from e5v_jax.checkpoints.to_hf import convert as export
from e5v_jax.nn.config import UnsupportedModelError

TASKS = ("retrieval", "text-matching", "code")
JINA = {
    "architectures": ["JinaEmbeddingsV4Model"],
    "auto_map": {"AutoModel": "modeling_jina_embeddings_v4.JinaEmbeddingsV4Model"},
    "single_vector_pool_strategy": "mean",
    "multi_vector_projector_dim": 8,
    "matryoshka_dims": [16, 32, 64],
    "task_names": list(TASKS),
    "truncate_dim": None,
    "_attn_implementation": "sdpa",
}
PROJECTIONS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
RANK, ALPHA = 4, 6


def jina_factors(case: OldCase) -> dict[str, np.ndarray]:
    """By the keys of adapter_model.safetensors, whose header public code has written down."""
    rng, found = np.random.default_rng(5), {}
    layers = case.torch_model.model.language_model.layers
    for i, projection, task in itertools.product(range(len(layers)), PROJECTIONS, TASKS):
        rows, columns = layers[i].get_submodule(projection).weight.shape
        start = f"base_model.model.model.language_model.layers.{i}.{projection}"
        for factor, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            array = rng.standard_normal(shape).astype(np.float32) * 0.1
            found[f"{start}.lora_{factor}.{task}.weight"] = array
    for task, (factor, shape) in itertools.product(
        TASKS, {"A": (RANK, 64), "B": (8, RANK)}.items()
    ):
        key = f"base_model.model.multi_vector_projector.lora_{factor}.{task}.weight"
        found[key] = np.ones(shape, np.float32)
    return found


@pytest.fixture(scope="module")
def jina(qwen2: Callable[[str], OldCase], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in that layout: the decoder's fields twice, no model_type, three adapters."""
    case, folder = qwen2("qwen2.5"), tmp_path_factory.mktemp("jina")
    raw = json.loads((case.folder / "config.json").read_text())
    text = raw["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_scaling"] = {"type": "default", "rope_type": "default",
                            "mrope_section": rope["mrope_section"]}  # fmt: skip
    text["rope_theta"] = rope["rope_theta"]
    copies = {name: x for name, x in text.items() if name not in ("model_type", "vocab_size")}
    del raw["model_type"]
    (folder / "config.json").write_text(json.dumps({**copies, **raw, **JINA}))
    tensors = safetensors.numpy.load_file(case.folder / "model.safetensors")
    tensors["multi_vector_projector.weight"] = np.ones((8, 64), np.float32)
    tensors["multi_vector_projector.bias"] = np.ones(8, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in case.folder.glob("*token*"):
        (folder / file.name).symlink_to(file)
    (folder / "adapters").mkdir()
    factors = jina_factors(case)
    safetensors.numpy.save_file(factors, folder / "adapters" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "target_modules": "(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
        "|.*(single_vector_projector|multi_vector_projector).*$)",
        "exclude_modules": ".*visual.*",
    }
    (folder / "adapters" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_jina_equals_torch(
    task: str, jina: Path, qwen2: Callable[[str], OldCase], tmp_path: Path
) -> None:
    """One adapter by the preset, the mean of states; with its prompts and without its projector."""
    case = qwen2("qwen2.5")
    merged = copy.deepcopy(case.torch_model)
    factors = {name: torch.tensor(array) for name, array in jina_factors(case).items()}
    for i, layer in enumerate(merged.model.language_model.layers):
        for projection in PROJECTIONS:
            start = f"base_model.model.model.language_model.layers.{i}.{projection}"
            a, b = (factors[f"{start}.lora_{factor}.{task}.weight"] for factor in "AB")
            layer.get_submodule(projection).weight.data += ALPHA / RANK * b @ a
    case, image = dataclasses.replace(case, torch_model=merged), IMAGES[0]
    start, end = "<|im_start|>user\n", "Describe the image.<|im_end|>\n"
    own = case.torch_states(f"{start}<image>{end}", image)
    before, after = (len(case.tokenizer(text)["input_ids"]) for text in (start, end))
    said = "Query" if task == "text-matching" else "Passage"
    states = [case.torch_states(f"{said}: {TEXTS[0]}"), own[before : len(own) - after]]
    means = torch.stack([one.mean(0) for one in states])
    theirs = torch.nn.functional.normalize(means, dim=-1).numpy()
    name = None if task == "retrieval" else f"jina-embeddings-v4-{task}"
    limits = {"min_pixels": 4 * 64, "max_pixels": MAX_TOKENS * 64}
    model = E5V.from_pretrained(jina, dtype="float32", preset=name, **limits)
    assert model.preset.adapter == task
    assert difference(model.encode([TEXTS[0], image]), theirs) <= 1e-5
    if task == "code":  # converted, the folder keeps all three, and the preset that was told
        convert(Args(src=str(jina), dst=tmp_path / "ours", preset=name))
        again = E5V.from_pretrained(tmp_path / "ours", dtype="float32", **limits)
        assert again.preset.name == name
        assert difference(again.encode(TEXTS[:1]), theirs[:1]) <= 1e-5
        export(ExportArgs(tmp_path / "ours", tmp_path / "theirs"))
        raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
        assert raw["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
        assert raw["model_type"] == "qwen2_5_vl" and not raw.keys() & (
            JINA.keys() - {"architectures", "_attn_implementation"}
        )
        exported = open_source(tmp_path / "theirs")
        weights = dict(merged.model.language_model.named_parameters())
        row = "language_model.layers.1.mlp.up_proj.kernel"
        (found,) = exported.read([row])
        np.testing.assert_allclose(
            found.T, weights["layers.1.mlp.up_proj.weight"].detach(), atol=1e-6
        )
    if task == "retrieval":
        convert(Args(src=str(jina), dst=tmp_path / "merged", merge=True))
        again = E5V.from_pretrained(tmp_path / "merged", dtype="float32", **limits)
        assert not (tmp_path / "merged" / "adapter").exists()
        assert difference(again.encode(TEXTS[:1]), theirs[:1]) <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"truncate_dim": 16}, "truncate_dim is 16: only None is supported"),
        (
            {"single_vector_pool_strategy": "last"},
            "single_vector_pool_strategy is 'last': only 'mean'",
        ),
        (
            {"single_vector_projector_dim": 16},
            "single_vector_projector_dim is 16: this field is not",
        ),
        ({"hidden_size": 32}, "hidden_size is 32, but text_config has 64: make them agree"),
        ({"rope_theta": 5.0}, "rope_theta is 5.0, but text_config has 50000.0: make them agree"),
        ({"model_type": "jina_embeddings_v4"}, "unsupported architecture 'JinaEmbeddingsV4Model'"),
    ],
)
def test_jina_configurations_that_are_refused(
    changes: dict[str, Any], message: str, jina: Path, tmp_path: Path
) -> None:
    raw = {**json.loads((jina / "config.json").read_text()), **changes}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(jina / "model.safetensors")
    with pytest.raises(UnsupportedModelError) as error:
        open_source(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/config.json: {message}")


def test_adapters_of_jina_that_are_not_told(jina: Path, tmp_path: Path) -> None:
    """Another preset has no say in which of them is taken; and they must be there."""
    with pytest.raises(ValueError, match=r"by name \(code, retrieval, text-matching\): choose"):
        E5V.from_pretrained(jina, preset="e5-v")
    for file in jina.iterdir():
        if file.name != "adapters":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(FileNotFoundError, match=f"^{tmp_path}/adapters: neither a PEFT adapter"):
        E5V.from_pretrained(tmp_path)
