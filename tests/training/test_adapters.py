"""Low-rank adapters against the function they stand for."""

import copy

import torch
from torch import nn

from puzzle_nas.training.adapters import add_adapters, merged_weights


def test_adapters_start_without_effect_train_alone_and_merge_into_the_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.SiLU(), nn.Linear(10, 4))
    x, original = torch.randn(5, 6), copy.deepcopy(model)
    model.requires_grad_(False)
    add_adapters(model, 2, seed=0)
    assert torch.equal(model(x), original(x))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trained} == {"adapter_in", "adapter_out"}
    for parameter in trained.values():
        nn.init.normal_(parameter)
    merged = copy.deepcopy(original)
    weights = dict(merged_weights(model))
    assert weights.keys() == {"0.weight", "2.weight"}
    merged.load_state_dict(weights, strict=False)
    torch.testing.assert_close(merged(x), model(x))
    assert torch.linalg.matrix_rank(merged[0].weight - original[0].weight) == 2
