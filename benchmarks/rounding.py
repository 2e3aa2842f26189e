"""KL of SmolLM2-135M-Instruct with its blocks rounded to each format by each method, on other text.

The parent comes from its Python package (its file holds the blocks in Q4_1 and the embeddings in Q8_0, so that these
two formats are exact for it), calibration text from the Python standard library and from the parent itself, held-out
text of 12 kinds from ../shared/data. More of the two kinds of calibration text is kept apart to choose methods by: what
a method gains there and not on held-out text belongs to that kind of text alone. Where ../shared is not here, nothing
is held out. Embeddings and head stay as they are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.common import SMOLLM2, general_files, save
from puzzle_nas.data.packing import Encoder
from puzzle_nas.errors import DataError
from puzzle_nas.evaluation.text import domain_tokens
from puzzle_nas.families import find_checkpoint
from puzzle_nas.formats.base import Format, GridFormat, Rounded
from puzzle_nas.formats.registry import FORMATS
from puzzle_nas.formats.rounding import RIDGE, better_rows, damped, descend, error_feedback, round_matrix, scale_search

LENGTH = 256
CALIBRATION_SEQUENCES = 32
"""Of each of the two kinds."""
SELECTION_SEQUENCES = 2
"""Of each of the two kinds."""
HELD_OUT_TOKENS = 128
"""Of each kind of held-out text."""
WHOLE = ("q8_0", "q5_0", "int8")
"""Besides q4_0, formats that hold every matrix of this model, whose hidden size is 576; q4_1 is exact."""
DOWN_ONLY = ("q6_k", "q5_k", "q4_k", "q4_0", "int4")
"""Compared on the down projections alone: blocks of 128 or 256 divide no other row."""
INPUTS = {"q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "gate_proj", "up_proj": "gate_proj"}
"""Whose inputs a matrix shares."""

METHODS = ("nearest", "search", "feedback_nearest_scales", "feedback_in_order", "feedback", "descent")
BEST = "descent"
"""By KL on the calibration kinds of text."""


class Subject:
    """The parent, its matrices, and texts [S, T] with its log-probabilities on those to be compared on."""

    def __init__(self) -> None:
        file = Path(find_checkpoint(SMOLLM2, Path("runs/benchmark-rounding")))
        self.model = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self.layers = self.model.model.layers
        self.matrices = {name: module for name, module in self.layers.named_modules() if isinstance(module, nn.Linear)}
        self.parent_weights = {name: module.weight.data for name, module in self.matrices.items()}
        both = CALIBRATION_SEQUENCES + SELECTION_SEQUENCES
        texts = {"library": self._tokens(["python-stdlib"], both), "own": self._own_text(both)}
        self.calibration = {name: text[:CALIBRATION_SEQUENCES] for name, text in texts.items()}
        self.compared_on = {name: text[CALIBRATION_SEQUENCES:] for name, text in texts.items()}
        try:
            held_out = [self._tokens([str(path)], 1)[:, :HELD_OUT_TOKENS] for path in general_files()]
            self.compared_on["held_out"] = torch.cat(held_out)
        except DataError as error:
            print(f"{error} Without it, methods are compared on the kinds of text that they are fitted to.")
        self.log_probabilities = {name: list(self._log_probabilities(x)) for name, x in self.compared_on.items()}

    def _tokens(self, sources: list[str], sequences: int) -> torch.Tensor:
        return domain_tokens(sources, self.tokenizer, LENGTH, sequences * LENGTH, seed=0)

    def _own_text(self, sequences: int) -> torch.Tensor:
        """What the parent writes itself, at temperature 1."""
        torch.manual_seed(0)
        start = torch.full((sequences, 1), Encoder(self.tokenizer).separator)
        length = {"min_new_tokens": LENGTH - 1, "max_new_tokens": LENGTH - 1}
        sampled = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        generate: Callable[..., torch.Tensor] = getattr(self.model, "generate")  # noqa: B009, its type asks too much
        return generate(start, attention_mask=torch.ones_like(start), **sampled, **length)

    def _log_probabilities(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        for batch in tokens.split(4):
            hidden = self.model.model(batch).last_hidden_state.flatten(0, 1)
            yield self.model.lm_head(hidden).log_softmax(-1)

    def kl(self, text: str) -> float:
        """KL(parent || model as it is now), nats per token."""
        tokens = self.compared_on[text]
        pairs = zip(self.log_probabilities[text], self._log_probabilities(tokens), strict=True)
        return sum((p.exp() * (p - q)).sum().item() for p, q in pairs) / tokens.numel()

    @contextmanager
    def changed(self):
        """Afterwards the matrices are the parent's again."""
        try:
            yield
        finally:
            for name, module in self.matrices.items():
                module.weight.data = self.parent_weights[name]


