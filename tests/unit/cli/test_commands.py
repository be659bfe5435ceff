"""The commands against a scripted coordinator: output, exit codes, one-line errors."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys

import click
import pytest
from outrider.v1 import coordinator_pb2 as pb
from rich.console import Console
from rich.table import Table

from services.cli import failure, terminal
from services.cli.main import main
from services.client import Chunk, Token
from services.common.errors import Aborted, Internal, ResourceExhausted, Unavailable
from services.common.values import TokenOrigin
from tests.fakes.coordinator import WORDS, FakeCoordinator, play, whole
from tests.fakes.threaded import serving_in_thread


@pytest.fixture
def fake():
    return FakeCoordinator(whole(4))


@pytest.fixture
def address(fake, monkeypatch):
    monkeypatch.delenv("OUTRIDER_ADDRESS", raising=False)
    with serving_in_thread(fake) as address:
        yield address


@pytest.fixture(autouse=True)
def no_signals(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *arguments: None)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_generate_prints_the_text(address, capsys):
    assert run("generate", "hi", "--address", address) == 0
    assert capsys.readouterr().out == "".join(WORDS[:4]) + "\n"


def test_generate_is_greedy_and_uses_the_chat_template_by_default(address, fake):
    run("generate", "hi", "--system", "be brief", "--address", address)
    request = fake.requests[0]
    assert request.sampling.temperature == 0.0
    assert [(m.role, m.content) for m in request.chat.messages] == [("system", "be brief"), ("user", "hi")]


def test_generate_json_is_one_object_with_the_promised_fields(address, capsys):
    run("generate", "hi", "--json", "--seed", "9", "--session", "s", "--address", address)
    printed = json.loads(capsys.readouterr().out)
    assert printed["text"] == "".join(WORDS[:4])
    assert printed["token_ids"] == [100, 101, 102, 103]
    assert printed["origins"] == ["draft", "target"] * 2
    assert (printed["prompt_token_ids"], printed["finish_reason"]) == ([7, 8], "length")
    assert (printed["seed"], printed["session_id"]) == (9, "s")
    assert printed["statistics"]["acceptance_rate"] == 0.75


@pytest.mark.parametrize("flags", [[], ["--continue"]])
def test_generate_continues_a_session_only_where_it_is_told_to(address, fake, flags):
    run("generate", "hi", "--session", "s", *flags, "--address", address)
    assert (fake.requests[0].session_id, fake.requests[0].continue_session) == ("s", bool(flags))


def test_generate_reads_standard_input_and_sends_it_raw(address, fake, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grüß\n".encode())))
    assert run("generate", "--raw", "--address", address) == 0
    assert fake.requests[0].prompt == "grüß\n"


def test_generate_refuses_input_that_is_not_utf8(address, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert run("generate", "--address", address) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_generate_passes_sampling_options(address, fake):
    run(
        *("generate", "hi", "--address", address, "--temperature", "0.5", "--top-p", "0.25", "--top-k", "3"),
        *("--min-p", "0.5", "--stop", "a", "--stop", "b", "--verification", "rejection", "--num-draft-tokens", "2"),
        *("--max-tokens", "5", "--repetition-penalty", "2", "--presence-penalty", "1", "--frequency-penalty", "0.5"),
    )
    request = fake.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 3, 0.5)
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (2.0, 1.0, 0.5)
    assert (list(request.stop), request.num_draft_tokens, request.max_tokens) == (["a", "b"], 2, 5)


def test_a_refusal_is_one_line_with_its_reason_and_status_1(address, fake, capsys):
    fake.scripts = [play(Aborted("SESSION_BUSY", "another request is running"), start=False)]
    assert run("generate", "hi", "--address", address) == 1
    error = capsys.readouterr().err
    assert error == "outrider: another request is running [SESSION_BUSY]\n"


def test_an_unreachable_coordinator_is_said_so(capsys):
    with serving_in_thread(FakeCoordinator(whole())) as gone:
        pass
    assert run("models", "--address", gone) == 1
    error = capsys.readouterr().err
    assert f"cannot reach the coordinator at {gone}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "hi", "--nonsense"],
        ["generate", ""],
        ["generate", "hi", "--raw", "--system", "x"],
        ["generate", "hi", "--num-draft-tokens", "17"],
        ["generate", "hi", "--log-probs"],
        ["generate", "hi", "--continue"],
        ["generate", "hi", "--address", ""],
        ["bench", "--mode", "fast"],
        ["bench", "--rate", "2", "--concurrency", "2"],
        ["bench", "--draft-pool", "a=ngram", "--address", "nowhere:1"],
        ["bench", "--draft-pool", "a=ngram", "--sweep-drafters", "suffix"],
        ["bench", "--draft-pool", "a=ngram", "--draft-pool", "a=suffix"],
        ["serve", "nothing"],
    ],
)
def test_wrong_usage_has_status_2(arguments):
    assert run(*arguments) == 2


def test_models_and_sessions(address, capsys):
    assert run("models", "--json", "--address", address) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "fake"
    assert run("sessions", "get", "known", "--json", "--address", address) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == [7, 8, 100]
    assert run("sessions", "get", "other", "--address", address) == 1
    assert "UNKNOWN_SESSION" in capsys.readouterr().err
    assert run("sessions", "close", "known", "--address", address) == 0


def test_top_shows_what_happened_between_two_looks(fake, address, capsys):
    fake.status = lambda num_calls: pb.GetClusterStatusResponse(
        instance_id="c",
        num_requests_running=5,
        activity=pb.CoordinatorActivity(num_generated_tokens=100 * num_calls, num_drafts=num_calls),
        workers=[pb.WorkerStatus(role=1, address="10.0.0.2:50052", pool="big", trouble="connection refused")],
    )
    assert run("top", "--once", "--json", "--interval", "0.1", "--address", address) == 0
    view = json.loads(capsys.readouterr().out)
    assert fake.num_status_calls == 2
    assert view["tokens_per_s"] == pytest.approx(100 / view["interval_s"])
    assert [(w["role"], w["state"], w["trouble"]) for w in view["workers"]] == [("draft", "down", "connection refused")]
    assert run("top", "--once", "--interval", "0.1", "--address", address) == 0
    shown = capsys.readouterr().out
    assert "5 requests running" in shown
    assert "connection refused" in shown


def test_top_says_that_no_coordinator_is_there(capsys):
    with serving_in_thread(FakeCoordinator(whole())) as gone:
        pass
    assert run("top", "--once", "--address", gone) == 1
    assert f"cannot reach the coordinator at {gone}" in capsys.readouterr().err


def test_bench_measures_a_running_coordinator(address, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert run("bench", "--address", address, "--limit", "3", "--json", str(file)) == 0
    report = json.loads(file.read_text())
    assert (report["num_requests"], report["failed_requests"], report["num_identical_outputs"]) == (3, 0, 3)
    assert "speed-up" in capsys.readouterr().out


def test_bench_refuses_a_report_that_cannot_be_written_before_it_measures(address, fake, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("bench", "--address", address, "--json", str(tmp_path / "file" / "report.json")) == 1
    assert "cannot write" in capsys.readouterr().err
    assert fake.requests == []


def test_tables_never_shorten_what_people_copy(capsys):
    name = "a-model-with-a-name-longer-than-its-column"
    table = Table(terminal.whole("model"), show_header=False)
    table.add_row(name)
    Console(width=30).print(table)
    assert "".join(c for c in capsys.readouterr().out if c.isalpha() or c == "-") == name


def test_bench_with_failures_has_status_1_and_still_reports(address, fake, tmp_path):
    refusal = play(Aborted("SESSION_BUSY", "busy"), start=False)
    fake.scripts = [whole(2), whole(2), whole(2), refusal]
    file = tmp_path / "report.json"
    assert run("bench", "--address", address, "--limit", "1", "--json", str(file)) == 1
    assert json.loads(file.read_text())["failures"] == {"SESSION_BUSY": 1}


def test_colours_follow_the_origin_and_trailing_text_is_plain(capsys):
    tokens = (Token(1, TokenOrigin.DRAFT, "a"), Token(2, TokenOrigin.TARGET, "b"), Token(3, TokenOrigin.DRAFT, ""))
    terminal.write_text(Chunk("abc", tokens, 0, 3), coloured=True)
    expected = click.style("a", fg="green") + click.style("b", fg="yellow") + "c"
    assert capsys.readouterr().out == expected


def test_text_cannot_steer_the_terminal():
    assert terminal.printable("a\x1b[2Jb\x07\r\n\tc") == "a\ufffd[2Jb\ufffd\ufffd\n\tc"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_off_on_request(monkeypatch, variable, value):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal_like = io.StringIO()
    monkeypatch.setattr(terminal_like, "isatty", lambda: True, raising=False)
    assert terminal.is_coloured(terminal_like)
    monkeypatch.setenv(variable, value)
    assert not terminal.is_coloured(terminal_like)


def test_errors_say_whether_trying_again_helps():
    later = ResourceExhausted("QUEUE_FULL", "the queue is full", retry_after_ms=1500)
    assert failure.describe(later) == "the queue is full [QUEUE_FULL]; try again in 1.5 s"
    assert "later may help" in failure.describe(Unavailable("NO_TARGET", "no target"))
    other = Internal("UNIMPLEMENTED", "Method not found!")
    assert failure.describe(other, "a:1") == "what serves at a:1 is no coordinator, or an older one: Method not found!"


def test_an_interrupt_while_the_commands_are_imported_is_silent(tmp_path):
    (tmp_path / "click.py").write_text("import time; print('importing', flush=True); time.sleep(30)")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from services.cli.main import main; main([])"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=10)
    assert (process.returncode, error) == (-signal.SIGINT, b"")


def test_the_command_never_loads_torch_or_a_service():
    heavy = "m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers')"
    code = f"import sys, services.cli.commands; print([{heavy}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_train_draft_passes_its_options_on_and_names_what_is_wrong():
    command = [sys.executable, "-m", "services.cli.main", "train-draft"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert "--self-play-tokens" in shown.stdout
    refused = subprocess.run([*command, "--out", "x", "--layers", "1,0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == "train-draft: layers: '1,0' are not distinct and rising\n"
