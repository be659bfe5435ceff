"""The coordinator's settings.

Owns: their names, defaults and limits. Must not know: what they cause.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from services.common.addresses import is_loopback, is_protected_url
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
    TRACE_SAMPLE,
    TRACE_SAMPLE_HELP,
)
from services.common.tls_files import TlsFiles
from services.common.values import MAX_DRAFT_TOKENS
from services.coordinator.committer import Outage
from services.coordinator.discovery import Source, parse_source
from services.coordinator.tokenizer_set import ANY, parse_tokenizers

AUTO = "auto"
DEFAULT_DRAFT = "default"
"""Name of the draft pool of workers that are given none."""

WORKERS_HELP = "each HOST:PORT, dns:///NAME:PORT or kubernetes://NAMESPACE/SERVICE:PORT"


class DraftPoolConfig(NamedTuple):
    """A draft pool as it is configured."""

    name: str
    sources: tuple[Source, ...]
    weight: float
    model: str = ""
    """Name of the target model that it serves; empty: every one that it fits."""


@dataclass(frozen=True, slots=True)
class CoordinatorConfig(SecurityConfig):
    """Settings of a coordinator. Raises ConfigError for values out of range."""

    tls_client_ca: str = setting(
        "", "Authorities that vouch for clients (PEM file): clients then need a certificate. Empty: they need none."
    )
    tls_target_name: str = setting(
        "target", "With TLS: DNS name that a target worker's certificate must have; empty: the host in its address."
    )
    tls_draft_name: str = setting("draft", "The same for draft workers.")
    insecure_redis: bool = setting(False, "Allow a Redis on another machine without TLS.")
    api_keys_file: str = setting("", "File of `outrider keys`; clients then need a key. Read again when it changes.")
    port: int = setting(50051, "Port to listen on; 0 takes a free one.")
    redis_url: str = setting("redis://127.0.0.1:6379/0", "The Redis that holds the sessions.")
    targets: str = setting("127.0.0.1:50053", f"Target workers, separated by commas, {WORKERS_HELP}.")
    drafts: str = setting(
        "",
        f"Draft workers, separated by commas, {WORKERS_HELP}, as [POOL[:MODEL]=]WORKER[@WEIGHT]; empty decodes "
        "plainly. Workers of one name are a pool, for the targets of MODEL or, without one, for all that it fits; "
        "requests that name no pool are spread over those for their model by the weights.",
    )
    dns_interval_s: float = setting(5.0, "Seconds after which a dns:/// name is resolved again.")
    tokenizer: str = setting(
        "",
        "Directory with the target's tokenizer.json, or `simulated`; for several models MODEL=DIRECTORY, separated by "
        "commas.",
    )
    num_draft_tokens: str = setting(
        AUTO, "Draft tokens a round where a request names none: `auto` takes as many as pay, up to max_draft_tokens."
    )
    max_draft_tokens: int = setting(MAX_DRAFT_TOKENS, "Most draft tokens a round that a request may ask for.")
    max_prompt_bytes: int = setting(1_000_000, "Most bytes of a request's prompt.")
    max_generations: int = setting(256, "Most generations at once; more are refused with a time to retry.")
    session_idle_s: int = setting(3600, "Seconds after which an unused session's record expires.")
    tombstone_s: int = setting(86_400, "Seconds for which a closed session is remembered as closed.")
    heartbeat_ms: int = setting(500, "Milliseconds between signs of life, to clients and in Redis.")
    propose_timeout_s: float = setting(
        5.0,
        "Seconds after which a draft that has not answered counts as lost. The target goes on alone sooner: when the "
        "wait has cost more than the proposal can be worth.",
    )
    min_propose_ms: float = setting(
        20.0, "Milliseconds that a draft may take for a proposal however little that is worth to the target."
    )
    target_timeout_s: float = setting(120.0, "Seconds after which a silent target counts as lost.")
    target_retry_s: float = setting(
        120.0, "Seconds that a generation waits for a lost target to come back, its model's load included."
    )
    redis_outage: str = setting(
        Outage.CONTINUE.value,
        "What running generations do while Redis is away: continue, and complete their records when it is back (a "
        "coordinator that is lost before leaves them short), or stop, resumably.",
        choices=tuple(outage.value for outage in Outage),
    )
    redis_outage_after_s: float = setting(0.5, "Seconds without an answer after which Redis counts as away.")
    max_client_sessions: int = setting(100_000, "Most sessions of one client; 0 is no limit.")
    max_client_tokens: int = setting(
        100_000_000, "Most tokens in all sessions of one client, counting what running requests may add; 0 is no limit."
    )
    max_unread_tokens: int = setting(256, "Tokens that a client may leave unread before its rounds pause.")
    slow_client_s: float = setting(10.0, "Seconds of such a pause after which the call is aborted.")
    drain_s: float = setting(30.0, "Seconds that running generations get after SIGTERM.")
    max_connection_age_s: int = setting(
        0, "Seconds after which a connection goes once its calls have ended, so that clients look again; 0: never."
    )
    reflection: bool = setting(True, "Serve gRPC reflection.")
    log_level: str = setting("info", "Log level.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting(TEXT, LOG_FORMAT_HELP, choices=LOG_FORMATS)
    metrics_port: int = setting(METRICS_PORT, METRICS_HELP)
    trace_endpoint: str = setting("", TRACE_ENDPOINT_HELP)
    trace_sample: float = setting(TRACE_SAMPLE, TRACE_SAMPLE_HELP)

    def __post_init__(self) -> None:
        self.check_security()
        limits: dict[str, tuple[float, float]] = {
            "port": (0, 65_535),
            "metrics_port": (METRICS_OFF, 65_535),
            "trace_sample": (0, 1),
            "dns_interval_s": (0.01, 3600),
            "max_draft_tokens": (0, MAX_DRAFT_TOKENS),
            "max_prompt_bytes": (1, 15_000_000),
            "max_generations": (1, 65_536),
            "session_idle_s": (1, 10_000_000),
            "tombstone_s": (1, 10_000_000),
            "heartbeat_ms": (10, 60_000),
            "propose_timeout_s": (0.001, 3600),
            "min_propose_ms": (0, 3_600_000),
            "target_timeout_s": (0.001, 3600),
            "target_retry_s": (0, 3600),
            "redis_outage_after_s": (0.01, 3600),
            "max_client_sessions": (0, 1 << 48),
            "max_client_tokens": (0, 1 << 48),
            "max_unread_tokens": (1, 1_000_000),
            "slow_client_s": (0.001, 3600),
            "drain_s": (0, 86_400),
            "max_connection_age_s": (0, 86_400),
        }
        for name, (low, high) in limits.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name}: {value} is not between {low} and {high}")
        parse_tokenizers(self.tokenizer)
        if not self.target_sources:
            raise ConfigError("targets: name at least one worker")
        self._check_draft_pools()
        self._check_peers()
        fixed = self.fixed_num_draft_tokens
        if fixed is not None and not 0 <= fixed <= self.max_draft_tokens:
            raise ConfigError(f"num_draft_tokens: {fixed} is not between 0 and {self.max_draft_tokens}")

    @property
    def target_sources(self) -> tuple[Source, ...]:
        return tuple(parse_source("targets", part) for part in _parts(self.targets))

    @property
    def draft_pools(self) -> tuple[DraftPoolConfig, ...]:
        """In the order of their first mention."""
        pools: dict[str, list[_DraftPart]] = {}
        for text in _parts(self.drafts):
            part = _draft_part(text)
            pools.setdefault(part.pool, []).append(part)
        return tuple(_draft_pool(name, parts) for name, parts in pools.items())

    @property
    def tokenizers(self) -> dict[str, str]:
        """Their directories by model name."""
        return parse_tokenizers(self.tokenizer)

    @property
    def fixed_num_draft_tokens(self) -> int | None:
        """None: as many as pay."""
        if self.num_draft_tokens == AUTO:
            return None
        try:
            return int(self.num_draft_tokens)
        except ValueError:
            raise ConfigError(f"num_draft_tokens: {self.num_draft_tokens!r} is neither a number nor {AUTO}") from None

    def _check_draft_pools(self) -> None:
        """That they make sense, and serve models that this coordinator can serve."""
        models = self.tokenizers
        for pool in self.draft_pools:
            if pool.model and pool.model not in models and ANY not in models:
                raise ConfigError(
                    f"drafts: the pool {pool.name} serves the model {pool.model}, which has no tokenizer; there is one "
                    f"for {', '.join(models)}"
                )

    def _check_peers(self) -> None:
        """That nothing leaves this machine in plaintext unasked."""
        if self.tls_client_ca and not self.has_tls:
            raise ConfigError("tls_client_ca: clients' certificates need tls_cert, tls_key and tls_ca")
        sources = (*self.target_sources, *(source for pool in self.draft_pools for source in pool.sources))
        remote = [source for source in sources if not is_loopback(source.host)]
        if remote and not self.has_tls and not self.insecure:
            raise ConfigError(
                f"targets, drafts: {remote[0]} is another machine: give tls_cert, tls_key and tls_ca, or --insecure "
                "to send prompts there in plaintext"
            )
        if not (self.insecure or self.insecure_redis or is_protected_url(self.redis_url)):
            raise ConfigError(
                "redis_url: it is another machine's: use rediss://, or --insecure-redis to send sessions in plaintext"
            )

    def load_public_tls(self) -> TlsFiles | None:
        """What clients are served with: their authorities are not those of the workers. Raises ConfigError."""
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_client_ca) if self.has_tls else None


class _DraftPart(NamedTuple):
    pool: str
    model: str
    source: Source
    weight: float | None


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _draft_part(text: str) -> _DraftPart:
    """Of [POOL[:MODEL]=]WORKER[@WEIGHT]. Raises ConfigError."""
    left, _, rest = text.rpartition("=")
    name, colon, model = (part.strip() for part in left.partition(":"))
    if colon and not model:
        raise ConfigError(f"drafts: {text!r}: there is no model after the colon")
    worker, at, weight_text = rest.partition("@")
    source = parse_source("drafts", worker.strip())
    if not at:
        return _DraftPart(name or DEFAULT_DRAFT, model, source, None)
    try:
        weight = float(weight_text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigError(f"drafts: {text!r}: the weight must be a number, 0 or more")
    return _DraftPart(name or DEFAULT_DRAFT, model, source, weight)


def _draft_pool(name: str, parts: list[_DraftPart]) -> DraftPoolConfig:
    weights = {part.weight for part in parts if part.weight is not None}
    if len(weights) > 1:
        raise ConfigError(f"drafts: the pool {name} has several weights")
    models = {part.model for part in parts if part.model}
    if len(models) > 1:
        raise ConfigError(f"drafts: the pool {name} has several models; give each its own pool")
    sources = tuple(part.source for part in parts)
    return DraftPoolConfig(name, sources, weights.pop() if weights else 1.0, models.pop() if models else "")
