"""How many bytes a matrix takes in each format, and which matrices a format can hold. Without torch.

A row of a matrix (one output) is stored in blocks of equally many weights; whatever the weights of a block share
(scales, minima) is stored with it. Blocks never cross rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from puzzle_nas.errors import FormatError


@dataclass(frozen=True)
class Layout:
    """Where the bytes of a matrix go."""

    name: str
    block: int
    """Weights of a row that are stored together."""
    block_bytes: int
    row_bytes: int = 0
    """Of each row, besides its blocks."""
    heads: bool = True
    """Whether engines read embeddings and LM heads in it."""

    def holds(self, columns: int) -> bool:
        """Whether rows of so many weights divide into blocks."""
        return columns % self.block == 0

    def check(self, columns: int, matrix: str = "a matrix") -> None:
        """Refuse rows that do not divide into blocks.

        Raises:
            FormatError: they do not; the message names the matrix and the formats that hold it.
        """
        if not self.holds(columns):
            others = ", ".join(n for n, layout in LAYOUTS.items() if n != "bf16" and layout.holds(columns))
            raise FormatError(
                f"{self.name} cannot hold {matrix}: its rows of {columns} weights do not divide into blocks "
                f"of {self.block}. Formats that hold it, where the engine serves them: {others}; or leave formats out."
            )

    def bytes_of(self, rows: int, columns: int, matrix: str = "a matrix") -> int:
        """Bytes of a matrix [rows, columns].

        Raises:
            FormatError: rows do not divide into blocks.
        """
        self.check(columns, matrix)
        return rows * (columns // self.block * self.block_bytes + self.row_bytes)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("bf16", 1, 2),
        Layout("f16", 1, 2),
        # llama.cpp, ggml-common.h: scales are float16; K-quants share two of them and scales of 6 or 8 bits.
        Layout("q8_0", 32, 2 + 32),
        Layout("q6_k", 256, 2 + 16 + 192),
        Layout("q5_k", 256, 4 + 12 + 160),
        Layout("q5_0", 32, 2 + 20),
        Layout("q4_k", 256, 4 + 12 + 128),
        Layout("q4_1", 32, 4 + 16),
        Layout("q4_0", 32, 2 + 16),
        Layout("mxfp4", 32, 1 + 16),
        # compressed-tensors: one float32 scale a row, one bfloat16 scale a group; vLLM keeps heads wide.
        Layout("int8", 1, 1, row_bytes=4, heads=False),
        Layout("int4", 128, 2 + 64, heads=False),
    )
}
"""Every format by its name, the widest first."""


def layout_of(name: str) -> Layout:
    """A format's layout.

    Raises:
        FormatError: there is no such format; the message names those that exist.
    """
    if name not in LAYOUTS:
        raise FormatError(f"There is no format {name}; formats are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]
