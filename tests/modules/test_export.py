"""Programs made of fused modules: torch.export, ONNX Runtime, AOTInductor, torch.jit.trace."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

import visattn_fast as vf
from cases import INTERPRETED, feature_map
from outside import library
from visattn_fast import catalogue

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="exported programs have none of the kernels"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

# In eval mode, and each once.
ENTRIES = [e for e in catalogue.ENTRIES.values() if not e.training or f"{e.name}_eval" not in catalogue.ENTRIES]

SIZES = (Dim.DYNAMIC, Dim.STATIC, Dim.DYNAMIC, Dim.DYNAMIC)
SHAPES = ((2, 16, 9, 10), (3, 16, 15, 8))
SMALL = (1, 16, 7, 3)  # one window covers it


def program_of(module, x, strict=False):
    return torch.export.export(module, (x,), dynamic_shapes=(SIZES,), strict=strict)


def targets(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def ours(program):
    return {target for target in targets(program) if "visattn_fast" in target}


def onnx_of(program):
    """The kinds of nodes in the ONNX model of an exported program, and how ONNX Runtime computes it.

    ONNX Script's optimiser takes longer than the rest; `test_recipes` goes through it.
    """
    runtime, _ = library("onnxruntime"), library("onnxscript")
    made = torch.onnx.export(program, verbose=False, optimize=False)
    file = io.BytesIO()
    made.save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def compute(*inputs):
        given = dict(zip(names, (x.numpy() for x in inputs), strict=True))
        return [torch.from_numpy(y) for y in session.run(None, given)]

    return {node.op_type for node in made.model.graph}, compute


class Each(nn.Module):
    """The results of several modules, of which one program is made: most of an export is not the module's."""

    def __init__(self, modules):
        super().__init__()
        self.each = nn.ModuleDict(modules)

    def forward(self, x):
        return {name: module(x) for name, module in self.each.items()}


