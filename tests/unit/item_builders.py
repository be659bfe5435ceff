"""Items and sequences for tests of the engine's torch-free parts."""

from __future__ import annotations

from services.common.items import Close, Decode, Identity, Open, Propose, Verify
from services.common.values import Proposal, SamplingParams, VerificationMethod
from services.common.vocab import SIMULATED_EOS
from services.engine.sequence import Sequence
from services.engine.simulated import INITIAL_STATE, choose, extend_state, sampling_key

GREEDY = SamplingParams(temperature=0.0)


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        return self.now_ns


def identity(session: str = "a", *, base_len: int, attempt: int = 1, lease_epoch: int = 1, round: int = 0) -> Identity:
    return Identity(session, lease_epoch, attempt, round, base_len)


def open_item(
    session: str = "a",
    prefix: tuple[int, ...] = (1, 2, 3),
    *,
    attempt: int = 1,
    lease_epoch: int = 1,
    max_new_tokens: int = 100,
    sampling: SamplingParams = GREEDY,
    verification: VerificationMethod = VerificationMethod.COUPLED,
    eos_token_ids: frozenset[int] = frozenset({SIMULATED_EOS}),
    log_probs: bool = False,
) -> Open:
    return Open(
        identity=identity(session, base_len=len(prefix), attempt=attempt, lease_epoch=lease_epoch),
        prefix=prefix,
        prompt_len=len(prefix),
        eos_token_ids=eos_token_ids,
        sampling=sampling,
        verification=verification,
        max_new_tokens=max_new_tokens,
        log_probs=log_probs,
        num_top_log_probs=1 if log_probs else 0,
    )


def verify(session: str, base_len: int, token_ids: tuple[int, ...], *, attempt: int = 1) -> Verify:
    return Verify(identity(session, base_len=base_len, attempt=attempt), Proposal(7, token_ids))


def decode(session: str, base_len: int, num_tokens: int, *, attempt: int = 1) -> Decode:
    return Decode(identity(session, base_len=base_len, attempt=attempt), num_tokens)


def propose(session: str, base_len: int, committed: tuple[int, ...], num: int, *, attempt: int = 1) -> Propose:
    return Propose(identity(session, base_len=base_len, attempt=attempt), committed, num, 7)


def close(session: str, *, attempt: int = 1, base_len: int = 0) -> Close:
    return Close(identity(session, base_len=base_len, attempt=attempt))


def simulated_continuation(
    prefix: tuple[int, ...],
    num_tokens: int,
    sampling: SamplingParams = GREEDY,
    verification: VerificationMethod = VerificationMethod.COUPLED,
    eos_probability: float = 0.0,
) -> tuple[int, ...]:
    """What the simulated target continues a prompt with: computed from all tokens anew, ending behind <eos>."""
    sequence = Sequence.from_open(open_item(prefix=prefix, sampling=sampling, verification=verification))
    key = sampling_key(sequence, draft=False)
    tokens = list(prefix)
    while len(tokens) < len(prefix) + num_tokens and tokens[-1] != SIMULATED_EOS:
        state = INITIAL_STATE
        for token_id in tokens:
            state = extend_state(state, token_id)
        tokens.append(choose(state, key, eos_probability))
    return tuple(tokens[len(prefix) :])
