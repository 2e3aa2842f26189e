"""llama.cpp through the low-level interface of llama-cpp-python: many sequences in one batch, any token ids."""

import ctypes
import importlib.metadata
import os
import time
from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np
from protocol import answer_requests, peak_bytes

CHUNK_TOKENS = 512
LOG_LEVEL_ERROR = 4


class LlamaCpp:
    """One loaded file; every request gets a context of the size it needs."""

    def __init__(self):
        self._said = []
        # llama.cpp explains failures only in its log.
        self._log = llama_cpp.llama_log_callback(lambda level, text, _: self._said.append((level, text.decode())))
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self._model = None

    def load(self, folder, precision, threads, chunk_tokens, kv_format=None, **_):
        """See engines/base.py. With `chunk_tokens`, no flash attention and a float32 cache."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None
        self._path = Path(folder) / "model.gguf"
        # llama.cpp's own default is four threads, whatever the machine has; they spin.
        self._threads = threads or (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
        self._exact = chunk_tokens is not None
        self._kv_format = "f32" if self._exact else kv_format or "f16"
        self._chunk_tokens = chunk_tokens or CHUNK_TOKENS
        parameters = llama_cpp.llama_model_default_params()
        # Repacked weights are faster and less exact, and Q8_0 ones crash on machines with AMX.
        parameters.use_extra_bufts = not self._exact and "AMX" not in _system()
        self._model = llama_cpp.llama_model_load_from_file(str(self._path).encode(), parameters)
        if not self._model:
            raise RuntimeError(self._last_complaint())
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def version(self):
        """What computes."""
        return {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "system": _system(),
        }

    def tokenize(self, text):
        """Token ids of a text, with what the tokenizer adds around it; special tokens are read as text."""
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, False)
        return list(ids[:count])

    def log_probabilities(self, prompts):
        """The prompts' tokens in turn, so that every chunk holds tokens of many sequences."""
        result = [[0.0] * (len(prompt) - 1) for prompt in prompts]
        entries = [
            (sequence, position, prompt[position])
            for position in range(max(map(len, prompts)))
            for sequence, prompt in enumerate(prompts)
            if position < len(prompt)
        ]
        with Context(self, len(prompts), max(map(len, prompts))) as context:
            for start in range(0, len(entries), self._chunk_tokens):
                chunk = entries[start : start + self._chunk_tokens]
                logits = context.decode(chunk, [True] * len(chunk))
                normaliser = _log_sum_exp(logits)
                for row, (sequence, position, _) in enumerate(chunk):
                    if position + 1 < len(prompts[sequence]):
                        following = prompts[sequence][position + 1]
                        result[sequence][position] = float(logits[row, following] - normaliser[row])
        return result

    def logits(self, prompts, path):
        """See engines/base.py."""
        length = len(prompts[0])
        found = np.memmap(path, np.float32, "w+", shape=(len(prompts), length, self._vocab_size))
        entries = [(s, position, prompt[position]) for s, prompt in enumerate(prompts) for position in range(length)]
        with Context(self, len(prompts), length) as context:
            for start in range(0, len(entries), self._chunk_tokens):
                chunk = entries[start : start + self._chunk_tokens]
                for (sequence, position, _), row in zip(chunk, context.decode(chunk, [True] * len(chunk)), strict=True):
                    found[sequence, position] = row
        found.flush()

    def continue_greedily(self, prompts, num_tokens):
        """Prefill, then one step for all sequences at a time."""
        with Context(self, len(prompts), max(map(len, prompts)) + num_tokens) as context:
            tokens = context.prefill(prompts)
            result = [[int(token)] for token in tokens]
            for step in range(num_tokens - 1):
                tokens = context.step(tokens, [len(prompt) + step for prompt in prompts])
                for row, token in zip(result, tokens, strict=True):
                    row.append(int(token))
        return result

    def time_request(self, batch_size, prefill_tokens, decode_steps):
        """A whole request batch."""
        prompts = self._random_prompts(batch_size, prefill_tokens)
        with Context(self, batch_size, prefill_tokens + decode_steps) as context:
            start = time.perf_counter()
            tokens = context.prefill(prompts)
            middle = time.perf_counter()
            for step in range(decode_steps):
                tokens = context.step(tokens, [prefill_tokens + step] * batch_size)
            end = time.perf_counter()
        return {"prefill_ms": 1e3 * (middle - start), "decode_step_ms": 1e3 * (end - middle) / max(1, decode_steps)}

    def time_parts(self, batch_size, prefill_tokens, decode_steps, measured_steps):
        """The tokens up to the middle of the decode come as an untimed prefill."""
        skipped = (decode_steps - measured_steps) // 2
        prompts = self._random_prompts(batch_size, prefill_tokens + skipped)
        first = [prompt[:prefill_tokens] for prompt in prompts]
        second = [prompt[prefill_tokens:] for prompt in prompts]
        with Context(self, batch_size, prefill_tokens + decode_steps) as context:
            start = time.perf_counter()
            tokens = context.prefill(first)
            prefill = time.perf_counter() - start
            if skipped:
                tokens = context.prefill(second, prefill_tokens)
            start = time.perf_counter()
            for step in range(measured_steps):
                tokens = context.step(tokens, [prefill_tokens + skipped + step] * batch_size)
            decode = time.perf_counter() - start
        return {"prefill_ms": 1e3 * prefill, "decode_step_ms": 1e3 * decode / max(1, measured_steps)}

    def memory(self):
        """See engines/base.py."""
        fields = gguf.GGUFReader(self._path).fields
        architecture = fields["general.architecture"].contents()
        if f"{architecture}.attention.sliding_window" in fields:
            return {"peak_bytes": peak_bytes(), "kv_cache_bytes_per_token": None}
        layers, heads, key_length = (
            fields[f"{architecture}.{name}"].contents()
            for name in ("block_count", "attention.head_count_kv", "attention.key_length")
        )
        # One number of heads for all layers, or one for each.
        heads = heads * layers if isinstance(heads, int) else sum(heads)
        numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self._kv_format.upper()]]
        return {"peak_bytes": peak_bytes(), "kv_cache_bytes_per_token": int(2 * heads * key_length * size / numbers)}

    def quantise(self, source, target, kind):
        """Write `target`, the file `source` in llama.cpp's type `kind` (q8_0, q4_k_m, ...)."""
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        parameters.allow_requantize = False
        if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
            raise RuntimeError(self._last_complaint())

    def _random_prompts(self, batch_size, length):
        return np.random.default_rng(0).integers(0, self._vocab_size, (batch_size, length)).tolist()

    def _last_complaint(self):
        errors = [text.strip() for level, text in self._said if level == LOG_LEVEL_ERROR and text.strip()]
        return errors[0] if errors else "llama.cpp gave no reason"


