"""lm-eval's view of a model: its own prompts, filters and metrics on our log-likelihoods. Needs lm-eval."""

from __future__ import annotations

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from puzzle_nas.evaluation.models import Evaluated
from puzzle_nas.scoring.likelihood import log_likelihoods


class HarnessModel(HFLM):
    """Generates as lm-eval does; takes logits only where a continuation stands, and their softmax in float32."""

    def __init__(self, model: Evaluated, on_requests=lambda number: None):
        super().__init__(pretrained=model.whole, tokenizer=model.tokenizer, backend="causal", batch_size=8)
        self.evaluated, self.on_requests = model, on_requests

    def loglikelihood(self, requests, disable_tqdm=True):
        # Without lm-eval's own bars: ours is shown.
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        pairs = [(context, continuation) for _, context, continuation in requests]
        return log_likelihoods(self.evaluated, pairs, self.max_length, self.on_requests)


def choice_task(name: str, items: list[dict]) -> ConfigurableTask:
    """A multiple-choice task of our own items: dictionaries of question, choices, and the answer's index."""
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(items)},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "num_fewshot": 0,
        }
    )
