"""Presets: the authors' strings byte for byte, their images and vectors, and how one is chosen."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hf_models import RECIPES, build_tokenizer, picture
from PIL import Image
from qwen_strings import QWEN_STRINGS

from e5v_jax import E5V, cli
from e5v_jax.checkpoints import from_hf
from e5v_jax.data.images import load_image
from e5v_jax.data.inputs import InputError
from e5v_jax.encode.__main__ import main as encode
from e5v_jax.encode.model_args import ModelArgs
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.composed import score_cirr
from e5v_jax.evaluate.composed_sets import ComposedSet
from e5v_jax.evaluate.retrieval import CaptionedImages, score_retrieval
from e5v_jax.families.text.config import TextModelConfig
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.presets import PRESETS, Preset, find_preset
from e5v_jax.prompts import TEMPLATES, Prompts, TextError
from e5v_jax.train.batches import _prompts

if TYPE_CHECKING:
    from hf_models import Case

DOG = "A cat and a dog"
CIR = (
    "Retrieve the target image that best meets the combined criteria by using both the provided "
    "image and the image retrieval instructions: "
)
E5V_HEAD = "<|start_header_id|>user<|end_header_id|>\n\n"
E5V_TAIL = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n \n"
QWEN_TAIL = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
# preset, role, instruction -> what is said with a text, an image, and both (None: apart, added)
STRINGS: dict[tuple[str, str, str | None], tuple[str, str, str | None]] = {
    **dict.fromkeys(
        [("e5-v", "query", None), ("e5-v", "document", None)],
        (
            f"{E5V_HEAD}A cat and a dog\nSummary above sentence in one word: {E5V_TAIL}",
            f"{E5V_HEAD}<image>\nSummary above image in one word: {E5V_TAIL}",
            f'{E5V_HEAD}<image>Modify this image with "A cat and a dog", desribe modified image '
            f"in one word:{E5V_TAIL}",
        ),
    ),
    **dict.fromkeys(
        [("unime-llava-1.6", "query", None), ("unime-llava-1.6", "document", None)],
        (
            "[INST] A cat and a dog\nSummary above sentence in one word: [/INST]",
            "[INST] <image>\nSummary above image in one word: [/INST]",
            None,
        ),
    ),
    **dict.fromkeys(
        [("vlm2vec-llava-next", "query", None), ("vlm2vec-llava-next", "document", None)],
        (
            "A cat and a dog",
            "<image> Represent the given image.",
            "<image> Represent the given image with the following question: A cat and a dog",
        ),
    ),
    ("vlm2vec-llava-next", "query", "Find me an everyday image that matches the given caption:"): (
        "Find me an everyday image that matches the given caption: A cat and a dog",
        "<image> Find me an everyday image that matches the given caption:",
        "<image> Find me an everyday image that matches the given caption: A cat and a dog",
    ),
    ("vlm2vec-llava-next", "query", "Find an image caption describing the given image."): (
        "Find an image caption describing the given image. A cat and a dog",
        "<image> Find an image caption describing the given image.",
        "<image> Find an image caption describing the given image. A cat and a dog",
    ),
    ("vlm2vec-llava-next", "document", "Represent the given image."): (
        "Represent the given image. A cat and a dog",
        "<image> Represent the given image.",
        "<image> Represent the given image. A cat and a dog",
    ),
    ("bge-vl-mllm", "document", None): (
        "[INST]  A cat and a dog \n [/INST]",
        "[INST]  <image> [/INST]",
        "[INST]  A cat and a dog \n <image> [/INST]",
    ),
    ("bge-vl-mllm", "query", None): (
        "[INST] \n <instruct>  <query> A cat and a dog \n [/INST]",
        "[INST] \n <instruct>  <query> <image> [/INST]",
        "[INST] \n <instruct>  <query> A cat and a dog \n <image> [/INST]",
    ),
    ("bge-vl-mllm", "query", "Find a photo."): (
        "[INST] \n <instruct> Find a photo. <query>  A cat and a dog \n [/INST]",
        "[INST] \n <instruct> Find a photo. <query>  <image> [/INST]",
        "[INST] \n <instruct> Find a photo. <query>  A cat and a dog \n <image> [/INST]",
    ),
    ("bge-vl-mllm", "query", CIR): (
        "[INST] \n <instruct> Retrieve the target image that best meets the combined criteria by "
        "using both the provided image and the image retrieval instructions:  <query>  A cat and "
        "a dog \n [/INST]",
        "[INST] \n <instruct> Retrieve the target image that best meets the combined criteria by "
        "using both the provided image and the image retrieval instructions:  <query>  <image> "
        "[/INST]",
        "[INST] \n <instruct> Retrieve the target image that best meets the combined criteria by "
        "using both the provided image and the image retrieval instructions:  <query>  A cat and "
        "a dog \n <image> [/INST]",
    ),
    **QWEN_STRINGS,
}


def say(
    preset: Preset,
    text: str | None,
    *,
    has_image: bool,
    role: str | None = None,
    instruction: str | None = None,
    image: str = "<image>",
) -> str:
    """The string that is tokenised."""
    choice = preset.choose(role, None, instruction)
    template = preset.template or TEMPLATES["llama3"]
    return choice.fill(text, has_image=has_image, template=template, image=image)


@pytest.mark.parametrize(("name", "role", "instruction"), STRINGS)
def test_the_strings_are_the_authors(name: str, role: str, instruction: str | None) -> None:
    preset, expected = PRESETS[name], STRINGS[name, role, instruction]
    how: dict[str, Any] = {"role": role, "instruction": instruction}
    assert say(preset, DOG, has_image=False, **how) == expected[0]
    assert say(preset, None, has_image=True, **how) == expected[1]
    assert preset.choose(role, None, instruction).adds == (expected[2] is None)
    if expected[2] is not None:
        assert say(preset, DOG, has_image=True, **how) == expected[2]
    if role == "document" and instruction is None:  # the default
        assert say(preset, DOG, has_image=False) == expected[0]


def test_every_preset_has_its_strings_written_out() -> None:
    assert {name for name, *_ in STRINGS} == set(PRESETS)
    for name, preset in PRESETS.items():
        takes = {role for known, role, words in STRINGS if known == name and words is not None}
        instructed = {"query": preset.instructed_query, "document": preset.instructed_document}
        assert {role for role, prompts in instructed.items() if prompts is not None} == takes


def bge_string(text: str | None, *, has_image: bool, role: str, instruction: str | None) -> str:
    """What the remote code of BGE-VL-MLLM concatenates."""
    if role == "query":
        said = "[INST] \n <instruct>  <query>"
        if instruction is not None:
            said = f"[INST] \n <instruct> {instruction} <query> "
    else:
        said = "[INST] "
    if text is not None:
        said = f"{said} {text} \n"
    if has_image:
        said = f"{said} <image>"
    return f"{said} [/INST]"


def test_bge_is_what_its_code_concatenates() -> None:
    """Over texts with spaces, newlines and everything that looks like a slot."""
    rng = np.random.default_rng(0)
    parts = ["dog", " ", "\n", "{}", "<sent>", "<instruction>", "<query>", "<instruct>", "é", "."]
    for _ in range(300):
        text, words = ("".join(rng.choice(parts, rng.integers(1, 7))) for _ in range(2))
        for has_image in (False, True):
            for role, instruction in (("query", words), ("query", None), ("document", None)):
                how: dict[str, Any] = {"role": role, "instruction": instruction}
                expected = bge_string(text, has_image=has_image, **how)
                assert say(PRESETS["bge-vl-mllm"], text, has_image=has_image, **how) == expected


def test_the_value_holds_a_template_with_an_instruction() -> None:
    """As Qwen3-VL-Embedding's: a system turn for the instruction, which a full stop ends."""
    said = Prompts("<sent>", "<image>", "<image><sent>")
    preset = Preset(
        name="qwen3-vl-embedding",
        checkpoints="",
        about="",
        document=said,
        query=said,
        instructed_query=said,
        instructed_document=said,
        default_instruction="Represent the user's input.",
        ends_instructions=True,
        template="<|im_start|>system\n<instruction><|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>",
        last_token="<|endoftext|>",
        transparency="white",
    )
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for instruction, expected in {
        None: "Represent the user's input.",
        " Retrieve images relevant to the query ": "Retrieve images relevant to the query.",
        "Find it!": "Find it!",
        "找到它。": "找到它。",
        "<sent> {}": "<sent> {}",  # "}" is punctuation
    }.items():
        for role in ("query", "document"):
            found = say(
                preset, DOG, has_image=True, role=role, instruction=instruction, image=image
            )
            assert found == (
                f"<|im_start|>system\n{expected}<|im_end|>\n<|im_start|>user\n{image}{DOG}"
                "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
            )
    own = preset.choose(prompt="<sent>: one word", instruction="Say it.")
    assert own.fill("a", has_image=False, template="<instruction>|{}", image="") == (
        "Say it.|a: one word"
    )


