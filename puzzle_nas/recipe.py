"""Every setting of a run, validated. YAML in and out, dotted overrides, "did you mean". No torch."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from puzzle_nas.architecture import Architecture, Scenario, SearchSpace, build_search_space
from puzzle_nas.errors import ArtifactError, RecipeError, puzzle_command
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.limits import MIX, check_limit
from puzzle_nas.servable import SERVERS
from puzzle_nas.text_files import read_text

PYTHON_STDLIB = "python-stdlib"
PARENT_SAMPLES = "parent-samples"
NOT_PATHS = (PYTHON_STDLIB, PARENT_SAMPLES)


class Settings(BaseModel):
    """A part of a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceSettings(Settings):
    """One source of text."""

    source: str
    """`python-stdlib`, `parent-samples`, a file (.txt, .jsonl, .jsonl.gz, .parquet), a glob, or a hub data set."""
    weight: float = Field(default=1.0, gt=0)
    """Share of each split's tokens, relative to the other sources."""
    text_field: str = "text"
    """Column that holds a document, for JSON lines, Parquet and hub data sets: text, or the messages of a conversation.
    Where there is no column `text`, `messages` or `conversations` is read."""


class DataSettings(Settings):
    """Text, and how much of it each split holds."""

    sources: list[SourceSettings] = Field(min_length=1)
    """Where text comes from."""
    sequence_length: int = Field(default=256, ge=8)
    """Tokens in a packed block."""
    train_tokens: int = Field(default=1_000_000, ge=1)
    """Text for BLD and GKD; they start over when they need more."""
    calibration_tokens: int = Field(default=32_768, ge=1)
    """Text for closed-form initialisation and refit. A quarter is held back to choose between initialisations."""
    scoring_tokens: int = Field(default=8_192, ge=1)
    """Text for replace-1-block scores."""
    selection_tokens: int = Field(default=8_192, ge=1)
    """Text on which checkpoints are chosen."""
    validation_tokens: int = Field(default=16_384, ge=1)
    """Text on which results are reported, and nothing else."""
    sample_tokens: int = Field(default=65_536, ge=1)
    """Tokens that the parent writes for the source `parent-samples`, all splits together."""
    separator: str | None = None
    """Token after each document of plain text; null means the tokenizer's end of text or, where that ends a turn of a
    conversation, its `<|endoftext|>` or the like. Conversations end with their own last token."""


class SearchSpaceSettings(Settings):
    """Which variants each layer may become (Puzzle, section 2)."""

    kv_heads: list[int] | None = None
    """KV-head counts besides the parent's; null means every smaller one that divides it."""
    windows: list[Annotated[int, Field(ge=1)]] = []
    """Windows of attention in tokens, offered where the parent's layer sees more."""
    width_fractions: list[float] = [0.75, 0.5, 0.25, 0.1]
    """FFN widths, and widths of experts, as fractions of the parent's."""
    multiple_of: int = Field(default=32, ge=1)
    """FFN widths are rounded to a multiple of this."""
    expert_counts: list[Annotated[float, Field(gt=0)]] = [0.75, 0.5, 0.25]
    """Experts that are left of a mixture: below 1 a share of the parent's, else a number. Narrower experts are offered
    as narrower FFNs are, and every variant of a mixture changes one of its three sizes."""
    experts_per_token: list[Annotated[float, Field(gt=0)]] = [0.5]
    """Experts that a token goes to: below 1 a share of the parent's, else a number."""
    attention_linear: bool = True
    """Offer one matrix in place of attention."""
    attention_no_op: bool = True
    """Offer leaving attention out."""
    ffn_linear: bool = True
    """Offer one matrix in place of the FFN."""
    ffn_no_op: bool = True
    """Offer leaving the FFN out."""
    layers: dict[int, list[str]] = {}
    """Variant ids that a layer may become, in any format; layers not named may become any."""
    formats: list[str] = []
    """In which every sub-block, and embeddings with LM head, may be stored besides the model's precision; what the
    recipe's engine serves: llama.cpp q8_0, q6_k, q5_k, q5_0, q4_k, q4_1, q4_0, f16."""


class LibrarySettings(Settings):
    """How variants start before any training."""

    initialisation: Literal["least_squares", "paper", "random"] = "least_squares"
    """Closed-form against the parent's output, the paper's (section 2), or random."""
    ridge: float = Field(default=1e-4, ge=0)
    """Ridge of the least squares, relative to the mean diagonal of the Gram matrix."""


