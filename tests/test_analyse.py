"""The measures of an embedding space, its plots, and the analyse command."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration

import e5v_jax
from e5v_jax import cli
from e5v_jax.evaluate.analyse import (
    BLANK,
    FULL,
    PROMPTS,
    STS_PROMPTS,
    AnalyseArgs,
    analyse,
    blank,
)
from e5v_jax.evaluate.files import any_text
from e5v_jax.evaluate.plots import PROJECTIONS, Panel, draw_projection
from e5v_jax.evaluate.space import measure_gap, project, tsne, uniformity
from e5v_jax.presets import E5_V
from e5v_jax.prompts import IMAGE, STS, TEXT

if TYPE_CHECKING:
    from hf_models import Case


def unit(rng: np.random.Generator, rows: int, dims: int = 10, shift: float = 0.0) -> np.ndarray:
    vectors = rng.normal(size=(rows, dims)) + shift * np.eye(dims)[0]
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_measures_equal_their_definitions() -> None:
    """Alignment and uniformity against the code printed in Wang & Isola 2020."""
    rng = np.random.default_rng(0)
    texts, images = unit(rng, 60, shift=1), unit(rng, 25)
    image_of = np.sort(rng.integers(0, 25, 60))
    gap = measure_gap(texts, images, image_of)
    x, y = torch.tensor(texts), torch.tensor(images)[torch.tensor(image_of)]
    assert gap.alignment == pytest.approx(float((x - y).norm(dim=1).pow(2).mean()), abs=1e-6)
    for vectors, ours in ((texts, gap.uniformity_texts), (images, gap.uniformity_images)):
        distances = torch.pdist(torch.tensor(vectors), p=2).pow(2)
        assert ours == pytest.approx(float(distances.mul(-2).exp().mean().log()), abs=1e-5)
    cosine = texts @ images.T
    right = image_of[:, None] == np.arange(25)
    assert gap.matched_cosine == pytest.approx(cosine[right].mean(), abs=1e-6)
    assert gap.mismatched_cosine == pytest.approx(cosine[~right].mean(), abs=1e-6)
    centroids = np.linalg.norm(texts.mean(axis=0) - images.mean(axis=0))
    assert gap.centroid_distance == pytest.approx(centroids, abs=1e-6)


def test_a_gap_shows() -> None:
    rng = np.random.default_rng(1)
    near = measure_gap(unit(rng, 300), unit(rng, 300), np.arange(300))
    far = measure_gap(unit(rng, 300, shift=8), unit(rng, 300, shift=-8), np.arange(300))
    assert near.centroid_distance < 0.2 and far.centroid_distance > 1.5
    same = unit(rng, 300)
    assert measure_gap(same, same, np.arange(300)).matched_cosine == pytest.approx(1)


def test_uniformity_in_pieces() -> None:
    """More rows than one piece, equal rows among them."""
    rng = np.random.default_rng(2)
    vectors = np.concatenate([unit(rng, 1100), unit(rng, 1).repeat(30, axis=0)])
    distances = torch.pdist(torch.tensor(vectors).double(), p=2).pow(2)
    expected = float(distances.mul(-2).exp().mean().log())
    assert uniformity(vectors) == pytest.approx(expected, abs=1e-6)
    assert uniformity(np.ones((5, 1), np.float32)) == pytest.approx(0)


def test_projections() -> None:
    rng = np.random.default_rng(3)
    vectors = unit(rng, 50, shift=4)
    plain, centred = project(vectors, centred=False), project(vectors, centred=True)
    _, _, v = torch.linalg.svd(torch.tensor(vectors).double(), full_matrices=False)
    expected = vectors @ v[:2].numpy().T
    np.testing.assert_allclose(np.abs(plain), np.abs(expected), atol=1e-5)
    assert plain[:, 0].min() > 0  # the first direction is that of the mean
    np.testing.assert_allclose(centred.mean(axis=0), 0, atol=1e-9)
    total = np.var(vectors, axis=0).sum()
    best = np.linalg.eigvalsh(np.cov(vectors.T, bias=True))[-2:].sum()
    assert np.var(centred, axis=0).sum() == pytest.approx(best, rel=1e-5) and best < total
    np.testing.assert_array_equal(project(vectors, centred=True), centred)


def test_tsne_keeps_groups_apart() -> None:
    rng = np.random.default_rng(4)
    groups = np.concatenate([unit(rng, 40, shift=9), unit(rng, 40, shift=-9)])
    placed = tsne(groups)
    assert placed.shape == (80, 2)
    first, second = placed[:40], placed[40:]
    spread = max(np.std(first), np.std(second))
    assert np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)) > spread
    np.testing.assert_array_equal(tsne(groups), placed)  # seeded
    assert tsne(groups[:4]).shape == (4, 2)  # few points


@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.file)
def test_plots_are_pictures_with_both_colours(tmp_path: Path, projection: Any) -> None:
    rng = np.random.default_rng(5)
    panels = [Panel(name, unit(rng, 30, shift=3), unit(rng, 30)) for name in ("one", "two")]
    draw_projection(projection, panels, tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert pixels.shape[1] > 1.5 * pixels.shape[0]  # two panels side by side
    for half in np.array_split(pixels, 2, axis=1):
        reddish = (half[..., 0] - half[..., 2] > 60).sum()
        bluish = (half[..., 2] - half[..., 0] > 60).sum()
        assert reddish > 200 and bluish > 200


def test_full_prompts_are_the_paper_s() -> None:
    assert PROMPTS[FULL] == (TEXT, IMAGE)
    assert STS_PROMPTS[FULL] == STS
    for prompts in (*zip(*PROMPTS.values(), strict=True), tuple(STS_PROMPTS.values())):
        none, without, full = prompts
        assert none.strip() in ("<sent>", "<image>")
        assert without == full.replace(" in one word", "")


def test_blank_image_has_the_size_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    Image.fromarray(rng.integers(0, 256, (20, 33, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    image = blank(tmp_path / "a.png")
    assert image.size == (33, 20) and image.getcolors() == [(33 * 20, (122, 116, 104))]


def photographs(tmp_path: Path, shared: Path, count: int) -> Path:
    source = shared / "data" / "flickr8k"
    lines = (source / "captions.jsonl").read_text().splitlines()[:count]
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for line in lines:
        with Image.open(source / "images" / json.loads(line)["image"]) as image:
            small = image.resize((40, 30))
        small.save(folder / "images" / json.loads(line)["image"])
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def test_command(tmp_path: Path, shared: Path, llava: "Callable[[str], Case]") -> None:
    """Every row and picture, with a random model; what must differ between rows does."""
    adapter = make_adapter(tmp_path / "adapter", llava("llama-gqa"))
    analyse(
        AnalyseArgs(
            model=str(llava("llama-gqa").folder),
            data=photographs(tmp_path, shared, 10),
            adapter=adapter,
            dtype="float32",
            output=tmp_path / "out",
        )
    )
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    rows = content["images"]
    assert [(r["model"], r["prompt"]) for r in rows] == [
        (model, prompt)
        for model in ("before training", "after training")
        for prompt in (*PROMPTS, BLANK)
    ]
    assert len({r["matched_cosine"] for r in rows}) == 8  # model, prompt and image all count
    recall = content["recall"]
    for i in (3, 7):  # equal pictures: chance, whatever the texts
        assert recall[i]["image R@1"][0] == pytest.approx(10) == recall[i]["text R@1"][0]
        assert rows[i]["uniformity_images"] == pytest.approx(0, abs=1e-5)
    assert all(a <= value <= b for row in recall for value, a, b in list(row.values())[2:])
    differences = content["recall_minus_full_prompt"]
    assert [row["prompt"] for row in differences] == [*list(PROMPTS)[:2], BLANK] * 2
    for metric in ("image R@5", "text R@10"):  # of the blanked images of the first model
        expected = recall[3][metric][0] - recall[2][metric][0]
        assert differences[2][metric][0] == pytest.approx(expected)
    text = (tmp_path / "out" / "analysis.md").read_text()
    for name in ("svd.png", "pca.png", "tsne.png"):
        assert f"({name})" in text and (tmp_path / "out" / name).is_file()
    assert 'without "in one word"' in text


def test_one_model_at_a_time(
    tmp_path: Path, shared: Path, llava: "Callable[[str], Case]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the trained model is loaded, no weight of the bare one takes memory any more."""
    at_load: list[int] = []
    real = e5v_jax.E5V.from_pretrained

    def measured(*args: Any, **options: Any) -> e5v_jax.E5V:
        at_load.append(sum(array.nbytes for array in jax.live_arrays()))
        return real(*args, **options)

    def encode(_: e5v_jax.E5V, inputs: list[str], **__: Any) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(len(inputs), 8)).astype(np.float32)

    monkeypatch.setattr(e5v_jax.E5V, "from_pretrained", measured)
    monkeypatch.setattr(e5v_jax.E5V, "encode", encode)  # what is said does not matter here
    analyse(
        AnalyseArgs(
            model=str(llava("llama-gqa").folder),
            sts=shared / "data" / "sts",
            adapter=make_adapter(tmp_path / "adapter", llava("llama-gqa")),
            stride=100,
            output=tmp_path / "out",
        )
    )
    before, between = at_load
    assert between == before


