"""Formats against the `gguf` package, which reads and writes what llama.cpp does."""

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from puzzle_nas.errors import FormatError
from puzzle_nas.formats.layout import LAYOUTS, layout_of
from puzzle_nas.formats.registry import FORMATS, format_of

GGUF = [name for name in FORMATS if name.upper() in gguf.GGMLQuantizationType.__members__]
ROUNDED_BY_GGUF = ["bf16", "f16", "q8_0", "q5_0", "q4_1", "q4_0", "mxfp4"]


@st.composite
def matrices(draw, columns=256):
    """Rows of very different sizes, with blocks of zeros, of one value, and of weights of the same sign."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 4))
    w = torch.randn(rows, columns * draw(st.integers(1, 2)), generator=generator)
    w *= 10 ** torch.empty(rows, 1).uniform_(-6, 2, generator=generator)
    blocks = w.view(-1, 32)
    kinds = torch.randint(0, 8, (len(blocks),), generator=generator)
    blocks[kinds == 0] = 0
    blocks[kinds == 1] = 0.25
    blocks[kinds == 2] = blocks[kinds == 2].abs()
    blocks[kinds == 3] = -blocks[kinds == 3].abs()
    return w


def type_of(name):
    return gguf.GGMLQuantizationType[name.upper()]


def test_every_format_has_a_layout_and_every_layout_a_format():
    assert list(FORMATS) == list(LAYOUTS)
    assert len(GGUF) == 10


@pytest.mark.parametrize("name", GGUF)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrices())
def test_gguf_reads_exactly_what_we_say_it_reads(name, w):
    rounded = FORMATS[name].nearest(w)
    read = quants.dequantize(FORMATS[name].pack(rounded)["weight"].numpy(), type_of(name))
    np.testing.assert_array_equal(read.view(np.uint32), rounded.dequantised().numpy().view(np.uint32))


@pytest.mark.parametrize("name", ROUNDED_BY_GGUF)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrices())
def test_nearest_writes_ggufs_own_bytes(name, w):
    ours = FORMATS[name].pack(FORMATS[name].nearest(w))["weight"]
    np.testing.assert_array_equal(ours.numpy(), quants.quantize(w.numpy(), type_of(name)).view(np.uint8))


@pytest.mark.parametrize("name", GGUF)
def test_bytes_are_ggufs(name):
    block, size = gguf.GGML_QUANT_SIZES[type_of(name)]
    assert LAYOUTS[name].bytes_of(3, 2 * 256) == 3 * 2 * 256 // block * size


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrices())
def test_bytes_are_those_of_the_packed_weights_and_scales(name, w):
    packed = FORMATS[name].pack(FORMATS[name].nearest(w))
    size = sum(t.numel() * t.element_size() for key, t in packed.items() if key != "weight_shape")
    assert size == LAYOUTS[name].bytes_of(*w.shape)


@pytest.mark.parametrize("name", ROUNDED_BY_GGUF)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrices())
def test_rounding_again_changes_nothing(name, w):
    once = FORMATS[name].nearest(w).dequantised()
    torch.testing.assert_close(FORMATS[name].nearest(once).dequantised(), once, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("bf16", "f16")])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(matrices())
def test_values_of_a_grid_stay_on_it(name, w):
    form = FORMATS[name]
    rounded = form.nearest(w)
    values = rounded.dequantised()
    again = type(rounded)(form.codes(values, rounded.grid), rounded.grid)
    torch.testing.assert_close(again.dequantised(), values, rtol=0, atol=0)


def test_more_bits_are_nearer():
    w = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    names = ("f16", "bf16", "q8_0", "q6_k", "q5_0", "q4_0", "mxfp4")
    errors = [(FORMATS[name].nearest(w).dequantised() - w).square().mean() for name in names]
    assert errors == sorted(errors)
    assert errors[-1].sqrt() < 0.13


def test_int4_is_packed_as_compressed_tensors_does():
    codes = torch.arange(128, dtype=torch.float32).remainder(16) - 8
    w = codes.repeat(2, 1)
    form = FORMATS["int4"]
    packed = form.pack(form.nearest(w * 7.5 / 8))
    assert packed["weight_scale"].dtype == torch.bfloat16
    words = packed["weight_packed"]
    assert words.dtype == torch.int32 and words.shape == (2, 16)
    unpacked = [(int(words[0, i // 8]) >> 4 * (i % 8)) & 15 for i in range(128)]
    assert unpacked == [int(code) + 8 for code in form.nearest(w * 7.5 / 8).codes_OI[0]]
    assert packed["weight_shape"].tolist() == [2, 128]


def test_int8_rows_have_scales_of_their_own():
    packed = FORMATS["int8"].pack(FORMATS["int8"].nearest(torch.tensor([[1.0, -0.5], [100.0, 0.0]])))
    assert packed["weight"].tolist() == [[127, -64], [127, 0]]
    torch.testing.assert_close(packed["weight_scale"], torch.tensor([[1 / 127.5], [100 / 127.5]]))


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.block > 1])
def test_rows_that_do_not_divide_are_refused_by_name(name):
    columns = LAYOUTS[name].block + 16
    message = f"{name} cannot hold a matrix: its rows of {columns} weights do not divide into blocks"
    with pytest.raises(FormatError, match=message):
        FORMATS[name].nearest(torch.ones(1, columns))
    with pytest.raises(FormatError, match=f"{name} cannot hold layer 3's ffn_gate.*hold it.*: f16, int8; or leave"):
        LAYOUTS[name].bytes_of(1, columns, "layer 3's ffn_gate")


@pytest.mark.parametrize("name", ["f16", "q8_0", "q6_k", "q4_k", "q4_1", "q4_0"])
def test_weights_beyond_float16_are_refused(name):
    with pytest.raises(FormatError, match=f"{name} cannot hold a matrix.*use bf16"):
        FORMATS[name].nearest(torch.full((1, 256), 1e9))


def test_steps_that_are_powers_of_two_hold_large_weights():
    form, large = FORMATS["mxfp4"], torch.full((1, 256), 2.0**100)
    assert torch.equal(form.nearest(large).dequantised(), large)
    with pytest.raises(FormatError, match="mxfp4 cannot hold a matrix"):
        form.nearest(torch.full((1, 256), torch.inf))


@pytest.mark.parametrize("find", [layout_of, format_of])
def test_unknown_formats_are_named_with_the_known_ones(find):
    with pytest.raises(FormatError, match="There is no format q3; formats are bf16, f16, q8_0"):
        find("q3")