class OptimiserSettings(Settings):
    """An optimiser with linear warm-up and cosine decay."""

    optimiser: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices inside blocks with AdamW for the rest. Muon multiplies in bfloat16: where that is
    slow, it takes many times as long."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    final_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moving averages."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps spent warming up."""
    gradient_clip: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; null means no clipping."""


class BLDSettings(OptimiserSettings):
    """Blockwise local distillation, each variant on its own (Puzzle, section 2: decoupled)."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate. The best of those tried on SmolLM2-135M; wider parents may want less."""
    tokens: int = Field(default=65_536, ge=0)
    """Training tokens for each variant; 0 skips BLD."""
    batch_tokens: int = Field(default=2_048, ge=1)
    """Tokens in one step."""
    normalise: Literal["batch", "token"] = "token"
    """Error over the parent's output energy: of the whole batch (the paper's) or of each token."""
    checkpoint_every_steps: int = Field(default=200, ge=1)
    """Steps between checkpoints within a layer."""
    shard_tokens: int | None = Field(default=None, ge=1)
    """Tokens whose activations are on disk at once (6 x hidden size bytes each in bfloat16). More train shard after
    shard, each variant's optimiser waiting on disk; null means all at once."""


class CoupledBLDSettings(BLDSettings):
    """The paper's second step: what a first search uses is trained again in pairs of attention and FFN, both
    sub-blocks together, from where decoupled BLD left them; the search is then repeated (Puzzle, section 2)."""

    tokens: int = Field(default=0, ge=0)
    """Training tokens for each pair; 0 leaves the second step out."""
    solutions: int = Field(default=4, ge=1)
    """How many solutions of the first search, `search.min_different` apart, say which variants are paired."""


class CostSettings(Settings):
    """How runtimes are measured."""

    file: Path | None = None
    """A cost table to use instead of measuring. It must come from this machine, engine, precision and thread count."""
    force: bool = False
    """Use `file` wherever it comes from: to search on one machine for another."""
    mixtures: int = Field(default=24, ge=1)
    """Random architectures that are timed besides the stacks of one variant. More of them predict better."""
    repeats: int = Field(default=3, ge=1)
    """Interleaved repeats, of which the fastest two thirds count; up to four times as many while they differ too
    much."""
    decode_steps_measured: int = Field(default=8, ge=1)
    """Decode steps timed in one repeat, around the middle of the decode."""


class ScoringSettings(Settings):
    """Replace-1-block scores (Puzzle, section 2)."""

    metric: Literal["kl", "lm_loss", "task"] = "kl"
    """KL(parent || child) in nats per token, the child's increase in LM loss (these two are always recorded both), or
    what it loses on a task (Puzzle, Table 9)."""
    task: Path | None = None
    """For `metric: task`: JSON lines with `question`, `choices` and `answer`. Half of the items, by a hash of each, are
    for scores; `puzzle evaluate` reports on the others."""
    task_measure: Literal["margin", "accuracy"] = "margin"
    """Log-likelihood of the right choice less that of the best wrong one, in nats, or the share answered right."""
    task_items: int | None = Field(default=None, ge=2)
    """Items of that half that are used; null means all."""
    unit: Literal["sub_block", "block"] = "sub_block"
    """Replace one sub-block at a time (m + n scores a layer), or, as the paper, attention and FFN together (m x n)."""
    batch_tokens: int = Field(default=2_048, ge=1)
    """Tokens whose activations are in memory together."""


