"""The engine: the vectors of E5V.encode, whoever asks at the same time, and what it refuses."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hf_models import NORM, Case, changed, picture
from PIL import Image

from e5v_jax import E5V
from e5v_jax.families.base import BatchShape
from e5v_jax.serve.engine import Engine
from e5v_jax.serve.items import Embedded, Item
from e5v_jax.serve.observer import BatchReport, Observer
from e5v_jax.serve.shapes import declare_shapes, fitting_shape, read_size
from e5v_jax.serve.waiting import BadItem, Draining, Overloaded, TooLarge, UnusableVector

TOLERANCE = 1e-6
TEXTS = [f"Text {i}: {'very ' * (i % 5)}short." for i in range(20)]


@pytest.fixture(scope="module")
def e5v(llava: Callable[[str], Case]) -> E5V:
    return llava("llama-gqa").e5v


class Gate:
    """A device that waits to be let through, and what it was given."""

    def __init__(self, e5v: E5V, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[tuple[int, BatchShape]] = []
        self.entered, self._open, self._start = threading.Event(), threading.Event(), e5v.start
        monkeypatch.setattr(e5v, "start", self)

    def __call__(self, batch: Any, prepared: Any) -> Any:
        self.batches.append((len(batch.items), batch.shape))
        self.entered.set()
        assert self._open.wait(20)
        return self._start(batch, prepared)

    def let_through(self) -> None:
        self._open.set()


class Notes(Observer):
    """What the engine told."""

    def __init__(self) -> None:
        self.batches: list[BatchReport] = []

    def ran(self, batch: BatchReport) -> None:
        self.batches.append(batch)


@pytest.fixture
def make(e5v: E5V) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(**options: Any) -> Engine:
        engines.append(Engine(e5v, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def texts(*names: str, **options: Any) -> list[Item]:
    return [Item(text=name, **options) for name in names]


def vectors(futures: "list[Future[Embedded]]") -> np.ndarray:
    return np.stack([future.result(20).vector for future in futures])


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    return float(np.abs(a - b).max())


# --- vectors -------------------------------------------------------------------------------------


def test_the_vectors_of_encode(e5v: E5V, make: Callable[..., Engine]) -> None:
    """Texts, images and both, mixed in one call; with prompts and texts that are cut."""
    engine = make()
    images = [picture(40, 60), picture(28, 28)]
    items = [*texts(*TEXTS), *(Item(image=image) for image in images)]
    items.append(Item(text="smaller", image=images[0]))
    expected = e5v.encode([*TEXTS, *images, {"text": "smaller", "image": images[0]}])
    found = engine.submit(items)
    assert largest(vectors(found), expected) <= TOLERANCE
    for options in (
        {"truncate": "end", "max_length": 90},
        {"truncate": "start", "max_length": 90},
    ):
        long = [TEXTS[0], "a long text " * 30]
        expected = e5v.encode(long, **options)
        found = engine.submit(texts(*long, **options))
        assert largest(vectors(found), expected) <= TOLERANCE
    assert found[-1].result().tokens == 90
    assert engine.dimensions == 64 and engine.healthy


def test_image_and_text_apart(
    e5v: E5V, make: Callable[..., Engine], llava: Callable[[str], Case]
) -> None:
    """Where a preset adds the vectors of the two, each is computed once."""
    case = llava("mistral")
    added = E5V.from_pretrained(case.folder, dtype="float32", preset="unime-llava-1.6")
    image = picture(40, 60)
    inputs = ["words", image, {"text": "words", "image": image}, {"text": "cut", "image": image}]
    items = [Item(text="words"), Item(image=image), Item("words", image), Item("cut", image)]
    engine = Engine(added)
    try:
        expected = added.encode(inputs)
        before = added.statistics.items
        assert largest(vectors(engine.submit(items)), expected) <= TOLERANCE
        assert added.statistics.items - before == 3
        bad = engine.submit([Item("", image), Item(image=image)])
        with pytest.raises(BadItem, match="empty"):
            bad[0].result(20)
        assert largest(vectors(bad[1:]), expected[1:2]) <= TOLERANCE
    finally:
        engine.close()


def test_many_callers(e5v: E5V, make: Callable[..., Engine]) -> None:
    """Sixteen threads at a time, some asking for the same: everybody gets the right vectors."""
    engine = make(cache_size=10)
    named = dict(zip(TEXTS, e5v.encode(TEXTS), strict=True))

    def ask(caller: int) -> float:
        names = [TEXTS[(caller * 7 + i * i) % len(TEXTS)] for i in range(1 + caller % 5)]
        found = vectors(engine.submit(texts(*names)))
        return largest(found, np.stack([named[name] for name in names]))

    with ThreadPoolExecutor(16) as pool:
        assert max(pool.map(ask, range(200))) <= TOLERANCE
    assert engine.waiting_items == engine.waiting_tokens == 0


def test_equal_items_once_and_cached(e5v: E5V, make: Callable[..., Engine]) -> None:
    notes = Notes()
    engine = make(cache_size=3, observer=notes)
    one = picture(28, 28)
    same = replace(Item(image=one.copy()))
    items = [*texts("a", "b", "a", "a"), Item(image=one), same]
    found = engine.submit(items)
    assert largest(vectors(found), e5v.encode(["a", "b", "a", "a", one, one])) <= TOLERANCE
    assert sum(batch.items for batch in notes.batches) == 3
    vectors(engine.submit([*texts("b", "a"), Item(image=one)]))
    assert sum(batch.items for batch in notes.batches) == 3
    vectors(engine.submit(texts("c")))  # the oldest goes: "b"
    vectors(engine.submit(texts("a")))
    assert sum(batch.items for batch in notes.batches) == 4
    vectors(engine.submit(texts("b")))
    assert sum(batch.items for batch in notes.batches) == 5
    other = texts("a", prompt_name="sts")  # another vector
    assert largest(vectors(engine.submit(other)), e5v.encode(["a"], "sts")) <= TOLERANCE


def test_keys() -> None:
    """Every field tells items apart; an image by its file, or by its pixels."""
    one, other = picture(8, 8), picture(8, 8, seed=1)
    items = [
        Item("a"),
        Item("b"),
        Item(""),
        Item(image=one),
        Item("a", one),
        Item(image=other),
        Item(image=one, image_digest="1"),
        Item("a", prompt_name="query"),
        Item("a", instruction="query"),
        Item("a", truncate="end"),
        Item("a", max_length=9),
        Item(image=Image.new("P", (8, 8))),
        Item(image=Image.new("L", (8, 8))),
    ]
    assert len({item.key for item in items}) == len(items)
    assert Item(image=one).key == Item(image=one.copy()).key
    assert Item(image=one, image_digest="1").key == Item(image=other, image_digest="1").key


# --- batches -------------------------------------------------------------------------------------


def test_what_waits_is_the_next_batch(
    e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first goes at once, alone; the rest, of several calls, together."""
    gate = Gate(e5v, monkeypatch)
    engine = make()
    found = engine.submit(texts("first"))
    assert gate.entered.wait(20)
    for i in range(6):
        found += engine.submit(texts(f"then {i}"))
    gate.let_through()
    assert largest(vectors(found), e5v.encode(["first", *(f"then {i}" for i in range(6))])) < 1e-6
    assert [items for items, _ in gate.batches] == [1, 6, *[7] * (len(gate.batches) - 2)]


