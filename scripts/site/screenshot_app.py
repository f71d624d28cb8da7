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
from playwright.sync_api import Page, ViewportSize, sync_playwright

from hf_binaryformer.app.limits import Limits
from hf_binaryformer.app.runs import Networks
from hf_binaryformer.app.serve import launched, temporary_root

FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "app.png"
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
# WebGL 2 without a graphics card.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
SIZE: ViewportSize = {"width": 1360, "height": 1240}
# The picture is drawn without a graphics card, on a machine that may be busy.
PATIENCE_MS = 7_200_000


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
    networks = Networks(model=model)
    with (
        sync_playwright() as playwright,
        temporary_root() as root,
        launched(root, networks, Limits(), port=0) as address,
        playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS) as browser,
    ):
        page = browser.new_page(viewport=SIZE)
        page.on("console", lambda line: print(line.text) if line.type == "error" else None)
        picture = labelled(page, address)
    # Fewer colours would make the file smaller, and labels alike.
    Image.open(io.BytesIO(picture)).convert("RGB").save(output, optimize=True)
    print(f"wrote {output}, {output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
