"""The order of training blocks."""

import torch

from puzzle_nas.data.batches import block_order


def test_every_epoch_has_every_block_once_in_another_order():
    order = block_order(7, 20, seed=0)
    epochs = order.split(7)
    assert [len(epoch) for epoch in epochs] == [7, 7, 6]
    assert all(torch.equal(epoch.sort().values, torch.arange(7)) for epoch in epochs[:2])
    assert not torch.equal(epochs[0], epochs[1])


def test_more_training_begins_with_the_same_blocks():
    assert torch.equal(block_order(7, 20, seed=0), block_order(7, 50, seed=0)[:20])
    assert not torch.equal(block_order(7, 20, seed=0), block_order(7, 20, seed=1))
