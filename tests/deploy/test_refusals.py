"""A value that can't work stops the installation with a sentence that names it."""

from __future__ import annotations

import pytest

from tests.deploy.cases import COMMIT, GPU, OTHER_COMMIT, PAIR, SIMULATED, Values, merged
from tests.deploy.chart import APIS, Refused, render

pytestmark = pytest.mark.usefixtures("needs_helm")

REFUSED: list[tuple[str, Values, Values]] = [
    ("target.model: name the model that verifies", {}, {}),
    ("draft.model: the drafter model needs a model", GPU, {"draft": {"model": ""}}),
    ("draft.model: the drafter suffix,staged needs a model", GPU, {"draft": {"drafter": "suffix,staged", "model": ""}}),
    ("target.revision: pin the commit of acme/large", GPU, {"target": {"revision": ""}}),
    ("draft.revision: pin the commit of acme/small", GPU, {"draft": {"revision": ""}}),
    ("target.model: llama is neither org/name nor a directory", GPU, {"target": {"model": "llama"}}),
    ("target.model: /data/m is not below /models", GPU, {"target": {"model": "/data/m"}}),
    ("target.model: sample is for one machine", GPU, {"target": {"model": "sample"}}),
    ("target.tensorParallelSize: 3 does not divide the 2 GPUs", GPU, {"target": {"tensorParallelSize": 3}}),
    (
        "target.tensorParallelSize: 3 does not divide the 8 GPUs",
        GPU,
        {"target": {"gpu": {"count": 8}, "tensorParallelSize": 3}},
    ),
    ("target.tensorParallelSize: 4 does not divide the 2 GPUs", GPU, {"target": {"tensorParallelSize": 4}}),
    ("draft.tensorParallelSize: 2 does not divide the 1 GPUs", GPU, {"draft": {"tensorParallelSize": 2}}),
    ("draft.model: the drafter suffix,mtp needs a model", GPU, {"draft": {"drafter": "suffix,mtp", "model": ""}}),
    (
        "draft.tensorParallelSize: the drafter features cannot be cut over 2 GPUs",
        GPU,
        {"draft": {"drafter": "features", "gpu": {"count": 2}}},
    ),
    ("draft.gpu.count: the drafter ngram computes on the CPU", GPU, {"draft": {"drafter": "ngram"}}),
    ("target.gpu.count: a simulated model needs no GPU", SIMULATED, {"target": {"gpu": {"count": 2}}}),
    (
        "draft.model: a simulated target has no vocabulary",
        SIMULATED,
        {"draft": {"drafter": "model", "model": "acme/small", "revision": COMMIT}},
    ),
    ("redis: sessions need a Redis", GPU, {"redis": {"enabled": False}}),
    ("redis.external: set redis.enabled=false", GPU, {"redis": {"external": {"url": "rediss://r:6379"}}}),
    (
        "redis.external: url and existingSecret exclude each other",
        GPU,
        {"redis": {"enabled": False, "external": {"url": "rediss://r:6379", "existingSecret": "r"}}},
    ),
    (
        "redis.external.url: redis:// and redis+sentinel:// send sessions in plaintext",
        GPU,
        {"redis": {"enabled": False, "external": {"url": "redis://r:6379"}}},
    ),
    (
        "redis.external.url: redis:// and redis+sentinel:// send sessions in plaintext",
        GPU,
        {"redis": {"enabled": False, "external": {"url": "redis+sentinel://r:26379/main"}}},
    ),
    *(
        (sentence, GPU, {"redis": {"enabled": False, "external": external}})
        for sentence, external in (
            ("redis.external.ports: the network policy cannot read the address", {"existingSecret": "r"}),
            (
                "redis.external.ports: the network policy cannot ask Sentinels",
                {"url": "rediss+sentinel://s:26379/main"},
            ),
            ("redis.external.url: Sentinels need the name", {"url": "rediss+sentinel://s:26379", "ports": [6379]}),
            ('redis.external.url: "r:port" is neither HOST nor HOST:PORT', {"url": "rediss://r:port/0"}),
            ("redis.external.url: several hosts are Sentinels", {"url": "rediss://a:1,b:2/0"}),
            (
                "redis.external.caSecret: certificates need rediss://",
                {"url": "redis://r", "insecure": True, "caSecret": "c"},
            ),
            (
                "redis.external.clientCertSecret: redis.external.url has ssl_certfile already",
                {"url": "rediss://r?ssl_certfile=/x", "clientCertSecret": "c"},
            ),
        )
    ),
    ("name a Secret in tls.existingSecrets.coordinator", PAIR, {}),
    (
        "name a Secret in tls.existingSecrets.draft",
        PAIR,
        {"tls": {"existingSecrets": {"coordinator": "c", "target": "t", "redis": "r"}}},
    ),
    (
        "name a Secret in tls.existingSecrets.redis",
        PAIR,
        {"tls": {"existingSecrets": {"coordinator": "c", "target": "t", "draft": "d"}}},
    ),
    (
        "tls.clients.caSecret: clients' certificates need tls.enabled",
        SIMULATED,
        {"tls": {"clients": {"caSecret": "c"}}},
    ),
    ("auth.apiKeysSecret: keys would travel in plaintext", SIMULATED, {"auth": {"apiKeysSecret": "keys"}}),
    (
        "target.terminationGracePeriodSeconds: 60 s end before",
        GPU,
        {"target": {"drainSeconds": 60, "terminationGracePeriodSeconds": 60}},
    ),
    ("coordinator.terminationGracePeriodSeconds", GPU, {"coordinator": {"terminationGracePeriodSeconds": 10}}),
    ("target.settings.model: the chart sets this", GPU, {"target": {"settings": {"model": "x"}}}),
    ("coordinator.settings.redis_url: the chart sets this", GPU, {"coordinator": {"settings": {"redis_url": "x"}}}),
    (
        "draft.settings.draft_target: the chart sets this",
        GPU,
        {"draft": {"drafter": "mtp", "settings": {"draft_target": "x"}}},
    ),
    ("draft.settings.tls_key: the chart sets this", GPU, {"draft": {"settings": {"tls_key": "x"}}}),
    (
        "target.extraEnv: OUTRIDER_DTYPE belongs into target.settings",
        GPU,
        {"target": {"extraEnv": [{"name": "OUTRIDER_DTYPE", "value": "float16"}]}},
    ),
    (
        "autoscaling.prometheusAddress: workers are scaled by metrics",
        GPU,
        {"target": {"autoscaling": {"enabled": True}}},
    ),
    (
        "target.autoscaling: minReplicas is above maxReplicas",
        GPU,
        {"target": {"autoscaling": {"minReplicas": 5, "maxReplicas": 4}}},
    ),
    (
        "coordinator.autoscaling: minReplicas is above maxReplicas",
        GPU,
        {"coordinator": {"autoscaling": {"enabled": True, "minReplicas": 9}}},
    ),
    (
        "coordinator.resources.requests.cpu: scaling by CPU",
        GPU,
        {"coordinator": {"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}},
    ),
    (
        "draft.rollingUpdate: with maxSurge and maxUnavailable both 0",
        GPU,
        {"draft": {"rollingUpdate": {"maxUnavailable": "0%"}}},
    ),
    ("pools: twin is the name of several", GPU, {"pools": [{"name": "twin"}, {"name": "twin"}]}),
    (
        "pool new: target.modelName: acme/large is already the name of another model",
        GPU,
        {"pools": [{"name": "old"}, {"name": "new", "target": {"revision": OTHER_COMMIT}}]},
    ),
    (
        "pool code: target.tensorParallelSize: 2 does not divide the 1 GPUs",
        GPU,
        {"pools": [{"name": "code", "target": {"gpu": {"count": 1}, "tensorParallelSize": 2}}]},
    ),
    (
        "pool b: target.modelName: mine is already the name of another model",
        GPU,
        {
            "pools": [
                {"name": "a", "target": {"model": "/models/mine"}},
                {"name": "b", "target": {"modelName": "mine"}},
            ]
        },
    ),
    (
        "draft.dtype: rounded weights cannot be cut over 2 GPUs",
        GPU,
        {"draft": {"dtype": "int8", "gpu": {"count": 2}}},
    ),
    ("draft.drafter: in ngram,suffix,ngram one stands twice", SIMULATED, {"draft": {"drafter": "ngram,suffix,ngram"}}),
    (
        "draft.drafter: ngram,simulated cannot draft for a real target",
        GPU,
        {"draft": {"drafter": "ngram,simulated", "gpu": {"count": 0}}},
    ),
    (
        "draft.model: a simulated model cannot draft for a real target",
        GPU,
        {"draft": {"model": "simulated", "gpu": {"count": 0}}},
    ),
    (
        "draft.drafter: suffix,model cannot run a simulated model",
        SIMULATED,
        {"draft": {"drafter": "suffix,model", "model": "simulated"}},
    ),
    ("target.tensorParallelSize: a simulated model cannot be cut", SIMULATED, {"target": {"tensorParallelSize": 2}}),
    *(
        (sentence, GPU, {"draft": {"drafter": "staged", "settings": settings}})
        for sentence, settings in (
            ("draft.settings.staged_drafter: simulated cannot draft", {"staged_drafter": "simulated"}),
            ("draft.settings.staged_model: it goes with", {"staged_drafter": "model"}),
            ("draft.settings.staged_model: it goes with", {"staged_model": "/models/tiny"}),
        )
    ),
    ("coordinator.settings.max_generation: no such", GPU, {"coordinator": {"settings": {"max_generation": 1}}}),
    ("draft.settings.untrusted_drafts: no such", GPU, {"draft": {"settings": {"untrusted_drafts": True}}}),
    (
        "pool a: target.settings.suffix_shared: no such",
        GPU,
        {"pools": [{"name": "a", "target": {"settings": {"suffix_shared": True}}}]},
    ),
    *(
        (f"draft.settings.{name}: ", GPU, {"draft": {"settings": {name: value}}})
        for name, value in (
            ("num_blocks", "many"),
            ("num_blocks", 0.5),
            ("kv_memory_share", "90%"),
            ("compile", "maybe"),
            ("greedy_matching", "words"),
        )
    ),
    ('fullnameOverride: "1st" cannot begin', GPU, {"fullnameOverride": "1st"}),
    ('fullnameOverride: "a.b" cannot begin', GPU, {"fullnameOverride": "a.b"}),
    ('fullnameOverride: "test-x.y" cannot begin', GPU, {"nameOverride": "x.y"}),
    ("nameOverride: it is a label", GPU, {"nameOverride": "a" * 64}),
    *(
        (f"commonLabels: the chart sets the label {key} itself", GPU, {"commonLabels": {key: "mine"}})
        for key in ("app.kubernetes.io/version", "helm.sh/chart", "outrider/pool")
    ),
    (
        "draft.podLabels: the chart sets the label app.kubernetes.io/component itself",
        GPU,
        {"draft": {"podLabels": {"app.kubernetes.io/component": "target"}}},
    ),
    *(
        (sentence, GPU, {"tls": {"certManager": {"duration": duration, "renewBefore": before}}})
        for sentence, duration, before in (
            ("tls.certManager.renewBefore: 24h is not shorter than", "24h", "24h"),
            ("tls.certManager.renewBefore: 90m1s is not shorter than", "1h30m", "90m1s"),
            ("tls.certManager.renewBefore: cert-manager renews 5m", "24h", "299s"),
            ("tls.certManager.duration: cert-manager makes", "59m", "10m"),
        )
    ),
    (
        "ingress.tlsSecret: without a certificate of the host, API keys",
        GPU,
        {"auth": {"apiKeysSecret": "keys"}, "ingress": {"enabled": True, "host": "llm.example.com"}},
    ),
    ("ingress.host: name the host", GPU, {"ingress": {"enabled": True}}),
    ("gateway.parentRefs: name the Gateway", GPU, {"gateway": {"enabled": True}}),
    ("serviceAccount.coordinatorName: with serviceAccount.create false", GPU, {"serviceAccount": {"create": False}}),
]


@pytest.mark.parametrize(("sentence", "base", "change"), REFUSED, ids=[sentence[:60] for sentence, _, _ in REFUSED])
def test_a_bad_value_is_refused_with_a_sentence(sentence: str, base: Values, change: Values) -> None:
    with pytest.raises(Refused, match="execution error") as refusal:
        render(merged(base, change))
    assert sentence in str(refusal.value)


@pytest.mark.parametrize("release", ["1st", "a.b"])
def test_a_release_that_could_not_name_services_is_refused(release: str) -> None:
    with pytest.raises(Refused, match="cannot begin the names of Services"):
        render(GPU, release=release)
    assert render(merged(GPU, {"fullnameOverride": "first"}), release=release)


@pytest.mark.parametrize(
    ("service", "settings"),
    [
        ("coordinator", {"max_generations": "512", "propose_timeout_s": 0.000001, "redis_outage": "stop"}),
        ("draft", {"suffix_shared": "Yes", "compile": False, "kv_memory_share": 1, "min_draft_prob": "1e-3"}),
        ("target", {"num_blocks": 16777216, "simulated_step_ms": 20}),
    ],
)
def test_settings_that_the_service_takes_are_taken(service: str, settings: Values) -> None:
    assert render(merged(GPU, {service: {"settings": settings}}))


MISSING: list[tuple[str, Values]] = [
    ("cert-manager.io/v1/Certificate", {}),
    (
        "keda.sh/v1alpha1/ScaledObject",
        {"draft": {"autoscaling": {"enabled": True}}, "autoscaling": {"prometheusAddress": "http://p:9090"}},
    ),
    ("gateway.networking.k8s.io/v1/GRPCRoute", {"gateway": {"enabled": True, "parentRefs": [{"name": "g"}]}}),
    ("monitoring.coreos.com/v1/ServiceMonitor", {"monitoring": {"serviceMonitor": {"enabled": True}}}),
    ("monitoring.coreos.com/v1/PrometheusRule", {"monitoring": {"prometheusRule": {"enabled": True}}}),
]


@pytest.mark.parametrize(("api", "change"), MISSING, ids=[api for api, _ in MISSING])
def test_a_missing_operator_is_named(api: str, change: Values) -> None:
    others = tuple(known for known in APIS if known != api)
    with pytest.raises(Refused, match=f"needs the API {api}, which this cluster does not have"):
        render(merged(GPU, change), others)


BADLY_FORMED: list[tuple[str, Values]] = [
    ("'/target/replicas'", {"target": {"replicas": "abc"}}),
    ("'tragets'", {"tragets": {}}),
    ("'replica'", {"coordinator": {"replica": 3}}),
    ("'gpus'", {"pools": [{"name": "a", "target": {"gpus": 3}}]}),
    ("'/target/revision'", {"target": {"revision": "main"}}),
    ("'/draft/drafter'", {"draft": {"drafter": "ngram,oracle"}}),
    ("'/target/dtype'", {"target": {"dtype": "int8"}}),
    ("'/coordinator/topologySpread/zone'", {"coordinator": {"topologySpread": {"zone": "Sometimes"}}}),
    ("'/redis/external/url'", {"redis": {"enabled": False, "external": {"url": "rediss://:password@redis:6379"}}}),
    ("'/pools/0/name'", {"pools": [{"name": "Upper"}]}),
    ("'/models/hubEndpoint'", {"models": {"hubEndpoint": "mirror.lan:8080"}}),
    ("'/networkPolicy/downloadCIDRs'", {"networkPolicy": {"downloadCIDRs": []}}),
]


@pytest.mark.parametrize(("place", "change"), BADLY_FORMED, ids=[place for place, _ in BADLY_FORMED])
def test_a_badly_formed_value_is_refused_by_the_schema(place: str, change: Values) -> None:
    with pytest.raises(Refused, match="values don't meet the specifications of the schema") as refusal:
        render(merged(GPU, change))
    assert place in str(refusal.value)
