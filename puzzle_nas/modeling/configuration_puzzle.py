"""Configuration of a Puzzle child: its parent's own, and what stands in every layer.

The file travels with a checkpoint; it needs transformers only.
"""

import functools

from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

OWN_FIELDS = ("parent_type", "puzzle_layers", "puzzle_places", "puzzle_head")


class PuzzleConfig(PreTrainedConfig):
    """What all children's configurations have in common; `config_class_of` makes one for each kind of parent.

    All fields are the parent's. Four are added:

    - `parent_type`: the parent's `model_type`.
    - `puzzle_layers`: for each layer, by slot ("attention", "ffn", ...), what stands there. `kind` is "no_op" (none),
      "linear" (one matrix), or a variant that is the parent's own class, built from a configuration with `changes`;
      "window" attends to the last `window` tokens. `format` names the format in which engines read its matrices; the
      checkpoint's own hold the same values, rounded to its precision. Where engines round what a matrix receives to
      eight bits for each token ("int8"), the model does too.
    - `puzzle_places`: by slot, the names of a layer's parts: `norm`, `mixer`, `output_norm` (null where there is none),
      and `pair`, whether the mixer returns a tuple.
    - `puzzle_head`: the `format` of embeddings and LM head.
    """

    model_type = "puzzle"
    parent_type: str | None = None
    puzzle_layers: list | None = None
    puzzle_places: dict | None = None
    puzzle_head: dict | None = None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """See `PreTrainedConfig.from_dict`; the result is of the class that belongs to the parent."""
        if cls is not PuzzleConfig:
            return super().from_dict(config_dict, **kwargs)
        if "parent_type" not in config_dict:
            raise ValueError(
                "This child was made by puzzle-nas 0.1 before its checkpoints named their parent's family. "
                "Load it with trust_remote_code=True where puzzle-nas is not installed, or make it again."
            )
        return config_class_of(config_dict["parent_type"]).from_dict(config_dict, **kwargs)

    def parent_config(self):
        """The parent's own configuration, an instance of its own class."""
        fields = {name: value for name, value in self.to_dict().items() if name not in OWN_FIELDS}
        for name in ("model_type", "architectures", "auto_map", "transformers_version"):
            fields.pop(name, None)
        config = CONFIG_MAPPING[self.parent_type](**fields)
        config._attn_implementation = self._attn_implementation
        return config


@functools.cache
def config_class_of(parent_type):
    """The configuration class of children of such a parent, registered with transformers' auto classes."""
    from .modeling_puzzle import PuzzleForCausalLM

    base = CONFIG_MAPPING[parent_type]
    fields = {"__module__": __name__, "__doc__": PuzzleConfig.__doc__, "model_type": PuzzleConfig.model_type}
    made = type("PuzzleConfig", (PuzzleConfig, base), fields)
    AutoModelForCausalLM.register(made, PuzzleForCausalLM, exist_ok=True)
    return made


__all__ = ["PuzzleConfig"]