class SearchSettings(Settings):
    """What the child must meet."""

    limits: dict[str, float] = {"speedup": 1.3}
    """`speedup`, `throughput_tokens_per_second` (at least); `latency_ms`, `time_to_first_token_ms`,
    `time_per_output_token_ms`, `memory_bytes`, `parameters` (at most). Times and throughput hold in every scenario, or
    in one (`latency_ms@chat`), or on the weighted mean (`latency_ms@mix`)."""
    servable_by: list[Literal["transformers", "vllm", "vllm-stock", "llama.cpp"]] = []
    """Offer only what each of these can serve; vllm (with our plugin), llama.cpp and transformers serve everything."""
    gap: float = Field(default=1e-4, ge=0)
    """Relative optimality gap at which the solver may stop."""
    time_limit_seconds: float = Field(default=60.0, gt=0)
    """Longest time for one solve."""
    verify: int = Field(default=1, ge=1)
    """How many of the best architectures are assembled, refitted and measured on the selection split; the best of them
    counts. They come in turn from sums of KL, of LM loss, and of both."""
    min_different: int = Field(default=8, ge=1)
    """Positions in which those from the same sums differ from each other."""
    removed_runs: int = Field(default=0, ge=0)
    """How many more candidates lack a run of whole layers, worth more than scores of single blocks say: as many layers
    as would be enough alone, then half as many, and so on; the rest by sums of scores."""
    refine_rounds: int = Field(default=0, ge=0)
    """Around how many of those children scores are taken again, and the search repeated near them: the best by sums and
    those that lack a run, whichever are ahead. A round takes as long as all scores."""
    speed_attempts: int = Field(default=3, ge=0)
    """How often the found architecture is timed next to the parent and, where its measured speed-up falls short of the
    limit or is far beyond it, searched again with a tighter or looser one. Where children are measured, the best by
    sums is timed before, and the limit corrected by what the costs got wrong of it. 0 trusts the cost table, as does a
    table given with costs.file."""

    @property
    def measures_children(self) -> bool:
        """Whether children are assembled to choose among them."""
        return self.verify > 1 or self.removed_runs > 0 or self.refine_rounds > 0


class RefitSettings(Settings):
    """Closed-form correction of the assembled child."""

    enabled: bool = True
    """Try it; it is kept only if it lowers KL on the selection split."""
    ridge_tokens: float = Field(default=6_144, ge=0)
    """Pull towards the present weights: as strong as so many tokens of the calibration text are on the mean."""


class GKDSettings(OptimiserSettings):
    """Global knowledge distillation (Puzzle, section 4)."""

    tokens: int = Field(default=262_144, ge=0)
    """Training tokens; 0 skips GKD."""
    batch_tokens: int = Field(default=2_048, ge=1)
    """Tokens in one step."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of KL(parent || child) on the logits."""
    cosine_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean over layers of 1 - cosine of the hidden states."""
    lm_weight: float = Field(default=0.0, ge=0)
    """Weight of the language-modelling loss."""
    train_embeddings: bool = False
    """Train embeddings and LM head too."""
    train_experts: bool = False
    """Train mixtures of experts too, routers included. Little text reaches few experts, and what it teaches
    the router it takes from the others; `selection_kl_nats_best` in gkd.json tells which is better for a child."""
    lora_rank: int | None = Field(default=None, ge=1)
    """Train low-rank adapters of this rank beside the linear layers, and nothing else; they are merged at the end."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens that pass through the models of one process at once; a step adds up the gradients. Null means the whole
    batch."""
    gradient_checkpointing: bool = False
    """Compute the activations inside blocks twice and keep none: slower, in less memory."""
    compile: bool = False
    """Compile the layers of parent and child, and the losses (torch.compile); a single GPU also starts each step as one
    CUDA graph, which keeps the step's memory. It pays on GPUs (docs/results.md). Needs a C++ compiler."""
    parent_top_k: int | None = Field(default=None, ge=1)
    """Write the parent's top k tokens at each position to disk once, and train without the parent in memory. Needs
    `cosine_weight: 0`."""
    evaluate_every_steps: int = Field(default=25, ge=1)
    """Steps between measurements on the selection split, each also a checkpoint."""

    @model_validator(mode="after")
    def _settings_agree(self) -> GKDSettings:
        if self.parent_top_k and self.cosine_weight:
            raise ValueError("parent_top_k keeps no hidden states of the parent; set gkd.cosine_weight to 0")
        if self.lora_rank and self.train_embeddings:
            raise ValueError("with lora_rank only adapters train; set gkd.train_embeddings to false")
        return self


class EvaluationSettings(Settings):
    """The final measurements."""

    timing_repeats: int = Field(default=7, ge=1)
    """Interleaved whole request batches of parent and child, of which the median counts; up to four times as many
    while they differ too much."""


