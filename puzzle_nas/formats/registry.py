"""The formats we know. A new one is one class in one file, one line here and one in `layout.LAYOUTS`."""

from puzzle_nas.formats import blocks, compressed, floats, k_quants
from puzzle_nas.formats.base import Format
from puzzle_nas.formats.layout import layout_of

FORMATS: dict[str, Format] = {
    kind.name: kind()
    for kind in (
        floats.BF16,
        floats.F16,
        blocks.Q8_0,
        k_quants.Q6_K,
        k_quants.Q5_K,
        blocks.Q5_0,
        k_quants.Q4_K,
        blocks.Q4_1,
        blocks.Q4_0,
        blocks.MXFP4,
        compressed.Int8,
        compressed.Int4,
    )
}


def format_of(name: str) -> Format:
    """The format of a name.

    Raises:
        FormatError: there is none; the message names those that exist.
    """
    return FORMATS[layout_of(name).name]
