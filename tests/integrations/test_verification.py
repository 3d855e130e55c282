"""accelerate with an example: what is compared, what the run leaves behind, and what is left after a failure."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import visattn_fast as vf
from blocks import GATED, block, inputs
from known_modules import MODULES, spread_statistics
from visattn_fast.catalogue import feature_map
from visattn_fast.integrations import recipe, verify
from visattn_fast.integrations.recipe import Recipe, is_swapped
from visattn_fast.models import AttentionResNet

accelerate_file = sys.modules["visattn_fast.integrations.accelerate"]  # the package has a function of that name

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
C = 16


@pytest.fixture(autouse=True)
def _equally_fast(monkeypatch):
    def timed(runs: dict[str, Callable[[], Any]], *_: Any) -> dict[str, list[float]]:
        for run in runs.values():
            run()
        return dict.fromkeys(runs, [1.0] * 5)

    monkeypatch.setattr(verify, "interleaved", timed)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [name for name in GATED | MODULES if "fused" not in name])
def test_right_modules_pass(name, training):
    """With the rounding of float32, also where gradients cancel, as those of a bias before a batch norm."""
    torch.manual_seed(0)
    module = (GATED | MODULES)[name]().float().train(training)
    spread_statistics(module)
    found = vf.accelerate(nn.Sequential(module), inputs(name).float())
    assert found.swapped
    assert not found.skipped, str(found)


class Stateful(nn.Module):
    """Changes its state in every way that a forward can."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("same", self.n)
        self.register_buffer("in_place", torch.zeros(3))
        self.calls, self.seen, self.cache, self.kinds = 0, [0], {"a": 1}, {1}
        self.norm = nn.BatchNorm2d(3)
        self.scripted = torch.jit.script(nn.BatchNorm2d(3))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n = self.n + 1
        self.in_place += 1
        self.calls += 1
        self.seen.append(x)
        self.cache[x.shape] = x
        self.kinds.add(2)
        self.made = x
        self.eval()
        self.train()
        self.handle.remove()
        return self.scripted(self.norm(self.dropout(x)))


def net() -> nn.Module:
    """A model in training with state, hooks, gradients, and one module in eval mode."""
    torch.manual_seed(0)
    first = Stateful()
    first.handle = first.register_forward_hook(lambda *_: None)
    model = nn.Sequential(first, AttentionResNet("se", width=8, depths=(1, 1), fused=False)).train()
    model[1].stages[1].eval()
    for p in model.parameters():
        p.grad = torch.rand_like(p)
    return model


def state(model: nn.Module) -> dict[str, Any]:
    """Returns everything that must stay as it is: classes, attributes, elements of containers, values."""
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
    for name, m in model.named_modules():
        found[f"{name} class"] = type(m)
        if isinstance(m, torch.jit.ScriptModule):
            found[name] = {k: b.tolist() for k, b in m.named_buffers(recurse=False)}
            continue
        found[name] = {key: id(value) for key, value in m.__dict__.items() if not isinstance(value, (int, str))}
        for key, value in m.__dict__.items():
            if isinstance(value, (dict, list, set)):
                elements = value.items() if isinstance(value, dict) else value
                found[f"{name}.{key}"] = [id(e[1]) if isinstance(value, dict) else e for e in elements]
            elif isinstance(value, (int, str)):
                found[f"{name}.{key}"] = value
        for kind, tensors in (("p", m.named_parameters(recurse=False)), ("b", m.named_buffers(recurse=False))):
            found |= {
                f"{name} {kind} {k}": (None if t.is_meta else t.tolist(), t._version, id(t.grad)) for k, t in tensors
            }
    return found


def images() -> torch.Tensor:
    return feature_map((2, 3, 8, 8))


def test_a_run_leaves_no_trace():
    """Nothing in the model changes but the classes of swapped modules and their names."""
    model = net()
    before = state(model)
    found = vf.accelerate(model, images())
    assert len(found.swapped) == 4
    assert not found.skipped
    vf.restore(model)
    assert state(model) == before


def test_hooks_run_once_each_and_on_the_model_itself():
    """In the run that records the inputs. Copies keep them as hooks that do nothing."""
    model, seen = net(), []
    gate = model[1].stages[0][0].gate
    for m in (model, gate, gate.fc[0]):
        m.register_forward_hook(lambda m, *_: seen.append(("forward", id(m))))
        m.register_forward_pre_hook(lambda m, *_: seen.append(("pre", id(m))))
        m.register_full_backward_hook(lambda m, *_: seen.append(("backward", id(m))))
    next(gate.parameters()).register_hook(lambda g: seen.append(("grad", id(gate))))
    found = vf.accelerate(model, images())
    assert sorted(seen) == sorted((kind, id(m)) for kind in ("forward", "pre") for m in (model, gate, gate.fc[0]))
    assert {s.name: s.note for s in found.swapped}["1.stages.0.0.gate"] == "fc.0 has hooks"


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise LookupError("no such thing")


