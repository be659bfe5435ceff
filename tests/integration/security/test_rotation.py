"""Certificates are replaced while generations run: none fails, none is so much as resumed, and the old ones end."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
import trustme

from services.client import Access, GenerateOptions, OutriderClient, Result, RetryPolicy
from services.common.channels import Channels
from services.common.errors import Unavailable
from services.common.items import Identity
from services.common.service import end_tasks, wait_until
from services.common.tls_files import TlsFiles
from services.coordinator.renewing_link import RenewingLink
from services.coordinator.worker_link import TARGET_CODEC
from services.target.server import running_target
from tests.certificates import authorities, files, write, write_leaf
from tests.integration.security.conftest import TARGET, Peers, StartSecure

OPTIONS = GenerateOptions(max_tokens=24, ignore_eos=True, temperature=1.0)
NAMES = {"coordinator": ("coordinator", "localhost"), "target": ("target",), "draft": ("draft",)}
NO_RETRY = RetryPolicy(max_attempts=1, max_attempts_unreached=1)


class Clients:
    """A load that a rotation must not disturb: short generations one after another, each by one stream."""

    def __init__(self, client: OutriderClient) -> None:
        self._client = client
        self._stop = False
        self.results: list[tuple[int, Result]] = []

    async def run(self, first_seed: int) -> None:
        seed = first_seed
        while not self._stop:
            result = await self._client.complete(f"Prompt {seed % 7}", replace(OPTIONS, seed=seed))
            self.results.append((seed, result))
            seed += 100

    async def more(self, count: int = 40) -> None:
        """Returns when that many more have finished."""
        goal = len(self.results) + count
        assert await wait_until(lambda: len(self.results) >= goal, 30)

    def stop(self) -> None:
        self._stop = True


def reissue(directory: Path, ca: trustme.CA) -> None:
    """Leaves of all parts from another authority, one part after another as far as anybody looks."""
    for name, names in NAMES.items():
        write_leaf(directory / name, ca.issue_cert(*names))


def trust(directory: Path, *cas: trustme.CA) -> None:
    for name in NAMES:
        write(directory / name / "ca.crt", authorities(*cas))


async def test_leaves_and_authorities_change_under_load_without_a_failure(
    start_secure: StartSecure, peers: Peers, other_ca: trustme.CA, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)

    def count(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    async def moved(times: int) -> None:
        """Until the coordinator's links to both workers have."""
        assert await wait_until(lambda: count("connected with the changed certificates") == 2 * times, 30)

    slow = replace(TARGET, simulated_step_ms=2.0)
    own, directory = peers.coordinator, peers.directory
    async with start_secure(slow) as cluster:
        async with OutriderClient(cluster.address, access=own.access, retry=NO_RETRY) as client:
            load = Clients(client)
            long_lived = client.generate("Long", GenerateOptions(max_tokens=30_000, ignore_eos=True, seed=1))
            reader = asyncio.create_task(long_lived.complete())
            tasks = [asyncio.create_task(load.run(first)) for first in range(4)]
            await load.more()

            reissue(directory, peers.ca)  # new leaves of the same authority
            await moved(1)
            await load.more()

            trust(directory, peers.ca, other_ca)  # a new authority beside the old one
            await moved(2)
            await load.more()

            reissue(directory, other_ca)  # leaves of the new one
            await moved(3)
            await load.more()

            trust(directory, other_ca)  # and no trust in the old one any more
            await moved(4)
            await load.more()

            load.stop()
            await asyncio.gather(*tasks)
            assert not reader.done()  # it has lasted through it all, on the oldest of the links
            await end_tasks(reader)

        assert count("lost its target") == 0
        assert count("decodes without a draft") == 0
        stale = files(tmp_path / "stale", peers.ca.issue_cert("x"), peers.ca)
        async with OutriderClient(cluster.address, access=Access(tls_ca=stale.ca), retry=NO_RETRY) as client:
            with pytest.raises(Unavailable):
                await client.list_models()
        fresh = files(tmp_path / "fresh", other_ca.issue_cert("x"), other_ca)
        async with OutriderClient(cluster.address, access=Access(tls_ca=fresh.ca)) as client:
            again = [await client.complete(f"Prompt {s % 7}", replace(OPTIONS, seed=s)) for s, _ in load.results[:20]]
    assert len(load.results) >= 200
    assert [result.token_ids for result in again] == [result.token_ids for _, result in load.results[:20]]
    assert max(Counter(seed for seed, _ in load.results).values()) == 1


