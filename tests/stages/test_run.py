"""A whole run on the tiny trained parent, through the real command line."""

import json
import math
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import puzzle_nas.modeling  # noqa: F401
from puzzle_nas.architecture import Architecture
from puzzle_nas.artifacts import RunFolder, file_checksum
from puzzle_nas.families import Anatomy, architecture_of, build, child_config, load_parent
from puzzle_nas.library import variant_subblock
from puzzle_nas.pipeline import open_run
from puzzle_nas.scoring.replacement import ReplacementWalk
from puzzle_nas.specs import GatedFFN, GroupedAttention
from tests.conftest import puzzle


@pytest.fixture(scope="module")
def summary(tiny_run):
    return json.loads((tiny_run / "summary.json").read_text())


def independent_kl(parent, child, tokens):
    """Mean KL by transformers' forward and torch's own kl_div, nothing of ours."""
    with torch.no_grad():
        p = parent(tokens).logits.double().log_softmax(-1).flatten(0, 1)
        q = child(tokens).logits.double().log_softmax(-1).flatten(0, 1)
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()


def tokens_of(run, split):
    import safetensors.torch

    return safetensors.torch.load_file(run / "data" / f"{split}.safetensors")["tokens"].long()


def test_the_childs_reported_figures_are_what_transformers_measures(tiny_run, summary):
    parent = AutoModelForCausalLM.from_pretrained(
        tiny_run / summary["parent"]["checkpoint"], dtype=torch.float32
    ).eval()
    child = AutoModelForCausalLM.from_pretrained(tiny_run / summary["child"]["checkpoint"], dtype=torch.float32).eval()
    tokens = tokens_of(tiny_run, "validation")
    kl = independent_kl(parent, child, tokens)
    assert kl == pytest.approx(summary["child"]["validation_kl_nats_distilled"], rel=1e-4)
    with torch.no_grad():
        loss = parent(tokens, labels=tokens).loss.item()
        agreement = (parent(tokens).logits.argmax(-1) == child(tokens).logits.argmax(-1)).float().mean().item()
    assert math.exp(loss) == pytest.approx(summary["parent"]["validation_perplexity"], rel=1e-4)
    assert agreement == pytest.approx(summary["child"]["top1_agreement"], abs=2e-3)
    assert sum(p.numel() for p in child.parameters()) == summary["child"]["parameters"]
    assert sum(p.numel() for p in parent.parameters()) == summary["parent"]["parameters"]


def test_distillation_keeps_the_best_checkpoint_and_the_limit_is_met(tiny_run, summary):
    child = summary["child"]
    gkd = json.loads((tiny_run / "gkd.json").read_text())
    curve = [point["selection_kl_nats"] for point in gkd["curve"]]
    # Which child it is depends on measured times, so whether so short a training helps is not for a test to say.
    assert len(curve) == 3 and gkd["selection_kl_nats_best"] == min(curve) <= curve[0]
    assert child["speedup_predicted"] >= child["speedup_asked"] == 1.2
    for baseline in summary["baselines"].values():
        assert baseline["infeasible"] or baseline["speedup_predicted"] >= 0.999 * 1.2


def test_memory_is_parameters_plus_the_full_cache(tiny_run, summary):
    layers = json.loads((tiny_run / "search/main/architecture.json").read_text())["architecture"]
    architecture = Architecture.from_list(layers)
    heads = sum(s.num_key_value_heads for _, _, s in architecture if isinstance(s, GroupedAttention))
    cache = 2 * heads * 32 * 4 * 2 * (16 + 8)  # keys and values, heads, head_dim, float32, batch, tokens
    (scenario,) = json.loads((tiny_run / "costs/torch.json").read_text())["scenarios"].values()
    working = scenario["working_bytes"]
    assert summary["child"]["memory_bytes"] == 4 * summary["child"]["parameters"] + cache + working
    # The FFN of 341 channels holds gate, its activation and up for 2 x 16 tokens at once, and little else.
    ffn_bytes = 3 * 341 * 4 * 2 * 16
    assert ffn_bytes <= working <= 2 * ffn_bytes


