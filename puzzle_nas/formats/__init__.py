"""How weights are stored: bytes (`layout`, without torch), formats (`registry`), and rounding to them (`rounding`)."""
