"""A worker's metrics.

Owns: their names and meanings. Must not know: how the worker computes, HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.common.metrics import Families, Family
from services.common.tally import Watched
from services.common.values import WorkerInfo, WorkerLoad

READY = Family("worker_ready", "1 once the model is loaded and the worker is not draining, else 0.")
SEQUENCES = Family("num_sequences", "Sequences open.")
QUEUED = Family("num_queued_items", "Items that wait for a step.")
BLOCKS_USED = Family("kv_cache_blocks_used", "Blocks of the KV pool in use.")
BLOCKS = Family("kv_cache_blocks", "Blocks of the KV pool in all.")
KV_USAGE = Family("kv_cache_usage_perc", "Share of the KV pool's blocks in use, from 0 to 1.")
STEP_S = Family("step_duration_seconds", "Duration of a step of the engine in seconds; its sum is the busy time.")
STEP_SEQUENCES = Family("step_sequences", "Sequences in a step: the batch.")
STEP_ROWS = Family("step_rows", "Rows of a step: positions whose logits were wanted.")
QUEUE_S = Family("queue_time_seconds", "From an item's arrival to the start of its first step, in seconds.")
PREFILL_TOKENS = Family("prefill_tokens", "Tokens of prompts computed in steps, those of preempted sequences again.")
TOKENS = Family("worker_tokens", "Tokens answered: drafted by a draft, accepted or its own by a target.")
PREFIX_QUERIES = Family("prefix_cache_queries", "Tokens looked up in the prefix cache.")
PREFIX_HITS = Family("prefix_cache_hits", "Tokens found in the prefix cache.")
MEMORY_USED = Family("device_memory_used_bytes", "Memory in use on the device; on a CPU that of the worker's process.")
MEMORY = Family("device_memory_bytes", "Memory of the device, or of the machine.")
UTILISATION = Family(
    "device_utilisation_ratio", "Share of time in which the device computed, as its driver reports it."
)


class WorkerCollector(Collector):
    """Reads a worker when it is asked. Before `set_ready` it only says that the worker is not ready."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._families = Families({"role": role})
        self._watched: Watched | None = None
        self._load: Callable[[], WorkerLoad] = WorkerLoad

    def set_ready(self, info: WorkerInfo, watched: Watched, load: Callable[[], WorkerLoad]) -> None:
        name = info.model.name if info.model else info.drafter
        self._families = Families({"role": self._role, "model_name": name})
        self._watched, self._load = watched, load

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        watched, load, families = self._watched, self._load(), self._families
        yield families.gauge(READY, [((), float(watched is not None and not load.draining))])
        if watched is None:
            return
        yield families.gauge(SEQUENCES, [((), load.num_sequences)])
        yield families.gauge(QUEUED, [((), load.num_queued)])
        if load.num_blocks:
            yield families.gauge(BLOCKS_USED, [((), load.num_used_blocks)])
            yield families.gauge(BLOCKS, [((), load.num_blocks)])
            yield families.gauge(KV_USAGE, [((), load.num_used_blocks / load.num_blocks)])
        yield from self._steps(watched)
        yield from self._device(watched)

    def _steps(self, watched: Watched) -> Iterable[Metric]:
        families, tally = self._families, watched.tally
        yield families.histogram(STEP_S, [((), tally.step_s)])
        yield families.histogram(STEP_SEQUENCES, [((), tally.step_sequences)])
        yield families.histogram(STEP_ROWS, [((), tally.step_rows)])
        yield families.histogram(QUEUE_S, [((), tally.queue_s)])
        yield families.counter(PREFILL_TOKENS, [((), tally.num_prefill_tokens)])
        yield families.counter(TOKENS, [((), tally.num_tokens)])
        num_tokens, num_hit_tokens = watched.prefix_cache()
        yield families.counter(PREFIX_QUERIES, [((), num_tokens)])
        yield families.counter(PREFIX_HITS, [((), num_hit_tokens)])

    def _device(self, watched: Watched) -> Iterable[Metric]:
        usage = watched.device()
        if usage.memory_total_bytes:
            yield self._families.gauge(MEMORY_USED, [((), usage.memory_used_bytes)])
            yield self._families.gauge(MEMORY, [((), usage.memory_total_bytes)])
        if (utilisation := watched.utilisation()) is not None:
            yield self._families.gauge(UTILISATION, [((), utilisation)])
