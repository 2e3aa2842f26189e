"""What the run cost, and how to repeat it."""

from __future__ import annotations

from html import escape

from puzzle_nas.report.facts import Facts
from puzzle_nas.report.figures.runs import seconds_figure
from puzzle_nas.report.layout import commands, facts_table, figure, folded, paragraph, table


def cost(facts: Facts) -> str:
    """Time by stage, tokens, and peak memory where it was noted."""
    recipe, summary = facts.recipe, facts.summary
    seconds = summary["seconds"]
    total = sum(seconds.values())
    trained = sum("held_out_loss_start" in fact for fact in facts.library.main.values())
    peak = summary["peak_memory_bytes"]
    data = recipe.data
    rows = {
        "time": f"{total:,.0f} seconds ({total / 60:.1f} minutes)" if seconds else "not recorded",
        "peak memory": f"{peak / 1e9:.1f} GB" if peak else "not recorded",
        "GKD": f"{summary['gkd']['tokens']:,} tokens",
        "BLD": f"{recipe.bld.tokens:,} tokens for each of {trained:,} variants",
        "calibration": f"{data.calibration_tokens:,} tokens",
        "scoring": f"{data.scoring_tokens:,} tokens",
        "text for training": f"{data.train_tokens:,} tokens, repeated where more are asked for",
        "selection and validation": f"{data.selection_tokens:,} and {data.validation_tokens:,} tokens",
    }
    content = facts_table(rows)
    if not seconds:
        return content
    return content + figure("seconds", seconds_figure(seconds), "Seconds by stage")


def reproduction(facts: Facts) -> str:
    """Commands, versions, machine, traffic, and the whole recipe."""
    run, summary = facts.run, facts.summary
    first = run.recipe.read_text().partition("\n")[0] if run.recipe.exists() else ""
    versions = first.removeprefix("#").strip() if first.startswith("#") else "not recorded"
    limits = ", ".join(f"{name} = {value:g}" for name, value in summary["child"]["limits"].items()) or "none"
    machine = {name.replace("_", " "): str(value) for name, value in summary["machine"].items()}
    columns = ("scenario", "batch size", "prefill tokens", "decode tokens", "weight")
    scenarios = [
        (s["name"], *(f"{s[key]:g}" for key in ("batch_size", "prefill_tokens", "decode_tokens", "weight")))
        for s in summary["scenarios"]
    ]
    folder = run.path.name or "child"
    steps = f"""# recipe.yaml: the recipe below, which also lies in the run folder
puzzle run recipe.yaml --run-dir runs/{folder}
puzzle show runs/{folder}
puzzle generate runs/{folder} "Why is the sky blue?"
"""
    return (
        commands(steps)
        + paragraph(
            "Equal recipes, versions and cost tables give equal weights on one machine; times are measured again, and "
            "with them the search may choose otherwise. To keep this run's, set costs.file to its "
            f"costs/{facts.recipe.engine}.json."
        )
        + facts_table({"versions": versions, "limits": limits, **machine})
        + table(columns, scenarios)
        + folded("The recipe, every setting", f"<pre>{escape(facts.recipe.to_yaml())}</pre>")
    )
