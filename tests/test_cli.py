"""The command line as a user meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import visattn_fast as vf
from visattn_fast import cli
from visattn_fast.backends import NAMES, select


def test_info(capsys):
    """Versions, and every backend of every device type with its reasons."""
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"visattn_fast {vf.__version__}" in text
    assert torch.__version__ in text
    for device in ("cpu", "cuda", "xpu"):
        for name in NAMES:
            backend = vf.backends(device)[name]
            assert all(reason in text for reason in (*backend.missing, backend.opt_in))
    assert f"auto takes {select('cpu', torch.float32, 'auto')} for float32" in text


def test_module_and_version():
    done = subprocess.run([sys.executable, "-m", "visattn_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, vf.__version__)


@pytest.mark.parametrize(
    ("command", "package"),
    [("report", "rich"), ("report", "matplotlib"), ("heatmap", "matplotlib"), ("heatmap", "PIL")],
)
def test_missing_extra(command, package, monkeypatch, capsys):
    """One line says what to install."""
    for name in [name for name in sys.modules if name.startswith((f"{package}.", "visattn_fast.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(vf, "report", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([command, "x"]) == 2
    assert (
        capsys.readouterr().err.strip() == f"visattn-fast {command} needs {package}: pip install visattn_fast[report]"
    )


def test_info_without_extras():
    """In a process of its own, where nothing has imported them."""
    code = "import sys; sys.modules.update(dict.fromkeys(('rich', 'matplotlib', 'PIL')))"
    code += "; from visattn_fast import cli; sys.exit(cli.main(['info']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["report", "--nothing"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: visattn-fast" in capsys.readouterr().err
