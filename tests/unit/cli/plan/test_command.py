"""`outrider plan`: answers, and what it says to bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from services.cli.failure import CommandFailed
from services.cli.plan.capacity import Load, fleet_for
from services.cli.plan.command import plan
from services.cli.plan.measured import read_times
from services.cli.plan.setting import Times

FAST = ("--max-sequences", "8")


def answer(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(plan, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_the_best_length_falls_with_acceptance_and_is_0_where_nothing_pays() -> None:
    lengths = [answer("--acceptance", alpha)["best_num_draft_tokens"] for alpha in ("0.9", "0.5", "0.05")]
    assert lengths[0] > lengths[1] > lengths[2] == 0


def test_a_load_needs_as_many_targets_as_its_share_of_capacity_says() -> None:
    one = answer("--tokens-per-s", "100", *FAST)["fleet"]
    many = answer("--requests-per-s", "10", "--output-len", "300", *FAST)["fleet"]
    assert one["num_targets"] == 1
    assert many["num_targets"] > 5
    assert 1 <= many["num_drafts"] < many["num_targets"]
    assert many["tokens_per_s"] >= 3000


def test_a_stricter_time_a_token_takes_fewer_sequences_on_a_target() -> None:
    times, load = Times(step_ms=20.0, row_ms=1.0, token_ms=1.0), 500.0
    free = fleet_for(times, Load(load, max_sequences=16))
    strict = fleet_for(times, Load(load, max_sequences=16, max_tpot_ms=14.0))
    assert free is not None
    assert strict is not None
    assert strict.tpot_ms <= 14.0
    assert strict.num_sequences < free.num_sequences
    assert strict.num_targets > free.num_targets
    assert fleet_for(times, Load(load, max_sequences=4, max_tpot_ms=1.0)) is None


REPORT = {
    "num_drafts": 90,
    "acceptance_rate_per_position": [0.8, 0.4],
    "limits": {
        "num_rounds": 100,
        "plain_ms_per_token": 50.0,
        "draft_ms": 8.0,
        "verify_ms": 60.0,
        "overhead_ms": 2.0,
    },
}


def test_times_are_read_from_a_report_and_options_come_first(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(REPORT))
    assert read_times(file) == (Times(45.0, 5.0, 4.0, 0.0, (pytest.approx(0.72), 0.5), 0.0, 2.0), 0)
    times = answer("--from", str(file), "--step-ms", "7")["times"]
    assert (times["step_ms"], times["token_ms"]) == (7.0, 4.0)


def a_request(conversation: int, ttft_ms: float, turn: int = 0) -> dict[str, object]:
    return {
        "conversation": conversation,
        "turn": turn,
        "num_prompt_tokens": 100 + 100 * conversation,
        "ttft_ms": ttft_ms,
    }


def test_prefill_is_read_from_the_first_and_uncached_time_of_each_prompt(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    requests = [a_request(0, 102.0), a_request(0, 60.0), a_request(1, 55.0), a_request(1, 152.0), a_request(1, 9.0, 1)]
    file.write_text(json.dumps(REPORT | {"requests": requests}))
    measured = read_times(file)
    assert measured.times.prefill_token_ms == pytest.approx(0.5)
    assert measured.prompt_len == 150
    found = answer("--from", str(file), "--num-draft-tokens", "2")
    assert found["request"] == {"prompt_len": 150, "output_len": 256}
    assert found["points"][0]["ttft_ms"] == pytest.approx(50 + 149 * 0.5 + 2, abs=0.1)


PROMPTS = ("--prompt-len", "200", "--prefill-token-ms", "0.2", "--output-len", "64", "--num-draft-tokens", "4")


def test_prompts_take_their_part_of_the_rate_and_of_the_fleet() -> None:
    without = answer("--tokens-per-s", "1000", *PROMPTS[4:], *FAST)
    beside = answer("--tokens-per-s", "1000", *PROMPTS, *FAST)
    assert without["points"][1]["ttft_ms"] is None
    assert beside["points"][1]["ttft_ms"] > 60.0
    assert beside["points"][1]["tokens_per_s"] < 0.95 * without["points"][1]["tokens_per_s"]
    assert beside["fleet"]["num_targets"] > without["fleet"]["num_targets"]


def test_a_stricter_time_to_the_first_token_takes_fewer_sequences_on_a_target() -> None:
    free, strict = (
        answer("--tokens-per-s", "500", *PROMPTS, *FAST, *bound)["fleet"] for bound in ((), ("--max-ttft-ms", "90"))
    )
    assert strict["ttft_ms"] <= 90.0 < free["ttft_ms"]
    assert strict["num_sequences"] < free["num_sequences"]


@pytest.mark.parametrize("text", ["{}", "no json", json.dumps(REPORT | {"limits": None})])
def test_another_file_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(CommandFailed, match=r"other\.json"):
        read_times(file)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--tokens-per-s", "1", "--requests-per-s", "1"), "--requests-per-s"),
        (("--acceptance", "0.5,2"), "--acceptance"),
        (("--step-ms", "0"), "--step-ms"),
        (("--prompt-len", "10"), "--prefill-token-ms"),
        (("--max-ttft-ms", "10"), "--max-ttft-ms needs --prompt-len"),
        (("--num-draft-tokens", "17"), "--num-draft-tokens"),
    ],
)
def test_bad_usage_names_the_option(arguments: tuple[str, ...], named: str) -> None:
    result = CliRunner().invoke(plan, list(arguments))
    assert result.exit_code == 2
    assert named in result.output


def test_the_tables_say_the_answer() -> None:
    result = CliRunner().invoke(plan, ["--tokens-per-s", "100", "--num-draft-tokens", "4", *FAST])
    assert result.exit_code == 0
    assert "for 100 tokens/s" in result.output
