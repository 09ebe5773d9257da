"""The search page in headless Chromium: what people do with it, and axe-core's view of it.

    E5V_SCREENSHOTS=docs python -m pytest tests/test_search_page.py -k screenshots

writes the pictures of docs/search.md. Chromium is the system's (apt-get install chromium).
"""

import base64
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from search_fakes import embed_all, embed_one
from search_scenes import draw_scene, embed_scene, embed_scenes, index_scenes

from e5v_jax.search.index import update
from e5v_jax.search.writer import Writer

pytest.importorskip("uvicorn", reason="pip install -e '.[search]'")
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
)

from search_server import serving  # noqa: E402 - it needs uvicorn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), "")
if not CHROMIUM:
    pytest.skip("no Chromium: apt-get install chromium", allow_module_level=True)

DESKTOP, PHONE = {"width": 1200, "height": 860}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    index_scenes(place)
    return place


@pytest.fixture(scope="module")
def address(place: Path) -> Iterator[str]:
    with serving(place / "index", embed_scene) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: "Browser") -> "Iterator[BrowserContext]":
    context = browser.new_context(viewport=DESKTOP)
    context.set_default_timeout(10_000)
    yield context
    context.close()


@pytest.fixture
def page(context: "BrowserContext", address: str) -> "Iterator[Page]":
    """The page, loaded; at its end nothing was asked of another host and nothing went wrong."""
    page = context.new_page()
    asked, wrong = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda message: wrong.append(message.text) if message.type == "error" else None
    )
    page.goto(address)
    playwright.expect(page.locator("#empty h2")).to_be_visible()
    yield page
    assert asked
    assert not [url for url in asked if not url.startswith((f"{address}/", "data:", "blob:"))]
    asked_for = ("400 (Bad Request)", "net::ERR_FAILED")  # by a test
    assert not [line for line in wrong if not any(x in line for x in asked_for)]


def submit(page: "Page", text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    settle(page)


def settle(page: "Page") -> None:
    """Wait for the answer and the thumbnails that are seen."""
    wait_for(
        page,
        "document.querySelector('#results').ariaBusy === 'false' && "
        "[...document.querySelectorAll('#results img')].every("
        "(i) => i.complete || i.getBoundingClientRect().top > innerHeight)",
    )


def wait_for(page: "Page", condition: str) -> None:
    """Wait 10 s; playwright's own way is JavaScript in a string, which the page forbids."""
    reached = page.evaluate(
        f"""async () => {{
            const end = performance.now() + 10000;
            while (!({condition}) && performance.now() < end)
                await new Promise((resolve) => setTimeout(resolve, 10));
            return {condition};
        }}"""
    )
    assert reached, condition


def names(page: "Page") -> list[str]:
    return page.locator("#results .name").all_text_contents()


def scores(page: "Page") -> list[float]:
    found = page.locator("#results .score").all_text_contents()
    return [float(text.replace("\N{MINUS SIGN}", "-")) for text in found]


def drop(page: "Page", image: Image.Image, *, paste: bool = False) -> None:
    """Drop a picture on the page, or paste it."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    page.evaluate(
        """([base64, paste]) => {
            const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "mine.jpg", { type: "image/jpeg" }));
            const options = { bubbles: true, cancelable: true };
            const events = paste
                ? [new ClipboardEvent("paste", { ...options, clipboardData: data })]
                : ["dragover", "drop"].map(
                      (kind) => new DragEvent(kind, { ...options, dataTransfer: data }));
            for (const event of events) document.body.dispatchEvent(event);
        }""",
        [base64.b64encode(file.getvalue()).decode(), paste],
    )
    page.wait_for_selector("#chips li")
    settle(page)


def violations(page: "Page") -> list[str]:
    """What axe-core finds, serious and critical, with the elements."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {[node['html'] for node in each['nodes']]}"
        for each in found
        if each["impact"] in ("serious", "critical")
    ]


def test_words(page: "Page") -> None:
    submit(page, "snow")
    card = page.locator("#results img").first.bounding_box()
    assert card is not None and abs(card["width"] / card["height"] - 4 / 3) < 0.02
    assert all(name.startswith(("snow", "diary.txt:3")) for name in names(page)[:5])
    assert scores(page) == sorted(scores(page), reverse=True)
    assert page.locator("#status").text_content() == "40 of 40 shown"
    assert page.locator("h1").text_content() == "Search 36 photographs, 4 texts"
    assert page.locator("#results img").first.evaluate("image => image.naturalWidth") == 400
    assert "q=snow" in page.url


