"""The settings that draft and target workers share.

Owns: their names, defaults and limits. Must not know: what a worker does with them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from services.common.config import setting
from services.common.errors import ConfigError
from services.common.security_config import SecurityConfig
from services.common.telemetry_settings import (
    LOG_FORMAT_HELP,
    LOG_FORMATS,
    METRICS_HELP,
    METRICS_OFF,
    METRICS_PORT,
    TEXT,
    TRACE_ENDPOINT_HELP,
)
from services.common.values import MAX_DRAFT_TOKENS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class WorkerConfig(SecurityConfig):
    """Settings of a worker. Raises ConfigError for values out of range."""

    tls_coordinator_names: str = setting(
        "coordinator",
        "With TLS: DNS or URI names, separated by commas, of the certificates that may call this worker; * stands for "
        "any characters but dots and slashes.",
    )
    port: int = setting(0, "Port to listen on; 0 takes a free one.")
    model: str = setting("sample", "`sample`, a Hugging Face id, a directory, a GGUF file, or `simulated`.")
    model_name: str = setting("", "Name that requests use; empty derives it from the model.")
    dtype: str = setting("float32", "Floating point type.", choices=DTYPES)
    device: str = setting("cpu", "`cpu` or `cuda`.")
    cuda_graph_rows: int = setting(512, "On CUDA, largest step replayed from a recorded graph, in tokens; 0: none.")
    compile: bool = setting(False, "Compile the model's norms and MLPs; the first steps take seconds.")
    tensor_parallel_size: int = setting(1, "Processes that the model is cut into shards for; on CUDA each takes a GPU.")
    threads: int = setting(0, "Threads of the forward on CPU, of all processes together; 0 takes one a core.")
    block_size: int = setting(16, "Tokens of a block of the KV pool.")
    num_blocks: int = setting(0, "Blocks of the KV pool; 0 takes what its memory holds.")
    kv_memory_mb: int = setting(1024, "Memory of the KV pool in MiB, of each process.")
    kv_memory_share: float = setting(
        0.0, "KV pool's share of the memory that weights and workspace leave free, instead of kv_memory_mb; 0: unused."
    )
    max_sequences: int = setting(256, "Most sequences open at once.")
    max_sequence_len: int = setting(0, "Most tokens of a sequence, prompt included; 0 takes the model's own.")
    max_draft_tokens: int = setting(MAX_DRAFT_TOKENS, "Most draft tokens of a round.")
    max_queued_items: int = setting(4096, "Most items that may wait for the engine.")
    prefill_budget: int = setting(512, "Most prompt tokens of one step.")
    drain_s: float = setting(30.0, "Seconds that open sequences get after SIGTERM.")
    reflection: bool = setting(True, "Serve gRPC reflection.")
    log_level: str = setting("info", "Log level.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting(TEXT, LOG_FORMAT_HELP, choices=LOG_FORMATS)
    metrics_port: int = setting(METRICS_PORT, METRICS_HELP)
    trace_endpoint: str = setting("", TRACE_ENDPOINT_HELP)

    def __post_init__(self) -> None:
        self.check_security()
        if self.has_tls and not self.coordinator_names:
            raise ConfigError("tls_coordinator_names: it is empty, so nobody could call this worker")
        limits = {
            "port": (0, 65_535),
            "metrics_port": (METRICS_OFF, 65_535),
            "tensor_parallel_size": (1, 64),
            "threads": (0, 1024),
            "cuda_graph_rows": (0, 4096),
            "block_size": (1, 256),
            "num_blocks": (0, 1 << 24),
            "kv_memory_mb": (1, 1 << 24),
            "kv_memory_share": (0, 1),
            "max_sequences": (1, 65_536),
            "max_sequence_len": (0, 1 << 24),
            "max_draft_tokens": (1, MAX_DRAFT_TOKENS),
            "max_queued_items": (1, 1 << 20),
            "prefill_budget": (1, 1 << 20),
            "drain_s": (0, 86_400),
        }
        for name, (low, high) in limits.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}: {value} is not between {low} and {high}")

    @property
    def coordinator_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.tls_coordinator_names.split(",") if name.strip())

    @property
    def num_threads(self) -> int:
        """Threads of the forward in each process."""
        return max(1, (self.threads or os.cpu_count() or 1) // self.tensor_parallel_size)
