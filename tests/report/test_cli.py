"""The command line as a user sees it: info, versions, missing extras, usage errors."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

import visattn_fast as vf
from visattn_fast import cli
from visattn_fast.backends import NAMES, select
from visattn_fast.report import cuda_plan


def test_info_lists_versions_and_every_backend(capsys):
    """Every device type, with every reason against a backend."""
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert f"visattn_fast {vf.__version__}" in text
    assert torch.__version__ in text
    for device in ("cpu", "cuda", "xpu"):
        for name in NAMES:
            backend = vf.backends(device)[name]
            assert all(reason in text for reason in (*backend.missing, backend.opt_in))
    assert f"auto takes {select('cpu', torch.float32, 'auto')} for float32" in text


@pytest.mark.skipif(not vf.backends("cpu")["cpp"].available, reason="asks the native library")
def test_info_explains_the_native_kernels_of_a_shape(capsys, monkeypatch):
    """On devices that this machine need not have."""
    monkeypatch.setattr(cuda_plan, "devices", lambda: cuda_plan.DEVICES)
    assert cli.main(["info", "--shape", "64x256x56x56"]) == 0
    text = capsys.readouterr().out
    assert "native CUDA kernels of SE (ECA takes the same) and CBAM for 64x256x56x56 in bfloat16" in text
    assert text.count("an image and the next one fit the shared memory of a cluster") == 12
    assert text.count("x and grad of an image fit the shared memory of a cluster") == 4
    assert text.count("no clusters before sm_90") == 8
    assert text.count("a second launch sums the weights' gradients") == 12
    assert cli.main(["info", "--shape", "4x256x14x14"]) == 0
    assert capsys.readouterr().out.count("the same launch sums the weights' gradients") == 12
    assert cli.main(["info", "--shape", "64x256"]) == 2
    assert "--shape must be like 64x256x56x56, got '64x256'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.skipif(not vf.backends("cpu")["cpp"].available, reason="asks the native library")
def test_cuda_plans_stay_within_the_device(dtype):
    """Shared memory, clusters, and blocks that must all be resident; from one pixel to more than a cluster holds."""
    sides, channels = (1, 7, 14, 56, 113, 512), (1, 3, 64, 256, 2048)
    for device, kernel in itertools.product(cuda_plan.DEVICES, cuda_plan.KERNELS):
        for n, c, side, nhwc in itertools.product((1, 32, 4096), channels, sides, (False, True)):
            p = cuda_plan.plan((n, c, side, side), kernel, dtype, nhwc, device)
            if p.variant == "refused":  # more pixels than a block, or so few blocks, have room for
                large = side == 512 and (c == 2048 or not kernel.backward)
                assert kernel.window, (device, kernel, n, c, side)
                assert large or (side >= 113 and c <= 3), (device, kernel, n, c, side)
                continue
            assert p.shared_bytes <= device.shared_bytes
            assert p.team <= 16 or p.variant == "semaphore"
            assert p.variant == "semaphore" or device.sm >= 90
            assert p.team * p.teams <= device.multiprocessors
            assert p.threads == 512
            assert not p.one_launch or (kernel.backward and n * c * side * side * dtype.itemsize <= 1 << 20)


def test_python_m_prints_the_version():
    done = subprocess.run([sys.executable, "-m", "visattn_fast", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, vf.__version__)


@pytest.mark.parametrize(
    ("command", "package"),
    [("report", "rich"), ("report", "matplotlib"), ("heatmap", "matplotlib"), ("heatmap", "PIL")],
)
def test_missing_extra_is_named_in_one_line(command, package, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith((f"{package}.", "visattn_fast.report"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(vf, "report", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert cli.main([command, "x"]) == 2
    assert (
        capsys.readouterr().err.strip() == f"visattn-fast {command} needs {package}: pip install visattn_fast[report]"
    )


def test_info_needs_no_extra():
    """In a new process, which has not imported any."""
    code = "import sys; sys.modules.update(dict.fromkeys(('rich', 'matplotlib', 'PIL')))"
    code += "; from visattn_fast import cli; sys.exit(cli.main(['info']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["report", "--nothing"]])
def test_usage_errors_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: visattn-fast" in capsys.readouterr().err