class ScenarioSettings(Settings):
    """Traffic: one batch of equal requests."""

    name: str = "default"
    """Label in tables."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["sweep"] = 1
    """Requests served together; `sweep` measures 1, 2, 4, ..., and the search says at which the child does best."""
    max_batch_size: int = Field(default=32, ge=1)
    """Where a sweep ends; what does not fit this machine's memory is left out."""
    prefill_tokens: int = Field(default=128, ge=1)
    """Prompt tokens of each request."""
    decode_tokens: int = Field(default=64, ge=1)
    """Generated tokens of each request."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this scenario in a mix, relative to the others."""

    def at_batch_sizes(self, weight: float) -> list[Scenario]:
        """As plain data, once for each batch size."""
        fields = {**self.model_dump(exclude={"max_batch_size"}), "weight": weight}
        if self.batch_size != "sweep":
            return [Scenario(**fields)]
        sizes = [2**i for i in range(self.max_batch_size.bit_length())]
        return [Scenario(**{**fields, "name": f"{self.name}-b{size}", "batch_size": size}) for size in sizes]


class Recipe(Settings):
    """One reproducible run."""

    parent: str
    """A hub id, a local checkpoint, a .gguf file, or `package:NAME==VERSION`, a Python package that carries one."""
    seed: int = 0
    """Seed of everything random."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Arithmetic of forward passes; auto is bfloat16 where the machine is fast at it."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of this machine, divided among its processes; null means one for each physical core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto is a GPU when there is one."""
    memory: Literal["all", "stream", "divide"] = "all"
    """`stream` reads the parent from disk one layer at a time where a stage allows it, for parents larger than memory
    (docs/streaming.md); `divide` does so too, and in scoring each process keeps a part of the layers
    (docs/many-processes.md). Results are the same."""
    engine: Literal["torch", "llama.cpp", "vllm", "vllm-eager"] = "torch"
    """What the child is to be fast on: costs, searched architectures and the child are timed there."""
    data: DataSettings
    """Text."""
    search_space: SearchSpaceSettings = SearchSpaceSettings()
    library: LibrarySettings = LibrarySettings()
    bld: BLDSettings = BLDSettings()
    coupled_bld: CoupledBLDSettings = CoupledBLDSettings()
    scenarios: list[ScenarioSettings] = Field(default=[ScenarioSettings()], min_length=1)
    """Traffic; several are mixed by weight."""
    costs: CostSettings = CostSettings()
    scoring: ScoringSettings = ScoringSettings()
    search: SearchSettings = SearchSettings()
    refit: RefitSettings = RefitSettings()
    gkd: GKDSettings = GKDSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

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
        if self.search_space.formats and self.gkd.lora_rank:
            raise ValueError("adapters are not rounded to search_space.formats; set gkd.lora_rank to null")
        return self

    @model_validator(mode="after")
    def _task_is_named(self) -> Recipe:
        if (self.scoring.metric == "task") != (self.scoring.task is not None):
            raise ValueError("scoring.metric: task and scoring.task, a file of items, belong together")
        if self.scoring.metric == "task" and self.search.measures_children:
            raise ValueError(
                "search.verify, search.removed_runs and search.refine_rounds choose by KL; with scoring.metric: task, "
                "set them to 1, 0 and 0"
            )
        return self

    def mixes(self) -> list[tuple[Scenario, ...]]:
        """The scenarios as plain data, weights summing to 1: once for each choice of swept batch sizes."""
        total = sum(s.weight for s in self.scenarios)
        return list(itertools.product(*(s.at_batch_sizes(s.weight / total) for s in self.scenarios)))

    def traffic(self) -> list[Scenario]:
        """Every scenario of every mix, once."""
        return list(dict.fromkeys(itertools.chain.from_iterable(self.mixes())))

    @property
    def final_library(self) -> str:
        """The library that children are made of."""
        return "coupled" if self.coupled_bld.tokens else "main"

    def to_yaml(self) -> str:
        """All settings, resolved; `parse_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


# Reading


class _Loader(yaml.SafeLoader):
    """YAML with numbers as its version 1.2 has them (1e6 is one, 1:30 is text), that refuses a key given twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str, name: str):
        super().__init__(text)
        self.name = name

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise RecipeError(f"{self.name} has the key {key} twice, in line {seen[key]} and in line {line}.")
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        """Decimal, or hexadecimal after 0x."""
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 16 if "0x" in text else 10)


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("[-+]?[0-9][0-9_]*$|0x[0-9a-fA-F]+$"), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    None,
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _read_yaml(text: str, name: str) -> Any:
    loader = _Loader(text, name)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted key, `search.limits.speedup=1.5`, in place. The value is read as YAML.

    Raises:
        RecipeError: no `=`, or a path through something that is not a mapping.
    """
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise RecipeError(f"'{override}' is not an override; write key=value, such as search.limits.speedup=1.5.")
    try:
        value = _read_yaml(text, f"The value of '{override}'")
    except yaml.YAMLError:
        raise RecipeError(f"The value of '{override}' is not YAML.") from None
    node: Any = data
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"'{path}' leads through {part}, which holds a value and not settings.")
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def parse_recipe(text: str, overrides: Sequence[str] = (), name: str = "recipe", folder: Path | None = None) -> Recipe:
    """A recipe from YAML and dotted overrides.

    Args:
        folder: what relative paths in the text are relative to, None leaves them as they are. In overrides, they are
            relative to the current folder.

    Raises:
        RecipeError: not YAML, unknown keys (with the nearest known one), values out of range.
    """
    try:
        data = _read_yaml(text, name)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        raise RecipeError(f"{name} is not YAML: {problem}{f' in line {mark.line + 1}' if mark else ''}.") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{name} holds no settings.")
    if folder is not None:
        _make_paths_absolute(data, folder)
    written = {place[key] for place, key in _paths(data)}
    for override in overrides:
        try:
            apply_override(data, override)
        except (IndexError, ValueError):
            raise RecipeError(f"'{override}' names a list entry that does not exist.") from None
    _make_paths_absolute(data, Path.cwd(), but=written)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`parse_recipe` of a file, whose paths are relative to its own folder.

    Raises:
        RecipeError: also when the file does not exist.
        DataError: it is not text.
    """
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}. Examples are in recipes/.")
    return parse_recipe(read_text(path), overrides, str(path), path.parent)


