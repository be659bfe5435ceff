"""`outrider bench`: the command.

Owns: what its options select, and where reports go. Must not know: how load is sent or numbers are made.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import click

from services.cli.bench import page
from services.cli.bench.distribution import draw_and_compare, print_distribution, verdict
from services.cli.bench.document import CaseReport, Document, as_object, distribution_object
from services.cli.bench.load import LoadPlan
from services.cli.bench.machine import environment
from services.cli.bench.notes import notes_on
from services.cli.bench.options import Output, bench_options
from services.cli.bench.overhead import cpu_ratio, measure_overhead, print_overhead
from services.cli.bench.peers import PeerReport, check_peers, failed_peers, peers_task, run_peers
from services.cli.bench.report import FormulaTerms, build_report
from services.cli.bench.sample import Mode, Sample
from services.cli.bench.show import print_document
from services.cli.bench.sweep import Case, CaseOutcome, Sweep, Where, run_cases
from services.cli.cluster import SIMULATED, ClusterSpec, PoolSpec
from services.cli.draft_pool_option import draft_pool_option, with_draft
from services.cli.failure import CommandFailed, describe
from services.cli.options import access_options, address_option, cluster_options
from services.cli.prompts import Conversation, load_prompts, spread
from services.cli.terminal import notices, results
from services.client import Access
from services.common.drafters import needs_model, parse_chain
from services.common.errors import OutriderError
from services.common.values import DEFAULT_NUM_DRAFT_TOKENS


@click.command()
@bench_options
@draft_pool_option(
    "Instead of --drafter: measure a pool of drafts by name, as NAME=DRAFTER or NAME=DRAFTER:MODEL; for several side "
    "by side in one cluster, repeat it."
)
@address_option(default=None, help="Measure this coordinator instead of starting a cluster.")
@access_options
@cluster_options
def bench(
    prompts: Path,
    limit: int | None,
    plan: LoadPlan,
    sweep: Sweep,
    peers: tuple[str, ...],
    check_distribution: int | None,
    overhead: bool,
    address: str | None,
    access: Access,
    spec: ClusterSpec,
    named_pools: tuple[PoolSpec, ...],
    output: Output,
) -> None:
    """Measure throughput, latency and acceptance over a prompt file, with and without speculation.

    Starts a cluster of its own and stops it, unless --address or OUTRIDER_ADDRESS names one. Plain and speculative
    requests alternate, so that a noisy machine treats both alike. Shows tokens/s, speed-up and acceptance by category,
    what limits the speed-up, and the formula's speed-up beside the measured one. The --sweep options measure several
    cases, every combination of what they name; --html writes it all as one page.

    \b
    outrider bench --limit 13 --max-tokens 64 --html report.html
    outrider bench --sweep-draft-tokens 1,2,4,8 --sweep-sampling greedy,coupled,rejection --json report.json
    outrider bench --draft-pool copy=suffix --draft-pool big=model:DIRECTORY --json report.json
    outrider bench --peers transformers,prompt-lookup
    outrider bench --check-distribution --verification rejection --address host:50051

    Ends with status 1 if a request, a peer or a sweep's cluster failed, with a report of the rest; or if
    --check-distribution finds a difference (p below 1e-4) or saw no draft token to verify.
    """
    if overhead and check_distribution is not None:
        raise click.UsageError("--overhead and --check-distribution are runs of their own; give one of them")
    if overhead or check_distribution is not None:
        _refuse_what_is_ignored(plan, sweep, peers, output)
    if overhead and address is not None:
        raise click.UsageError("--overhead starts a cluster of its own: no --address, no OUTRIDER_ADDRESS")
    _refuse_pools_beside(named_pools, sweep, address, overhead=overhead)
    spec = dataclasses.replace(spec, named_pools=with_draft(named_pools, spec.draft))
    where = Where(address, spec, access if address is not None else Access())
    output.check()
    conversations = spread(load_prompts(prompts), limit)
    configuration = _configuration(where, plan, sweep, prompts, len(conversations))
    try:
        if overhead:
            _bench_overhead(plan, conversations[0], output)
        elif check_distribution is not None:
            _check_distribution(where, plan, conversations[0], check_distribution, configuration, output)
        else:
            _bench_prompts(where, plan, sweep, peers, conversations, configuration, output)
    except OutriderError as error:
        raise CommandFailed(describe(error, address)) from None


def _refuse_pools_beside(
    named_pools: tuple[PoolSpec, ...], sweep: Sweep, address: str | None, *, overhead: bool
) -> None:
    given = {"--sweep-drafters": bool(sweep.drafters), "--address": address is not None, "--overhead": overhead}
    refused = [option for option, is_given in given.items() if is_given]
    if named_pools and refused:
        raise click.UsageError(f"--draft-pool says which drafts a cluster is started with: no {', '.join(refused)}")


def _refuse_what_is_ignored(plan: LoadPlan, sweep: Sweep, peers: tuple[str, ...], output: Output) -> None:
    """By the runs of their own, rather than let their figures seem to obey it."""
    given = {
        "--sweep-...": any(sweep),
        "--peers": bool(peers),
        "--html": output.html_file is not None,
        "--rate": plan.rate is not None,
        "--all-turns": plan.all_turns,
        "--mode": len(plan.modes) < len(Mode),
    }
    refused = [option for option, is_given in given.items() if is_given]
    if refused:
        raise click.UsageError(f"--overhead and --check-distribution know no {', '.join(refused)}")


def _bench_prompts(
    where: Where,
    plan: LoadPlan,
    sweep: Sweep,
    peers: tuple[str, ...],
    conversations: tuple[Conversation, ...],
    configuration: dict[str, str],
    output: Output,
) -> None:
    if where.address is not None and sweep.drafters:
        raise click.UsageError("--sweep-drafters starts a cluster for each drafter; it cannot be used with --address")
    check_peers(peers, where.spec.target, _drafters(where, sweep), own_cluster=where.address is None)
    if output.html_file is not None:
        page.check_plots()
    drafter = where.spec.drafter if where.address is None else ""
    cases = sweep.cases(drafter, plan.options, where.spec.named_pools)
    swept = run_cases(where, cases, conversations, plan, notices())
    reports = tuple(_case_report(where, plan, outcome) for outcome in swept.outcomes)
    peer_reports = _run_peers(where.spec, plan, peers, reports[0]) if peers else ()
    notes = notes_on(plan, cases, with_peers=bool(peers)) + tuple(f"Not measured: {why}" for why in swept.failures)
    document = Document(reports, configuration, environment(sys.argv[1:]), peer_reports, notes)
    _write(document, output)
    _fail_if_anything_did(document, swept.failures)


def _case_report(where: Where, plan: LoadPlan, measured: CaseOutcome) -> CaseReport:
    case, (blocks, cpu_ms) = measured
    report = build_report(blocks, cpu_ms, _formula_terms(where, plan, case))
    samples = (outcome for block in blocks for outcome in block.outcomes)
    return CaseReport(case, report, tuple(outcome for outcome in samples if isinstance(outcome, Sample)))


def _formula_terms(where: Where, plan: LoadPlan, case: Case) -> FormulaTerms | None:
    """Only for one request at a time and a fixed K, as the formula assumes. A simulated cluster's costs are given."""
    spec, own_cluster = where.spec, where.address is None
    if plan.concurrency != 1 or plan.rate is not None or case.num_draft_tokens is None:
        return None
    simulated = spec.target == SIMULATED and case.drafter == SIMULATED and spec.simulated_step_ms > 0
    cost_ratio = spec.simulated_token_ms / spec.simulated_step_ms if simulated and own_cluster else None
    return FormulaTerms(case.num_draft_tokens, cost_ratio)


