"""What a recipe is refused for as far as the parent's configuration tells, before text is read or anything is timed."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from puzzle_nas.choosing.cost_fit import parts_of
from puzzle_nas.data.sources import is_local, local_files
from puzzle_nas.engines import ENGINES, ServingEngine
from puzzle_nas.errors import RecipeError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.families import architecture_of, head_dim_of
from puzzle_nas.formats.layout import layout_of
from puzzle_nas.planning.shapes import part_weights
from puzzle_nas.recipe import PARENT_SAMPLES, PYTHON_STDLIB, Recipe, search_space_of
from puzzle_nas.servable import SERVERS
from puzzle_nas.specs import GatedFFN, GroupedAttention, Linear, Mixture, NoOp, Spec, WindowAttention

SETTINGS: dict[type[Spec], tuple[str, ...]] = {
    GroupedAttention: ("kv_heads",),
    WindowAttention: ("windows",),
    GatedFFN: ("width_fractions",),
    Mixture: ("expert_counts", "experts_per_token", "width_fractions"),
    Linear: ("linear",),
    NoOp: ("no_op",),
}
"""By kind of variant, the settings of search_space that ask for it."""
KV_BLOCK = 32
"""Numbers of a head that llama.cpp stores together in each of its quantised caches (ggml-common.h), and that vLLM takes
together of fp8 on CPUs."""


def check_shapes(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse what does not suit the parent's sizes: the engine, formats, the KV cache's format, lengths of requests.

    Args:
        model: the parent; weights on the meta device are enough.

    Raises:
        RecipeError, FormatError: with the way out.
    """
    check_lengths(recipe, model.config)
    _check_engine(recipe, model)
    _check_kv_format(recipe, model.config)
    for part in parts_of(search_space_of(recipe, architecture_of(model.config))):
        if part.spec.format is not None:
            for name, weight in part_weights(model, part).items():
                if weight.ndim > 1:
                    layout_of(part.spec.format).check(weight.shape[1], f"{name} of {part.spec.id}")


def check_files(recipe: Recipe) -> None:
    """Refuse sources of text that name files which are not there.

    Raises:
        DataError: names the first of them.
    """
    for source in recipe.data.sources:
        if source.source not in (PYTHON_STDLIB, PARENT_SAMPLES) and is_local(source.source):
            local_files(source.source)


def check_lengths(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raises: RecipeError: a scenario's requests are longer than the parent's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    for scenario in recipe.traffic():
        if positions is not None and scenario.total_tokens > positions:
            raise RecipeError(
                f"The scenario {scenario.name} takes {scenario.total_tokens} tokens, but the parent has {positions} "
                "positions; lower its prefill_tokens or decode_tokens."
            )


def _check_engine(recipe: Recipe, model: PreTrainedModel) -> None:
    engine = ENGINES[recipe.engine]
    if not isinstance(engine, ServingEngine):
        return
    if reasons := EXPORTERS[engine.formats[0]].reasons(Child(model, None)):
        raise RecipeError(
            f"The engine {engine.name} does not serve this parent: {'; '.join(reasons)}. Set another engine "
            "(`puzzle inspect PARENT` lists those that do), or engine: torch and no search_space.formats."
        )
    family, server = model.config.model_type, SERVERS[recipe.engine]
    space = search_space_of(recipe, architecture_of(model.config))
    refused: dict[str, None] = {}
    settings: dict[str, None] = {}
    for layer, slot, spec in space:
        reason = server.refusal(layer, spec.plain, space.own(layer, slot), family)
        if reason is not None:
            refused[reason] = None
            settings |= dict.fromkeys(SETTINGS[type(spec)])
    if refused:
        first, *more = refused
        others = f", and so on ({len(more)} more)" if more else ""
        asked = [name for name in settings if getattr(recipe.search_space, name) != []]
        way_out = " ".join(f"search_space.{name}=[]" for name in asked)
        raise RecipeError(f"The recipe searches what the engine does not serve: {first}{others}. Set {way_out}.")


def _check_kv_format(recipe: Recipe, config: PreTrainedConfig) -> None:
    if recipe.kv_format is None:
        return
    number, head_dim = SERVERS[recipe.engine].kv_formats[recipe.kv_format], head_dim_of(config)
    # Formats in blocks take parts of bytes; vLLM's products on CPUs take 32 numbers of fp8 at once.
    engine, is_fp8 = ENGINES[recipe.engine], recipe.kv_format.startswith("fp8")
    in_blocks = isinstance(engine, ServingEngine) and engine.device == "cpu" if is_fp8 else number % 1
    if in_blocks and head_dim % KV_BLOCK:
        other = "" if is_fp8 else "set kv_format to f16, or "
        raise RecipeError(
            f"The parent's heads of {head_dim} numbers do not divide into {recipe.kv_format}'s blocks of {KV_BLOCK}; "
            f"{other}leave kv_format out."
        )