# --- vectors, against transformers called as the authors call it


def images_of(folder: Path) -> dict[str, Path]:
    """Files of several sizes and modes."""
    noisy = picture(40, 57, seed=3)
    made = {
        "wide": picture(30, 90),
        "tall": picture(75, 41),
        "square": picture(56, 56),
        "palette": noisy.quantize(40),
        "grey": picture(33, 64).convert("L"),
    }
    made["alpha"] = noisy.convert("RGBA")
    ramp = np.tile(np.arange(57, dtype=np.uint8) * 4, (40, 1))
    made["alpha"].putalpha(Image.fromarray(ramp))
    for name, image in made.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in made}


SIZES = {"vlm2vec-llava-next": (1344, 1344), "bge-vl-mllm": (512, 512)}


@torch.no_grad()
def authors_vectors(case: "Case", preset: str, rows: list[tuple[str, Path | None]]) -> torch.Tensor:
    """The last hidden state [N, D] of the last position, one left-padded batch, as it is."""
    texts, images = [text for text, _ in rows], []
    for _, path in rows:
        if path is not None:
            image = Image.open(path)
            if preset in SIZES:
                image = image.resize(SIZES[preset])
            images.append(image.convert("RGB"))
    if images:
        inputs = case.processor(text=texts, images=images, return_tensors="pt", padding=True)
    else:
        inputs = case.tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {name: x for name, x in dict(inputs).items() if name != "token_type_ids"}
    out = case.torch_model(**inputs, output_hidden_states=True, return_dict=True)
    return out.hidden_states[-1][:, -1].float()


