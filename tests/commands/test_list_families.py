"""`puzzle families` says what the tables say."""

from puzzle_nas.exporters import EXPORTERS
from puzzle_nas.families import FAMILIES
from tests.conftest import puzzle


def test_families_are_listed_with_their_variants_and_engines():
    lines = puzzle("families").stdout.splitlines()
    named = [name for line in lines if not line.startswith(" ") for name in line.split(", ")]
    assert sorted(named) == sorted(FAMILIES)
    (of_llama,) = (number for number, line in enumerate(lines) if line.startswith("llama"))
    attention, ffn, served = lines[of_llama + 1 : of_llama + 4]
    kinds = {slot: set(may.split(", ")) for slot, may in (line.split(maxsplit=1) for line in (attention, ffn))}
    assert kinds["attention"] >= {"grouped", "window", "linear", "no_op"}
    assert kinds["ffn"] >= {"gated", "linear", "no_op"} and "window" not in kinds["ffn"]
    assert all(exporter.engine in served for exporter in EXPORTERS.values() if "llama" in exporter.families)
