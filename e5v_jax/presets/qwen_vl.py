"""The embedding models on Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

The source of each value stands above it; the strings are byte-exact.
"""

from dataclasses import replace

from e5v_jax.presets.llava_next import VLM2VEC, VLM2VEC_INSTRUCTED
from e5v_jax.presets.preset import Preset
from e5v_jax.prompts import Prompts

_TURNS = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{{}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_INSTRUCTED = _TURNS.format(system="<instruction>") + "<|endoftext|>"
_ASSISTANT = _TURNS.format(system="You are a helpful assistant.")
_TOKEN = 28**2  # pixels of a token of Qwen2-VL and Qwen2.5-VL
_PLAIN = Prompts("<sent>", "<image>", "<image><sent>")

# github.com/QwenLM/Qwen3-VL-Embedding, src/models/qwen3_vl_embedding.py (format_model_input). That
# <|endoftext|> ends the prompt is the tokenizer's doing there: its post-processor appends it.
_QWEN3_VL_EMBEDDING = Preset(
    name="qwen3-vl-embedding",
    checkpoints="qwen3-vl-embedding.*",
    about="Qwen3-VL-Embedding (MMEB 75.0 and 80.1, arXiv 2601.04720)",
    document=_PLAIN,
    query=_PLAIN,
    instructed_query=_PLAIN,
    instructed_document=_PLAIN,
    default_instruction="Represent the user's input.",
    ends_instructions=True,
    template=_INSTRUCTED,
    last_token="<|endoftext|>",
    min_pixels=4 * 32**2,
    max_pixels=1800 * 32**2,
    transparency="white",
)

# gme_inference.py of Alibaba-NLP/gme-Qwen2-VL-2B-Instruct, as mteb's gme_v_models.py has it: images
# go through its own fetch_image first, then through the checkpoint's processor
_GME = Preset(
    name="gme-qwen2-vl",
    checkpoints="gme-qwen2-vl.*",
    about="gme-Qwen2-VL (MMEB 51.9 and 56.0, arXiv 2601.04720)",
    document=_PLAIN,
    query=_PLAIN,
    instructed_query=_PLAIN,
    default_instruction="You are a helpful assistant.",
    template=_INSTRUCTED,
    last_token="<|endoftext|>",
    positions="1d",
    first_pixels=(4 * _TOKEN, 16384 * _TOKEN),
    min_pixels=256 * _TOKEN,
    max_pixels=1280 * _TOKEN,
)

# github.com/TIGER-AI-Lab/VLM2Vec, main: README; its images have no marks around them, without which
# its get_rope_index finds none: positions count up. Images thinner than a token are made 56 x 56
# (src/model/processor.py, Qwen2_VL_process_fn)
_VLM2VEC_V2 = Preset(
    name="vlm2vec-v2.0",
    checkpoints="vlm2vec-v2.*",
    about="VLM2Vec-V2.0, LoRA on Qwen2-VL-2B (MMEB 64.9, arXiv 2601.04720)",
    document=VLM2VEC,
    query=VLM2VEC,
    instructed_query=VLM2VEC_INSTRUCTED,
    instructed_document=VLM2VEC_INSTRUCTED,
    template="{}",
    image_text="<|image_pad|>",
    positions="1d",
    resize=(56, 56),
    resize_below=28,
    min_pixels=4 * _TOKEN,
    max_pixels=1280 * _TOKEN,
)

# github.com/Code-kunkun/LamRA. The assistant says "<emb>." there, and the state before <emb> is the
# vector: as no token sees what is behind it, that is the last one here
_LAMRA = Prompts(
    text="<sent>\nSummarize above sentence in one word: ",
    image="<image>\nSummarize above image in one word: ",
    text_image="<image><sent>\nSummarize above image and sentence in one word: ",
)
_LAMRA_RET = Preset(
    name="lamra-ret",
    checkpoints="lamra-ret.*",
    about="LamRA-Ret and LamRA-Ret-Pretrained (arXiv 2412.01720)",
    document=_LAMRA,
    query=_LAMRA,
    template=_ASSISTANT,
    positions="1d",
)

# github.com/friedrichor/UNITE, inference/, as mteb's unite_models.py has it: E5-V's words
_UNITE = Prompts(
    text="<sent>\nSummary above sentence in one word:",
    image="<image>\nSummary above image in one word:",
    text_image="<image><sent>\nSummary above sentence and image in one word:",
)
_UNITE_QWEN2_VL = Preset(
    name="unite-qwen2-vl",
    checkpoints="unite-.*qwen2-vl.*",
    about="Unite-Base-Qwen2-VL and kin (arXiv 2505.19650)",
    document=_UNITE,
    query=_UNITE,
    template=_ASSISTANT + "<|endoftext|>",
    last_token="<|endoftext|>",
    positions="1d",
    min_pixels=256 * _TOKEN,
    max_pixels=1280 * _TOKEN,
)

# github.com/LCO-Embedding/LCO-Embedding, Training/train_VL_any2any.py
_LCO = Prompts(
    text="<sent>\nSummarize the above text in one word:",
    image="<image>\nSummarize the above image in one word:",
    text_image="<image><sent>\nSummarize the above in one word:",
)
_LCO_EMBEDDING = Preset(
    name="lco-embedding",
    checkpoints="lco-embedding.*",
    about="LCO-Embedding-Omni (MIEB-lite 68.8; its text-only recipe 60.4, arXiv 2510.11693)",
    document=_LCO,
    query=_LCO,
    template=_ASSISTANT,
)

# colpali-engine 0.3.18, BiQwen2_5_Processor: ten times the token that augments queries
_NOMIC = Prompts(
    text="<sent>" + 10 * "<|endoftext|>",
    image="<|im_start|>user\n<image>Describe the image.<|im_end|><|endoftext|>",
    text_image=None,
)
_NOMIC_MULTIMODAL = Preset(
    name="nomic-embed-multimodal",
    checkpoints="nomic-embed-multimodal.*",
    about="nomic-embed-multimodal, for pages of documents",
    document=_NOMIC,
    query=_NOMIC,
    template="{}",
    last_token="<|endoftext|>",
)

# modeling_jina_embeddings_v4.py of jinaai/jina-embeddings-v4, one of its three adapters; for
# text-matching it says "Query" of documents too
_JINA_IMAGE = "<|im_start|>user\n<image>Describe the image.<|im_end|>\n"
_JINA_V4 = Preset(
    name="jina-embeddings-v4",
    checkpoints="jina-embeddings-v4(?!.*(text-matching|code)).*",
    about="jina-embeddings-v4 with its adapter for retrieval",
    document=Prompts("Passage: <sent>", _JINA_IMAGE, None),
    query=Prompts("Query: <sent>", _JINA_IMAGE, None),
    template="{}",
    pooling="mean",
    architecture="JinaEmbeddingsV4Model",
    adapter="retrieval",
)
_JINA_MATCHING = replace(
    _JINA_V4,
    name="jina-embeddings-v4-text-matching",
    checkpoints="jina-embeddings-v4.*text-matching.*",
    about="the same with that for pairs of texts",
    document=_JINA_V4.query,
    adapter="text-matching",
)
_JINA_CODE = replace(
    _JINA_V4,
    name="jina-embeddings-v4-code",
    checkpoints="jina-embeddings-v4.*code.*",
    about="the same with that for code",
    adapter="code",
)

QWEN_VL = (
    _QWEN3_VL_EMBEDDING,
    _GME,
    _VLM2VEC_V2,
    _LAMRA_RET,
    _UNITE_QWEN2_VL,
    _LCO_EMBEDDING,
    _NOMIC_MULTIMODAL,
    _JINA_V4,  # the first of the three is that of a folder whose name says none
    _JINA_MATCHING,
    _JINA_CODE,
)