Grams = dict[str, torch.Tensor]


def inputs_of(name: str) -> str:
    """The matrix whose inputs, and whose Gram matrix, this one shares."""
    path, _, last = name.rpartition(".")
    return f"{path}.{INPUTS.get(last, last)}"


def gram_matrices(subject: Subject, tokens: torch.Tensor, first_position: int = 0) -> Grams:
    """Sum of x x' over tokens, float64, for each matrix with inputs of its own, and for the head."""
    grams: Grams = {}

    def observe(name: str):
        def hook(_, arguments) -> None:
            x_NI = arguments[0][:, first_position:].flatten(0, 1)
            grams[name] = grams.get(name, 0) + (x_NI.T @ x_NI).double()

        return hook

    observed = {name: module for name, module in subject.matrices.items() if inputs_of(name) == name}
    hooks = [module.register_forward_pre_hook(observe(name)) for name, module in observed.items()]
    for batch in tokens.split(8):
        x_NI = subject.model.model(batch).last_hidden_state.flatten(0, 1)
        grams["head"] = grams.get("head", 0) + (x_NI.T @ x_NI).double()
    for hook in hooks:
        hook.remove()
    return grams


class Roundings:
    """Each matrix of the parent in one format, by methods that build on one another; made once and kept.

    Args:
        grams: of the inputs of the untouched parent (rounding in parallel).
    """

    def __init__(self, subject: Subject, form: str, grams: Grams) -> None:
        self.form, self.weights, self.grams = FORMATS[form], subject.parent_weights, grams
        self._made: dict[tuple[str, str], Rounded] = {}

    def of(self, name: str, method: str) -> Rounded:
        """One matrix by one of `METHODS`."""
        if (name, method) not in self._made:
            self._made[name, method] = self._make(name, method)
        return self._made[name, method]

    def _make(self, name: str, method: str) -> Rounded:
        form, weight, gram = self.form, self.weights[name], damped(self.grams[inputs_of(name)], RIDGE)
        if method == "nearest" or not isinstance(form, GridFormat):
            return form.nearest(weight)
        if method == "search":
            return scale_search(form, weight, gram.diagonal())
        if method.startswith("feedback"):
            grid = self.of(name, "nearest" if method == "feedback_nearest_scales" else "search").grid
            assert grid is not None
            return error_feedback(form, weight, gram, grid, by_activation=method == "feedback")
        start = better_rows(weight, gram, *(self.of(name, earlier) for earlier in ("feedback", "search", "nearest")))
        return descend(form, weight, gram, start)

    def put(self, subject: Subject, method: str, only: str = "") -> None:
        """Exchange every matrix, or those whose name ends with `only`."""
        for name, module in subject.matrices.items():
            if name.endswith(only):
                module.weight.data = self.of(name, method).dequantised()


def round_sequential(subject: Subject, form: Format, tokens: torch.Tensor) -> None:
    """Round every matrix with the Gram matrix of what reaches it from the already rounded model below."""

    def observe(owner: str):
        def hook(_, arguments) -> None:
            x_NI = arguments[0].flatten(0, 1)
            gram = (x_NI.T @ x_NI).double()
            for name, module in subject.matrices.items():
                if inputs_of(name) == owner:
                    module.weight.data = round_matrix(form, subject.parent_weights[name], gram).dequantised()

        return hook

    owners = {name: module for name, module in subject.matrices.items() if inputs_of(name) == name}
    hooks = [module.register_forward_pre_hook(observe(name)) for name, module in owners.items()]
    hidden = subject.model.model.embed_tokens(tokens)
    positions = subject.model.model.rotary_emb(hidden, position_ids=torch.arange(tokens.shape[1]).unsqueeze(0))
    for layer in subject.layers:
        hidden = layer(hidden, position_embeddings=positions)
    for hook in hooks:
        hook.remove()


