"""GGUF reading: the real SmolLM2 against transformers' own reader, and files written here."""

import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as QType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from e5v_jax.checkpoints.gguf import GGUFError, GGUFTensors, read_config
from e5v_jax.checkpoints.gguf_tokenizer import build_tokenizer
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.nn.config import UnsupportedModelError

# head_dim * heads differs from hidden_size; every size is different, so that no swap goes unseen
HIDDEN, INTER, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 160, 4, 2, 24, 2
BYTES = list(bytes_to_unicode().values())
BPE_TOKENS = [*BYTES, "ab", "abc", "<s>", "</s>", "<pad>", "<|im_start|>"]  # "abc": not by merges
VOCAB = len(BPE_TOKENS)
METADATA: dict[str, Any] = {
    "llama.vocab_size": VOCAB,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INTER,
    "llama.block_count": LAYERS,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.rope.freq_base": 12345.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": BPE_TOKENS,
    "tokenizer.ggml.token_type": [1] * (VOCAB - 4) + [3] * 4,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": VOCAB - 4,
    "tokenizer.ggml.eos_token_id": VOCAB - 3,
    "tokenizer.ggml.padding_token_id": VOCAB - 2,
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
PIECES += ["▁", "a", "b", "c", "d", "ab", "▁ab", "cd", "▁abcd", "abcd"]
SENTENCEPIECE: dict[str, Any] = {
    "llama.vocab_size": len(PIECES),
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.merges": None,
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(PIECES) - 259)],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": None,
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp convert_hf_to_gguf.py, LlamaModel.permute: Hugging Face row order -> GGUF's."""
    out, rest = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, rest).swapaxes(1, 2).reshape(out, rest)


def hf_weights(vocab: int = VOCAB) -> dict[str, np.ndarray]:
    """Random weights of a whole untied model, with the names and shapes of LlamaForCausalLM."""
    rng = np.random.default_rng(0)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocab, HIDDEN),
    }
    for i in range(LAYERS):
        block = f"model.layers.{i}."
        shapes |= {
            block + "input_layernorm.weight": (HIDDEN,),
            block + "self_attn.q_proj.weight": (q, HIDDEN),
            block + "self_attn.k_proj.weight": (kv, HIDDEN),
            block + "self_attn.v_proj.weight": (kv, HIDDEN),
            block + "self_attn.o_proj.weight": (HIDDEN, q),
            block + "post_attention_layernorm.weight": (HIDDEN,),
            block + "mlp.gate_proj.weight": (INTER, HIDDEN),
            block + "mlp.up_proj.weight": (INTER, HIDDEN),
            block + "mlp.down_proj.weight": (HIDDEN, INTER),
        }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def gguf_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What llama.cpp's converter makes of ``hf_weights``: its names come from gguf's own table."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    tensors = {}
    for key, weight in weights.items():
        if ".q_proj." in key or ".k_proj." in key:
            weight = permute(weight, HEADS if ".q_proj." in key else KV_HEADS)
        name = names.get_name(key, try_suffixes=(".weight",))
        assert name is not None
        tensors[name] = weight
    return tensors