@pytest.mark.parametrize("part", range(3))
def test_dynamic_sizes(part):
    """Exported without our ops for any batch, height and width; ONNX Runtime computes the same."""
    fast = Each({entry.name: entry.pair(16)[0] for entry in ENTRIES[part::3]}).eval()
    x, other, small = (feature_map(shape, "nchw", torch.float32) for shape in (*SHAPES, SMALL))
    program = program_of(fast, x)
    assert not ours(program)
    assert not [target for target in targets(program) if "max_pool" in target]
    module = program.module()
    for given in (x, other):
        torch.testing.assert_close(module(given), fast(given))
    used, compute = onnx_of(program)
    assert not [kind for kind in used if "Pool" in kind]
    assert "ReduceMax" in used or not {"cbam", "channel_attention"} & set(fast.each)
    for given in (x, other, small):
        found = dict(zip(fast.each, compute(given), strict=True))
        torch.testing.assert_close(found, fast(given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cbam", "coord_att_eval", "self_attention"])
def test_strict(name):
    """Traced by Dynamo, too."""
    fast, _ = catalogue.ENTRIES[name].pair(16)
    x, other = (feature_map(shape, "nchw", torch.float32) for shape in SHAPES)
    program = program_of(fast.eval(), x, strict=True)
    assert not ours(program)
    torch.testing.assert_close(program.module()(other), fast(other))


def test_training_mode():
    """A program that normalises by the batch updates the running statistics."""
    fast, plain = catalogue.ENTRIES["coord_att"].pair(16)
    x = feature_map(SHAPES[0], "nchw", torch.float32)
    program = program_of(fast, x)
    assert not ours(program)
    module = program.module()
    torch.testing.assert_close(module(x), plain(x))
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


def test_position_bias_and_mask():
    """Where a table bounds the sizes of maps, they are dynamic below the bound."""
    attention = vf.FastSelfAttention2d(16, 2, position_bias=(14, 14)).eval()
    attention.relative_position_bias_table.data.normal_()
    x, other = (feature_map(shape, "nchw", torch.float32) for shape in ((2, 16, 9, 10), (1, 16, 14, 6)))
    masks = [given[:, 0] > -0.5 for given in (x, other)]
    dynamic = (SIZES, (Dim.DYNAMIC,) * 3)
    program = torch.export.export(attention, (x, masks[0]), dynamic_shapes=dynamic)
    assert not ours(program)
    _, compute = onnx_of(program)
    torch.testing.assert_close(compute(other, masks[1])[0], attention(other, masks[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_sequences(score):
    attention = vf.FastSequenceAttention(score, 8)
    (query, key), (others, keys) = ((torch.randn(n, 4 + n, 8), torch.randn(n, 9 - n, 8)) for n in (2, 3))
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    arguments = {"need_weights": False}
    dynamic = {"query": sizes, "key": sizes, "need_weights": None}
    program = torch.export.export(attention, (query, key), arguments, dynamic_shapes=dynamic)
    assert not ours(program)
    torch.testing.assert_close(program.module()(others, keys, **arguments)[0], attention(others, keys, **arguments)[0])


def test_accelerated_model():
    """Modules of other libraries are exported as if they had not been accelerated."""
    gate = library("torchvision").ops.SqueezeExcitation(16, 4)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), gate, nn.ReLU()).eval()
    assert vf.accelerate(model).swapped
    x, other = (feature_map((n, 3, *size), "nchw", torch.float32) for n, *_, size in ((2, (9, 8)), (3, (7, 12))))
    program = program_of(model, x)
    assert not ours(program)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("strict", [False, True])
def test_explicit_choice_is_kept(strict):
    """A program exported under an explicit choice has the ops of it, for other sizes, too."""
    fast, _ = catalogue.ENTRIES["cbam"].pair(16)
    x, other = (feature_map(shape, "nchw", torch.float32) for shape in SHAPES)
    with vf.use_backend("cpp"), torch.no_grad():
        program = program_of(fast, x, strict)
    assert ours(program) == {"visattn_fast.cbam_fwd.default"}
    torch.testing.assert_close(program.module()(other), fast(other))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_jit_trace(entry):
    """Traced programs have none of our ops."""
    fast, _ = entry.pair(16)
    fast.eval()
    x = feature_map(SHAPES[0], "nchw", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants
        traced = torch.jit.trace(fast, (x,))
    assert "visattn_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), fast(x))


def recipe(heading):
    """The code blocks under a heading of docs/guide/deployment.md."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "deployment.md").read_text()
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_recipes(tmp_path, monkeypatch):
    """The page's: a program saved, and an ONNX model run."""
    library("onnxruntime"), library("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in recipe("torch.export") + recipe("ONNX"):
        exec(block, names)
    loaded = torch.export.load("model.pt2").module()
    torch.testing.assert_close(loaded(names["x"]), names["model"](names["x"]))
    assert names["y"].shape == (3, 16, 18, 46)


# The compiler takes half the time.
SOONER = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
CHECK = """
import sys
assert ("visattn_fast" in sys.modules) == {fused}
torch.testing.assert_close([run(x) for x in inputs], expected)
"""


@pytest.mark.parametrize("fused", [False, True])
def test_aot_inductor(fused, tmp_path, monkeypatch):
    """The page's packages of compiled code run in a fresh process: without this package, or with its kernels."""
    monkeypatch.chdir(tmp_path)
    names = {}
    (export,), (compile_plain, run_plain, compile_fused, run_fused) = recipe("torch.export"), recipe("AOTInductor")
    exec(export, names)
    with torch._inductor.config.patch(SOONER):
        exec(compile_fused if fused else compile_plain, names)
    assert bool(ours(names["program"])) == fused
    inputs = [feature_map(shape, "nchw", torch.float32) for shape in ((2, 3, 9, 8), (3, 3, 7, 12))]
    with torch.no_grad():
        torch.save((inputs, [names["model"](x) for x in inputs]), "expected.pt")
    script = ["import torch", 'inputs, expected = torch.load("expected.pt")', run_fused if fused else run_plain]
    command = [sys.executable, "-c", "\n".join([*script, CHECK.format(fused=fused)])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
