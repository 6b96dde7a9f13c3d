"""The documentation site builds without a warning, and its reference has every public name."""

from __future__ import annotations

import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from docs.site import configuration
from docs.site.diagrams import DIAGRAMS
from docs.site.reference import exported_names, public_modules, public_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    _, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    shown = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    modules = public_modules()
    expected = {name for module in modules for name in (module.name, *public_names(module))}
    expected |= {f"{module.name}.{name}" for module in modules if module.is_package for name in exported_names(module)}
    assert len(expected) > 400
    assert not expected - shown


class Addresses(HTMLParser):
    """What a page loads by itself: scripts, styles, pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in {"script", "img", "source", "iframe"} or (tag == "link" and given.get("rel") != "canonical"):
            self.loaded += [address for key in ("src", "href") if (address := given.get(key))]


def test_no_page_fetches_anything_from_elsewhere_and_all_that_it_shows_is_there(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 80
    for page in pages:
        parser = Addresses()
        parser.feed(page.read_text(encoding="utf-8"))
        for address in parser.loaded:
            assert not re.match(r"(https?:)?//", address), f"{page.name}: {address}"
            target = site if address.startswith("/") else page.parent
            assert (target / address.lstrip("/").partition("?")[0]).exists(), f"{page.name}: {address}"


def test_no_page_stands_twice_in_the_navigation() -> None:
    pages = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(pages) > 20 and len(set(pages)) == len(pages)


def test_links_of_the_pages_lead_to_files_on_github_too() -> None:
    home = "https://github.com/phased-dmd/phased-dmd/blob/main/"
    for page in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)#\s]+)", text):
            if link.startswith(home):
                assert (ROOT / link.removeprefix(home)).exists(), f"{page.name}: {link}"
            elif not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_is_what_its_script_draws(name: str) -> None:
    assert (ROOT / "docs" / "assets" / f"{name}.svg").read_text(encoding="utf-8") == DIAGRAMS[name]()


def test_the_page_of_configuration_keys_is_that_of_the_code() -> None:
    """Where it is not, ``python -m docs.site.configuration`` writes it again."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == configuration.page()
