"""memory: stream gives what memory: all gives; BLD in shards goes on where it stopped."""

import json
import shutil
import weakref

import pytest
import torch

from puzzle_nas import pipeline
from puzzle_nas.artifacts import RunFolder, file_checksum, read_json
from puzzle_nas.data.batches import block_order
from puzzle_nas.errors import CheckpointError
from puzzle_nas.families import Anatomy, load_parent
from puzzle_nas.recipe_text import parse_recipe
from puzzle_nas.scoring.replacement import final_states
from puzzle_nas.training import block_distillation
from puzzle_nas.training.block_distillation import shards_of
from tests.faults import COUPLED

MADE = ("parent.json", "library/*/*/*", "scores/main/*/*", "child/*", "baselines/*/*", "child-refit/*")


def checksums(folder, patterns=MADE):
    return {
        str(p.relative_to(folder)): file_checksum(p)
        for pattern in patterns
        for p in folder.glob(pattern)
        if p.is_file()
    }


def again(tiny_run, folder, stages, *overrides):
    """Stages of the finished run made anew in a copy of it, with other settings."""
    shutil.copytree(tiny_run, folder)
    run = RunFolder(folder)
    recipe = parse_recipe(run.recipe.read_text(), overrides)
    pipeline.claim_run(recipe, run)
    for stage in stages:
        pipeline.run_stage(pipeline.stage_named(stage), recipe, run, again=True)
    return run


def test_streamed_stages_make_the_same_bytes(tiny_run, tmp_path):
    stages = ("prepare_parent", "build_library", "distill_blocks", "score_blocks", "assemble_child", "refit_child")
    run = again(tiny_run, tmp_path / "run", stages, "memory=stream")
    assert len(checksums(tiny_run)) > 60 and checksums(run.path) == checksums(tiny_run)
    assert not run.scratch("score_blocks").exists()


def test_pairs_are_trained_and_scored_alike_streamed_and_in_shards(tiny_run, tmp_path):
    overrides = [f"bld.{name}={value}" for name, value in COUPLED.items()]
    made = ("library/coupled/*", "library/coupled/*/*", "scores/coupled/*/*")
    whole = checksums(again(tiny_run, tmp_path / "whole", ("couple_blocks",), *overrides).path, made)
    streamed = again(tiny_run, tmp_path / "streamed", ("couple_blocks",), *overrides, "memory=stream")
    assert len(whole) > 8 and checksums(streamed.path, made) == whole
    sharded = again(tiny_run, tmp_path / "sharded", ("couple_blocks",), *overrides, "bld.shard_tokens=512")
    facts = [read_json(path) for path in sharded.path.glob("library/coupled/*/*.json")]
    assert sum(f["held_out_loss_end"] < f["held_out_loss_start"] for f in facts) > len(facts) / 2


def test_scores_by_a_task_are_the_same_streamed(tiny_run, tmp_path):
    items = [{"question": f"{a} and", "choices": [b, a, "nothing"], "answer": 0} for a in "abcd" for b in "efgh"]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    overrides = ("scoring.metric=task_margin", f"scoring.task={tmp_path / 'items.jsonl'}")
    whole = checksums(
        again(tiny_run, tmp_path / "whole", ("score_blocks",), *overrides).path, ["scores/main/task_margin/*"]
    )
    run = again(tiny_run, tmp_path / "streamed", ("score_blocks",), *overrides, "memory=stream")
    assert len(whole) > 20 and checksums(run.path, ["scores/main/task_margin/*"]) == whole


def test_a_streamed_parent_computes_the_same_and_holds_one_layer(tiny_run, tmp_path):
    run = again(tiny_run, tmp_path / "run", (), "memory=stream")
    recipe = pipeline.open_run(run)
    whole, streamed = load_parent(recipe, run), load_parent(recipe, run, by_layer=True)
    tokens = torch.arange(48).view(2, 24)
    with torch.no_grad():
        (final,) = final_states(streamed, tokens, 2)
        assert torch.equal(whole(tokens).logits, Anatomy(streamed).head.matrix(final))
    held = sum(p.numel() for p in streamed.parameters())
    assert held == sum(p.numel() for n, p in whole.named_parameters() if ".layers." not in n)
    first = weakref.ref(streamed.model.layers[0])
    assert first() is streamed.model.layers[0]
    assert streamed.model.layers[1] is not None and first() is None


def test_a_checkpoint_that_lacks_weights_is_refused_in_one_sentence(tiny_run, tiny_parent, tmp_path):
    import safetensors.torch

    broken = tmp_path / "parent"
    shutil.copytree(tiny_parent, broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.torch.save_file(weights, broken / "model.safetensors", {"format": "pt"})
    run = again(tiny_run, tmp_path / "run", (), "memory=stream")
    facts = read_json(run.parent) | {"checkpoint": str(broken)}
    run.parent.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"lacks 1 weights, model\.norm\.weight among them"):
        load_parent(pipeline.open_run(run), run, by_layer=True)
    (broken / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="use memory: all"):
        load_parent(pipeline.open_run(run), run, by_layer=True)


def test_shards_take_every_sequence_and_every_step_once():
    for trained, wanted, batch, most in ((10, 10, 4, None), (10, 23, 4, 3), (100, 250, 7, 30), (5, 5, 8, 8)):
        shards = shards_of(trained, wanted, batch, most)
        assert [s.begin for s in shards[1:]] == [s.end for s in shards[:-1]]
        assert (shards[0].begin, shards[-1].end, sum(s.wanted for s in shards)) == (0, trained, wanted)
        assert all(s.end - s.begin <= (most or trained) for s in shards)
        for shard in shards:
            batches = shard.batches(block_order, 0)
            assert shard.end_step - shard.first_step == len(batches)
            assert sum(len(b) for b in batches) == shard.wanted and max(map(max, batches)) < shard.end - shard.begin


class Stop(Exception):
    """Stands in for a kill."""


def test_shards_go_on_where_they_stopped_whichever_the_memory(tiny_run, tmp_path, monkeypatch):
    sharded = "bld.shard_tokens=1024"
    monkeypatch.setattr(block_distillation, "CHECKPOINT_STEPS", 2)
    undisturbed = again(tiny_run, tmp_path / "undisturbed", ("distill_blocks",), sharded)
    expected = checksums(undisturbed.path, ["library/main/*/*"])
    facts = read_json(undisturbed.path / "library/main/layer_00/ffn.w96.json")
    assert facts["held_out_loss_end"] < facts["held_out_loss_start"] and len(facts["loss_curve"]) > 8
    assert expected != checksums(tiny_run, ["library/main/*/*"])

    saves = []
    save = block_distillation._save_checkpoint

    def stopping(path, trainee, step):
        save(path, trainee, step)
        saves.append(step)
        if len(saves) == 43:
            raise Stop

    monkeypatch.setattr(block_distillation, "_save_checkpoint", stopping)
    with pytest.raises(Stop):
        again(tiny_run, tmp_path / "stopped", ("distill_blocks",), sharded)
    assert saves[-1] > 4, "the second shard should have begun"
    run = RunFolder(tmp_path / "stopped")
    recipe = parse_recipe(run.recipe.read_text(), ["memory=stream"])
    pipeline.claim_run(recipe, run)
    pipeline.run_stage(pipeline.stage_named("distill_blocks"), recipe, run)
    assert checksums(run.path, ["library/main/*/*"]) == expected
