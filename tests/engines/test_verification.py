"""Every engine computes every child, and what it does not compute is caught."""

import json

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from puzzle_nas.data.sources import documents
from puzzle_nas.engines import SERVING_ENGINES
from puzzle_nas.engines.llama_cpp import LlamaCppEngine
from puzzle_nas.engines.verification import (
    AWKWARD_TEXT,
    CONTINUED_TOKENS,
    LEAST_TOKENS,
    VERIFICATION_CHUNK_TOKENS,
    cut_prompts,
    verify,
    verify_quantised,
)
from puzzle_nas.errors import EngineError, ExportError
from puzzle_nas.exporters import EXPORTERS, Child, gguf_deci
from puzzle_nas.exporters.gguf_format import GGUFExporter
from puzzle_nas.exporters.gguf_tokenizer import _LLAMA3_SPLIT
from puzzle_nas.exporters.transformers_format import TransformersExporter
from puzzle_nas.families import build
from puzzle_nas.recipe import SourceSettings
from puzzle_nas.scenario import Scenario
from puzzle_nas.specs import GroupedAttention, WindowAttention
from tests.exporters.children import (
    CHILDREN,
    EVERY_KIND,
    FAMILIES,
    NO_FFN,
    OWN_LAYERS,
    child_of,
    in_formats,
    own_layers_of,
    sentencepiece_tokenizer,
    tokenizer,
    without_layers,
)


@pytest.fixture(scope="module")
def prompts():
    source = documents(SourceSettings(source="python-stdlib"), seed=0)
    tokens = [token for _ in range(20) for token in tokenizer()(next(source)).input_ids]
    return cut_prompts(tokens, 256)


def check(exporter, child, folder, prompts, dtype="float32"):
    exporter.refuse(child)
    exporter.write(child, folder, dtype)
    return verify(exporter, SERVING_ENGINES[exporter.engine], child, folder, dtype, prompts)


def test_prompts_cross_chunk_borders_and_are_long_enough(prompts):
    assert sum(map(len, prompts)) >= LEAST_TOKENS
    assert max(map(len, prompts)) + CONTINUED_TOKENS <= 256
    lengths = {len(prompt) for prompt in prompts}
    assert {VERIFICATION_CHUNK_TOKENS - 1, VERIFICATION_CHUNK_TOKENS, VERIFICATION_CHUNK_TOKENS + 1} <= lengths
    assert max(map(len, cut_prompts(list(range(2000)), 80))) == 80 - CONTINUED_TOKENS
    with pytest.raises(ExportError, match="more text than the 100 tokens"):
        cut_prompts(list(range(100)), 256)


@pytest.mark.parametrize("name", CHILDREN)
def test_llama_cpp_computes_every_child(name, tmp_path, prompts):
    found = check(GGUFExporter(), child_of(CHILDREN[name]), tmp_path, prompts)
    assert found["max_nats"] < 1e-4
    assert found["continued_tokens"] == CONTINUED_TOKENS * len(prompts)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_every_family_that_is_not_refused(name, tmp_path, prompts):
    assert check(GGUFExporter(), child_of(EVERY_KIND, **FAMILIES[name]), tmp_path, prompts)["max_nats"] < 1e-4


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_llama_cpp_computes_parents_own_layers(name, tmp_path, prompts):
    """Windows of 8 tokens, scales, norms and positions as each family has them; and without some of the layers."""
    for folder, made in ("whole", own_layers_of), ("without layers", without_layers):
        (tmp_path / folder).mkdir()
        found = check(GGUFExporter(), made(name), tmp_path / folder, prompts)
        # llama.cpp has Gemma's GELU from a table in 16 bits.
        assert found["max_nats"] < (2e-3 if name.startswith("gemma") else 1e-4)


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_llama_cpp_computes_parents_own_layers_in_formats(name, tmp_path, prompts):
    child = in_formats(own_layers_of(name), ["q8_0", None, "q5_0"])
    exporter = GGUFExporter()
    found = check(exporter, child, tmp_path, prompts)
    assert found["max_nats"] < LlamaCppEngine.tolerances["q8_0"].max_nats
    assert exporter.differing(child, tmp_path, "float32") == []
    types = SERVING_ENGINES["llama.cpp"].tensor_types(tmp_path)
    assert set(types) == {"Q8_0", "F32", "Q5_0"}


