"""Intervals, paired comparison, the report's formats and the comparison of two runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from e5v_jax.evaluate.published import PUBLISHED, Published
from e5v_jax.evaluate.report import (
    Report,
    Row,
    compare_runs,
    make_row,
    print_report,
    read_scores,
    to_json,
    to_markdown,
    write_report,
)
from e5v_jax.evaluate.scores import (
    RESAMPLES,
    Hits,
    Pairs,
    Score,
    compare,
    spearman,
    summarise,
)


def hits(values: np.ndarray, task: str = "cirr", metric: str = "R@1", data: str = "d") -> Score:
    return Score(task, metric, Hits(values.astype(float), np.ones(len(values), int)), data)


def test_spearman_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    for levels in (2, 3, 7, 10**9):  # few levels: nearly all values tie
        for n in (2, 3, 10, 999):
            x, y = rng.integers(0, levels, (2, n)).astype(np.float64)
            x[:2], y[:2] = (0, 1), (1, 0)  # never constant
            expected = scipy.stats.spearmanr(x, y).statistic
            assert spearman(x, y) == pytest.approx(expected, abs=1e-12)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9486833)


def test_spearman_of_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="all 3 values are 2"):
        spearman(np.array([1.0, 2, 3]), np.array([2.0, 2, 2]))


@pytest.mark.parametrize("levels", [3, 10**9])
def test_resampled_correlation_is_that_of_the_repeated_pairs(levels: int) -> None:
    """The counted ranks of a resample against scipy on the resample written out."""
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, levels, (2, 40)).astype(float)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=20)
    expected = [
        100 * scipy.stats.spearmanr(np.repeat(x, w), np.repeat(y, w)).statistic for w in weights
    ]
    np.testing.assert_allclose(Pairs(x, y).resample(weights), expected, rtol=0, atol=1e-9)


def test_resampled_recall_is_that_of_the_repeated_units() -> None:
    """Units with several queries: the mean is over queries, what is drawn are units."""
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 6, 30)
    items = Hits(rng.binomial(counts, 0.4).astype(float), counts)
    drawn = rng.integers(0, 30, (10, 30))
    weights = np.array([np.bincount(row, minlength=30) for row in drawn])
    expected = [100 * items.hits[row].sum() / counts[row].sum() for row in drawn]
    np.testing.assert_allclose(items.resample(weights), expected, rtol=1e-12)


def test_interval_of_a_recall_is_the_binomial_one() -> None:
    """Normal approximation: 1.96 sqrt(p (1 - p) / n) to each side."""
    score = hits(np.arange(1000) < 300)
    value, low, high = summarise([score])
    half = 196 * np.sqrt(0.3 * 0.7 / 1000)
    assert value == pytest.approx(30)
    assert low == pytest.approx(30 - half, abs=0.35) and high == pytest.approx(30 + half, abs=0.35)
    assert summarise([score]) == (value, low, high)  # seeded


def test_captions_of_one_image_are_one_draw() -> None:
    """Five captions that hit or miss together say no more than one: the interval stays as wide."""
    once = np.arange(200) < 60
    five = Score("a", "R@1", Hits(5.0 * once, np.full(200, 5)), "d")
    one = Score("a", "R@1", Hits(1.0 * once, np.ones(200, int)), "d")
    assert summarise([five]) == pytest.approx(summarise([one]))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 samples of a known correlation: about 95 % of the intervals hold it."""
    rng = np.random.default_rng(3)
    truth = 100 * 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman of a bivariate normal, r 0.6
    held = 0
    for _ in range(200):
        x = rng.normal(size=150)
        y = 0.6 * x + 0.8 * rng.normal(size=150)
        weights = rng.multinomial(150, np.full(150, 1 / 150), size=300)
        low, high = np.percentile(Pairs(x, y).resample(weights), [2.5, 97.5])
        held += low <= truth <= high
    assert 0.90 <= held / 200 <= 0.99


def test_mean_of_tasks() -> None:
    a, b = hits(np.arange(100) < 20, "x"), hits(np.arange(100) < 60, "y")
    value, low, high = summarise([a, b])
    assert value == pytest.approx(40)
    half = 196 * np.sqrt(0.2 * 0.8 / 100 + 0.6 * 0.4 / 100) / 2  # of independent tasks
    assert high - low == pytest.approx(2 * half, rel=0.1)


