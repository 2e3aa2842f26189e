"""Every setting of a run, validated. YAML in and out, dotted overrides, "did you mean". No torch."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from puzzle_nas.architecture import ParentShape, Scenario, SearchSpace, build_search_space
from puzzle_nas.errors import RecipeError


class Settings(BaseModel):
    """A part of a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceSettings(Settings):
    """One source of text."""

    source: str
    """`python-stdlib`, `parent-samples`, a file (.txt, .jsonl, .jsonl.gz, .parquet), a glob, or a hub data set."""
    weight: float = Field(1.0, gt=0)
    """Share of each split's tokens, relative to the other sources."""
    text_field: str = "text"
    """Column that holds the text of a document, for JSON lines, Parquet and hub data sets."""


class DataSettings(Settings):
    """Text, and how much of it each split holds."""

    sources: list[SourceSettings] = Field(min_length=1)
    """Where text comes from."""
    sequence_length: int = Field(256, ge=8)
    """Tokens in a packed block."""
    train_tokens: int = Field(1_000_000, ge=1)
    """Text for BLD and GKD; they start over when they need more."""
    calibration_tokens: int = Field(32_768, ge=1)
    """Text for closed-form initialisation and refit. A quarter is held back to choose between initialisations."""
    scoring_tokens: int = Field(8_192, ge=1)
    """Text for replace-1-block scores."""
    selection_tokens: int = Field(8_192, ge=1)
    """Text on which checkpoints are chosen."""
    validation_tokens: int = Field(16_384, ge=1)
    """Text on which results are reported, and nothing else."""
    sample_tokens: int = Field(65_536, ge=1)
    """Tokens that the parent writes for the source `parent-samples`, all splits together."""


class SearchSpaceSettings(Settings):
    """Which variants each layer may become (Puzzle, section 2)."""

    kv_heads: list[int] | None = None
    """KV-head counts besides the parent's; null means every smaller one that divides it."""
    width_fractions: list[float] = [0.75, 0.5, 0.25, 0.1]
    """FFN widths as fractions of the parent's."""
    multiple_of: int = Field(32, ge=1)
    """FFN widths are rounded to a multiple of this."""
    attention_linear: bool = True
    """Offer one matrix in place of attention."""
    attention_no_op: bool = True
    """Offer leaving attention out."""
    ffn_linear: bool = True
    """Offer one matrix in place of the FFN."""
    ffn_no_op: bool = True
    """Offer leaving the FFN out."""
    layers: dict[int, list[str]] = {}
    """Variant ids that a layer may become; layers not named may become any."""


class LibrarySettings(Settings):
    """How variants start before any training."""

    initialisation: Literal["least_squares", "paper", "random"] = "least_squares"
    """Closed-form against the parent's output, the paper's (section 2), or random."""
    ridge: float = Field(1e-4, ge=0)
    """Ridge of the least squares, relative to the mean diagonal of the Gram matrix."""


class OptimiserSettings(Settings):
    """An optimiser with linear warm-up and cosine decay."""

    optimiser: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the matrices inside blocks with AdamW for the rest. Muon multiplies in bfloat16: where that is
    slow, it takes many times as long."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    final_learning_rate_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moving averages."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay, on matrices only."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the steps spent warming up."""
    gradient_clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm; null means no clipping."""


class BLDSettings(OptimiserSettings):
    """Blockwise local distillation, each variant on its own (Puzzle, section 2: decoupled)."""

    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate. The best of those tried on SmolLM2-135M; wider parents may want less."""
    tokens: int = Field(65_536, ge=0)
    """Training tokens for each variant; 0 skips BLD."""
    batch_tokens: int = Field(2_048, ge=1)
    """Tokens in one step."""
    normalise: Literal["batch", "token"] = "token"
    """Error over the parent's output energy: of the whole batch (the paper's) or of each token."""
    checkpoint_every_steps: int = Field(200, ge=1)
    """Steps between checkpoints within a layer."""
    shard_tokens: int | None = Field(None, ge=1)
    """Tokens whose activations are on disk at once (6 x hidden size bytes each in bfloat16). More train shard after
    shard, each variant's optimiser waiting on disk; null means all at once."""


