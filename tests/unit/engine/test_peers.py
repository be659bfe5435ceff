"""transformers' own ways to generate: equal greedy tokens from all of them, and steps that add up."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
import torch

from services.engine import peers
from services.engine.peers import ASSISTED, PROMPT_LOOKUP, TRANSFORMERS, Failed, Peers, Ready, Task, Timed
from tests.tiny_models import save_model


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    directory = tmp_path_factory.mktemp("models")
    save_model(directory / "target")
    return Task(
        target=str(directory / "target"),
        draft=str(directory / "target"),
        peers=peers.PEERS,
        prompts=((5, 6, 7, 8), (9, 4, 9, 4, 9)),
        max_tokens=9,
        num_draft_tokens=3,
        dtype="float32",
        device="cpu",
        threads=torch.get_num_threads(),
        temperature=0.0,
        seed=1,
        ignore_eos=True,
    )


def test_all_peers_give_the_same_greedy_tokens(task):
    running = Peers(task)
    for index in range(len(task.prompts)):
        timed = {name: running.generate(name, index) for name in task.peers}
        assert len({t.token_ids for t in timed.values()}) == 1
        for t in timed.values():
            assert len(t.token_ids) == task.max_tokens
            assert t.steps[-1][1] == task.max_tokens
            assert 0 < t.steps[0][0] <= t.steps[-1][0] <= t.total_ns
        assert len(timed[TRANSFORMERS].steps) == task.max_tokens
        assert len(timed[ASSISTED].steps) < task.max_tokens  # the draft is the target: it is believed
        assert len(timed[PROMPT_LOOKUP].steps) <= task.max_tokens


def test_sampled_tokens_depend_on_the_seed(task):
    outputs = [Peers(replace(task, temperature=1.0, seed=seed)).generate(TRANSFORMERS, 0) for seed in (1, 1, 2)]
    assert outputs[0].token_ids == outputs[1].token_ids != outputs[2].token_ids


def test_the_process_speaks_json_lines(task, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(asdict(task))))
    peers.main()
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events] == ["ready"] + ["timed"] * 6
    assert {(event["peer"], event["prompt"]) for event in events[1:]} == {(p, i) for p in task.peers for i in (0, 1)}


def test_a_peer_that_fails_leaves_the_others_running(task, tmp_path):
    broken = replace(task, draft=str(tmp_path))
    failed, ready, *timed = peers.events(Peers(broken), broken)
    assert isinstance(failed, Failed)
    assert failed.peer == ASSISTED
    assert failed.reason.startswith(("OSError: ", "ValueError: "))
    assert "\n" not in failed.reason
    assert isinstance(ready, Ready)
    assert [(event.peer, event.prompt) for event in timed if isinstance(event, Timed)] == [
        (TRANSFORMERS, 0),
        (PROMPT_LOOKUP, 0),
        (PROMPT_LOOKUP, 1),
        (TRANSFORMERS, 1),
    ]


def test_a_peer_that_fails_on_the_way_is_not_asked_again(task):
    prompts = (task.prompts[0], (10**6,), task.prompts[1])  # the second is not in the vocabulary
    broken = replace(task, peers=(TRANSFORMERS,), prompts=prompts)
    events = list(peers.events(Peers(broken), broken))
    assert [event.event for event in events] == ["ready", "timed", "failed"]
