"""Formats without blocks."""

import torch

from puzzle_nas.formats.base import FloatFormat


class BF16(FloatFormat):
    """bfloat16."""

    name = "bf16"
    dtype = torch.bfloat16


class F16(FloatFormat):
    """float16."""

    name = "f16"
    dtype = torch.float16
