"""No network, no code from files: what the package must never do with what it is given."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    p for folder in ("visattn_fast", "tools", "bench", "examples", "kernels") for p in (ROOT / folder).rglob("*.py")
]
SOURCES += [ROOT / "setup.py", ROOT / "csrc" / "toolchain.py"]
# Readers of files that run code which the file names.
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNTRUSTED = {"load", "loads", "Unpickler", "open"}


def loads_of_pickles(source: str) -> list[str]:
    """Returns the calls in ``source`` that may run code from a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        module, _, name = called.rpartition(".")
        if (
            (module == "torch" and name == "load" and options.get("weights_only") != "True")
            or (module.rpartition(".")[2] in PICKLES and name in UNTRUSTED)
            or (name == "load" and options.get("allow_pickle", "False") != "False")
            or (module == "torch.package" or name in ("load_state_dict_from_url", "read_pickle"))
        ):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_read_that_may_hold_code(path):
    assert not loads_of_pickles(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "pickle.Unpickler(f)",
        "np.load(f, allow_pickle=True)",
        "torch.hub.load_state_dict_from_url(url)",
    ],
)
def test_calls_that_may_run_code_are_found(call):
    assert loads_of_pickles(call)


def test_no_socket_is_opened(tmp_path):
    """Importing, running every module both ways, swapping a model and the command line open no connection."""
    code = f"""
import sys
seen = []
def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib.")):
        seen.append((event, arguments))
sys.addaudithook(watch)
import torch
import visattn_fast as vf
from visattn_fast import catalogue, cli, models
for entry in catalogue.ENTRIES.values():
    x = torch.rand(4, 16, 6, 6, requires_grad=True)
    if entry.supports(tuple(x.shape)):
        entry.pair(16)[0](x).sum().backward()
vf.accelerate(models.AttentionResNet("cbam", width=8, fused=False).eval(), torch.rand(1, 3, 32, 32))
vf.explain(vf.FastSE(16), torch.rand(1, 16, 4, 4))
assert cli.main(["info"]) == 0
options = ["--modules", "se", "--shapes", "1x16x4x4", "--contenders", "eager,fused", "--seconds", "0"]
assert cli.main(["report", "--quick", *options, "--out", {str(tmp_path)!r}]) == 0
assert not seen, seen
import socket
socket.socket().close()
assert seen, "the hook sees nothing"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
