"""vLLM in one process: its scheduler, step by step."""

# pyright: reportMissingImports=false

import gc
import os
import re
import time
from pathlib import Path

# The scheduler in this process, so that every step can be timed from outside; and, without tensor parallelism, all.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import psutil
import torch
import transformers
import vllm
from protocol import answer_requests, peak_bytes
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

KV_CACHE_BYTES = 2 << 30
"""On CPUs; touched only as far as it is used."""
GPU_SHARE = 0.45
"""Of a GPU's memory, weights and cache together: two models are loaded at once where times are compared."""


class Vllm:
    """One loaded checkpoint."""

    def load(self, folder, precision, threads, chunk_tokens, kv_format=None, tensor_parallel=1):
        """See engines/base.py. With `chunk_tokens`, arithmetic is float32 and prompts are taken in such pieces."""
        self._llm = self._engine = None
        gc.collect()
        if threads:
            torch.set_num_threads(threads)
        exact = {"dtype": "float32", "max_num_batched_tokens": chunk_tokens, "max_num_seqs": 8, "enforce_eager": True}
        self._llm = LLM(
            folder,
            skip_tokenizer_init=True,
            # Our plugin knows the architecture; without it a checkpoint brings its own configuration class.
            trust_remote_code=not os.environ["VLLM_PLUGINS"],
            # A request that finds its prompt cached would be timed wrongly.
            enable_prefix_caching=False,
            max_model_len=-1,
            disable_log_stats=True,
            seed=0,
            kv_cache_dtype=kv_format or "auto",
            tensor_parallel_size=tensor_parallel,
            **(
                {"kv_cache_memory_bytes": KV_CACHE_BYTES}
                if current_platform.is_cpu()
                else {"gpu_memory_utilization": GPU_SHARE}
            ),
            **(exact if chunk_tokens else {"dtype": precision, "enforce_eager": "PUZZLE_VLLM_EAGER" in os.environ}),
        )
        self._engine = self._llm.llm_engine
        self._processes = tensor_parallel
        self._num_requests = 0

    def version(self):
        """What computes."""
        return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}

    def log_probabilities(self, prompts):
        """All prompts at once; vLLM forms the batches."""
        outputs = self._generate(prompts, max_tokens=1, prompt_logprobs=0)
        return [
            [chosen[token].logprob for token, chosen in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]

    def continue_greedily(self, prompts, num_tokens):
        """All prompts at once."""
        outputs = self._generate(prompts, max_tokens=num_tokens)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def time_request(self, batch_size, prefill_tokens, decode_steps):
        """The prefill ends when every request has its first token."""
        self._refuse_what_does_not_fit(batch_size, prefill_tokens + 1 + decode_steps)
        parameters = self._greedy(1 + decode_steps, output_kind=RequestOutputKind.DELTA)
        vocab_size = self._llm.model_config.get_vocab_size()
        prompts = torch.randint(vocab_size, (batch_size, prefill_tokens), generator=torch.Generator().manual_seed(0))
        waiting = set()
        for prompt in prompts.tolist():
            self._num_requests += 1
            waiting.add(str(self._num_requests))
            self._engine.add_request(str(self._num_requests), {"prompt_token_ids": prompt}, parameters)
        start = time.perf_counter()
        while waiting:
            waiting.difference_update(output.request_id for output in self._engine.step())
        middle = time.perf_counter()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        end = time.perf_counter()
        return {"prefill_ms": 1e3 * (middle - start), "decode_step_ms": 1e3 * (end - middle) / max(1, decode_steps)}

    def time_parts(self, batch_size, prefill_tokens, decode_steps, measured_steps):
        """The measured steps follow a prompt that reaches to the middle of the decode."""
        prefill = self.time_request(batch_size, prefill_tokens, 0)["prefill_ms"]
        middle = prefill_tokens + (decode_steps - measured_steps) // 2
        step = self.time_request(batch_size, middle, measured_steps)["decode_step_ms"]
        return {"prefill_ms": prefill, "decode_step_ms": step}

    def memory(self):
        """See engines/base.py."""
        return {"peak_bytes": self._peak_bytes(), "kv_cache_bytes_per_token": self._cache_bytes_per_token()}

    def _peak_bytes(self):
        if current_platform.is_cuda():
            # With several processes the memory is theirs, and vLLM does not tell.
            return torch.cuda.max_memory_reserved() if self._processes == 1 else None
        own = peak_bytes()
        return own + sum(map(_peak_of, psutil.Process().children(recursive=True) if self._processes > 1 else ()))

    def _generate(self, prompts, **settings):
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self._llm.generate(requests, self._greedy(**settings), use_tqdm=False)

    @staticmethod
    def _greedy(max_tokens, **settings):
        return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **settings)

    def _cache(self):
        return self._engine.engine_core.engine_core.scheduler.kv_cache_config

    def _cache_bytes_per_token(self):
        """Of all layers with attention, in all processes."""
        processes = self._llm.collective_rpc("get_kv_cache_spec")
        return sum(spec.page_size_bytes // spec.block_size for layers in processes for spec in layers.values())

    def _refuse_what_does_not_fit(self, batch_size, length):
        """Requests that vLLM would put off or compute twice for want of cache must not be timed."""
        longest = self._llm.model_config.max_model_len
        if length > longest:
            raise ValueError(f"requests of {length} tokens are longer than the {longest} that fit")
        if groups := self._cache().kv_cache_groups:
            block_size = groups[0].kv_cache_spec.block_size
            needed = len(groups) * batch_size * -(-length // block_size)
            if needed > self._cache().num_blocks - 1:
                raise ValueError(f"{batch_size} requests of {length} tokens do not fit into the KV cache")


def _peak_of(process):
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


# Further processes, where there are any, import this file too.
if __name__ == "__main__":
    answer_requests(Vllm())
