"""The fused operator against PyTorch's in float64: for shapes of real models, and odd ones."""

import itertools
import threading

import pytest
import torch
from torch import nn

from split_affinity.kernels import fused_norm as module
from split_affinity.kernels.fused_norm import fused_norm
from split_affinity.models.registry import build_model

LAST = torch.channels_last
FLOAT, HALF = torch.float32, torch.bfloat16
KINDS = list(itertools.product((False, True), repeat=3))  # adds, relu, twice
MOST_WRONG = {FLOAT: 5e-6, HALF: 6e-3}  # bfloat16 has 8 bits
MODELS = {  # with the side of the images
    "resnet50": 64,
    "resnet56": 32,
    "mobilenet_v3_small": 64,
    "densenet121": 64,
}


def norm_shapes(name, images, size):
    """The shapes of what a model's batch norms get."""
    shapes = set()
    with torch.device("meta"):
        model = build_model(name, 10, size)
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.register_forward_hook(lambda _, given, output: shapes.add(output.shape))
        model(torch.zeros(images, 3, size, size))
    return sorted(map(tuple, shapes))


def draw(shape, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(kind).contiguous(memory_format=LAST)


def results(function, shape, kind, adds, twice, mean=1.0, double=False):
    """Output, gradients and statistics of a function of a norm, an input and perhaps a residual."""
    norm = nn.BatchNorm2d(shape[1])
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, shape[1]))
        norm.bias.copy_(torch.linspace(-1, 1, shape[1]))
    given = [(draw(shape, FLOAT, 0) * 3 + mean).to(kind), draw(shape, kind, 1)][: 1 + adds]
    gradients = [draw(shape, kind, 2), draw(shape, kind, 3)][: 1 + twice]
    if double:
        norm, given, gradients = (
            norm.double(),
            [each.double() for each in given],
            [each.double() for each in gradients],
        )
    leaves = [*(each.requires_grad_() for each in given), *norm.parameters()]
    output = function(norm, *given)
    outputs = output if twice else (output,)
    found = torch.autograd.grad(outputs, leaves, gradients)
    return [each.detach().double() for each in (outputs[0], *found, *norm.buffers())]


def worst_error(shape, kind, adds, relu, twice, mean=1.0):
    """The largest relative error of the operator, of all results."""

    def ours(norm, *given):
        return fused_norm(norm, *given, relu=relu, twice=twice)

    found = results(ours, shape, kind, adds, twice, mean)
    # Next to 0, rounding decides what is clipped: it is taken from there.
    kept = found[0] > 0

    def exact(norm, x, residual=0.0):
        y = norm(x) + residual
        y = y * kept if relu else y
        return (y, y) if twice else y

    wanted = results(exact, shape, kind, adds, twice, mean, double=True)
    return max(
        ((one - other).norm() / other.norm().clamp(min=0.1 * other.numel() ** 0.5)).item()
        for one, other in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_shape_of_real_models(name):
    shapes = norm_shapes(name, 1, MODELS[name])
    assert len(shapes) > 2
    for number, shape in enumerate(shapes):
        kind = (FLOAT, HALF)[number % 2]
        assert worst_error(shape, kind, *KINDS[number % 8]) < MOST_WRONG[kind], shape


@pytest.mark.parametrize(("adds", "relu", "twice"), KINDS)
@pytest.mark.parametrize("kind", [FLOAT, HALF], ids=["fp32", "bf16"])
def test_odd_shapes(kind, adds, relu, twice):
    for shape in [(3, 17, 5, 7), (5, 100, 3, 1), (4, 31, 9, 9)]:
        assert worst_error(shape, kind, adds, relu, twice) < MOST_WRONG[kind], shape
    # Two rows may have nearly the same value, and so a deviation without digits.
    for shape in [(2, 16, 1, 1), (1, 33, 1, 2)]:
        assert worst_error(shape, kind, adds, relu, twice) < 20 * MOST_WRONG[kind], shape


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FLOAT, HALF], ids=["fp32", "bf16"])
def test_the_shapes_of_a_training_batch(kind):
    for number, shape in enumerate(norm_shapes("resnet50", 2, 224)):
        assert worst_error(shape, kind, *KINDS[number % 8]) < MOST_WRONG[kind], shape


def test_a_mean_far_from_zero_leaves_the_digits_of_the_deviation():
    error = worst_error((8, 16, 16, 16), FLOAT, False, False, False, mean=1000.0)
    assert error < 1e-4  # the input itself has 1000 * 2**-24 / 3 = 2e-5


