"""The check of docstrings finds what it is for, and passes what is right."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose

FUNCTION = '''
def f():
    """{}"""
'''


@pytest.mark.parametrize("word", prose.WORDS)
def test_first_word_is_found(word):
    ((line, message),) = prose.faults(FUNCTION.format(f"{word} x is."))
    assert line == 3
    assert repr(word) in message


@pytest.mark.parametrize("text", ["Sums x\n\n    over rows.", "Sums x, or\n\n    returns it.", "Sums x"])
def test_cut_sentence_is_found(text):
    ((line, message),) = prose.faults(FUNCTION.format(text))
    assert line == 3
    assert "cuts its first sentence" in message


@pytest.mark.parametrize(
    "text",
    [
        "Sums x.",
        "Sums x\n    over rows.\n\n    Twice",
        "Sums x (over ``rows``).",
        "Sums:\n\n    rows",
        "Whatever x is.",
        "",
    ],
)
def test_sound_docstring_passes(text):
    assert not list(prose.faults(FUNCTION.format(text)))


def test_every_kind_of_docstring_is_read():
    source = '"""Of x."""\nclass C:\n    """Of x."""\n    async def f(self):\n        """Of x."""\n'
    assert [line for line, _ in prose.faults(source)] == [1, 3, 5]


def test_command_prints_path_and_line(tmp_path, monkeypatch, capsys):
    """Exit status 1 with a line per fault, 0 without; a link to a folder is not read twice."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    Path("real/bad.py").write_text('"""Whether."""\n')
    Path("link").symlink_to("real")
    Path("good.py").write_text('"""Sums."""\n')
    assert prose.main(["real", "link", "good.py"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("real/bad.py:1: docstring begins with 'Whether'")
    assert prose.main(["good.py"]) == 0
    assert not capsys.readouterr().out
