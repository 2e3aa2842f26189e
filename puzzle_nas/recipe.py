"""Every setting of a run, with its bounds and what it means. No torch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from puzzle_nas.architecture import Architecture
from puzzle_nas.effort import EFFORTS, explained_efforts
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.limits import MIX, check_limit
from puzzle_nas.scenario import Scenario
from puzzle_nas.search_space import SearchSpace, build_search_space
from puzzle_nas.servable import SERVERS

PYTHON_STDLIB = "python-stdlib"
PARENT_SAMPLES = "parent-samples"
SMALL_SPLITS = ("validation", "selection", "scoring", "calibration")
"""These must be full; they are filled before `train`."""
SPLITS = ("train", *reversed(SMALL_SPLITS))


class Settings(BaseModel):
    """A part of a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceSettings(Settings):
    """One source of text."""

    source: str
    """`python-stdlib`, `parent-samples` (what the parent writes, as much as its share is), a file (.txt, .jsonl,
    .jsonl.gz, .parquet), a glob, or a hub data set."""
    weight: float = Field(default=1.0, gt=0)
    """Share of each split's tokens, relative to the other sources."""
    text_field: str = "text"
    """Column that holds a document, for JSON lines, Parquet and hub data sets: text, or the messages of a conversation.
    If there is no column `text`, `messages` or `conversations` is read."""


class DataSettings(Settings):
    """Text, and how much of it each split holds."""

    sources: list[SourceSettings] = Field(min_length=1)
    """Where text comes from."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens in a packed block."""
    train_tokens: int = Field(default=1_000_000, ge=1)
    """Tokens for BLD and GKD; if they need more, the same text is read again."""
    calibration_tokens: int = Field(default=32_768, ge=1)
    """Tokens for closed-form initialisation and refit. A quarter is held back to choose between initialisations."""
    scoring_tokens: int = Field(default=8_192, ge=1)
    """Tokens for replace-1-block scores."""
    selection_tokens: int = Field(default=8_192, ge=1)
    """Tokens on which children and checkpoints are chosen."""
    validation_tokens: int = Field(default=16_384, ge=1)
    """Tokens on which results are reported; used for nothing else."""
    separator: str | None = None
    """Token after each document of plain text; null means the tokenizer's end of text or, if that ends a turn of a
    conversation, its `<|endoftext|>` or similar. Conversations end with their own last token."""

    def blocks(self, split: str) -> int:
        """Of one split: its tokens, rounded up to whole blocks."""
        return math.ceil(getattr(self, f"{split}_tokens") / self.sequence_length)

    def sampled_tokens(self) -> int:
        """How much the parent writes: the share of `parent-samples` in all splits, and a little to choose from."""
        weight = sum(source.weight for source in self.sources if source.source == PARENT_SAMPLES)
        share = weight / sum(source.weight for source in self.sources)
        blocks = sum(map(self.blocks, SPLITS))
        return math.ceil((1.02 * share * blocks + bool(weight)) * self.sequence_length)


Mixer: TypeAlias = Literal["attention", "ffn"]


class SearchSpaceSettings(Settings):
    """Which variants each layer may become (Puzzle, section 2)."""

    kv_heads: list[int] | None = None
    """KV-head counts besides the parent's; null means every smaller number that divides the parent's."""
    windows: list[Annotated[int, Field(ge=1)]] = []
    """Sliding windows of attention in tokens, offered in layers that see more in the parent."""
    width_fractions: list[float] = [0.75, 0.5, 0.25, 0.1]
    """Widths of FFNs and of experts as fractions of the parent's, rounded to multiples of 32."""
    expert_counts: list[Annotated[float, Field(gt=0)]] = [0.75, 0.5, 0.25]
    """Experts that a mixture keeps: below 1 a share of the parent's, else a number. A variant of a mixture changes only
    one of: this, `experts_per_token`, the experts' width."""
    experts_per_token: list[Annotated[float, Field(gt=0)]] = [0.5]
    """Experts that a token goes to: below 1 a share of the parent's, else a number."""
    linear: list[Mixer] = ["attention", "ffn"]
    """What one matrix may replace: `attention` is every slot that mixes tokens, `ffn` every other slot."""
    no_op: list[Mixer] = ["attention", "ffn"]
    """What may be left out; the names mean the same as in `linear`."""
    layers: dict[int, list[str]] = {}
    """Ids of the variants that a layer may become, such as `{0: [ffn.w768, attention.no_op]}`, in any format. Layers
    not named may become any."""
    formats: list[str] = []
    """Formats in which sub-blocks may be stored besides the model's precision. For llama.cpp, embeddings and LM head
    too: q8_0, q6_k, q5_k, q5_0, q4_k, q4_1, q4_0, f16. For vllm: int8, int4. See docs/formats.md."""