def load_run_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe.yaml of a run folder, with settings changed.

    Raises:
        ArtifactError: there is none, or another version wrote it.
        RecipeError: an override says nothing that can be done.
    """
    folder = path.parent
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder {folder}.")
    if not path.is_file():
        way_out = puzzle_command("run", "RECIPE", "--run-dir", folder)
        raise ArtifactError(f"{folder} is not a run folder: it has no recipe.yaml. Make one with: {way_out}")
    text = read_text(path)
    try:
        recipe = parse_recipe(text, name=str(path))
    except RecipeError as error:
        version = text.partition("\n")[0].removeprefix("# ") if text.startswith("# ") else "an unknown version"
        raise ArtifactError(
            f"{path} was written by another version ({version}), and this one does not read it: "
            f"{str(error).rstrip('.')}. Name another folder with --run-dir."
        ) from None
    return parse_recipe(text, overrides, str(path)) if overrides else recipe


# Paths

LOCAL_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet", ".gguf")


def _paths(data: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each setting that names a file, a folder or something elsewhere: what holds it, and its key there."""
    found: list[tuple[Any, str]] = [(data, "parent"), (data.get("costs"), "file"), (data.get("scoring"), "task")]
    sources = data["data"].get("sources") if isinstance(data.get("data"), dict) else None
    found += [(source, "source") for source in (sources if isinstance(sources, list) else [])]
    yield from ((place, key) for place, key in found if isinstance(place, dict) and isinstance(place.get(key), str))


def _make_paths_absolute(data: Mapping[str, Any], folder: Path, but: Container[str] = ()) -> None:
    """In place.

    Raises:
        RecipeError: what is meant is not in `folder`, but in the current one.
    """
    for place, key in _paths(data):
        given = place[key]
        if given in but or given in NOT_PATHS or given.startswith("package:"):
            continue
        path = os.path.abspath(folder / os.path.expanduser(given))
        if glob.glob(path) or _must_be_local(key, given):
            place[key] = path
        if not glob.glob(path) and glob.glob(os.path.abspath(given)):
            raise RecipeError(
                f"{given} in the recipe is relative to the recipe's own folder, and there is no {path}; for the one in "
                f"the current folder write {os.path.abspath(given)}."
            )


def _must_be_local(key: str, given: str) -> bool:
    """Whether a name cannot be that of something on the hub."""
    return (
        key in ("file", "task")
        or given.startswith((".", "/", "~"))
        or given.endswith(LOCAL_SUFFIXES)
        or any(sign in given for sign in "*?[")
        or given.count("/") > 1
        or (key == "parent" and "/" not in given)
    )


