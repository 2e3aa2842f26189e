"""OLMo 3: as OLMo 2, with windows in three layers of four."""

from puzzle_nas.families.olmo2 import Olmo2


class Olmo3(Olmo2):
    """Windows have rotary positions of their own."""

    model_type = "olmo3"