def test_llama_cpp_reads_digits_apart_where_the_child_does(tmp_path, prompts):
    child = Child(child_of().model, tokenizer(individual_digits=True))
    check(GGUFExporter(), child, tmp_path, prompts)


@pytest.mark.parametrize("whole_first", [True, False])
def test_llama_cpp_takes_whole_tokens_first_where_the_child_does(whole_first, tmp_path, prompts):
    """Cut as Llama 3 does, with a token that no merge leads to."""
    data = json.loads(tokenizer().backend_tokenizer.to_str())
    split = {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = data["pre_tokenizer"] | {"use_regex": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    data["model"]["ignore_merges"] = whole_first
    data["model"]["merges"].remove(["Ġ", "f"])
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), eos_token="</s>")
    assert theirs.tokenize("def f") == ["de", "f", *(["Ġf"] if whole_first else ["Ġ", "f"])]
    check(GGUFExporter(), Child(child_of().model, theirs), tmp_path, prompts)


@pytest.mark.parametrize("as_normaliser", [True, False])
def test_llama_cpp_reads_text_as_a_sentencepiece_tokenizer_does(as_normaliser, tmp_path):
    theirs = sentencepiece_tokenizer(as_normaliser)
    child = Child(child_of(vocab_size=len(theirs)).model, theirs)
    source = documents(SourceSettings(source="python-stdlib"), seed=1)
    prompts = cut_prompts(
        [token for _ in range(20) for token in theirs(next(source), add_special_tokens=False).input_ids], 256
    )
    check(GGUFExporter(), child, tmp_path, prompts)
    ids = theirs(AWKWARD_TEXT).input_ids
    assert any(theirs.convert_ids_to_tokens(ids)[i].startswith("<0x") for i in range(len(ids)))


def test_a_sentencepiece_tokenizer_that_merges_otherwise_is_caught(tmp_path, prompts, monkeypatch):
    theirs = sentencepiece_tokenizer(True)
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_scores", _turned_round(gguf.GGUFWriter.add_token_scores))
    with pytest.raises(ExportError, match="reads text otherwise than the child's tokenizer"):
        check(GGUFExporter(), Child(child_of(vocab_size=len(theirs)).model, theirs), tmp_path, prompts)


def _turned_round(add_token_scores):
    return lambda writer, scores: add_token_scores(writer, [-score for score in scores])


