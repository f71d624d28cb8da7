"""python scripts/site/screenshot_app.py: draws docs/figures/app.png, the page with the labelled MNI152 template

It needs the extra ``app``, Playwright, and Chromium as CHROMIUM or at /usr/bin/chromium.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from hf_binaryformer.app.limits import Limits
from hf_binaryformer.app.runs import Networks
from hf_binaryformer.app.serve import launch, temporary_root

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "app.png"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# WebGL 2 without a graphics card.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE = {"width": 1360, "height": 1000}
PATIENCE_MS = 900_000
COLOURS = 256


def labelled(page: Page, address: str) -> bytes:
    """Segment the template on the page; the screenshot as PNG."""
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.click("#bf-example")
    page.wait_for_selector("#bf-viewer[data-shown='1']")
    page.click("#bf-segment")
    page.wait_for_selector("#bf-result .bf-volumes")
    page.wait_for_selector("#bf-viewer[data-shown='1']")
    page.wait_for_timeout(3000)
    return page.screenshot(timeout=PATIENCE_MS)


def main(
    output: Annotated[Path, typer.Option(help="Picture to write: .png.")] = FIGURE,
    model: Annotated[str, typer.Option(help="Short name, folder or Hub id.")] = Networks.model,
) -> None:
    """Draw the picture anew."""
    with temporary_root() as root, sync_playwright() as playwright:
        server, address = launch(root, Networks(model=model), Limits(), port=0)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport=SIZE)  # type: ignore[arg-type]
            page.on("console", lambda line: print(line.text) if line.type == "error" else None)
            picture = labelled(page, address)
        finally:
            browser.close()
            server.close(verbose=False)
    # Few colours, so that the file stays small.
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(output, optimize=True)
    print(f"wrote {output}, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
