"""Tiny checkpoints and GGUF files as people have them, and ways to spoil them."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
"""Ids 0, 1, 2, 3; bytes are 4 to 259, then two merged tokens."""
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 3,
}
AWKWARD = "Steps:\n\n1. Do 23\t4  x's \r\n I'LL   été\u00a0 42½\n"


def byte_tokenizer(pre=None, specials=SPECIALS, eos="<|endoftext|>", bos=None, template=CHATML, extra=()):
    """One token for each byte, and two spaces or two digits as one."""
    names = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra, "ĠĠ", "23"]
    raw = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("Ġ", "Ġ"), ("2", "3")]))
    raw.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(specials))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, bos_token=bos, pad_token="<pad>")
    fast.chat_template = template
    return fast


def tiny(folder, family="llama", tokenizer=None, dtype=torch.float32, shards=False, **changes):
    """A random checkpoint folder; biases are no zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **changes})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="200KB" if shards else "50GB")
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return Path(folder)


def edit(path, drop=(), **changes):
    """Change fields of a JSON file."""
    data = {**json.loads(Path(path).read_text()), **changes}
    Path(path).write_text(json.dumps({key: value for key, value in data.items() if key not in drop}))


def reweigh(folder, change):
    """`change` a dictionary of the folder's tensors in place and write them back."""
    file = Path(folder) / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def logits_of(model, tokens=48):
    """A model's logits of fixed random tokens, of bytes only."""
    ids = torch.randint(4, 260, (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.float()


def theirs(folder, **arguments):
    """transformers' own model of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **arguments)


ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "qwen3_5_text": "qwen35"}
"""llama.cpp's names of families, where they are others than transformers'."""


def write_gguf(folder, path, pre="gpt-2", fields=(), tensors=None, vocabulary=None, zeros=()):
    """A checkpoint folder as a GGUF file, as llama.cpp's converter writes it.

    Args:
        fields: (method of GGUFWriter, its arguments...) for more fields.
        tensors: more tensors, by GGUF's name; None leaves one out.
        vocabulary: (tokens, scores, types) of a SentencePiece model instead of the folder's byte-level tokenizer.
        zeros: GGML types by names of tensors that are zeros.
    """
    model = theirs(folder)
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    _write_fields(writer, config)
    writer.add_vocab_size(config.vocab_size)
    _write_vocabulary(writer, folder, config, pre, vocabulary)
    for name, *arguments in fields:
        getattr(writer, name)(*arguments)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    stored = {}
    for name, weight in model.state_dict().items():
        if not (config.tie_word_embeddings and name == "lm_head.weight"):
            stored |= _as_stored(name, weight, config, names)
    stored |= tensors or {}
    for name, weight in stored.items():
        if name in zeros:
            kind = zeros[name]
            shape = gguf.quants.quant_shape_to_byte_shape(weight.shape, kind)
            writer.add_tensor(name, np.zeros(shape, np.uint8), raw_dtype=kind)
        elif weight is not None:
            writer.add_tensor(name, np.ascontiguousarray(weight.to(torch.float32).numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _write_fields(writer, config):
    """Fields that differ by family."""
    family = config.model_type
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.norm_eps if family == "lfm2" else config.rms_norm_eps)
    if family == "lfm2":
        attends = [kind == "full_attention" for kind in config.layer_types]
        writer.add_head_count_kv([config.num_key_value_heads * is_so for is_so in attends])
        writer.add_shortconv_l_cache(config.conv_L_cache)
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    if not family.startswith("gemma"):
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if head_dim * config.num_attention_heads != config.hidden_size or family.startswith(("gemma", "qwen3_")):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family == "phi3" and rope["rope_type"] == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if family == "qwen3_5_text":
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_state_size(config.linear_key_head_dim)
        writer.add_ssm_group_count(config.linear_num_key_heads)
        writer.add_ssm_time_step_rank(config.linear_num_value_heads)
        writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
        writer.add_full_attention_interval(2)


def _as_stored(name, weight, config, names):
    """The tensors that one weight becomes, by GGUF's names."""
    family = config.model_type
    if name.endswith("experts.gate_up_proj"):
        layer = name.split(".")[2]
        gate, up = weight.chunk(2, 1)
        return {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
    if name.endswith("dt_bias"):
        return {f"blk.{name.split('.')[2]}.ssm_dt.bias": _tiled(weight, config)}
    new = names.get_name(name, try_suffixes=(".weight", ".bias"))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads and family in ("llama", "smollm3", "granite"):
        weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    if family == "qwen3_5_text":
        weight = _of_qwen35(name, weight, config)
    if name.endswith("norm.weight") and (
        family.startswith("gemma") or (family == "qwen3_5_text" and "attn.norm" not in name)
    ):
        weight = weight + 1
    if "conv.conv" in name:
        weight = weight.squeeze(1)
    return {new if new.endswith((".weight", ".bias", "ssm_a")) else f"{new}.weight": weight}


def _of_qwen35(name, weight, config):
    """Value heads in the order of llama.cpp, the decay as it is used, the convolution without its middle size."""
    keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    if name.endswith("A_log"):
        return -_tiled(weight, config).exp()
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        weight = torch.cat([weight[:keys], _tiled(weight[keys:], config)])
        return weight.squeeze(1)
    if name.endswith("linear_attn.out_proj.weight"):
        return _tiled(weight.T, config).T
    return (
        _tiled(weight, config)
        if name.endswith(("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight"))
        else weight
    )


def _tiled(weight, config):
    """Rows of value heads, by key head before, one of each key head after another now."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return weight.reshape(keys, values // keys, -1, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)


def _write_vocabulary(writer, folder, config, pre, vocabulary):
    if vocabulary is not None:
        tokens, scores, types = vocabulary
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
    else:
        data = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]
        tokens = sorted(data["vocab"], key=data["vocab"].get)
        types = [3 if token in SPECIALS else 1 for token in tokens]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([" ".join(pair) for pair in data["merges"]])
        if pre is not None:
            writer.add_tokenizer_pre(pre)
    tokens = [*tokens, *(f"[PAD{i}]" for i in range(len(tokens), config.vocab_size))]
    writer.add_token_list(tokens)
    writer.add_token_types([*types, *[5] * (config.vocab_size - len(types))])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
