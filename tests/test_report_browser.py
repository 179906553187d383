"""The report in a browser: it shows its pictures, sorts them, fits a phone, is legible, and loads and runs nothing."""

import contextlib
import io
import shutil

import numpy as np
import pytest
from audited_run import HOSTILE, colour, write_run
from PIL import Image

from firm_jax.report import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=300_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report's address, and the records of the pictures that it shows."""
    workdir = tmp_path_factory.mktemp("run")
    kept = write_run(workdir)
    return write_report(workdir).as_uri(), kept


@contextlib.contextmanager
def opened(browser, address, width, scheme="light"):
    """A page, with what it asked for and what it said in `requests` and `said`."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    context.set_default_timeout(300_000)
    page = context.new_page()
    page.requests, page.said = [], []
    page.on("request", lambda request: page.requests.append(request.url))
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    yield page
    context.close()


@pytest.fixture(scope="module")
def phone(browser, report):
    with opened(browser, report[0], 390) as page:
        yield page


@pytest.fixture(scope="module")
def desk(browser, report):
    with opened(browser, report[0], 1280, "dark") as page:
        yield page


def shown(page) -> list[tuple[str, int, int]]:
    """(set, epoch, image) of the cards that are not hidden, as they stand."""
    cards = page.evaluate(
        "[...document.querySelectorAll('article')].filter(card => !card.hidden)"
        ".map(card => [card.dataset.set, Number(card.dataset.epoch), Number(card.dataset.image)])"
    )
    return [tuple(card) for card in cards]


def name(record) -> tuple[str, int, int]:
    return record["set"], record["epoch"], record["image"]


MEASURES = {
    "reward": lambda record: record["reward"],
    "entropy": lambda record: max(j["entropy"] for j in record["judgements"]),
    "disagreement": lambda record: abs((record["judgements"][0]["score"] - 1) / 4 - record["judgements"][0]["oracle"]),
}


@pytest.mark.fault("hostile-answer")
def test_nothing_is_loaded_and_nothing_of_others_is_run(phone, report):
    address, kept = report
    assert [url for url in phone.requests if not url.startswith("data:")] == [address]
    assert phone.said == [] and phone.evaluate("window.pwned") is None
    assert len(shown(phone)) == len(kept)
    words = phone.evaluate("[...document.querySelectorAll('blockquote')].map(quote => quote.textContent)")
    assert words.count(f"I see {HOSTILE}") == sum(record["image"] == 0 for record in kept) > 0
    # Were a text not escaped, the page's policy would still not run it, nor send anything anywhere.
    phone.evaluate(
        "const script = document.createElement('script'); script.textContent = 'window.pwned = 2';"
        "document.body.append(script); document.body.insertAdjacentHTML('beforeend',"
        "'<img id=probe src=x onerror=\"window.pwned = 3\"><img id=beacon src=http://127.0.0.1:9/beacon>')"
    )
    phone.wait_for_timeout(200)
    assert phone.evaluate("window.pwned") is None and any("Content Security Policy" in line for line in phone.said)
    phone.evaluate("for (const id of ['probe', 'beacon']) document.getElementById(id).remove()")


@pytest.mark.parametrize("size", ["phone", "desk"])
def test_nothing_is_wider_than_the_screen(size, request):
    page = request.getfixturevalue(size)
    wide = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(element => {"
        "  const box = element.getBoundingClientRect();"
        "  return box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5)"
        "}).map(element => element.outerHTML.slice(0, 120))"
    )
    assert wide == [] and page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_screenshot_shows_the_pictures_where_they_belong(phone, report):
    by_name = {name(record): record for record in report[1]}
    seen = 0
    for place in (0, len(by_name) // 2):
        card = phone.locator("article").nth(place)
        card.scroll_into_view_if_needed()
        boxes = card.evaluate(  # when all that has come into view is laid out and painted
            "async card => { card.scrollIntoView(); const images = [...card.querySelectorAll('img')];"
            "  await Promise.all(images.map(image => image.decode()));"
            "  for (const _ of [1, 2, 3]) await new Promise(requestAnimationFrame); card.scrollIntoView();"
            "  return images.map(image => {"
            "  const box = image.getBoundingClientRect(); return [box.left, box.top, box.right, box.bottom] }) }"
        )
        picture = np.asarray(Image.open(io.BytesIO(phone.screenshot())).convert("RGB"), int)
        record = by_name[shown(phone)[place]]
        for box, expected in zip(boxes, [(record["image"], 0, 0), colour(record)], strict=True):
            left, top, right, bottom = (round(edge) for edge in box)
            assert right - left > 100 and bottom - top > 100, "large enough to look at"
            crop = picture[top + 4 : bottom - 4, left + 4 : right - 4]
            assert np.abs(crop - expected).max() <= 2
            seen += 1
    assert seen == 4


@pytest.mark.parametrize("key", list(MEASURES))
def test_the_buttons_sort_by_mouse_and_by_keyboard(phone, report, key):
    measures = {name(record): MEASURES[key](record) for record in report[1]}
    button = phone.locator(f"[data-sort={key}]")
    for press, sign, word in ((button.click, -1, "highest"), (lambda: button.press("Enter"), 1, "lowest")):
        press()
        order = [measures[card] for card in shown(phone)]
        known = [value for value in order if value is not None]
        assert len(order) == len(measures) and known == sorted(known, key=lambda value: sign * value)
        assert None not in order[: len(known)], "what is missing comes last, either way"
        assert phone.locator("#told").inner_text() == f"{len(order)} of {len(order)} pictures, by {key}, {word} first"
        assert button.get_attribute("aria-pressed") == "true"
    assert len(set(order)) > 10
    phone.locator("[data-sort=epoch]").click()


def test_the_gallery_can_be_narrowed_down(desk, report):
    desk.locator("[data-filter=set]").select_option("eval")
    desk.locator("[data-filter=kept]").select_option("highest reward")
    wanted = {name(r) for r in report[1] if r["set"] == "eval" and r["kept"] == "highest reward"}
    assert set(shown(desk)) == wanted and 0 < len(wanted) < len(report[1])
    for chosen in ("set", "kept"):
        desk.locator(f"[data-filter={chosen}]").select_option("")
    assert len(shown(desk)) == len(report[1])


CONTRAST = """
() => {
  const light = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255)
      .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
  };
  const pairs = {};
  for (const element of document.querySelectorAll("main *")) {
    const text = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!text || element.closest("svg *")) continue;
    const [one, other] = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
    pairs[element.tagName + "." + element.className] = (one + 0.05) / (other + 0.05);
  }
  return pairs;
}
"""


@pytest.mark.parametrize("size", ["phone", "desk"])
def test_every_text_stands_out_in_light_and_in_dark(size, request):
    page = request.getfixturevalue(size)
    pairs = page.evaluate(CONTRAST)
    assert len(pairs) > 20 and min(pairs.values()) >= 4.5, {what: value for what, value in pairs.items() if value < 4.5}
    assert page.evaluate("[...document.images].every(image => image.alt.length > 4)")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 600) == (size == "phone")


def test_without_scripts_the_gallery_is_whole_and_has_no_dead_buttons(browser, report):
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.goto(report[0])
    assert page.locator("article").count() == len(report[1]) and not page.locator("#controls").is_visible()
    context.close()
