"""The pages' recipes run, their links lead somewhere, and they name every module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import visattn_fast as vf
from outside import library

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "guide" / "libraries").glob("*.md"))
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipe_of_a_library_accelerates_its_model(page, capsys):
    library(page.stem)
    (recipe,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(recipe, str(page), "exec"), names)
    assert names["report"].swapped
    assert not names["report"].skipped


def test_blocks_of_the_training_page_run_in_order():
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (PAGES[0].parents[1] / "training.md").read_text(), re.DOTALL):
        exec(block, names)
    assert {gradient.shape[0] for gradient in names["per_sample"].values()} == {4}


def test_every_library_has_a_page():
    from visattn_fast.integrations.accelerate import _LIBRARIES

    assert [page.stem for page in PAGES] == sorted({needed.partition(".")[0] for needed in _LIBRARIES.values()})


def test_links_lead_to_files():
    """`make docs` checks the site's links, and this those of the pages that GitHub alone shows."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))]
    inside = [(page, link) for page, link in links if "://" not in link]
    assert len(inside) > 50
    assert not [(page.name, link) for page, link in inside if not (page.parent / link).exists()]


def test_files_that_pages_name_exist():
    """Paths from the root, such as `kernels/core/tiles.py`, and those in the package, such as `ops/linear.py`."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {name for page in pages for name in re.findall(r"[\w./]+/[\w/]+\.(?:py|h|cpp|cuh?)\b", page.read_text())}
    assert len(named) > 30
    assert not [name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / "visattn_fast"))]


@pytest.mark.parametrize("page", ["README.md", "docs/guide/modules.md"])
def test_every_module_is_named(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not [name for name in vf.__all__ if name.startswith("Fast") and f"`{name}" not in text]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