def _swap_then_interrupt(module: nn.Module, recipe_: Recipe, name: str = "") -> None:
    """Does the first half of `swap`, for the second module."""
    if name.startswith("1.stages.1"):
        module.__class__ = recipe.swapped_class(recipe_.fused, recipe_.original)
        raise KeyboardInterrupt
    recipe.swap(module, recipe_, name)


# What fails -> the change that makes it fail, the error, its message, and the example.
FAULTS: dict[str, tuple[Callable[..., object], type[BaseException], str | None, Any]] = {
    "wrong shape": (
        lambda model, patch: None,
        RuntimeError,
        "should contain 5 elements not 3",
        torch.zeros(2, 5, 8, 8),
    ),
    "wrong number of arguments": (lambda model, patch: None, TypeError, "positional argument", (1, 2, 3)),
    "layer behind the gates": (lambda model, patch: model.append(Fails()), LookupError, "no such thing", None),
    "interrupted run": (lambda model, patch: model.register_forward_hook(_interrupt), KeyboardInterrupt, None, None),
    "gate that cannot be copied": (
        lambda model, patch: setattr(model[1].stages[1][0].gate, "lock", threading.Lock()),
        RuntimeError,
        r"1\.stages\.1\.0\.gate \(SE\) cannot be compared with its original: cannot pickle '_thread.lock' object",
        None,
    ),
    "out of memory while memory is measured": (
        lambda model, patch: patch.setattr(verify, "saved_bytes", _out_of_memory),
        RuntimeError,
        r"\(SE\) cannot be compared with its original: CUDA out of memory",
        None,
    ),
    "interrupted timing": (
        lambda model, patch: patch.setattr(verify, "interleaved", _interrupt),
        KeyboardInterrupt,
        None,
        None,
    ),
    "recipe": (
        lambda model, patch: patch.setattr(accelerate_file, "select", _out_of_memory),
        torch.OutOfMemoryError,
        "CUDA out of memory",
        None,
    ),
    "interrupted swap": (
        lambda model, patch: patch.setattr(accelerate_file, "swap", _swap_then_interrupt),
        KeyboardInterrupt,
        None,
        None,
    ),
    "warning that is an error": (
        lambda model, patch: patch.setattr(verify, "_difference", lambda *_: next(differences, "")),
        UserWarning,
        r"stages\.0\.0\.gate \(SE\) is put back",
        None,
    ),
}
differences: Iterator[str] = iter(())


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", FAULTS)
def test_model_is_as_before_if_accelerate_raises(name, monkeypatch):
    """Whatever raises, and when. What an earlier call swapped stays swapped."""
    change, error, message, example = FAULTS[name]
    model = net()
    vf.accelerate(model[1].stages[0], blocks=False) if name == "interrupted run" else None
    change(model, monkeypatch)
    global differences
    differences = iter(["differs in its result", ""])
    before = state(model)
    with pytest.raises(error, match=message):
        vf.accelerate(model, images() if example is None else example)
    monkeypatch.undo()
    assert state(model) == before
    assert sum(is_swapped(m) for m in model.modules()) == (name == "interrupted run")


def test_model_on_the_meta_device_is_as_before():
    """It has no values to compare. Without an example it is swapped."""
    with torch.device("meta"):
        model = AttentionResNet("se", width=8, depths=(1, 1), fused=False)
        x = torch.zeros(2, 3, 8, 8)
    before = state(model)
    with pytest.raises(RuntimeError, match=r"gate \(SE\) cannot be compared .*: the meta device holds no values"):
        vf.accelerate(model, x)
    assert state(model) == before
    assert len(vf.accelerate(model).swapped) == 4
    assert model(x).is_meta