class LibrarySettings(Settings):
    """How variants start before any training."""

    initialisation: Literal["least_squares", "paper", "random"] = "least_squares"
    """In closed form, to match the parent's output; the paper's way (section 2); or random weights."""


class BLDSettings(Settings):
    """Blockwise local distillation: each variant alone (Puzzle, section 2: decoupled) and, with `coupled_tokens`, then
    in pairs."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. The best of those tried on SmolLM2-135M; wider parents may need less."""
    tokens: int = Field(default=65_536, ge=0)
    """Training tokens for each variant; 0 skips BLD."""
    batch_tokens: int = Field(default=2_048, ge=1)
    """Tokens in one step."""
    shard_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose activations are on disk at once (6 x hidden size bytes each in bfloat16); null means all. More
    tokens are trained on shard by shard, with each variant's optimiser on disk in between."""
    coupled_tokens: int = Field(default=0, ge=0)
    """Training tokens for each pair in coupled BLD (Puzzle, section 2); 0 skips it. Variants that a first search uses
    are trained further in pairs, attention and FFN of a layer together, and the search is repeated."""
    coupled_solutions: int = Field(default=4, ge=1)
    """How many solutions of the first search say which variants are paired; they differ in eight positions or more."""


class CostSettings(Settings):
    """How runtimes are measured."""

    file: Path | None = None
    """A cost table to use instead of measuring. It must come from this machine, engine, precision and thread count."""
    force: bool = False
    """Accept `file` from anywhere, to search on one machine for another."""
    mixtures: int = Field(default=24, ge=1)
    """Random architectures that are timed besides one stack for each variant. More of them predict times better."""


class ScoringSettings(Settings):
    """Replace-1-block scores (Puzzle, section 2)."""

    metric: Literal["kl", "lm_loss", "task_margin", "task_accuracy"] = "kl"
    """`kl`: KL(parent || child) in nats per token. `lm_loss`: the increase in LM loss. (Both are always recorded.)
    `task_margin` and `task_accuracy`: what is lost on a task (Puzzle, Table 9), in the log-likelihood of the right
    choice minus that of the best wrong one, in nats, or in the share answered right."""
    task: Path | None = None
    """The task for `task_margin` and `task_accuracy`: JSON lines with `question`, `choices` and `answer`. Half of the
    items, by a hash of each, are for scores; `puzzle evaluate` reports on the others."""
    unit: Literal["sub_block", "block"] = "sub_block"
    """Replace one sub-block at a time (m + n scores a layer), or attention and FFN together as in the paper (m x n)."""

    @property
    def by_task(self) -> bool:
        """Whether scores are what a task loses."""
        return self.metric.startswith("task_")


class SearchSettings(Settings):
    """What the child must meet."""

    limits: dict[str, float] = {"speedup": 1.3}
    """`speedup`, `throughput_tokens_per_second` (at least); `latency_ms`, `time_to_first_token_ms`,
    `time_per_output_token_ms`, `memory_bytes`, `parameters` (at most). Times and throughput hold in every scenario, or
    in one (`latency_ms@chat`), or on the weighted mean (`latency_ms@mix`)."""
    servable_by: list[Literal["transformers", "vllm", "vllm-stock", "llama.cpp"]] = []
    """Offer only variants that all of these can serve (`puzzle families`); vllm is vLLM with our plugin."""
    effort: Literal["fast", "normal", "thorough"] = Field(default="normal", description=explained_efforts())


