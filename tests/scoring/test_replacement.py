"""Scores in bfloat16: what rounding alone does is no damage."""

import torch

from puzzle_nas.artifacts import RunFolder
from puzzle_nas.data.batches import load_tokens
from puzzle_nas.families import Anatomy, load_model, parent_checkpoint
from puzzle_nas.machine import Machine
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.scoring.scores import divergence_score


def nudged(parent):
    """Layer 0's FFN with the half of its last matrix moved to the next number of bfloat16."""
    ffn = Anatomy(parent).subblocks(0)["ffn"]
    weight = ffn.last.weight
    chosen = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    moved = torch.nextafter(weight.bfloat16(), torch.tensor(torch.inf).bfloat16())
    weight.data = torch.where(chosen, moved.to(weight.dtype), weight)
    return ffn


def score(run, dtype):
    """(score, what rounding does) of that FFN in a parent whose weights are those of bfloat16 in either precision."""
    parent, changed = (load_model(parent_checkpoint(run), Machine(torch.device("cpu"), torch.bfloat16)) for _ in "ab")
    parent, changed = parent.to(dtype), changed.to(dtype)
    walk = ReplacementWalk(parent, load_tokens(run, "scoring"), 1024)
    result, *rounding = walk.try_variants([{"ffn": nudged(changed)}, *walk.rounded_otherwise()])
    found = divergence_score(result, walk.model_itself(), *rounding)
    return found["kl_nats"]["mean"], found["kl_nats_of_rounding"]


def test_what_rounding_alone_does_is_taken_off(tiny_run):
    run = RunFolder(tiny_run)
    true, none = score(run, torch.float32)
    found, of_rounding = score(run, torch.bfloat16)
    assert none == 0 < true
    as_measured = found + of_rounding
    assert true < 0.3 * as_measured
    assert abs(found - true) < 0.6 * abs(as_measured - true)
