"""The command line ``visattn-fast``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

# Command -> its module, which has add_arguments(parser) and run(args) -> exit status, and its help.
_COMMANDS = {
    "info": (
        "visattn_fast.report.info",
        "versions, devices, and the state of each backend",
    ),
    "report": ("visattn_fast.report.command", "compare eager, torch.compile and fused on this machine"),
    "heatmap": ("visattn_fast.report.heatmap", "draw attention maps over a picture"),
}
_EXTRA = {"matplotlib", "numpy", "PIL", "rich"}  # packages of the extra "report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status, 130 after an interrupt. Imports the module of that command only."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser("visattn-fast", description="Fused attention for vision models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    asked = next((a for a in arguments if not a.startswith("-")), None)
    for name, (module, purpose) in _COMMANDS.items():
        child = commands.add_parser(name, help=purpose, description=purpose)
        if name == asked:
            try:
                command = importlib.import_module(module)
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                if missing not in _EXTRA:
                    raise
                print(f"visattn-fast {name} needs {missing}: pip install visattn_fast[report]", file=sys.stderr)
                return 2
            command.add_arguments(child)
            child.set_defaults(run=command.run)
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"visattn-fast {args.command}: interrupted", file=sys.stderr)
        return 130