# Saying what is wrong


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where, annotation, bounds = _setting_at(first["loc"])
    if first["type"] == "extra_forbidden":
        holder = _setting_at(first["loc"][:-1])[1]
        known = next((list(t.model_fields) for t in _alternatives(holder) if _is_settings(t)), [])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
        return f"The recipe does not know the key {where}.{hint}"
    if first["type"] == "missing":
        return f"The recipe lacks the key {where}."
    if first["type"] == "value_error":
        place = f"The recipe's {where}: " if where else "The recipe: "
        return f"{place}{first['msg'].removeprefix('Value error, ')}."
    given = yaml.safe_dump(first["input"], default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    given = given if len(given) <= 60 else f"{given[:60]}..."
    return f"The recipe's {where} is {given}, but must be {_allowed(annotation, bounds)}."


def _setting_at(location: Sequence[Any]) -> tuple[str, Any, Sequence[Any]]:
    """A place that pydantic names, as the user wrote it; what may stand there, and its bounds.

    pydantic's places also hold which of several allowed types it tried; those are left out.
    """
    names: list[str] = []
    annotation: Any = Recipe
    bounds: Sequence[Any] = ()
    for part, following in zip(location, (*location[1:], None), strict=False):
        for one in _alternatives(annotation):
            arguments = get_args(one)
            if _is_settings(one):
                field = one.model_fields.get(part)
                names.append(str(part))
                annotation, bounds = (field.annotation, field.metadata) if field else (None, ())
                break
            if (isinstance(part, int) and get_origin(one) in (list, tuple)) or get_origin(one) is dict:
                names.append(str(part))
                annotation, bounds = arguments[0 if following == "[key]" else -1], ()
                break
    return ".".join(names), annotation, bounds


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _allowed(annotation: Any, bounds: Sequence[Any] = ()) -> str:
    """What may stand at a setting, in words."""
    if len(alternatives := _alternatives(annotation)) > 1:
        return " or ".join(_allowed(one, bounds) for one in alternatives)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0], arguments[1].metadata)
    if origin is Literal:
        return ("" if len(arguments) == 1 else "one of ") + ", ".join(map(str, arguments))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    names |= {list: "a list", tuple: "a list", dict: "settings, each with a name"}
    if annotation is type(None):
        return "null"
    text = names.get(origin or annotation, "settings")
    signs = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below", "min_length": "of at least"}
    limits = [
        f"{words} {value}" + (" entry" if name == "min_length" else "")
        for bound in bounds
        for name, words in signs.items()
        if (value := getattr(bound, name, None)) is not None
    ]
    return " ".join([text, " and ".join(limits)]).strip()


# Explaining every setting


def explained_settings(model: type[Settings] = Recipe, indent: str = "") -> str:
    """Every setting with its default and what it means, as YAML with comments."""
    lines: list[str] = []
    for name, field in model.model_fields.items():
        inner = settings_in(field.annotation)
        lines += [f"{indent}# {line}" for line in (field.description or "").splitlines()]
        if inner is None:
            value = "..." if field.is_required() else yaml.safe_dump(_plain(field.default), default_flow_style=True)
            lines.append(f"{indent}{name}: {value.removesuffix(chr(10)).removesuffix('...').strip() or '...'}")
        elif inner[1]:
            body = explained_settings(inner[0], indent + "    ")
            lines += [f"{indent}{name}:", body.replace(f"{indent}    ", f"{indent}  - ", 1)]
        else:
            lines += [f"{indent}{name}:", explained_settings(inner[0], indent + "  ")]
    return "\n".join(lines)


def settings_in(annotation: Any) -> tuple[type[Settings], bool] | None:
    """The settings class that a field holds, and whether it holds a list of them."""
    arguments = getattr(annotation, "__args__", ())
    candidate = arguments[0] if arguments else annotation
    is_settings = isinstance(candidate, type) and issubclass(candidate, Settings)
    return (candidate, bool(arguments)) if is_settings else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


CHANNEL_SLOTS = ("ffn", "experts")
"""Slots that mix channels; all others mix tokens, and the settings for attention hold there."""


def search_space_of(recipe: Recipe, parent: Architecture) -> SearchSpace:
    """The recipe's search space on a parent.

    Raises:
        RecipeError: see `build_search_space`.
    """
    s = recipe.search_space
    linear, no_op = (
        {slot for slot in parent.slots if (of_ffn if slot in CHANNEL_SLOTS else of_attention)}
        for of_attention, of_ffn in ((s.attention_linear, s.ffn_linear), (s.attention_no_op, s.ffn_no_op))
    )
    return build_search_space(parent, s, linear, no_op, s.layers)
