"""Checks docstrings against the house's English: ``python -m tools.prose [FILE or FOLDER ...]``.

Prints ``path:line: message`` for each docstring that begins with a word of `WORDS`, or whose first paragraph does not
end a sentence. The exit status is 1 if it prints anything.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDERS = ("visattn_fast", "kernels", "tools", "tests", "bench", "examples")
WORDS = ("Among", "Of", "That", "Those", "What", "Whether")
_ENDS = (".", "!", "?", ":")  # a colon: a list or code follows
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Yields line and message of every fault in a Python source."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _DOCUMENTED) or not (text := ast.get_docstring(node)):
            continue
        line, paragraph = node.body[0].lineno, text.partition("\n\n")[0].rstrip()
        word = paragraph.split()[0].rstrip(",.:;")
        if word in WORDS:
            yield line, f"docstring begins with {word!r}: begin with a verb, or name the thing"
        if not paragraph.rstrip(")`'\"").endswith(_ENDS):
            yield line, "docstring's first paragraph ends without a full stop: a blank line cuts its first sentence"


def sources(paths: Sequence[str]) -> list[Path]:
    """Returns the Python files among the paths and in the folders among them, each file once."""
    files = (file for path in map(Path, paths) for file in (path.rglob("*.py") if path.is_dir() else [path]))
    return sorted({file.resolve() for file in files})  # visattn_fast/kernels is a link to kernels


def main(paths: Sequence[str]) -> int:
    found = [
        f"{os.path.relpath(path)}:{line}: {message}"
        for path in sources(paths or FOLDERS)
        for line, message in faults(path.read_text(encoding="utf-8"))
    ]
    print(*found, sep="\n", end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