def test_a_variant_equal_to_the_parent_scores_zero_and_scores_repeat(tiny_run):
    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    walk = ReplacementWalk(parent, tokens_of(tiny_run, "scoring"), 256)
    first_block = architecture_of(parent.config).layers[0]
    own = [{slot: variant_subblock(run, parent, 0, spec)} for slot, spec in first_block.items()]
    worse = [{"ffn": variant_subblock(run, parent, 0, GatedFFN(96))}]
    first = walk.try_variants([*own, *worse])
    for result in first[:2]:
        assert result.kl_nats.abs().max() < 1e-5
        assert bool((result.top1_agrees == 1).all())
    score = json.loads(run.score(0, "ffn.w96").read_text())["kl_nats"]["mean"]
    assert first[2].kl_nats.double().mean().item() == pytest.approx(score, rel=1e-5) and score > 1e-3


def test_scores_are_what_a_model_with_one_block_replaced_measures(tiny_run):
    from puzzle_nas.library import variant_weights

    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    spec = GroupedAttention(1)
    weights = {n: w for n, w in parent.state_dict().items() if not n.startswith("model.layers.2.self_attn")}
    weights |= {f"model.layers.2.{n}": w for n, w in variant_weights(run, parent, 2, spec).items()}
    child = build(child_config(parent.config, architecture_of(parent.config).replaced(2, spec)), weights)
    score = json.loads(run.score(2, spec.id).read_text())["kl_nats"]["mean"]
    assert independent_kl(parent, child, tokens_of(tiny_run, "scoring")) == pytest.approx(score, rel=1e-4)


def test_show_prints_what_the_summary_says(tiny_run, summary):
    text = puzzle("show", tiny_run).stdout
    assert json.loads(puzzle("show", tiny_run, "--json").stdout) == summary
    assert f"{summary['child']['validation_kl_nats_distilled']:.4f}" in text
    assert f"{summary['child']['speedup_measured']:.3f}x" in text
    for row in summary["architecture"]:
        attention, ffn = (re.escape(row["slots"][slot]["variant"]) for slot in ("attention", "ffn"))
        assert re.search(rf"{row['layer']}\s+{attention}.*{ffn}", text)


def test_the_parent_answers_beside_the_child(tiny_run):
    said = puzzle("generate", tiny_run, "My lord,", "Sweet", "--max-new-tokens", 6, "--with-parent").stdout
    lines = said.splitlines()
    assert [line for line in lines if line.startswith("> ")] == ["> My lord,", "> Sweet"]
    assert sum(line.startswith("child: ") for line in lines) == sum(line.startswith("parent: ") for line in lines) == 2


def test_generate_speaks(tiny_run):
    text = puzzle("generate", tiny_run, "My lord,", "--max-new-tokens", 12).stdout
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "child-gkd")
    assert len(tokenizer(text)["input_ids"]) >= 4


def test_a_second_run_finds_everything_done(tiny_run):
    before = {p: file_checksum(p) for p in tiny_run.rglob("*") if p.is_file()}
    recipe = tiny_run.parent / "tiny.yaml"
    out = puzzle("run", recipe, "--run-dir", tiny_run).stdout
    assert out.count("already done") == 12
    checked = puzzle("verify", tiny_run).stdout
    assert checked.count(" fine ") == 12 and "couple-blocks" not in checked
    assert {p: file_checksum(p) for p in tiny_run.rglob("*") if p.is_file() and p.name != "recipe.yaml"} == {
        p: c for p, c in before.items() if p.name != "recipe.yaml"
    }


def test_a_new_limit_leaves_the_runs_child_alone(tiny_run):
    before = file_checksum(tiny_run / "search/main/architecture.json")
    puzzle("search", tiny_run, "--limit", "speedup=1.1", "--limit", "parameters=8e5")
    found = json.loads((tiny_run / "search/speedup=1.1,parameters=800000/architecture.json").read_text())
    assert found["speedup_predicted"] >= 1.1 and found["parameters"] <= 8e5
    assert file_checksum(tiny_run / "search/main/architecture.json") == before


