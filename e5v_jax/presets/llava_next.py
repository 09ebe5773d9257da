"""The embedding models on LLaVA-NeXT, E5-V first.

The source of each value stands above it; the strings are byte-exact, double spaces included.
"""

from e5v_jax.presets.preset import Preset
from e5v_jax.prompts import E5V_PROMPTS, IMAGE, MISTRAL, TEXT, Prompts

# github.com/kongds/E5-V: see prompts.py, also for its other prompts; the template is the backbone's
E5_V = Preset(
    name="e5-v",
    checkpoints="e5-v.*",
    about="E5-V, and whatever tells of no other (MMEB 37.5, arXiv 2504.17432)",
    document=E5V_PROMPTS,
    query=E5V_PROMPTS,
)

# github.com/deepglint/UniME, self_evaluate/retrieval_self.py; of text with image, its paper
_UNIME = Prompts(TEXT, IMAGE, text_image=None)
_UNIME_LLAVA = Preset(
    name="unime-llava-1.6",
    checkpoints=r"unime-llava-1\.6.*",
    about="UniME-LLaVA-1.6-7B (MMEB 66.6, arXiv 2504.17432)",
    document=_UNIME,
    query=_UNIME,
    template=MISTRAL,
)

# github.com/TIGER-AI-Lab/VLM2Vec, branch v1: README, src/dataset.py (process_image), src/model.py.
# An instruction is what MMEB puts in front of a text, colon and all.
VLM2VEC = Prompts(
    text="<sent>",
    image="<image> Represent the given image.",
    text_image="<image> Represent the given image with the following question: <sent>",
)
VLM2VEC_INSTRUCTED = Prompts(
    text="<instruction> <sent>",
    image="<image> <instruction>",
    text_image="<image> <instruction> <sent>",
)
_VLM2VEC_LLAVA = Preset(
    name="vlm2vec-llava-next",
    checkpoints="vlm2vec-llava-?next.*",
    about="VLM2Vec-LLaVa-Next (MMEB 62.9 to 63.3, by table)",
    document=VLM2VEC,
    query=VLM2VEC,
    instructed_query=VLM2VEC_INSTRUCTED,
    instructed_document=VLM2VEC_INSTRUCTED,
    template="{}",
    resize=(1344, 1344),
)

# modeling_llavanext_for_embedding.py of the checkpoints (prepare_text_input); README of
# github.com/VectorSpaceLab/MegaPairs
_BGE_VL = Preset(
    name="bge-vl-mllm",
    checkpoints=r"bge-vl-(mllm-s[12]|v1\.5-(zs|mmeb)).*",
    about="BGE-VL-MLLM-S1 and -S2, BGE-VL-v1.5-zs and -mmeb (MMEB 44.0 zero-shot, 64.1 "
    "trained on it, arXiv 2412.14475)",
    document=Prompts(" <sent> \n", " <image>", " <sent> \n <image>"),
    query=Prompts(
        text="\n <instruct>  <query> <sent> \n",
        image="\n <instruct>  <query> <image>",
        text_image="\n <instruct>  <query> <sent> \n <image>",
    ),
    instructed_query=Prompts(
        text="\n <instruct> <instruction> <query>  <sent> \n",
        image="\n <instruct> <instruction> <query>  <image>",
        text_image="\n <instruct> <instruction> <query>  <sent> \n <image>",
    ),
    template=MISTRAL,
    resize=(512, 512),
    architecture="LLaVANextForEmbedding",
)

LLAVA_NEXT = (E5_V, _UNIME_LLAVA, _VLM2VEC_LLAVA, _BGE_VL)
