"""Malformed and odd inputs from seeds, see fuzz_inputs.py; -s prints what came of them.

The libraries of TIFF print lines of their own to stderr about damage, past Python.
"""

import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fuzz_images import fuzz_evaluation, fuzz_image
from fuzz_inputs import Rng, fuzz_folder, fuzz_pairs, fuzz_prompt, fuzz_rows, fuzz_text

if TYPE_CHECKING:
    from hf_models import Case


KINDS: "dict[str, tuple[Callable[[Rng, Path, Case], str], int, int]]" = {
    # what makes and judges a case, how many in `make test`, how many in all
    "texts": (fuzz_text, 4, 40),
    "prompts": (fuzz_prompt, 20, 60),
    "rows": (fuzz_rows, 40, 200),
    "pairs": (fuzz_pairs, 20, 80),
    "folders": (fuzz_folder, 15, 50),
    "images": (fuzz_image, 60, 300),
    "evaluation": (fuzz_evaluation, 40, 200),
}


def run(kind: str, cases: range, folder: Path, case: "Case") -> None:
    """Run cases of a kind; all are run, those that end badly are listed."""
    fuzz = KINDS[kind][0]
    outcomes: Counter[str] = Counter()
    bad = []
    for number in cases:
        (folder / "case").mkdir()
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow's own, about damage
                outcome = fuzz(np.random.default_rng([number, len(kind)]), folder / "case", case)
        except Exception as error:
            outcome = "bad"
            bad.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:600]}")
        outcomes[outcome] += 1
        shutil.rmtree(folder / "case")
    print(f"{kind}: {len(cases)} cases, {', '.join(f'{n} {what}' for what, n in outcomes.items())}")
    assert not bad, "\n".join(bad)
    assert len(outcomes) > 1, "all cases ended alike: what do they try?"


@pytest.mark.parametrize("kind", KINDS)
def test_some(kind: str, tmp_path: Path, llava: "Callable[[str], Case]") -> None:
    run(kind, range(KINDS[kind][1]), tmp_path, llava("llama-gqa"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all(kind: str, tmp_path: Path, llava: "Callable[[str], Case]") -> None:
    run(kind, range(KINDS[kind][1], KINDS[kind][2]), tmp_path, llava("llama-gqa"))