class GKDSettings(Settings):
    """Global knowledge distillation (Puzzle, section 4)."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate. The nearer the child is to its parent, the lower it should be."""
    tokens: int = Field(default=262_144, ge=0)
    """Training tokens; 0 skips GKD."""
    batch_tokens: int = Field(default=2_048, ge=1)
    """Tokens in one step."""
    losses: dict[Literal["kl", "cosine", "lm"], Annotated[float, Field(ge=0)]] = {"kl": 1.0, "cosine": 1.0}
    """Weights of the losses: `kl`, KL(parent || child) on the logits; `cosine`, the mean over layers of 1 - cosine of
    the hidden states; `lm`, the language-modelling loss. Losses not named have no weight."""
    also_train: list[Literal["embeddings", "experts"]] = []
    """Embeddings with the LM head, and mixtures of experts with their routers, train only if named. Little text trains
    few of the experts, at the expense of the others; compare `selection_kl_nats_best` in gkd.json with and without."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens that one process computes at once; a step accumulates the gradients. Null means the whole batch."""
    gradient_checkpointing: bool = False
    """Compute the activations inside blocks twice instead of keeping them: slower, in less memory."""
    compile: bool = False
    """Compile the layers of parent and child, and the losses (torch.compile). Faster on GPUs (docs/results.md); needs
    a C++ compiler."""
    parent_top_k: int | None = Field(default=None, ge=1)
    """Write the parent's top k tokens at each position to disk once, and train without the parent in memory. Set
    `losses` without `cosine`."""

    @model_validator(mode="after")
    def _settings_agree(self) -> GKDSettings:
        if not any(self.losses.values()):
            raise ValueError("losses needs a weight above 0, such as gkd.losses={kl: 1}")
        if self.parent_top_k and self.losses.get("cosine"):
            raise ValueError("parent_top_k keeps no hidden states of the parent; set gkd.losses to {kl: 1}")
        return self


def steps_between_measurements(steps: int) -> int:
    """Between those of a child in GKD on the selection split: eight in all, 16 to 100 steps apart."""
    return min(100, max(16, math.ceil(steps / 8)))


BatchSize: TypeAlias = Annotated[int, Field(ge=1)]


class ScenarioSettings(Settings):
    """Traffic: one batch of equal requests."""

    name: str = "default"
    """Label in tables."""
    batch_size: BatchSize | Annotated[list[BatchSize], Field(min_length=1)] = 1
    """Requests served together. Of several, such as [1, 8, 64], each that fits this machine's memory is measured, and
    the search says at which the child does best."""
    prefill_tokens: int = Field(default=128, ge=1)
    """Prompt tokens of each request."""
    decode_tokens: int = Field(default=64, ge=1)
    """Generated tokens of each request."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this scenario in a mix, relative to the others."""

    def at_batch_sizes(self, weight: float) -> list[Scenario]:
        """As plain data, once for each batch size."""
        fields = {**self.model_dump(), "weight": weight}
        if isinstance(self.batch_size, int):
            return [Scenario(**fields)]
        sizes = sorted(set(self.batch_size))
        return [Scenario(**{**fields, "name": f"{self.name}-b{size}", "batch_size": size}) for size in sizes]