def test_a_tokenizer_that_splits_text_otherwise_is_caught(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr("puzzle_nas.exporters.gguf_tokenizer._pre_tokenizer_name", lambda _: "smollm")
    with pytest.raises(ExportError, match="reads text otherwise than the child's tokenizer, after 'Zwölf'"):
        check(GGUFExporter(), child_of(), tmp_path, prompts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_llama_cpp_in_16_bits(dtype, tmp_path, prompts):
    check(GGUFExporter(), child_of(EVERY_KIND), tmp_path, prompts, dtype)


@pytest.mark.parametrize("kind", SERVING_ENGINES["llama.cpp"].quantised)
def test_llama_cpp_quantises(kind, tmp_path, prompts):
    engine, child = SERVING_ENGINES["llama.cpp"], child_of(EVERY_KIND)
    EXPORTERS["gguf"].write(child, tmp_path, "float32")
    size = (tmp_path / "model.gguf").stat().st_size
    engine.quantise(tmp_path, kind)
    assert (tmp_path / "model.gguf").stat().st_size < 0.6 * size
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert verify_quantised(EXPORTERS["gguf"], engine, child, tmp_path, kind, prompts)["mean_nats"] > 1e-5


def test_transformers_without_our_package_computes_the_child(tmp_path, prompts):
    found = check(TransformersExporter(), child_of(EVERY_KIND), tmp_path, prompts)
    assert found["max_nats"] < 1e-5


def test_windows_that_no_prompt_reaches_are_said(tmp_path, prompts, capsys):
    """Verification of a window of 4,096 tokens would otherwise be one of a layer without."""
    windows = {0: [WindowAttention(64, 2)], 1: [WindowAttention(210, 2)]}
    found = check(TransformersExporter(), child_of(windows), tmp_path, prompts)
    assert found["windows_not_reached"] == [210]
    assert "No prompt is longer than windows of 210 tokens: not verified." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("exporter", "per_layer", "num_layers", "layer"),
    [(GGUFExporter, EVERY_KIND, 8, 0), (GGUFExporter, EVERY_KIND, 8, 4), (TransformersExporter, {}, 2, 1)],
)
def test_one_permuted_weight_is_caught_and_its_layer_named(exporter, per_layer, num_layers, layer, tmp_path, prompts):
    child = child_of(per_layer, num_hidden_layers=num_layers)
    assert_a_permuted_weight_is_caught(exporter, child, layer, tmp_path, prompts)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gemma3_text", "self_attn."),
        ("smollm3", "self_attn."),
        ("olmo2", "self_attn."),
        ("granite", "self_attn."),
        ("qwen3_moe", "mlp.experts.down_proj"),
    ],
)
def test_one_permuted_weight_of_a_parents_own_layers_is_caught(name, part, tmp_path, prompts):
    """Of experts, two of them."""
    assert_a_permuted_weight_is_caught(GGUFExporter, without_layers(name), 4, tmp_path, prompts, part)


def assert_a_permuted_weight_is_caught(exporter, child, layer, folder, prompts, part=""):
    class Broken(exporter):
        def write(self, child, folder, dtype):
            if any(name.startswith(f"model.layers.{layer}.") for name in child.model.state_dict()):
                weights = child.model.state_dict()
                name = next(n for n in weights if n.startswith(f"model.layers.{layer}.{part}") and weights[n].ndim > 1)
                weights = {n: w.clone() for n, w in weights.items()}
                weights[name][[3, 5]] = weights[name][[5, 3]]
                child = Child(build(child.config, weights), child.tokenizer)
            super().write(child, folder, dtype)

    with pytest.raises(ExportError, match=rf"does not compute this child.*the first layer that differs is {layer}\b"):
        check(Broken(), child, folder, prompts)


def test_a_dropped_residual_is_caught_in_llama_cpp(tmp_path, prompts, monkeypatch):
    packed = gguf_deci.packed

    def without_idle_ffns(parts, config):
        # llama.cpp leaves out an attention that has no FFN behind it, and says nothing.
        layers = packed(parts, config)
        nothing = gguf_deci.FeedForward(0, {})
        return [(m, nothing if f.width == gguf_deci.SMALLEST_WIDTH else f) for m, f in layers[:-1]] + layers[-1:]

    monkeypatch.setattr(gguf_deci, "packed", without_idle_ffns)
    child = child_of({4: [NO_FFN]})
    with pytest.raises(ExportError, match=r"the first layer that differs is 5\b"):
        check(GGUFExporter(), child, tmp_path, prompts)


def test_a_dropped_residual_is_caught_in_transformers(tmp_path, prompts):
    class Broken(TransformersExporter):
        def write(self, child, folder, dtype):
            super().write(child, folder, dtype)
            code = folder / "modeling_puzzle.py"
            right = "layer = type(layer)(own, index)"
            assert right in code.read_text()
            # The FFN's output is lost.
            wrong = f"{right}; layer.mlp.register_forward_hook(lambda *given: 0 * given[-1])"
            code.write_text(code.read_text().replace(right, wrong))

    with pytest.raises(ExportError, match=r"the first layer that differs is 1\b"):
        check(Broken(), child_of({1: [GroupedAttention(2)]}, num_hidden_layers=2), tmp_path, prompts)


