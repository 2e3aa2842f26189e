"""Everything that `puzzle show` prints, gathered from a run's artifacts (docs/summary.md explains each key)."""

from __future__ import annotations

from typing import Any

from puzzle_nas.architecture import SLOTS, Architecture, ParentShape
from puzzle_nas.artifacts import RunFolder, read_json, written_by_this_version
from puzzle_nas.costs import CostTable
from puzzle_nas.recipe import Recipe


def build_summary(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """The content of summary.json; paths are relative to the run folder."""
    facts = read_json(run.parent, "prepare-parent")
    search = read_json(run.architecture(), "search")
    quality = read_json(run / "evaluation.json", "evaluate-child")
    measured = read_json(run / "measured.json", "evaluate-child")
    gkd, refit = read_json(run / "gkd.json", "distill-child"), read_json(run / "refit.json", "refit")
    with written_by_this_version(run / "measured.json", "evaluate-child"):
        speed = {
            "speedup_measured": measured["speedup"],
            "speedup_measured_standard_error": measured["speedup_standard_error"],
            "speedup_measured_repeats": len(measured["speedup_by_repeat"]),
        }
    costs = CostTable.load(run, recipe)
    architecture = Architecture.from_list(search["architecture"])
    parent = Architecture.of_parent(ParentShape(**facts["shape"]))
    stages = {"assembled": "child", "refitted": "child-refit", "distilled": "child-gkd"}
    kl = {name: quality["child"].get(name, {}).get("kl_nats") for name in stages}
    distilled = quality["child"]["distilled"]
    parent_ms = costs.mix_ms(parent)
    return {
        "parent": {
            "source": facts["source"],
            "checkpoint": facts["checkpoint"],
            "family": facts["family"],
            "parameters": facts["parameters"],
            "memory_bytes": costs.memory_bytes(parent),
            "validation_perplexity": quality["parent"]["perplexity"],
            "runtime_ms_predicted": parent_ms,
            "runtime_ms_measured": measured["mix_ms"]["parent"],
        },
        "child": {
            "checkpoint": "child-gkd",
            "parameters": search["parameters"],
            "memory_bytes": search["memory_bytes"],
            "limits": search["limits"],
            "speedup_asked": search["limits"].get("speedup"),
            "speedup_predicted": search["speedup_predicted"],
            **speed,
            "runtime_ms_predicted": costs.mix_ms(architecture),
            "runtime_ms_measured": measured["mix_ms"]["child"],
            "score_sum_nats": search["score_sum"],
            "validation_kl_nats_assembled": kl["assembled"],
            "validation_kl_nats_refitted": kl["refitted"],
            "validation_kl_nats_distilled": kl["distilled"],
            "validation_kl_nats_standard_error": distilled["kl_nats_standard_error"],
            "validation_perplexity": distilled["perplexity"],
            "top1_agreement": distilled["top1_agreement"],
        },
        "baselines": {
            name: {
                "validation_kl_nats_assembled": quality["baselines"].get(name, {}).get("kl_nats"),
                "validation_perplexity": quality["baselines"].get(name, {}).get("perplexity"),
                "top1_agreement": quality["baselines"].get(name, {}).get("top1_agreement"),
                "speedup_predicted": found.get("speedup_predicted"),
                "memory_bytes": found.get("memory_bytes"),
                "parameters": found.get("parameters"),
                "infeasible": found.get("infeasible"),
            }
            for name, found in search["baselines"].items()
        },
        "architecture": [
            {
                "layer": layer,
                **{slot: block[slot].id for slot in SLOTS},
                **{
                    f"{slot}_share_of_parent_runtime": costs.columns_of(block[slot])["runtime_ms"] / parent_ms
                    for slot in SLOTS
                },
            }
            for layer, block in enumerate(architecture.layers)
        ],
        "parent_share_of_runtime": {
            slot: costs.columns_of(parent.layers[0][slot])["runtime_ms"] / parent_ms for slot in SLOTS
        },
        "prediction": {
            "parent_measured_over_predicted": measured["mix_ms"]["parent"] / parent_ms,
            "child_measured_over_predicted": measured["mix_ms"]["child"] / costs.mix_ms(architecture),
            "other_load_percent_at_cost_measurement": costs.data.get("other_load_percent"),
        },
        "search": {"children_measured": search["children_measured"], "speed_checks": search["speed_checks"]},
        "refit": refit,
        "gkd": {key: gkd[key] for key in ("tokens", "best_step", "selection_kl_nats_start", "selection_kl_nats_best")},
        "engine": recipe.engine,
        "machine": costs.data["machine"],
        "scenarios": [vars(s) for s in costs.scenarios],
        "seconds": {name: round(value, 1) for name, value in run.seconds().items()},
        "peak_memory_bytes": run.peak_memory_bytes(),
    }
