"""The families we know. A new one is one class in one file and one line here."""

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families.base import Family
from puzzle_nas.families.gemma2 import Gemma2
from puzzle_nas.families.gemma3_text import Gemma3Text
from puzzle_nas.families.glm import Glm
from puzzle_nas.families.glm4 import Glm4
from puzzle_nas.families.gpt_oss import GptOss
from puzzle_nas.families.granite import Granite
from puzzle_nas.families.lfm2 import Lfm2
from puzzle_nas.families.llama import Llama
from puzzle_nas.families.ministral import Ministral
from puzzle_nas.families.ministral3 import Ministral3
from puzzle_nas.families.mistral import Mistral
from puzzle_nas.families.mixtral import Mixtral
from puzzle_nas.families.olmo2 import Olmo2
from puzzle_nas.families.olmo3 import Olmo3
from puzzle_nas.families.olmoe import Olmoe
from puzzle_nas.families.phi3 import Phi3
from puzzle_nas.families.qwen2 import Qwen2
from puzzle_nas.families.qwen3 import Qwen3
from puzzle_nas.families.qwen3_5 import Qwen35
from puzzle_nas.families.qwen3_moe import Qwen3Moe
from puzzle_nas.families.qwen3_next import Qwen3Next
from puzzle_nas.families.smollm3 import SmolLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family()
    for family in (
        Llama,
        Mistral,
        Qwen2,
        Qwen3,
        Gemma2,
        Gemma3Text,
        SmolLM3,
        Olmo2,
        Olmo3,
        Phi3,
        Granite,
        Ministral,
        Ministral3,
        Glm,
        Glm4,
        Qwen3Moe,
        Mixtral,
        Olmoe,
        GptOss,
        Qwen3Next,
        Qwen35,
        Lfm2,
    )
}


def family_of(model_type: str) -> Family:
    """The adapter of a parent's `model_type`.

    Raises:
        CheckpointError: a family we do not know, with the list of those we do, and what another one needs.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"The parent is of the family '{model_type}', which has no adapter; there are some for "
            f"{', '.join(FAMILIES)}. An adapter is one class that says by which names a layer of '{model_type}' keeps "
            "its norms, attention and FFN: docs/new-family.md writes one."
        )
    return FAMILIES[model_type]
