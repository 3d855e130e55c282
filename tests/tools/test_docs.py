"""The recipes of docs/libraries run, and accelerate what they are about."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cases import INTERPRETED
from outside import library, ultralytics_modules

PAGES = sorted((Path(__file__).parents[2] / "docs" / "guide" / "libraries").glob("*.md"))
pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="swaps classes; what the kernels compute is held elsewhere"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_recipe_of_a_library_accelerates_its_model(page, capsys):
    ultralytics_modules() if page.stem == "ultralytics" else library(page.stem)
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

    assert [page.stem for page in PAGES] == sorted(_LIBRARIES)
