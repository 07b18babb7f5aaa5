"""Draws the page's pictures of docs/images: python -m tests.serve.pictures RUN."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.serve.browser import Browser
from tests.serve.server import Server

PROMPT, TEMPERATURE, SEED, PLACE, HEAD = "The ", 0.5, 1, 60, 1
IMAGES = Path(__file__).parents[2] / "docs/images"
PICTURES = {
    "serve_light": (1040, "light"),
    "serve_dark": (1040, "dark"),
    "serve_phone": (390, "light"),
}


def main(run: Path) -> None:
    server, browser = Server(run), Browser()
    try:
        IMAGES.mkdir(exist_ok=True)
        for name, (width, scheme) in PICTURES.items():
            draw(browser, server, IMAGES / f"{name}.png", width, scheme)
    finally:
        browser.quit()
        server.stop()


def draw(browser: Browser, server: Server, path: Path, width: int, scheme: str) -> None:
    browser.scheme(scheme)
    browser.window(width, 900)
    browser.driver.get(f"http://127.0.0.1:{server.port}/")
    browser.wait("document.querySelector('#curve svg')")
    settings = {"prompt": PROMPT, "temperature": TEMPERATURE, "seed": SEED}
    for name, value in settings.items():
        browser.run(f"""
            const field = document.getElementById('{name}');
            field.value = '{value}';
            field.dispatchEvent(new Event('input'));""")
    browser.run("document.getElementById('go').click()")
    browser.wait("document.getElementById('status').textContent === 'Done.'")
    browser.run(f"document.getElementById('piece-{PLACE}').click()")
    browser.wait("!document.getElementById('look').hidden")
    browser.run(f"document.querySelectorAll('#heads button')[{HEAD}].click()")
    browser.window(width, browser.value("document.documentElement.scrollHeight"))
    path.write_bytes(browser.driver.get_screenshot_as_png())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
