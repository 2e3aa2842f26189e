"""The families we know. A new one is one class in one file and one line here."""

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families.base import Family
from puzzle_nas.families.llama import Llama
from puzzle_nas.families.mistral import Mistral
from puzzle_nas.families.qwen2 import Qwen2
from puzzle_nas.families.qwen3 import Qwen3

FAMILIES: dict[str, Family] = {family.model_type: family() for family in (Llama, Mistral, Qwen2, Qwen3)}


def family_of(model_type: str) -> Family:
    """The adapter of a parent's `model_type`.

    Raises:
        CheckpointError: a family we do not know, with the list of those we do.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"The parent is of the family '{model_type}', which is not known here. Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
