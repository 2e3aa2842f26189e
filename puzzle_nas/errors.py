"""Mistakes that a user can mend. The command line prints them as one sentence and exits with code 2."""

import shlex


def puzzle_command(*words: object) -> str:
    """A command to paste: `puzzle` and its arguments, quoted where a shell needs it."""
    return shlex.join(["puzzle", *map(str, words)])


class PuzzleError(Exception):
    """What is wrong, where, and the way out, in one sentence."""


class RecipeError(PuzzleError):
    """A recipe or an override that does not say what can be done."""


class CheckpointError(PuzzleError):
    """A model that is missing, truncated, or of a family we do not know."""


class DataError(PuzzleError):
    """Text that is missing, too short, or does not fit the tokenizer."""


class ChatTemplateError(PuzzleError):
    """A chat template that fails on a conversation; the message is the reason alone."""


class ArtifactError(PuzzleError):
    """A file of the run folder that is missing, corrupted, or made from something else."""


class InfeasibleError(PuzzleError):
    """No architecture meets the limits; the message names each limit and its tightest reachable value."""


class SearchTimeoutError(PuzzleError):
    """The solver ran out of time before it found any architecture that meets the limits."""


class RankError(PuzzleError):
    """One of several processes of a run was killed."""


class ExportError(PuzzleError):
    """A child that a format cannot hold, or an export that does not compute what the child computes."""


class EngineError(PuzzleError):
    """A serving engine that is not installed, does not start, or stops."""


class FormatError(PuzzleError):
    """A weight format that does not exist, or that cannot hold a matrix."""