class CoupledBLDSettings(BLDSettings):
    """The paper's second step: what a first search uses is trained again in pairs of attention and FFN, both
    sub-blocks together, from where decoupled BLD left them; the search is then repeated (Puzzle, section 2)."""

    tokens: int = Field(0, ge=0)
    """Training tokens for each pair; 0 leaves the second step out."""
    solutions: int = Field(4, ge=1)
    """How many solutions of the first search, `search.min_different` apart, say which variants are paired."""


class CostSettings(Settings):
    """How runtimes are measured."""

    file: Path | None = None
    """A cost table to use instead of measuring. It must come from this machine, engine, precision and thread count."""
    force: bool = False
    """Use `file` wherever it comes from: to search on one machine for another."""
    mixtures: int = Field(24, ge=1)
    """Random architectures that are timed besides the stacks of one variant. More of them predict better."""
    repeats: int = Field(3, ge=1)
    """Interleaved repeats, of which the fastest two thirds count; up to four times as many while they differ too
    much."""
    decode_steps_measured: int = Field(8, ge=1)
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
    """Log-likelihood of the right choice less that of the likeliest wrong one, in nats, or the share answered right."""
    task_items: int | None = Field(None, ge=2)
    """Items of that half that are used; null means all."""
    unit: Literal["sub_block", "block"] = "sub_block"
    """Replace one sub-block at a time (m + n scores a layer), or, as the paper, attention and FFN together (m x n)."""
    batch_tokens: int = Field(2_048, ge=1)
    """Tokens whose activations are in memory together."""


class SearchSettings(Settings):
    """What the child must meet."""

    limits: dict[str, float] = {"speedup": 1.3}
    """`speedup`, `throughput_tokens_per_second` (at least); `latency_ms`, `time_to_first_token_ms`,
    `time_per_output_token_ms`, `memory_bytes`, `parameters` (at most). Times and throughput hold in every scenario, or
    in one (`latency_ms@chat`), or on the weighted mean (`latency_ms@mix`)."""
    servable_by: list[Literal["transformers", "vllm", "vllm-stock", "llama.cpp"]] = []
    """Offer only what each of these can serve; vllm (with our plugin), llama.cpp and transformers serve everything."""
    gap: float = Field(1e-4, ge=0)
    """Relative optimality gap at which the solver may stop."""
    time_limit_seconds: float = Field(60.0, gt=0)
    """Longest time for one solve."""
    verify: int = Field(1, ge=1)
    """How many of the best architectures are assembled, refitted and measured on the selection split; the best of them
    counts. They come in turn from sums of KL, of LM loss, and of both."""
    min_different: int = Field(8, ge=1)
    """Positions in which those from the same sums differ from each other."""
    removed_runs: int = Field(0, ge=0)
    """How many more candidates lack a run of whole layers, worth more than scores of single blocks say: as many layers
    as would be enough alone, then half as many, and so on; the rest by sums of scores."""
    refine_rounds: int = Field(0, ge=0)
    """Around how many of those children scores are taken anew, and the search repeated near them: the best by sums and
    those that lack a run, whichever are ahead. A round takes as long as all scores."""
    speed_attempts: int = Field(3, ge=0)
    """How often the found architecture is timed beside the parent and, where its measured speed-up falls short of the
    limit, searched anew with a tighter one. Where children are measured, the best by sums is timed before, and the
    limit corrected by what the costs got wrong of it. 0 trusts the cost table, as does a table given with
    costs.file."""

    @property
    def measures_children(self) -> bool:
        """Whether children are assembled to choose among them."""
        return self.verify > 1 or self.removed_runs > 0 or self.refine_rounds > 0


class RefitSettings(Settings):
    """Closed-form correction of the assembled child."""

    enabled: bool = True
    """Try it; it is kept only if it lowers KL on the selection split."""
    ridge_tokens: float = Field(6_144, ge=0)
    """Pull towards the present weights: as strong as so many tokens of the calibration text are on the mean."""