@pytest.mark.parametrize("kind", [FLOAT, HALF], ids=["fp32", "bf16"])
def test_threads(kind):
    """Any number of threads gives the same but for rounding; the same number the same bits."""

    def compute(threads):
        found = []

        def run():  # OpenMP's workers end with the thread that they work for
            torch.set_num_threads(threads)
            for _ in range(2):
                output = lambda norm, *given: fused_norm(norm, *given, relu=True)  # noqa: E731
                found.append(results(output, (4, 48, 5, 5), kind, True, False))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert all(map(torch.equal, *found))
        return found[0]

    alone = compute(1)
    for threads in (2, 3, 7, 64):
        for one, other in zip(compute(threads), alone, strict=True):
            assert (one - other).norm() <= MOST_WRONG[kind] * other.norm()


def test_gradients_are_slopes():
    """In float32, against differences of the operator's own outputs along random directions."""
    norm, shape, step = nn.BatchNorm2d(16), (4, 16, 3, 3), 1e-2
    x, residual, gradient = (draw(shape, FLOAT, seed) for seed in range(3))
    leaves = [each.requires_grad_() for each in (x, residual, norm.weight, norm.bias)]
    slopes = torch.autograd.grad(fused_norm(norm, x, residual), leaves, gradient)
    for number, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(number))
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                leaf.add_(direction, alpha=sign * step)
                ends.append((fused_norm(norm, x, residual).double() * gradient).sum())
                leaf.sub_(direction, alpha=sign * step)
        measured = (ends[0] - ends[1]) / (2 * step)
        assert measured.item() == pytest.approx(
            (slope * direction).sum().item(), rel=1e-3, abs=1e-3
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    for kind in (FLOAT, HALF):
        x = draw((2, 32, 3, 3), kind, 0)
        with torch.no_grad():
            x[0, 3, 1, 1] = value
        y = fused_norm(nn.BatchNorm2d(32), x, relu=True)
        assert y[:, 3].isnan().any()
        assert y[:, :3].isfinite().all()
        assert y[:, 4:].isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"momentum": 0.3},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.1},
    ],
    ids=str,
)
def test_statistics_of_every_kind_of_norm(options):
    ours, theirs = nn.BatchNorm2d(24, **options), nn.BatchNorm2d(24, **options)
    for seed in range(3):
        x = draw((3, 24, 4, 4), FLOAT, seed)
        torch.testing.assert_close(fused_norm(ours, x), theirs(x), rtol=1e-5, atol=1e-5)
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_that_nobody_wants():
    norm = nn.BatchNorm2d(16).requires_grad_(False)
    x = draw((2, 16, 2, 2), FLOAT, 0).requires_grad_()
    fused_norm(norm, x).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None


def test_gradients_of_any_layout():
    """Pooling gives gradients that are expanded, other layers such that are not channels_last."""
    norm, other = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
    x, gradient = draw((2, 16, 4, 4), FLOAT, 0).requires_grad_(), draw((2, 16, 4, 4), FLOAT, 1)
    for given in (torch.ones(2, 16, 1, 1).expand(2, 16, 4, 4), gradient.contiguous()):
        found = torch.autograd.grad(fused_norm(norm, x), x, given)
        wanted = torch.autograd.grad(other(x), x, given)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused_norm(norm, x.contiguous()), fused_norm(norm, x))


def test_what_the_operator_is_not_made_for_takes_pytorchs(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("the operator was called")

    monkeypatch.setattr(module, "run_kernel", refused)
    evaluated = nn.BatchNorm2d(16).eval()
    cases = [
        (evaluated, draw((2, 16, 2, 2), FLOAT, 0), None),
        (nn.BatchNorm2d(8), draw((2, 8, 2, 2), FLOAT, 0), None),
        (nn.BatchNorm2d(16).double(), draw((2, 16, 2, 2), torch.float64, 0), None),
        (nn.BatchNorm2d(16), draw((2, 16, 2, 2), HALF, 0), draw((2, 16, 2, 2), FLOAT, 1)),
    ]
    for norm, x, residual in cases:
        y, other = fused_norm(norm, x, residual, relu=True, twice=True)
        assert torch.equal(y, nn.functional.relu(norm(x) + (0 if residual is None else residual)))
        assert torch.equal(y, other)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused_norm(nn.BatchNorm2d(16), draw((1, 16, 1, 1), FLOAT, 0))


def test_python_runs_on_meanwhile():
    """The operator holds no lock of the interpreter: with two lanes, both compute at once."""
    x, counts, done = draw((32, 64, 56, 56), HALF, 0), [], threading.Event()

    def count():
        while not done.is_set():
            counts.append(len(counts))
            done.wait(1e-4)

    counter = threading.Thread(target=count)
    counter.start()
    norm = nn.BatchNorm2d(64)
    for _ in range(20):
        before = len(counts)
        fused_norm(norm, x)
        if len(counts) > before + 2:  # of a call of milliseconds
            break
    else:
        pytest.fail("no thread came to run during a call")
    done.set()
    counter.join()
