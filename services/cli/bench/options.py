"""The options of `outrider bench`, and the values made of them.

Owns: their names, defaults and help. Must not know: how anything is measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click

from services.cli.bench.distribution import CONTINUATION_LEN, DEFAULT_CONCURRENCY, DEFAULT_NUM_SAMPLES
from services.cli.bench.load import LoadPlan
from services.cli.bench.peers import PEERS
from services.cli.bench.sample import Mode
from services.cli.bench.sweep import SAMPLINGS, Sweep
from services.cli.failure import CommandFailed
from services.cli.options import decode_options
from services.cli.prompts import OWN_PROMPTS
from services.client import GenerateOptions
from services.common.drafters import DRAFTERS, parse_chain
from services.common.errors import ConfigError
from services.common.values import MAX_DRAFT_TOKENS, VerificationMethod

_FILE = click.Path(path_type=Path, dir_okay=False)
_STANDARD_OUTPUT = Path("-")
_MODES = {
    "both": (Mode.PLAIN, Mode.SPECULATIVE),
    "plain": (Mode.PLAIN,),
    "speculative": (Mode.SPECULATIVE,),
}


class Names(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of some of `choices`, without repetition."""

    name = "list"

    def __init__(self, choices: tuple[str, ...]) -> None:
        self._choices = choices

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        unknown = [name for name in names if name not in self._choices]
        if unknown:
            self.fail(f"{unknown[0]!r} is not one of {', '.join(self._choices)}", parameter, context)
        return names


class Chains(click.ParamType[tuple[str, ...]]):
    """A comma-separated list of drafters; a plus joins those of a chain, which a comma joins elsewhere."""

    name = "list"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            chains = [parse_chain(part.replace("+", ",")) for part in value.split(",")]
        except ConfigError as error:
            self.fail(str(error), parameter, context)
        return tuple(dict.fromkeys(",".join(chain) for chain in chains))


class Output(NamedTuple):
    """Where the report goes besides the terminal."""

    json_file: Path | None
    html_file: Path | None

    @property
    def quiet(self) -> bool:
        """Whether standard output is for JSON."""
        return self.json_file == _STANDARD_OUTPUT

    def check(self) -> None:
        """Raises CommandFailed before anything is measured, rather than lose the report."""
        for file in (self.json_file, self.html_file):
            if file is None or file == _STANDARD_OUTPUT:
                continue
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                existed = file.exists()
                file.open("a").close()
                if not existed:  # an empty file would look like a report
                    file.unlink()
            except OSError as error:
                raise CommandFailed(f"cannot write {file}: {error.strerror}") from None


_LENGTHS = Names(tuple(str(length) for length in range(1, MAX_DRAFT_TOKENS + 1)))

