"""The target worker's composition root: configuration in, a serving worker out.

Owns: which model stands behind the core. Must not know: scheduling, verification. torch is loaded for models only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import NamedTuple

from outrider.v1 import target_pb2

from services.common.failure import Failure
from services.common.tally import Watched, WorkerTally
from services.common.telemetry_settings import METRICS_OFF
from services.common.tracing import NO_TRACER, Tracer
from services.common.values import WorkerInfo
from services.common.worker_server import (
    BuiltWorker,
    Recipe,
    RunningWorker,
    new_instance_id,
    nothing_to_close,
    running_worker,
    serve_worker,
)
from services.engine.block_manager import BlockManager
from services.engine.device_usage import device_usage_of, utilisation_of
from services.engine.engine_thread import EngineThread
from services.engine.prefix_cache import model_key
from services.engine.simulated import (
    SIMULATED,
    SIMULATED_MAX_SEQUENCE_LEN,
    SIMULATED_NUM_BLOCKS,
    SimulatedTarget,
    simulated_info,
)
from services.engine.step import TargetModel
from services.target.config import TargetConfig
from services.target.core import TargetCore
from services.target.servicer import TargetServicer


async def serve(config: TargetConfig) -> None:
    """Serves until SIGTERM or SIGINT."""
    await serve_worker(config, _recipe(config))


def running_target(
    config: TargetConfig, metrics_port: int = METRICS_OFF, tracer: Tracer = NO_TRACER
) -> AbstractAsyncContextManager[RunningWorker]:
    """A target worker inside this process, from enter to exit."""
    return running_worker(config, _recipe(config), metrics_port, tracer)


def _recipe(config: TargetConfig) -> Recipe:
    service = target_pb2.DESCRIPTOR.services_by_name["TargetService"]
    return Recipe("target", service, TargetServicer, lambda: build(config))


class _Model(NamedTuple):
    """What stands behind the core, and how it ends."""

    model: TargetModel
    blocks: BlockManager
    max_sequence_len: int
    close: Callable[[], None] = nothing_to_close


def build(config: TargetConfig) -> BuiltWorker:
    """Loads the model. Raises ConfigError or ModelUnsupported."""
    failure = Failure()
    model, blocks, model_len, close = _simulated(config) if config.model == SIMULATED else _paged(config, failure)
    max_sequence_len = min(config.max_sequence_len or model_len, model_len, blocks.num_blocks * blocks.block_size)
    tally = WorkerTally()
    core = TargetCore(
        model,
        blocks,
        max_sequences=config.max_sequences,
        max_sequence_len=max_sequence_len,
        max_draft_tokens=config.max_draft_tokens,
        prefill_budget=config.prefill_budget,
        tally=tally,
    )
    info = WorkerInfo(
        instance_id=new_instance_id(),
        role="target",
        model=replace(model.info, name=config.model_name or model.info.name),
        drafter="",
        max_draft_tokens=config.max_draft_tokens,
        max_sequences=config.max_sequences,
        max_sequence_len=max_sequence_len,
    )
    engine = EngineThread(core, "target engine", config.max_queued_items, failure)
    device = config.device
    watched = Watched(tally, lambda: core.prefix_cache_stats, device_usage_of(device), utilisation_of(device))
    return BuiltWorker(engine, info, watched, close)


def _simulated(config: TargetConfig) -> _Model:
    blocks = BlockManager(config.num_blocks or SIMULATED_NUM_BLOCKS, config.block_size, model_key(simulated_info()))
    model = SimulatedTarget(
        blocks,
        step_ms=config.simulated_step_ms,
        row_ms=config.simulated_row_ms,
        prefill_token_ms=config.simulated_prefill_token_ms,
    )
    return _Model(model, blocks, SIMULATED_MAX_SEQUENCE_LEN)


def _paged(config: TargetConfig, failure: Failure) -> _Model:
    from services.engine.composition import engine_of
    from services.engine.paged_model import PagedTargetModel
    from services.engine.verifier import Verifier

    engine = engine_of(config, failure)
    blocks = BlockManager(engine.num_blocks, engine.block_size, model_key(engine.info))
    model = PagedTargetModel(engine, Verifier(config.untrusted_drafts))
    return _Model(model, blocks, engine.max_sequence_len, engine.close)