@pytest.mark.parametrize("name", ["unime-llava-1.6", "vlm2vec-llava-next", "bge-vl-mllm"])
def test_vectors_are_the_authors(name: str, llava: "Callable[[str], Case]", tmp_path: Path) -> None:
    case, files = llava("mistral"), images_of(tmp_path)
    del files["tall"], files["grey"]  # each shape of a batch takes a second to compile
    model = E5V.from_pretrained(case.folder, dtype="float32", preset=name)
    assert model.preset is PRESETS[name]
    texts = [DOG, "Snow falls. ", "a"]
    normalize = torch.nn.functional.normalize
    for role, instruction in [(role, words) for known, role, words in STRINGS if known == name]:
        if instruction is not None:  # only the string is another: two images show it
            files = {kind: files[kind] for kind in ("wide", "palette")}
        of_text, of_image, of_both = STRINGS[name, role, instruction]

        def embed(
            items: list[Any], role: str = role, words: str | None = instruction
        ) -> np.ndarray:
            encode = model.encode_query if role == "query" else model.encode_document
            return encode(items, instruction=words)

        said = [of_text.replace(DOG, text) for text in texts]
        words = authors_vectors(case, name, [(text, None) for text in said])
        np.testing.assert_allclose(embed(texts), normalize(words, dim=-1), atol=1e-5)
        shown = authors_vectors(case, name, [(of_image, path) for path in files.values()])
        found = embed(list(files.values()))
        np.testing.assert_allclose(found, normalize(shown, dim=-1), atol=1e-5)
        both = [{"text": DOG, "image": path} for path in files.values()]
        expected = shown + words[0] if of_both is None else None
        if of_both is not None:
            expected = authors_vectors(case, name, [(of_both, path) for path in files.values()])
        np.testing.assert_allclose(embed(both), normalize(expected, dim=-1), atol=1e-5)


