"""The contents of the wheel and the source distribution."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Builds a source distribution from a copy of the tree, and a pure-Python wheel from the distribution."""
    tree, out = tmp_path_factory.mktemp("tree") / "visattn_fast", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", ".*_cache", "report.json")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=ignored)
    build(tree, "--sdist", out)
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        # The first releases of Python 3.10 and 3.11 have no filters.
        file.extractall(out, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = next(p for p in out.iterdir() if p.is_dir())
    (unpacked / "visattn_fast" / "_C.so").touch()  # a build for another torch, which must not be shipped
    build(unpacked, "--wheel", out)
    return archive, next(out.glob("*.whl"))


def build(tree: Path, kind: str, out: Path) -> None:
    command = [sys.executable, "-m", "build", kind, "--no-isolation", "--outdir", str(out), str(tree)]
    environment = os.environ | {"VISATTN_BUILD_EXT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_holds_the_package_and_nothing_else(distributions):
    """The kernels are inside the package: a top-level ``kernels`` would shadow another project."""
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"visattn_fast"}
    assert not any(n.endswith(".so") for n in names)
    for path in (ROOT / "kernels").rglob("*.py"):
        assert f"visattn_fast/{path.relative_to(ROOT)}" in names
    for path in (ROOT / "visattn_fast").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert "visattn_fast/py.typed" in names


def test_wheel_names_its_licence(distributions):
    """As SPDX expression, with its text, for tools that list the licences of an environment."""
    archive = zipfile.ZipFile(distributions[1])
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    text = archive.read(name.replace("METADATA", "licenses/LICENSE"))
    assert text == (ROOT / "LICENSE").read_bytes()
    assert b"Apache License" in text


def test_source_distribution_holds_the_native_sources(distributions):
    with tarfile.open(distributions[0]) as file:
        names = {n.partition("/")[2] for n in file.getnames()}
    for path in (ROOT / "csrc").rglob("*.*"):
        assert str(path.relative_to(ROOT)) in names


def test_wheel_computes_and_says_that_it_lacks_kernels(distributions, tmp_path):
    zipfile.ZipFile(distributions[1]).extractall(tmp_path)
    code = (
        "import torch, visattn_fast as vf; assert vf.FastSE(16)(torch.ones(1, 16, 2, 2)).shape == (1, 16, 2, 2);"
        "print(vf.backends()['cpp'].missing[0])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"not built" in done.stdout


def test_kernels_are_a_folder_that_the_package_links_to():
    """The folder has no ``__init__.py``, so that no top-level package of this name exists."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert os.readlink(ROOT / "visattn_fast" / "kernels") == "../kernels"
