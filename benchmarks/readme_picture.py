"""The README's pictures, from a finished demo: an example with the invented word marked, the report and the page.

    python benchmarks/readme_picture.py demo --out docs/images                  # example.png
    python benchmarks/readme_picture.py demo --out docs/images --chromium PATH  # report.png and page.png, too

The example is one of the report's own, the first in which tuning helps; `--card` takes another.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from relook.files import read_json
from relook.report.demo_page import example_groups
from relook.report.pages import Spans, heat

SIDE, GAP, TEXT = 300, 36, 480  # pixels: a picture, between columns, the column of captions
SIZE = 21  # of the text
INK, QUIET, WRONG, MARK = "#1c2330", "#525d70", "#8f0f08", "#ffd9d6"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished `relook demo`")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--card", type=int, default=0, help="which of the examples in which tuning helps")
    parser.add_argument("--chromium", default="", help="browser for a picture of the report")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    helps = example_groups(
        options.demo, options.demo / "world" / "test", list(read_json(options.demo / "results.json")["runs"])
    )
    draw_example(helps[0]["cards"][options.card]).save(options.out / "example.png", optimize=True)
    if options.chromium:
        photograph(options.demo / "report.html", options.out / "report.png", options.chromium)
        photograph_page(options.demo / "runs" / "post_decoder", options.out / "page.png", options.chromium)


def draw_example(card: dict[str, Any]) -> Image.Image:
    """Draw a picture, both captions with invented words marked, and where the post decoder looked."""
    canvas = Image.new("RGB", (2 * SIDE + TEXT + 4 * GAP, SIDE + 2 * GAP + 2 * SIZE), "white")
    draw = ImageDraw.Draw(canvas)
    picture = _open(card["source"]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas.paste(picture, (GAP, GAP))
    _write(draw, f"In the picture: {', '.join(card['objects'])}", (GAP, GAP + SIDE + 8), QUIET, 0.8)

    x, y = SIDE + 2 * GAP, GAP - 4
    for name, spans in card["texts"]:
        _write(draw, name, (x, y), INK, bold=True)
        y = _flow(draw, spans, x, y + round(1.6 * SIZE)) + round(2.2 * SIZE)

    (grid, word), x = card["maps"][0], SIDE + TEXT + 3 * GAP
    layer = _open(heat(grid)).convert("RGBA").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    canvas.paste(Image.alpha_composite(picture.convert("RGBA"), layer), (x, GAP))
    # Two lines: the tuned model looks when the base is about to say the word, and need not say it itself.
    for line, text in enumerate(("Where the post decoder looks as", f"the base is about to say “{word}”")):
        _write(draw, text, (x, GAP + SIDE + 8 + line * SIZE), QUIET, 0.8)
    return canvas


def _open(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def _font(scale: float = 1.0, bold: bool = False) -> ImageFont.FreeTypeFont:
    # Matplotlib brings its fonts along: the picture is the same on every machine.
    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), round(scale * SIZE))


def _write(
    draw: ImageDraw.ImageDraw, text: str, corner: Sequence[int], color: str, scale: float = 1.0, bold: bool = False
) -> None:
    draw.text(tuple(corner), text, color, _font(scale, bold))


def _flow(draw: ImageDraw.ImageDraw, spans: Spans, left: int, top: int) -> int:
    """Write a caption in lines of the column's width, wrong words marked, and return where its last line begins."""
    font, x, y = _font(), float(left), top
    for text, wrong in spans:
        for word in re.findall(r"\S+|\s+", text):
            width = draw.textlength(word, font)
            if x + width > left + TEXT and not word.isspace():
                x, y = float(left), y + round(1.5 * SIZE)
            if wrong:
                draw.rounded_rectangle((x - 4, y - 3, x + width + 4, y + 1.25 * SIZE), 5, MARK)
            draw.text((x, y), word, WRONG if wrong else INK, font)
            x += 0 if word.isspace() and x == left else width
    return y


def photograph(page: Path, out: Path, chromium: str) -> None:
    """Save the first screen of a page at 1280 x 640 pixels."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1280, "height": 640})
        view.goto(page.resolve().as_uri())
        view.screenshot(path=out)
        browser.close()


def photograph_page(run: Path, out: Path, chromium: str) -> None:
    """Save the page of `relook serve RUN --with-base` at 1280 x 720 pixels.

    It shows the first drawn example of which the base alone names something absent, and where the run looked before the
    last object that it names.

    Raises:
        LookupError: there is no such example.
    """
    from playwright.sync_api import sync_playwright

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", str(run), "--with-base", "--page", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, "-m", "relook", *words])
    try:
        while server.poll() is None and not _answers(port):
            time.sleep(0.5)
        with sync_playwright() as running:
            browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": 1280, "height": 720})
            view.goto(f"http://127.0.0.1:{port}/")
            view.wait_for_selector("#panel .example")
            word = _find_example(view)
            view.locator(".answer").first.locator(".word", has_text=re.compile(f"^{word}$")).first.click()
            view.wait_for_selector("figure.map .heat")
            view.mouse.move(0, 0)
            view.screenshot(path=out)
            browser.close()
        print(f"{out}: where it looked before “{word}”")
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _find_example(view: Any) -> str:
    """Click examples until one fits, and return the last object of its picture that the run names."""
    for example in view.locator("#panel .example").all():
        example.click()
        view.wait_for_selector("#panel .facts")
        view.wait_for_selector(".answer:nth-child(2) .text")
        view.wait_for_selector(".scroll:not([data-running])")
        there = re.findall(r"\w+", view.locator("#panel .facts").inner_text().partition(":")[2].partition(".")[0])
        run, base = view.locator(".answer").all()[:2]
        named = [word for word in re.findall(r"\w+", run.locator(".text").first.inner_text()) if word in there]
        if named and base.locator(".absent").count() and not run.locator(".absent").count():
            return named[-1]
    raise LookupError("Of no example does the base alone name something absent.")


if __name__ == "__main__":
    main()
