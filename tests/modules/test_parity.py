"""The fused modules match the reference: values and every gradient, within the error budget, on every backend."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import visattn_fast as vf
from cases import (
    EPILOGUES,
    INTERPRETED,
    LARGE_SHAPES,
    SHAPE_DTYPES,
    VIEWS,
    check,
    entries,
    feature_map,
    layouts,
    needs_dtype,
    oracle,
    poisoned,
    run,
    targets,
    threads,
    within_budget,
)
from visattn_fast import catalogue


def identify(value):
    """Returns the id of a parameter of a test."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "name", None)


ENTRY_SHAPES = [(e, *case) for e in catalogue.ENTRIES.values() for case in SHAPE_DTYPES if e.supports(case[0])]
ENTRY_SHAPES += [
    (e, s, torch.float32) for e in catalogue.ENTRIES.values() for s in LARGE_SHAPES if e.training and e.supports(s)
]
# Every epilogue in float32 and bfloat16, one in the other dtypes, and every one on maps of one pixel.
EPILOGUE_CASES = [((2, 8, 6, 10), d, *e) for d in (torch.float32, torch.bfloat16) for e in EPILOGUES[1:]]
EPILOGUE_CASES += [((2, 8, 6, 10), d, True, "silu") for d in (torch.float64, torch.float16)]
EPILOGUE_CASES += [((1, 33, 1, 1), torch.float32, *e) for e in EPILOGUES[1:]]
EPILOGUE_CASES = [(e, *c) for e in catalogue.ENTRIES.values() if e.epilogue for c in EPILOGUE_CASES if e.supports(c[0])]
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy in the interpreter, about intended NaN


@targets
@pytest.mark.parametrize(("entry", "shape", "dtype"), ENTRY_SHAPES, ids=identify)
@layouts
def test_shapes_match_reference(entry, layout, shape, dtype, device, backend):
    needs_dtype(backend, device, dtype)
    x = feature_map(shape, layout, dtype, device)
    fused = check(entry, x, backend)
    dense = ["y"] if entry.epilogue else []
    if device == "cpu" or not entry.has_torch_layers:  # cuDNN chooses the layout of a convolution's result
        dense.append("x")
    for name in dense if x.numel() else ():
        assert fused[name].is_contiguous(memory_format=catalogue.LAYOUTS[layout])


@targets
@pytest.mark.parametrize(("entry", "shape", "dtype", "with_residual", "activation"), EPILOGUE_CASES, ids=identify)
@layouts
def test_epilogues_match_reference(entry, layout, shape, dtype, with_residual, activation, device, backend):
    needs_dtype(backend, device, dtype)
    x = feature_map(shape, layout, dtype, device)
    residual = feature_map(shape, layout, dtype, device, seed=2) if with_residual else None
    check(entry, x, backend, residual, activation)


@targets
@entries
@layouts
@pytest.mark.parametrize("view", VIEWS)
def test_strided_maps_match_reference(entry, layout, view, device, backend):
    x = VIEWS[view](feature_map((2, 8, 6, 5), layout, torch.float32, device), layout)
    check(entry, x, backend)
    if entry.epilogue:  # with a residual in the other layout
        other = "nchw" if layout == "channels_last" else "channels_last"
        check(entry, x, backend, feature_map((2, 8, 6, 5), other, torch.float32, device, seed=2), "relu")


@targets
@entries
def test_strided_weights_match_reference(entry, device, backend):
    """Parameters and buffers may be every second element of a tensor; NaN stands between the elements."""

    def spread(module):
        for t in (*module.parameters(), *module.buffers()):
            if t.is_floating_point():
                t.data = torch.stack([t.data, torch.full_like(t.data, float("nan"))], -1)[..., 0]

    fast, plain = (m.to(device) for m in entry.pair(8))
    x = feature_map((3, 8, 6, 5), "nchw", torch.float32, device)
    with vf.use_backend(backend):
        fused = run(fast, x, change=spread)
    within_budget(fused, run(plain, x), *oracle(plain, x))


