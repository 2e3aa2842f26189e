"""Everything that `puzzle show` prints, gathered from a run's artifacts (docs/summary.md explains each key)."""

from __future__ import annotations

from typing import Any

from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, read_json, written_by_this_version
from puzzle_nas.choosing.architecture_search import parent_of
from puzzle_nas.choosing.costs import CostTable
from puzzle_nas.recipe import Recipe
from puzzle_nas.specs import Spec


def build_summary(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """The content of summary.json; paths are relative to the run folder."""
    facts = read_json(run.parent, "prepare-parent")
    search = read_json(run.architecture(), "search-architecture")
    quality = read_json(run / "evaluation.json", "evaluate-child")
    measured = read_json(run / "measured.json", "evaluate-child")
    gkd, refit = read_json(run / "gkd.json", "distill-child"), read_json(run / "refit.json", "refit-child")
    with written_by_this_version(run / "measured.json", "evaluate-child"):
        speed = {
            "speedup_measured": measured["speedup"],
            "speedup_measured_standard_error": measured["speedup_standard_error"],
            "speedup_measured_repeats": len(measured["speedup_by_repeat"]),
            "other_load_percent": measured["other_load_percent"],
        }
        quantised = measured["quantised_parents"]
    costs = CostTable.load(run, recipe)
    architecture = Architecture.from_list(search["architecture"])
    parent = parent_of(run)
    stages = {"assembled": "child", "refitted": "child-refit", "distilled": "child-gkd"}
    kl = {name: quality["child"].get(name, {}).get("kl_nats") for name in stages}
    distilled = quality["child"]["distilled"]
    parent_ms = costs.mix_ms(parent)

    def described(layer: int, spec: Spec) -> dict[str, Any]:
        runtime, full = (costs.columns_of(layer, s)["runtime_ms"] for s in (spec, parent.layers[layer][spec.slot]))
        percent = 100 * (runtime / full) if full else 0.0
        return {"variant": spec.id, "share_of_parent_runtime": runtime / parent_ms, "percent_of_parent": percent}

    return {
        "parent": {
            "source": facts["source"],
            "checkpoint": facts["checkpoint"],
            "family": facts["family"],
            "parameters": facts["parameters"],
            "memory_bytes": costs.memory_bytes(parent),
            "validation_perplexity": quality["parent"]["perplexity"],
            "validation_kl_nats_of_rounding": quality.get("kl_nats_of_rounding"),
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
                "speedup_measured": quantised.get(name, {}).get("speedup"),
                "memory_bytes": found.get("memory_bytes"),
                "parameters": found.get("parameters"),
                "infeasible": found.get("infeasible"),
            }
            for name, found in search["baselines"].items()
        },
        "architecture": [
            {
                "layer": layer,
                "slots": {slot: described(layer, spec) for slot, spec in block.items()},
            }
            for layer, block in enumerate(architecture.layers)
        ],
        "head": architecture.head.id,
        "prediction": {
            "parent_measured_over_predicted": measured["mix_ms"]["parent"] / parent_ms,
            "child_measured_over_predicted": measured["mix_ms"]["child"] / costs.mix_ms(architecture),
            "other_load_percent_at_cost_measurement": costs.data.get("other_load_percent"),
        },
        "search": {"children_measured": search["children_measured"], "speed_checks": search["speed_checks"]},
        "refit": refit,
        "gkd": {key: gkd[key] for key in ("tokens", "best_step", "selection_kl_nats_start", "selection_kl_nats_best")},
        "engine": recipe.engine,
        "kv_format": recipe.kv_format,
        "machine": costs.data["machine"],
        "scenarios": [vars(s) for s in costs.scenarios],
        "seconds": {name: round(value, 1) for name, value in run.seconds().items()},
        "peak_memory_bytes": run.peak_memory_bytes(),
        "made_from": _made_from(run),
    }


def _made_from(run: RunFolder) -> dict[str, str]:
    """Fingerprints of what every finished stage has made, the report aside."""
    names = [path.stem for path in sorted((run / "stages").glob("*.json")) if not path.stem.endswith(".begun")]
    records = {name: run.record(name) for name in names}
    return {
        name: record["outputs_fingerprint"]
        for name, record in records.items()
        if record is not None and name != "write_report"
    }


def made_since(summary: dict[str, Any], run: RunFolder) -> list[str]:
    """The stages that have made something else, or begun to, since the summary was written."""
    now = _made_from(run)
    return [name for name, before in summary["made_from"].items() if now.get(name) != before]
