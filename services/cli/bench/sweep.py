"""Cases: the combinations of drafter or draft pool, draft length and sampling that one run of `outrider bench` has.

Owns: which there are, and running them, one cluster a drafter, or one for all draft pools. Must not know: what the
samples come to.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console

from services.cli.bench.load import LoadPlan
from services.cli.bench.run import RunOutcome, run_load
from services.cli.cluster import Cluster, ClusterSpec, PoolSpec
from services.cli.failure import CommandFailed
from services.cli.prompts import Conversation
from services.cli.terminal import Stages
from services.client import Access, GenerateOptions
from services.common.values import VerificationMethod

GREEDY = "greedy"
SAMPLINGS = (GREEDY, *(method.value for method in VerificationMethod))


@dataclass(frozen=True, slots=True)
class Case:
    """`drafter` is empty where it is that of a running cluster; without `num_draft_tokens` it is the server's.

    `draft` names the pool that its requests ask for, where there are pools by name.
    """

    drafter: str
    num_draft_tokens: int | None
    temperature: float
    verification: VerificationMethod
    draft: str = ""

    @property
    def cluster(self) -> str:
        """Cases in which it is equal share a cluster."""
        return "the draft pools" if self.draft else self.drafter

    @property
    def who(self) -> str:
        """Who drafts."""
        return f"{self.draft}={self.drafter}" if self.draft else self.drafter

    @property
    def sampling(self) -> str:
        """In words."""
        return GREEDY if self.temperature == 0 else f"{self.verification.value} at {self.temperature:g}"

    @property
    def label(self) -> str:
        length = "" if self.num_draft_tokens is None else f" K={self.num_draft_tokens}"
        return f"{self.who or 'drafter'}{length}, {self.sampling}"

    def options(self, base: GenerateOptions) -> GenerateOptions:
        return dataclasses.replace(
            base,
            num_draft_tokens=self.num_draft_tokens,
            temperature=self.temperature,
            verification=self.verification,
            draft=self.draft,
        )


class Sweep(NamedTuple):
    """What is varied; an empty part stays as the other options say."""

    draft_tokens: tuple[int, ...] = ()
    drafters: tuple[str, ...] = ()
    samplings: tuple[str, ...] = ()

    def cases(self, drafter: str, options: GenerateOptions, named_pools: Sequence[PoolSpec] = ()) -> tuple[Case, ...]:
        """All combinations, in the order given; `named_pools` stand in the place of drafters.

        Samplings but greedy have the options' temperature, or 1 if it is 0.
        """
        lengths = self.draft_tokens or (options.num_draft_tokens,)
        samplings = [_sampling(name, options) for name in self.samplings]
        samplings = samplings or [(options.temperature, options.verification)]
        who = [(pool.drafter, pool.name) for pool in named_pools] or [(d, "") for d in self.drafters or (drafter,)]
        combined = itertools.product(who, samplings, lengths)
        return tuple(Case(drafter, length, *sampling, draft) for (drafter, draft), sampling, length in combined)


def _sampling(name: str, options: GenerateOptions) -> tuple[float, VerificationMethod]:
    if name == GREEDY:
        return 0.0, options.verification
    return options.temperature or 1.0, VerificationMethod(name)


class CaseOutcome(NamedTuple):
    """What one case gave."""

    case: Case
    outcome: RunOutcome


class Swept(NamedTuple):
    """What was measured, and sentences on the clusters that could not be."""

    outcomes: tuple[CaseOutcome, ...]
    failures: tuple[str, ...] = ()


class Where(NamedTuple):
    """A running coordinator, or a cluster to start."""

    address: str | None
    spec: ClusterSpec
    access: Access = Access()
    """To the running coordinator; a cluster of its own needs none."""

    @contextlib.contextmanager
    def running(self, console: Console, drafter: str) -> Iterator[tuple[str, int | None]]:
        """An address, and the coordinator's process id where it is ours, while the cluster runs."""
        if self.address is not None:
            yield self.address, None
            return
        with (
            Stages(console) as stages,
            Cluster(dataclasses.replace(self.spec, drafter=drafter), stages.show) as cluster,
        ):
            stages.stop()
            yield cluster.address, cluster.pid_of("coordinator")


def run_cases(
    where: Where, cases: Sequence[Case], conversations: Sequence[Conversation], plan: LoadPlan, console: Console
) -> Swept:
    """Runs them in their order. Each has plain decoding of its own in turns, since machines drift.

    A cluster that fails costs its own cases alone: what is measured stays. Raises CommandFailed if nothing was.
    """
    outcomes: list[CaseOutcome] = []
    failures: dict[str, CommandFailed] = {}
    for name, group in itertools.groupby(cases, key=lambda case: case.cluster):
        of_it = tuple(group)
        try:
            with where.running(console, of_it[0].drafter) as (address, pid):
                for case in of_it:
                    case_plan = dataclasses.replace(plan, options=case.options(plan.options))
                    title = f"case {len(outcomes) + 1} of {len(cases)}: {case.label}" if len(cases) > 1 else "measuring"
                    run = run_load(address, conversations, case_plan, console, pid, title=title, access=where.access)
                    outcomes.append(CaseOutcome(case, asyncio.run(run)))
        except CommandFailed as failed:
            failures[f"{name}: {failed}"] = failed
            console.print(f"not measured: {name}: {failed}\n{failed.detail}".rstrip(), markup=False)
    if not outcomes:
        raise next(iter(failures.values()))
    return Swept(tuple(outcomes), tuple(failures))
