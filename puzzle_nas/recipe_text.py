"""Recipes as people write them: YAML and overrides read, mistakes said in a sentence, settings explained. No torch."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from puzzle_nas.errors import ArtifactError, RecipeError, puzzle_command
from puzzle_nas.recipe import PARENT_SAMPLES, PYTHON_STDLIB, Recipe, Settings
from puzzle_nas.removed_settings import what_is_removed
from puzzle_nas.text_files import read_text


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
        RecipeError: not YAML, settings that are gone (with what to do instead), unknown keys (with the nearest known
            one), values out of range.
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
    if sentence := what_is_removed(data):
        raise RecipeError(sentence)
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

NOT_PATHS = (PYTHON_STDLIB, PARENT_SAMPLES)
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