# --- images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "PA"])
@pytest.mark.parametrize("size", [(512, 512), (1344, 1344)])
def test_an_image_is_resized_before_it_is_rgb(tmp_path: Path, mode: str, size: Any) -> None:
    """Pillow's filter depends on the mode; converted first, all but RGB would be other pixels."""
    wide = picture(40, 90).quantize(30) if mode == "P" else picture(40, 90)
    image = wide.convert("L").convert("I").convert("I;16") if mode == "I;16" else wide
    image = image.convert("RGBA").convert("P").convert("PA") if mode == "PA" else image
    image = image if mode in ("P", "PA", "I;16") else image.convert(mode)
    if mode in ("LA", "RGBA"):
        ramp = np.tile(np.arange(90, dtype=np.uint8) * 2, (40, 1))
        image.putalpha(Image.fromarray(ramp))
    source: Any = image
    if mode != "PA":  # which no format has
        source = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
        image.save(source)
        with Image.open(source) as opened:
            assert opened.mode == mode
            expected = np.asarray(opened.resize(size).convert("RGB"))
            first = np.asarray(opened.convert("RGB").resize(size))
    else:
        expected = np.asarray(image.resize(size).convert("RGB"))
        first = np.asarray(image.convert("RGB").resize(size))
    np.testing.assert_array_equal(np.asarray(load_image(source, size[::-1])), expected)
    if mode != "I;16":  # of which no bit is cut off before
        assert np.array_equal(first, expected) == (mode in ("L", "RGB"))


# --- an input that is two