def _run_peers(spec: ClusterSpec, plan: LoadPlan, peers: tuple[str, ...], first: CaseReport) -> tuple[PeerReport, ...]:
    """What is measured already must not be lost: whatever goes wrong here goes into the report."""
    samples = first.of(Mode.SPECULATIVE) or first.of(Mode.PLAIN)
    if not samples:
        return failed_peers(peers, "no request succeeded, which leaves no prompts to run")
    options = dataclasses.replace(first.case.options(plan.options), seed=plan.seed)
    num_draft_tokens = options.num_draft_tokens or DEFAULT_NUM_DRAFT_TOKENS
    try:
        task = peers_task(peers, _with_assistant(spec), options, num_draft_tokens, samples)
    except CommandFailed as failed:
        return failed_peers(peers, str(failed))
    return run_peers(task, samples, notices())


def _with_assistant(spec: ClusterSpec) -> ClusterSpec:
    """Its draft is the first pool's with the drafter that assisted generation has too."""
    return dataclasses.replace(spec, draft=next((p.draft for p in spec.pools if p.drafter == "model"), spec.draft))


def _write(document: Document, output: Output) -> None:
    if not output.quiet:
        print_document(document, results())
    _write_json(output, as_object(document))
    if output.html_file is not None:
        output.html_file.write_text(page.render(document), encoding="utf-8")


