"""Ballots: by a real model behind llama.cpp's own server, by a person, and by a stub that fails on purpose."""

import http.server
import json
import re
import socket
import subprocess
import sys
import threading
from itertools import permutations

import pytest

from puzzle_nas.engines import serving_engine
from puzzle_nas.engines.server import served
from puzzle_nas.errors import DataError, EngineError
from puzzle_nas.evaluation.judge import Endpoint, Judge, judge_child, outcome, read_questions, read_vote, show_judgement
from puzzle_nas.stages.export_child import export_child
from tests.conftest import puzzle
from tests.exporters.children import child_of
from tests.stages.test_bad_input import check_refused

QUESTIONS = ["Who goes there?", "What is love?", "Why do kings fall?"]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("\n\n".join(QUESTIONS))
    return path


class Preferring(Judge):
    """Decides by a rule on the two texts, and remembers what it saw."""

    def __init__(self, rule, name="rule", stop_after=None):
        self.rule, self.name, self.seen, self.stop_after = rule, name, [], stop_after

    def vote(self, question, first, second):
        if len(self.seen) == self.stop_after:
            raise KeyboardInterrupt
        self.seen.append((question, first, second))
        return self.rule(first, second)


def test_ballots_are_blind_and_in_both_orders(tiny_run, tiny_parent, questions, tmp_path):
    judge = Preferring(lambda first, second: "first" if len(first) > len(second) else "second")
    paths = (tiny_run / "child-gkd", tiny_parent)
    found = judge_child(*paths, questions, judge, 12, tmp_path / "judged.json")
    assert [pair["question"] for pair in found["pairs"]] == QUESTIONS
    for pair in found["pairs"]:
        assert pair["answers"].keys() == {"child", "parent"}
        shown = [(first, second) for question, first, second in judge.seen if question == pair["question"]]
        assert sorted(shown) == sorted([shown[0], shown[0][::-1]])
        assert set(shown[0]) == set(pair["answers"].values())
    lengths = [(len(pair["answers"]["child"]), len(pair["answers"]["parent"])) for pair in found["pairs"]]
    assert found["wins"] == sum(child > parent for child, parent in lengths)
    assert found["losses"] == sum(child < parent for child, parent in lengths)
    said = puzzle("generate", tiny_parent, QUESTIONS[0], "--max-new-tokens", 12).stdout
    assert said.strip() == found["pairs"][0]["answers"]["parent"]


def test_a_stopped_ballot_goes_on(tiny_run, tiny_parent, questions, tmp_path):
    arguments = (tiny_run / "child-gkd", tiny_parent, questions)
    first = Preferring(lambda *_: "first", stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        judge_child(*arguments, first, 8, tmp_path / "judged.json")
    rest = Preferring(lambda *_: "first")
    found = judge_child(*arguments, rest, 8, tmp_path / "judged.json")
    assert len(first.seen) == 2 and len(rest.seen) == 4
    pairs = [(pair["question"], pair["answers"].values()) for pair in found["pairs"]]
    ballots = [(question, *order) for question, answers in pairs for order in permutations(answers)]
    assert sorted(first.seen + rest.seen) == sorted(ballots)
    assert found["ties"] == 3 and found["agree"] == 0 and found["first_votes"] == 1.0
    other = Preferring(lambda *_: "tie", name="another judge")
    assert judge_child(*arguments, other, 8, tmp_path / "judged.json")["agree"] == 1
    assert len(other.seen) == 6


def test_the_outcome_counts_only_what_both_orders_say():
    win = {"child first": "first", "parent first": "second"}
    loss = {"child first": "second", "parent first": "first"}
    biased = {"child first": "first", "parent first": "first"}
    unclear = {"child first": "unclear", "parent first": "unclear"}
    found = outcome([win, win, loss, biased, unclear])
    assert (found["wins"], found["ties"], found["losses"]) == (2, 2, 1)
    assert found["score"] == pytest.approx(0.6) and found["score_low"] < 0.5 < found["score_high"]
    assert found["agree"] == pytest.approx(0.6) and found["unclear_votes"] == 2
    assert outcome([win] * 10)["score_low"] > 0.5 > outcome([loss] * 10)["score_high"]


@pytest.mark.parametrize(
    ("reply", "vote"),
    [
        ("Answer A is fine. [[B]]", "second"),
        ("If [[A]] were true... My verdict: [[C]]", "tie"),
        ("<think>[[B]] perhaps</think>\n[[A]]", "first"),
        (" A.", "first"),
        ("A is a letter", "unclear"),
        ("", "no verdict"),
        ("<think>Let me see: [[A]]", "no verdict"),
        ("<think>Let me see.</think>\n", "no verdict"),
    ],
)
def test_reading_a_verdict(reply, vote):
    assert read_vote(reply) == vote


def test_questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "One?"}\n{"question": "Two?"}\n{"question": "One?"}\n')
    assert read_questions(path) == ["One?", "Two?"]
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (("empty.txt", "holds no questions"), ("no.txt", "no file")):
        with pytest.raises(DataError, match=message):
            read_questions(tmp_path / name)