def test_a_photograph_and_words(page: "Page") -> None:
    """Dropped, changed by words, taken away; then pasted; then chosen."""
    drop(page, draw_scene("beach", 2))
    assert names(page)[0] == "beach-2.jpg"
    alone = scores(page)[0]
    assert page.locator("#chips li").text_content() == "mine.jpg\N{MULTIPLICATION SIGN}"
    submit(page, "at night")
    both = dict(zip(names(page), scores(page), strict=True))
    assert both["beach-2.jpg"] < alone and any("night" in name for name in list(both)[:6])
    page.click("#chips button")
    settle(page)
    assert page.locator("#chips li").count() == 0 and names(page)[0] == "diary.txt:2"
    page.fill("#text", "")
    drop(page, draw_scene("desert", 1), paste=True)
    assert names(page)[0] == "desert-1.jpg"
    file = io.BytesIO()
    draw_scene("forest", 4).save(file, "PNG")
    page.set_input_files(
        "#file", {"name": "f.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    playwright.expect(page.locator("#chips span")).to_have_text("f.png")
    settle(page)
    assert names(page)[0] == "forest-4.jpg"


def test_the_slider(page: "Page") -> None:
    submit(page, "sunset")
    every = scores(page)
    middle = every[9]
    page.locator("#threshold").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }",
        middle,
    )
    left = scores(page)
    assert left == every[: len(left)] and left[-1] >= middle - 0.001 and 8 <= len(left) <= 12
    assert page.locator("#status").text_content() == f"{len(scores(page))} of 40 shown"
    page.locator("#threshold").press("Home")
    assert scores(page) == every


def test_near_duplicates(page: "Page") -> None:
    submit(page, "night")
    assert {"night-0.jpg", "night-0-edited.jpg"} <= set(names(page))
    page.check("#duplicates")
    settle(page)
    assert len({"night-0.jpg", "night-0-edited.jpg"} & set(names(page))) < 2
    page.uncheck("#duplicates")
    settle(page)
    assert len(names(page)) == 40


def test_more_like_this_and_back(page: "Page") -> None:
    submit(page, "desert")
    first = names(page)[0]
    page.locator("#results .like").first.click()
    playwright.expect(page.locator("#chips span")).to_have_text(f"like {first}")
    settle(page)
    assert first not in names(page) and all("desert" in name for name in names(page)[:4])
    page.go_back()
    playwright.expect(page.locator("#chips li")).to_have_count(0)
    settle(page)
    assert page.input_value("#text") == "desert" and names(page)[0] == first
    page.go_forward()
    playwright.expect(page.locator("#chips span")).to_have_text(f"like {first}")
    page.reload()
    playwright.expect(page.locator("#chips span")).to_have_text(f"like {first}")


def test_more_and_less(page: "Page") -> None:
    submit(page, "beach")
    before = names(page)
    page.click("summary")
    page.fill("#more", "night")
    page.fill("#less", "snow")
    page.press("#less", "Enter")
    settle(page)
    assert names(page) != before and "more=night&less=snow" in page.url


def test_keyboard(page: "Page") -> None:
    """Everything without a mouse: / search, arrows, Enter, arrows in the viewer, Esc, M."""
    page.keyboard.press("/")
    page.keyboard.type("forest")
    page.keyboard.press("Enter")
    settle(page)
    found = names(page)

    def wait_for_focus(name: str) -> None:
        focused = "document.activeElement.querySelector('.name')?.textContent"
        wait_for(page, f"{focused} === {json.dumps(name)}")

    page.keyboard.press("ArrowDown")
    wait_for_focus(found[0])
    page.keyboard.press("ArrowRight")
    wait_for_focus(found[1])
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('#results')).gridTemplateColumns.split(' ').length"
    )
    page.keyboard.press("ArrowDown")
    wait_for_focus(found[1 + columns])
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    playwright.expect(page.locator("#viewed")).to_have_text(found[0])
    page.keyboard.press("ArrowRight")
    playwright.expect(page.locator("#viewed")).to_have_text(found[1])
    wait_for(page, "document.querySelector('#stage img').naturalWidth === 480")
    page.keyboard.press("Escape")
    playwright.expect(page.locator("#viewer")).to_be_hidden()
    wait_for_focus(found[1])
    page.keyboard.press("m")
    playwright.expect(page.locator("#chips span")).to_have_text(f"like {found[1]}")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text"


def test_a_text_in_the_viewer(page: "Page") -> None:
    submit(page, "forest")
    page.locator("#results .words").first.click()
    assert page.locator("#stage p").text_content() == "The forest path is soft with needles."
    assert page.locator("#viewed").text_content() == "diary.txt:4"
    page.click("#similar")
    playwright.expect(page.locator("#chips span")).to_have_text("like diary.txt")


def test_errors_and_how_they_go(page: "Page") -> None:
    page.click("summary")
    page.fill("#less", "snow")
    submit(page, "snow")  # half of it is left
    assert page.locator("#error").is_hidden()
    page.route("**/api/search", lambda route: route.abort())
    submit(page, "snow")
    assert "The server does not answer" in (page.locator("#error").text_content() or "")
    assert page.locator("#results li").count() == 0
    page.unroute("**/api/search")
    page.click("#error button")
    playwright.expect(page.locator("#results li").first).to_be_visible()
    assert page.locator("#error").is_hidden()
    broken = {"name": "x.heic", "mimeType": "image/heic", "buffer": b"no picture"}
    page.set_input_files("#file", broken)
    playwright.expect(page.locator("#error")).to_contain_text("not an image in a format")
    page.set_input_files("#file", {"name": "x.pdf", "mimeType": "application/pdf", "buffer": b"x"})
    playwright.expect(page.locator("#error")).to_contain_text("x.pdf is no photograph.")
    page.click("#error button")
    playwright.expect(page.locator("#error")).to_be_hidden()


