"""Parents whose layers differ: opaque mixers are kept or left out, the rest is searched, caches are right."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle_nas.families import Anatomy, architecture_of, child_config
from puzzle_nas.modeling import CACHE
from puzzle_nas.recipe import SearchSpaceSettings
from puzzle_nas.search_space import build_search_space
from puzzle_nas.specs import GatedFFN, GroupedAttention, Mixture, NoOp, ParentsOwn
from tests.families.parents import parent_of

OPAQUE = {"qwen3_next": "linear_attention", "qwen3_5_text": "linear_attention", "lfm2": "conv"}
TOKENS = torch.randint(2, 99, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=OPAQUE)
def parent(request):
    return parent_of(request.param)


def child_without(parent, removed, *exchanged):
    """New random weights; `removed` are (layer, slot)."""
    architecture = architecture_of(parent.config)
    for layer, slot in removed:
        architecture = architecture.replaced(layer, NoOp(slot))
    for layer, spec in exchanged:
        architecture = architecture.replaced(layer, spec)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(child_config(parent.config, architecture)).eval()


def test_slots_differ_by_layer_and_opaque_mixers_are_kept_or_left_out(parent):
    opaque = OPAQUE[parent.config.model_type]
    asked = SearchSpaceSettings(width_fractions=[0.5])
    own = architecture_of(parent.config)
    space = build_search_space(own, asked, linear={opaque, "attention"}, no_op={opaque, "attention"}, layers={})
    assert space.options[0][opaque] == (ParentsOwn(opaque), NoOp(opaque))
    assert "attention" not in space.options[0] and opaque not in space.options[1]
    assert GroupedAttention(1) in space.options[1]["attention"]
    if parent.config.model_type == "qwen3_next":
        assert Mixture(4, 2, 24) in space.options[0]["experts"] and GatedFFN(20) in space.options[3]["ffn"]
    else:
        assert GatedFFN(20) in space.options[0]["ffn"] and own.groups == (0, 1, 0, 1)


@pytest.mark.parametrize("gone", ["first opaque", "all opaque", "first attention", "all attention", "all"])
def test_generation_with_cache_equals_without(parent, gone):
    opaque = OPAQUE[parent.config.model_type]
    removed = {
        "first opaque": [(0, opaque)],
        "all opaque": [(0, opaque), (2, opaque)],
        "first attention": [(1, "attention"), (2, opaque)],
        "all attention": [(1, "attention"), (3, "attention")],
        "all": [(0, opaque), (1, "attention"), (2, opaque), (3, "attention")],
    }[gone]
    exchanged = [] if (3, "attention") in removed else [(3, GroupedAttention(1))]
    child = child_without(parent, removed, *exchanged)
    arguments = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    without = child.generate(TOKENS, use_cache=False, **arguments)
    assert torch.equal(child.generate(TOKENS, **arguments), without)
    short, long = TOKENS[:1, :5], TOKENS[1:2]
    batch = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), long])
    mask = (torch.arange(11) >= torch.tensor([[6], [0]])).long()
    together = child.generate(batch, attention_mask=mask, **arguments)
    assert torch.equal(together[:1, 11:], child.generate(short, **arguments)[:, 5:])
    assert torch.equal(together[1:, 11:], child.generate(long, **arguments)[:, 11:])


def test_state_bytes_are_those_in_the_cache(parent):
    cache = parent(TOKENS[:1], use_cache=True)[CACHE]
    state = cache.layers[0]
    kept = [*state.conv_states.values(), *state.recurrent_states.values()]
    expected = sum(tensor.nbytes for tensor in kept if tensor is not None)
    slot = OPAQUE[parent.config.model_type]
    assert Anatomy(parent).family.state_bytes(parent.config, slot, 4) == expected
