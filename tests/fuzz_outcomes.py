"""What comes of the cases in fuzz_models.py, which change copies of good files.

Each must end in one line for the user (an exception that the commands print as it is written) or
in the vectors of transformers and peft for the same files. Where those refuse the files themselves,
ours may only be the vectors of the unchanged files, and only if what was changed is listed as of no
importance.
"""

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from fuzz_models import Bad
from hf_models import Case, picture
from peft import PeftModel
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from e5v_jax import E5V, exits
from e5v_jax.checkpoints.converted import ConvertedFolder
from e5v_jax.checkpoints.hf_source import HfSource, open_source
from e5v_jax.checkpoints.peft import Adapter, read_adapter
from e5v_jax.checkpoints.tokenizer import load_tokenizer
from e5v_jax.nn.text_config import TextConfig

TEXTS = ["A dog sits.", "Snow falls on the roofs: 3 cm!"]
IMAGE = picture(40, 60)


class Failed(AssertionError):
    """A case that ended in neither of the two ways."""


@dataclass
class Good:
    """The files that cases change, and what comes of them as they are."""

    text: Case
    llava: Case  # with preprocessor_config.json
    processor: Path  # with processor_config.json instead
    original: Path
    adapter: Path
    converted: Path  # of text
    gguf: Path  # with model.gguf

    def folder(self, kind: str) -> Path:
        return {
            "adapter": self.adapter,
            "gguf": self.gguf,
            "converted": self.converted,
            "llava config": self.llava.folder,
            "preprocessor": self.llava.folder,
            "processor": self.processor,
            "original config": self.original,
        }.get(kind, self.text.folder)

    @cached_property
    def sources(self) -> dict[Path, HfSource]:
        folders = (self.text.folder, self.llava.folder, self.original)
        return {folder: open_source(folder) for folder in folders}

    @cached_property
    def pixels(self) -> np.ndarray:
        return pixels_of(self.llava.folder)

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        folder = ConvertedFolder(self.converted)
        return list(folder.read(sorted(folder.shapes())))

    @cached_property
    def ids(self) -> list[list[int]]:
        return load_tokenizer(self.text.folder)(TEXTS)["input_ids"]

    @cached_property
    def vectors(self) -> dict[str, np.ndarray]:
        return {"text": self.text.torch_embed(TEXTS), "llava": self.llava.torch_embed([IMAGE])}

    @cached_property
    def adapted(self) -> np.ndarray:
        return embed_merged(read_adapter(self.adapter, self.sources[self.text.folder].table), self)


def run(case: Bad, good: Good, work: Path) -> str:
    """What came of a case, in a word for a table. Raises Failed, saying why."""
    source = good.folder(case.kind)
    shutil.copytree(source, work)
    case.change(work)
    try:
        outcome = CHECKS[case.kind](case, good, work)
    except Failed:
        raise
    except Exception as error:
        line = exits.one_line(error)
        if "--traceback" in line or "\n" in str(error) or len(line) > 1000:
            raise Failed(f"{case.kind}: {case.name}: not one good line: {line}") from error
        if str(work) not in line and not line.startswith("input 0: "):
            raise Failed(f"{case.kind}: {case.name}: no file is named: {line}") from error
        return "one line"
    finally:
        shutil.rmtree(work)
    return outcome


def compare(case: Bad, found: np.ndarray, reference: Callable[[], np.ndarray], base: Any) -> str:
    """Ours against the reference's, or where that refuses, against those of the good files."""
    try:
        expected = reference()
    except Exception as error:
        if case.dont_care and np.array_equal(found, base):
            return "of no importance"
        reason = str(error).splitlines()[:1]
        raise Failed(f"{case.kind}: {case.name}: the reference refuses it: {reason}") from error
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=1e-5):
        raise Failed(f"{case.kind}: {case.name}: other vectors than the reference's")
    return "equal"


def opened(folder: Path, base: HfSource) -> tuple[HfSource, bool]:
    """The checkpoint as conversion opens it, and whether it is as the good one."""
    source = open_source(folder)
    source.match_tokenizer(load_tokenizer(folder))
    same = source.config == base.config and source.slots == base.slots
    return source, same and all(
        np.array_equal(source.read_key(key), base.tensors.read(key)) for key in source.slots
    )


def embed(folder: Path, items: list[Any]) -> np.ndarray:
    with jax.disable_jit():
        return E5V.from_pretrained(folder, dtype="float32").encode(items, batch_size=len(items))


def check_text(case: Bad, good: Good, work: Path) -> str:
    _, same = opened(work, good.sources[good.text.folder])
    base = good.vectors["text"]

    def reference() -> np.ndarray:
        model = transformers.AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32)
        return Case(work, good.text.template, model.eval()).torch_embed(TEXTS)

    return compare(case, base if same else embed(work, TEXTS), reference, base)


def check_llava(case: Bad, good: Good, work: Path) -> str:
    _, same = opened(work, good.sources[good.llava.folder])
    base = good.vectors["llava"]

    def reference() -> np.ndarray:
        cls = transformers.LlavaNextForConditionalGeneration
        return Case(work, good.llava.template, cls.from_pretrained(work).eval()).torch_embed(
            [IMAGE]
        )

    return compare(case, base if same else embed(work, [IMAGE]), reference, base)


