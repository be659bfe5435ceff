"""`outrider bench --peers`: transformers' own ways to generate, on the same prompts, in a process of its own.

Owns: that process, and what its times come to. Must not know: torch, or how a peer generates (services.engine.peers).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console

from services.cli.bench.acceptance import ratio
from services.cli.bench.report import Percentiles
from services.cli.bench.sample import Sample
from services.cli.cluster import SIMULATED, ClusterSpec, child_environment, prepare_model
from services.cli.failure import CommandFailed
from services.cli.processes import tethered
from services.cli.terminal import progress_bar
from services.client import GenerateOptions

PEERS = ("transformers", "assisted", "prompt-lookup")


@dataclass(frozen=True, slots=True)
class Task:
    """What the process is told; the same fields as services.engine.peers.Task."""

    target: str
    draft: str
    peers: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    max_tokens: int
    num_draft_tokens: int
    dtype: str
    device: str
    threads: int
    temperature: float
    seed: int
    ignore_eos: bool


class Timed(NamedTuple):
    """One generation. `steps` holds (ns since the start, tokens so far) behind each forward of the target."""

    peer: str
    prompt: int
    token_ids: tuple[int, ...]
    total_ns: int
    steps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PeerReport:
    """One peer. Times are its own process's, without any service between.

    `num_identical_outputs` compares with Outrider's outputs for the same prompts, at temperature 0 only.
    `mean_acceptance_length` is tokens a forward of the target. With a `failure`, its reason, the figures are of the
    requests before it.
    """

    name: str
    version: str
    num_requests: int
    num_tokens: int
    tokens_per_s: float | None
    decode_ms_per_token: float | None
    ttft_ms: Percentiles
    total_ms: Percentiles
    mean_acceptance_length: float | None
    num_identical_outputs: int | None
    failure: str | None = None


def check_peers(peers: Sequence[str], target: str, drafters: Sequence[str], *, own_cluster: bool) -> None:
    """Raises CommandFailed where they cannot run, before anything is measured. `drafters`: those of all cases."""
    if not peers:
        return
    if not own_cluster or target == SIMULATED:
        raise CommandFailed("--peers needs a cluster of models that this command starts: no --address, no --simulated")
    if "assisted" in peers and "model" not in drafters:
        raise CommandFailed("--peers assisted needs a draft model: --drafter model --draft MODEL")
    if importlib.util.find_spec("transformers") is None:
        raise CommandFailed("--peers needs transformers: pip install 'outrider[engine]'")


def peers_task(
    peers: Sequence[str], spec: ClusterSpec, options: GenerateOptions, num_draft_tokens: int, samples: Sequence[Sample]
) -> Task:
    """The prompts are those of `samples`, as the target saw them."""
    return Task(
        target=prepare_model(spec.target).directory,
        draft=prepare_model(spec.draft).directory if "assisted" in peers else "",
        peers=tuple(peers),
        prompts=tuple(sample.prompt_token_ids for sample in samples),
        max_tokens=options.max_tokens,
        num_draft_tokens=num_draft_tokens,
        dtype=spec.dtype,
        device=spec.device,
        threads=spec.threads or os.cpu_count() or 1,
        temperature=options.temperature,
        seed=options.seed or 0,
        ignore_eos=options.ignore_eos,
    )


def run_peers(task: Task, samples: Sequence[Sample], console: Console) -> tuple[PeerReport, ...]:
    """Runs all peers over all prompts. Never raises for what a peer, or their process, cannot do: it is reported."""
    timed: dict[str, list[Timed]] = {name: [] for name in task.peers}
    failures: dict[str, str] = {}
    version = ""
    with progress_bar(console) as progress:
        bar = progress.add_task("peers: loading and warming up", total=len(task.peers) * len(task.prompts))
        try:
            for event in _events(task):
                if event["event"] == "ready":
                    version = str(event["version"])
                    progress.update(bar, description="peers")
                elif event["event"] == "failed":
                    failures[event["peer"]] = _without_directories(event["reason"], task)
                else:
                    timed[event["peer"]].append(_timed(event))
                    progress.advance(bar)
        except CommandFailed as failed:
            unfinished = [name for name, done in timed.items() if len(done) < len(task.prompts)]
            failures = dict.fromkeys(unfinished, _without_directories(str(failed), task)) | failures
    expected = [sample.token_ids for sample in samples] if task.temperature == 0 else None
    return tuple(peer_report(name, version, timed[name], expected, failures.get(name)) for name in task.peers)


def failed_peers(peers: Sequence[str], reason: str) -> tuple[PeerReport, ...]:
    """Of peers that could not be started."""
    return tuple(peer_report(name, "", (), None, reason) for name in peers)


def peer_report(
    name: str,
    version: str,
    timed: Sequence[Timed],
    expected: Sequence[tuple[int, ...]] | None,
    failure: str | None = None,
) -> PeerReport:
    """`expected`: Outrider's output for each prompt, to count the equal ones."""
    num_tokens = sum(len(t.token_ids) for t in timed)
    num_identical = None
    if timed and expected is not None:
        num_identical = sum(t.token_ids == expected[t.prompt] for t in timed)
    decode_ms = sum(t.steps[-1][0] - t.steps[0][0] for t in timed if t.steps) / 1e6
    num_decoded = sum(t.steps[-1][1] - t.steps[0][1] for t in timed if t.steps)
    return PeerReport(
        name=name,
        version=version,
        num_requests=len(timed),
        num_tokens=num_tokens,
        tokens_per_s=ratio(num_tokens, sum(t.total_ns for t in timed) / 1e9),
        decode_ms_per_token=ratio(decode_ms, num_decoded),
        ttft_ms=Percentiles.of(t.steps[0][0] / 1e6 for t in timed if t.steps),
        total_ms=Percentiles.of(t.total_ns / 1e6 for t in timed),
        mean_acceptance_length=ratio(num_tokens, sum(len(t.steps) for t in timed)),
        num_identical_outputs=num_identical,
        failure=failure,
    )


def _timed(fields: dict[str, Any]) -> Timed:
    steps = tuple((int(ns), int(count)) for ns, count in fields["steps"])
    return Timed(fields["peer"], fields["prompt"], tuple(fields["token_ids"]), fields["total_ns"], steps)


def _events(task: Task) -> Iterator[dict[str, Any]]:
    command = tethered([sys.executable, "-P", "-m", "services.engine.peers"])
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=child_environment(task.threads),
        )
        with process:
            try:
                yield from _exchange(process, task)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise CommandFailed(f"their process ended with status {process.returncode}{_last_line(errors)}")


def _exchange(process: subprocess.Popen[str], task: Task) -> Iterator[dict[str, Any]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("started without pipes")
    with contextlib.suppress(BrokenPipeError):  # it ended already; its status says why
        process.stdin.write(json.dumps(asdict(task)))
        process.stdin.close()
    for line in process.stdout:
        if line.endswith("\n"):  # else it was killed while writing
            yield json.loads(line)


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return f": {lines[-1]}" if lines else ""


def _without_directories(reason: str, task: Task) -> str:
    """A report names models, never where they lie."""
    for directory in filter(None, (task.target, task.draft)):
        reason = reason.replace(directory, Path(directory).name)
    return reason