def test_a_person_in_the_terminal(tiny_run, tiny_parent, questions, tmp_path):
    command = [sys.executable, "-m", "puzzle_nas.cli", "judge", tiny_run / "child-gkd", "--parent", tiny_parent]
    command += ["--questions", questions, "--person", "--max-new-tokens", "8", "--out", tmp_path / "out.json"]
    stopped = subprocess.run(command, input="a\nperhaps\nb\n", capture_output=True, text=True)
    assert stopped.returncode == 130 and "goes on from here" in stopped.stderr
    votes = [
        vote for pair in json.loads((tmp_path / "out.json").read_text())["pairs"] for vote in pair["votes"].values()
    ]
    assert sorted(votes) == ["first", "second"]
    # Nothing that is shown says whose an answer is.
    assert not re.search("child|parent", stopped.stderr.split("=== Question", 1)[1].split("Stopped")[0])
    rest = subprocess.run([*command, "--json"], input="t\n" * 4, capture_output=True, text=True)
    assert rest.returncode == 0 and json.loads(rest.stdout)["questions"] == 3


def test_a_real_model_behind_a_real_server(tiny_run, tiny_parent, questions, tmp_path):
    """llama.cpp's own server of a small random model: it answers with gibberish, which is said to be unclear."""
    child = child_of(max_position_embeddings=2048)
    child.model.save_pretrained(tmp_path / "judge")
    child.tokenizer.save_pretrained(tmp_path / "judge")
    export = export_child(tmp_path / "judge", "gguf", "float32", None, tmp_path / "exports")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with served(serving_engine("llama.cpp"), export, port) as server:
        url = f"http://127.0.0.1:{port}/v1"
        arguments = ["judge", tiny_run / "child-gkd", "--parent", tiny_parent, "--questions", questions, "--judge", url]
        arguments += ["--model", server.model, "--max-new-tokens", 8]
        found = json.loads(puzzle(*arguments, "--json").stdout)
        assert found["judge"] == f"{server.model} at {url}"
        assert found["unclear_votes"] == 6 and found["ties"] == 3 and found["score"] == 0.5
        assert "6 votes could not be read" in puzzle(*arguments).stdout
        direct = Endpoint(url, server.model)
        assert direct.vote("Who?", "I.", "You.") in ("first", "second", "tie", "unclear")
    with pytest.raises(EngineError, match="does not answer"):
        direct.vote("Who?", "I.", "You.")


class Stub(http.server.BaseHTTPRequestHandler):
    replies: list
    bodies: list

    def do_POST(self):
        self.bodies.append((self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        status, body = self.replies.pop(0)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    Stub.replies, Stub.bodies = [], []
    server = http.server.HTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "wise")
    server.shutdown()
    server.server_close()


def test_what_an_endpoint_is_asked_and_how_it_may_fail(stub, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    Stub.replies = [(503, {}), (200, {"choices": [{"message": {"content": "[[B]]"}}]})]
    assert stub.vote("Who?", "I.", "You.") == "second"
    headers, body = Stub.bodies[1]
    assert headers["Authorization"] == "Bearer a-key" and body["model"] == "wise" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert text.index("Who?") < text.index("I.") < text.index("You.") and "child" not in text
    Stub.replies = [(404, {"error": "no such model"})]
    with pytest.raises(EngineError, match=r"error 404.*no such model"):
        stub.vote("Who?", "I.", "You.")
    Stub.replies = [(200, {"choices": []})]
    with pytest.raises(EngineError, match="does not answer as OpenAI's"):
        stub.vote("Who?", "I.", "You.")


OK = (200, {"choices": [{"message": {"content": "[[B]]"}}]})


@pytest.mark.parametrize(
    ("complaint", "settings"),
    [
        (
            "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            {"temperature", "max_completion"},
        ),
        ("Unsupported value: 'temperature' does not support 0 with this model.", {"max_tokens"}),
        ("extra inputs: max_tokens", {"temperature"}),
    ],
)
def test_a_server_that_refuses_a_setting_is_asked_as_it_says(stub, complaint, settings):
    Stub.replies = [(400, {"error": {"message": complaint}}), OK, OK]
    assert stub.vote("Who?", "I.", "You.") == "second"
    changed = set(Stub.bodies[1][1]) - {"model", "messages"}
    assert {name.removesuffix("_tokens") if "completion" in name else name for name in changed} == settings
    # And so from then on.
    assert stub.vote("Who?", "I.", "You.") == "second" and set(Stub.bodies[2][1]) == set(Stub.bodies[1][1])


def test_a_server_that_goes_on_refusing(stub):
    Stub.replies = [(400, {"error": "no temperature"}), (400, {"error": "no temperature"})]
    with pytest.raises(EngineError, match=r"error 400: .*no temperature"):
        stub.vote("Who?", "I.", "You.")


def test_questions_without_a_verdict_do_not_count():
    win = {"child first": "first", "parent first": "second"}
    silent = {"child first": "no verdict", "parent first": "second"}
    found = outcome([win, silent])
    assert (found["questions"], found["wins"], found["ties"], found["questions_without_verdict"]) == (1, 1, 0, 1)
    assert "1 more questions got no verdict" in show_judgement({**found, "judge": "j"})
    with pytest.raises(EngineError, match="empty, or nothing but thoughts"):
        outcome([silent])


def test_mistakes(tiny_run, tiny_parent, questions):
    judge = ("judge", tiny_parent, "--questions", questions)
    check_refused(*judge, contains=["Say who judges"])
    check_refused(*judge, "--person", "--judge", "http://x/v1", "--model", "m", contains=["Say who judges"])
    check_refused(*judge, "--judge", "http://x/v1", contains=["--model NAME"])
    check_refused(*judge, "--person", contains=["--parent CHECKPOINT"])
