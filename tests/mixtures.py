"""A small mixture of experts that works, made of a dense parent."""

import torch
from transformers import MixtralConfig, MixtralForCausalLM


def upcycled(dense, tokens_ST, experts, per_token, width, steps):
    """A Mixtral made of a Llama: each expert has the FFN's channels that matter most to the tokens of one cluster.

    The router starts from the clusters' centres. Then each layer's mixture learns the FFN's output, block by block.
    """
    fields = dense.config.to_dict() | {"intermediate_size": width, "head_dim": dense.config.head_dim}
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        fields.pop(name, None)
    config = MixtralConfig(**fields, num_local_experts=experts, num_experts_per_tok=per_token)
    mixture = MixtralForCausalLM(config)
    weights = {name: w for name, w in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(weights, strict=False)
    for layer, (ffn, read) in enumerate(ffns_read(dense, tokens_ST)):
        block = mixture.model.layers[layer].mlp
        _divide(ffn, read, block)
        learn(ffn, read, block, steps)
    return mixture.eval().requires_grad_(False)


def ffns_read(dense, tokens_ST):
    """Each layer's FFN with what it reads, [N, D]."""
    read = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten(0, 1)))
        for layer in dense.model.layers
    ]
    with torch.no_grad():
        dense(tokens_ST)
    for hook in hooks:
        hook.remove()
    return zip([layer.mlp for layer in dense.model.layers], read, strict=True)


def _divide(ffn, read, block):
    experts, width = block.experts.num_experts, block.experts.intermediate_dim
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(read, dim=1)
    centres = unit[torch.randperm(len(unit), generator=generator)[:experts]]
    for _ in range(10):
        nearest = (unit @ centres.T).argmax(1)
        for number in range(experts):
            if (nearest == number).any():
                centres[number] = torch.nn.functional.normalize(unit[nearest == number].mean(0), dim=0)
    with torch.no_grad():
        block.gate.weight.copy_(4 * centres)
        for number in range(experts):
            mine = read[nearest == number] if (nearest == number).any() else read
            channels = torch.nn.functional.silu(ffn.gate_proj(mine)) * ffn.up_proj(mine)
            worth = channels.abs().mean(0) * ffn.down_proj.weight.norm(dim=0)
            kept = worth.topk(width).indices
            gate_up = torch.cat([ffn.gate_proj.weight[kept], ffn.up_proj.weight[kept]])
            block.experts.gate_up_proj[number].copy_(gate_up)
            block.experts.down_proj[number].copy_(ffn.down_proj.weight[:, kept])


def learn(teacher, read, block, steps):
    """Train what is not frozen of a mixture on what the teacher gives for tokens read, [N, D]."""
    with torch.no_grad():
        wanted = teacher(read)
    optimiser = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        rows = torch.randint(len(read), (256,), generator=generator)
        error = block(read[rows].unsqueeze(0)).squeeze(0) - wanted[rows]
        loss = (error.square().sum(1) / wanted[rows].square().sum(1).clamp_min(1e-6)).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