def test_paired_difference() -> None:
    rng = np.random.default_rng(4)
    first = rng.random(500) < 0.5
    second = first.copy()
    flipped = rng.choice(np.flatnonzero(~first), 25, replace=False)
    second[flipped] = True  # better on 25 queries, equal on the others
    value, low, high, p = compare(hits(first), hits(second))
    assert value == pytest.approx(5)
    half = 196 * np.sqrt(0.05 * 0.95 / 500)  # far narrower than of two unpaired halves (6.2)
    assert low == pytest.approx(5 - half, abs=0.4) and high == pytest.approx(5 + half, abs=0.4)
    assert p == pytest.approx(2 / (RESAMPLES + 1))  # the least that so many resamples can say
    worse = compare(hits(second), hits(first))
    assert worse == pytest.approx((-5, -high, -low, p))  # the same the other way round


def test_equal_runs_do_not_differ() -> None:
    score = hits(np.arange(50) < 20)
    assert compare(score, score) == (0, 0, 0, 1)
    noise = np.random.default_rng(5).random((2, 2000)) < 0.5
    assert compare(hits(noise[0]), hits(noise[1])).p > 0.05


def test_only_the_same_questions_can_be_compared() -> None:
    values = np.arange(50) < 20
    with pytest.raises(ValueError, match=r"did not answer the same questions \(other data\)"):
        compare(hits(values), hits(values, data="other"))


def test_published_figures() -> None:
    """A few of each table, typed again from the paper."""
    assert PUBLISHED["flickr30k", "image R@1"] == Published(79.5, None, 67.3, 78.8, 70.0)
    assert PUBLISHED["coco", "text R@1"] == Published(62.0, None, 58.1, 68.8, 63.5)
    assert PUBLISHED["coco", "image R@5"] == Published(76.5, 60.3)
    assert PUBLISHED["i2i-coco", "text R@10"] == Published(84.9)
    assert PUBLISHED["fashioniq-toptee", "R@50"] == Published(57.47)
    assert PUBLISHED["sts-average", "Spearman"] == Published(86.00, 75.8)
    sts = [f.paper for (task, _), f in PUBLISHED.items() if task.startswith(("sts1", "stsb", "si"))]
    assert np.mean(np.array(sts, float)) == pytest.approx(86.00, abs=0.005)
    for at in (10, 50):
        kinds = [PUBLISHED[f"fashioniq-{t}", f"R@{at}"].paper for t in ("dress", "shirt", "toptee")]
        average = PUBLISHED["fashioniq-average", f"R@{at}"].paper
        assert np.mean(np.array(kinds, float)) == pytest.approx(average, abs=0.01)


ROWS = [
    Row("stsb", "STS-B", "Spearman", "1379", 29.1049, 24.0, 34.25, Published(87.88)),
    Row("coco", "COCO", "image R@1", "5", 1.0, 0.5, 1.5, Published(52.0, clip=37.0)),
]


def test_formats() -> None:
    report = Report({"model": "a|b", "adapter": None}, ROWS)
    assert to_markdown(report).splitlines()[2:-2] == [
        "| setting | value |",
        "| --- | --- |",
        r"| model | a\|b |",
        "| adapter |  |",
        "",
        "| task | metric | items | score | 95 % interval | paper | paper, prompt only "
        "| CLIP ViT-L |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| STS-B | Spearman | 1379 | 29.10 | 24.00 to 34.25 | 87.88 |  |  |",
        "| COCO | image R@1 | 5 | 1.00 | 0.50 to 1.50 | 52.00 |  | 37.00 |",
    ]
    content = json.loads(to_json(report))
    assert content["settings"] == {"model": "a|b", "adapter": None}
    first = content["results"][0]
    assert (first["value"], first["low"], first["high"]) == (29.1049, 24.0, 34.25)
    assert first["published"]["paper"] == 87.88 and first["published"]["clip"] is None
    only_sts = to_markdown(Report({}, ROWS[:1]))
    assert "paper, prompt only" in only_sts and "CLIP" not in only_sts


def test_terminal_table_keeps_its_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_report(Report({}, ROWS))
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(figure in shown for figure in ("29.10", "24.00 to 34.25", "87.88", "37.00"))


def test_published_figures_stand_only_beside_comparable_ones() -> None:
    score = hits(np.arange(10) < 5, "fashioniq-dress", "R@10")
    assert make_row("fashioniq-dress", "d", "10", [score], True).published.paper == 23.75
    assert make_row("fashioniq-dress", "d", "10", [score], False).published == Published()


