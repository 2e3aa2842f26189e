"""transformers as a user without puzzle-nas has it."""

import sys
import time

from protocol import answer_requests, peak_bytes

sys.modules["puzzle_nas"] = None  # pyright: ignore[reportArgumentType]  # importing it fails from here on

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, GenerationConfig  # noqa: E402


def _cache_of(output):
    """The KV cache after a pass, and the name that it is given back by: renamed in transformers 5.24."""
    name = next(name for name in ("cache", "past_key_values") if name in output)
    return name, output[name]


class Transformers:
    """Answers from `AutoModelForCausalLM` with remote code. Weights keep their precision, arithmetic is float32."""

    def load(self, folder, precision, threads, chunk_tokens, **_):
        """See engines/base.py. `chunk_tokens`: prompts run in pieces of so many tokens, through the cache."""
        if threads:
            torch.set_num_threads(threads)
        dtype = torch.float32 if chunk_tokens else getattr(torch, precision)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()
        # Greedy choices are compared with those of the logits alone: no penalties, no end.
        self.model.generation_config = GenerationConfig()
        self.chunk_tokens = chunk_tokens

    def version(self):
        """What computes."""
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    @torch.inference_mode()
    def log_probabilities(self, prompts):
        """One batch, padded on the left."""
        tokens, mask = self._batch(prompts)
        size = self.chunk_tokens or tokens.shape[1]
        cache, logits = {}, []
        for start in range(0, tokens.shape[1], size):
            chunk = tokens[:, start : start + size]
            output = self.model(
                chunk,
                attention_mask=mask[:, : start + size],
                use_cache=True,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0)[:, start : start + size],
                **cache,
            )
            cache = dict([_cache_of(output)])
            logits.append(output.logits)
        logits = torch.cat(logits, 1)[:, :-1].float().log_softmax(-1)
        chosen = logits.gather(-1, tokens[:, 1:, None])[..., 0]
        return [row[len(row) - len(prompt) + 1 :].tolist() for row, prompt in zip(chosen, prompts, strict=True)]

    def continue_greedily(self, prompts, num_tokens):
        """`generate`, one batch, padded on the left."""
        tokens, mask = self._batch(prompts)
        output = self._generate(tokens, mask, num_tokens)
        return output[:, tokens.shape[1] :].tolist()

    def time_request(self, batch_size, prefill_tokens, decode_steps):
        """`generate` with one new token, and with all of them."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, prefill_tokens)
        tokens = torch.randint(0, self.model.config.vocab_size, shape, generator=generator)
        mask = torch.ones_like(tokens)
        prefill = self._milliseconds(tokens, mask, 1)
        whole = self._milliseconds(tokens, mask, 1 + decode_steps) if decode_steps else prefill
        return {"prefill_ms": prefill, "decode_step_ms": max(0.0, whole - prefill) / max(1, decode_steps)}

    def time_parts(self, batch_size, prefill_tokens, decode_steps, measured_steps):
        """The measured steps follow a prompt that reaches to the middle of the decode."""
        prefill = self.time_request(batch_size, prefill_tokens, 0)["prefill_ms"]
        middle = prefill_tokens + (decode_steps - measured_steps) // 2
        step = self.time_request(batch_size, middle, measured_steps)["decode_step_ms"]
        return {"prefill_ms": prefill, "decode_step_ms": step}

    @torch.inference_mode()
    def memory(self):
        """See engines/base.py."""
        peak, tokens = peak_bytes(), torch.zeros((1, 8), dtype=torch.long)
        layers = _cache_of(self.model(tokens, use_cache=True))[1].layers
        held = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        num_bytes = sum(tensor.nbytes for tensor in held if tensor is not None)
        return {"peak_bytes": peak, "kv_cache_bytes_per_token": num_bytes // tokens.numel()}

    def _generate(self, tokens, mask, num_tokens):
        return self.model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    def _milliseconds(self, tokens, mask, num_tokens):
        start = time.perf_counter()
        self._generate(tokens, mask, num_tokens)
        return 1e3 * (time.perf_counter() - start)

    @staticmethod
    def _batch(prompts):
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        return tokens, mask


answer_requests(Transformers())
