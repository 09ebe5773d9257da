"""Recall and its ties, captioned images from files, drawn captions, a whole run."""

import io
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFont
from test_composed import write_cirr, write_fashioniq
from test_sts import write_years

from e5v_jax import E5V, cli
from e5v_jax.evaluate.analyse import analyse
from e5v_jax.evaluate.cached_encoder import CachedEncoder
from e5v_jax.evaluate.command import evaluate
from e5v_jax.evaluate.config import AnalyseArgs, EvaluateConfig
from e5v_jax.evaluate.drawing import draw_caption, wrap
from e5v_jax.evaluate.ranking import hits_at, rank_positives, top_k
from e5v_jax.evaluate.retrieval import (
    CaptionedImages,
    load_captioned,
    load_task,
    report_rows,
    score_retrieval,
    score_vectors,
    take,
)
from e5v_jax.evaluate.scores import Hits
from e5v_jax.families.text.processor import TextProcessor
from e5v_jax.presets import E5_V
from e5v_jax.prompts import IMAGE, TEXT

if TYPE_CHECKING:
    from hf_models import Case

AT = (1, 5, 10)


def unit(rng: np.random.Generator, rows: int, dims: int = 16) -> np.ndarray:
    vectors = rng.normal(size=(rows, dims)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def torch_recall(scores: np.ndarray, right: np.ndarray, k: int) -> np.ndarray:
    """The released definition: any positive among ``torch.topk``'s indices, per query."""
    best = torch.topk(torch.from_numpy(scores), k, dim=1).indices
    return torch.gather(torch.from_numpy(right), 1, best).any(dim=1).double().numpy()


def positives(right: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in right]


@pytest.mark.parametrize("seed", range(5))
def test_recall_equals_torch_without_ties(seed: int) -> None:
    """One positive and several, up to all of the gallery."""
    rng = np.random.default_rng(seed)
    queries, gallery = unit(rng, 60), unit(rng, 45)
    for count in (1, 5, 40):
        right = np.zeros((60, 45), bool)
        for row in right:
            row[rng.choice(45, count, replace=False)] = True
        ranks = rank_positives(queries, gallery, positives(right))
        for k in (*AT, 45):
            expected = torch_recall(queries @ gallery.T, right, k)
            np.testing.assert_allclose(hits_at(ranks, k), expected, atol=1e-12)


def test_ties_count_as_the_mean_over_all_orders() -> None:
    """Few integer scores, so nearly all tie: the mean of topk over every order of the gallery."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (40, 6)).astype(np.float32)
    right = rng.random((40, 6)) < 0.3
    right[np.arange(40), rng.integers(0, 6, 40)] = True
    ranks = rank_positives(scores, np.eye(6, dtype=np.float32), positives(right))
    for k in (1, 2, 5, 6):
        over_orders = [
            # a stable sort takes the first of equals: the order says which
            np.take_along_axis(
                right[:, order],
                np.argsort(-scores[:, order], axis=1, kind="stable")[:, :k],
                axis=1,
            ).any(axis=1)
            for order in map(list, itertools.permutations(range(6)))
        ]
        np.testing.assert_allclose(hits_at(ranks, k), np.mean(over_orders, axis=0), atol=1e-12)


def test_torch_s_choice_lies_between_the_best_and_the_worst_order() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 4, (200, 30)).astype(np.float32)
    right = np.zeros((200, 30), bool)
    right[np.arange(200), rng.integers(0, 30, 200)] = True
    ranks = rank_positives(scores, np.eye(30, dtype=np.float32), positives(right))
    for k in AT:
        ours, released = hits_at(ranks, k), torch_recall(scores, right, k)
        certain = (ours == 0) | (ours == 1)
        assert 0.1 < certain.mean() < 0.9
        np.testing.assert_array_equal(ours[certain], released[certain])
        assert abs(ours.mean() - released.mean()) < 0.15


def test_a_model_that_embeds_all_alike_scores_chance() -> None:
    """In file order it would score 100 %: the first caption of the first image."""
    same = np.full((100, 8), 8**-0.5, np.float32)
    scores = score_vectors("x", same, same[:20], np.repeat(np.arange(20), 5), "")
    values = {score.metric: score.items.value() for score in scores}
    assert values["image R@1"] == pytest.approx(5)
    assert values["image R@10"] == pytest.approx(50)
    assert values["text R@1"] == pytest.approx(5)
    expected = 1 - np.prod([(95 - i) / (100 - i) for i in range(10)])
    assert values["text R@10"] == pytest.approx(100 * expected)


def test_equal_gallery_vectors_tie_whatever_the_matrix_product_does() -> None:
    rng = np.random.default_rng(2)
    gallery = unit(rng, 37, 401)
    gallery[[5, 17, 36]] = gallery[0]
    ranks = rank_positives(unit(rng, 300, 401), gallery, [np.array([0])] * 300)
    assert (ranks.tied == 4).all()


def test_removed_item_is_no_answer() -> None:
    scores = np.array([[0.9, 0.5, 0.7, 0.1]], np.float32)
    eye = np.eye(4, dtype=np.float32)
    assert rank_positives(scores, eye, [np.array([1])]).better == 2
    assert rank_positives(scores, eye, [np.array([1])], removed=np.array([0])).better == 1
    assert top_k(scores, eye, 3).tolist() == [[0, 2, 1]]
    assert top_k(scores, eye, 3, removed=np.array([0])).tolist() == [[2, 1, 3]]
    below = rank_positives(-scores, eye, [np.array([1])], removed=np.array([3]))
    assert below == (0, 1, 1)  # also where all cosines are negative
    with pytest.raises(ValueError, match="query 0 has no positive in the gallery"):
        rank_positives(scores, eye, [np.array([0])], removed=np.array([0]))


def test_recall_of_captions_and_images_equals_the_released_code_s() -> None:
    """More queries than one chunk, five captions each, as retrieval.py computes it."""
    rng = np.random.default_rng(3)
    images, noise = unit(rng, 250), unit(rng, 1250)
    texts = images.repeat(5, axis=0) + 1.5 * noise
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    image_of = np.arange(1250) // 5
    right = image_of[:, None] == np.arange(250)
    found = {s.metric: s for s in score_vectors("x", texts, images, image_of, "")}
    scores = texts @ images.T
    for k in AT:
        image = torch_recall(scores, right, k).mean()
        text = torch_recall(np.ascontiguousarray(scores.T), right.T.copy(), k).mean()
        assert found[f"image R@{k}"].items.value() == pytest.approx(100 * image)
        assert found[f"text R@{k}"].items.value() == pytest.approx(100 * text)
    assert 5 < found["image R@1"].items.value() < 95
    items = found["image R@5"].items
    assert isinstance(items, Hits) and items.queries.tolist() == [5] * 250


# --- data


def write_set(folder: Path, images: int = 4, captions: int = 5) -> Path:
    """Images of one colour each, with captions that say which."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(images):
        Image.new("RGB", (40 + i, 30), (60 * i, 10, 200)).save(folder / "images" / f"{i}.png")
        texts = [f"picture {i}, told way {j}" for j in range(captions)]
        rows.append(json.dumps({"image": f"{i}.png", "captions": texts}))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def write_parquet(folder: Path, source: Path, captions: int) -> None:
    """The form of the authors' data sets: ``text`` a list, ``image`` a struct with the bytes."""
    (folder / "data").mkdir(parents=True)
    rows = [json.loads(line) for line in (source / "captions.jsonl").read_text().splitlines()]
    content = [(source / "images" / row["image"]).read_bytes() for row in rows]
    table = pa.table(
        {
            "image": [{"bytes": c, "path": r["image"]} for c, r in zip(content, rows, strict=True)],
            "text": [row["captions"][:captions] for row in rows],
        }
    )
    pq.write_table(table, folder / "data" / "test-00000-of-00001.parquet", row_group_size=3)


def test_real_photographs(shared: Path) -> None:
    data = load_captioned(shared / "data" / "flickr8k")
    assert len(data.images) == 200 and {len(group) for group in data.captions} == {5}
    assert data.captions[0][1] == "A person parachuting over the ocean"
    part = take(data, 50)
    assert part.images == data.images[::50] and part.captions == data.captions[::50]


def test_folder_and_parquet_are_the_same_set(tmp_path: Path) -> None:
    write_set(tmp_path / "a" / "coco", captions=7)
    write_parquet(tmp_path / "b" / "coco_test", tmp_path / "a" / "coco", captions=7)
    first, second = (load_task(tmp_path / name, "coco") for name in "ab")
    assert first.captions == second.captions
    assert [len(group) for group in first.captions] == [5] * 4  # the authors drop the others
    rng = np.random.default_rng(0)
    scores = [score_retrieval(colour_embedder(rng), "coco", data) for data in (first, second)]
    assert [s.items.value() for s in scores[0]] == [s.items.value() for s in scores[1]]
    assert len(load_task(tmp_path / "a" / "coco", "retrieval").captions[0]) == 7  # one's own: all


class ColourModel:
    """Embeds an image by its colour and a caption by the number in it, as E5V.encode would."""

    template = "llama3"
    preset = E5_V

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.sizes: list[int] = []

    def encode(self, inputs: list[Any], *, prompt: str, **_: Any) -> np.ndarray:
        self.prompts.append(prompt)
        self.sizes.append(len(inputs))
        return np.array([self.vector(item) for item in inputs], np.float32)

    def vector(self, item: Any) -> np.ndarray:
        if isinstance(item, str):
            number = int(item.split()[1].rstrip(","))
            return np.eye(8)[number]
        if isinstance(item, Image.Image):  # a drawn caption: dark pixels
            return np.eye(8)[6] + (np.asarray(item) < 128).mean()
        image = Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)
        red = image.convert("RGB").getpixel((0, 0))[0]  # type: ignore[index]
        return np.eye(8)[red // 60]


def colour_embedder(_: Any = None, **options: Any) -> CachedEncoder:
    return CachedEncoder(ColourModel(), batch_size=32, **options)  # type: ignore[arg-type]


def test_prompts_and_perfect_scores(tmp_path: Path) -> None:
    data = load_captioned(write_set(tmp_path))
    embedder = colour_embedder()
    scores = score_retrieval(embedder, "retrieval", data)
    assert [s.metric for s in scores] == [f"{w} R@{k}" for w in ("image", "text") for k in AT]
    assert all(score.items.value() == 100 for score in scores)
    assert embedder._model.prompts == [IMAGE, TEXT]  # type: ignore[attr-defined]
    embedder = colour_embedder()
    drawn = score_retrieval(embedder, "i2i-retrieval", data, drawn=True)
    assert embedder._model.prompts == [IMAGE, IMAGE]  # type: ignore[attr-defined]
    assert drawn[0].items.value() < 100


def test_few_images_are_in_memory_at_once(tmp_path: Path) -> None:
    """Embedded in pieces; each item is made when its piece comes."""
    made: list[int] = []
    embedder = colour_embedder()

    def make(number: int) -> Image.Image:
        made.append(number)
        assert len(made) <= 64 * (1 + len(embedder._model.sizes))  # type: ignore[attr-defined]
        return Image.new("RGB", (8 + number, 8))

    vectors = embedder.embed(range(200), prompt=IMAGE, make=make, where=str)
    assert vectors.shape == (200, 8) and made == list(range(200))
    assert embedder._model.sizes == [64, 64, 64, 8]  # type: ignore[attr-defined]


def test_paper_figures_only_beside_the_paper_s_set() -> None:
    def rows(images: int, captions: int) -> list[float | None]:
        data = CaptionedImages([Path(str(i)) for i in range(images)], [["a"] * captions] * images)
        rng = np.random.default_rng(0)
        texts, pictures = unit(rng, images * captions, 4), unit(rng, images, 4)
        of = np.repeat(np.arange(images), captions)
        scores = score_vectors("flickr30k", texts, pictures, of, "")
        found = report_rows("flickr30k", data, scores, label="Flickr30K")
        assert found[0].items == f"{images} images, {images * captions} captions"
        return [row.published.paper for row in found]

    assert rows(1000, 5) == [79.5, 95.0, 97.6, 88.2, 98.7, 99.4]
    assert rows(999, 5) == rows(1000, 4) == [None] * 6


LINE = '{"image": "0.png", "captions": ["a"]}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"{LINE}\n{{", r"captions\.jsonl, row 2: not valid JSON"),
        (f"{LINE}\n[1]", r"row 2: found '\[1\]', expected an object with 'image'"),
        ('{"image": "0.png"}', r"row 1: no 'captions'; found image"),
        ('{"image": 3, "captions": ["a"]}', r"row 1: 'image' is '3', expected a str"),
        ('{"image": "0.png", "captions": "a"}', r"row 1: 'captions' is 'a', expected a list"),
        ('{"image": "0.png", "captions": []}', r"row 1: captions \[\], expected a list of texts"),
        ('{"image": "0.png", "captions": [" "]}', r"row 1: captions \[' '\], expected a list of"),
        ('{"image": "no.png", "captions": ["a"]}', r"row 1: image 'no\.png' not found in .*images"),
        (LINE, r"captions\.jsonl: 1 images, expected at least 2"),
        (f"{LINE}\n{LINE}", r"row 2: image .*0\.png is there already: see .*row 1; join the rows"),
        (f"{LINE}\n" + LINE.replace("0.", "./0."), r"row 2: image .*0\.png is there already"),
        (
            LINE.replace('"image"', '"captions": [], "image"'),
            r"row 1: key 'captions' is there twice",
        ),
        (LINE.replace("0.png", "0\\u0000.png"), r"row 1: image '0\\x00\.png' not found"),
        (LINE.replace("0.png", 300 * "x"), r"row 1: image 'x*' not found"),
        ("[" * 9999, r"row 1: not valid JSON \(maximum recursion depth"),
        (f"{LINE}\n\xff", r"row 2: expected UTF-8"),
    ],
)
def test_damaged_captions(tmp_path: Path, content: str, message: str) -> None:
    write_set(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_captioned(tmp_path)
    assert "\n" not in str(error.value)


def test_an_image_by_two_links_is_one_image(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "images" / "9.png").symlink_to("0.png")
    with (tmp_path / "captions.jsonl").open("a") as file:
        file.write(LINE.replace("0.png", "9.png"))
    with pytest.raises(ValueError, match=r"row 5: image .*0\.png is there already: see .*row 1"):
        load_captioned(tmp_path)


def test_texts_are_checked_before_the_model_is_loaded(
    tmp_path: Path, llava: "Callable[[str], Case]", monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own processor; a drawn caption may say anything. Special tokens are text, to it."""
    write_set(tmp_path)
    captions = tmp_path / "captions.jsonl"
    said = captions.read_text()
    captions.write_text(said.replace("picture 2, told way 3", "half a \\ud83d"))

    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("loaded")

    monkeypatch.setattr(E5V, "from_pretrained", load)
    folder = str(llava("llama-gqa").folder)
    args = EvaluateConfig(model=folder, data=tmp_path, tasks="i2i-retrieval")
    with pytest.raises(RuntimeError, match="loaded"):
        evaluate(args)
    with pytest.raises(ValueError, match=r"captions\.jsonl, row 3: the text contains the lone"):
        evaluate(replace(args, tasks="i2i-retrieval,retrieval"))
    captions.write_text(said.replace("picture 2, told way 3", "a <|eot_id|> here"))
    with pytest.raises(RuntimeError, match="loaded"):
        evaluate(replace(args, tasks="i2i-retrieval,retrieval"))
    # one that minds them shows whose texts are asked about
    check = partialmethod(TextProcessor.check_text, special_tokens="refuse")
    monkeypatch.setattr(TextProcessor, "check_text", check)
    message = r"captions\.jsonl, row 3: the text contains '<\|eot_id\|>' \(at character 2\), which"
    with pytest.raises(ValueError, match=message):
        evaluate(replace(args, tasks="i2i-retrieval,retrieval"))
    with pytest.raises(ValueError, match=message):
        analyse(AnalyseArgs(model=folder, data=tmp_path, output=tmp_path / "out"))
    write_years(tmp_path)
    file = tmp_path / "STS" / "STSBenchmark" / "sts-test.csv"
    file.write_text(file.read_text().replace("d e", "d </s>"))
    with pytest.raises(ValueError, match=r"sts-test\.csv, row 2: the text contains '</s>' \(at"):
        evaluate(replace(args, tasks="stsb"))
    composed = {"cirr": write_cirr(tmp_path), "fashioniq-dress": write_fashioniq(tmp_path)}
    for task, root in composed.items():
        (file,) = root.glob(f"{task.partition('-')[0]}/captions/cap*.json")
        file.write_text(file.read_text().replace(" 7", " <image>"))
        with pytest.raises(
            ValueError, match=r"query 7: the text contains '<image>' \(at character"
        ):
            evaluate(replace(args, tasks=task))


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl: not found; expected lines"):
        load_task(tmp_path, "retrieval")
    with pytest.raises(FileNotFoundError, match=r"neither coco/captions\.jsonl nor coco_test/"):
        load_task(tmp_path, "coco")
    (tmp_path / "coco_test").mkdir()
    with pytest.raises(FileNotFoundError, match=r"coco_test: no file test\*\.parquet in it"):
        load_task(tmp_path, "coco")
    broken = tmp_path / "coco_test" / "test-0.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"test-0\.parquet: not a whole Parquet file"):
        load_task(tmp_path, "coco")
    pq.write_table(pa.table({"text": [["a"]], "picture": [1]}), broken)
    with pytest.raises(ValueError, match=r"no column image; found text, picture, expected text, i"):
        load_task(tmp_path, "coco")


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    message = r"royokong/coco_test: cannot be fetched from the hub \(no route to host\): fetch it"
    with pytest.raises(OSError, match=message) as error:
        load_task(Path("hub"), "coco")
    assert "\n" not in str(error.value)


def test_damaged_image_is_named(
    tmp_path: Path, llava: "Callable[[str], Case]", monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_set(tmp_path)
    (folder / "images" / "2.png").write_bytes(b"no image")
    embedder = CachedEncoder(llava("llama-gqa").e5v, batch_size=4)
    with pytest.raises(ValueError, match=r"^[^\n]*images/2\.png: [^\n]*$"):
        score_retrieval(embedder, "retrieval", load_captioned(folder))


# --- drawing


def ink(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns that have dark pixels."""
    dark = np.asarray(image.convert("L")) < 128
    return np.flatnonzero(dark.any(axis=1)), np.flatnonzero(dark.any(axis=0))


def test_drawn_caption() -> None:
    image = draw_caption("A dog runs.")
    assert image.size == (800, 400) and image.mode == "RGB"
    colours = np.unique(np.asarray(image).reshape(-1, 3), axis=0)
    assert (colours[0] == 0).all() and (colours[-1] == 255).all()  # black on white
    rows, columns = ink(image)
    assert 20 <= columns.min() < 30
    assert abs((rows.min() + rows.max()) / 2 - 200) < 15  # centred
    assert 25 < np.ptp(rows) < 45  # the height of 40-point letters


def test_long_captions_wrap_between_words() -> None:
    text = "A large group of children are standing on a school stage in front of an audience today"
    rows, columns = ink(draw_caption(text))
    assert columns.max() < 780
    gaps = np.flatnonzero(np.diff(rows) > 1)
    assert len(gaps) == 2  # three lines, apart from each other
    assert abs((rows.min() + rows.max()) / 2 - 200) < 15
    font = ImageFont.load_default(40)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert " ".join(wrap(text, font)) == text
    assert wrap("  a \n b ", font) == ["a b"]


def test_a_word_longer_than_a_line_is_broken() -> None:
    font = ImageFont.load_default(40)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = wrap("so " + "W" * 60 + " long", font)
    assert len(lines) > 3 and "".join(lines).replace(" ", "") == "so" + "W" * 60 + "long"
    assert all(font.getlength(line) <= 760 for line in lines)


def test_different_captions_look_different() -> None:
    assert np.any(np.asarray(draw_caption("a cat")) != np.asarray(draw_caption("a car")))


# --- the command


def test_whole_run_with_a_random_model_is_chance(
    tmp_path: Path, llava: "Callable[[str], Case]", shared: Path
) -> None:
    """Photographs and captions, drawn ones too: nothing of the answer leaks into the question."""
    source = shared / "data" / "flickr8k"
    rows = (source / "captions.jsonl").read_text().splitlines()[::5]
    (tmp_path / "set" / "images").mkdir(parents=True)
    for row in rows:
        name = json.loads(row)["image"]
        with Image.open(source / "images" / name) as image:
            image.resize((50, 40)).save(tmp_path / "set" / "images" / name)
    (tmp_path / "set" / "captions.jsonl").write_text("\n".join(rows) + "\n")
    evaluate(
        EvaluateConfig(
            model=str(llava("llama-gqa").folder),
            data=tmp_path / "set",
            tasks="retrieval,i2i-retrieval",
            dtype="float32",
            output=tmp_path / "out",
        )
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert [r["task"] for r in results] == ["retrieval"] * 6 + ["i2i-retrieval"] * 6
    chance = {
        "image": lambda k: k / 40,
        "text": lambda k: 1 - np.prod(1 - 5 / (200 - np.arange(k))),
    }
    for row in results:
        kind, at = row["metric"].split(" R@")
        expected = 100 * chance[kind](int(at))
        # twice the interval's width: twelve figures must all hold
        reach = max(row["high"] - row["low"], 100 * 3 / 40)
        assert abs(row["value"] - expected) < reach, row


def test_impossible_flags(tmp_path: Path) -> None:
    for args, message in (
        (EvaluateConfig(model="m", tasks="coco"), "--data: needed"),
        (EvaluateConfig(data=tmp_path), "--model: needed"),
        (EvaluateConfig(model="m", data=tmp_path, tasks="cirr-test"), "--output: cirr-test writes"),
    ):
        with pytest.raises(cli.UsageError, match=message):
            evaluate(args)
    shutil.rmtree(tmp_path)