def test_cancelled_items_cost_nothing(
    e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(e5v, monkeypatch)
    engine = make()
    (first,) = engine.submit(texts("first"))
    assert gate.entered.wait(20)
    gone, stays = engine.submit(texts("gone", "stays"))
    (shared,) = engine.submit(texts("gone too"))
    (also,) = engine.submit(texts("gone too"))
    assert gone.cancel() and shared.cancel()
    assert engine.waiting_items == 3
    gate.let_through()
    assert stays.result(20) and also.result(20) and first.result(20)
    with pytest.raises(CancelledError):
        gone.result(20)
    assert [items for items, _ in gate.batches] == [1, 2]
    assert engine.waiting_items == engine.waiting_tokens == 0
    assert engine.submit(texts("gone"))[0].result(20)


def test_a_short_call_does_not_wait_for_a_long_one(
    e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(e5v, monkeypatch)
    engine = make(max_num_batched_tokens=400)
    (first,) = engine.submit(texts("first"))
    assert gate.entered.wait(20)
    order: list[str] = []
    long = engine.submit(texts(*(f"long {i:02}" for i in range(40))))
    short = engine.submit(texts("short"))
    for name, future in [*zip("l" * 40, long, strict=True), ("s", short[0])]:
        future.add_done_callback(lambda _, name=name: order.append(name))
    gate.let_through()
    vectors([first, *long, *short])
    assert "s" in order[:10] and len(order) == 41


def test_warm_up(e5v: E5V, make: Callable[..., Engine]) -> None:
    """After it, texts up to the declared length and images of the declared size compile nothing."""
    engine = make(max_num_batched_tokens=500)
    declare = partial(declare_shapes, e5v.processor, max_tokens=500, multiple=1)
    shapes = declare(longest_text=80, images=[(28, 56)])
    assert {shape.shape_key for shape in shapes} == {0, 3}
    assert all(shape.length > 48 for shape in shapes)  # the prompt is longer
    assert declare(longest_text=0, images=[]) == []
    done: list[int] = []
    engine.warm_up(shapes, done.append)
    assert done == list(range(1, len(shapes) + 1))
    before = dict(e5v.statistics.compilations)
    assert {*shapes} <= before.keys()
    items: list[Item] = []
    for i in range(40):
        items.append(Item(f"{i:02} " + "x" * (i % 12)))
        items += [Item(image=picture(28, 56, seed=i))] * (i % 8 == 0)
    found = vectors(engine.submit(items))
    assert e5v.statistics.compilations == before
    given = [item.text or item.image for item in items]
    assert largest(found, e5v.encode(given)) <= TOLERANCE


def test_shapes() -> None:
    compiled = [BatchShape(1, 32), BatchShape(4, 64), BatchShape(16, 32), BatchShape(4, 32, 2)]
    assert fitting_shape(BatchShape(3, 20), 3, compiled) == BatchShape(4, 64)
    assert fitting_shape(BatchShape(6, 20), 5, compiled) == BatchShape(16, 32)
    assert fitting_shape(BatchShape(4, 40, 2), 4, compiled) == BatchShape(4, 40, 2)
    assert read_size("640x480") == (480, 640)
    for bad in ("640", "x", "0x10", "-1x2", "1x2x3"):
        with pytest.raises(ValueError, match="expected a width and a height"):
            read_size(bad)


# --- refusals ------------------------------------------------------------------------------------


def test_bad_items_each_for_itself(e5v: E5V, make: Callable[..., Engine]) -> None:
    class Broken(Image.Image):
        size, mode = (28, 28), "RGB"
        width = height = 28

        def tobytes(self, *_: Any) -> bytes:
            return b""

        def convert(self, *_: Any, **__: Any) -> Image.Image:
            raise OSError("truncated")

        resize = convert

    items = [
        Item("good"),
        Item(" "),
        Item("x" * 3000),
        Item(),
        Item("a", prompt_name="none"),
        Item("a", instruction="find"),
        Item("a", max_length=9000),
        Item(image=Broken()),
        Item("good too"),
    ]
    found = make().submit(items)
    reasons = []
    for future in found[1:-1]:
        with pytest.raises(BadItem) as error:
            future.result(20)
        reasons.append(str(error.value))
    expected = ["the text is empty", " tokens, the model takes at most", "neither 'text' nor"]
    expected += ["prompt_name 'none'", "instruction 'find'", "max_length 9000", "truncated"]
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason
    assert largest(vectors([found[0], found[-1]]), e5v.encode(["good", "good too"])) <= TOLERANCE


def test_limits(e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is more than may wait is refused as a whole, and changes nothing."""
    gate = Gate(e5v, monkeypatch)
    engine = make(max_waiting_items=4, max_waiting_tokens=500, max_waiting_bytes=100_000)
    first = engine.submit(texts("first"))
    assert gate.entered.wait(20)
    second = engine.submit(texts("second"))
    waiting = engine.waiting_tokens
    for items, words in (
        (texts("a", "b", "c"), "2 items are waiting, with these 3 more than the 4 allowed"),
        (texts("x" * 420), "tokens are waiting"),
    ):
        with pytest.raises(Overloaded, match=words) as error:
            engine.submit(items)
        assert 1 <= error.value.retry_after <= 60
    for items, words in (
        (texts(*"abcde"), "5 items at once, at most 4"),
        (texts("x" * 900), "tokens at once, at most 500"),
        ([Item(image=picture(300, 300))], "270000 bytes at once, at most 100000"),
    ):
        with pytest.raises(TooLarge, match=words):
            engine.submit(items)
    assert (engine.waiting_items, engine.waiting_tokens) == (2, waiting)
    gate.let_through()
    assert len(vectors([*first, *second])) == 2
    assert len(vectors(engine.submit(texts(*"abcd")))) == 4


def test_drain(e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is answered, nothing more is taken; who still waits at the end is told."""
    gate = Gate(e5v, monkeypatch)
    engine = make()
    found = engine.submit(texts("first"))
    assert gate.entered.wait(20)
    found += engine.submit(texts("second"))
    assert not engine.drain(0.05)
    with pytest.raises(Draining, match="about to end"):
        engine.submit(texts("late"))
    gate.let_through()
    assert engine.drain(20)
    assert len(vectors(found)) == 2
    other = make()
    gate._open.clear()
    gate.entered.clear()
    left = [*other.submit(texts("one")), *other.submit(texts("another"))]
    assert gate.entered.wait(20)
    threading.Timer(0.1, gate.let_through).start()
    other.close()
    with pytest.raises(Draining):
        left[1].result(20)


def test_a_failing_device(
    e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody is told, and nothing hangs."""
    engine = make()

    def fail(*_: Any) -> None:
        time.sleep(0.05)
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(e5v, "start", fail)
    found = engine.submit(texts("a", "b"))
    for future in found:
        with pytest.raises(Draining, match="the device failed: RESOURCE_EXHAUSTED"):
            future.result(20)
    assert not engine.healthy
    with pytest.raises(Draining, match="the device failed"):
        engine.submit(texts("c"))
    other = make()
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        other.warm_up([BatchShape(1, 16)])
    assert not other.healthy and other.drain(1)


def test_the_end_of_an_engine_ends_its_warm_up(
    e5v: E5V, make: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a shape to be compiled is told, too."""
    gate = Gate(e5v, monkeypatch)
    engine = make()
    found = engine.submit(texts("first"))
    assert gate.entered.wait(20)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.warm_up, [BatchShape(1, 16)])
        threading.Timer(0.1, gate.let_through).start()
        engine.close()
        with pytest.raises(Draining):
            waiting.result(20)
    assert found[0].done()


def test_no_vector_that_is_not_finite(e5v: E5V, make: Callable[..., Engine]) -> None:
    engine = make(cache_size=10)
    with changed(e5v, NORM, lambda scale: scale * np.nan), pytest.raises(UnusableVector):
        engine.submit(texts("a"))[0].result(20)
    assert largest(vectors(engine.submit(texts("a"))), e5v.encode(["a"])) <= TOLERANCE
