"""The commands against a simulated cluster of real processes and a real Redis-compatible server."""

from __future__ import annotations

import json
import uuid

import pytest

from services.cli.cluster import Cluster
from services.client import Chat, GenerateOptions, OutriderClient
from tests.e2e.conftest import Run


def generate(run: Run, *arguments: str) -> dict:
    done = run("generate", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_generate_json_agrees_with_itself(run):
    printed = generate(run, "Hello", "--max-tokens", "200", "--num-draft-tokens", "4")
    assert len(printed["token_ids"]) == len(printed["origins"]) == 200
    assert printed["finish_reason"] == "length"
    statistics = printed["statistics"]
    assert statistics["num_generated_tokens"] == 200
    assert statistics["num_prompt_tokens"] == len(printed["prompt_token_ids"])
    assert printed["origins"].count("draft") == statistics["num_accepted_tokens"] > 0


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_speculation_changes_no_token(run, temperature):
    options = ("Hello", "--max-tokens", "32", "--seed", "3", "--temperature", temperature)
    plain = generate(run, *options, "--num-draft-tokens", "0")
    speculative = generate(run, *options, "--num-draft-tokens", "4")
    assert speculative["token_ids"] == plain["token_ids"]
    assert speculative["text"] == plain["text"]
    assert plain["statistics"]["num_drafts"] == 0


def test_streamed_text_is_that_of_the_json_and_has_no_colours_in_a_pipe(run):
    printed = generate(run, "Hello", "--max-tokens", "16")
    done = run("generate", "--max-tokens", "16", stdin="Hello")
    assert done.stdout == printed["text"] + "\n"


def test_a_stop_string_ends_the_text_before_it(run):
    whole = generate(run, "Hello", "--raw", "--max-tokens", "32")["text"]
    stop = whole[10:12]
    stopped = generate(run, "Hello", "--raw", "--max-tokens", "32", "--stop", stop)
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_a_session_remembers_its_turns_until_it_is_closed(run):
    session = str(uuid.uuid4())
    first = generate(run, "Hello", "--session", session, "--max-tokens", "8")
    second = generate(run, "And then?", "--session", session, "--max-tokens", "8")
    both = first["prompt_token_ids"] + first["token_ids"]
    assert second["prompt_token_ids"][: len(both)] == both
    record = json.loads(run("sessions", "get", session, "--json").stdout)
    assert record["token_ids"] == second["prompt_token_ids"] + second["token_ids"]
    assert run("sessions", "close", session).returncode == 0
    closed = run("generate", "More", "--session", session)
    assert closed.returncode == 1
    assert "SESSION_CLOSED" in closed.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "x", "--temperature", "-1"), "temperature"),
        (("generate", "x", "--temperature", "nan"), "temperature"),
        (("generate", "x", "--top-p", "0"), "top_p"),
        (("generate", "x", "--model", "none"), "UNKNOWN_MODEL"),
        (("generate", "x", "--session", "no-uuid"), "session_id"),
        (("sessions", "get", str(uuid.UUID(int=1))), "UNKNOWN_SESSION"),
    ],
)
def test_refusals_are_one_line_that_names_what_is_wrong(run, arguments, named):
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_check_distribution_finds_none_on_a_running_cluster(run, tmp_path, verification):
    file = tmp_path / "distribution.json"
    options = ("--check-distribution", "150", "--max-tokens", "4", "--verification", verification)
    done = run("bench", *options, "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "no difference found" in done.stdout
    found = json.loads(file.read_text())["distribution"]
    assert (found["num_plain"], found["num_speculative"], found["equal"]) == (150, 150, True)
    assert [test["name"] for test in found["tests"]][:4] == [f"token {i}" for i in range(1, 5)]
    assert found["p"] >= 1e-4
    assert 0 < found["num_accepted_tokens"] < found["num_draft_tokens"]


def test_check_distribution_needs_a_temperature(run):
    done = run("bench", "--check-distribution", "--temperature", "0")
    assert done.returncode == 2
    assert "--temperature" in done.stderr


@pytest.mark.parametrize("options", [("--peers", "transformers"), ("--html", "page.html"), ("--rate", "2")])
def test_check_distribution_refuses_what_it_would_ignore(run, options):
    done = run("bench", "--check-distribution", *options)
    assert done.returncode == 2
    assert options[0] in done.stderr


def test_models_are_listed_with_their_drafter(run):
    (model,) = json.loads(run("models", "--json").stdout)
    assert (model["name"], model["drafter"], model["ready"]) == ("simulated", "simulated", True)


async def test_the_client_library_streams_what_it_returns(cluster: Cluster):
    options = GenerateOptions(max_tokens=20, temperature=0.0, log_probs=True)
    async with OutriderClient(cluster.address) as client:
        generation = client.generate(Chat.of("Hello"), options)
        chunks = [chunk async for chunk in generation]
        again = await client.complete(Chat.of("Hello"), options)
    assert "".join(chunk.text for chunk in chunks) == generation.result.text == again.text
    assert [chunk.offset for chunk in chunks] == sorted(chunk.offset for chunk in chunks)
    tokens = [token for chunk in chunks for token in chunk.tokens]
    assert all(token.log_prob is not None for token in tokens)
    assert "".join(token.text for token in tokens) + chunks[-1].trailing_text == generation.result.text


@pytest.mark.parametrize("service", ["draft", "target", "coordinator"])
def test_serve_shows_the_services_own_options(run, service):
    done = run("serve", service, "--help")
    assert done.returncode == 0
    assert "--port" in done.stdout
