"""An adapter that leaves something out is refused when a parent is opened."""

import itertools
from dataclasses import fields, replace

import pytest
import torch

from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import Anatomy, architecture_of
from puzzle_nas.families.anatomy import check_adapter
from puzzle_nas.families.base import Family, Place
from tests.families.parents import PARENTS, parent_of

NUMBERS = ("embedding_scale", "logit_scale", "logit_cap")
OPTIONAL = [field.name for field in fields(Place) if field.name in ("norm", "output_norm", "scale")]


def omissions():
    """(parent, what its adapter says, what is left out of it)."""
    for name in PARENTS:
        family = Anatomy(parent_of(name)).family
        for number in NUMBERS:
            if getattr(family, number) and family.number(parent_of(name).config, getattr(family, number)):
                yield pytest.param(name, {number: None}, id=f"{name}: {number}")
        slots = architecture_of(parent_of(name).config).slots
        for field in ("places", "opaque"):
            places = getattr(family, field, {})
            for slot, part in itertools.product(places, OPTIONAL):
                if slot in slots and getattr(places[slot], part) is not None:
                    without = {**places, slot: replace(places[slot], **{part: None})}
                    yield pytest.param(name, {field: without}, id=f"{name}: {part} of {slot}")


@pytest.mark.parametrize(("name", "changes"), omissions())
def test_whatever_an_adapter_leaves_out_is_noticed(name, changes, monkeypatch):
    parent = parent_of(name)
    vars(parent).pop("recorded_inputs", None)
    for field, value in changes.items():
        monkeypatch.setattr(type(Anatomy(parent).family), field, value)
    with pytest.raises(CheckpointError, match="its adapter does not know"):
        check_adapter(parent, range(len(Anatomy(parent).layers)))
    vars(parent).pop("recorded_inputs", None)


@pytest.mark.parametrize("name", PARENTS)
@torch.no_grad()
def test_what_is_to_be_added_is_translated_to_before_norm_and_multiplier(name):
    parts = Anatomy(parent_of(name))
    x_BTD = torch.randn(2, 8, parts.model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = parts.inputs(8)[0]
    for subblock in parts.subblocks(0).values():
        mixed = subblock.mixed(subblock.read(x_BTD), inputs)
        added = subblock.finished(mixed)
        wanted = 1e-3 * torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(1)) * added.abs()
        more = subblock.before_output(wanted, mixed, added)
        reached = subblock.finished(mixed + more) - added
        # The norm's own change is left out.
        assert (reached - wanted).norm() < 0.3 * wanted.norm()


def test_numbers_are_all_that_an_adapter_names():
    assert set(NUMBERS) == {name for name in vars(Family) if name.startswith(("embedding_", "logit_"))}


def test_parents_have_nothing_at_its_neutral_value():
    for name in PARENTS:
        norms = [weight for key, weight in parent_of(name).named_parameters() if key.endswith("norm.weight")]
        assert norms and not any(torch.equal(norm, torch.full_like(norm, norm[0].item())) for norm in norms)
