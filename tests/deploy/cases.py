"""Sets of values that install: between them every branch of the templates is taken."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

Values = dict[str, Any]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


def merged(*parts: Values) -> Values:
    """Dictionaries merged, later ones over earlier ones; lists are replaced, as helm does."""
    result: Values = {}
    for part in parts:
        for key, value in part.items():
            known = result.get(key)
            both = isinstance(known, dict) and isinstance(value, dict)
            result[key] = merged(known, value) if both else deepcopy(value)  # type: ignore[arg-type]
    return result


SIMULATED: Values = {
    "target": {"model": "simulated", "gpu": {"count": 0}},
    "draft": {"drafter": "simulated", "gpu": {"count": 0}},
    "tls": {"enabled": False},
}
PAIR: Values = {
    "target": {"model": "acme/large", "revision": COMMIT},
    "draft": {"model": "acme/small", "revision": OTHER_COMMIT},
}
CERT_MANAGER: Values = {"tls": {"certManager": {"enabled": True}}}
GPU = merged(PAIR, CERT_MANAGER)

EVERYTHING = merged(
    GPU,
    {
        "commonLabels": {"team": "inference"},
        "image": {"registry": "registry.example.com/llm/", "tag": "9.9.9", "pullSecrets": ["registry"]},
        "coordinator": {
            "replicas": 3,
            "settings": {"max_generations": 512, "max_prompt_bytes": 1000000, "num_draft_tokens": "auto"},
            "extraEnv": [{"name": "GRPC_VERBOSITY", "value": "ERROR"}],
            "service": {"type": "LoadBalancer", "port": 443, "annotations": {"example.com/internal": "true"}},
            "autoscaling": {"enabled": True},
            "priorityClassName": "important",
            "podLabels": {"tier": "front"},
            "podAnnotations": {"example.com/note": "yes"},
            "affinity": {"nodeAffinity": {}},
            "nodeSelector": {"pool": "cpu"},
        },
        "draft": {
            "autoscaling": {"enabled": True, "maxReplicas": 8},
            "settings": {"kv_memory_share": 0.9, "compile": True},
            "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0},
            "topologySpread": {"zone": "", "host": "DoNotSchedule"},
            "runtimeClassName": "nvidia",
        },
        "target": {
            "autoscaling": {"enabled": True},
            "gpu": {"count": 8, "resourceName": "amd.com/gpu"},
            "tensorParallelSize": 4,
            "tolerations": [{"key": "gpu", "operator": "Equal", "value": "h100", "effect": "NoExecute"}],
            "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
            "updatePartition": 2,
        },
        "models": {"tokenSecret": "hugging-face", "hubEndpoint": "https://mirror.example.com"},
        "tls": {
            "certManager": {"issuerName": "internal", "issuerKind": "ClusterIssuer"},
            "clients": {"caSecret": "clients-ca", "dnsNames": ["llm.example.com"]},
        },
        "auth": {"apiKeysSecret": "api-keys"},
        "test": {"apiKeySecret": "test-key", "apiKeySecretKey": "key.txt", "clientCertSecret": "test-cert"},
        "ingress": {"enabled": True, "className": "nginx", "host": "llm.example.com", "tlsSecret": "llm-tls"},
        "gateway": {
            "enabled": True,
            "parentRefs": [{"name": "public", "namespace": "gateways"}],
            "hostnames": ["llm.example.com"],
        },
        "autoscaling": {"prometheusAddress": "http://prometheus.monitoring:9090", "authenticationRef": "prometheus"},
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}],
            "traces": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        },
        "logging": {"traceEndpoint": "http://collector.monitoring:4317", "traceSample": 0.05},
        "monitoring": {
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "prometheusRule": {"enabled": True, "labels": {"release": "prometheus"}},
            "dashboard": {"enabled": True},
        },
        "redis": {"auth": {"existingSecret": "redis-password"}, "persistence": {"storageClassName": "fast"}},
    },
)

CASES: dict[str, Values] = {
    "simulated": SIMULATED,
    "gpu": GPU,
    "everything": EVERYTHING,
    "given certificates": merged(
        PAIR,
        {"tls": {"existingSecrets": {part: f"{part}-cert" for part in ("coordinator", "draft", "target", "redis")}}},
    ),
    "clients with certificates": merged(
        GPU, {"tls": {"clients": {"caSecret": "clients-ca"}}, "test": {"clientCertSecret": "test-cert"}}
    ),
    "clients with their own certificates and keys": merged(
        GPU, {"tls": {"clients": {"caSecret": "clients-ca"}}, "auth": {"apiKeysSecret": "api-keys"}}
    ),
    "plain decoding": merged(GPU, {"draft": {"enabled": False, "model": ""}}),
    "trained head": merged(GPU, {"draft": {"drafter": "suffix,features"}}),
    "trained head in each pod": merged(GPU, {"draft": {"drafter": "mtp"}, "models": {"mode": "pod"}}),
    "trained head of a directory": merged(GPU, {"target": {"model": "/models/mine"}, "draft": {"drafter": "mtp"}}),
    "draft without a model": merged(
        GPU, {"draft": {"drafter": "suffix,ngram", "model": "", "revision": "", "gpu": {"count": 0}}}
    ),
    "several pools": merged(
        CERT_MANAGER,
        {
            "pools": [
                {"name": "large", **PAIR, "draft": {**PAIR["draft"], "weight": 3, "replicas": 4}},
                {
                    "name": "code",
                    "target": {"model": "acme/code", "revision": COMMIT, "gpu": {"count": 1}, "replicas": 2},
                    "draft": {"drafter": "ngram", "gpu": {"count": 0}},
                },
                {
                    "name": "local",
                    "target": {"model": "/models/mine", "modelName": "mine"},
                    "draft": {"enabled": False},
                },
            ]
        },
    ),
    "two drafts of one target": merged(
        GPU,
        {
            "pools": [
                {"name": "old", "draft": {"weight": 9}},
                {"name": "new", "draft": {"model": "acme/newer", "revision": COMMIT}},
            ]
        },
    ),
    "models in each pod": merged(GPU, {"models": {"mode": "pod"}}),
    "models already there": merged(GPU, {"models": {"download": False, "volume": {"existingClaim": "models"}}}),
    "models online": merged(GPU, {"models": {"offline": False}}),
    "external Redis": merged(
        GPU, {"redis": {"enabled": False, "external": {"url": "rediss://redis.example.com:6380/1"}}}
    ),
    "external Redis in a secret": merged(
        GPU, {"redis": {"enabled": False, "external": {"existingSecret": "redis-url", "ports": [6380, 6381]}}}
    ),
    "external Redis by Sentinels": merged(
        GPU,
        {
            "redis": {
                "enabled": False,
                "external": {
                    "url": "rediss+sentinel://s1.example.com:26380,s2.example.com,[2001:db8::1]:26381/main/1?db=1",
                    "ports": [6390],
                    "caSecret": "redis-ca",
                    "clientCertSecret": "redis-client",
                },
            }
        },
    ),
    "external Redis with an authority": merged(
        GPU,
        {"redis": {"enabled": False, "external": {"url": "rediss://redis.example.com", "caSecret": "redis-ca"}}},
    ),
    "external Redis in plaintext": merged(
        SIMULATED, {"redis": {"enabled": False, "external": {"url": "redis://10.0.0.9", "insecure": True}}}
    ),
    "nothing kept": merged(
        SIMULATED, {"redis": {"persistence": {"enabled": False}}, "networkPolicy": {"enabled": False}}
    ),
    "own account": merged(SIMULATED, {"serviceAccount": {"create": False, "coordinatorName": "outrider-reader"}}),
    "one GPU a target": merged(GPU, {"target": {"gpu": {"count": 1}}}),
    "pinned images": merged(
        GPU,
        {part: {"image": {"digest": "sha256:" + "0" * 64}} for part in ("coordinator", "draft", "target", "redis")},
    ),
    "long names": merged(
        GPU,
        {"fullnameOverride": "a-very-long-name-that-somebody-chose", "pools": [{"name": "fifteen-letters", **PAIR}]},
    ),
}
GIVEN_SECRETS = {
    "everything": {
        *("hugging-face", "clients-ca", "api-keys", "test-key", "test-cert", "llm-tls", "redis-password", "registry")
    },
    "clients with certificates": {"clients-ca", "test-cert"},
    "clients with their own certificates and keys": {"clients-ca", "api-keys"},
    "given certificates": {"coordinator-cert", "draft-cert", "target-cert", "redis-cert"},
    "external Redis in a secret": {"redis-url"},
    "external Redis by Sentinels": {"redis-ca", "redis-client"},
    "external Redis with an authority": {"redis-ca"},
}
"""Secrets that whoever installs has made."""
