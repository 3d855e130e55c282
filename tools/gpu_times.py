"""Times a GPU kernel by kernel and pass by pass; `tools.gpu_check` measures whole calls.

``python -m tools.gpu_times kernels --modules se,cbam`` prints the device time of each kernel of a training step.
``python -m tools.gpu_times grains`` times the passes over x at the grains of `kernels.core.heuristics` and others.
Both start from a cold L2, with [64, 256, 56, 56] in bfloat16 if no ``--shape`` is given. Kernels are compiled as they
are met, about a second each.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from visattn_fast import catalogue
from visattn_fast.backends import use_backend
from visattn_fast.report.cases import Shape, parse_shape

from .table import show

gate, heuristics, input_grad, layouts, map_grads, pool = (
    importlib.import_module(f"visattn_fast.kernels.{name}")
    for name in (
        "passes.gate",
        "core.heuristics",
        "passes.input_grad",
        "core.layout",
        "passes.map_grads",
        "passes.pool",
    )
)
STEPS = 5
CACHE = 256 << 20  # bytes that are written between passes: more than any L2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("kernels", "grains"))
    parser.add_argument("--modules", default="se,eca,cbam", help="of `kernels` (default %(default)s)")
    parser.add_argument("--shape", type=parse_shape, default="64x256x56x56", help="N x C x H x W (default %(default)s)")
    args = parser.parse_args()
    for layout in catalogue.LAYOUTS:
        if args.what == "grains":
            show(f"{layout}: us of each pass", ("pass", "now", "best", "its grain"), list(grains(args.shape, layout)))
        for name in args.modules.split(",") if args.what == "kernels" else ():
            rows = kernels(name, args.shape, layout)
            total = sum(us for _, _, us in rows)
            show(f"{name}, {layout}: {total:.1f} us of kernels", ("kernel", "launches", "us"), rows)


def kernels(name: str, shape: Shape, layout: str) -> list[tuple[str, float, float]]:
    """Returns (kernel, launches, us) of a forward and a backward pass, in the order of their first launch."""
    module = catalogue.ENTRIES[name].pair(shape[1], torch.bfloat16)[0].cuda()
    x = catalogue.feature_map(shape, layout, torch.bfloat16, "cuda").requires_grad_()
    cache = torch.empty(CACHE, dtype=torch.int8, device="cuda")
    grad = torch.ones_like(module(x))

    def step() -> None:
        cache.zero_()
        y = module(x)
        cache.zero_()
        torch.autograd.grad(y, [x, *module.parameters()], grad)

    with use_backend("triton"):
        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type == DeviceType.CUDA and "FillFunctor<signed char>" not in event.name:
            times.setdefault(event.name[:80], []).append(event.device_time)
    return [(kernel, len(us) / STEPS, round(sum(us) / STEPS, 1)) for kernel, us in times.items()]


def passes(shape: Shape, layout: str, device: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Callable[[], Any]]:
    """Returns the passes over x by the names of their grains."""
    n, c, h, w = shape
    x, grad = (catalogue.feature_map(shape, layout, dtype, device, seed=seed) for seed in (0, 1))
    channel, spatial = torch.rand(n, c, device=device), torch.rand(n, h, w, device=device)
    dmaps, dpooled = torch.randn(n, 2, h, w, device=device), torch.randn(n, 2, c, device=device)
    at_c = torch.randint(c, (n, h, w), device=device, dtype=torch.int32)
    at_hw = torch.randint(h * w, (n, c), device=device, dtype=torch.int32)
    x, layout_of_x = layouts.canonical(x)

    def map_gradients() -> None:
        splits = map_grads.map_grads_reduction(layout_of_x).splits
        map_grads.map_grads(x, layout_of_x, dmaps, at_c, channel.new_empty((n, splits, c)))

    channel_terms = input_grad.Terms(grad, channel, dpooled=channel)
    all_terms = input_grad.Terms(grad, channel, spatial, dpooled, at_hw, dmaps, at_c)

    return {
        "mean": lambda: pool.mean_hw(x, layout_of_x),
        "mean and maximum": lambda: pool.mean_max_hw(x, layout_of_x),
        "maps": lambda: pool.mean_max_c(x, channel, layout_of_x),
        "scale": lambda: gate.apply_gates(x, layout_of_x, channel, None, None, 0),
        "gate gradient": lambda: gate.gate_grads(grad, x, layout_of_x, channel, None, None, 0),
        "gate gradients": lambda: gate.gate_grads(grad, x, layout_of_x, channel, spatial, None, 0),
        "map gradients": map_gradients,
        "input gradient": lambda: input_grad.input_grad(x, layout_of_x, channel_terms),
        "input gradient, maps": lambda: input_grad.input_grad(x, layout_of_x, all_terms),
    }


def grains(shape: Shape, layout: str) -> Iterator[tuple[str, float, float, str]]:
    """Yields (pass, us now, us at best, that grain)."""
    for name, run in passes(shape, layout, "cuda").items():
        now = heuristics.GRAINS[name][layout == "channels_last"]
        tried = itertools.product((1024, 2048, 4096, 8192), (64, 128, 256, 512), (8, 16, 32))
        times = {}
        few = (t for t in tried if t[0] <= 512 * t[2])  # at most 512 threads, which narrow rows may double
        for grain in [now, *(heuristics.Grain(*t) for t in few)]:
            with chosen(name, grain):
                times[grain] = 1e3 * statistics.median(do_bench(run, warmup=3, rep=12, return_mode="all"))
        best = min(times, key=lambda g: times[g])
        yield name, round(times[now], 1), round(times[best], 1), str(tuple(best))


@contextmanager
def chosen(name: str, grain: Any) -> Iterator[None]:
    """Within the context, a pass has this grain in both layouts."""
    before = heuristics.GRAINS[name]
    heuristics.GRAINS[name] = (grain, grain)
    try:
        yield
    finally:
        heuristics.GRAINS[name] = before


if __name__ == "__main__":
    main()