def write_run(folder: Path, scores: list[Score]) -> Path:
    folder.mkdir()
    write_report(Report({}, [], scores), folder)
    return folder


def test_items_survive_writing(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    scores = [
        hits(rng.random(30) < 0.5, "i2i-coco", "text R@10", "a" * 64),
        Score("stsb", "Spearman", Pairs(rng.random(9), rng.random(9)), "b"),
    ]
    found = read_scores(write_run(tmp_path / "run", scores))
    for score, again in zip(scores, found, strict=True):
        assert (again.task, again.metric, again.data) == (score.task, score.metric, score.data)
        assert summarise([again]) == summarise([score])


def test_compare_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = np.arange(200) < 80
    a = write_run(tmp_path / "a", [hits(base), hits(base, metric="R@5"), hits(base, "coco")])
    b = write_run(tmp_path / "b", [hits(np.arange(200) < 120), hits(base, metric="R@5")])
    compare_runs(a, b, output=tmp_path / "out")
    shown = capsys.readouterr().out
    assert "+20.00" in shown and f"only in {a}: coco" in shown
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    assert [(r["metric"], r["a"], r["b"], r["value"]) for r in results] == [
        ("R@1", 40, 60, 20),
        ("R@5", 40, 40, 0),
    ]
    assert results[0]["low"] < 20 < results[0]["high"] and results[1]["p"] == 1
    assert (
        "| cirr | R@1 | 40.00 | 60.00 | +20.00 |"
        in (tmp_path / "out" / "comparison.md").read_text()
    )


def test_compare_refuses_what_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [hits(np.arange(9) < 3)])
    with pytest.raises(FileNotFoundError, match=r"items\.npz: not found; expected the --output"):
        compare_runs(run, tmp_path)
    other = write_run(tmp_path / "other", [hits(np.arange(9) < 3, "coco")])
    with pytest.raises(ValueError, match=r"nothing to compare: .*run has cirr, .*other has coco"):
        compare_runs(run, other)
    content = (run / "items.npz").read_bytes()
    (run / "items.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"items\.npz: damaged"):
        compare_runs(run, other)


def damage(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    with np.load(file) as found:
        arrays: dict[str, Any] = dict(found)
    edit(arrays)
    np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda a: a.update({"cirr/R@1/hits": np.ones((3, 3))}),
            r"cirr/R@1: arrays of shapes \[\(",
        ),
        (lambda a: a.update({"cirr/R@1/hits": np.float64(1)}), r"damaged \("),
        (lambda a: a.update({"cirr/R@1/hits": np.ones(8)}), r"of shapes \[\(8,\), \(9,\)\]"),
        (lambda a: a.update({"cirr/R@1/hits": np.ones(0)}), r"of shapes \[\(0,\), \(9,\)\]"),
        (lambda a: a.update({"cirr/R@1/hits": np.full(9, np.nan)}), "or no finite score"),
        (lambda a: a.update({"cirr/R@1/queries": np.zeros(9)}), "or no finite score"),
        (lambda a: a.update({"cirr/R@1/hits": np.array(["a"] * 9)}), r"damaged \("),
        (lambda a: a.update({"cirr/R@1/hits": np.array([{}] * 9)}), r"damaged \(Object arrays can"),
        (lambda a: a.pop("cirr/R@1/queries"), r"damaged \("),
        (lambda a: a.update({"stsb/Spearman/data": np.array("x")}), r"damaged \("),
        (
            lambda a: a.update({f"cirr/R@1/{name}": np.ones(8) for name in ("hits", "queries")}),
            r"other number of items\): evaluate both",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_compare_refuses_damaged_items(tmp_path: Path, edit: Any, message: str) -> None:
    run = write_run(tmp_path / "run", [hits(np.arange(9) < 3)])
    other = write_run(tmp_path / "other", [hits(np.arange(9) < 4)])
    compare_runs(run, other)
    damage(other / "items.npz", edit)
    with pytest.raises(ValueError, match=message) as error:
        compare_runs(run, other)
    assert "\n" not in str(error.value)


def test_paths_that_are_not_utf8_are_written_at_the_end(tmp_path: Path) -> None:
    write_report(Report({"model": "caf\udce9"}, []), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["model"] == "caf\udce9"
    assert "caf\\udce9" in (tmp_path / "results.md").read_text()
