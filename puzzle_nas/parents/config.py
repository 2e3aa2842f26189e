"""A checkpoint's config.json as transformers reads it, or one sentence with the field and its value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError, StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig

from puzzle_nas.errors import CheckpointError
from puzzle_nas.parents.fit import quiet
from puzzle_nas.parents.problems import LIBRARY_ERRORS, first_line, problem
from puzzle_nas.parents.weights import read_object


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: a field is missing, of another type, or at odds with others; or the model is unknown.
    """
    fields = read_object(folder / "config.json")
    check_model_type(folder, fields)
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        raise explained(folder, fields, error) from error


def check_model_type(folder: Path, fields: dict[str, Any]) -> None:
    """Raises: CheckpointError: transformers does not know the model, or has no causal language model of it."""
    value = fields.get("model_type")
    if not isinstance(value, str):
        raise problem(
            "field", file=folder / "config.json", field="model_type", value=repr(value), expected="a family is expected"
        )
    if value not in CONFIG_MAPPING:
        if "auto_map" in fields:
            raise problem("own code", where=folder, file=_own_code(fields["auto_map"]), value=value)
        raise problem("unknown model", where=folder, value=value, version=transformers.__version__)
    if CONFIG_MAPPING[value] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise problem("not a language model", where=folder, value=value)


def _own_code(auto_map: Any) -> str:
    """The file that an auto_map names."""
    text = str(next(iter(auto_map.values()), auto_map)) if isinstance(auto_map, dict) else str(auto_map)
    return text.split("--")[-1].split(".")[0] + ".py"


def explained(folder: Path, fields: dict[str, Any], error: BaseException) -> CheckpointError:
    """What transformers' refusal of a configuration means."""
    text = str(error.__cause__ or error)
    if isinstance(error, StrictDataclassFieldValidationError):
        field = (re.search(r"field '(\w+)'", str(error)) or [None, "?"])[1]
        return problem(
            "field", file=folder / "config.json", field=field, value=repr(fields.get(field)), expected=_expected(text)
        )
    if isinstance(error, StrictDataclassError):
        return problem("contradiction", where=folder, reason=_sentence(text))
    return problem("contradiction", where=folder, reason=_sentence(first_line(error, 300)))


def _expected(text: str) -> str:
    """The types that a field may have, from the text of a strict dataclass's error."""
    types = re.findall(r"expected (?:an? )?(\w+)", text)
    known = {"int": "a whole number", "float": "a number with a point", "bool": "true or false", "str": "a text"}
    known |= {"NoneType": "null", "dict": "an object"}
    names = list(dict.fromkeys(known.get(name, f"a {name}") for name in types))
    return f"{' or '.join(names)} is expected" if names else _sentence(text.splitlines()[0])


def _sentence(text: str) -> str:
    """One line, without the quotes that a KeyError puts around its text."""
    return " ".join(text.strip("\"'").split())[:300]


def read_generation_config(folder: Path, config: PreTrainedConfig) -> GenerationConfig:
    """How a checkpoint generates: generation_config.json where there is one.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    read_object(file)
    try:
        with quiet():
            return GenerationConfig.from_pretrained(folder)
    except LIBRARY_ERRORS as error:
        raise problem("cut file", file=file, reason=first_line(error)) from error