def write(
    path: Path,
    changes: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    *,
    architecture: str = "llama",
    stored_as: QType = QType.F32,
    order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file of METADATA with ``changes`` (None drops a key), matrices in ``stored_as``."""
    writer = gguf.GGUFWriter(path, architecture, endianess=order)
    add: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        bool: writer.add_bool,
        list: writer.add_array,
    }
    for key, value in (METADATA | (changes or {})).items():
        if value is not None:
            add[type(value)](key, value)
    for name, weight in (gguf_tensors(hf_weights()) if tensors is None else tensors).items():
        if weight.ndim == 2 and stored_as != QType.F32:
            writer.add_tensor(name, gguf.quantize(weight, stored_as), raw_dtype=stored_as)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write(tmp_path / "tiny.gguf")


def one_line(error: pytest.ExceptionInfo[Exception], path: Path) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message


# --- the real SmolLM2 -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def oracle(smollm2_gguf: Path) -> dict[str, torch.Tensor]:
    """transformers' own reading of the file, all tensors in float32."""
    folder, name = smollm2_gguf.parent, smollm2_gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.fixture(scope="session")
def oracle_tokenizer(smollm2_gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


def test_smollm2_tensors_equal_transformers(
    smollm2_gguf: Path, oracle: dict[str, torch.Tensor]
) -> None:
    tensors = GGUFTensors(smollm2_gguf)
    expected = set(oracle) - {"lm_head.weight"}  # tied: transformers lists it all the same
    assert sorted(tensors.keys()) == sorted(expected)
    for key in expected:
        assert tensors.shape(key) == tuple(oracle[key].shape), key
    chosen = [k for k in expected if not re.search(r"layers\.(?!0\.|14\.|29\.)", k)]
    assert len(chosen) == 3 * 9 + 2
    for key in chosen:
        found = tensors.read(key)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, oracle[key].numpy(), err_msg=key)


def test_smollm2_config_equals_transformers(smollm2_gguf: Path) -> None:
    config = read_config(smollm2_gguf)
    expected = AutoConfig.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    assert config.pop("architectures") == ["LlamaForCausalLM"]
    assert config.pop("rope_theta") == expected.rope_parameters["rope_theta"] == 100000.0
    for key, value in config.items():
        assert value == getattr(expected, key), key
    text = TextModelConfig.from_hf(read_config(smollm2_gguf)).text
    assert (text.rope_theta, text.head_dim, text.num_key_value_heads) == (100000.0, 64, 3)


TEXTS = [
    "",
    "A dog sits.",
    " leading and trailing ",
    "It's 3:45 on 12/05/2023, $1,234.56 (100%)!",
    "two  spaces,\ttab\nnew line\n\n\n  indented",
    "naïve café, Größe, 日本語のテキスト, Привет, مرحبا 😀👩‍👩‍👧",
    "<|im_start|>user\nSummary above sentence in one word: <|im_end|>\n<|im_start|>assistant\n",
    "a<|endoftext|>b <repo_name> <file_sep>x<|im_start|><not_special> <|im_start",
    "def f(x):\n    return x ** 2  # comment",
]


def test_smollm2_token_ids_equal_transformers(
    smollm2_gguf: Path, oracle_tokenizer: Any, shared: Path
) -> None:
    tokenizer = build_tokenizer(smollm2_gguf)
    rows = (shared / "data/nli/triplets.csv").read_text("utf-8").splitlines()
    for text in TEXTS + rows[::20]:
        assert tokenizer(text).input_ids == oracle_tokenizer(text).input_ids, text


def test_smollm2_special_tokens(smollm2_gguf: Path, oracle_tokenizer: Any) -> None:
    tokenizer = build_tokenizer(smollm2_gguf)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template"):
        assert getattr(tokenizer, name) == getattr(oracle_tokenizer, name), name
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert sorted(tokenizer.all_special_ids) == list(range(17))
    assert tokenizer("<|im_start|>user").input_ids[0] == 1
    assert len(tokenizer) == 49152
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        oracle_tokenizer.apply_chat_template(chat, tokenize=False)
    )


@pytest.mark.parametrize("with_config", [False, True])
def test_smollm2_tokenizer_survives_saving(
    smollm2_gguf: Path, tmp_path: Path, with_config: bool
) -> None:
    tokenizer = build_tokenizer(smollm2_gguf)
    tokenizer.save_pretrained(tmp_path)
    if with_config:  # a model_type of "llama" may make AutoTokenizer choose another class
        (tmp_path / "config.json").write_text(json.dumps(read_config(smollm2_gguf)))
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids, text
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.all_special_ids == tokenizer.all_special_ids
    assert again.chat_template == tokenizer.chat_template
    assert again.padding_side == "right"


def test_reading_needs_no_torch(tiny: Path) -> None:
    program = (
        "import sys; from e5v_jax.checkpoints.gguf import *\n"
        "from e5v_jax.checkpoints.gguf_tokenizer import *\n"
        f"p = {str(tiny)!r}; t = GGUFTensors(p); t.read(t.keys()[0]); build_tokenizer(p)('a')\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=60)


def test_reading_holds_one_tensor(smollm2_gguf: Path) -> None:
    tensors = GGUFTensors(smollm2_gguf)
    tracemalloc.start()
    size = tensors.read("model.embed_tokens.weight").nbytes
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * size


# --- files written here ---------------------------------------------------------------------------


def test_round_trip_of_every_tensor(tiny: Path) -> None:
    tensors, expected = GGUFTensors(tiny), hf_weights()
    assert sorted(tensors.keys()) == sorted(expected)
    for key, weight in expected.items():
        assert tensors.shape(key) == weight.shape, key
        np.testing.assert_array_equal(tensors.read(key), weight, err_msg=key)


@pytest.mark.parametrize("stored_as", [QType.F16, QType.BF16, QType.Q8_0])
def test_storage_types(tmp_path: Path, stored_as: QType) -> None:
    tensors = GGUFTensors(write(tmp_path / "tiny.gguf", stored_as=stored_as))
    for key, weight in hf_weights().items():
        found = tensors.read(key)
        if weight.ndim == 2:  # rows are quantised one by one, so their order does not matter
            weight = gguf.dequantize(gguf.quantize(weight, stored_as), stored_as)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, weight, err_msg=key)


