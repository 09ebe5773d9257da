"""``python -m e5v_jax.evaluate golden``: the figures that a model's authors printed, seen again.

For whoever has the checkpoint: the test of what random models cannot show, that weights, prompts,
pixels and positions are together what the authors ran.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e5v_jax.cli import UsageError
from e5v_jax.encode.model_args import ModelArgs

_MAX_BYTES = 20 * 2**20
_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class GoldenArgs(ModelArgs):
    """Compare a model's vectors with figures that its authors printed; exit code 1 when off."""

    image: Path | None = None
    """The photograph that the figures are about, as a file; by default it is fetched from the
    address that its authors name."""


@dataclass(frozen=True)
class Item:
    """One input of the authors' example."""

    text: str | None = None
    image: bool = False
    instruction: str | None = None  # with one it is a query, else a document


@dataclass(frozen=True)
class Golden:
    """What the authors of a checkpoint printed."""

    source: str
    image: str  # its address
    items: tuple[Item, ...]
    cosines: Mapping[tuple[int, int], float]  # of two items
    tolerance: float  # bf16, and other kernels than theirs
    vector: tuple[int, tuple[float, ...]] | None = None  # an item, the beginning of its vector
    vector_tolerance: float = 0.004


_DOG = (
    "A woman shares a joyful moment with her golden retriever on a sun-drenched beach at sunset, "
    "as the dog offers its paw in a heartwarming display of companionship and trust."
)
_QWEN3 = Golden(
    source="QwenLM/Qwen3-VL-Embedding, README and examples/embedding_vllm.ipynb; the vector is of "
    "vllm-project/vllm#33419",
    image="https://qianwen-res.oss-cn-beijing.aliyuncs.com/Qwen-VL/assets/demo.jpeg",
    items=(
        Item(
            "A woman playing with her dog on a beach at sunset.",
            instruction="Retrieve images or text relevant to the user's query.",
        ),
        Item(_DOG),
        Item(image=True),
        Item(_DOG, image=True),
    ),
    cosines={
        (0, 1): 0.7896,
        (0, 2): 0.7156,
        (0, 3): 0.7236,
        (1, 2): 0.7650,
        (1, 3): 0.8473,
        (2, 3): 0.8239,
    },
    tolerance=0.01,
    vector=(
        2,
        (
            *(-0.0718, -0.0181, 0.0100, -0.0056, -0.0496, 0.1104, -0.0361),
            *(-0.0260, -0.0032, -0.0061, 0.0405, 0.0244, 0.0386),
        ),
    ),
)
GOLDENS = {r".*qwen3-vl-embedding-2b": _QWEN3}
"""By a pattern of the checkpoint's name, in lower case."""


@dataclass(frozen=True)
class Check:
    """One figure of theirs and ours."""

    name: str
    theirs: float
    ours: float
    tolerance: float

    @property
    def is_off(self) -> bool:
        """Whether they differ by more than the tolerance."""
        return not abs(self.theirs - self.ours) <= self.tolerance


def find_golden(model: str) -> Golden:
    """The figures for a checkpoint by its name or folder. Raises UsageError: there are none."""
    name = Path(model).name.lower()
    for pattern, golden in GOLDENS.items():
        if re.fullmatch(pattern, name):
            return golden
    known = "Qwen/Qwen3-VL-Embedding-2B"
    raise UsageError(f"--model: no figures were published for {model}, but for {known}")


def fetch_image(address: str) -> bytes:
    """The bytes at an address that this file names. Raises ValueError: it cannot be had."""
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as response:
            data: bytes = response.read(_MAX_BYTES + 1)
    except (urllib.error.URLError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"{address}: {reason}; fetch it and give --image FILE") from error
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{address}: more than {_MAX_BYTES} bytes; give --image FILE")
    return data


def run_golden(model: Any, golden: Golden, image: Any) -> list[Check]:
    """Embed the items with ``model``, an E5V, and hold them against the authors' figures."""
    vectors = []
    for item in golden.items:
        given: Any = image if item.image else item.text
        if item.image and item.text is not None:
            given = {"text": item.text, "image": image}
        if item.instruction is None:
            vectors.append(model.encode_document(given))
        else:
            vectors.append(model.encode_query(given, instruction=item.instruction))
    checks = [
        Check(f"cosine of inputs {i + 1} and {j + 1}", theirs, ours, golden.tolerance)
        for (i, j), theirs in golden.cosines.items()
        for ours in [float(np.dot(vectors[i], vectors[j]))]
    ]
    if golden.vector is not None:
        index, numbers = golden.vector
        checks += [
            Check(f"input {index + 1}, number {n + 1}", theirs, ours, golden.vector_tolerance)
            for n, (theirs, ours) in enumerate(zip(numbers, vectors[index].tolist(), strict=False))
        ]
    return checks


def golden(args: GoldenArgs) -> None:
    """Print theirs and ours. Raises ValueError: one is off, or the photograph cannot be had."""
    figures = find_golden(args.model)
    args.check()
    image: Any = fetch_image(figures.image) if args.image is None else args.image
    checks = run_golden(args.load(), figures, image)
    print(f"{figures.source}\n")
    print("| | theirs | ours | tolerance | |\n|---|---|---|---|---|")
    for check in checks:
        mark = "off" if check.is_off else ""
        print(
            f"| {check.name} | {check.theirs:.4f} | {check.ours:.4f} | {check.tolerance} | {mark} |"
        )
    if off := [check for check in checks if check.is_off]:
        raise ValueError(
            f"{len(off)} of {len(checks)} figures are off, {off[0].name} first: weights, prompt, "
            "pixels or positions are not the authors'"
        )
    print(f"\nall {len(checks)} figures are the authors'")
