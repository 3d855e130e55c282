"""Writes the lists of public names: ``python -m tools.names``. With ``--check``, only says if they are out of date.

Every family states its public names once, in the ``__all__`` of its file in ``reference/`` or ``fused/``. The package's
``__init__``, ``functional`` and ``modules`` list them in full: readers, type checkers and editors do not run code.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "visattn_fast"
BEGIN, END = "# isort: split\n# Lists of names: written by `make names`.\n", "# End of the lists.\n"


def public(folder: str) -> dict[str, list[str]]:
    """Returns, for each file of a folder that has an ``__all__``, the names in it."""
    found = {}
    for path in sorted((PACKAGE / folder).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and path.stem != "__init__":
                found[path.stem] = ast.literal_eval(node.value)
    return found


def listed(found: dict[str, list[str]], package: str, others: Iterable[str] = ()) -> str:
    """Returns the import lines of the names, and an ``__all__`` of these names and ``others``."""
    lines = [f"from {package}{file} import {', '.join(names)}\n" for file, names in found.items() if names]
    names = sorted({*others, *(name for names in found.values() for name in names)})
    return "".join(lines) + f"\n__all__ = {names!r}\n"


def texts() -> dict[Path, str]:
    """Returns, for each file with lists, its whole text with new lists."""
    fused = public("fused")
    functions = {file: [n for n in names if not n.startswith("Fast")] for file, names in fused.items()}
    modules = {file: [n for n in names if n.startswith("Fast")] for file, names in fused.items()}
    lists = {
        PACKAGE / "reference" / "__init__.py": listed(public("reference"), "."),
        PACKAGE / "functional.py": listed(functions, ".fused.", ["Norm"]),
        PACKAGE / "modules.py": listed(modules, ".fused."),
        PACKAGE / "__init__.py": listed(modules, ".fused.", own_names(PACKAGE / "__init__.py")),
    }
    return {path: formatted(path, replaced(path.read_text(encoding="utf-8"), text)) for path, text in lists.items()}


def own_names(path: Path) -> list[str]:
    """Returns the names that a file imports above its lists."""
    head = ast.parse(path.read_text(encoding="utf-8").partition(BEGIN)[0])
    return [
        alias.asname or alias.name
        for node in head.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if node.module != "__future__"
    ]


def replaced(text: str, lists: str) -> str:
    """Returns ``text`` with ``lists`` between the two marks."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + lists + END + rest.partition(END)[2]


def formatted(path: Path, text: str) -> str:
    """Returns ``text``, sorted and formatted by ruff."""
    for arguments in (["check", "--fix", "--select", "I,RUF022", "--quiet"], ["format"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(path), "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        text = done.stdout
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a list is out of date")
    args = parser.parse_args()
    stale = {path: text for path, text in texts().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(f"{path.relative_to(PACKAGE.parent)}: out of date" if args.check else f"{path.name} written")
        if not args.check:
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