async def test_old_links_end_with_their_last_sequence(
    start_secure: StartSecure, peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with start_secure(replace(TARGET, simulated_step_ms=2.0)) as cluster, cluster.client() as client:
        generation = client.generate("Long", GenerateOptions(max_tokens=2000, ignore_eos=True))
        running = asyncio.create_task(generation.complete())
        engine = cluster.target.engine
        assert await wait_until(lambda: engine.load.num_sequences == 1, 10)
        write_leaf(peers.directory / "coordinator", peers.ca.issue_cert("coordinator", "localhost"))
        assert await wait_until(lambda: caplog.text.count("connected with the changed certificates") == 2, 20)
        streams = [t for t in asyncio.all_tasks() if "WorkerLink._run" in repr(t)]
        assert len(streams) == 4
        assert len((await running).tokens) == 2000
        assert await wait_until(lambda: sum("WorkerLink._run" in repr(t) for t in asyncio.all_tasks()) == 2, 20)


class Moving(Channels):
    """Opens channels to where the worker is now; when it is elsewhere, the certificates count as changed."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.opened: list[int] = []

    @property
    def version(self) -> int:
        return self.port

    def open(self, address: str) -> grpc.aio.Channel:
        self.opened.append(self.port)
        return super().open(f"127.0.0.1:{self.port}")


async def test_whoever_asks_for_a_worker_is_answered_over_the_renewed_channel() -> None:
    """Also while sequences keep the old one open, and once it is gone."""
    async with running_target(TARGET) as old, running_target(TARGET) as new:
        channels = Moving(old.port)
        link = RenewingLink("a:1", TARGET_CODEC, channels, look_s=0.01)
        link.start()
        try:
            assert await link.wait_up(10)
            identity = Identity("s", 1, 1, 0, 1)
            lane = link.open_lane(identity)
            assert (await link.describe(5)).instance_id == old.worker.info.instance_id
            channels.port = new.port
            assert await wait_until(lambda: link.num_draining == 1, 10)
            assert channels.opened == [old.port, new.port]
            assert (await link.describe(5)).instance_id == new.worker.info.instance_id
            lane.close(identity)
            assert await wait_until(lambda: link.num_draining == 0, 10)
            assert (await link.describe(5)).instance_id == new.worker.info.instance_id
            assert link.info is not None
            assert link.info.instance_id == new.worker.info.instance_id
        finally:
            await link.aclose()


async def test_an_untrusted_renewal_leaves_the_old_connection_in_place(
    start_secure: StartSecure,
    peers: Peers,
    other_ca: trustme.CA,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("services.coordinator.renewing_link._CONNECT_S", 0.5)
    async with start_secure() as cluster, cluster.client() as client:
        await client.list_models()  # connects while the client can trust the coordinator
        write_leaf(peers.directory / "coordinator", other_ca.issue_cert("coordinator", "localhost"))
        assert await wait_until(lambda: "no connection with the changed certificates yet" in caplog.text, 20)
        assert len((await client.complete("a", OPTIONS)).tokens) == 24


def test_a_half_written_change_is_left_aside_until_it_is_whole(peers: Peers) -> None:
    own = peers.named("coordinator")
    tls = TlsFiles(own.cert, own.key, own.ca)
    before, version = tls.current()
    leaf = peers.ca.issue_cert("coordinator")
    write(Path(own.key), leaf.private_key_pem.bytes())
    assert tls.current() == (before, version)
    write(Path(own.ca), b"nonsense")
    assert tls.current() == (before, version)
    write(Path(own.ca), peers.ca.cert_pem.bytes())
    write(Path(own.cert), leaf.cert_chain_pems[0].bytes())
    after, newer = tls.current()
    assert newer == version + 1
    assert after.key == leaf.private_key_pem.bytes()
    Path(own.cert).unlink()
    assert tls.current() == (after, newer)
