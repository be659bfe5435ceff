"""Commands that start a cluster of their own: what they print, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import COMMAND, Up, environment
from tests.tiny_models import save_model


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)


def ready(up: Up) -> dict:
    assert up.process.stdout is not None
    line = up.process.stdout.readline()
    if not line:
        assert up.process.stderr is not None
        pytest.fail(up.process.stderr.read())
    return json.loads(line)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_up_serves_until_a_signal_and_leaves_nothing(up: Up, tmp_path, number, status):
    event = ready(up)
    children = up.children()
    assert len(children) == 4
    command = [*COMMAND, "generate", "Hi", "--max-tokens", "4", "--address", event["coordinator"]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    up.process.send_signal(number)
    assert up.process.wait(20) == status
    wait_gone(children)
    assert list(tmp_path.iterdir()) == []


def test_up_that_is_killed_takes_its_processes_with_it(up: Up):
    ready(up)
    children = up.children()
    up.process.kill()
    up.process.wait(10)
    wait_gone(children)


def test_up_ends_with_a_reason_when_a_service_dies(up: Up, tmp_path):
    ready(up)
    children = up.children()
    target = next(pid for pid in children if b"services.target" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(target, signal.SIGKILL)
    _, error = up.process.communicate(timeout=20)
    assert up.process.returncode == 1
    assert "the target ended by itself" in error
    wait_gone(children)
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_the_reason_given(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        up = Up(tmp_path, ("--coordinator-port", port))
        _, error = up.process.communicate(timeout=60)
    assert up.process.returncode == 1
    assert error.startswith(f"outrider: cannot listen on 127.0.0.1:{port}: ")
    assert "is another `outrider up` running?" in error
    assert list(tmp_path.iterdir()) == []


def run_alone(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = environment(TMPDIR=str(tmp_path))
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=env, timeout=100, check=False)


def test_bench_reports_every_promised_field_from_a_cluster_of_its_own(tmp_path):
    file = tmp_path / "report.json"
    arguments = ("--simulated", "--simulated-step-ms", "4", "--simulated-token-ms", "0.2", "--max-tokens", "24")
    arguments += ("--num-draft-tokens", "4")
    done = run_alone(tmp_path, "bench", *arguments, "--limit", "4", "--concurrency", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert (report["num_requests"], report["failed_requests"], report["num_identical_outputs"]) == (4, 0, 4)
    for mode in ("plain", "speculative"):
        assert report[mode]["num_tokens"] == 4 * 24
        assert report[mode]["tokens_per_s"] > 0
        for latency in ("ttft_ms", "tpot_ms", "itl_ms"):
            assert 0 < report[mode][latency]["p50"] <= report[mode][latency]["p99"]
    assert report["speedup"] > 0
    assert 0 < report["acceptance_rate"] < 1
    assert 1 < report["mean_acceptance_length"] <= 5
    assert len(report["acceptance_rate_per_position"]) == 4
    assert 0 <= report["coordinator_overhead_ms"]["p50"] <= report["coordinator_overhead_ms"]["p99"]
    assert "rag" in done.stdout or "writing" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_bench_shows_the_formula_beside_a_simulated_speedup(tmp_path):
    file = tmp_path / "report.json"
    arguments = ("--simulated", "--simulated-step-ms", "100", "--simulated-token-ms", "10", "--max-tokens", "48")
    arguments += ("--num-draft-tokens", "4", "--ignore-eos")
    done = run_alone(tmp_path, "bench", *arguments, "--limit", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    formula = json.loads(file.read_text())["formula"]
    assert formula["cost_ratio"] == 0.1
    assert formula["num_draft_tokens"] == 4
    assert abs(formula["relative_error"]) < 0.1
    assert "by the formula" in done.stdout


def test_bench_sweeps_into_one_report_and_page(tmp_path):
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ("--simulated", "--simulated-step-ms", "2", "--simulated-token-ms", "0.1", "--max-tokens", "24")
    sweep = ("--sweep-draft-tokens", "1,3", "--sweep-sampling", "greedy,rejection")
    files = ("--json", str(file), "--html", str(page))
    done = run_alone(tmp_path, "bench", *arguments, *sweep, *files, "--limit", "2")
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    cases = report["cases"]
    assert [(c["case"]["num_draft_tokens"], c["case"]["temperature"]) for c in cases] == [
        (1, 0),
        (3, 0),
        (1, 1),
        (3, 1),
    ]
    for entry in cases:
        length = entry["case"]["num_draft_tokens"]
        assert entry["num_identical_outputs"] == 2
        assert len(entry["conditional_acceptance_per_position"]) == length
        assert entry["formula"]["by_position"] > 0
        limits = entry["limits"]
        assert limits["num_rounds"] > 0
        assert abs(sum(limits["shares"].values()) - 1) < 1e-3
        assert 1 < limits["tokens_per_round"] <= length + 1
        for part in ("categories", "overall"):
            assert entry[part]
    assert len(report["requests"]) == 4
    assert page.read_text().count("<svg") >= 7


def test_bench_compares_draft_pools_of_one_cluster(tmp_path):
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ("--simulated", "--simulated-step-ms", "2", "--simulated-token-ms", "0.1", "--max-tokens", "24")
    pools = ("--draft-pool", "good=simulated", "--draft-pool", "copy=ngram", "--num-draft-tokens", "3")
    done = run_alone(tmp_path, "bench", *arguments, *pools, "--limit", "2", "--json", str(file), "--html", str(page))
    assert done.returncode == 0, done.stderr
    good, copy = json.loads(file.read_text())["cases"]
    assert (good["case"]["draft"], copy["case"]["draft"]) == ("good", "copy")
    assert good["mean_acceptance_length"] > 1.5
    assert good["num_accepted_tokens"] > copy["num_accepted_tokens"]  # tokens of a simulated target hardly repeat
    for entry in (good, copy):
        assert entry["speculative"]["tokens_per_s"] > 0
        assert entry["num_identical_outputs"] == 2
    assert "good=simulated" in done.stdout
    assert "copy=ngram" in page.read_text()


def test_bench_writes_its_report_though_a_peer_fails(tmp_path):
    """A padded embedding: Outrider takes it for the same vocabulary, transformers' assisted generation does not."""
    target, draft = save_model(tmp_path / "target"), save_model(tmp_path / "draft", vocab_size=328)
    for file in target.glob("tokenizer*"):
        shutil.copy(file, draft)
    file, page = tmp_path / "report.json", tmp_path / "report.html"
    models = ("--target", str(target), "--drafter", "model", "--draft", str(draft), "--raw")
    short = ("--limit", "1", "--max-tokens", "4", "--peers", "assisted,transformers")
    done = run_alone(tmp_path, "bench", *models, *short, "--json", str(file), "--html", str(page))
    assert done.returncode == 1, done.stderr
    assert "the peer assisted failed: ValueError: " in done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads(file.read_text())
    assisted, transformers = report["peers"]
    assert assisted["failure"].startswith("ValueError: ")
    assert (transformers["failure"], transformers["num_identical_outputs"]) == (None, 1)
    assert (report["failed_requests"], report["num_identical_outputs"]) == (0, 1)
    assert "assisted failed: ValueError: " in page.read_text()