class Recipe(Settings):
    """One reproducible run."""

    parent: str
    """A hub id, a local checkpoint, a .gguf file, or `package:NAME==VERSION`, a Python package that contains one."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of forward passes; auto is bfloat16 if the machine is fast at it."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of this machine, divided among its processes; null means one for each physical core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto is a GPU if there is one."""
    memory: Literal["all", "stream"] = "all"
    """`stream` reads the parent from disk one layer at a time in stages that can, for parents larger than memory
    (docs/streaming.md). Results are the same."""
    engine: Literal["torch", "llama.cpp", "vllm", "vllm-eager"] = "torch"
    """What the child is to be fast on: costs, candidates and the child are timed there."""
    kv_format: str | None = None
    """Of the engine's KV cache, by its own name; null is the engine's default (docs/formats.md). Times, memory, exports
    and servers have it; scores and KL are computed with a cache that is not rounded."""
    data: DataSettings
    """Text."""
    search_space: SearchSpaceSettings = SearchSpaceSettings()
    library: LibrarySettings = LibrarySettings()
    bld: BLDSettings = BLDSettings()
    scenarios: list[ScenarioSettings] = Field(default=[ScenarioSettings()], min_length=1)
    """Traffic; several are mixed by weight."""
    costs: CostSettings = CostSettings()
    scoring: ScoringSettings = ScoringSettings()
    search: SearchSettings = SearchSettings()
    refit: bool = True
    """Correct the assembled child in closed form; the result is kept only if it lowers KL on the selection split."""
    gkd: GKDSettings = GKDSettings()

    @model_validator(mode="after")
    def _scenario_names_differ(self) -> Recipe:
        names = [s.name for s in self.scenarios]
        if len(set(names)) < len(names) or MIX in names:
            raise ValueError(f"scenarios need names that differ, and '{MIX}' means all of them; set their name")
        return self

    @model_validator(mode="after")
    def _limits_are_known(self) -> Recipe:
        for name, value in self.search.limits.items():
            check_limit(name, value, [s.name for s in self.traffic()])
        return self

    @model_validator(mode="after")
    def _formats_are_served(self) -> Recipe:
        for form in self.search_space.formats:
            layout_of(form)
            if not (SERVERS.get(self.engine) and form in SERVERS[self.engine].formats):
                serving = [name for name, s in SERVERS.items() if form in s.formats and name != "transformers"]
                way_out = f"set engine: {serving[0]}" if serving else "leave it out of search_space.formats"
                raise ValueError(f"the engine {self.engine} does not serve the format {form}; {way_out}")
        if self.search_space.formats and self.memory != "all":
            raise ValueError("search_space.formats needs memory: all; leave the formats out or set it")
        return self

    @model_validator(mode="after")
    def _kv_format_is_served(self) -> Recipe:
        offered = SERVERS[self.engine].kv_formats if self.engine in SERVERS else {}
        if self.kv_format is not None and self.kv_format not in offered:
            way_out = f"choose one of {', '.join(offered)}" if offered else "leave kv_format out"
            raise ValueError(f"the engine {self.engine} has no KV cache in {self.kv_format}; {way_out}")
        return self

    @model_validator(mode="after")
    def _task_is_named(self) -> Recipe:
        if self.scoring.by_task != (self.scoring.task is not None):
            raise ValueError(
                "scoring.metric: task_margin or task_accuracy and scoring.task, its items, belong together"
            )
        effort, metric = self.search.effort, self.scoring.metric
        if self.scoring.by_task and EFFORTS[effort].measures_children:
            raise ValueError(f"search.effort: {effort} chooses by KL; with scoring.metric: {metric}, set it to fast")
        return self

    def mixes(self) -> list[tuple[Scenario, ...]]:
        """The scenarios as plain data, weights summing to 1: once for each choice of batch sizes."""
        total = sum(s.weight for s in self.scenarios)
        return list(itertools.product(*(s.at_batch_sizes(s.weight / total) for s in self.scenarios)))

    def traffic(self) -> list[Scenario]:
        """Every scenario of every mix, once."""
        return list(dict.fromkeys(itertools.chain.from_iterable(self.mixes())))

    @property
    def final_library(self) -> str:
        """The library that children are made of."""
        return "coupled" if self.bld.coupled_tokens else "main"

    def to_yaml(self) -> str:
        """All settings, resolved; `recipe_text.parse_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


CHANNEL_SLOTS = ("ffn", "experts")
"""Slots that mix channels; all others mix tokens, and the settings for attention hold there."""


def search_space_of(recipe: Recipe, parent: Architecture) -> SearchSpace:
    """The recipe's search space on a parent.

    Raises:
        RecipeError: see `build_search_space`.
    """
    s = recipe.search_space
    kinds: dict[str, Mixer] = {slot: "ffn" if slot in CHANNEL_SLOTS else "attention" for slot in parent.slots}
    linear, no_op = ({slot for slot, kind in kinds.items() if kind in asked} for asked in (s.linear, s.no_op))
    return build_search_space(parent, s, linear, no_op, s.layers)