class GKDSettings(OptimiserSettings):
    """Global knowledge distillation (Puzzle, section 4)."""

    tokens: int = Field(262_144, ge=0)
    """Training tokens; 0 skips GKD."""
    batch_tokens: int = Field(2_048, ge=1)
    """Tokens in one step."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of KL(parent || child) on the logits."""
    cosine_weight: float = Field(1.0, ge=0)
    """Weight of the mean over layers of 1 - cosine of the hidden states."""
    lm_weight: float = Field(0.0, ge=0)
    """Weight of the language-modelling loss."""
    train_embeddings: bool = False
    """Train embeddings and LM head too."""
    lora_rank: int | None = Field(None, ge=1)
    """Train low-rank adapters of this rank beside the linear layers, and nothing else; they are merged at the end."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Tokens that pass through the models of one process at once; a step adds up the gradients. Null means the whole
    batch."""
    gradient_checkpointing: bool = False
    """Compute the activations inside blocks twice and keep none: slower, in less memory."""
    compile: bool = False
    """Compile the layers of parent and child, and the losses (torch.compile); a single GPU also starts each step as one
    CUDA graph, which keeps the step's memory. It pays on GPUs (docs/results.md). Needs a C++ compiler."""
    parent_top_k: int | None = Field(None, ge=1)
    """Write the parent's so many likeliest tokens at each position to disk once, and train without the parent in
    memory. Needs `cosine_weight: 0`."""
    evaluate_every_steps: int = Field(25, ge=1)
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

    timing_repeats: int = Field(7, ge=1)
    """Interleaved whole request batches of parent and child, of which the median counts; up to four times as many
    while they differ too much."""


class ScenarioSettings(Settings):
    """Traffic: one batch of equal requests."""

    name: str = "default"
    """Label in tables."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["sweep"] = 1
    """Requests served together; `sweep` measures 1, 2, 4, ..., and the search says at which the child does best."""
    max_batch_size: int = Field(32, ge=1)
    """Where a sweep ends; what does not fit this machine's memory is left out."""
    prefill_tokens: int = Field(128, ge=1)
    """Prompt tokens of each request."""
    decode_tokens: int = Field(64, ge=1)
    """Generated tokens of each request."""
    weight: float = Field(1.0, gt=0)
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
    threads: int | None = Field(None, ge=1)
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
    scenarios: list[ScenarioSettings] = [ScenarioSettings()]
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
        if not names or len(set(names)) < len(names) or "mix" in names:
            raise ValueError("scenarios need at least one entry, and names that differ; 'mix' means all of them")
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


def _fields_at(location: Sequence[Any]) -> list[str]:
    """The names that a recipe knows at the place an unknown key was found."""
    model: Any = Recipe
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", ())
        model = arguments[0] if arguments else annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f" Did you mean {close[0]}?" if close else f" Known: {', '.join(known)}."
        return f"The recipe does not know the key {where}.{hint}"
    if first["type"] == "missing":
        return f"The recipe lacks the key {where}."
    return f"The recipe's {where or 'settings'}: {first['msg']} (given: {first['input']!r:.80})."


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set one dotted key, `search.limits.speedup=1.5`, in place. The value is read as YAML.

    Raises:
        RecipeError: no `=`, or a path through something that is not a mapping.
    """
    path, sign, text = override.partition("=")
    if not sign or not path:
        raise RecipeError(f"'{override}' is not an override; write key=value, such as search.limits.speedup=1.5.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"The value of '{override}' is not YAML.") from None
    node: Any = data
    *parents, last = path.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) and part.isdigit() else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"'{path}' leads through {part}, which holds a value and not settings.")
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def parse_recipe(text: str, overrides: Sequence[str] = (), name: str = "recipe") -> Recipe:
    """A recipe from YAML and dotted overrides.

    Raises:
        RecipeError: not YAML, unknown keys (with the nearest known one), values out of range.
    """
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{name} holds no settings.")
    for override in overrides:
        try:
            apply_override(data, override)
        except (IndexError, ValueError):
            raise RecipeError(f"'{override}' names a list entry that does not exist.") from None
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(_explain(error)) from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`parse_recipe` of a file.

    Raises:
        RecipeError: also when the file does not exist.
    """
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}. Examples are in recipes/.")
    return parse_recipe(path.read_text(), overrides, str(path))


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


def search_space_of(recipe: Recipe, shape: ParentShape) -> SearchSpace:
    """The recipe's search space on a parent."""
    s = recipe.search_space
    return build_search_space(
        shape,
        s.kv_heads,
        s.width_fractions,
        s.multiple_of,
        {"attention": s.attention_linear, "ffn": s.ffn_linear},
        {"attention": s.attention_no_op, "ffn": s.ffn_no_op},
        s.layers,
    )