class Trials:
    """Rounded models, measured and printed one after the other."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.figures: dict[str, float] = {}

    def measure(self, name: str, make: Callable[[], None], everywhere: bool = False) -> None:
        """Round, and keep KL by text (or held out alone) as `kl_TEXT_NAME`, and the seconds that rounding took."""
        with self.subject.changed():
            start = time.perf_counter()
            make()
            seconds = time.perf_counter() - start
            texts = list(self.subject.compared_on)
            kl = {text: self.subject.kl(text) for text in (texts if everywhere else texts[-1:])}
        self.figures |= {f"kl_{text}_{name}": value for text, value in kl.items()}
        self.figures[f"seconds_{name}"] = seconds
        save("rounding", self.figures)
        print(f"{name:45s}" + "".join(f"{text:>10s} {value:.4f}" for text, value in kl.items()), f"{seconds:6.1f} s")
        sys.stdout.flush()


def compare_methods(trials: Trials, roundings: dict[str, Roundings], alone: dict[str, Roundings]) -> None:
    """Methods in 4 bits, on which text they are fitted, in sequence; then other formats."""
    subject = trials.subject
    for method in METHODS:
        trials.measure(f"q4_0_{method}", partial(roundings["q4_0"].put, subject, method), everywhere=True)
    for kind, fitted in alone.items():
        for method in ("search", "feedback"):
            trials.measure(f"q4_0_{method}_fitted_to_{kind}", partial(fitted.put, subject, method), everywhere=True)
    make = partial(round_sequential, subject, FORMATS["q4_0"], all_calibration(subject))
    trials.measure(f"q4_0_{BEST}_sequential", make, everywhere=True)
    for name in WHOLE:
        for method in ("nearest", BEST):
            trials.measure(f"{name}_{method}", partial(roundings[name].put, subject, method))
    for name in DOWN_ONLY:
        for method in ("nearest", BEST):
            trials.measure(f"down_{name}_{method}", partial(roundings[name].put, subject, method, only="down_proj"))


def compare_text(trials: Trials) -> None:
    """What error feedback gains from more tokens, and loses by the first tokens, whose activations are massive."""
    subject, tokens = trials.subject, all_calibration(trials.subject)
    for name, grams in (
        ("half_the_tokens", gram_matrices(subject, tokens[::2])),
        ("without_first_tokens", gram_matrices(subject, tokens, first_position=1)),
    ):
        fitted = Roundings(subject, "q4_0", grams)
        trials.measure(f"q4_0_feedback_{name}", partial(fitted.put, subject, "feedback"), everywhere=True)


def all_calibration(subject: Subject) -> torch.Tensor:
    """Both kinds of calibration text, [S, T]."""
    return torch.cat(list(subject.calibration.values()))


def both(grams: dict[str, Grams]) -> Grams:
    """Gram matrices of both kinds of calibration text."""
    return {name: gram + grams["own"][name] for name, gram in grams["library"].items()}


@torch.no_grad()
def main() -> None:
    """Print each figure, keep all."""
    torch.set_num_threads(1)
    subject = Subject()
    grams = {kind: gram_matrices(subject, tokens) for kind, tokens in subject.calibration.items()}
    roundings = {name: Roundings(subject, name, both(grams)) for name in {"q4_0", *WHOLE, *DOWN_ONLY}}
    alone = {kind: Roundings(subject, "q4_0", its) for kind, its in grams.items()}
    trials = Trials(subject)
    compare_methods(trials, roundings, alone)
    compare_text(trials)
    print("Written to", save("rounding", trials.figures))
