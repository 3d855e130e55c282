"""watch_gates reports statistics of every gate while a model trains, and changes nothing in the training."""

from __future__ import annotations

import contextlib
import copy
import io
import logging

import pytest
import torch
from torch import nn
from torch.nn.parallel.parallel_apply import parallel_apply

import visattn_fast as vf
from cases import feature_map
from gated_net import KEYS, images, net
from replicas import replica, stand_in_accelerator
from visattn_fast import reference


def train(model: nn.Module, steps: int, root: nn.Module | None = None) -> list[torch.Tensor]:
    """Trains the model, called through ``root`` if given; returns the losses."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = (model if root is None else root)(images()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("fused", [True, False])
def test_every_nth_step_reports_every_gate(fused):
    """Evaluation is not reported, and training is the same bit for bit."""
    plain, watched = net(fused), net(fused)
    seen: list[vf.GateStatistics] = []
    with vf.watch_gates(watched, seen.append, every=2) as watch:
        losses = train(watched, 3)
        watched.eval()(images())
        vf.attention_maps(watched.train(), images())
    assert [(s.step, s.name) for s in seen] == [(step, key) for step in (0, 2) for key in KEYS]
    assert [s.kind for s in seen[:5]] == ["channel"] * 4 + ["spatial"]
    assert torch.equal(torch.stack(losses), torch.stack(train(plain, 3)))
    for p, q in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(p, q)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())
    watch.remove()
    train(watched, 1)
    assert len(seen) == 10


class GivenGate(nn.Module):
    """A gate of given values, like a user's own module."""

    def __init__(self, values: torch.Tensor, kind: str = "channel") -> None:
        super().__init__()
        self.values, self.kind = values, kind

    def attention(self, x):
        return {self.kind: self.values}

    def forward(self, x):
        return x


def statistics(values: torch.Tensor, kind: str = "channel") -> vf.GateStatistics:
    """Returns what a watched gate of these values reports."""
    seen: list[vf.GateStatistics] = []
    gate = GivenGate(values, kind)
    with vf.watch_gates(gate, seen.append):
        gate(torch.zeros(1))
    return seen[0]


def test_statistics_are_mean_deviation_and_fractions():
    values = torch.tensor([0.0, 0.04, 0.5, 0.5, 0.5, 0.5, 0.6, 0.96])
    found = statistics(values)
    assert found[:3] == (0, "channel", "channel")
    assert found[3:] == pytest.approx((values.mean().item(), values.std(correction=0).item(), 0.25, 0.125))
    assert found.fault == ""


@pytest.mark.parametrize(
    ("values", "kind", "fault"),
    [
        (torch.full((100,), 0.5), "channel", "constant"),
        (torch.linspace(0, 0.04, 100), "spatial", "shut"),
        (torch.linspace(0.96, 1, 100), "element", "open"),
        (torch.linspace(0, 4e-4, 100), "received", ""),  # a softmax over many positions is small everywhere
        (torch.full((100,), 2e-4), "received", "constant"),
        (torch.tensor([0.5, float("nan")]), "channel", "not finite"),
        (torch.tensor([0.5, float("inf")]), "channel", "not finite"),
        (torch.linspace(0.2, 0.8, 100).bfloat16(), "channel", ""),
    ],
)
def test_fault_names_what_is_wrong(values, kind, fault):
    assert statistics(values, kind).fault == fault


