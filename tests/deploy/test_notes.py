"""The notes' commands and the pod of `helm test`: run here with stand-ins for kubectl, helm and outrider."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from services.cli.generate import generate
from tests.deploy.cases import CASES, EVERYTHING, GIVEN_SECRETS, GPU, SIMULATED, merged
from tests.deploy.chart import NAMESPACE, Manifest, containers, env_of, named, notes, of_kind, pods, render

pytestmark = pytest.mark.usefixtures("needs_helm")

PROGRAM = (
    f"#!{sys.executable} -S\n"
    + r"""
import base64, json, os, sys
words = sys.argv[1:]
files = {word: open(word).read() for word in words if os.path.isfile(word)}
call = {"words": words, "files": files, "key": os.environ.get("OUTRIDER_API_KEY", "")}
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([os.path.basename(sys.argv[0]), call]), file=calls)
if "secret" in words:
    key = words[-1].removeprefix("jsonpath={.data.").removesuffix("}").replace("\\.", ".")
    name = words[words.index("secret") + 1]
    sys.stdout.write(base64.b64encode(f"{name}/{key}".encode()).decode())
"""
)
"""Writes down how it was called. As kubectl it prints NAME/KEY for what a Secret holds."""


class Call(NamedTuple):
    """Of a program: its words, what the files hold that they name, and the API key."""

    program: str
    words: list[str]
    files: dict[str, str]
    key: str


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def calls(case: str, needs_helm: None) -> list[Call]:
    return calls_of(case)


@functools.cache
def calls_of(case: str) -> list[Call]:
    """Runs every command of the notes, as they stand there."""
    with tempfile.TemporaryDirectory() as folder:
        return run(notes(CASES[case]), Path(folder))


def run(text: str, folder: Path) -> list[Call]:
    for name in ("kubectl", "helm", "outrider"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    script = "\n".join([*re.findall(r"^    (.*)$", text, re.MULTILINE), "wait"])
    environ = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=environ, cwd=folder, check=True, timeout=60)
    lines = (folder / "calls").read_text().splitlines()
    return [Call(program, **call) for program, call in map(json.loads, lines)]


def accepted(words: list[str]) -> dict[str, Any]:
    """The options that `outrider generate` takes from its words."""
    assert words[0] == "generate"
    options: dict[str, Any] = generate.make_context("generate", words[1:]).params
    return options


def generation(calls: list[Call]) -> Call:
    (call,) = (call for call in calls if call.program == "outrider")
    return call


def test_the_notes_speak_of_things_that_are_there(case: str, calls: list[Call]) -> None:
    manifests = render(CASES[case])
    there = {(m["kind"].lower(), m["metadata"]["name"]) for m in manifests}
    there |= {("secret", m["spec"]["secretName"]) for m in of_kind(manifests, "Certificate")}
    there |= {("secret", name) for name in GIVEN_SECRETS.get(case, set())}
    kubectl = [call.words for call in calls if call.program == "kubectl"]
    said = " ".join(word for words in kubectl for word in words)
    mentioned = set(re.findall(r"\b(deployment|service|secret)[/ ]([a-z0-9-]+)", said))
    assert {"deployment", "service"} <= {kind for kind, _ in mentioned}
    assert mentioned <= there
    assert all(words[:2] == ["--namespace", NAMESPACE] for words in kubectl)


def test_the_notes_generate_with_all_that_clients_need(case: str, calls: list[Call]) -> None:
    call, values = generation(calls), CASES[case]
    options, tls, test = accepted(call.words), values.get("tls", {}), values.get("test", {})
    (coordinator,) = (pod for name, pod in pods(render(values)) if name.endswith("-coordinator"))
    files = {"tls_ca": secret_behind(coordinator, "/etc/outrider/tls/ca.crt")} if tls.get("enabled", True) else {}
    if "clientCertSecret" in test:
        files |= {"tls_cert": "test-cert/tls.crt", "tls_key": "test-cert/tls.key"}
    assert {name: call.files[options[name]] for name in files} == files
    shows_certificate = "caSecret" in tls.get("clients", {})
    assert [bool(options[name]) for name in ("tls_cert", "tls_key")] == [shows_certificate] * 2
    assert bool(options["tls_ca"]) == bool(files)
    assert call.key == ("test-key/key.txt" if "apiKeySecret" in test else "")


def test_notes_and_test_name_a_model_where_there_are_several(case: str, calls: list[Call]) -> None:
    manifests = render(CASES[case])
    (coordinator,) = (c for _, pod in pods(manifests) for c in containers(pod) if c["name"] == "coordinator")
    served = [part.partition("=")[0] for part in env_of(coordinator)["OUTRIDER_TOKENIZER"].split(",")]
    expected = served[0] if len(served) > 1 else ""
    assert accepted(generation(calls).words)["model"] == expected
    for pod in of_kind(manifests, "Pod"):
        container = pod["spec"]["containers"][0]
        assert accepted([*container["command"], *container.get("args", [])][1:])["model"] == expected


def test_helm_test_is_recommended_where_it_can_run(case: str, calls: list[Call]) -> None:
    tests = of_kind(render(CASES[case]), "Pod")
    assert len(tests) == (case != "clients with their own certificates and keys")
    recommended = [call.words for call in calls if call.program == "helm"]
    assert recommended == [["test", "test", "--namespace", NAMESPACE, "--logs"]] * len(tests)


def test_without_a_key_or_a_certificate_there_is_no_test() -> None:
    protected = CASES["clients with their own certificates and keys"]
    missing = "an API key (test.apiKeySecret) and a client certificate (test.clientCertSecret)"
    assert f"There is no helm test: it would need {missing}." in notes(protected)
    for given in ({"apiKeySecret": "k"}, {"clientCertSecret": "c"}):
        assert not of_kind(render(merged(protected, {"test": given})), "Pod")
    assert of_kind(render(merged(protected, {"test": {"apiKeySecret": "k", "clientCertSecret": "c"}})), "Pod")


def test_the_test_pod_generates_on_the_installations_own_service() -> None:
    manifests = render(EVERYTHING)
    (pod,) = of_kind(manifests, "Pod")
    environ = env_of(pod["spec"]["containers"][0])
    name, _, port = environ["OUTRIDER_ADDRESS"].partition(":")
    assert int(port) in [p["port"] for p in named(manifests, "Service", name)["spec"]["ports"]]
    assert pod["spec"]["containers"][0]["command"][:2] == ["outrider", "generate"]
    assert "OUTRIDER_API_KEY" in environ
    assert secret_behind(pod, environ["OUTRIDER_TLS_CA"]) == "test-outrider-coordinator-tls/ca.crt"
    assert secret_behind(pod, environ["OUTRIDER_TLS_CERT"]) == "test-cert/tls.crt"
    assert secret_behind(pod, environ["OUTRIDER_TLS_KEY"]) == "test-cert/tls.key"


def secret_behind(pod: Manifest, path: str) -> str:
    """SECRET/KEY of a file that is mounted."""
    folder, _, key = path.rpartition("/")
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    (volume,) = (volume for volume in pod["spec"]["volumes"] if volume["name"] == mounts[folder])
    return f"{volume['secret']['secretName']}/{key}"


@pytest.mark.parametrize("count", [2, 4])
def test_the_notes_tell_of_idle_gpus(count: int) -> None:
    values = merged(GPU, {"target": {"gpu": {"count": count}, "tensorParallelSize": 2}})
    assert ("leaves 2 of the 4 GPUs of each target pod idle" in notes(values)) == (count == 4)


def test_the_notes_warn_of_plaintext() -> None:
    assert "prompts and answers travel in plaintext" in notes(SIMULATED)
    assert "plaintext" not in notes(GPU)
