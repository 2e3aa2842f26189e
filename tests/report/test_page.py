"""The report page, made from a fabricated run folder."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, write_bytes, write_json
from puzzle_nas.choosing.architecture_search import ArchitectureSearch
from puzzle_nas.choosing.costs import group_name
from puzzle_nas.errors import ArtifactError
from puzzle_nas.recipe import Recipe
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.report.figures.common import log_axis
from puzzle_nas.report.figures.layers import Bar, child_figure
from puzzle_nas.report.figures.tradeoffs import Point, decision_figure
from puzzle_nas.report.layout import packed_plotly
from puzzle_nas.report.page import SECTIONS, render_page
from puzzle_nas.report.summary import build_summary
from puzzle_nas.report.tables import model_rows, speed_note
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, NoOp

LAYERS = 12
PARENT = Architecture(({"attention": GroupedAttention(3), "ffn": GatedFFN(1536)},) * LAYERS)
LIKE = group_name(0, (0,))
VARIANTS = {
    "attention": (GroupedAttention(1), Linear("attention"), NoOp("attention")),
    "ffn": (GatedFFN(1152), GatedFFN(768), GatedFFN(384), GatedFFN(160), Linear("ffn"), NoOp("ffn")),
}
SIZE = {spec: 1 - (i + 1) / len(specs) for specs in VARIANTS.values() for i, spec in enumerate(specs)}
FALLEN = (5, "ffn.linear")
MEASURED_CHILDREN = (("search", 0.61), ("search", 0.58), ("refinement", 0.52))
RECIPE = """
parent: {parent}
data: {{sources: [{{source: python-stdlib}}]}}
scenarios:
  - {{name: chat, batch_size: 1, prefill_tokens: 128, decode_tokens: 64, weight: 0.75}}
  - {{name: summarise, batch_size: 1, prefill_tokens: 512, decode_tokens: 32, weight: 0.25}}
"""


def variants():
    """Every layer and variant."""
    return [(layer, spec) for layer in range(LAYERS) for specs in VARIANTS.values() for spec in specs]


def damage(layer: int, spec) -> float:
    """A plausible score: U-shaped over layers, worse for smaller variants."""
    return 0.02 * (1.3 - SIZE[spec]) ** 3 * (1 + 9 * (2 * layer / (LAYERS - 1) - 1) ** 4)


def write_library(run: RunFolder) -> None:
    """Initial and trained facts; one variant fell back because its loss became NaN."""
    for layer, spec in variants():
        facts: dict[str, Any] = {
            "spec": spec.to_dict(),
            "parameters": round(1e6 * SIZE[spec]),
            "checksum": "0",
        }
        facts |= {"initialisation": "least_squares", "chosen": "paper" if layer == 2 else "least_squares"}
        write_json(run.initial_variant(layer, spec.id).with_suffix(".json"), facts)
        if spec.kind != "no_op":
            start = 3 * damage(layer, spec)
            fell_back = (layer, spec.id) == FALLEN
            facts |= {"tokens": 65536, "held_out_loss_start": start, "fell_back": fell_back}
            facts |= {"held_out_loss_end": None if fell_back else start / 2, "loss_curve": [start, start / 2]}
        write_json(run.variant(layer, spec.id).with_suffix(".json"), facts)


def cost_table() -> dict[str, Any]:
    """Costs proportional to size."""
    parent = PARENT.layers[0].values()
    share = {spec: SIZE.get(spec, 1.0) for spec in (*parent, *SIZE)}
    own = {"attention": 0.4, "ffn": 0.6}

    def times(prefill: float, step: float) -> dict[str, Any]:
        parts = {
            spec.id: {"prefill_ms": prefill * v * own[spec.slot], "decode_step_ms": step * v * own[spec.slot]}
            for spec, v in share.items()
        }
        whole = {"prefill_ms": 1.02 * prefill * LAYERS, "decode_step_ms": 1.05 * step * LAYERS}
        fixed = {"prefill_ms": 9.0, "decode_step_ms": 2.0}
        variants = {LIKE: parts, "head": {"head": {"prefill_ms": 0.0, "decode_step_ms": 0.0}}}
        return {"fixed": fixed, "variants": variants, "parent_measured": whole, "working_bytes": 5_000_000}

    def weights(v: float) -> dict[str, int]:
        count = round(2e6 * v)
        return {"parameters": count, "parameter_bytes": 2 * count, "state_bytes": 0}

    return {
        "machine": {"engine": "torch", "device": "cpu", "processor": "Example CPU", "threads": 2},
        "other_load_percent": 3.0,
        "groups": [0] * LAYERS,
        "scenarios": {"chat": times(10.0, 1.5), "summarise": times(38.0, 1.7)},
        "bytes": {
            "head_dim": 64,
            "cache_itemsize": 2,
            "fixed": weights(0.0),
            "variants": {LIKE: {spec.id: weights(v) for spec, v in share.items()}, "head": {"head": weights(14.0)}},
        },
    }


def child() -> Architecture:
    """Some of everything."""
    architecture = PARENT
    for layer, spec in (
        (3, GroupedAttention(1)), (4, NoOp("attention")), (5, NoOp("attention")), (6, Linear("attention")),
        (4, GatedFFN(384)), (5, GatedFFN(768)), (6, Linear("ffn")), (7, NoOp("ffn")), (8, GatedFFN(768)),
    ):  # fmt: skip
        architecture = architecture.replaced(layer, spec)
    return architecture


def quality(kl: float) -> dict[str, float]:
    """One model's figures."""
    return {
        "kl_nats": kl,
        "kl_nats_standard_error": kl / 20,
        "lm_loss_nats": 2.1 + kl,
        "perplexity": math.exp(2.1 + kl),
        "top1_agreement": math.exp(-kl),
    }


