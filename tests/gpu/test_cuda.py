"""What only a GPU can show: bits, launches, memory, several devices, very large tensors.

The suites in suites.ON_EVERY_DEVICE also run on CUDA. None of this counts as passed until it has
run on a GPU: the emulation of the kernels on the CPU (test_cuda_kernels.py) is no substitute.
"""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from on_gpu import ONLY_ON_A_GPU, gradients_of, kernels_of

import gradclip_ext
from gradclip_ext import _C

pytestmark = ONLY_ON_A_GPU


def test_the_same_bits_every_time():
    originals = gradients_of([(1000, 1000), (3,), (512, 77)])
    results = []
    for _ in range(5):
        gradients = ref.copies(originals)
        norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
        results.append([norm, *gradients])
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shapes", [[(100,), (7, 3)], [(1000, 1000), (5,)]], ids=["one", "many"])
def test_quiet_call_leaves_every_bit(shapes):
    gradients = gradients_of(shapes)
    before = [gradient.clone() for gradient in gradients]
    gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1e9)
    for gradient, original in zip(gradients, before, strict=True):
        assert torch.equal(gradient.view(torch.int32), original.view(torch.int32))


# One launch for at most 8 tensors and 256 KB: in a single block they follow one another.
@pytest.mark.parametrize(
    "shapes, launches",
    [([(100,), (7, 3)], 1), ([(1000, 1000), (5,)], 2), ([(10,)] * 100, 2)],
    ids=["small", "large", "many"],
)
@pytest.mark.parametrize("max_norm", [1.0, 1e9], ids=["clip", "quiet"])
def test_launches(shapes, launches, max_norm):
    parameters = ref.parameters(gradients_of(shapes))
    kernels = kernels_of(lambda: gradclip_ext.clip_grad_norm_(parameters, max_norm))
    assert len(kernels) == launches, kernels


def test_on_a_stream_of_its_own():
    # The gradients arrive late on the side stream; a call on another stream would not see them.
    stream = torch.cuda.Stream()
    gradient = torch.zeros(1_000_000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        gradient.fill_(2.0)
        norm = gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 1.0)
    stream.synchronize()
    assert norm.item() == 2000.0
    assert gradient[0].item() == pytest.approx(1e-3, rel=1e-6)


def test_memory_does_not_grow_with_steps_or_parameters():
    parameters = ref.parameters(gradients_of([(2000,)] * 1000))
    gradclip_ext.clip_grad_norm_(parameters, 1.0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        gradclip_ext.clip_grad_norm_(parameters, 1.0)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    # The result, and one double for each worker.
    assert torch.cuda.max_memory_allocated() - before < 64 * 1024


def test_non_finite_norm_raises_names_the_gradient_and_changes_nothing():
    gradients = gradients_of([(1000, 700), (50,), (300, 300)])
    gradients[1][7] = math.nan
    before = [gradient.clone() for gradient in gradients]
    with pytest.raises(RuntimeError) as error:
        gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0, error_if_nonfinite=True)
    assert "parameters[1].grad of shape (50,)" in str(error.value)
    for gradient, original in zip(gradients, before, strict=True):
        assert torch.equal(gradient.view(torch.int32), original.view(torch.int32))


def test_finite_norm_with_error_if_nonfinite():
    gradients = gradients_of([(1000, 700), (50,)])
    expected = ref.reference_norm(gradients, 2.0)
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0, error_if_nonfinite=True)
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    after = ref.reference_norm(gradients, 2.0)
    assert after == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, -1.0], ids=["NaN", "negative"])
def test_bad_max_norm_on_the_gpu_makes_nan(value):
    gradient = torch.ones(1000, device="cuda")
    max_norm = torch.tensor(value, device="cuda")
    gradclip_ext.clip_grad_norm_(ref.parameter(gradient), max_norm)
    assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [*ref.NATIVE_DTYPES, torch.int64], ids=ref.name_of)
def test_norm_and_max_norm_on_the_gpu_in_any_dtype(dtype):
    gradient = torch.full((1000,), 8.0, device="cuda")
    norm = torch.tensor(16, device="cuda", dtype=dtype)
    max_norm = torch.tensor(4, device="cuda", dtype=dtype)
    gradclip_ext.clip_grads_with_norm_(ref.parameter(gradient), max_norm, norm)
    assert gradient.tolist() == pytest.approx([8.0 * 4.0 / (16.0 + 1e-6)] * 1000, rel=1e-6)


def test_cpu_and_cuda_gradients_in_one_call():
    gradients = [torch.full((300,), 2.0), torch.full((1000, 1000), 1.0, device="cuda")]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    expected = math.sqrt(4 * 300 + 1e6)
    assert norm.device.type == "cpu"
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    assert gradients[0][3].item() == pytest.approx(2.0 / expected, rel=1e-5)
    assert gradients[1][3, 3].item() == pytest.approx(1.0 / expected, rel=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices():
    gradients = [torch.full((1000, 500), 1.0 + i, device=f"cuda:{i}") for i in range(2)]
    norm = gradclip_ext.clip_grad_norm_(ref.parameters(gradients), 1.0)
    expected = math.sqrt(500_000 * 5)
    assert norm.device == gradients[0].device
    assert norm.item() == pytest.approx(expected, rel=1e-6)
    for i in range(2):
        assert gradients[i][3, 3].item() == pytest.approx((1.0 + i) / expected, rel=1e-5)


def test_more_than_2_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    numel = 2**31 + 4099
    if free < 3 * numel * 2:
        pytest.skip("needs 13 GB of free GPU memory")
    gradient = torch.ones(numel, dtype=torch.bfloat16, device="cuda")
    gradient[-1] = 2.0**20
    norm = gradclip_ext.clip_grad_norm_(ref.parameter(gradient), 2.0**19, dtype=torch.float64)
    expected = math.sqrt(numel - 1 + 2.0**40)
    assert norm.item() == pytest.approx(expected, rel=1e-15)
    coefficient = ref.reference_coefficient(2.0**19, expected)
    assert gradient[-1].item() == pytest.approx(2.0**20 * coefficient, rel=2**-8)
    assert gradient[0].item() == gradient[2**31].item() == pytest.approx(coefficient, rel=2**-8)


def test_all_of_it_is_native():
    assert _C.is_native(torch.ones(3, device="cuda"))
    kernels = kernels_of(lambda: gradclip_ext.get_total_norm([torch.ones(100, device="cuda")]))
    assert any("power_sums_kernel" in name for name in kernels), kernels