def check_original(case: Bad, good: Good, work: Path) -> str:
    """There is no class of transformers for it: what is taken must not change the model."""
    _, same = opened(work, good.sources[good.original])
    if case.name.startswith(("mm_vision_select_layer ", "image_grid_pinpoints ")):
        return "another model"  # as wanted
    if not same:
        raise Failed(f"{case.kind}: {case.name}: another model")
    accepted = {  # as LLaVA's code has them
        "mm_newline_position": "of videos",
        "tune_mm_mlp_adapter": "of training",
        "mm_use_im_patch_token": "of the tokenizer",
        "tokenizer_model_max_length": "longer ones are refused",
        "mm_vision_tower": "the folder describes the tower itself",
        "mm_vision_select_feature": '(no key) means "patch"',
        "mm_use_im_start_end": "false",
        "mm_resampler_type": "null",
        "s2": "false",
    }
    if case.name.split(" ")[0] not in accepted and "(no key)" not in case.name:
        raise Failed(f"{case.kind}: {case.name}: taken")
    return "of no importance"


def pixels_of(folder: Path) -> np.ndarray:
    processor = LlavaNextImageProcessorPil.from_pretrained(folder)
    pixels = processor(IMAGE, return_tensors="np")["pixel_values"]
    return np.asarray(pixels)


def check_images(case: Bad, good: Good, work: Path) -> str:
    """The pixels of transformers' processor stand for the vectors."""
    opened(work, good.sources[good.llava.folder])
    try:
        pixels = pixels_of(work)
    except Exception:
        return "transformers refuses it"  # there is no wrong vector to compare with
    if pixels.shape != good.pixels.shape or not np.allclose(pixels, good.pixels, rtol=0, atol=1e-6):
        raise Failed(f"{case.kind}: {case.name}: transformers computes other pixels")
    return "equal"


def check_adapter(case: Bad, good: Good, work: Path) -> str:
    """Our factors, merged into PyTorch's weights, against peft's own model."""
    table = good.sources[good.text.folder].table
    adapter = read_adapter(work, table)
    found = embed_merged(adapter, good)

    def reference() -> np.ndarray:
        cls: Any = transformers.AutoModelForCausalLM
        if "model.model.layers to model.layers" in case.name:
            cls = transformers.AutoModel  # which has such names
        base = cls.from_pretrained(good.text.folder, dtype=torch.float32)
        with_factors = PeftModel.from_pretrained(base, work).eval()
        return Case(good.text.folder, good.text.template, with_factors).torch_embed(TEXTS)

    return compare(case, found, reference, good.adapted)


@torch.no_grad()
def embed_merged(adapter: Adapter, good: Good) -> np.ndarray:
    model = good.text.torch_model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = model.state_dict()  # shares the model's memory
    for row in good.sources[good.text.folder].table.adapted:
        path = row.path.removesuffix("kernel")
        for i in range(row.layers or 0):
            a, b = (adapter.values[f"{path}lora_{factor}"][i] for factor in "ab")
            update = torch.from_numpy((a @ b).T * np.float32(adapter.lora.scale))
            state["model." + row.hf.replace("{i}", str(i))] += update
    found = good.text.torch_embed(TEXTS)
    model.load_state_dict(before)
    return found


def check_tokenizer(case: Bad, good: Good, work: Path) -> str:
    _, _ = opened(work, good.sources[good.text.folder])
    found = load_tokenizer(work)(TEXTS)["input_ids"]
    try:
        expected = transformers.AutoTokenizer.from_pretrained(work)(TEXTS)["input_ids"]
    except Exception as error:
        raise Failed(f"{case.kind}: {case.name}: transformers refuses it") from error
    if found != expected:
        raise Failed(f"{case.kind}: {case.name}: other ids than transformers'")
    return "equal"


def check_gguf(case: Bad, good: Good, work: Path) -> str:
    """Configuration, tensors and ids against transformers' own reader."""
    source = open_source(work / "model.gguf")
    tokenizer = load_tokenizer(work / "model.gguf")
    source.match_tokenizer(tokenizer)
    arrays = {key: source.read_key(key) for key in source.slots}
    try:
        cls = transformers.AutoModelForCausalLM
        model = cls.from_pretrained(work, gguf_file="model.gguf", dtype=torch.float32)
    except Exception as error:
        reason = str(error).splitlines()[:1]
        raise Failed(f"{case.kind}: {case.name}: the reference refuses it: {reason}") from error
    expected = model.state_dict()
    config = TextConfig.from_hf(model.config)
    equal = all(np.array_equal(array, expected[key].numpy()) for key, array in arrays.items())
    if not equal or source.config.text != config:
        raise Failed(f"{case.kind}: {case.name}: read as something else")
    return "equal"


def check_converted(case: Bad, good: Good, work: Path) -> str:
    """What is still read must be what was written."""
    folder = ConvertedFolder(work)
    load_tokenizer(work)
    arrays = list(folder.read(sorted(folder.shapes())))
    config = ConvertedFolder(good.converted).config
    equal = all(np.array_equal(a, b) for a, b in zip(arrays, good.arrays, strict=True))
    known = (
        "source",
        "revision",
        "content_hash",
        "model.text.rope_theta",
        "model.text.rms_norm_eps",
    )
    if not equal or (folder.config != config and not case.name.startswith(known)):
        raise Failed(f"{case.kind}: {case.name}: read as something else")
    return "equal"


CHECKS: dict[str, Callable[[Bad, Good, Path], str]] = {
    "config": check_text,
    "weights": check_text,
    "llava config": check_llava,
    "original config": check_original,
    "preprocessor": check_images,
    "processor": check_images,
    "adapter": check_adapter,
    "tokenizer": check_tokenizer,
    "converted": check_converted,
    "gguf": check_gguf,
}


def table(outcomes: dict[Bad, str]) -> str:
    """How many cases of each kind ended how."""
    counts = Counter((case.kind, outcome) for case, outcome in outcomes.items())
    lines = [
        f"{kind:18} {outcome:26} {count:4}" for (kind, outcome), count in sorted(counts.items())
    ]
    return "\n".join([*lines, f"{'all':45} {len(outcomes):4}"])