def test_variants_that_training_spoils_fall_back_and_are_named(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "copy")
    out = puzzle("distill-blocks", tmp_path / "copy", "bld.learning_rate=1e6").stdout
    named = re.findall(
        r"Layer \d, .*: the loss (?:rose from .* to .*|became NaN) in BLD; its initialisation is kept", out
    )
    assert len(named) == 5 and re.search(r"So it went with \d+ more, of \d+ variants", out)
    library = tmp_path / "copy/library"
    trained, initial = (library / name / "layer_01/ffn.w96.safetensors" for name in ("main", "initial"))
    assert trained.read_bytes() == initial.read_bytes()
    assert json.loads(trained.with_suffix(".json").read_text())["fell_back"] is True


def test_blocks_learn_what_they_are_taught(tiny_run, tmp_path):
    """From random weights BLD must lower the error on text that it has not seen, by a lot."""
    shutil.copytree(tiny_run, tmp_path / "copy")
    puzzle("build-library", tmp_path / "copy", "library.initialisation=random")
    puzzle("distill-blocks", tmp_path / "copy", "bld.tokens=32768", "bld.learning_rate=3e-3")
    facts = [json.loads(p.read_text()) for p in (tmp_path / "copy/library/main").rglob("ffn.w*.json")]
    assert len(facts) == 8
    assert all(f["held_out_loss_end"] < 0.9 * f["held_out_loss_start"] for f in facts)


def test_the_prediction_of_the_parent_is_printed(tiny_run):
    out = (tiny_run.parent / "tiny.out").read_text()
    assert re.search(r"parent predicted \d+ ms, measured whole \d+ ms, predicted over measured \d\.\d+", out)


def test_distillation_that_diverges_leaves_the_start_and_says_so(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "copy")
    out = puzzle("distill-child", tmp_path / "copy", "gkd.learning_rate=1e12").stdout
    assert "the child stays as it was" in out
    facts = json.loads((tmp_path / "copy/gkd.json").read_text())
    assert facts["best_step"] == 0
    refitted = tmp_path / ("copy/child-refit" if (tmp_path / "copy/child-refit").exists() else "copy/child")
    name = "model.safetensors"
    assert (tmp_path / "copy/child-gkd" / name).read_bytes() == (refitted / name).read_bytes()


def test_global_distillation_lowers_kl_on_text_it_has_not_seen(tiny_run):
    """On a fixed child, every FFN narrowed, so that measured times have no say."""
    from puzzle_nas.library import variant_weights
    from puzzle_nas.recipe import GKDSettings
    from puzzle_nas.training.distillation import gkd_loss
    from puzzle_nas.training.optimiser import Optimiser
    from puzzle_nas.training.parent_outputs import LiveParent

    run = RunFolder(tiny_run)
    parent = load_parent(open_run(run), run)
    architecture = architecture_of(parent.config)
    weights = dict(parent.state_dict())
    for layer in range(parent.config.num_hidden_layers):
        architecture = architecture.replaced(layer, GatedFFN(96))
        for name, weight in variant_weights(run, parent, layer, GatedFFN(96)).items():
            weights[f"model.layers.{layer}.{name}"] = weight.clone()
    child = build(child_config(parent.config, architecture), weights)
    unseen, train = tokens_of(tiny_run, "validation"), tokens_of(tiny_run, "train")
    before = independent_kl(parent, child, unseen)
    child.model.layers.requires_grad_(True)
    settings, steps = GKDSettings(learning_rate=3e-4), 60
    optimiser = Optimiser(child, settings.learning_rate, steps)
    for step in range(steps):
        blocks = torch.arange(8) + 8 * step % 480
        inputs = Anatomy(child).inputs(train.shape[1])
        gkd_loss(LiveParent(parent), child, train[blocks], blocks, settings, inputs).backward()
        optimiser.step(step)
    assert independent_kl(parent, child, unseen) < 0.95 * before


def test_who_may_read_one_file_of_a_run_may_read_all(tiny_run):
    modes = {oct(path.stat().st_mode): path for path in tiny_run.rglob("*") if path.is_file()}
    assert len(modes) == 1, modes