def test_nothing_is_indexed(context: "BrowserContext", tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    writer = Writer(tmp_path / "index")
    update(writer, [tmp_path / "files"], embed_all)
    writer.close()
    with serving(tmp_path / "index", embed_scene) as address:
        page = context.new_page()
        page.goto(address)
        playwright.expect(page.locator("#empty h2")).to_have_text("Nothing is indexed yet")
        assert "e5v_jax.search index" in (page.locator("#empty code").text_content() or "")
        submit(page, "x")
        playwright.expect(page.locator("#empty h2")).to_have_text("Nothing found")
        assert not violations(page)


def test_more_than_a_screen(context: "BrowserContext", tmp_path: Path) -> None:
    """60 at a time, the slider where it was."""
    (tmp_path / "files").mkdir()
    lines = "".join(f"Line number {number}.\n" for number in range(130))
    (tmp_path / "files" / "lines.txt").write_text(lines)
    writer = Writer(tmp_path / "index")
    update(writer, [tmp_path / "files"], embed_all)
    writer.close()
    with serving(tmp_path / "index", embed_one) as address:
        page = context.new_page()
        page.goto(f"{address}/?q=line")
        settle(page)
        for shown in (60, 120, 130):
            playwright.expect(page.locator("#results li")).to_have_count(shown)
            if shown < 130:
                page.click("#further")
        assert page.locator("#further").is_hidden()
        assert scores(page) == sorted(scores(page), reverse=True)


def test_names_are_text_and_no_markup(context: "BrowserContext", tmp_path: Path) -> None:
    """A file's name and a text with tags in them are shown as they are."""
    bad = '<img src=x onerror="document.title=1">'
    (tmp_path / "files").mkdir()
    draw_scene("night", 0).save(tmp_path / "files" / "<b>bold & more.jpg")
    (tmp_path / "files" / "a.txt").write_text(f"{bad}\n")
    writer = Writer(tmp_path / "index")
    update(writer, [tmp_path / "files"], embed_scenes)
    writer.close()
    with serving(tmp_path / "index", embed_scene) as address:
        page = context.new_page()
        page.goto(f"{address}/?q={bad}&like=1 image {bad}")
        settle(page)
        assert bad in page.locator("#results .words").all_text_contents()
        page.locator("#results .words").first.click()
        assert page.locator("#stage p").text_content() == bad
        assert page.title() == "Search" and page.locator("#results img[src=x], b").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_accessible_and_never_too_wide(
    browser: "Browser", address: str, scheme: Any, size: Any
) -> None:
    """Of axe-core nothing serious, in every state; no scrolling sideways, down to 320 pixels."""
    with browser.new_context(viewport=size, color_scheme=scheme) as context:
        page = context.new_page()

        def fits() -> None:
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0

        page.goto(address)
        playwright.expect(page.locator("#empty h2")).to_be_visible()
        assert not violations(page)
        drop(page, draw_scene("beach", 1))
        page.click("summary")
        submit(page, "night")
        assert not violations(page)
        fits()
        page.locator("#results .open:has(img)").first.click()
        wait_for(page, "document.querySelector('#stage img').complete")
        assert not violations(page)
        fits()
        page.click("#close")
        page.route("**/api/search", lambda route: route.abort())
        submit(page, "night")
        assert not violations(page)
        fits()
        page.set_viewport_size({"width": 320, "height": 640})
        fits()


@pytest.mark.skipif(not os.environ.get("E5V_SCREENSHOTS"), reason="asked for by E5V_SCREENSHOTS")
def test_screenshots(browser: "Browser", address: str) -> None:
    """The pictures of docs/search.md."""
    folder = Path(os.environ["E5V_SCREENSHOTS"])

    def shoot(page: "Page", name: str) -> None:
        page.wait_for_timeout(300)
        page.screenshot(path=folder / f"{name}.jpg", type="jpeg", quality=80)

    with browser.new_context(viewport=DESKTOP, color_scheme="light") as context:
        page = context.new_page()
        page.goto(address)
        submit(page, "sunset")
        shoot(page, "search-words")
    with browser.new_context(viewport=DESKTOP, color_scheme="dark") as context:
        page = context.new_page()
        page.goto(address)
        drop(page, draw_scene("beach", 2))
        page.check("#duplicates")
        submit(page, "at night")
        shoot(page, "search-dark")
    with browser.new_context(viewport=PHONE, device_scale_factor=2) as context:
        page = context.new_page()
        page.goto(address)
        submit(page, "forest")
        shoot(page, "search-phone")
