"""The update kernel against three whole-tensor operations.

Knows flat tensors and how they may share memory. Does not know schedules or runs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ema_service.averaging import average_into, by_torch, cast_into, kernel

BLOCK = by_torch.CPU_AVERAGED_AT_ONCE // 4
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
#: LitEma's weight of the first update, of a late one, and the borders.
WEIGHTS = [float(1.0 - torch.tensor(2.0) / 11), float(1.0 - torch.tensor(0.9999)), 0.0, 1.0]
NARROW = [torch.bfloat16, torch.float16]

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def three_roundings(shadow: Tensor, param: Tensor, weight: float) -> Tensor:
    """LitEma's line on whole tensors: sub, mul, sub, each rounded to the shadow's dtype."""
    return shadow - torch.tensor(weight, dtype=shadow.dtype, device=shadow.device) * (shadow - param.to(shadow.dtype))


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal as bytes: -0.0 is not 0.0 here."""
    return left.dtype == right.dtype and torch.equal(left.cpu().view(torch.uint8), right.cpu().view(torch.uint8))


def behind(param: Tensor, out_dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    """An output, and a copy of ``param`` at the end of the output's memory or ``shift`` bytes behind that."""
    size = param.numel()
    out_bytes, param_bytes = size * out_dtype.itemsize, size * param.dtype.itemsize
    memory = torch.zeros(out_bytes + shift, dtype=torch.uint8, device=param.device)
    late = memory[out_bytes + shift - param_bytes :].view(param.dtype)
    late.copy_(param)
    return memory[:out_bytes].view(out_dtype), late


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_equals_whole_tensor_operations(size: int, weight: float) -> None:
    """Block by block the result equals sub, mul, sub on whole tensors, bit for bit; the shadow is not touched."""
    shadow, param, out = random(size), random(size, seed=1), torch.full((size,), 7.0)
    expected, before = three_roundings(shadow, param, weight), shadow.clone()

    assert average_into(out, shadow, param, weight)
    assert same_bits(out, expected)
    assert same_bits(shadow, before)
    assert same_bits(param, random(size, seed=1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_of_the_parameters(size: int, dtype: torch.dtype) -> None:
    """The result may be written over the parameters themselves."""
    shadow, param = random(size, dtype), random(size, dtype, seed=1)
    expected = three_roundings(shadow, param, WEIGHTS[0])

    assert average_into(param, shadow, param, WEIGHTS[0])
    assert same_bits(param, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_parameters_at_the_end_of_the_output(size: int, dtype: torch.dtype) -> None:
    """bf16 and fp16 parameters at the end of the float32 output are read before the result reaches them."""
    shadow, param = random(size), random(size, dtype, seed=1)
    expected = three_roundings(shadow, param, WEIGHTS[0])
    out, late = behind(param, torch.float32)

    assert average_into(out, shadow, late, WEIGHTS[0])
    assert same_bits(out, expected)


@pytest.mark.parametrize("shift", [4, 64, by_torch.CPU_AVERAGED_AT_ONCE, by_torch.CPU_AVERAGED_AT_ONCE + 4])
@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK + 1, 3 * BLOCK + 7])
def test_parameters_shifted_in_the_same_memory(size: int, shift: int) -> None:
    """Float32 parameters behind the output in one memory, near or far, are read before they are overwritten."""
    shadow, param = random(size), random(size, seed=1)
    expected = three_roundings(shadow, param, WEIGHTS[0])
    out, late = behind(param, torch.float32, shift)

    assert average_into(out, shadow, late, WEIGHTS[0])
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0, 4, 64, 4 << 20])
def test_many_threads_read_before_they_overwrite(
    dtype: torch.dtype, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Split over threads, in the parameters' own memory and shifted in it, the bits stay those of three roundings."""
    monkeypatch.setattr(kernel, "cores", lambda: 5)
    size = 3_000_001
    shadow, param = random(size), random(size, dtype, seed=1)
    out, late = behind(param, torch.float32, shift)

    assert average_into(out, shadow, late, WEIGHTS[1])
    assert same_bits(out, three_roundings(shadow, param, WEIGHTS[1]))


@pytest.mark.parametrize("where", [0, 1_500_000, 2_999_999])
def test_many_threads_find_one_bad_value(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever thread meets the NaN, the answer is False."""
    monkeypatch.setattr(kernel, "cores", lambda: 5)
    param = random(3_000_000)
    param[where] = float("nan")

    assert not average_into(param, torch.zeros_like(param), param, 0.5)


@pytest.mark.parametrize(
    ("shadow_dtype", "param_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
)
def test_dtypes_in_distinct_memory(shadow_dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    """The parameter is cast to the shadow's dtype, never the shadow to the parameter's."""
    size = 2 * BLOCK + 3
    shadow, param = random(size, shadow_dtype), random(size, param_dtype, seed=1)
    out = torch.empty_like(shadow)

    assert average_into(out, shadow, param, WEIGHTS[0])
    assert same_bits(out, three_roundings(shadow, param, WEIGHTS[0]))


def test_narrow_shadow_would_freeze() -> None:
    """Why the shadow is float32: 1000 updates at 0.9999 toward 1.5 move it; in bf16 it would stand still."""
    param = torch.full((1,), 1.5, dtype=torch.bfloat16)
    shadow, out = torch.ones(1), torch.empty(1)
    for _ in range(1000):
        average_into(out, shadow, param, WEIGHTS[1])
        shadow, out = out, shadow

    assert shadow.item() == pytest.approx(1.5 - 0.5 * 0.9999**1000, rel=1e-4)
    narrow = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal(three_roundings(narrow, param, WEIGHTS[1]), narrow)


def test_lerp_is_not_litema() -> None:
    """Why the kernel does not call lerp: it rounds otherwise, and some elements differ from LitEma's."""
    shadow, param, weight = random(100_000), random(100_000, seed=1), WEIGHTS[0]
    out = torch.empty_like(shadow)
    average_into(out, shadow, param, weight)

    assert same_bits(out, three_roundings(shadow, param, weight))
    assert not torch.equal(torch.lerp(shadow, param, weight), out)


# --- the finite check -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, BLOCK - 1, BLOCK, 3 * BLOCK + 6])
@pytest.mark.parametrize("weight", [WEIGHTS[0], 0.0])
def test_one_bad_value_is_found(fault: float, where: int, weight: float) -> None:
    """One NaN or Inf anywhere, even at weight 0, makes the answer False; and only there the result is not finite."""
    size = 3 * BLOCK + 7
    shadow, param, out = random(size), random(size, seed=1), torch.empty(size)
    param[where] = fault

    assert not average_into(out, shadow, param, weight)
    assert (~out.isfinite()).nonzero().tolist() == [[where]]


@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_bad_value_in_another_dtype_is_found(dtype: torch.dtype) -> None:
    """NaN and Inf survive the cast from bf16 and fp16."""
    for fault in (float("nan"), float("inf")):
        param = random(10, dtype)
        param[3] = fault
        shadow_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        shadow = torch.zeros(10, dtype=shadow_dtype)

        assert not average_into(torch.empty_like(shadow), shadow, param, 0.5)
        assert not cast_into(torch.empty_like(shadow), param)


def test_infinities_that_cancel_are_found() -> None:
    """Inf and -Inf in one block are found although neither is the block's sum."""
    param = torch.zeros(100)
    param[3], param[7] = float("inf"), float("-inf")

    assert not average_into(torch.empty(100), torch.zeros(100), param, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_values_with_an_infinite_sum_pass(dtype: torch.dtype) -> None:
    """Values near the dtype's largest are finite although their sum overflows: no false alarm."""
    size = 2 * by_torch.CPU_AVERAGED_AT_ONCE // dtype.itemsize
    values = torch.full((size,), torch.finfo(dtype).max, dtype=dtype)
    assert values.sum().isinf()

    assert average_into(torch.empty_like(values), values, values, 0.5)
    assert cast_into(torch.empty_like(values), values)


def test_without_check_nothing_is_refused() -> None:
    """check=False answers True and computes the same."""
    shadow, param = random(10), random(10, seed=1)
    param[4] = float("nan")
    out = torch.empty(10)

    assert average_into(out, shadow, param, 0.5, check=False)
    assert same_bits(out, three_roundings(shadow, param, 0.5))
    assert cast_into(out, param, check=False)
    assert same_bits(out, param)


# --- the first shadow -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, *NARROW])
@pytest.mark.parametrize("shared", [True, False])
def test_cast_equals_to(size: int, dtype: torch.dtype, shared: bool) -> None:
    """cast_into equals Tensor.to, also where the parameters lie at the end of the output."""
    param = random(size, dtype)
    out, late = behind(param, torch.float32) if shared else (torch.empty(size), param)

    assert cast_into(out, late)
    assert same_bits(out, param.float())


@pytest.mark.parametrize("where", [0, BLOCK, 2 * BLOCK - 1])
def test_cast_finds_one_bad_value(where: int) -> None:
    """cast_into answers False for one NaN anywhere."""
    param = random(2 * BLOCK)
    param[where] = float("nan")

    assert not cast_into(torch.empty_like(param), param)
    assert not cast_into(param, param)


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *NARROW])
@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 1025, 3 * 1024 + 7, 5_000_001])
def test_gpu_equals_the_cpu(size: int, dtype: torch.dtype) -> None:
    """On CUDA the result is LitEma's on the CPU, bit for bit, in blocks, in the parameters' own memory."""
    shadow_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    at_once = 1024 * shadow_dtype.itemsize if size < 5_000_000 else None
    shadow, param = random(size, shadow_dtype), random(size, dtype, seed=1)
    out, late = behind(param.cuda(), shadow_dtype)

    assert average_into(out, shadow.cuda(), late, WEIGHTS[0], at_once=at_once)
    assert same_bits(out, three_roundings(shadow, param, WEIGHTS[0]))


@pytest.mark.gpu
@needs_cuda
def test_gpu_finds_one_bad_value() -> None:
    """The finite check works on CUDA as well: one NaN is found, finite values with an infinite sum pass."""
    values = torch.full((100_000,), torch.finfo(torch.float32).max, device="cuda")
    assert average_into(torch.empty_like(values), values, values, 0.5)
    values[77_777] = float("nan")

    assert not average_into(torch.empty_like(values), torch.zeros_like(values), values, 0.5)
