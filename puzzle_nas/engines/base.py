"""What every engine does: time request batches; serving engines also give log-probabilities and serve."""

from __future__ import annotations

import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from puzzle_nas.artifacts import explained_disk_errors, read_json
from puzzle_nas.engines.environments import environment_python, install_environment
from puzzle_nas.engines.worker import Worker
from puzzle_nas.errors import EngineError, ExportError
from puzzle_nas.exporters import EXPORTERS, Child
from puzzle_nas.machine import Machine, describe, free_bytes
from puzzle_nas.scenario import Scenario
from puzzle_nas.specs import Spec

M = TypeVar("M")

VERIFICATION_CHUNK_TOKENS = 64
"""Tokens that an engine takes at once during verification, so that prompts of moderate length cross borders."""

EXPORT_RECORD = "export.json"
"""What a finished export is, and how it was verified."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RequestTime:
    """Milliseconds of one request batch."""

    prefill_ms: float
    """All prompt tokens, logits of the last position only."""
    decode_step_ms: float
    """One token for every request of the batch."""

    def total_ms(self, scenario: Scenario) -> float:
        """Prefill and every decode step."""
        return self.prefill_ms + scenario.decode_steps * self.decode_step_ms


@dataclass(frozen=True)
class Loading:
    """How an engine loads an export, where it offers a choice."""

    dtype: str | None = None
    """Into what the weights are converted; None leaves them as exported."""
    kv_format: str | None = None
    """Of the KV cache, by the engine's own name; None is the engine's default."""
    tensor_parallel: int = 1
    """Devices that share every layer."""


@dataclass(frozen=True)
class Tolerance:
    """How far an engine's log-probabilities of given tokens may lie from torch's, in nats."""

    mean_nats: float
    max_nats: float


class Engine(ABC, Generic[M]):
    """Times models of type `M`."""

    name: ClassVar[str]
    vector_itemsize: ClassVar[int | None] = None
    """Bytes of a number in norms and biases; None: as in matrices without a format."""

    @abstractmethod
    def python(self) -> Path:
        """The interpreter that it runs in.

        Raises:
            EngineError: not installed; the message names the command that installs it.
        """

    def weights_dtype(self, computed: torch.dtype) -> torch.dtype:
        """In which it holds weights that have no format, of a model that torch computes in `computed`."""
        return computed

    def filler_bytes(self, spec: Spec, config: PreTrainedConfig) -> int:
        """Bytes, at most, that its files need besides the weights of such a sub-block of a parent of `config`."""
        return 0

    @abstractmethod
    def describe(self, machine: Machine) -> dict[str, Any]:
        """What times that it measures belong to: engine, versions, processor, precision, threads."""

    @abstractmethod
    def holds(self, models: Mapping[str, PreTrainedModel]) -> bool:
        """Whether `loaded` has all of them ready at once; otherwise the first one and one other."""

    @abstractmethod
    def loaded(
        self, models: Mapping[str, PreTrainedModel], scratch: Path, kv_format: str | None = None
    ) -> AbstractContextManager[Mapping[str, M]]:
        """What the other methods time, prepared, by the name of a model; weights without a format in `weights_dtype`.

        Where the engine does not hold all models, asking for another one takes as long as loading it. What has to be
        written for that goes to `scratch` for a while.

        Args:
            kv_format: of the KV cache, by the engine's own name; None is the engine's default.

        Raises:
            EngineError: not installed, or it cannot load a model.
            ExportError: its format cannot hold a model.
        """

    @abstractmethod
    def prepare(self, model: M) -> None:
        """Run once, so that kernels are chosen and memory is touched."""

    @abstractmethod
    def time_request(self, model: M, scenario: Scenario) -> RequestTime:
        """A whole request batch, every decode step included."""

    @abstractmethod
    def time_parts(self, model: M, scenario: Scenario, decode_steps: int) -> RequestTime:
        """A whole prefill, and some decode steps around the middle of the decode."""


class ServingEngine(Engine[Worker]):
    """An engine in an environment and processes of its own, driven through a worker script.

    The worker answers `load`, `log_probabilities`, `continue_greedily`, `time_request`, `time_parts` and `memory`;
    see engines/workers/protocol.py. A model of this engine is the worker that has loaded it.
    """

    worker_bytes: ClassVar[int]
    """What a process of it takes, at most, besides the weights."""
    device: ClassVar[str] = "cpu"
    """Where it computes, as torch calls it."""
    formats: ClassVar[tuple[str, ...]]
    """Keys of `exporters.EXPORTERS` that it loads; the first is what it is measured on."""
    requirements: ClassVar[tuple[str, ...]]
    """What pip installs into its environment; empty means that it runs in ours."""
    worker_script: ClassVar[Path]
    """Run by the environment's Python; imports nothing of ours but what lies beside it."""
    tolerances: ClassVar[Mapping[str, Tolerance]]
    """By precision (float32, bfloat16, float16, or a quantised type)."""
    rounds_activations: ClassVar[str | None] = None
    """The key of `tolerances` for a child in formats, whose products round what they receive."""
    served_in_16_bits: ClassVar[str | None] = None
    """The key of `tolerances` for a child in formats as it is served, where verification takes other products."""
    gives_logits: ClassVar[bool] = False
    """Whether its worker answers `logits`."""
    reads_tokenizer: ClassVar[bool] = False
    """Whether it has a tokenizer of its own, written into the export, that must agree with the child's."""
    quantised: ClassVar[tuple[str, ...]] = ()
    """Types that `quantise` can make."""
    dtypes: ClassVar[tuple[str, ...]] = ()
    """Into what it converts weights that it loads."""
    kv_formats: ClassVar[tuple[str, ...]] = ()
    """What its KV cache can be, by its own names."""
    shares_layers: ClassVar[bool] = False
    """Whether several devices can share every layer (tensor parallelism)."""

    def weights_dtype(self, computed: torch.dtype) -> torch.dtype:
        """See `Engine.weights_dtype`: 16 bits, as people serve models, also where torch computes faster in 32."""
        return torch.bfloat16 if computed == torch.float32 else computed

    def tolerance(self, child: Child, dtype: str) -> Tolerance:
        """For the first verification of a child written in `dtype`."""
        in_formats = self.rounds_activations if child.architecture.formats else None
        return self.tolerances[in_formats or dtype]

    def install(self) -> Path:
        """Make the engine's environment, or see that it is there, and return its folder.

        Raises:
            EngineError: pip failed, or the engine needs no environment of its own.
        """
        if not self.requirements:
            raise EngineError(f"{self.name} comes with puzzle-nas; there is nothing to install.")
        return install_environment(self.environment_name, self.installation(), self.made_from())

    def python(self) -> Path:
        """See `Engine.python`; it runs the worker."""
        if not self.requirements:
            return Path(sys.executable)
        return environment_python(self.environment_name, self.made_from())

    @property
    def environment_name(self) -> str:
        """The environment's folder, and what `puzzle engine install` takes."""
        return self.name

    def installation(self) -> list[list[str]]:
        """The pip commands that fill the environment, each the arguments after `pip`."""
        return [["install", *self.requirements]]

    def made_from(self) -> dict[str, Any]:
        """What the environment is made from; another value means that it is out of date."""
        return {"requirements": list(self.requirements)}

    def environment(self) -> dict[str, str]:
        """Environment variables that the worker and the server need."""
        return {}

    @abstractmethod
    def server_command(self, exported: Path, port: int, context: int | None) -> list[str]:
        """What serves an export on loopback with the OpenAI API.

        Args:
            context: tokens of the longest request; None means the model's positions, where memory allows.

        Raises:
            EngineError: the engine has no server, or the model fewer positions.
        """

    def last_words(self, lines: list[str]) -> str:
        """Why a server ended, from what it wrote."""
        return " / ".join(lines[-3:])[-500:] or "it said nothing"

    def refuse_here(self, formats: Iterable[str], kv_format: str | None) -> None:
        """Refuse formats, of weights or of the KV cache, with which this engine computes something else on this
        machine, or nothing.

        Raises:
            ExportError: names the format, and why.
        """

    def loading_of(self, exported: Path) -> Loading:
        """How an export is to be loaded where it is served; as the engine would by itself where no record says."""
        record = exported / EXPORT_RECORD
        return Loading(kv_format=read_json(record).get("kv_format") if record.is_file() else None)

    def precision_of(self, exported: Path) -> str:
        """The precision of a finished export.

        Raises:
            ExportError: there is no finished export, or one for another engine, or `refuse_here`.
        """
        if not (exported / EXPORT_RECORD).is_file():
            raise ExportError(f"{exported} is not an export. Make one with: puzzle export CHILD --to {self.formats[0]}")
        record = read_json(exported / EXPORT_RECORD)
        if record["format"] not in self.formats:
            formats = " or ".join(self.formats)
            raise ExportError(f"{exported} holds {record['format']}, and {self.name} loads {formats}.")
        self.refuse_here(record.get("formats", ()), record.get("kv_format"))
        return record["precision"]

    def refuse(self, loading: Loading) -> None:
        """Refuse what the engine does not offer.

        Raises:
            ExportError: names the way out.
        """
        if loading.tensor_parallel > 1 and not self.shares_layers:
            raise ExportError(f"{self.name} has no tensor parallelism; leave out --tensor-parallel.")
        if loading.dtype is not None and loading.dtype not in self.dtypes:
            way_out = f"choose one of {', '.join(self.dtypes)}" if self.dtypes else "make another export instead"
            raise ExportError(f"{self.name} does not convert weights to {loading.dtype}; {way_out}.")
        if loading.kv_format is not None and loading.kv_format not in self.kv_formats:
            way_out = f"choose one of {', '.join(self.kv_formats)}" if self.kv_formats else "leave out --kv-format"
            raise ExportError(f"{self.name} has no KV cache in {loading.kv_format}; {way_out}.")
        self.refuse_here((), loading.kv_format)

    @contextmanager
    def load(
        self,
        exported: Path,
        precision: str,
        threads: int | None = None,
        exact: bool = False,
        loading: Loading | None = None,
    ) -> Iterator[Worker]:
        """A worker that has loaded an export folder; it ends with the context.

        `exact` is for verification: the most precise arithmetic, chunks of `VERIFICATION_CHUNK_TOKENS`.

        Raises:
            EngineError: not installed, or the engine cannot load this export; quotes the engine.
        """
        with self.start() as worker:
            self.load_into(worker, exported, precision, threads, exact, loading)
            yield worker

    def start(self) -> Worker:
        """A worker that has loaded nothing yet."""
        return Worker(self.name, self.python(), self.worker_script, self.environment())

    def load_into(
        self,
        worker: Worker,
        exported: Path,
        precision: str,
        threads: int | None,
        exact: bool,
        loading: Loading | None = None,
    ) -> None:
        """See `load`; what the worker had loaded before, it forgets."""
        loading = loading or Loading()
        worker.ask(
            "load",
            folder=str(exported.resolve()),
            precision=loading.dtype or precision,
            threads=threads,
            chunk_tokens=VERIFICATION_CHUNK_TOKENS if exact else None,
            kv_format=loading.kv_format,
            tensor_parallel=loading.tensor_parallel,
        )

    def holds(self, models: Mapping[str, PreTrainedModel]) -> bool:
        """See `Engine.holds`: each in a process of its own, where half of the free memory takes them."""
        weights = sum(m.num_parameters() * self.weights_dtype(m.dtype).itemsize for m in models.values())
        return len(models) <= 2 or weights + len(models) * self.worker_bytes < free_bytes(torch.device("cpu")) / 2

    @contextmanager
    def loaded(
        self, models: Mapping[str, PreTrainedModel], scratch: Path, kv_format: str | None = None
    ) -> Iterator[Mapping[str, Worker]]:
        """See `Engine.loaded`. Models are exported without tokenizer, and not verified: only times are of interest."""
        children = {name: Child(model, None) for name, model in models.items()}
        for child in children.values():
            EXPORTERS[self.formats[0]].refuse(child)
        with ExitStack() as stack:
            yield _LoadedModels(self, children, scratch, stack, self.holds(models), Loading(kv_format=kv_format))

    def describe(self, machine: Machine) -> dict[str, Any]:
        """See `Engine.describe`."""
        with self.start() as worker:
            version = self.version(worker)
        own = replace(machine, device=torch.device(self.device), dtype=self.weights_dtype(machine.dtype))
        return {"engine": self.name, **describe(own), **version}

    def log_probabilities(self, model: Worker, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p(token t + 1 | tokens 0..t) in nats, one fewer than each prompt has tokens. Prompts run batched."""
        return model.ask("log_probabilities", prompts=[list(p) for p in prompts])

    def continue_greedily(self, model: Worker, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """The `num_tokens` most likely next tokens of each prompt, never stopping early. Prompts run batched."""
        return model.ask("continue_greedily", prompts=[list(p) for p in prompts], num_tokens=num_tokens)

    def tokenize(self, model: Worker, text: str) -> list[int]:
        """Token ids of a text by the engine's own tokenizer, with what it puts around text."""
        return model.ask("tokenize", text=text)

    def quantise(self, exported: Path, kind: str) -> dict[str, int]:
        """Replace an export's weights by quantised ones, in place. `kind` is one of `quantised`.

        Returns:
            How many tensors are of which type now: what a type does not fit stays, or becomes another one.
        """
        raise NotImplementedError

    def tensor_types(self, exported: Path) -> dict[str, int]:
        """How many tensors of an export are of which type, where its file says so."""
        return {}

    def logits(self, model: Worker, prompts: Sequence[Sequence[int]], path: Path) -> None:
        """Write what the engine computes after every token of prompts of one length: float32 [B, T, V], raw."""
        model.ask("logits", prompts=[list(prompt) for prompt in prompts], path=str(path))

    def prepare(self, model: Worker) -> None:
        """See `Engine.prepare`."""
        self.time_request(model, Scenario("warm-up", 1, 8, 3))

    def time_request(self, model: Worker, scenario: Scenario) -> RequestTime:
        """See `Engine.time_request`."""
        return RequestTime(**model.ask("time_request", **_sizes(scenario)))

    def time_parts(self, model: Worker, scenario: Scenario, decode_steps: int) -> RequestTime:
        """See `Engine.time_parts`."""
        steps = min(decode_steps, scenario.decode_steps)
        return RequestTime(**model.ask("time_parts", **_sizes(scenario), measured_steps=steps))

    def memory(self, model: Worker) -> dict[str, int | None]:
        """`peak_bytes` of the worker so far and `kv_cache_bytes_per_token` of one sequence; None where unknown.

        With windows there is no one number of bytes for a token.
        """
        return model.ask("memory")

    def version(self, model: Worker) -> dict[str, Any]:
        """Versions of everything that computes."""
        return model.ask("version")


class _LoadedModels(Mapping[str, Worker]):
    """Models that are exported and loaded when asked for.

    Each has a worker of its own; or only the first one, and the others share another, which forgets one when it loads
    the next.
    """

    def __init__(
        self,
        engine: ServingEngine,
        children: Mapping[str, Child],
        scratch: Path,
        stack: ExitStack,
        holds_all: bool,
        loading: Loading,
    ):
        self._engine, self._children, self._scratch, self._stack = engine, children, scratch, stack
        self._loading = loading
        self._place = {name: number if holds_all else min(number, 1) for number, name in enumerate(children)}
        self._workers: dict[int, Worker] = {}
        self._held: dict[int, str] = {}

    def __getitem__(self, name: str) -> Worker:
        place = self._place[name]
        if place not in self._workers:
            self._workers[place] = self._stack.enter_context(self._engine.start())
        worker = self._workers[place]
        if self._held.get(place) != name:
            self._held.pop(place, None)
            self._load(worker, self._children[name])
            self._held[place] = name
        return worker

    def _load(self, worker: Worker, child: Child) -> None:
        precision = str(self._engine.weights_dtype(child.model.dtype)).removeprefix("torch.")
        with explained_disk_errors(self._scratch):
            self._scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
                EXPORTERS[self._engine.formats[0]].write(child, Path(folder), precision)
                self._engine.load_into(
                    worker, Path(folder), precision, torch.get_num_threads(), exact=False, loading=self._loading
                )
                self._engine.prepare(worker)

    def __iter__(self) -> Iterator[str]:
        return iter(self._children)

    def __len__(self) -> int:
        return len(self._children)


def _sizes(scenario: Scenario) -> dict[str, int]:
    return {
        "batch_size": scenario.batch_size,
        "prefill_tokens": scenario.prefill_tokens,
        "decode_steps": scenario.decode_steps,
    }