def test_config_of_an_untied_model(tiny: Path) -> None:
    assert read_config(tiny) == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": float(np.float32(1e-6)),
        "head_dim": HEAD_DIM,
        "rope_theta": 12345.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": VOCAB - 4,
        "eos_token_id": VOCAB - 3,
        "pad_token_id": VOCAB - 2,
    }


@pytest.mark.parametrize(
    "key", [k for k in METADATA if k.startswith("llama.") or re.search(r"\.[be]os_token_id", k)]
)
def test_missing_config_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "tiny.gguf", {key: None})
    with pytest.raises(GGUFError) as error:
        read_config(path)
    assert repr(key) in one_line(error, path)


@pytest.mark.parametrize(
    "key", ["model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id"]
)
def test_missing_tokenizer_key(tmp_path: Path, key: str) -> None:
    path = write(tmp_path / "tiny.gguf", {f"tokenizer.ggml.{key}": None})
    with pytest.raises(GGUFError) as error:
        build_tokenizer(path)
    assert f"'tokenizer.ggml.{key}'" in one_line(error, path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.type is 'linear'"),
        ({"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.factor is 2.0"),
        ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear is 4.0"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window is 64"),
        ({"llama.attention.key_length": 16}, "llama.attention.key_length is 16"),
        ({"llama.attention.value_length": 16}, "llama.attention.value_length is 16"),
        ({"llama.attention.head_count_kv": [2, 1]}, "llama.attention.head_count_kv is a list"),
        ({"split.count": 3}, "split.count"),
        ({"split.count": "x"}, "split.count"),
    ],
)
def test_unsupported_options_are_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    path = write(tmp_path / "tiny.gguf", changes)
    with pytest.raises(UnsupportedModelError) as error:
        read_config(path)
    assert named in one_line(error, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.freq_base", 0.0),
        ("llama.rope.freq_base", -1.0),
        ("llama.rope.freq_base", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", float("nan")),
        ("llama.attention.layer_norm_rms_epsilon", -1e-5),
        ("llama.block_count", 0),
        ("llama.block_count", 2**32 - 1),
        ("llama.block_count", 2.0),
        ("llama.embedding_length", "64"),
        ("llama.rope.dimension_count", 23),
    ],
)
def test_values_that_cannot_be(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path / "tiny.gguf", {key: value})
    with pytest.raises(GGUFError) as error:
        read_config(path)
    assert f"{key} is " in one_line(error, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", "x"),
        ("tokens", [1, 2]),
        ("token_type", [1]),
        ("merges", ["a"]),
        ("bos_token_id", "x"),
        ("add_bos_token", "yes"),
    ],
)
def test_tokenizers_that_cannot_be(tmp_path: Path, key: str, value: Any) -> None:
    path = write(tmp_path / "tiny.gguf", {f"tokenizer.ggml.{key}": value})
    with pytest.raises(GGUFError) as error:
        build_tokenizer(path)
    assert "tokenizer.ggml." in one_line(error, path)


def test_options_without_effect_are_accepted(tmp_path: Path) -> None:
    changes = {
        "llama.rope.scaling.type": "none",
        "llama.expert_count": 0,
        "llama.attention.key_length": HEAD_DIM,
        "llama.attention.value_length": HEAD_DIM,
        "llama.tensor_data_layout": "Meta AI original pth",
    }
    path = write(tmp_path / "changed.gguf", changes)
    assert read_config(path) == read_config(write(tmp_path / "tiny.gguf"))


def test_unsupported_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", architecture="qwen2")
    with pytest.raises(UnsupportedModelError) as error:
        GGUFTensors(path)
    assert "'qwen2'" in one_line(error, path)


def test_other_byte_order(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tensors={}, order=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedModelError) as error:
        read_config(path)
    assert "byte order" in one_line(error, path)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "blk.2.attn_q.weight", "other"]
)
def test_unknown_tensor(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "tiny.gguf", tensors={name: np.zeros((32, 32), np.float32)})
    with pytest.raises(UnsupportedModelError) as error:
        GGUFTensors(path)
    assert repr(name) in one_line(error, path)


def test_scaled_rope_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(UnsupportedModelError) as error:
        read_config(path)
    assert "rope_freqs.weight" in one_line(error, path)


def test_wrong_number_of_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tiny.gguf", tensors={"blk.1.attn_k.weight": np.zeros((24, 64), np.float32)}
    )
    with pytest.raises(GGUFError) as error:
        GGUFTensors(path).read("model.layers.1.self_attn.k_proj.weight")
    assert "blk.1.attn_k.weight has 24 rows" in one_line(error, path)


