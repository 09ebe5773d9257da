"""Token ids: the published ones with the real tokenizer, and what each step must refuse."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from e5v_jax.checkpoints.gguf_tokenizer import build_tokenizer
from e5v_jax.data.text import (
    bucket_length,
    encode_batch,
    expand_image_tokens,
    pad_right,
    truncate_texts,
)
from e5v_jax.prompts import PROMPTS, TEMPLATES, detect_template, fill, fill_released

# with the published tokenizer of Llama 3
GOLDEN_TEXT = [
    *(128000, 128006, 882, 128007, 271),
    *(32, 5679, 23874, 627, 19791, 3485, 11914, 304, 832, 3492, 25, 220),
    *(128009, 128006, 78191, 128007, 271, 720),
]
GOLDEN_IMAGE = [
    *(128000, 128006, 882, 128007, 271),
    *(128256, 198, 19791, 3485, 2217, 304, 832, 3492, 25, 220),
    *(128009, 128006, 78191, 128007, 271, 720),
]


def byte_tokenizer(single: str = "<s> $A") -> PreTrainedTokenizerFast:
    """One token per byte; ``single`` says what is put around a text."""
    vocab = {"<s>": 0, "</s>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


# --- golden ids


def test_golden_ids_of_llama3(llama3_tokenizer: PreTrainedTokenizerFast) -> None:
    template = TEMPLATES["llama3"]
    text = fill(PROMPTS["text"], template=template, text="A dog sits.")
    image = fill(PROMPTS["image"], template=template)
    assert encode_batch(llama3_tokenizer, [text, image]) == [GOLDEN_TEXT, GOLDEN_IMAGE]


def test_full_stop_and_newline_merge_across_the_seam(
    llama3_tokenizer: PreTrainedTokenizerFast,
) -> None:
    parts = llama3_tokenizer(["A dog sits.", "\nSummary"], add_special_tokens=False)["input_ids"]
    assert 627 not in parts[0] + parts[1]
    assert 627 in GOLDEN_TEXT


def test_released_variant_pools_a_literal_greater_than(
    llama3_tokenizer: PreTrainedTokenizerFast,
) -> None:
    filled = fill_released(PROMPTS["plain"], template=TEMPLATES["llama3"], text="A dog sits.")
    (ids,) = encode_batch(llama3_tokenizer, [filled])
    assert ids[0] == 128000  # BOS is the only special token left
    assert max(ids[1:]) < 128000
    assert ids[-1] == 29
    assert llama3_tokenizer.decode(ids[-1]) == ">"


def test_hostile_text_cannot_forge_the_template(llama3_tokenizer: PreTrainedTokenizerFast) -> None:
    """What check_text lets through adds no special id, whatever it looks like."""
    for text in ("<sent> {} {type}", "<image", "<|eot_id|", "<|eot _id|>", "< image>", "image>"):
        filled = fill(PROMPTS["cirr_query"], template=TEMPLATES["llama3"], text=text)
        (ids,) = encode_batch(llama3_tokenizer, [filled])
        special = [token for token in ids if token >= 128000]
        assert special == [128000, 128006, 128007, 128256, 128009, 128006, 128007]


def test_golden_ids_of_smollm2(smollm2_gguf: Path) -> None:
    """Pinned from transformers' AutoTokenizer reading the same file: neither BOS nor EOS added."""
    tokenizer = build_tokenizer(smollm2_gguf)
    assert detect_template(tokenizer, "llama") == "chatml"
    filled = fill(PROMPTS["text"], template=TEMPLATES["chatml"], text="A dog sits.")
    (ids,) = encode_batch(tokenizer, [filled])
    assert ids == [
        *(1, 4093, 198),
        *(49, 2767, 16125, 30, 198, 23530, 2120, 6330, 281, 582, 2229, 42, 216),
        *(2, 198, 1, 520, 9531, 198),
    ]


# --- encode_batch


def test_bos_comes_from_the_tokenizer() -> None:
    text = "<s>ab"
    assert encode_batch(byte_tokenizer("<s> $A"), ["ab", "b"])[0][0] == 0
    with_bos, without = (
        encode_batch(byte_tokenizer(single), ["ab"])[0] for single in ("<s> $A", "$A")
    )
    assert with_bos == [0, *without]
    assert encode_batch(byte_tokenizer("$A"), [text])[0] == with_bos


@pytest.mark.parametrize("single", ["<s> $A </s>", "$A </s>", "$A <s>"])
def test_anything_after_the_prompt_is_refused(single: str) -> None:
    with pytest.raises(ValueError, match="after the prompt"):
        encode_batch(byte_tokenizer(single), ["ab"])


