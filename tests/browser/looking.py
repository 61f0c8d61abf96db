"""What every page is looked at for: what axe finds, how it looks (kept as pictures), how heavy and how quick it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from playwright.sync_api import Page, ViewportSize

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text()
PICTURES = Path(__file__).resolve().parents[2] / "test-output" / "pages"

SCREENS: dict[str, ViewportSize] = {
    "phone": {"width": 390, "height": 844},
    "laptop": {"width": 1440, "height": 900},
    "4k": {"width": 3840, "height": 2160},
}


def serious_faults(page: Page) -> list[str]:
    """What axe-core finds against WCAG 2.2 A and AA of serious or critical weight, with where it is."""
    # Evaluated through the debugger, so that the page's content security policy stays what it is.
    page.evaluate(AXE)
    found: dict[str, Any] = page.evaluate(
        "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']})"
    )
    return [
        f"{fault['id']}: {node['html'][:120]} ({node.get('failureSummary', '')[:200]})"
        for fault in found["violations"]
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def keep_picture(page: Page, name: str, *, full_page: bool = True) -> Path:
    """A screenshot under `test-output/pages`, which git ignores."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    page.screenshot(path=path, full_page=full_page)
    return path


def bytes_loaded(page: Page) -> int:
    """What the page and all it names weigh, unpacked and also where the cache has them, pictures of jobs left out."""
    entries: list[dict[str, Any]] = page.evaluate(
        "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
        ".map(e => ({name: e.name, bytes: e.decodedBodySize}))"
    )
    return sum(entry["bytes"] for entry in entries if "/thumbnail/" not in entry["name"])


def first_paint_ms(page: Page) -> float:
    """From the start of the navigation to the first content on the screen."""
    painted = page.wait_for_function("() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
    return float(painted.json_value())