def make_run(folder: Path, parent: str = "example/parent-135M") -> tuple[Recipe, RunFolder, dict[str, Any]]:
    """A complete run folder, and what `report` reads from it."""
    run, recipe = RunFolder(folder), parse_recipe(RECIPE.format(parent=json.dumps(parent)))
    versions = "# puzzle-nas 0.1.0, torch 2.11, transformers 5.17\n"
    write_bytes(run.recipe, (versions + recipe.to_yaml()).encode())
    facts = {"source": parent, "checkpoint": "parent", "family": "llama", "architecture": PARENT.to_list()}
    write_json(run.parent, facts | {"parameters": 134_515_008})
    write_library(run)
    for layer, spec in variants():
        score = {"mean": damage(layer, spec), "standard_error": 0.001}
        write_json(run.score(layer, spec.id), {"kl_nats": score, "lm_loss_increase_nats": score})
    write_json(run.costs("torch"), cost_table())
    common = {"speedup_predicted": 1.3217, "memory_bytes": 225_000_000, "parameters": 110_000_000}
    baselines = {
        "greedy": {"architecture": [], **common},
        "homogeneous": {"infeasible": "No single <variant> meets the limits."},
        "max_params": {"architecture": [], **common, "speedup_predicted": 1.3342},
    }
    search = {"limits": {"speedup": 1.3}, "architecture": child().to_list(), "score_sum": 0.4321, **common}
    tried = [
        {"found_by": how, "score_sum": 0.4321, "speedup_predicted": 1.31, "selection_kl_nats": kl}
        for how, kl in MEASURED_CHILDREN
    ]
    search |= {"baselines": baselines, "children_measured": tried}
    search["speed_checks"] = [{"speedup_predicted": 1.3217, "speedup_measured": 1.31}]
    write_json(run.architecture(), search)
    evaluation = {
        "parent": quality(0.0),
        "child": {"assembled": quality(0.5123), "refitted": quality(0.3977), "distilled": quality(0.2101)},
        "baselines": {"greedy": quality(0.5345), "max_params": quality(4.8765)},
    }
    write_json(run / "evaluation.json", evaluation)
    request = {"prefill_ms": 130.0, "decode_step_ms": 20.0, "request_ms": 1390.0}
    faster = {"prefill_ms": 98.0, "decode_step_ms": 15.2, "request_ms": 1055.6}
    times = {"parent": request, "child": faster}
    measured = {
        "quantised_parents": {},
        "scenarios": {"chat": times, "summarise": times},
        "mix_ms": {"parent": 1390.0, "child": 1055.6},
        "speedup": 1.317,
        "speedup_standard_error": 0.015,
        "speedup_by_repeat": [1.298, 1.317, 1.331],
        "other_load_percent": 2.0,
    }
    write_json(run / "measured.json", measured)
    refit = {"selection_kl_nats_before": 0.5201, "selection_kl_nats_after": 0.4011}
    write_json(run / "refit.json", {"tried": True, "kept": True, **refit})
    curve: list[dict[str, float]] = [{"step": 0, "selection_kl_nats": 0.4011}]
    for step, kl in ((25, 0.35), (50, 0.3), (75, 0.27), (100, 0.25), (125, 0.26)):
        curve.append({"step": step, "selection_kl_nats": kl, "loss": 2 * kl})
    gkd = {"tokens": 256_000, "best_step": 100, "selection_kl_nats_start": 0.4011}
    write_json(run / "gkd.json", gkd | {"selection_kl_nats_best": 0.25, "curve": curve})
    for number, stage in enumerate(("build_library", "distill_blocks", "score_blocks", "distill_child")):
        run.add_seconds(stage, 20.0 * (number + 1), 1_200_000_000 * (number + 1))
    return recipe, run, build_summary(recipe, run)


