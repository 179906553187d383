"""The documentation as a site: it is built without a warning, and a browser gets nothing from elsewhere for it."""

import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from docs_pages import ROOT

pytest.importorskip("material", reason="needs pip install -e '.[docs]'")
from mkdocs.commands.build import build
from mkdocs.config import load_config

EXTERNAL = re.compile(r"^(https?:)?//")


class Resources(HTMLParser):
    """Everything in a page that a browser fetches by itself: not what a reader may click on."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if (
            tag == "link"
            and "stylesheet icon preload preconnect prefetch".find((given.get("rel") or "none").split()[-1]) < 0
        ):
            return
        if tag != "a":
            self.found += [
                value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "poster")
            ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    warnings = []

    class Collected(logging.Handler):
        def emit(self, record):
            warnings.append(record.getMessage())

    handler = Collected(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    return folder, warnings


def test_it_is_built_without_a_warning(site):
    folder, warnings = site
    assert warnings == []
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in folder.glob("*.html")}


def test_no_page_fetches_anything_from_elsewhere(site):
    folder, _ = site
    pages = list(folder.rglob("*.html"))
    for page in pages:
        reader = Resources()
        reader.feed(page.read_text())
        assert len(reader.found) > 3
        assert [one for one in reader.found if EXTERNAL.match(one)] == [], page
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", page.read_text()), page
        # What the theme's script would load a library for from elsewhere.
        assert not re.search(r'class="[^"]*(mermaid|arithmatex)', page.read_text()), page
    for sheet in folder.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_a_resource_from_elsewhere_is_told():
    reader = Resources()
    reader.feed('<link rel="stylesheet" href="//x.org/a.css"><img src="https://x.org/a.png"><a href="https://x.org">')
    assert [one for one in reader.found if EXTERNAL.match(one)] == ["//x.org/a.css", "https://x.org/a.png"]


def test_files_that_only_make_pages_are_not_part_of_it(site):
    folder, _ = site
    assert not [file for file in folder.rglob("*") if file.suffix in (".toml", ".py")]


def test_links_to_files_outside_of_the_site_become_text():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = "[kept](run.md) [it lives](../tests/test_one.py) [all numbers](../benchmarks/a.json)"
    assert hooks.on_page_markdown(page) == "[kept](run.md) it lives all numbers (`benchmarks/a.json`)"


def test_the_picture_is_drawn_by_itself():
    from xml.etree import ElementTree

    text = (Path(ROOT) / "docs" / "dataflow.svg").read_text()
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert not names & {"image", "script", "use", "foreignObject"} and "http" not in text.replace(
        "http://www.w3.org", ""
    )