def test_storage_type_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write(path, tensors={"output.weight": np.zeros((4, 32), np.int8)})
    with pytest.raises(UnsupportedModelError) as error:
        GGUFTensors(path).read("lm_head.weight")
    assert "output.weight is stored as I8" in one_line(error, path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 not a model"])
def test_not_a_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    for read in (read_config, GGUFTensors, build_tokenizer):
        with pytest.raises(GGUFError) as error:
            read(path)
        assert "not a GGUF file" in one_line(error, path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf: no such file"):
        read_config(tmp_path / "none.gguf")


def test_every_truncation_is_refused(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(4, 200, 7), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(GGUFError) as error:
            read_config(cut)
        assert "fetch it again" in one_line(error, cut), length


def test_file_cut_short_after_opening(tiny: Path) -> None:
    tensors = GGUFTensors(tiny)
    with tiny.open("r+b") as file:
        file.truncate(tiny.stat().st_size // 2)
    with pytest.raises(GGUFError) as error:
        tensors.read(tensors.keys()[-1])
    assert "ends early" in one_line(error, tiny)


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf")
    assert read_config(path)["rope_theta"] == 12345.0
    write(tmp_path / "new.gguf", {"llama.rope.freq_base": 5.0}).replace(path)
    assert read_config(path)["rope_theta"] == 5.0


# --- tokenizers of files written here -------------------------------------------------------------


def test_llama3_tokenizer(tiny: Path, tmp_path: Path) -> None:
    """Where transformers' GGUF reader departs from Llama 3's own tokenizer, the latter is right."""
    tokenizer = build_tokenizer(tiny)
    bos, ab, abc = (BPE_TOKENS.index(t) for t in ("<s>", "ab", "abc"))
    assert len(tokenizer) == VOCAB  # no <|endoftext|> beyond the embedding table
    assert tokenizer("abc").input_ids == [bos, abc]  # no merge makes it, and bos without a flag
    assert tokenizer("ab").input_ids == [bos, ab]
    assert tokenizer("x<|im_start|>").input_ids == [bos, BPE_TOKENS.index("x"), VOCAB - 1]
    assert tokenizer.extra_special_tokens == ["<|im_start|>"]
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", None)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("abc <|im_start|>").input_ids == tokenizer("abc <|im_start|>").input_ids
    assert len(again) == VOCAB


@pytest.mark.parametrize("flag", [True, False, None])
@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "sentencepiece"])
def test_bos_and_eos_flags(tmp_path: Path, kind: str, flag: bool | None) -> None:
    changes = SENTENCEPIECE if kind == "sentencepiece" else {"tokenizer.ggml.pre": kind}
    flags = {"tokenizer.ggml.add_bos_token": flag, "tokenizer.ggml.add_eos_token": flag}
    tokenizer = build_tokenizer(write(tmp_path / "tiny.gguf", changes | flags))
    tokenizer.save_pretrained(tmp_path / "saved")
    expect_bos = kind != "gpt-2" if flag is None else flag  # llama.cpp's defaults
    for t in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        ids = t("ab").input_ids
        assert (ids[0] == t.bos_token_id, ids[-1] == t.eos_token_id) == (expect_bos, bool(flag))


def test_sentencepiece_ids_equal_transformers(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", SENTENCEPIECE)
    tokenizer = build_tokenizer(path)
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ["ab abcd cd", "  ab", "é 日</s>ab", "<s> x<unk>", ""]:
        assert tokenizer(text).input_ids == expected(text).input_ids, text
        assert again(text).input_ids == expected(text).input_ids, text
    assert len(tokenizer) == len(PIECES)
    assert tokenizer.pad_token is None
    assert tokenizer.unk_token_id == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.pre": "new-rule"}, "tokenizer.ggml.pre is 'new-rule'"),
        ({**SENTENCEPIECE, "tokenizer.ggml.add_space_prefix": False}, "add_space_prefix is False"),
        ({"tokenizer.ggml.padding_token_id": VOCAB}, "tokenizer.ggml.padding_token_id is"),
        ({"tokenizer.ggml.tokens": [*BPE_TOKENS[:-3], "<｜end｜>", "<p>", "<i>"]}, "<｜end｜>"),  # noqa: RUF001 (as DeepSeek spells it)
    ],
)
def test_unsupported_tokenizers_are_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = write(tmp_path / "tiny.gguf", changes)
    with pytest.raises(ValueError) as error:
        build_tokenizer(path)
    assert named in one_line(error, path)