@targets
@entries
@layouts
def test_forward_without_gradients_gives_the_same_bits(entry, layout, device, backend):
    """Forward passes that save tensors for backward and those that save none give the same bits."""
    fast, epilogue = entry.pair(8)[0].to(device), {}
    x = feature_map((2, 8, 6, 5), layout, torch.float32, device)
    if entry.epilogue:
        epilogue = {"residual": feature_map((2, 8, 6, 5), layout, torch.float32, device, seed=2), "activation": "relu"}
    with vf.use_backend(backend), poisoned():
        kept = fast(x.requires_grad_(), **epilogue)
        with torch.no_grad():
            assert torch.equal(fast(x, **epilogue), kept)


@targets
@entries
@layouts
def test_ties_of_maxima_match_reference(entry, layout, device, backend):
    """The gradient of equal maxima, which are common after a ReLU, goes to the first, as in the reference."""
    x = feature_map((2, 16, 6, 7), layout, torch.float32, device).relu_()
    x[:, :, :2] = 0
    x[0, 3] = 0
    check(entry, x, backend)
    if entry.name != "gam":  # its batch norm divides the rounding errors of a constant by almost zero
        check(entry, torch.ones_like(x), backend)


@targets
@quiet
@entries
@layouts
@pytest.mark.parametrize(("value", "count"), [("nan", 1), ("nan", 3), ("inf", 1), ("-inf", 3)])
def test_nan_and_inf_spread_as_in_reference(entry, layout, value, count, device, backend):
    """NaN and Inf appear in the result exactly where the reference has them."""
    x = feature_map((2, 16, 5, 4), layout, torch.float32, device)
    for i in range(count):
        x[0, 2 * i, i, 1] = float(value)
    fast, plain = (m.to(device) for m in entry.pair(16))
    with vf.use_backend(backend), torch.no_grad():
        y = fast(x)
    torch.testing.assert_close(y, plain(x), equal_nan=True, rtol=1e-4, atol=1e-5)


@targets
@quiet
@entries
@layouts
def test_first_nan_takes_the_gradient_of_a_maximum(entry, layout, device, backend):
    """The first NaN is the maximum, and takes its gradient."""
    x = feature_map((2, 16, 5, 4), layout, torch.float32, device)
    x[1, 4, 2, 1] = x[1, 4, 3, 3] = x[1, 9, 2, 1] = float("nan")
    fast, plain = (m.to(device) for m in entry.pair(16))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    with vf.use_backend(backend):
        fast(x1).sum().backward()
    plain(x2).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, equal_nan=True, rtol=1e-4, atol=1e-5)


@targets
@entries
@layouts
@pytest.mark.parametrize("shape", [(3, 16, 9, 7), (1, 16, 9, 7)] if INTERPRETED else [(3, 64, 56, 57), (1, 64, 56, 57)])
def test_repeats_give_the_same_bits(entry, layout, shape, device, backend):
    """Values and gradients are the same bits in every run, with any number of threads."""
    if not entry.supports(shape):
        pytest.skip(f"no {entry.name} for {shape}")
    x = feature_map(shape, layout, torch.float32, device)
    first = check(entry, x, backend)
    fast, _ = (m.to(device) for m in entry.pair(shape[1]))
    # The sums of PyTorch's layers may depend on the number of threads.
    counts = (torch.get_num_threads(),) if entry.has_torch_layers else (1,) if backend == "triton" else (1, 2, 3)
    for count in counts:
        with vf.use_backend(backend), poisoned(), threads(count):
            again = run(fast, x)
        assert all(torch.equal(t, again[name]) for name, t in first.items())


@targets
@entries
@hypothesis.settings(max_examples=5 if INTERPRETED else 40, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    layout=st.sampled_from(list(catalogue.LAYOUTS)),
    epilogue=st.sampled_from(EPILOGUES),
    view=st.sampled_from([None, *VIEWS]),
    seed=st.integers(0, 1000),
)
def test_fuzzed_calls_match_reference(entry, device, backend, shape, layout, epilogue, view, seed):
    hypothesis.assume(entry.supports(shape))
    x = feature_map(shape, layout, torch.float32, device, seed=seed)
    if view:
        x = VIEWS[view](x, layout)
    with_residual, activation = epilogue if entry.epilogue else (False, None)
    residual = feature_map(shape, layout, torch.float32, device, seed=seed + 1) if with_residual else None
    check(entry, x, backend, residual, activation)
