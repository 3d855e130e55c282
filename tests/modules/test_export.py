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
from cases import feature_map
from outside import library
from visattn_fast import catalogue

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# Each module once, in eval mode.
ENTRIES = [e for e in catalogue.ENTRIES.values() if not e.training or f"{e.name}_eval" not in catalogue.ENTRIES]

SIZES = (Dim.DYNAMIC, Dim.STATIC, Dim.DYNAMIC, Dim.DYNAMIC)
SHAPES = ((2, 16, 9, 10), (3, 16, 15, 8))
SMALL = (1, 16, 7, 3)  # fits into one window


def program_of(module, x, strict=False):
    return torch.export.export(module, (x,), dynamic_shapes=(SIZES,), strict=strict)


def called_by(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def ours(program):
    """Returns the ops of this package that a program calls."""
    return {target for target in called_by(program) if "visattn_fast" in target}


def onnx_of(program):
    """Returns the kinds of nodes in the ONNX model of a program, and a function that runs it in ONNX Runtime.

    ONNX Script's optimiser takes longer than the rest, and is left to the test of the documented recipes.
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
    """Several modules in one program, since most of the time of an export is the same for any module."""

    def __init__(self, modules):
        super().__init__()
        self.each = nn.ModuleDict(modules)

    def forward(self, x):
        return {name: module(x) for name, module in self.each.items()}


@pytest.mark.parametrize("part", range(3))
def test_exported_program_takes_any_size_and_onnx_agrees(part):
    """Exported programs hold none of our ops and take any batch, height and width; ONNX Runtime computes the same."""
    fast = Each({entry.name: entry.pair(16)[0] for entry in ENTRIES[part::3]}).eval()
    x, other, small = (feature_map(shape, "nchw", torch.float32) for shape in (*SHAPES, SMALL))
    program = program_of(fast, x)
    assert not ours(program)
    assert not [target for target in called_by(program) if "max_pool" in target]
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
def test_strict_export_has_none_of_our_ops(name):
    """A program traced by Dynamo takes other sizes too."""
    fast, _ = catalogue.ENTRIES[name].pair(16)
    x, other = (feature_map(shape, "nchw", torch.float32) for shape in SHAPES)
    program = program_of(fast.eval(), x, strict=True)
    assert not ours(program)
    torch.testing.assert_close(program.module()(other), fast(other))


def test_exported_training_updates_running_statistics():
    fast, plain = catalogue.ENTRIES["coord_att"].pair(16)
    x = feature_map(SHAPES[0], "nchw", torch.float32)
    program = program_of(fast, x)
    assert not ours(program)
    module = program.module()
    torch.testing.assert_close(module(x), plain(x))
    torch.testing.assert_close(dict(module.named_buffers()), dict(plain.named_buffers()))


def test_exported_sizes_are_dynamic_below_a_position_bias():
    """Self-attention with a table and a mask takes any map up to the size of the table, in ONNX Runtime too."""
    attention = vf.FastSelfAttention2d(16, 2, position_bias=(14, 14)).eval()
    attention.relative_position_bias_table.data.normal_()
    x, other = (feature_map(shape, "nchw", torch.float32) for shape in ((2, 16, 9, 10), (1, 16, 14, 6)))
    masks = [given[:, 0] > -0.5 for given in (x, other)]
    dynamic = (SIZES, (Dim.DYNAMIC,) * 3)
    program = torch.export.export(attention, (x, masks[0]), dynamic_shapes=dynamic)
    assert not ours(program)
    _, compute = onnx_of(program)
    torch.testing.assert_close(compute(other, masks[1])[0], attention(other, masks[1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position_bias", [None, (3, 5)])
def test_exported_self_attention_takes_any_batch(position_bias):
    """The program takes a mask, with a position bias and without."""
    fast = vf.FastSelfAttention2d(16, 2, position_bias=position_bias).eval()
    x, mask = torch.randn(2, 16, 3, 5), torch.rand(2, 3, 5) < 0.7
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fast, (x, mask), dynamic_shapes=({0: batch}, {0: batch}))
    x, mask = torch.randn(5, 16, 3, 5), torch.rand(5, 3, 5) < 0.7
    torch.testing.assert_close(program.module()(x, mask), fast(x, mask))


@pytest.mark.parametrize("score", ["dot", "concat"])
def test_exported_sequence_attention_takes_any_length(score):
    attention = vf.FastSequenceAttention(score, 8)
    (query, key), (others, keys) = ((torch.randn(n, 4 + n, 8), torch.randn(n, 9 - n, 8)) for n in (2, 3))
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    arguments = {"need_weights": False}
    dynamic = {"query": sizes, "key": sizes, "need_weights": None}
    program = torch.export.export(attention, (query, key), arguments, dynamic_shapes=dynamic)
    assert not ours(program)
    torch.testing.assert_close(program.module()(others, keys, **arguments)[0], attention(others, keys, **arguments)[0])


def test_exported_accelerated_model_has_none_of_our_ops():
    gate = library("torchvision").ops.SqueezeExcitation(16, 4)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), gate, nn.ReLU()).eval()
    assert vf.accelerate(model).swapped
    x, other = (feature_map((n, 3, *size), "nchw", torch.float32) for n, *_, size in ((2, (9, 8)), (3, (7, 12))))
    program = program_of(model, x)
    assert not ours(program)
    torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.parametrize("strict", [False, True])
def test_export_under_a_chosen_backend_keeps_its_ops(strict):
    """A program exported while a backend is chosen calls that backend's ops, for other sizes too."""
    fast, _ = catalogue.ENTRIES["cbam"].pair(16)
    x, other = (feature_map(shape, "nchw", torch.float32) for shape in SHAPES)
    with vf.use_backend("cpp"), torch.no_grad():
        program = program_of(fast, x, strict)
    assert ours(program) == {"visattn_fast.cbam_fwd.default"}
    torch.testing.assert_close(program.module()(other), fast(other))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_jit_traced_module_has_none_of_our_ops(entry):
    fast, _ = entry.pair(16)
    fast.eval()
    x = feature_map(SHAPES[0], "nchw", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns that sizes become constants
        traced = torch.jit.trace(fast, (x,))
    assert "visattn_fast::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), fast(x))


def recipe(heading):
    """Returns the code blocks under a heading of docs/guide/deployment.md."""
    page = (Path(__file__).parents[2] / "docs" / "guide" / "deployment.md").read_text()
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_documented_recipes_save_and_run_programs(tmp_path, monkeypatch):
    """The page saves an exported program and runs an ONNX model."""
    library("onnxruntime"), library("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in recipe("torch.export") + recipe("ONNX"):
        exec(block, names)
    loaded = torch.export.load("model.pt2").module()
    torch.testing.assert_close(loaded(names["x"]), names["model"](names["x"]))
    assert names["y"].shape == (3, 16, 18, 46)


# Half the compile time.
SOONER = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
CHECK = """
import sys
assert ("visattn_fast" in sys.modules) == {fused}
torch.testing.assert_close([run(x) for x in inputs], expected)
"""


@pytest.mark.parametrize("fused", [False, True])
def test_documented_packages_run_in_a_fresh_process(fused, tmp_path, monkeypatch):
    """The page's AOTInductor packages run in a new process: without this package, or with its kernels."""
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