def test_shut_gate_is_a_warning_in_the_log(caplog):
    """A bias shuts one gate of the network; the other gate is logged as information."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), vf.FastSE(16, 4, bias=True), vf.FastSE(16, 4, bias=True))
    with torch.no_grad():
        for gate in (model[1], model[2]):
            gate.fc[2].weight.normal_(generator=torch.Generator().manual_seed(0))
        model[2].fc[2].bias.sub_(20)
    with caplog.at_level(logging.INFO, "visattn_fast.watch"), vf.watch_gates(model, every=2):
        train(model, 3)
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert [level for level, _ in levels] == ["INFO", "WARNING"] * 2
    assert "step 2, gate 2: mean 0.000" in levels[3][1]
    assert levels[3][1].endswith("100% below 0.05, 0% above 0.95: shut")


def test_gradients_under_autocast_are_kept():
    """Autocast caches weights that a report has cast without gradients; training must not use that cache."""
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    grads = []
    for every in (1, 10**6):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Identity(), reference.SE(16))
        with vf.watch_gates(model, lambda s: None, every) as watch, torch.autocast("cpu", torch.bfloat16):
            watch._step += every - 1  # the second run reports nothing
            vf.attention_maps(model, x)
            model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for p, q in zip(*grads, strict=True):
        assert p is not None
        assert torch.equal(p, q)


@pytest.mark.parametrize("wrap", ["parallel", "compiled", "part"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_wrapped_models_are_reported_and_train_the_same(wrap):
    """A compiled model runs once more, eagerly, in each step to report; this does not change its training."""
    torch._dynamo.reset()
    results = []
    for watched in (False, True):
        model = root = net().train()
        if wrap == "parallel":
            root = nn.DataParallel(model)
        elif wrap == "compiled":
            root = torch.compile(model, backend="eager")
        else:
            model.cbam = torch.compile(model.cbam, backend="eager")
        seen: list[vf.GateStatistics] = []
        if watched:
            vf.watch_gates(root, seen.append, every=2)
        losses = train(model, 3, root)
        results.append((torch.stack(losses), *model.state_dict().values()))
    assert [(s.step, s.name) for s in seen] == [(step, key) for step in (0, 2) for key in KEYS]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class Fails(nn.Module):
    """Raises while it is told to, after the gates have run."""

    failing = False

    def forward(self, x):
        if self.failing:
            raise RuntimeError("out of memory")
        return x


@pytest.mark.parametrize("every", [1, 2])
def test_step_that_raised_does_not_count(every):
    """It is reported when it is repeated, and no evaluation after it is."""
    model = nn.Sequential(net(), Fails()).train()
    seen: list[vf.GateStatistics] = []
    with vf.watch_gates(model, seen.append, every):
        for _ in range(2):
            model(images())
            for _ in range(3):
                model[1].failing = True
                with pytest.raises(RuntimeError, match="out of memory"):
                    model(images())
                model[1].failing = False
                model.eval()(images())
                model[0].train()(images())
                model.train()
        model(images())
    assert [(s.step, s.name) for s in seen] == [(step, f"0.{key}") for step in range(0, 3, every) for key in KEYS]


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped before", "wrapped after"])
def test_replicas_of_data_parallel_count_as_one(wrapped, monkeypatch):
    """Steps are counted once, and the first replica's gates reported; a replica that raises ends no step."""
    stand_in_accelerator(monkeypatch)
    model, twin = (nn.Sequential(net(), Fails()).train() for _ in range(2))
    model[0].conv[2].p = twin[0].conv[2].p = 0.0
    seen, batch = [], images()
    vf.watch_gates(nn.DataParallel(model) if wrapped else model, seen.append, every=2)

    def step() -> None:
        copies = [replica(model) for _ in range(3)]
        copies[0].get_submodule("1").failing = model[1].failing
        parallel_apply(copies, [batch + i for i in range(3)], devices=range(3))

    for failing in (False, True, False, False):
        model[1].failing = failing
        with pytest.raises(RuntimeError, match="out of memory") if failing else contextlib.nullcontext():
            step()
    assert [(s.step, s.name) for s in seen] == [(step, f"0.{key}") for step in (0, 2) for key in KEYS]
    alone: list[vf.GateStatistics] = []
    with vf.watch_gates(twin, alone.append):
        twin(batch)
    assert [s.mean for s in seen[: len(KEYS)]] == pytest.approx([s.mean for s in alone])


def test_hooks_do_not_break_a_compiled_graph():
    """Hooks inside a compiled graph report nothing, and leave it one graph."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(3, 16, 3), vf.FastSE(16))
    seen: list[vf.GateStatistics] = []
    vf.watch_gates(model, seen.append)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(images()).sum().backward()
    assert seen == []
    model(images())
    assert [s.name for s in seen] == ["1"]
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"module\.compile\(\)"):
        vf.watch_gates(model)


def test_copies_of_a_watched_model_are_not_watched():
    model = net()
    seen: list[vf.GateStatistics] = []
    vf.watch_gates(model, seen.append)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        train(twin, 1)
        assert seen == []
    train(model, 1)
    assert len(seen) == len(KEYS)


def test_recomputed_activations_are_reported_once():
    model = net()
    seen: list[vf.GateStatistics] = []

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    root = Checkpointed()
    vf.watch_gates(root, seen.append, every=1)
    train(root, 2)
    assert [s.name for s in seen] == [f"net.{key}" for key in KEYS] * 2


def test_bad_argument_raises():
    with pytest.raises(ValueError, match="every must be a positive int, got 0"):
        vf.watch_gates(net(), every=0)
    with pytest.raises(ValueError, match=r"a module with a method attention\(x\), or one that .*, got Linear"):
        vf.watch_gates(nn.Linear(3, 3))
