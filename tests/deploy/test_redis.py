"""The scripts with which the chart runs Redis, run here by a real one: password, TLS, renewal, backup."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from services.common.redis_client import close, connect
from tests.deploy.cases import CASES, merged
from tests.deploy.chart import ROOT, env_of, named, pods, render

trustme = pytest.importorskip("trustme")
pytestmark = [
    pytest.mark.usefixtures("needs_helm"),
    pytest.mark.skipif(not shutil.which("redis-server"), reason="needs redis-server with TLS (Debian: redis-server)"),
]
PASSWORD = "correct-horse_battery"  # noqa: S105
KUBECTL = """#!/bin/sh
set -e
if [ "$1" = delete ]; then exec kill $(cat server.pid); fi
while [ "$1" != -- ]; do shift; done
shift
exec "$@"
"""
"""Runs here what would run in the pod, and stops the server where the pod would be deleted."""


class Scripts:
    """The chart's files for Redis, with their paths moved below `folder` and the waiting shortened."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self._authority = trustme.CA()
        for name in ("tls", "etc", "data", "tmp"):
            (folder / name).mkdir()
        for name, text in named(render(CASES["gpu"]), "ConfigMap", "test-outrider-redis")["data"].items():
            (folder / "etc" / name).write_text(self.moved(text))
        self.renew()

    def moved(self, text: str) -> str:
        """With this folder's paths and port in it."""
        here = {  # /tmp/ comes first: the folder itself may lie there
            "/tmp/": f"{self.folder / 'tmp'}/",  # noqa: S108
            "/etc/outrider/tls": self.folder / "tls",
            "/etc/redis": self.folder / "etc",
            " /data": f" {self.folder / 'data'}",
            "tls-port 6379": f"tls-port {self.port}",
            "redis-cli ": f"redis-cli -p {self.port} ",
            "sleep 3600": "sleep 0.1",
        }
        for old, new in here.items():
            text = text.replace(old, str(new))
        return text

    def renew(self) -> None:
        """Another certificate of the same authority, as cert-manager leaves it."""
        issued = self._authority.issue_cert("redis", "localhost")
        (self.folder / "tls/tls.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        (self.folder / "tls/tls.key").write_bytes(issued.private_key_pem.bytes())
        (self.folder / "tls/ca.crt").write_bytes(self._authority.cert_pem.bytes())

    def start(self, name: str, *arguments: str, password: str = PASSWORD) -> subprocess.Popen[str]:
        environ = {**os.environ, "REDISCLI_AUTH": password}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(["sh", str(self.folder / "etc" / name), *arguments], env=environ, text=True, **quiet)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The server, from when it answers."""
        self.server = server = self.start("start.sh")
        (self.folder / "server.pid").write_text(str(server.pid))
        try:
            until = Retrying(stop=stop_after_delay(20), wait=wait_fixed(0.05), retry=retry_if_result(bool))
            until(lambda: self.start("ping.sh").wait())
            yield
        finally:
            server.terminate()
            server.wait()

    def client(self) -> Redis:
        """As a coordinator connects."""
        tls = self.folder / "tls"
        files = f"ssl_ca_certs={tls}/ca.crt&ssl_certfile={tls}/tls.crt&ssl_keyfile={tls}/tls.key"
        return Redis.from_url(f"rediss://:{PASSWORD}@localhost:{self.port}/0?{files}")

    def served_certificate(self) -> bytes:
        """What the server shows at a new connection."""
        context = ssl.create_default_context(cafile=str(self.folder / "tls/ca.crt"))
        context.load_cert_chain(str(self.folder / "tls/tls.crt"), str(self.folder / "tls/tls.key"))
        with (
            socket.create_connection(("127.0.0.1", self.port)) as plain,
            context.wrap_socket(plain, server_hostname="redis") as secured,
        ):
            return secured.getpeercert(binary_form=True) or b""


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scripts = Scripts(tmp_path, port)
    with scripts.serving():
        yield scripts


def test_coordinators_get_in_with_the_password_and_a_certificate(scripts: Scripts) -> None:
    with scripts.client() as client:
        assert client.set("key", "value")
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


async def test_coordinators_get_into_an_external_redis_by_the_files_that_are_mounted(scripts: Scripts) -> None:
    files = {"caSecret": "redis-ca", "clientCertSecret": "redis-client"}
    external = {"url": f"rediss://localhost:{scripts.port}/0", **files}
    manifests = render(merged(CASES["gpu"], {"redis": {"enabled": False, "external": external}}))
    (pod,) = (pod for name, pod in pods(manifests) if name == "test-outrider-coordinator")
    url = env_of(pod["spec"]["containers"][0])["OUTRIDER_REDIS_URL"].replace("//", f"//:{PASSWORD}@")
    for mounted in ("redis-ca", "redis-cert"):
        url = url.replace(f"/etc/outrider/{mounted}", str(scripts.folder / "tls"))
    client = connect(url, timeout_s=5)
    try:
        assert await client.ping()
    finally:
        await close(client)


def test_nobody_gets_in_without_a_certificate_or_with_another_password(scripts: Scripts) -> None:
    assert scripts.start("ping.sh", password="guessed").wait() != 0  # noqa: S106
    authority = f"ssl_ca_certs={scripts.folder}/tls/ca.crt"
    for url in (
        f"redis://:{PASSWORD}@localhost:{scripts.port}/0",
        f"rediss://:{PASSWORD}@localhost:{scripts.port}/0?{authority}",
    ):
        with Redis.from_url(url) as client, pytest.raises(RedisConnectionError):
            client.ping()


def test_a_renewed_certificate_is_served_without_a_restart(scripts: Scripts) -> None:
    before = scripts.served_certificate()
    scripts.renew()
    assert scripts.served_certificate() == before
    reload = scripts.start("reload.sh")
    try:
        until = Retrying(
            stop=stop_after_delay(20), wait=wait_fixed(0.05), retry=retry_if_result(lambda now: now == before)
        )
        assert until(scripts.served_certificate) != before
    finally:
        reload.terminate()
    assert reload.wait(timeout=20) == 0  # a pod that ends does not wait for the hour


def test_the_password_stands_on_no_command_line(scripts: Scripts) -> None:
    assert PASSWORD in (scripts.folder / "tmp/redis.conf").read_text()
    assert (scripts.folder / "tmp/redis.conf").stat().st_mode & 0o077 == 0
    shown = subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout
    assert PASSWORD not in shown


def documented(heading: str) -> list[str]:
    """The commands of a section of the operator's manual, a text for each block."""
    manual = (ROOT / "docs/operations.md").read_text()
    section = manual.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```sh\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    ]


def test_the_documented_commands_copy_the_sessions_and_put_them_back(scripts: Scripts) -> None:
    copy, put_back = documented("Redis: backup and loss")
    (scripts.folder / "kubectl").write_text(KUBECTL)
    (scripts.folder / "kubectl").chmod(0o755)
    environ = {**os.environ, "REDISCLI_AUTH": PASSWORD, "PATH": f"{scripts.folder}:{os.environ['PATH']}"}

    def run(*commands: str) -> None:
        command = ["bash", "-euo", "pipefail", "-c", scripts.moved("".join(commands))]
        subprocess.run(command, env=environ, cwd=scripts.folder, timeout=60, check=True)

    with scripts.client() as client:
        client.set("session", "tokens")
        run(copy)
        assert client.config_get("auto-aof-rewrite-percentage") == {"auto-aof-rewrite-percentage": "100"}
        client.set("session", "spoilt")
    run(copy.splitlines(keepends=True)[0], put_back)
    scripts.server.wait(20)
    with scripts.serving(), scripts.client() as client:
        assert client.get("session") == b"tokens"


def test_an_error_that_redis_answers_is_a_failure_of_the_command_line(scripts: Scripts) -> None:
    assert scripts.start("cli.sh", "CONFIG", "SET", "maxmemory", "2gb").wait() == 0
    assert scripts.start("cli.sh", "CONFIG", "SET", "no-such-setting", "1").wait() != 0
