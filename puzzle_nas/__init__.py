"""Puzzle: turn a trained LLM (the parent) into a smaller, faster child that meets measured limits.

The package itself imports nothing heavy. `puzzle_nas.modeling` registers the child's model type with
transformers; importing it is all that `AutoModelForCausalLM` needs to load a child.
"""

__version__ = "0.1.0"
