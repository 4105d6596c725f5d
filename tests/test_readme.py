"""What any page links to is there, and the README names the commands that matter; test_docs.py runs the examples."""

import re
from pathlib import Path

import pytest
from examples import PAGES, ROOT, commands


def test_the_readme_names_its_commands():
    shown = commands(ROOT / "README.md")
    assert {"scripts/run", "scripts/test", "dvc repro"} <= shown
    assert any(command.startswith("sage generate") for command in shown)
    for script in ("scripts/run", "scripts/test"):
        assert (ROOT / script).stat().st_mode & 0o111


def anchors(page):
    """Return the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_links_to_is_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(file), f"{file.name} has no heading #{anchor}"


def test_every_picture_of_the_docs_is_linked():
    linked = {Path(name).name for page in PAGES for name in re.findall(r"\(([^()]+\.(?:png|svg))\)", page.read_text())}
    assert {path.name for path in ROOT.glob("docs/*.*") if path.suffix in (".png", ".svg")} == linked
