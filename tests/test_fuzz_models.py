"""Generated bad model files: each ends in one line, or in the vectors of transformers and peft."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_models
import fuzz_outcomes
import pytest
import test_gguf
import transformers
from fuzz_models import Bad
from fuzz_outcomes import Good
from hf_models import TEXT_RECIPES, Case, build_text
from test_convert import LAYOUTS, write_layout
from test_to_hf import make_peft

from e5v_jax.checkpoints import from_hf

SLOWEST = 20  # seconds: a case that hangs or fills the memory takes longer


@pytest.fixture(scope="module")
def good(llava: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("fuzz")
    transformers.utils.logging.disable_progress_bar()
    text = build_text(TEXT_RECIPES["llama"], folder / "text")
    index = '{"metadata": {}, "weight_map": {'
    keys = text.torch_model.state_dict()
    index += ", ".join(f'"{key}": "model.safetensors"' for key in keys) + "}}"
    (text.folder / "model.safetensors.index.json").write_text(index)
    (text.folder / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    case = llava("llama-gqa")
    for name in ("images", "processor"):
        shutil.copytree(case.folder, folder / name)
    case.processor.image_processor.save_pretrained(folder / "images")
    case.processor.save_pretrained(folder / "processor")
    images = Case(folder / "images", case.template, case.torch_model)
    write_layout(case, folder / "original", LAYOUTS["3-original"], sharded=False)
    make_peft(text, folder / "adapter")
    from_hf.convert(from_hf.Args(str(text.folder), folder / "converted"))
    (folder / "gguf").mkdir()
    test_gguf.write(folder / "gguf" / "model.gguf")
    return Good(
        text,
        images,
        folder / "processor",
        folder / "original",
        folder / "adapter",
        folder / "converted",
        folder / "gguf",
    )


def run_all(cases: list[Bad], good: Good, tmp_path: Path) -> None:
    outcomes, failed = {}, []
    for i, case in enumerate(cases):
        start = time.perf_counter()
        try:
            outcomes[case] = fuzz_outcomes.run(case, good, tmp_path / f"case{i}")
        except fuzz_outcomes.Failed as error:
            outcomes[case] = "FAILED"
            failed.append(str(error))
        if (seconds := time.perf_counter() - start) > SLOWEST:
            failed.append(f"{case.kind}: {case.name}: took {seconds:.0f} s")
    print(f"\n{fuzz_outcomes.table(outcomes)}")
    assert not failed, "\n".join(["", *failed])


FAST = 24  # of each kind; all there are take minutes


def test_a_sample(good: Good, tmp_path: Path) -> None:
    run_all(fuzz_models.draw(0, FAST), good, tmp_path)


@pytest.mark.slow
def test_all(good: Good, tmp_path: Path) -> None:
    run_all(fuzz_models.draw(1, None), good, tmp_path)
