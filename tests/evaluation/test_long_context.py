"""Questions at a given length, and what is measured by length."""

import itertools
import json
import random
import re

import pytest
import torch

from puzzle_nas.errors import DataError
from puzzle_nas.estimates import estimate
from puzzle_nas.evaluation.long_context import evaluate_lengths, lengths_to
from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.evaluation.ruler import CHAIN, KINDS, WORDS, common_words, question, variable_tracking
from puzzle_nas.evaluation.text import compare_texts
from tests.conftest import puzzle
from tests.exporters.children import LINEAR_ATTENTION, child_of, tokenizer
from tests.stages.test_bad_input import check_refused


def evaluated(per_layer=None, **changes):
    child = child_of(per_layer, max_position_embeddings=2048, **changes)
    return Evaluated(child.model, child.tokenizer)


def solved(prompt):
    """The answers, found by reading the prompt as a human would."""
    if "magic number" in prompt:
        return set(re.findall(r"is: (\d{7})\.", prompt))
    if "VAR" in prompt:
        value = re.search(r"assigned the value (\d+) in the text", prompt).group(1)
        known = set()
        for name, what in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
            if what == value or what in known:
                known.add(name)
        return known
    words = re.findall(r"\d+\. ([a-z]+)", prompt)
    counts = {word: words.count(word) for word in words}
    return set(sorted(counts, key=counts.get, reverse=True)[:3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [512, 1024, 2048])
def test_questions_fill_their_length_and_can_be_answered(kind, length):
    for number in range(5):
        asked = question(kind, number, length, tokenizer(), seed=0)
        used = len(tokenizer().encode(asked.prompt)) + asked.answer_tokens
        assert length - 60 <= used <= length
        assert solved(asked.prompt) == set(asked.answers)
        assert asked.score(f" {', '.join(reversed(asked.answers))}.") == 1.0
        assert asked.score(f" {asked.answers[0]}") == pytest.approx(1 / len(asked.answers))
        assert len(tokenizer().encode(", ".join(asked.answers))) <= asked.answer_tokens


def test_questions_follow_from_the_seed():
    def prompts(seed):
        return [question(kind, n, 512, tokenizer(), seed).prompt for kind in KINDS for n in range(3)]

    assert prompts(0) == prompts(0) and len(set(prompts(0))) == 9 and not set(prompts(0)) & set(prompts(1))


def test_common_words_are_common_and_variables_are_a_chain():
    for size in (40, 400):
        prompt, answers = common_words(random.Random(0), size)
        words = re.findall(r"\d+\. ([a-z]+)", prompt)
        rare = max(words.count(word) for word in set(words) - set(answers))
        assert min(words.count(word) for word in answers) >= 2 * rare
    assert len(variable_tracking(random.Random(0), 9)[1]) == CHAIN
    assert not [(a, b) for a, b in itertools.permutations(WORDS, 2) if a in b]


def test_lengths_double_up_to_the_limit():
    assert lengths_to(8192) == [512, 1024, 2048, 4096, 8192]
    assert lengths_to(3000) == [512, 1024, 2048, 3000]
    assert lengths_to(512) == [512] and lengths_to(128) == [128]


def test_each_length_is_scored_and_compared_with_the_parent():
    parent, child = evaluated(), evaluated({0: [LINEAR_ATTENTION]})
    text = torch.randint(3, 331, (4, 600))
    found = evaluate_lengths(child, parent, text, 1024, 2, seed=0)["lengths"]
    assert list(found) == ["512", "1024"]
    expected = compare_texts(child, parent, {"t": text.flatten()[:2048].view(2, 1024)}, from_position=512)["all"]
    assert found["1024"]["text"] == expected and found["512"]["text"]["sequences"] == 4
    row = found["1024"]["tasks"]["needle"]
    asked = [question("needle", n, 1024, tokenizer(), 0) for n in range(2)]
    scores = []
    for q in asked:
        ids = tokenizer()(q.prompt, return_tensors="pt")["input_ids"]
        for _ in range(q.answer_tokens):
            with torch.no_grad():
                ids = torch.cat([ids, child.whole(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer().eos_token_id:
                break
        scores.append(q.score(tokenizer().decode(ids[0, -q.answer_tokens :])))
    assert row["score"] == estimate(scores)
    # A random parent finds nothing, so there is nothing to preserve.
    assert found["1024"]["average"]["parent_score"]["mean"] < 0.2
    assert found["1024"]["average"]["preserved"] is None


def test_a_parent_against_itself_preserves_everything(monkeypatch):
    """With an oracle in place of generation: the score reaches the table, and the ratio is of the right models."""
    import puzzle_nas.evaluation.long_context as module

    parent, child = evaluated(), evaluated({0: [LINEAR_ATTENTION]})

    def oracle(model, asked, on_answer):
        on_answer()
        return asked.score(asked.answers[0] if model is child else " ".join(asked.answers))

    monkeypatch.setattr(module, "_answer_score", oracle)
    row = evaluate_lengths(child, parent, None, 512, 4, seed=0)["lengths"]["512"]
    assert row["tasks"]["needle"]["preserved"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert row["tasks"]["variable_tracking"]["preserved"]["mean"] == pytest.approx(1 / CHAIN)
    assert row["average"]["preserved"]["mean"] == pytest.approx((1 + 1 / CHAIN + 1 / 3) / 3)


def test_on_the_command_line(tmp_path):
    for name, layers in (("parent", {}), ("child", {0: [LINEAR_ATTENTION]})):
        child = child_of(layers, max_position_embeddings=600)
        child.model.save_pretrained(tmp_path / name)
        child.tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. \n\n" * 400)
    arguments = ["evaluate", tmp_path / "child", "--parent", tmp_path / "parent", "--long-context", "--questions", 1]
    found = json.loads(puzzle(*arguments, "--data", tmp_path / "text.txt", "--json").stdout)
    assert list(found["long_context"]["lengths"]) == ["512", "600"]
    assert found["long_context"]["lengths"]["600"]["text"]["kl_nats"]["mean"] > 0
    out = puzzle(*arguments, "--max-length", 512).stdout
    assert "variable tracking" in out and "512" in out
    check_refused(*arguments, "--max-length", 601, contains=["601", "600 positions"])
    with pytest.raises(DataError, match="fits into 100 tokens"):
        question("common_words", 0, 100, tokenizer(), 0)