_OPTIONS = (
    click.option(
        "--prompts", type=_FILE, default=OWN_PROMPTS, help="Prompt file, JSON Lines.  [default: Outrider's own]"
    ),
    click.option(
        "--max-tokens",
        type=click.IntRange(min=1),
        help=f"Most tokens a request.  [default: 128, or {CONTINUATION_LEN} with --check-distribution]",
    ),
    click.option(
        "--limit", type=click.IntRange(min=1), help="Use at most so many prompts, spread over the categories."
    ),
    click.option(
        "--concurrency",
        type=click.IntRange(min=1),
        help="Closed loop: so many conversations at a time.  "
        f"[default: 1, or {DEFAULT_CONCURRENCY} with --check-distribution]",
    ),
    click.option(
        "--rate", type=click.FloatRange(min=0, min_open=True), help="Open loop: conversations a second, Poisson."
    ),
    click.option(
        "--mode",
        type=click.Choice(tuple(_MODES)),
        default="both",
        show_default=True,
        help="With speculation, without, or both in turns.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63),
        default=0,
        show_default=True,
        help="Of arrivals, and of the requests' noise.",
    ),
    click.option("--temperature", type=float, help="0 is greedy.  [default: 0, or 1 with --check-distribution]"),
    decode_options,
    click.option(
        "--all-turns", is_flag=True, help="Send every turn of a conversation, in one session; else the first only."
    ),
    click.option("--raw", is_flag=True, help="Send prompts without the model's chat template."),
    click.option("--ignore-eos", is_flag=True, help="Go on after end-of-sequence tokens, up to max-tokens."),
    click.option(
        "--warmup",
        type=click.IntRange(min=0),
        default=1,
        show_default=True,
        help="Requests before measuring, in each mode.",
    ),
    click.option(
        "--sweep-draft-tokens",
        type=_LENGTHS,
        default=(),
        metavar="K,K,...",
        help="Measure each of these draft lengths, all in one report.",
    ),
    click.option(
        "--sweep-drafters",
        type=Chains(),
        default=(),
        metavar="NAME,...",
        help=f"Measure each of these drafters ({', '.join(DRAFTERS)}; chains as suffix+model), each in a cluster.",
    ),
    click.option(
        "--sweep-sampling",
        type=Names(SAMPLINGS),
        default=(),
        metavar="NAME,...",
        help=f"Measure each of {', '.join(SAMPLINGS)}; all but greedy at --temperature, or 1.",
    ),
    click.option(
        "--peers",
        type=Names(PEERS),
        default=(),
        metavar="NAME,...",
        help=f"Measure transformers on the same prompts afterwards: {', '.join(PEERS)} (its assisted generation with "
        "the same draft model).",
    ),
    click.option(
        "--check-distribution",
        type=click.IntRange(min=20),
        is_flag=False,
        flag_value=DEFAULT_NUM_SAMPLES,
        metavar="[N]",
        help="Instead: compare N short sampled continuations of the first prompt with and without speculation, by "
        f"chi-square tests.  [{DEFAULT_NUM_SAMPLES} each]",
    ),
    click.option("--overhead", is_flag=True, help="Instead: what a round costs the coordinator at 1 and 64 sessions."),
    click.option("--json", "json_file", type=_FILE, help="Write the report to this file; - is standard output."),
    click.option("--html", "html_file", type=_FILE, help="Write a page with tables and plots to this file."),
)


def bench_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds them; the command gets those of the load as `plan`, of the sweep as `sweep`, of the files as `output`."""

    @functools.wraps(command)
    def bundled(**options: Any) -> Any:
        plan = _plan(options, sampled=options["check_distribution"] is not None)
        sweep = Sweep(
            tuple(int(length) for length in options.pop("sweep_draft_tokens")),
            options.pop("sweep_drafters"),
            options.pop("sweep_sampling"),
        )
        output = Output(options.pop("json_file"), options.pop("html_file"))
        return command(plan=plan, sweep=sweep, output=output, **options)

    for option in reversed(_OPTIONS):
        bundled = option(bundled)
    return bundled


def _plan(options: dict[str, Any], *, sampled: bool) -> LoadPlan:
    """Takes its options out of `options`. `sampled`: with the defaults of --check-distribution."""
    rate, concurrency = options.pop("rate"), options.pop("concurrency")
    if rate is not None and concurrency is not None:
        raise click.UsageError("--rate is an open loop, --concurrency a closed one; give one of them")
    max_tokens, temperature = options.pop("max_tokens"), options.pop("temperature")
    generate = GenerateOptions(
        max_tokens=max_tokens or (CONTINUATION_LEN if sampled else 128),
        temperature=(1.0 if sampled else 0.0) if temperature is None else temperature,
        verification=VerificationMethod(options.pop("verification")),
        num_draft_tokens=options.pop("num_draft_tokens"),
        ignore_eos=options.pop("ignore_eos"),
    )
    return LoadPlan(
        generate,
        _MODES[options.pop("mode")],
        concurrency or (DEFAULT_CONCURRENCY if sampled else 1),
        rate,
        options.pop("seed"),
        options.pop("raw"),
        options.pop("all_turns"),
        options.pop("warmup"),
    )