@pytest.mark.parametrize("single", ["</s> $A", "<s> <s> $A"])
def test_anything_but_bos_before_the_prompt_is_refused(single: str) -> None:
    with pytest.raises(ValueError, match="before the prompt, expected nothing or the BOS token"):
        encode_batch(byte_tokenizer(single), ["ab"])


def test_encoding_ignores_truncation_and_padding_saved_with_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert [len(ids) for ids in encode_batch(tokenizer, ["a" * 40, "b"])] == [41, 2]


def test_no_text_gives_no_ids() -> None:
    assert encode_batch(byte_tokenizer(), []) == []
    assert truncate_texts(byte_tokenizer(), []) == []
    with pytest.raises(ValueError, match="no token"):
        encode_batch(byte_tokenizer(), [""])


# --- truncate_texts


def test_truncation_counts_text_tokens_only() -> None:
    texts = ["abcdef", "abcd", "abc", "a ,b"]
    assert truncate_texts(byte_tokenizer(), texts, 4) == ["abcd", "abcd", "abc", "a ,b"]
    with pytest.raises(ValueError, match="max_tokens is 0"):
        truncate_texts(byte_tokenizer(), texts, 0)


def test_truncation_as_the_training_script(llama3_tokenizer: PreTrainedTokenizerFast) -> None:
    """Against the script's own call: truncation by the tokenizer, no special tokens, decode."""
    texts = [
        "A dog sits.",
        " ".join(f"word{i}" for i in range(40)),
        "Die Füße der 犬 🐕 " * 12,
        " two  spaces , and n't 's",
    ]
    expected = [
        llama3_tokenizer.decode(
            llama3_tokenizer(
                text, truncation=True, max_length=32, padding=False, add_special_tokens=False
            )["input_ids"]
        )
        for text in texts
    ]
    truncated = truncate_texts(llama3_tokenizer, texts)
    assert truncated == expected
    assert truncated[0] == texts[0]
    assert truncated[1] == " ".join(f"word{i}" for i in range(16))
    assert truncated[3] == texts[3]


# --- images


def test_each_placeholder_is_repeated_by_its_own_count() -> None:
    assert expand_image_tokens([1, 9, 2, 9], 9, [3, 1]) == [1, 9, 9, 9, 2, 9]
    assert expand_image_tokens([1, 2], 9, []) == [1, 2]
    expanded = expand_image_tokens(GOLDEN_IMAGE, 128256, [2340])
    assert len(expanded) == 2340 + 20
    assert expanded[:5] == GOLDEN_IMAGE[:5]
    assert expanded[-15:] == GOLDEN_IMAGE[-15:]


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([1, 9, 9], [3], "2 image placeholders .token 9. for 1 images"),
        ([1, 2], [3], "0 image placeholders"),
        ([1, 9], [], "for 0 images"),
        ([1, 9], [0], "at least 1"),
    ],
)
def test_placeholders_and_images_must_agree(
    ids: list[int], counts: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        expand_image_tokens(ids, 9, counts)


# --- shapes


def test_bucket_is_the_smallest_that_holds_the_sequence() -> None:
    buckets = [128, 32, 64]
    lengths = [1, 32, 33, 64, 65, 128]
    assert [bucket_length(n, buckets) for n in lengths] == [32, 32, 64, 64, 128, 128]
    with pytest.raises(ValueError, match=r"129 tokens fits none of .*\[32, 64, 128\]"):
        bucket_length(129, buckets)


def test_pad_right() -> None:
    input_ids, last_index = pad_right([[5, 6, 7], [8]], 4, pad_id=2)
    assert input_ids.dtype == last_index.dtype == np.int32
    assert input_ids.tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert last_index.tolist() == [2, 0]
    assert input_ids[np.arange(2), last_index].tolist() == [7, 8]
    assert pad_right([[5, 6]], 2, pad_id=0)[0].tolist() == [[5, 6]]


@pytest.mark.parametrize("sequences", [[[1], []], [[1], [1, 2, 3]]])
def test_pad_right_never_cuts_and_never_pools_padding(sequences: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="sequence 1 has"):
        pad_right(sequences, 2, pad_id=0)


def test_torch_is_not_imported() -> None:
    """Where it is installed, it would cost every command 2 seconds and 200 MB."""
    code = (
        "import sys, e5v_jax.train.loop; from e5v_jax import E5V; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