class Context:
    """A KV cache and one batch, from `with` to the end of its block."""

    def __init__(self, owner, num_sequences, length):
        self._owner, self._num_sequences = owner, num_sequences
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_seq_max = num_sequences
        parameters.n_ctx = num_sequences * (-(-length // 256) * 256)
        parameters.n_batch = max(owner._chunk_tokens, num_sequences)
        parameters.n_ubatch = max(owner._chunk_tokens, num_sequences)
        parameters.n_threads = parameters.n_threads_batch = owner._threads
        if owner._exact:
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.type_k = parameters.type_v = getattr(llama_cpp, f"GGML_TYPE_{owner._kv_format.upper()}")
        self._chunk_tokens = parameters.n_batch
        self._context = llama_cpp.llama_init_from_model(owner._model, parameters)
        if not self._context:
            raise RuntimeError(owner._last_complaint())
        self._batch = llama_cpp.llama_batch_init(self._chunk_tokens, 0, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def decode(self, entries, wanted):
        """Logits, float32 [number wanted, vocabulary], of (sequence, position, token) entries."""
        self._batch.n_tokens = len(entries)
        for i, (sequence, position, token) in enumerate(entries):
            self._batch.token[i], self._batch.pos[i] = token, position
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, sequence
            self._batch.logits[i] = wanted[i]
        code = llama_cpp.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        size = self._owner._vocab_size
        rows = [llama_cpp.llama_get_logits_ith(self._context, i) for i, is_wanted in enumerate(wanted) if is_wanted]
        return np.stack([np.ctypeslib.as_array(row, (size,)) for row in rows]) if rows else np.empty((0, size))

    def prefill(self, prompts, first_position=0):
        """The most likely token after each prompt."""
        entries = [(s, first_position + p, token) for s, prompt in enumerate(prompts) for p, token in enumerate(prompt)]
        ends = {(s, first_position + len(prompt) - 1) for s, prompt in enumerate(prompts)}
        tokens = []
        for start in range(0, len(entries), self._chunk_tokens):
            chunk = entries[start : start + self._chunk_tokens]
            wanted = [(sequence, position) in ends for sequence, position, _ in chunk]
            tokens += self.decode(chunk, wanted).argmax(-1).tolist()
        return tokens

    def step(self, tokens, positions):
        """The most likely token after each of these."""
        entries = list(zip(range(len(tokens)), positions, tokens, strict=True))
        return self.decode(entries, [True] * len(entries)).argmax(-1).tolist()


def _system():
    """What this build can use of the processor."""
    return llama_cpp.llama_print_system_info().decode().strip()


def _log_sum_exp(logits):
    largest = logits.max(-1)
    return largest + np.log(np.exp((logits - largest[:, None]).astype(np.float64)).sum(-1))


if __name__ == "__main__":
    answer_requests(LlamaCpp())
