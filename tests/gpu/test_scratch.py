"""What is read too early, or by two at once: scratch memory, streams, memory that is shared."""

from __future__ import annotations

import math
import random

import pytest
import reference as ref
import torch
from on_gpu import ONLY_ON_A_GPU, run_in_a_new_process

import gradclip_ext
from gradclip_ext import GradClipper, add_weight_decay_

pytestmark = ONLY_ON_A_GPU

LISTS = 300
SMALLEST_BYTES, LARGEST_BYTES = 600_000, 30_000_000
# Of one kind, or of several in one list.
DTYPES = [
    (torch.float32,),
    (torch.bfloat16,),
    (torch.float16,),
    (torch.float32, torch.bfloat16, torch.float16),
]


@pytest.fixture(scope="module")
def noise():
    """More random numbers than the largest list has."""
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randn(LARGEST_BYTES // 2 + 1, generator=generator, device="cuda")


def random_list(chance, noise):
    """Gradients of 0.6 to 30 MB together, in 1 to 60 tensors."""
    left = int(SMALLEST_BYTES * (LARGEST_BYTES / SMALLEST_BYTES) ** chance.random())
    dtypes = chance.choice(DTYPES)
    tensors = chance.randint(1, 60)
    gradients, place = [], 0
    for index in range(tensors):
        dtype = chance.choice(dtypes)
        share = left if index == tensors - 1 else int(left * chance.random() * 2 / tensors)
        numel = max(1, share // dtype.itemsize)
        gradients.append(noise[place : place + numel].to(dtype, copy=True))
        place += numel
        left -= numel * dtype.itemsize
    return gradients


def leave_nan_in_freed_memory():
    """The allocator hands out NaN then for scratch of up to 16 KB, alone or beside a norm."""
    for count in (0, 1):
        norm = [torch.empty((), device="cuda") for _ in range(count)]
        for doubles in range(64, 2049, 64):
            # Each takes the place that scratch of this size would take.
            torch.full((doubles,), math.nan, dtype=torch.float64, device="cuda")
        del norm


def test_partial_sums_are_complete_before_they_are_read(noise):
    # The kernel that scales may be launched while the one that measures still runs. If it read the
    # partial sums too early, it would find NaN, or those of the list before.
    chance = random.Random(0)
    for number in range(LISTS):
        gradients = random_list(chance, noise)
        serialised, before = ref.copies(gradients), ref.copies(gradients)
        parameters, others = ref.parameters(gradients), ref.parameters(serialised)
        leave_nan_in_freed_memory()
        norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
        torch.cuda.synchronize()
        # Reads the norm on the host before it launches the kernel that scales.
        expected_norm = gradclip_ext.clip_grad_norm_(others, 1.0, error_if_nonfinite=True)
        torch.cuda.synchronize()
        assert torch.equal(norm, expected_norm), f"list {number}: {norm}, {expected_norm}"
        ref.assert_unchanged(gradients, serialised)
        total = math.sqrt(math.fsum((g.double() ** 2).sum().item() for g in before))
        assert ref.norm_error(norm, total) <= ref.NORM_ULPS[norm.dtype] + 0.01, f"list {number}"
        for after, original in zip(gradients, before, strict=True):
            coefficient = ref.reference_coefficient(1.0, total)
            ref.assert_scaled(after, ref.widened(original), coefficient)


@pytest.mark.parametrize("size", [10_000, 1_000_000], ids=["one block", "many blocks"])
def test_two_streams_at_once(size):
    # Lists of the same size, so scratch of the same size, on streams that do not wait for another.
    steps = 100
    streams = [torch.cuda.Stream() for _ in range(2)]
    originals = [ref.random_gradient((size,), seed=seed).cuda() for seed in range(2)]
    gradients = ref.copies(originals)
    parameters = [ref.parameters([gradient]) for gradient in gradients]
    totals = [ref.reference_norm([original], 2.0) for original in originals]
    norms = [[], []]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            # Until both queues are filled.
            torch.cuda._sleep(20_000_000)
    for step in range(1, steps + 1):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.mul(originals[i], float(step), out=gradients[i])
                norms[i].append(gradclip_ext.clip_grad_norm_(parameters[i], 1.0))
    torch.cuda.synchronize()
    for i, total in enumerate(totals):
        found = torch.stack(norms[i]).tolist()
        expected = [step * total for step in range(1, steps + 1)]
        assert found == pytest.approx(expected, rel=1e-6)
        coefficient = ref.reference_coefficient(1.0, steps * total)
        # The product with the step is rounded, too.
        torch.testing.assert_close(
            gradients[i].double(), originals[i].double() * steps * coefficient, rtol=1e-6, atol=0
        )


def test_without_the_caching_allocator():
    # What is freed then is gone, and a kernel that still reads it is an error.
    run_in_a_new_process(
        """
import math
import torch
import gradclip_ext

for sizes in ((100, 7), (1_000_000, 5), (300_000,) * 5):
    gradients = [torch.empty(size, device="cuda") for size in sizes]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient
    for value in range(1, 21):
        for gradient in gradients:
            gradient.fill_(value)
        total = value * math.sqrt(sum(sizes))
        measured = gradclip_ext.grad_norms(parameters)
        assert math.isclose(measured.total.item(), total, rel_tol=1e-6)
        norm = gradclip_ext.clip_grad_norm_(parameters, 1.0)
        assert math.isclose(norm.item(), total, rel_tol=1e-6), (norm.item(), total)
        for gradient in gradients:
            found = gradient[-1].item()
            assert math.isclose(found, value / (total + 1e-6), rel_tol=1e-6), found
torch.cuda.synchronize()
print("done")
""",
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )


SCALING = {
    "clip_grad_norm_": lambda p, max_norm, norm: gradclip_ext.clip_grad_norm_(p, max_norm),
    "clip_grad_norm_, L3": lambda p, max_norm, norm: gradclip_ext.clip_grad_norm_(p, max_norm, 3.0),
    "a given number": lambda p, max_norm, norm: gradclip_ext.clip_grads_with_norm_(
        p, max_norm, norm
    ),
    "a norm on the GPU": lambda p, max_norm, norm: gradclip_ext.clip_grads_with_norm_(
        p, max_norm, torch.tensor(norm, dtype=torch.float64, device="cuda")
    ),
    "GradClipper": lambda p, max_norm, norm: GradClipper(p, max_norm).clip_(),
}


@pytest.mark.parametrize("call", SCALING.values(), ids=SCALING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=ref.name_of)
def test_coefficient_of_a_strided_view_is_not_rounded_to_16_bits(dtype, call):
    storage = ref.random_gradient((500, 200), dtype).cuda()
    view = storage[:, ::2]
    before, gaps = view.clone(), storage[:, 1::2].clone()
    order = 3.0 if call is SCALING["clip_grad_norm_, L3"] else 2.0
    norm = torch.linalg.vector_norm(before.double(), order).item()
    # The coefficient is 0.7012, in the middle between two numbers of bfloat16, and of float16.
    max_norm = norm * (0.701171875 + 2**-10 + 2**-13)
    call([ref.Holder(view)], max_norm, norm)
    coefficient = ref.reference_coefficient(max_norm, norm)
    if order == 2.0:
        rounded = torch.tensor(coefficient, dtype=torch.float64).float().item()
        assert torch.equal(view, (before.float() * rounded).to(dtype))
    else:
        # The norm is torch's own, which is no better than the dtype of the gradients.
        tolerance = 2 * ref.TORCH_TOLERANCE[dtype]
        torch.testing.assert_close(
            view.double(), before.double() * coefficient, rtol=tolerance, atol=1e-7
        )
    assert torch.equal(storage[:, 1::2], gaps)


def test_a_gradient_twice_by_torchs_operations():
    # Its order is not native, and torch's multi-tensor operations would scale both at once.
    original = ref.random_gradient((1_000_000,)).cuda()
    exact = (2.0 * (original.double().abs() ** 3.0).sum().item()) ** (1.0 / 3.0)
    results = []
    for _ in range(20):
        gradient = original.clone()
        parameter = ref.parameter(gradient)
        norm = gradclip_ext.clip_grad_norm_([parameter, parameter], 1.0, 3.0).item()
        # Torch's own norm, in float32.
        assert norm == pytest.approx(exact, rel=1e-3)
        coefficient = ref.reference_coefficient(1.0, norm)
        results.append(gradient)
    torch.testing.assert_close(
        results[0].double(), original.double() * coefficient**2, rtol=2e-6, atol=0
    )
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_weight_decay_of_a_gradient_of_two_parameters():
    original = ref.random_gradient((1_000_000,)).cuda()
    parameters = [torch.nn.Parameter(torch.full_like(original, value)) for value in (1.0, 2.0)]
    expected = original.add(parameters[0].detach(), alpha=0.5)
    expected.add_(parameters[1].detach(), alpha=0.5)
    for _ in range(20):
        gradient = original.clone()
        for parameter in parameters:
            parameter.grad = gradient
        add_weight_decay_(parameters, 0.5)
        assert torch.equal(gradient, expected)
