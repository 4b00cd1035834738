"""Checks of pages for the browser: whole, without anything from elsewhere, and shown without errors."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

VOID = {"meta", "link", "img", "br", "hr"}
BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Walk(HTMLParser):
    """Looks that every element is closed where it must be, and keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def walk(page: str) -> Walk:
    seen = Walk()
    seen.feed(page)
    seen.close()
    assert not seen.open
    return seen


def assert_self_contained(page: str, *, links: tuple[str, ...] = ()) -> None:
    """Look that a page needs nothing else; `links` are those to other pages."""
    seen = walk(page)
    assert page.startswith("<!DOCTYPE html>")
    assert seen.all("html")[0]["lang"] == "en"
    assert len(seen.all("title")) == len(seen.all("h1")) == 1
    assert not seen.all("script")
    for tag, attributes in seen.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "data"):
            target = attributes.get(name) or "data:"
            assert target.startswith(("data:", "#")) or target in links, tag
    assert "url(" not in page
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in seen.all("a") if link["href"] not in links} <= set(ids)


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Chromium, if there is one on this machine; otherwise the test is skipped."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if not executable:
        pytest.skip("no chromium on this machine")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=BROWSER_ARGS)
        yield opened
        opened.close()


@contextmanager
def offline_tab(
    browser: Browser, file: Path, *, width: int, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Page]:
    """A tab that shows a file without a network; afterwards, there must have been no errors."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_offline(True)
    tab, problems, requests = context.new_page(), [], []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    tab.on("requestfailed", lambda request: problems.append(request.url[:80]))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri(), wait_until="load")
    yield tab
    context.close()
    assert not problems
    assert {url.partition(":")[0] for url in requests} <= {"file", "data"}


def assert_shown(tab: Page, width: int) -> None:
    """Look that all pictures are there, and that nothing is wider than the window, also once it is unfolded."""
    for picture in tab.locator("img").all():
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
        box = picture.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 50
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for folded in tab.locator("details").all():
        folded.evaluate("details => details.open = true")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
