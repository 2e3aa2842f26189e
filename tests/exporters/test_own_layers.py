"""GGUF files of a family's own architecture: what they say is read again, what they cannot say is refused by name."""

import gguf
import pytest
import torch

from puzzle_nas.errors import ExportError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import build
from puzzle_nas.families.loading import load_with_tokenizer
from puzzle_nas.machine import Machine
from puzzle_nas.specs import GatedFFN, GroupedAttention, Mixture, NoOp
from tests.exporters.children import EMPTY, OWN_LAYERS, in_formats, own_layers_of, without_layers

MACHINE = Machine(torch.device("cpu"), torch.float32)
TOKENS_BT = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(0))


def written(child, folder):
    exporter = EXPORTERS["gguf"]
    exporter.refuse(child)
    exporter.write(child, folder, "float32")
    assert exporter.differing(child, folder, "float32") == []
    return folder / "model.gguf"


@pytest.mark.parametrize("name", OWN_LAYERS)
@pytest.mark.parametrize("made", [own_layers_of, without_layers], ids=["whole", "without layers"])
def test_files_read_again_are_the_child(name, made, tmp_path):
    child = made(name)
    read, _ = load_with_tokenizer(written(child, tmp_path), MACHINE)
    kept = [block for block in child.architecture.layers if not all(spec.empty for spec in block.values())]
    assert read.config.num_hidden_layers == len(kept)
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS_BT).logits, child.model(TOKENS_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_files_in_formats_hold_the_childs_codes(name, tmp_path):
    child = in_formats(own_layers_of(name), ["q8_0", None, "q5_0"])
    read, _ = load_with_tokenizer(written(child, tmp_path), MACHINE)
    with torch.no_grad():
        torch.testing.assert_close(read(TOKENS_BT).logits, child.model(TOKENS_BT).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("phi3", {"sliding_window": 8}, "a sliding window, which llama.cpp leaves out of phi3"),
        ("phi3", {"sliding_window": 256}, None),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings = False, where .*gemma2 would take True"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping = None, where .* would take 50"),
        ("gemma3_text", {"query_pre_attn_scalar": 9}, "query_pre_attn_scalar = 9, where .*gemma3 would take 16"),
        ("gemma3_text", {"hidden_activation": "silu"}, "hidden_activation = silu, where .* would take gelu"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True, where .*qwen3 would take False"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            "use_sliding_window = True",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_parameters = ",
        ),
        (
            "smollm3",
            {"no_rope_layers": [1, 0] * 4},
            r"no_rope_layers = \[1, 0, .*smollm3 would take \[1, 1, 1, 0, 1, 1, 1, 0\]",
        ),
        ("smollm3", {"no_rope_layer_interval": 2, "no_rope_layers": [1, 1, 1, 0] * 2}, None),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window = 8, where .* would take None"),
        ("smollm3", {"attention_bias": True}, "attention_bias = True, where .*smollm3 would take False"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias = True, where .*smollm3 would take False"),
        ("olmo2", {"attention_bias": True}, "attention_bias = True, where .*olmo2 would take False"),
        ("olmo2", {"tie_word_embeddings": True}, "its LM head is its embeddings, where olmo2 has one of its own"),
        ("olmo2", {"head_dim": 32}, "olmo2 does not say all of it .*olmo2.attention.key_length: 32"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier = 0.0, where .*granite would take 0.25"),
        ("granite", {"residual_multiplier": 0.0}, "residual_multiplier = 0.0, where .*granite would take 1.0"),
        ("granite", {"embedding_multiplier": 0.0}, "embedding_multiplier = 0.0, where .*granite would take 1.0"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob = False, where .*qwen3moe would take True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\], where .*qwen3moe would take \[\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2, where .*qwen3moe would take 1"),
        ("qwen3_moe", {"hidden_act": "gelu"}, "hidden_act = gelu, where .*qwen3moe would take silu"),
        ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}, "a single expert, which llama.cpp takes for none"),
        ("qwen3_moe", {"router_aux_loss_coef": 0.5, "output_router_logits": True}, None),
    ],
)
def test_what_the_architecture_cannot_say_is_refused(name, changes, reason, tmp_path):
    child = own_layers_of(name, **changes)
    if reason is None:
        EXPORTERS["gguf"].refuse(child)
        return
    with pytest.raises(ExportError, match=reason):
        EXPORTERS["gguf"].refuse(child)


@pytest.mark.parametrize(("removed", "left"), [((0,), "1, 1, 0, 1, 1, 1, 0"), ((3,), "1, 1, 1, 1, 1, 1, 0")])
def test_layers_whose_number_would_give_them_other_positions_are_refused(removed, left):
    """llama.cpp gives SmolLM3's every fourth layer none; where none or every fourth goes with them, they fit."""
    with pytest.raises(ExportError, match=rf"no_rope_layers = \[{left}\], where .* would take \[1, 1, 1, 0, 1, 1, 1\]"):
        EXPORTERS["gguf"].refuse(own_layers_of("smollm3", dict.fromkeys(removed, EMPTY)))
    EXPORTERS["gguf"].refuse(own_layers_of("smollm3", dict.fromkeys((4, 5, 6, 7), EMPTY)))


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(("qwen3", spec) for spec in (GatedFFN(48), GroupedAttention(2), NoOp("ffn"))),
        *(("qwen3_moe", spec) for spec in (Mixture(4, 3, 32), Mixture(8, 2, 32), Mixture(8, 3, 16), NoOp("experts"))),
    ],
)
def test_other_sizes_are_refused(name, spec):
    with pytest.raises(ExportError, match=rf"in the parent's sizes only, and no {spec.id} \(layer 2\)"):
        EXPORTERS["gguf"].refuse(own_layers_of(name, {2: [spec]}))


def test_routers_stay_in_float32_whatever_the_rest_is_in(tmp_path):
    """As llama.cpp's own converter leaves them; experts are split into its three tensors of them."""
    child = in_formats(own_layers_of("qwen3_moe"), ["q8_0"])
    EXPORTERS["gguf"].write(child, tmp_path, "bfloat16")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.3.ffn_gate_inp.weight"] == "F32" and types["token_embd.weight"] == "BF16"
    assert {types[f"blk.3.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")} == {"Q8_0"}
    assert EXPORTERS["gguf"].differing(child, tmp_path, "bfloat16") == []


def test_norms_are_as_llama_cpp_multiplies_by_them(tmp_path):
    """Gemma's at zero change nothing: in the file they are ones."""
    child = own_layers_of("gemma3_text")
    weights = {n: torch.zeros_like(w) if "norm" in n else w for n, w in child.model.state_dict().items()}
    read, _ = load_with_tokenizer(written(Child(build(child.config, weights), child.tokenizer), tmp_path), MACHINE)
    assert not any(w.any() for n, w in read.state_dict().items() if "norm" in n)
