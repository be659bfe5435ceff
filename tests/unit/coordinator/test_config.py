"""The coordinator's settings that are more than a value."""

from __future__ import annotations

import pytest

from services.common.errors import ConfigError
from services.coordinator.config import CoordinatorConfig, DraftPoolConfig
from services.coordinator.discovery import DNS, KUBERNETES, Source
from services.coordinator.tokenizer_set import parse_tokenizers


def config(**settings: str) -> CoordinatorConfig:
    return CoordinatorConfig(tokenizer="simulated", insecure=True, **settings)  # type: ignore[arg-type]


def source(host: str, port: str) -> Source:
    return Source("", host, port)


@pytest.mark.parametrize(
    ("text", "pools"),
    [
        ("", ()),
        ("a:1", (DraftPoolConfig("default", (source("a", "1"),), 1.0),)),
        ("a:1@0.5", (DraftPoolConfig("default", (source("a", "1"),), 0.5),)),
        ("a:1,b:2", (DraftPoolConfig("default", (source("a", "1"), source("b", "2")), 1.0),)),
        (
            "big=a:1@3, ngram=b:2, big=c:3",
            (
                DraftPoolConfig("big", (source("a", "1"), source("c", "3")), 3.0),
                DraftPoolConfig("ngram", (source("b", "2"),), 1.0),
            ),
        ),
        (
            "big=kubernetes://ns/drafts:grpc@2",
            (DraftPoolConfig("big", (Source(KUBERNETES, "drafts", "grpc", "ns"),), 2.0),),
        ),
        (
            "chat:acme/chat-70b=a:1@2, code : llama3:8b = b:2, code=c:3, any=[::1]:4",
            (
                DraftPoolConfig("chat", (source("a", "1"),), 2.0, "acme/chat-70b"),
                DraftPoolConfig("code", (source("b", "2"), source("c", "3")), 1.0, "llama3:8b"),
                DraftPoolConfig("any", (source("[::1]", "4"),), 1.0),
            ),
        ),
        (":m=a:1", (DraftPoolConfig("default", (source("a", "1"),), 1.0, "m"),)),
    ],
)
def test_draft_pools_have_names_models_workers_and_weights(text: str, pools: tuple[DraftPoolConfig, ...]) -> None:
    assert config(drafts=text).draft_pools == pools


@pytest.mark.parametrize(
    "text",
    [
        "a=x:1@2,a=y:1@3",
        "a=x:1@-1",
        "a=x:1@nan",
        "a=x:1@much",
        "a=",
        "@2",
        "x",
        "x:0",
        "x:65536",
        "x:y",
        "a:m=",
        "a:=x:1",
        "a:m=x:1,a:n=y:1",
    ],
)
def test_draft_pools_that_make_no_sense_stop_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="drafts"):
        config(drafts=text)


def test_a_draft_pool_serves_a_model_that_has_a_tokenizer() -> None:
    tokenizer = "chat=simulated,code=simulated"
    served = CoordinatorConfig(tokenizer=tokenizer, drafts="a:code=x:1,b=y:1", insecure=True)
    assert [pool.model for pool in served.draft_pools] == ["code", ""]
    with pytest.raises(ConfigError, match=r"drafts: the pool a serves the model cod, .* one for chat, code"):
        CoordinatorConfig(tokenizer=tokenizer, drafts="a:cod=x:1", insecure=True)


def test_targets_may_be_listed_resolved_and_watched() -> None:
    assert config(targets="a:1, [::1]:2,dns:///workers:3,kubernetes://ns/targets:50053").target_sources == (
        source("a", "1"),
        source("[::1]", "2"),
        Source(DNS, "workers", "3"),
        Source(KUBERNETES, "targets", "50053", "ns"),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a:b",
        "dns://a:1",
        "dns:///a",
        "dns:///a:x",
        "kubernetes://a:1",
        "kubernetes://n/s",
        "kubernetes://N/s:1",
        "a:99999",
    ],
)
def test_targets_that_make_no_sense_stop_the_start(text: str) -> None:
    with pytest.raises(ConfigError, match="targets"):
        config(targets=text)


def test_a_tokenizer_serves_all_models_or_each_has_its_own() -> None:
    assert parse_tokenizers("/models/a") == {"": "/models/a"}
    assert parse_tokenizers("m=/models/a, n=simulated") == {"m": "/models/a", "n": "simulated"}
    for text in ("", "/a,/b", "m=/a,/b", "m=/a,m=/b", "m="):
        with pytest.raises(ConfigError, match="tokenizer"):
            parse_tokenizers(text)


def test_the_draft_length_is_auto_or_a_number_within_the_limit() -> None:
    assert config().fixed_num_draft_tokens is None
    assert config(num_draft_tokens="4").fixed_num_draft_tokens == 4
    for text in ("17", "-1", "many", ""):
        with pytest.raises(ConfigError, match="num_draft_tokens"):
            config(num_draft_tokens=text)
