"""What trains other models trains these: mixed precision, checkpointing, torch.func, averages, hooks, whole loops."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils import parametrizations
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import visattn_fast as vf
from cases import INTERPRETED, TARGETS, feature_map
from visattn_fast import catalogue

pytestmark = pytest.mark.skipif(INTERPRETED, reason="what the kernels compute is held elsewhere")

entries = pytest.mark.parametrize("entry", catalogue.ENTRIES.values(), ids=lambda e: e.name)
few = pytest.mark.parametrize("name", ["se", "cbam", "coord_att", "gam", "window_attention"])


def normalises_by_batch(entry):
    """Its running statistics are updated in place, which transforms of functions refuse of PyTorch's own, too."""
    return entry.training and any(b.dtype.is_floating_point for b in entry.pair(8)[0].buffers())


stateless = pytest.mark.parametrize(
    "entry", [e for e in catalogue.ENTRIES.values() if not normalises_by_batch(e)], ids=lambda e: e.name
)


def detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@stateless
def test_vmap(entry):
    """Over images, and over the gradients of each image's loss: per-sample gradients."""
    x = feature_map((3, 8, 5, 4), "nchw", torch.float32)
    found = []
    for module in entry.pair(8):
        parameters = detached(module)

        def one(parameters, image, module=module):
            return functional_call(module, parameters, (image[None],))[0]

        def loss(parameters, image, one=one):
            return one(parameters, image).square().sum()

        found.append(vmap(one, (None, 0))(parameters, x))
        found.append(vmap(grad(loss), (None, 0))(parameters, x))
    torch.testing.assert_close(found[0], module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:2], found[2:])


@stateless
def test_forward_mode(entry):
    """Along one direction, by torch.func and by dual numbers, also where parameters ask for a gradient."""
    fast, plain = entry.pair(8)
    x, along = (feature_map((2, 8, 5, 4), "nchw", torch.float32, seed=seed) for seed in (0, 1))
    expected = jvp(plain, (x,), (along,))
    torch.testing.assert_close(jvp(fast, (x,), (along,)), expected)
    with forward_ad.dual_level():
        torch.testing.assert_close(tuple(forward_ad.unpack_dual(fast(forward_ad.make_dual(x, along)))), expected)


@pytest.mark.parametrize("name", ["cbam", "coord_att_eval", "self_attention"])
def test_hessian(name):
    fast, plain = catalogue.ENTRIES[name].pair(8)
    x = feature_map((1, 8, 2, 2), "nchw", torch.float32)
    found = [hessian(lambda x, m=m: m(x).square().sum())(x) for m in (fast, plain)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), TARGETS)
def test_transforms_under_an_explicit_choice(device, backend):
    """It is kept: torch.func.grad runs the kernel forward, vmap says that it cannot."""
    fast = vf.FastSE(16).to(device)
    x = feature_map((2, 16, 5, 4), "nchw", torch.float32, device)
    expected = grad(lambda x: fast(x).square().sum())(x)
    with vf.use_backend(backend):
        torch.testing.assert_close(grad(lambda x: fast(x).square().sum())(x), expected)
        with pytest.raises(RuntimeError, match="vmap"):
            vmap(lambda image: fast(image[None]))(x)


def test_compiled_vmap():
    fast, plain = catalogue.ENTRIES["se"].pair(16)
    x = feature_map((3, 16, 5, 4), "nchw", torch.float32)
    compiled = torch.compile(vmap(lambda image: fast(image[None])[0]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(torch.compile(fast, fullgraph=True, backend="eager")(x), plain(x))


@entries
def test_reentrant_checkpoint(entry):
    """Recomputed in the backward pass, the same gradients and running statistics come out as for the reference."""
    found = []
    for module in entry.pair(8, torch.float64):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float64).requires_grad_()
        checkpoint(module, x, use_reentrant=True).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    torch.testing.assert_close(*found)


@entries
def test_without_memory(entry):
    """Fake and meta tensors: forward and backward, shapes as on a device; parameters loaded by assignment or copy."""
    fast, _ = entry.pair(16)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    with FakeTensorMode():
        fake = entry.fast(**entry.arguments(16))
        image = torch.empty(x.shape, requires_grad=True)
        y = fake(image)
        y.sum().backward()
    with torch.device("meta"):
        meta = entry.fast(**entry.arguments(16))
    given = x.to("meta").requires_grad_()
    z = meta(given)
    z.sum().backward()
    assert y.shape == z.shape == fast(x).shape
    for module, leaf in ((fake, image), (meta, given)):
        assert leaf.grad.shape == x.shape
        assert all(p.grad.shape == p.shape for p in module.parameters())
    assigned, copied = copy.deepcopy(meta), meta.to_empty(device="cpu")
    assigned.load_state_dict(copy.deepcopy(fast.state_dict()), assign=True)
    copied.load_state_dict(fast.state_dict())
    expected = copy.deepcopy(fast)(x)
    for module in (assigned, copied):
        assert torch.equal(module.train(fast.training)(x), expected)


@entries
@pytest.mark.parametrize("parametrization", ["weight_norm", "spectral_norm"])
def test_parametrizations(entry, parametrization):
    """Parameters are read through their attributes: those that are computed of others are computed, and trained."""
    torch.manual_seed(0)
    fast, plain = entry.pair(8, torch.float64)
    for layer in list(fast.modules()):
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            getattr(parametrizations, parametrization)(layer)
    twin = copy.deepcopy(fast)
    twin.__class__ = plain.__class__
    found = []
    for module in (fast, twin):
        x = feature_map((2, 8, 4, 4), "nchw", torch.float64).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        found.append({"y": y, "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@entries
def test_names_of_parameters(entry):
    """In the reference's order, so that groups by name or shape, as for weight decay, are the same."""
    fast, plain = entry.pair(8)
    names = [[(name, p.shape) for name, p in module.named_parameters()] for module in (fast, plain)]
    assert names[0] == names[1]
    norms = [[isinstance(m, nn.modules.batchnorm._NormBase) for m in module.modules()] for module in (fast, plain)]
    assert norms[0] == norms[1]


def small_models(name):
    """Two classifiers of 3 x 8 x 8 images with equal parameters, around a fused gate and its reference."""
    torch.manual_seed(0)
    models = []
    for gate in catalogue.ENTRIES[name].pair(16):
        layers = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), gate
        models.append(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)))
    models[1].load_state_dict(models[0].state_dict())
    return models


