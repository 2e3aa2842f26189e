"""A child's README."""

from __future__ import annotations

from collections import Counter

from puzzle_nas.architecture import Architecture


def model_card(parent: str, architecture: Architecture, version: str, how: str) -> str:
    """Markdown that says what a child is and how it was made."""
    counts = {slot: Counter(s.id for _, place, s in architecture if place == slot) for slot in architecture.slots}
    slots = architecture.slots
    lines = [("layer", *slots), ("---",) * (1 + len(slots))]
    lines += [
        (str(layer), *(block[slot].id if slot in block else "-" for slot in slots))
        for layer, block in enumerate(architecture.layers)
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    made_of = "; ".join(
        f"{slot}: " + ", ".join(f"{count} x {name}" for name, count in sorted(counter.items()))
        for slot, counter in counts.items()
    )
    return f"""---
library_name: transformers
tags: [puzzle-nas]
---
# A Puzzle child

Parent: `{parent}`. Made with puzzle-nas {version} (Puzzle, arXiv 2411.19146): {how}.

{made_of}.

```python
import puzzle_nas.modeling  # or pass trust_remote_code=True: the modelling code lies beside the weights
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

{table}
"""
