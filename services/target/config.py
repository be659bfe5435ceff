"""The target worker's settings.

Owns: their names and defaults. Must not know: what the worker does with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from services.common.config import setting
from services.common.errors import ConfigError
from services.common.worker_config import WorkerConfig


@dataclass(frozen=True, slots=True)
class TargetConfig(WorkerConfig):
    """Settings of `outrider serve target`."""

    port: int = setting(50053, "Port to listen on; 0 takes a free one.")
    untrusted_drafts: bool = setting(False, "Take every drafted token for a point mass, whatever row it comes with.")
    simulated_step_ms: float = setting(20.0, "Simulated model: milliseconds of a step.")
    simulated_row_ms: float = setting(0.0, "Simulated model: milliseconds for each row of a step.")
    simulated_prefill_token_ms: float = setting(0.0, "Simulated model: milliseconds for each prompt token.")

    def __post_init__(self) -> None:
        WorkerConfig.__post_init__(self)  # a slotted dataclass has no super() without arguments
        if self.dtype == "int8":
            raise ConfigError("dtype: int8 would change the target's own tokens; only a draft may be quantised")
        if self.tensor_parallel_size > 1 and self.model == "simulated":
            raise ConfigError("tensor_parallel_size: a simulated model cannot be cut into shards")