def batches(count=4):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield torch.randn(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)


def torchvision_loop(model, dtype):
    """A step as torchvision's reference scripts have it: autocast, scaled gradients, clipping, a schedule, an EMA."""
    norms, others = [], []
    for module in model.modules():
        of_norm = isinstance(module, nn.modules.batchnorm._NormBase)
        for name, p in module.named_parameters(recurse=False):
            (norms if of_norm or name == "bias" else others).append(p)
    groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.05}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=1024.0)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    losses = []
    for images, labels in batches():
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
    swa_utils.update_bn((images for images, _ in batches(2)), average)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert scaler.get_scale() == (1024.0 if dtype == torch.float16 else 1.0)  # no step was skipped
    model.eval()
    average.eval()
    with torch.inference_mode():
        return losses, *(m(images) for m in (model, average))


@few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torchvision_loop(name, dtype):
    """The same losses, and in the end the same model and the same average of it, as with the reference."""
    found = [torchvision_loop(model, dtype) for model in small_models(name)]
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(*found, **tolerance)


class Trained(nn.Module):
    """What Lightning calls a module: it has the steps, and says how it is optimised."""

    def __init__(self, model, **options):
        super().__init__()
        self.model, self.options = model, options

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2, **self.options)


def lightning_loop(module):
    """As Lightning's automatic optimisation: closures, accumulated gradients, validation in inference mode between."""
    optimizer, losses = module.configure_optimizers(), []

    def closure(batch, first):
        loss = module.training_step(batch) / 2
        if first:
            optimizer.zero_grad()
        loss.backward()
        return loss

    for index, batch in enumerate(batches()):
        module.train()
        step = functools.partial(closure, batch, index % 2 == 0)
        losses.append((optimizer.step(step) if index % 2 else step()).item())
        module.eval()
        with torch.inference_mode():
            losses.append(module.training_step(batch).item())
    return losses


@few
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_lightning_loop(name, options):
    """With deterministic algorithms alone."""
    torch.use_deterministic_algorithms(True)
    try:
        found = [lightning_loop(Trained(model, **options)) for model in small_models(name)]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_optimizer_in_the_backward_pass():
    """Hooks that run as a parameter's gradient is whole, as those that step and drop it at once."""
    fast, plain = catalogue.ENTRIES["cbam"].pair(16)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    plain(x).square().sum().backward()
    for p in fast.parameters():

        def step(p):
            p.data.sub_(0.1 * p.grad)
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
    fast(x).square().sum().backward()
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, q.detach() - 0.1 * q.grad)


def test_hooks_see_and_change():
    """Hooks of every kind on a fused module, keyword arguments included, do what they do on another."""
    found = []
    for module in catalogue.ENTRIES["se"].pair(16):
        x = feature_map((2, 16, 6, 5), "nchw", torch.float32).requires_grad_()
        module.register_forward_pre_hook(lambda m, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)
        module.register_forward_hook(lambda m, args, kwargs, y: 2 * y, with_kwargs=True)
        module.register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],))
        module.register_full_backward_hook(lambda m, dx, dy: (dx[0] - 1,))
        y = module(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_synchronised_batch_norm_is_refused(monkeypatch):
    """A batch norm that the gate computes itself would leave the other processes' batches out."""
    gate = nn.SyncBatchNorm.convert_sync_batchnorm(vf.FastCoordAtt(16))
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    gate(x)  # alone it is a batch norm
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(RuntimeError, match="SyncBatchNorm"):
        gate(x)
    gate.eval()(x)


def test_pruned_layers_are_read():
    """A mask made permanent is in the weight. One that a hook on the inner layer applies is not: those do not run."""
    from torch.nn.utils import prune

    fast, plain = catalogue.ENTRIES["se"].pair(16)
    x = feature_map((2, 16, 6, 5), "nchw", torch.float32)
    for module in (fast, plain):
        prune.l1_unstructured(module.fc[0], "weight", 0.5)
        prune.remove(module.fc[0], "weight")
    torch.testing.assert_close(fast(x), plain(x))
