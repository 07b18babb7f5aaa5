"""The page as its users meet it: in Chromium, by mouse, by keyboard, and in a narrow window."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_ext import checkpoint
from gpt_ext.bpe import BPETokenizer
from tests.serve.browser import CHROMIUM, DRIVER, Browser
from tests.serve.server import Server, make_run

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)
SPANS = "document.querySelectorAll('#text span')"
SELECTED = "document.querySelector('#text [aria-selected=true]')?.id"
SHADED = "document.querySelectorAll('#text span[style]').length"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(
        tmp_path_factory.mktemp("browser"), context_length=32, model_dim=16, num_blocks=2
    )
    for step, loss in enumerate((3.0, 2.0, 1.5), 1):
        checkpoint.append_line(run / checkpoint.METRICS, {"step": step, "loss": loss})
    return run


@pytest.fixture(scope="module")
def server(run: Path) -> Iterator[Server]:
    server = Server(run, "--max-tokens", "1000")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium: Browser, server: Server) -> Iterator[Browser]:
    """On the page, in a desktop's window; its console stays silent, and it asks no one else."""
    chromium.window(1100, 900)
    chromium.scheme("light")
    chromium.requests()
    origin = f"http://127.0.0.1:{server.port}/"
    chromium.driver.get(origin)
    chromium.run("localStorage.clear(); sessionStorage.clear()")
    chromium.driver.get(origin)
    chromium.wait("document.title === 'tiny'")
    yield chromium
    assert chromium.errors() == []
    asked = [url for url in chromium.requests() if not url.startswith("data:")]
    assert asked
    assert [url for url in asked if not url.startswith(origin)] == []


def fill(browser: Browser, prompt: str, **settings: float) -> None:
    box = browser.find("#prompt")
    box.clear()
    box.send_keys(prompt)
    for name, value in settings.items():
        browser.run(f"document.getElementById('{name}').value = {value}")


def write(browser: Browser, prompt: str = "once upon ", length: int = 40) -> str:
    """What the page shows once it has written; the seed is the same each time."""
    fill(browser, prompt, max_tokens=length, seed=7)
    browser.find("#go").click()
    browser.wait("document.getElementById('status').textContent === 'Done.'")
    text: str = browser.value("document.getElementById('text').textContent")
    return text


def when_it_writes(browser: Browser, script: str) -> None:
    """Runs it once, when the first of an answer has come."""
    browser.run(f"""
        const text = document.getElementById('text');
        new MutationObserver((_, observer) => {{
            if (!text.querySelector(':scope > :not(.prompt)')) return;
            observer.disconnect();
            {script};
        }}).observe(text, {{childList: true}});""")


def test_it_writes_on_and_the_seed_decides(browser: Browser, server: Server) -> None:
    text = write(browser)
    settings = {"temperature": 0.8, "top_p": 1, "seed": 7, "max_tokens": 40}
    _, answer = server.complete(prompt="once upon ", **settings)
    assert text == "once upon " + answer["choices"][0]["text"]
    assert write(browser) == text
    assert browser.value("document.querySelectorAll('#text .prompt').length") == len("once upon ")


def test_stop_and_escape_end_the_writing(browser: Browser) -> None:
    escape = "document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))"
    for end in ("document.getElementById('go').click()", escape):
        fill(browser, "a", max_tokens=1000)
        when_it_writes(browser, end)
        browser.find("#go").click()
        browser.wait("document.getElementById('status').textContent === 'Stopped.'")
        assert 1 < browser.value(f"{SPANS}.length") < 1001
        assert browser.find("#go").text == "Write"


def test_a_look_while_it_writes_loses_nothing(browser: Browser) -> None:
    when_it_writes(browser, f"{SPANS}[3].click()")
    text = write(browser, length=1000)
    assert len(text) == len("once upon ") + 1000
    assert browser.value(SELECTED) == "piece-3"
    browser.wait("!document.getElementById('look').hidden")