def test_of_two_parts_a_bad_one_is_told_once(
    llava: "Callable[[str], Case]", tmp_path: Path
) -> None:
    case, files = llava("mistral"), images_of(tmp_path)
    model = E5V.from_pretrained(case.folder, dtype="float32", preset="unime-llava-1.6")
    good, (text, image) = {"text": DOG, "image": files["grey"]}, (DOG, files["grey"])
    (tmp_path / "broken.png").write_bytes(files["wide"].read_bytes()[:500])
    bad = {"text": "a [INST] b", "image": tmp_path / "broken.png"}
    half = {"text": DOG, "image": tmp_path / "broken.png"}
    told: list[InputError] = []
    done: list[int] = []
    items = [good, bad, text, half, image, good]
    found = model.encode(items, on_error=told.append, on_batch=done.append)
    assert [error.position for error in told] == [1, 3] and sum(done) == 4
    assert not found[[1, 3]].any()
    np.testing.assert_allclose(np.linalg.norm(found[[0, 2, 4, 5]], axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found[0], found[5])
    raw = model.encode([good, text, image], normalize_embeddings=False)
    np.testing.assert_allclose(raw[0], raw[1] + raw[2], rtol=1e-6)
    with pytest.raises(InputError, match=r"^input 1: .*broken.png"):
        model.encode([good, half])
    with pytest.raises(InputError, match=r"^input 0: unknown key 'x': expected 'text'"):
        model.encode([{**good, "x": 1}])
    together = model.encode([good], prompt='<image> "<sent>"')  # a prompt of one's own holds both
    assert not np.allclose(together[0], found[0], atol=1e-3)


# --- which preset


def test_names_that_tell() -> None:
    for name in (
        "DeepGlint-AI/UniME-LLaVA-1.6-7B",
        "TIGER-Lab/VLM2Vec-LLaVa-Next",
        "BAAI/BGE-VL-MLLM-S1",
        "BAAI/BGE-VL-MLLM-S2",
        "BAAI/BGE-VL-v1.5-zs",
        "BAAI/BGE-VL-v1.5-mmeb",
        "royokong/e5-v",
        "llava-hf/llava-v1.6-mistral-7b-hf",  # of nobody's: as E5-V
        "DeepGlint-AI/UniME-Phi3.5-V-4.2B",
        "BAAI/BGE-VL-large",
    ):
        expected = "e5-v"
        for start, preset in (
            ("UniME-LLaVA", "unime-llava-1.6"),
            ("VLM2Vec", "vlm2vec-llava-next"),
            ("BGE-VL-MLLM", "bge-vl-mllm"),
            ("BGE-VL-v1.5", "bge-vl-mllm"),
        ):
            if name.partition("/")[2].startswith(start):
                expected = preset
        own = name.partition("/")[2]
        for told in (name, f"/models/{own}/", f"gs://bucket/{own.lower()}", f"runs/{own}-bf16"):
            assert find_preset(None, told).name == expected
        assert find_preset("e5-v", name).name == "e5-v"
    for name in PRESETS:  # what a converted folder records
        assert find_preset(None, name).name == name  # as a converted folder has it
        assert find_preset(None, name, "BAAI/BGE-VL-MLLM-S1", "UniME-LLaVA-1.6-7B").name == name
    assert find_preset(None, "/models/mine", "LLaVANextForEmbedding").name == "bge-vl-mllm"


def test_where_it_is_found(
    llava: "Callable[[str], Case]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argument, the converted folder's own word, the source's name, the folder's name."""

    def of(path: Path | str, **options: Any) -> str:
        return E5V.load_processor(path, **options).preset.name

    source = llava("mistral").folder
    named = tmp_path / "UniME-LLaVA-1.6-7B"
    named.symlink_to(source)
    assert of(named) == "unime-llava-1.6" and of(source) == "e5-v"
    assert of(named, preset="bge-vl-mllm") == "bge-vl-mllm"
    hub = "e5v_jax.encode.e5v.resolve"
    monkeypatch.setattr(hub, lambda name, revision: source if "/BGE" in name else Path(name))
    assert of("BAAI/BGE-VL-MLLM-S1") == "bge-vl-mllm"
    monkeypatch.setattr(hub, lambda name, revision: Path(name))
    from_hf.convert(from_hf.Args(str(named), plain := tmp_path / "plain"))
    assert of(plain) == "unime-llava-1.6"
    from_hf.convert(
        from_hf.Args(str(named), told := tmp_path / "told", preset="vlm2vec-llava-next")
    )
    assert of(told) == "vlm2vec-llava-next"
    assert of(told, preset="e5-v") == "e5-v"
    assert E5V.from_pretrained(told).preset.resize == (1344, 1344)
    info = json.loads((told / "config.json").read_text())
    assert info.pop("preset") == "vlm2vec-llava-next"
    (told / "config.json").write_text(json.dumps(info))  # as earlier versions wrote it
    assert of(told) == "unime-llava-1.6"  # of its source's name
    (told / "config.json").write_text(json.dumps({**info, "preset": "vlm3"}))
    with pytest.raises(
        ValueError, match=r"told/config.json: unknown preset 'vlm3': expected one of e5-v, unime"
    ):
        of(told)


UNKNOWN = (
    "unknown preset 'x': expected one of e5-v, unime-llava-1.6, vlm2vec-llava-next, bge-vl-mllm"
)


def test_an_unknown_name_is_one_line_with_the_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=UNKNOWN):
        E5V.from_pretrained("not/fetched", preset="x")
    with pytest.raises(cli.UsageError, match=f"--preset: {UNKNOWN}"):
        from_hf.convert(from_hf.Args("not/fetched", tmp_path / "new", preset="x"))
    with pytest.raises(cli.UsageError, match="--preset: unknown 'x', expected one of e5-v, unime-"):
        ModelArgs(model="m", preset="x").check()
    assert not list(tmp_path.iterdir())


def test_help_and_docs_list_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        encode(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    table = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    for name, preset in PRESETS.items():
        assert name == preset.name and name in shown
        assert f"| `{name}` |" in table


def test_a_vector_depends_on_it(llava: "Callable[[str], Case]") -> None:
    args = ModelArgs(model="m", preset="bge-vl-mllm")
    assert args.describe()["preset"] == "bge-vl-mllm"
    model = E5V.from_pretrained(llava("mistral").folder, preset="unime-llava-1.6")
    kept = CachedEncoder(model, batch_size=1)._about
    assert kept["preset"] == kept["template"] == "unime-llava-1.6"


def test_a_template_given_by_name_takes_the_place_of_the_presets(
    llava: "Callable[[str], Case]",
) -> None:
    folder = llava("mistral").folder
    vicuna = E5V.load_processor(folder, preset="bge-vl-mllm", template="vicuna")
    assert vicuna.template == "vicuna" and vicuna.preset.name == "bge-vl-mllm"
    (measured,) = vicuna.measure(["a"], vicuna.preset.choose())
    whole = TEMPLATES["vicuna"].replace("{}", " a \n")
    assert measured.ids == vicuna.tokenizer(whole)["input_ids"]


# --- how it is used


def test_roles_and_instructions(llava: "Callable[[str], Case]") -> None:
    folder, tokenizer = llava("mistral").folder, llava("mistral").tokenizer
    model = E5V.from_pretrained(folder, dtype="float32", preset="bge-vl-mllm")
    texts = [DOG, "Snow."]
    documents = model.encode(texts)
    np.testing.assert_array_equal(model.encode_document(texts), documents)
    np.testing.assert_array_equal(model.encode(texts, prompt_name="document"), documents)
    queries = model.encode_query(texts)
    np.testing.assert_array_equal(model.encode(texts, "query"), queries)
    told = model.encode(texts, prompt_name="query", instruction="Find it.")
    np.testing.assert_array_equal(model.encode_query(texts, instruction="Find it."), told)
    assert len({vectors.tobytes() for vectors in (documents, queries, told)}) == 3
    own = model.encode_query(texts, prompt="<sent> means", truncate_dim=5)
    np.testing.assert_array_equal(own, model.encode(texts, prompt="<sent> means", truncate_dim=5))
    np.testing.assert_array_equal(
        model.encode(
            texts, prompt="\n <instruct> <instruction> <query>  <sent> \n", instruction="Find it."
        ),
        told,
    )
    for call, message in (
        ({"instruction": "x"}, "instruction 'x': preset bge-vl-mllm has none for documents"),
        ({"instruction": "x", "prompt_name": "sts"}, "preset bge-vl-mllm has none for this prompt"),
        ({"instruction": " ", "prompt_name": "query"}, "instruction: the text is empty"),
        ({"instruction": "", "prompt_name": "query"}, "instruction: the text is empty"),
        ({"instruction": "<image>", "prompt_name": "query"}, "instruction: the text contains '<im"),
        ({"instruction": "\ud800", "prompt_name": "query"}, "the lone surrogate '.ud800'"),
        ({"prompt": "<sent>", "prompt_name": "query"}, "give prompt_name or prompt, not both"),
        ({"prompt": "<instruction> <sent>"}, "needs an instruction, but none was given"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode(texts, **call)  # type: ignore[arg-type]
    for name in ("e5-v", "unime-llava-1.6"):
        other = E5V.load_processor(folder, preset=name).preset
        for role in (None, "query", "document"):
            with pytest.raises(ValueError, match=f"preset {name} has none for "):
                other.choose(role, None, "Find it.")
    # the pooled token is the last of the string: nothing comes after it
    for name, text in (("vlm2vec-llava-next", "q"), ("bge-vl-mllm", "]"), ("unime-llava-1.6", "]")):
        processor = E5V.load_processor(folder, preset=name)
        (measured,) = processor.measure(["q"], processor.preset.choose())
        assert tokenizer.convert_ids_to_tokens([measured.ids[0], measured.ids[-1]]) == ["<s>", text]


def test_what_a_text_must_not_hold() -> None:
    """Control strings of its own template and special tokens; <query> is plain text to BGE."""
    config = TextModelConfig.from_hf(
        {**RECIPES["mistral"].text_config().to_dict(), "model_type": "mistral"}
    )

    def check(name: str, text: str) -> None:
        tokenizer = build_tokenizer("mistral")
        TextProcessor(config, tokenizer, None, PRESETS[name]).check_text(
            text, special_tokens="refuse"
        )

    check("vlm2vec-llava-next", "a [INST] b <|im_end|>")
    check("bge-vl-mllm", "a <query> b <instruct> <sent> <instruction> {}")
    for name, text in (
        ("bge-vl-mllm", "[INST]"),
        ("unime-llava-1.6", "[/INST]"),
        ("vlm2vec-llava-next", "<image>"),
        ("vlm2vec-llava-next", "</s>"),
    ):
        with pytest.raises(TextError, match="which means something else to the model"):
            check(name, f"a {text} b")


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (
            ("--preset", "e5-v"),
            1,
            "error: instruction 'Find it.': preset e5-v has none for queries",
        ),
        (("--preset", "x"), 2, "error: --preset: unknown 'x', expected one of e5-v, unime-llava-1"),
        (("--preset", "bge-vl-mllm"), 0, "1 vector of 64 dimensions"),
    ],
)
def test_command(
    llava: "Callable[[str], Case]",
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    folder, output = llava("mistral").folder, tmp_path / "out.npy"
    words = ["--model", str(folder), "--dtype", "float32", "--text", DOG, "--output", str(output)]
    words += ["--prompt-name", "query", "--instruction", "Find it."]
    with pytest.raises(SystemExit) as exit_:
        encode([*words, *flags])
    out, err = capsys.readouterr()
    assert exit_.value.code == code and message in (err if code else out)
    assert output.exists() == (code == 0)
    if code == 0:
        model = E5V.from_pretrained(folder, dtype="float32", preset="bge-vl-mllm")
        expected = model.encode_query([DOG], instruction="Find it.")
        np.testing.assert_array_equal(np.load(output), expected)


class Recording:
    """Keeps what it is asked; every vector is its own."""

    template = "mistral"

    def __init__(self, preset: Preset) -> None:
        self.preset, self.asked = preset, list[tuple[dict[str, Any], int]]()

    def encode(self, inputs: list[Any], **options: Any) -> np.ndarray:
        said = {key: options[key] for key in ("prompt_name", "prompt") if key in options}
        self.asked.append((said, len(inputs)))
        return np.random.default_rng(len(self.asked)).normal(size=(len(inputs), 5))


def test_evaluations_ask_by_role(tmp_path: Path) -> None:
    files = list(images_of(tmp_path).values())
    captioned = CaptionedImages(list(files), [[f"caption {i}"] for i in range(len(files))])
    composed = ComposedSet(
        images=list(files[:2]),
        captions=[("darker",), ("larger",)],
        gallery=list(files),
        references=np.array([0, 1]),
        targets=np.array([2, 3]),
        pair_ids=["a", "b"],
        gallery_ids=[file.name for file in files],
    )
    for name, asked in (
        ("bge-vl-mllm", ["document", "document", "query", "query"]),
        ("unime-llava-1.6", ["document", "document"]),
    ):
        model = Recording(PRESETS[name])
        encoder = CachedEncoder(model, batch_size=8)  # type: ignore[arg-type]
        score_retrieval(encoder, "retrieval", captioned)
        assert model.asked == [({"prompt_name": role}, len(files)) for role in asked]
        model.asked.clear()
        score_cirr(encoder, composed)
        assert model.asked == [
            ({"prompt_name": "document"}, len(files)),
            ({"prompt_name": "query"}, 2),
        ]


def test_queries_and_documents_are_scored_against_each_other(tmp_path: Path) -> None:
    """Recall is of queries among documents: of what is asked last among what is asked first."""
    files = list(images_of(tmp_path).values())
    captioned = CaptionedImages(list(files), [[f"caption {i}"] for i in range(len(files))])

    class Ordered(Recording):
        def encode(self, inputs: list[Any], **options: Any) -> np.ndarray:
            super().encode(inputs, **options)
            vectors = np.eye(len(inputs))
            return {1: vectors, 2: vectors, 3: vectors[::-1], 4: vectors}[len(self.asked)]

    encoder = CachedEncoder(Ordered(PRESETS["bge-vl-mllm"]), batch_size=8)  # type: ignore[arg-type]
    scores = {
        score.metric: score.items.value() for score in score_retrieval(encoder, "x", captioned)
    }
    assert scores["image R@1"] == 100 and scores["text R@1"] == 0


def test_mteb_asks_by_role(llava: "Callable[[str], Case]") -> None:
    from mteb.types import PromptType

    from e5v_jax.integrations.mteb import NAME, MtebEncoder

    folder = llava("mistral").folder
    model = E5V.from_pretrained(folder, dtype="float32", preset="bge-vl-mllm")
    encoder, batches = MtebEncoder(model=model), [{"text": [DOG, "Snow."]}]
    assert encoder.mteb_model_meta.name == "e5v-jax/bge-vl-mllm"
    for prompt_type, encode_as in (
        (PromptType.query, model.encode_query),
        ("query", model.encode_query),
        (PromptType.document, model.encode_document),
        (None, model.encode),
    ):
        found = encoder.encode(batches, prompt_type=prompt_type)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, encode_as([DOG, "Snow."]))
    plain = MtebEncoder(model=llava("mistral").e5v)
    assert plain.mteb_model_meta.name == NAME


def test_training_says_what_encode_says() -> None:
    for name, preset in PRESETS.items():
        template = preset.template or TEMPLATES["llama3"]
        filled = [
            choice.fill(DOG, has_image=False, template=template, image="<image>")
            for choice in (_prompts("text", preset), preset.choose())
        ]
        assert filled == 2 * [STRINGS[name, "document", None][0]]
    with pytest.raises(ValueError, match="none for a text with an image: embed them apart"):
        choice = PRESETS["unime-llava-1.6"].choose()
        choice.fill(DOG, has_image=True, template="{}", image="<image>")
    own = _prompts("<sent> means", PRESETS["unime-llava-1.6"])
    assert own == dataclasses.replace(own, prompt="<sent> means")