def test_demo_streams_three_prompts_and_compares(tmp_path):
    done = run_alone(tmp_path, "demo", "--simulated", "--simulated-step-ms", "2", "--max-tokens", "16")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for text in ("chat", "summarise a text", "edit code", "speed-up", "identical"):
        assert text in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_exist_is_one_clear_failure(tmp_path):
    done = run_alone(tmp_path, "up", "--target", str(tmp_path / "none.gguf"))
    assert done.returncode == 1
    assert "none.gguf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_pair_with_too_small_a_common_vocabulary_is_refused_at_the_start(tmp_path):
    save_model(tmp_path / "target")
    save_model(tmp_path / "draft", vocab_size=3)
    models = ("--target", str(tmp_path / "target"), "--drafter", "model", "--draft", str(tmp_path / "draft"))
    ports = [word for name in ("coordinator", "draft", "target") for word in (f"--{name}-port", "0")]
    done = run_alone(tmp_path, "up", *models, *ports)
    assert done.returncode == 1
    assert "min_vocab_overlap: 0.1 is not reached: 2 of the draft's 3 tokens" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_conversion_leaves_nothing_half_done(tmp_path):
    cache = tmp_path / "cache"
    code = (
        "import runpy, sys, time, services.engine.gguf as gguf\n"
        "def convert(source, work, *_):\n"
        "    print('converting', file=sys.__stderr__, flush=True)\n"
        "    while True: time.sleep(0.05)  # a signal just before a long sleep would be heard after it\n"
        "gguf._convert = convert\n"
        "sys.argv = ['prepare', 'x.gguf']\n"
        "runpy.run_module('services.engine.prepare', run_name='__main__')"
    )
    (tmp_path / "x.gguf").touch()
    env = environment(OUTRIDER_CACHE_DIR=str(cache))
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path) as process:
        assert process.stderr is not None
        while "converting" not in (line := process.stderr.readline()):
            assert line
        work = [entry for entry in (cache / "models").iterdir() if entry.is_dir()]
        assert len(work) == 1
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=20)
    assert process.returncode in (130, 143)
    assert "Traceback" not in error
    assert [entry.suffix for entry in (cache / "models").iterdir()] == [".lock"]


def test_up_starts_as_many_workers_as_asked(tmp_path):
    up = Up(tmp_path, ("--targets", "2", "--drafts", "2"))
    with up.process:
        event = ready(up)
        assert {"coordinator", "target", "target-2", "draft", "draft-2"} <= set(event)
        assert len(up.children()) == 6
        command = [*COMMAND, "generate", "Hi", "--max-tokens", "4", "--address", event["coordinator"]]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        up.process.send_signal(signal.SIGTERM)
        up.process.wait(20)