def own_part(page: str) -> str:
    """The page without plotly.js."""
    assert page.count(packed_plotly()) == 1
    return page.replace(packed_plotly(), "")


def drawn(page: str) -> dict[str, tuple[list, dict]]:
    """Data and layout of each figure in the page."""
    found = re.findall(
        r'<div id="([\w-]+)" class="plot"[^>]*></div><script type="application/json">(.*)</script>', page
    )
    figures = {name: json.loads(figure) for name, figure in found}
    return {name: (figure["data"], figure["layout"]) for name, figure in figures.items()}


@pytest.fixture
def made(tmp_path):
    """A run folder and its page."""
    recipe, run, summary = make_run(tmp_path)
    return recipe, run, summary, own_part(render_page(recipe, run, summary))


def test_page_loads_nothing(made):
    page = made[-1]
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|<link|<iframe|<img|https?:""", page)
    assert "default-src 'none'" in page


def test_page_holds_the_summary_and_every_figure(made):
    _, _, summary, page = made
    assert "1.32x as fast as its parent (measured), KL 0.21 nats" in page
    assert "81 % of the time" in page
    for row in model_rows(summary):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    figures = drawn(page)
    pairs = {"scores-attention", "scores-ffn", "bld-attention", "bld-ffn", "gkd-kl", "gkd-loss"}
    assert set(figures) == pairs | {"decision", "child", "losses", "prediction", "seconds"}
    curve = next(trace for trace in figures["scores-ffn"][0] if trace["name"] == "ffn.w768")
    assert curve["y"] == [damage(layer, GatedFFN(768)) for layer in range(LAYERS)]
    labels = {annotation["text"] for annotation in figures["decision"][1]["annotations"]}
    assert labels == {"child, assembled", "child, refitted", "child, distilled", "greedy", "max-params"}
    assert "Example CPU" in page and "puzzle-nas 0.1.0, torch 2.11" in page and "learning_rate" in page


def test_the_decision_shows_the_child_what_was_measured_and_the_best_at_other_limits(made):
    recipe, run, _, page = made
    traces = {trace["name"]: trace for trace in drawn(page)["decision"][0]}
    assert traces["measured in the search"]["y"] == [kl for _, kl in MEASURED_CHILDREN]
    assert traces["child"]["y"] == [0.5123, 0.3977, 0.2101]
    frontier = traces["best at each limit, predicted"]
    assert len(frontier["x"]) > 5 and frontier["x"] == sorted(frontier["x"]) and frontier["y"] == sorted(frontier["y"])
    found = ArchitectureSearch.load(recipe, run)
    (best,) = found.solve({"speedup": frontier["x"][-1] * (1 - 1e-9)}, 0.0, 60)
    assert frontier["y"][-1] == pytest.approx(best.score, rel=1e-3)
    assert all("M parameters" in note for _, note in frontier["customdata"])
    rows = [f"{x:.3f}x</td><td>{y:.4f}" for x, y in zip(frontier["x"], frontier["y"], strict=True)]
    assert all(row in page for row in rows)


def test_losses_are_the_scores_of_what_the_child_holds(made):
    page = made[-1]
    bars = {trace["name"]: dict(zip(trace["x"], trace["y"], strict=True)) for trace in drawn(page)["losses"][0]}
    for layer, slot, spec in child():
        score = 0.0 if spec == PARENT.layers[layer][slot] else damage(layer, spec)
        assert bars[{"attention": "attention", "ffn": "FFN"}[slot]][layer] == score
    assert "0.2101 ± 0.0105" in page


def test_cost_says_tokens_and_memory(made):
    page = made[-1]
    trained = sum(spec.kind != "no_op" for _, spec in variants())
    assert f"65,536 tokens for each of {trained} variants" in page
    assert "256,000 tokens" in page and "4.8 GB" in page and "200 seconds (3.3 minutes)" in page


def test_every_section_folds_and_pages_stay_small(tmp_path):
    page = render_page(*make_run(tmp_path))
    assert len(page.encode()) < 2_500_000
    assert page.count("<section") == len(SECTIONS) == own_part(page).count("</h2></summary>")


def test_child_bars_are_relative_to_the_parents_subblock(made):
    traces = drawn(made[-1])["child"][0]
    bars = {trace["name"]: trace for trace in traces if trace.get("name") and trace["yaxis"] == "y2"}
    assert bars["narrower"]["x"] == [4, 5, 8]
    assert bars["narrower"]["y"] == pytest.approx([50.0, 200 / 3, 200 / 3])
    assert bars["left out"]["x"] == [7]
    assert set(bars["as in the parent"]["y"]) == {100.0}


def test_own_subblocks_in_a_format_are_not_called_changed():
    specs = [GatedFFN(96), GatedFFN(96).stored("q8_0"), GatedFFN(48).stored("q4_0"), NoOp("ffn")]
    figure = child_figure([Bar(layer, spec, layer < 2, 50.0) for layer, spec in enumerate(specs)])
    named = {trace.name: trace for trace in figure.data if trace.name}
    assert list(named) == ["as in the parent", "as in the parent, q8_0", "narrower, q4_0", "left out"]
    opacities = [trace.opacity for trace in list(named.values())[:3]]
    assert opacities == sorted(opacities, reverse=True) and len(set(opacities)) == 3


def test_fallen_variants_are_marked(made):
    page = made[-1]
    assert "Training made 1 of them worse" in page
    crosses = [trace for trace in drawn(page)["bld-ffn"][0] if trace["name"] == "fell back"]
    assert [(trace["x"], trace["customdata"]) for trace in crosses] == [([5], ["ffn.linear"])]
    assert not [trace for trace in drawn(page)["bld-attention"][0] if trace["name"] == "fell back"]
    row = next(line for line in page.splitlines() if "<td>ffn.linear</td>" in line and "paper" in line)
    assert "least_squares 11, paper 1" in row and '<td class="text">5</td>' in row


def test_measured_speeds_of_an_older_version_are_refused(tmp_path):
    recipe, run, _ = make_run(tmp_path)
    measured = json.loads((run / "measured.json").read_text())
    del measured["speedup_standard_error"]
    write_json(run / "measured.json", measured)
    with pytest.raises(ArtifactError, match=r"no speedup_standard_error: .* puzzle evaluate-child .* --again"):
        build_summary(recipe, run)


def test_absent_parts_are_said(tmp_path):
    recipe, run, _ = make_run(tmp_path)
    for layer, spec in variants():
        facts = {"spec": spec.to_dict(), "parameters": 1, "checksum": "0", "tokens": 0}
        write_json(run.variant(layer, spec.id).with_suffix(".json"), facts)
    recipe = recipe.model_copy(update={"bld": recipe.bld.model_copy(update={"tokens": 0})})
    shutil.rmtree(run / "scores")
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["child"]["refitted"]
    write_json(run / "evaluation.json", evaluation)
    write_json(run / "refit.json", {"tried": False, "kept": False})
    gkd = {"tokens": 0, "best_step": 0, "selection_kl_nats_start": 0.5, "selection_kl_nats_best": 0.5}
    write_json(run / "gkd.json", gkd | {"curve": [{"step": 0, "selection_kl_nats": 0.5}]})
    page = own_part(render_page(recipe, run, build_summary(recipe, run)))
    for sentence in (
        "The run holds no replace-1-block scores of single variants.",
        "The run holds no scores or costs to solve other limits with.",
        "BLD was skipped (bld.tokens is 0)",
        "The refit was not tried",
        "GKD was skipped (gkd.tokens is 0).",
        "homogeneous is infeasible: No single &lt;variant&gt; meets the limits.",
    ):
        assert sentence in page
    assert set(drawn(page)) == {"child", "decision", "prediction", "seconds"}
    assert "child, refitted" not in page


def test_page_needs_only_a_summary(tmp_path):
    recipe, _, summary = make_run(tmp_path / "whole")
    page = own_part(render_page(recipe, RunFolder(tmp_path / "empty"), summary))
    assert "The run holds no search result" in page
    assert "The run holds no cost table." in page
    assert "The run holds no library." in page
    assert "The run holds no curve of GKD." in page
    assert set(drawn(page)) == {"decision", "prediction", "seconds"}


def test_scores_below_zero_are_counted_not_drawn(tmp_path):
    recipe, run, summary = make_run(tmp_path)
    recipe = recipe.model_copy(update={"scoring": recipe.scoring.model_copy(update={"metric": "lm_loss"})})
    for layer, spec in variants():
        score = {"lm_loss_increase_nats": {"mean": -0.01 if layer == 0 else 0.02, "standard_error": 0.0}}
        write_json(run.score(layer, spec.id, metric="lm_loss"), score)
    page = own_part(render_page(recipe, run, summary))
    assert f"{sum(map(len, VARIANTS.values()))} scores at or below zero" in page
    assert all(trace["y"][0] is None for trace in drawn(page)["scores-ffn"][0])


def test_markup_is_escaped(tmp_path):
    recipe, run, summary = make_run(tmp_path, parent='</script><script>alert("x")</script>&')
    page = own_part(render_page(recipe, run, summary))
    assert "<script>alert" not in page
    assert "&lt;/script&gt;&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&amp;" in page


def test_repeats_that_differ_widely_are_said_not_to_be_relied_on(made):
    summary = made[2]
    measured = summary["child"]["speedup_measured"]
    for error, steady in ((0.005, True), (0.05, False)):
        summary["child"]["speedup_measured_standard_error"] = measured * error
        assert ("evaluate-child RUN --again" in speed_note(summary)) != steady


def test_same_run_gives_same_bytes(made):
    recipe, run, summary, page = made
    assert own_part(render_page(recipe, run, json.loads(json.dumps(summary)))) == page


@pytest.mark.parametrize("values", [[], [0.3], [0.2, 0.9], [1e-6, 40.0]])
def test_log_axis_spans_the_values_with_readable_ticks(values):
    axis = log_axis([None, *values])
    assert all(axis["range"][0] < math.log10(value) < axis["range"][1] for value in values)
    assert 3 <= len(axis["tickvals"]) <= 9


def test_labels_of_close_points_do_not_overlap():
    figure = decision_figure([Point(f"model {i}", 1.3, 0.5 + i / 1000, "child") for i in range(4)])
    offsets = sorted(annotation.ay for annotation in figure.layout.annotations)
    assert all(b - a > 15 for a, b in pairwise(offsets))