def test_tokens_are_chosen_where_they_are_no_characters(chromium: Browser, tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(iter(["once upon a time "] * 9), 270)
    server = Server(make_run(tmp_path, tokenizer, context_length=32, model_dim=16))
    chromium.driver.get(f"http://127.0.0.1:{server.port}/")
    chromium.wait("document.title === 'tiny'")
    text = write(chromium, "once upon a time ")
    pieces = [tokenizer.decode(token[None]) for token in tokenizer.encode("once upon a time ")]
    chromium.wait(f"{SPANS}[0].textContent === '{pieces[0]}'")
    assert chromium.value("document.getElementById('text').textContent") == text
    chromium.run(f"{SPANS}[1].click()")
    chromium.wait("!document.getElementById('look').hidden")
    assert chromium.find("#bars .chosen code").text == pieces[1].replace(" ", "␣")
    server.stop()


def test_server_errors_are_told(browser: Browser) -> None:
    fill(browser, "a" * 33)
    browser.find("#go").click()
    browser.wait("document.getElementById('status').textContent.includes('1 to 32 tokens')")
    refused = browser.errors()  # Chromium itself logs the status
    assert len(refused) == 1
    assert "400" in refused[0]


def test_click_shows_what_could_stand_there(browser: Browser) -> None:
    text = write(browser)
    browser.find("#piece-20").click()
    browser.wait("!document.getElementById('look').hidden")
    assert browser.value(SELECTED) == "piece-20"
    assert len(browser.driver.find_elements("css selector", "#bars li")) in (12, 13)
    marked = browser.find("#bars .chosen code").text
    assert marked == text[20].replace(" ", "␣").replace("\n", "↵")
    heads = browser.driver.find_elements("css selector", "#heads button")
    assert len(heads) == 2 * 4
    shades = (
        "Array.from(document.querySelectorAll('#text span'), s => s.getAttribute('style')).join()"
    )
    before = browser.value(shades)
    heads[5].click()
    assert browser.find("#head").text.startswith("Layer 2, head 2: ")
    assert browser.value(shades) != before
    assert 0 < browser.value(SHADED) <= 20
    browser.find("#on").click()
    browser.wait(f"{SELECTED} === 'piece-21'")
    browser.find("#back").click()
    browser.wait(f"{SELECTED} === 'piece-20'")
    browser.find("#close").click()
    assert browser.value("document.getElementById('look').hidden")
    assert browser.value(SHADED) == 0


def test_keyboard_does_it_all(browser: Browser) -> None:
    from selenium.webdriver import ActionChains, Keys

    def press(*keys: str) -> None:
        ActionChains(browser.driver).send_keys(*keys).perform()

    focused = "document.activeElement.id"
    browser.find("#prompt").click()
    order = []
    for _ in range(8):
        order.append(browser.value(focused))
        press(Keys.TAB)
    assert order == ["prompt", "temperature", "top_k", "top_p", "max_tokens", "seed", "go", "text"]
    write(browser)
    browser.run("document.getElementById('text').focus()")
    press(Keys.END)
    browser.wait(f"{SELECTED} === 'piece-49'")
    press(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    browser.wait(f"{SELECTED} === 'piece-47'")
    browser.wait("!document.getElementById('look').hidden")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.value(outline) == "solid"
    browser.run("document.querySelector('#heads [aria-checked=true]').focus()")
    press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert browser.find("#head").text.startswith("Layer 2, head 2: ")
    press(Keys.ESCAPE)
    assert browser.value("document.getElementById('look').hidden")


def test_dark_is_the_systems_until_the_button_says_otherwise(browser: Browser) -> None:
    def is_dark() -> bool:
        ground = browser.value("getComputedStyle(document.body).backgroundColor")
        return max(int(part) for part in ground[4:-1].split(",")) < 64

    assert not is_dark()
    browser.scheme("dark")
    assert is_dark()
    browser.find("#theme").click()
    assert not is_dark()
    browser.driver.refresh()
    assert not is_dark()
    browser.find("#theme").click()
    browser.scheme("light")
    assert is_dark()


def test_narrow_window_needs_no_scrolling_aside(browser: Browser) -> None:
    browser.window(320, 700)
    write(browser)
    browser.run("document.getElementById('piece-20').click()")
    browser.wait("!document.getElementById('look').hidden")
    assert browser.value("document.documentElement.scrollWidth") <= 320
    small = """[...document.querySelectorAll('button, input, textarea')]
        .filter(each => each.offsetParent && Math.min(each.offsetHeight, each.offsetWidth) < 40)
        .map(each => each.id)"""
    assert browser.value(small) == []


def test_losses_are_drawn(browser: Browser) -> None:
    browser.wait("document.querySelector('#curve polyline.train')")
    points = browser.value("document.querySelector('#curve .train').getAttribute('points')")
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert len(heights) == 3
    assert heights == sorted(heights)  # SVG's y grows downwards


def test_token_is_asked_for_and_kept(chromium: Browser, run: Path) -> None:
    guarded = Server(run, "--token", "secret")
    chromium.driver.get(f"http://127.0.0.1:{guarded.port}/")
    chromium.wait("!document.getElementById('unlock').hidden")
    chromium.find("#token").send_keys("secret\n")
    chromium.wait("document.title === 'tiny'")
    chromium.driver.refresh()
    chromium.wait("document.title === 'tiny'")
    chromium.errors()  # Chromium itself logs the 401
    guarded.stop()