class Nested(nn.Module):
    """A module whose arguments and results are nested."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, given: dict[str, Any], *, scale: float = 1.0) -> Any:
        y = given["x"] * self.weight * scale
        return {"y": (y, None), "z": [y.detach() > 0, 3, "three"]}


class FastNested(Nested):
    change: Callable[[Any], Any] = staticmethod(lambda result: result)

    def forward(self, given: dict[str, Any], *, scale: float = 1.0) -> Any:
        return self.change(super().forward(given, scale=scale))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nested = Nested()

    def forward(self, x: torch.Tensor) -> Any:
        return self.nested({"x": x}, scale=3.0)


CHANGED_RESULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "none": (lambda r: r, ""),
    "tensor": (lambda r: {**r, "y": (r["y"][0] * 1.1, None)}, "differs in its result 0"),
    "gradient": (lambda r: {**r, "y": (r["y"][0].detach(), None)}, "gives ['its result 0'"),
    "mask": (lambda r: {**r, "z": [~r["z"][0], *r["z"][1:]]}, "differs in its result"),
    "number": (lambda r: {**r, "z": [r["z"][0], 4, "three"]}, "as 4, not 3"),
    "dtype": (lambda r: {**r, "y": (r["y"][0].double(), None)}, "torch.float64, not (2, 3, 8, 8) torch.float32"),
    "form": (lambda r: {"y": list(r["y"]), "z": r["z"]}, "the form of its result"),
}


@pytest.mark.parametrize("name", CHANGED_RESULTS)
def test_nested_results_are_compared(name, monkeypatch):
    """Tuples, dicts and lists, their structure, and what is in them."""
    change, reason = CHANGED_RESULTS[name]
    monkeypatch.setattr(FastNested, "change", staticmethod(change))
    recipes = {Nested: Recipe(Nested, FastNested, "nested")}
    monkeypatch.setattr(accelerate_file, "known", lambda: recipes)
    model = Outer()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = vf.accelerate(model, images())
    assert [s.name for s in found.swapped] == ["nested"] * (not reason)
    assert all(reason in s.reason for s in found.skipped), found.skipped
    assert len(caught) == bool(reason)
    assert type(model.nested) is Nested or not reason


WRONG = {
    "without gradients": lambda module: not torch.is_grad_enabled(),
    "in eval mode": lambda module: not module.training,
    "in training": lambda module: module.training,
    "with gradients": lambda module: torch.is_grad_enabled(),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("when", WRONG)
def test_training_and_inference_are_compared(when, training, monkeypatch):
    """A fused forward that is wrong in one of them is put back, whatever mode the model is in."""
    forward = vf.FastSE.forward

    def wrong(self: nn.Module, x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        return forward(self, x, **epilogue) * (1.01 if WRONG[when](self) else 1)

    monkeypatch.setattr(vf.FastSE, "forward", wrong)
    model = AttentionResNet("se", width=8, depths=(1, 1), fused=False).train(training)
    if when == "in training" and not training:
        pytest.skip("a model in eval mode is compared in eval mode")
    with pytest.warns(UserWarning, match="is put back: its fused forward differs in its result"):
        found = vf.accelerate(model, images(), blocks=False)
    assert not found.swapped


def test_running_statistics_are_compared(monkeypatch):
    model = nn.Sequential(vf.reference.CoordAtt(C)).train()
    forward = vf.FastCoordAtt.forward

    def wrong(self: nn.Module, x: torch.Tensor, **epilogue: Any) -> torch.Tensor:
        y = forward(self, x, **epilogue)
        with torch.no_grad():
            self.bn1.running_var += 0.01 * self.training
        return y

    assert vf.accelerate(model, feature_map((2, C, 8, 8))).swapped
    vf.restore(model)
    monkeypatch.setattr(vf.FastCoordAtt, "forward", wrong)
    with pytest.warns(UserWarning, match=r"differs in the buffer bn1\.running_var"):
        assert not vf.accelerate(model, feature_map((2, C, 8, 8))).swapped


class Noise(nn.Module):
    """Random, from a generator of its own, which no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def __deepcopy__(self, memo: Any) -> Noise:
        twin = Noise()
        twin.generator = self.generator
        return twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape, generator=self.generator) if self.training else x


RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: nn.Dropout2d(0.5),
    "a generator of its own": Noise,
}


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.parametrize("where", ["act1", "downsample", "both"])
def test_random_parts_are_not_blamed(kind, where):
    """Random layers before the gate and in the shortcut, which the fused block may call in another order."""
    built = block("se", "BasicBlock").float().train()
    for name in ("act1", "downsample") if where == "both" else (where,):
        setattr(built, name, RANDOM[kind]())
    before = torch.get_rng_state()
    found = vf.accelerate(built, feature_map((2, 32, 8, 8)))
    assert not found.skipped, str(found)
    assert {s.op for s in found.swapped} == {"se", "epilogue"}
    assert torch.equal(torch.get_rng_state(), before)


def test_random_module_that_is_wrong_is_put_back(monkeypatch):
    """It shows in eval mode, where it is not random."""
    built = block("se", "BasicBlock").float().train()
    built.act1 = Noise()
    forward = type(built).forward
    kind = next(r.fused for o, r in accelerate_file.known().items() if o is type(built))
    monkeypatch.setattr(kind, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.warns(UserWarning, match="differs in its result"):
        found = vf.accelerate(built, feature_map((2, 32, 8, 8)))
    assert [s.op for s in found.swapped] == ["se"]


def test_gates_with_computed_weights_are_compared():
    """torch.nn.utils.weight_norm keeps a computed tensor in the layer, which deepcopy refuses after a training step."""
    model = nn.Sequential(vf.reference.SE(C))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[0].fc[0])
    x = feature_map((2, C, 8, 8))
    model(x).sum().backward()
    found = vf.accelerate(model, x)
    assert [s.note for s in found.swapped] == ["fc.0 has hooks"]
    assert not found.skipped


def test_table_of_a_gate_that_cannot_be_copied():
    """Without an example the table shows no expected saving for it."""
    model = nn.Sequential(vf.reference.SE(C), vf.reference.CBAM(C))
    model[1].lock = threading.Lock()
    assert "2 swapped" in str(vf.accelerate(model))