def _fail_if_anything_did(document: Document, not_measured: tuple[str, ...]) -> None:
    """After the report is written."""
    failures = sum((Counter(entry.report.failures) for entry in document.cases), Counter[str]())
    sentences = [f"the peer {peer.name} failed: {peer.failure}" for peer in document.peers if peer.failure]
    if failures:
        reasons = ", ".join(f"{count} {reason}" for reason, count in failures.items())
        sentences.insert(0, f"{failures.total()} requests failed: {reasons}")
    sentences += [f"not measured: {why}" for why in not_measured]
    if sentences:
        raise CommandFailed("; ".join(sentences))


def _check_distribution(
    where: Where,
    plan: LoadPlan,
    conversation: Conversation,
    num_samples: int,
    configuration: dict[str, str],
    output: Output,
) -> None:
    if plan.options.temperature == 0:
        raise click.UsageError("--check-distribution samples: --temperature must be above 0")
    with where.running(notices(), where.spec.drafter) as (address, _):
        check = asyncio.run(draw_and_compare(address, conversation, plan, num_samples, notices(), where.access))
    if not output.quiet:
        print_distribution(check, results())
    _write_json(output, distribution_object(check, configuration, environment(sys.argv[1:])))
    if not check.passed:
        raise CommandFailed(verdict(check))


def _bench_overhead(plan: LoadPlan, conversation: Conversation, output: Output) -> None:
    reports = measure_overhead(plan, conversation, notices())
    if not output.quiet:
        print_overhead(reports, results())
    fields: dict[str, object] = {
        "sessions": [dataclasses.asdict(report) for report in reports],
        "cpu_ratio": cpu_ratio(reports),
        "failed_requests": sum(report.failed_requests for report in reports),
        "environment": dataclasses.asdict(environment(sys.argv[1:])),
    }
    _write_json(output, fields)
    if any(report.failed_requests for report in reports):
        raise CommandFailed(f"{fields['failed_requests']} requests failed")


def _drafters(where: Where, sweep: Sweep) -> tuple[str, ...]:
    return sweep.drafters or tuple(pool.drafter for pool in where.spec.pools)


def _configuration(where: Where, plan: LoadPlan, sweep: Sweep, prompts: Path, num_prompts: int) -> dict[str, str]:
    """What all cases share, in words."""
    spec = where.spec
    model = {"target": Path(spec.target).name, "dtype": spec.dtype, "device": spec.device}
    if spec.named_pools:
        model["draft pools"] = ", ".join(_pool_in_words(pool) for pool in spec.named_pools)
    elif any(needs_model(parse_chain(drafter)) for drafter in _drafters(where, sweep)):
        model["draft"] = Path(spec.draft).name
    arrivals = f"{plan.concurrency} at a time" if plan.rate is None else f"{plan.rate:g} a second, Poisson"
    return {
        **(model if where.address is None else {"cluster": "was running"}),
        "prompts": f"{num_prompts} of {prompts.name}, {'all turns' if plan.all_turns else 'first turns'}",
        "max_tokens": str(plan.options.max_tokens)
        + (", past end-of-sequence tokens" if plan.options.ignore_eos else ""),
        "conversations": arrivals,
        "seed": str(plan.seed),
    }


def _pool_in_words(pool: PoolSpec) -> str:
    model = f":{Path(pool.draft).name}" if needs_model(parse_chain(pool.drafter)) else ""
    return f"{pool.name}={pool.drafter}{model}"


def _write_json(output: Output, fields: dict[str, object]) -> None:
    if output.json_file is None:
        return
    text = json.dumps(fields, indent=2)
    if output.quiet:
        click.echo(text)
        return
    output.json_file.write_text(text + "\n")