def make_adapter(folder: Path, case: "Case") -> Path:
    """A PEFT LoRA with random factors for the language model of ``case``."""
    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets)
    torch.manual_seed(0)
    copied = LlavaNextForConditionalGeneration.from_pretrained(case.folder)
    model = peft.get_peft_model(copied, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_sts_ablation(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without images: the three prompts on STS-B, each with its interval."""

    class Fake:
        template = "chatml"
        preset = E5_V
        prompts: ClassVar[list[str]] = []

        @staticmethod
        def load_processor(*_: Any, **__: Any) -> Any:
            return SimpleNamespace(check_text=any_text)

        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> "Fake":
            return cls()

        def encode(self, inputs: list[str], *, prompt: str, **_: Any) -> np.ndarray:
            Fake.prompts.append(prompt)
            rng = np.random.default_rng(len(prompt))
            table = rng.normal(size=(256, 16))
            return np.array([table[list(t.encode())].sum(axis=0) for t in inputs], np.float32)

    monkeypatch.setitem(vars(e5v_jax), "E5V", Fake)
    analyse(AnalyseArgs(model="m", sts=shared / "data" / "sts", stride=10, output=tmp_path / "out"))
    assert list(dict.fromkeys(Fake.prompts)) == list(STS_PROMPTS.values())
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert content["images"] == []
    assert [r["prompt"] for r in content["sts"]] == list(STS_PROMPTS)
    for row in content["sts"]:
        low, high = row["interval"]
        assert low < row["spearman"] < high and row["pairs"] == 138 and row["model"] == "as given"
    assert not list((tmp_path / "out").glob("*.png"))


def test_impossible_flags(tmp_path: Path) -> None:
    with pytest.raises(cli.UsageError, match="--data or --sts: give"):
        analyse(AnalyseArgs(model="m", output=tmp_path))
    with pytest.raises(cli.UsageError, match="--stride: 0"):
        analyse(AnalyseArgs(model="m", output=tmp_path, sts=tmp_path, stride=0))
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl: not found; expected lines"):
        analyse(AnalyseArgs(model="m", output=tmp_path / "out", data=tmp_path))


def test_missing_plot_library_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"sklearn is needed .*pip install 'e5v-jax\[analyse\]'"):
        analyse(AnalyseArgs(model="m", output=tmp_path / "out", data=tmp_path))