def test_a_file_damaged_after_writing_is_caught(tmp_path, prompts):
    child = child_of(EVERY_KIND)
    GGUFExporter().write(child, tmp_path, "float32")
    path = tmp_path / "model.gguf"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 1000] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(ExportError, match="the file was damaged"):
        verify(GGUFExporter(), SERVING_ENGINES["llama.cpp"], child, tmp_path, "float32", prompts)


def test_a_model_that_gives_no_numbers_is_caught(tmp_path, prompts):
    child = child_of(EVERY_KIND)
    broken = child_of(EVERY_KIND)
    broken.model.model.norm.weight.fill_(torch.nan)
    TransformersExporter().write(broken, tmp_path, "float32")
    with pytest.raises(ExportError, match="does not compute this child"):
        verify(TransformersExporter(), SERVING_ENGINES["transformers"], child, tmp_path, "float32", prompts)


def test_what_an_engine_says_is_quoted(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF and then nonsense")
    engine = SERVING_ENGINES["llama.cpp"]
    complaint = pytest.raises(EngineError, match=r"llama\.cpp failed in load: RuntimeError: .*gguf")
    with complaint, engine.load(tmp_path, "float32"):
        pass


def test_a_missing_engine_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    with pytest.raises(EngineError, match=r"llama\.cpp is not installed in .*: puzzle engine install llama\.cpp$"):
        SERVING_ENGINES["llama.cpp"].python()


def test_an_installation_that_fails_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    monkeypatch.setattr(LlamaCppEngine, "requirements", (str(tmp_path / "nothing"),))
    with pytest.raises(EngineError, match=r"^pip could not install llama\.cpp: .*nothing"):
        LlamaCppEngine().install()
    with pytest.raises(EngineError, match="is not installed"):
        LlamaCppEngine().python()
    (tmp_path / "llama.cpp" / "installed.json").write_text(json.dumps(LlamaCppEngine().made_from()))
    (tmp_path / "llama.cpp" / "bin" / "python").unlink()
    with (
        pytest.raises(EngineError, match=r"llama\.cpp's Python does not start"),
        LlamaCppEngine().load(tmp_path, "float32"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "exporter", "itemsize"), [("llama.cpp", "gguf", 2), ("transformers", "transformers", 4)]
)
def test_times_and_memory_come_from_the_engine(name, exporter, itemsize, tmp_path):
    child, engine = child_of(EVERY_KIND), SERVING_ENGINES[name]
    EXPORTERS[exporter].write(child, tmp_path, "float32")
    scenario = Scenario("chat", 3, 40, 9)
    with engine.load(tmp_path, "float32", threads=1) as loaded:
        engine.prepare(loaded)
        whole, parts = engine.time_request(loaded, scenario), engine.time_parts(loaded, scenario, 4)
        memory = engine.memory(loaded)
    assert min(whole.prefill_ms, whole.decode_step_ms, parts.prefill_ms, parts.decode_step_ms) > 0
    # Layers 1, 4 and 7 have 2, 1 and 4 KV heads of 16, keys and values.
    assert memory["kv_cache_bytes_per_token"] == 7 * 16 * 2 * itemsize
    assert memory["peak_bytes"] > 1e6
    assert json.dumps(memory)


@pytest.mark.parametrize(
    ("name", "expected"), [("qwen3", 8 * 4 * 16 * 2 * 2), ("qwen3_moe", 8 * 4 * 16 * 2 * 2), ("gemma3_text", None)]
)
def test_caches_of_parents_own_layers_have_a_size_unless_there_are_windows(name, expected, tmp_path):
    EXPORTERS["gguf"].write(own_layers_of(name), tmp_path, "float32")
    engine = SERVING_ENGINES["llama.cpp"]
    with engine.load(tmp_path, "float32", threads=1) as loaded:
        engine.prepare(loaded)
        assert engine.memory(loaded)["kv_cache_bytes_per_token"] == expected
