"""Items and results survive the wire; malformed fields are refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from outrider.v1 import draft_pb2, target_pb2, worker_pb2

from services.common import wire, wire_draft, wire_target
from services.common.errors import Aborted, InvalidArgument, ResourceExhausted
from services.common.items import (
    Close,
    Decode,
    Identity,
    Open,
    Opened,
    Propose,
    Proposed,
    Refused,
    Timings,
    Tokens,
    Verify,
)
from services.common.rpc import MAX_WORKER_MESSAGE_BYTES
from services.common.values import (
    MAX_DRAFT_ROW_LEN,
    MAX_DRAFT_TOKENS,
    MAX_TOP_LOG_PROBS,
    ModelInfo,
    Proposal,
    SamplingParams,
    SparseRow,
    TopLogProbs,
    VerificationMethod,
    WorkerActivity,
    WorkerInfo,
    WorkerLoad,
)

fast = settings(deadline=None, max_examples=50)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
token_ids = st.lists(u32, max_size=20).map(tuple)
f32 = st.floats(width=32, allow_nan=False)
identities = st.builds(Identity, st.uuids().map(str), st.integers(0, 2**64 - 1), u32, u32, st.just(0))
samplings = st.builds(
    SamplingParams,
    temperature=f32,
    top_k=u32,
    top_p=f32,
    min_p=f32,
    repetition_penalty=f32,
    presence_penalty=f32,
    frequency_penalty=f32,
    logit_bias=st.dictionaries(u32, f32, max_size=4).map(lambda bias: tuple(sorted(bias.items()))),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=u32,
)
timings = st.builds(Timings, u32, u32, u32)
rows = st.builds(
    lambda pairs: SparseRow(tuple(i for i, _ in pairs), tuple(p for _, p in pairs)),
    st.lists(st.tuples(u32, f32), max_size=5),
)


features = st.binary(max_size=20)


@st.composite
def opens(draw: st.DrawFn) -> Open:
    prefix = draw(st.lists(u32, min_size=1, max_size=30).map(tuple))
    return Open(
        identity=draw(identities).at(len(prefix)),
        prefix=prefix,
        prompt_len=draw(u32),
        eos_token_ids=draw(st.frozensets(u32, max_size=3)),
        sampling=draw(samplings),
        verification=draw(st.sampled_from(VerificationMethod)),
        max_new_tokens=draw(u32),
        log_probs=draw(st.booleans()),
        num_top_log_probs=draw(u32),
        fork=draw(u32),
        cache_salt=draw(st.binary(max_size=40)),
        traceparent=draw(st.sampled_from(["", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"])),
        features=draw(st.booleans()),
    )


@st.composite
def proposals(draw: st.DrawFn) -> Proposal:
    ids = draw(token_ids)
    own = st.lists(rows, min_size=len(ids), max_size=len(ids)).map(tuple)
    return Proposal(draw(u32), ids, draw(st.none() | own))


def assembler() -> wire.OpenAssembler:
    return wire.OpenAssembler(max_prefix_len=1000, max_pending=4)


@fast
@given(
    st.lists(
        opens() | st.builds(Verify, identities, proposals(), u64) | st.builds(Decode, identities, u32, u64), max_size=5
    )
)
def test_target_items_survive_the_wire(items: list) -> None:
    data = wire_target.encode_items(items).SerializeToString()
    decoded, refused = wire_target.decode_items(target_pb2.TargetStreamRequest.FromString(data), assembler())
    assert refused == []
    assert decoded == sorted(items, key=lambda item: (Open, Verify, Decode).index(type(item)))


@fast
@given(
    st.lists(
        opens() | st.builds(Propose, identities, token_ids, u32, u32, u64, features) | st.builds(Close, identities),
        max_size=5,
    )
)
def test_draft_items_survive_the_wire(items: list) -> None:
    data = wire_draft.encode_items(items).SerializeToString()
    decoded, refused = wire_draft.decode_items(draft_pb2.DraftStreamRequest.FromString(data), assembler())
    assert refused == []
    assert decoded == sorted(items, key=lambda item: (Open, Propose, Close).index(type(item)))


@st.composite
def tokens_results(draw: st.DrawFn) -> Tokens:
    ids = draw(st.lists(u32, min_size=1, max_size=6).map(tuple))
    n, width = len(ids), draw(st.integers(1, 3))
    values = st.lists(f32, min_size=n, max_size=n).map(tuple)
    tops = st.builds(
        TopLogProbs,
        st.lists(u32, min_size=width, max_size=width).map(tuple),
        st.lists(f32, min_size=width, max_size=width).map(tuple),
    )
    return Tokens(
        identity=draw(identities),
        token_ids=ids,
        num_accepted_tokens=draw(u32),
        num_draft_tokens=draw(u32),
        done=draw(st.booleans()),
        log_probs=draw(st.just(()) | values),
        top_log_probs=draw(st.just(()) | st.lists(tops, min_size=n, max_size=n).map(tuple)),
        rows_replaced=draw(st.booleans()),
        timings=draw(timings),
        num_cached_tokens=draw(u32),
        step_ns=draw(u32),
        step_rows=draw(u32),
        features=draw(features),
    )


@fast
@given(st.lists(tokens_results(), max_size=4))
def test_target_results_survive_the_wire(results: list) -> None:
    data = wire_target.encode_results(results, WorkerLoad(1, 2, 3, 4, True)).SerializeToString()
    response = target_pb2.TargetStreamResponse.FromString(data)
    assert wire_target.decode_results(response) == results
    assert wire.load_from_proto(response.load) == WorkerLoad(1, 2, 3, 4, True)


@fast
@given(
    st.lists(
        st.builds(Proposed, identities, proposals(), timings, u32) | st.builds(Opened, identities, timings, u32),
        max_size=4,
    )
)
def test_draft_results_survive_the_wire(results: list) -> None:
    data = wire_draft.encode_results(results, WorkerLoad()).SerializeToString()
    assert wire_draft.decode_results(draft_pb2.DraftStreamResponse.FromString(data)) == results


@pytest.mark.parametrize("size", [1000, wire.MAX_FEATURE_BYTES // 3])
def test_features_of_a_message_are_bounded_and_whoever_is_last_goes_without(size: int) -> None:
    identity, rows = Identity("s", 1, 1, 0, 3), bytes(size)
    results = [Tokens(identity, (1,), 0, 0, True, features=rows) for _ in range(8)]
    response = wire_target.encode_results(results, WorkerLoad())
    kept = [bool(result.features) for result in wire_target.decode_results(response)]
    assert kept == [i < wire.MAX_FEATURE_BYTES // size for i in range(8)]
    request = wire_draft.encode_items([Propose(identity, (1,), 2, 3, features=rows) for _ in range(8)])
    items, _ = wire_draft.decode_items(request, assembler())
    assert [bool(item.features) for item in items] == kept
    assert request.ByteSize() < 4 << 20


def test_as_many_of_the_largest_items_and_results_as_a_message_takes_stay_below_the_cap() -> None:
    identity = Identity("00000000-0000-0000-0000-000000000000", 2**63, 2**31, 2**31, 2**31)
    row = SparseRow((2**31,) * MAX_DRAFT_ROW_LEN, (0.5,) * MAX_DRAFT_ROW_LEN)
    proposal = Proposal(2**31, (2**31,) * MAX_DRAFT_TOKENS, (row,) * MAX_DRAFT_TOKENS)
    top = TopLogProbs((2**31,) * MAX_TOP_LOG_PROBS, (0.5,) * MAX_TOP_LOG_PROBS)
    features, num_rows = bytes(2 * 8192), MAX_DRAFT_TOKENS + 1
    tokens = Tokens(
        identity,
        (2**31,) * num_rows,
        MAX_DRAFT_TOKENS,
        MAX_DRAFT_TOKENS,
        True,
        (0.5,) * num_rows,
        (top,) * num_rows,
        timings=Timings(2**60, 2**60, 2**60),
        features=features,
    )
    num, load = wire.MAX_ITEMS_A_MESSAGE, WorkerLoad()
    for message in (
        wire_target.encode_items([Verify(identity, proposal)] * num),
        wire_target.encode_results([tokens] * num, load),
        wire_draft.encode_results([Proposed(identity, proposal, Timings(2**60, 2**60, 2**60))] * num, load),
        wire_draft.encode_items([Propose(identity, (1,) * num_rows, 16, 2**31, features=features)] * num),
    ):
        assert message.ByteSize() < MAX_WORKER_MESSAGE_BYTES


def test_a_refusal_keeps_its_code_reason_and_retry_hint() -> None:
    identity = Identity("s", 1, 2, 3, 4)
    refusals = [
        Refused(identity, Aborted("STALE", "older than attempt 3")),
        Refused(identity, ResourceExhausted("KV_POOL_FULL", "full", retry_after_ms=50)),
    ]
    decoded = wire_target.decode_results(wire_target.encode_results(refusals, WorkerLoad()))
    assert [(type(r.error), r.error.reason, r.error.message, r.error.retry_after_ms) for r in decoded] == [
        (Aborted, "STALE", "older than attempt 3", None),
        (ResourceExhausted, "KV_POOL_FULL", "full", 50),
    ]


def test_a_long_prefix_travels_in_pieces_of_at_most_64_kb() -> None:
    prefix = tuple(range(40_000))
    item = Open(Identity("s", 1, 1, 0, 40_000), prefix, 5, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 1)
    pieces = wire.open_to_proto(item)
    assert [len(p.prefix_piece) for p in pieces] == [65_536, 65_536, 28_928]
    opens_ = wire.OpenAssembler(max_prefix_len=40_000, max_pending=1)
    assert [opens_.add(p) for p in pieces] == [None, None, item]


def test_an_oversized_prefix_is_refused_and_the_rest_of_the_message_served() -> None:
    item = Open(
        Identity("s", 1, 1, 0, 1001), (1,) * 1001, 1, frozenset(), SamplingParams(), VerificationMethod.COUPLED, 1
    )
    request = wire_target.encode_items([item, Decode(Identity("t", 1, 1, 0, 5), 3)])
    items, refused = wire_target.decode_items(request, assembler())
    assert items == [Decode(Identity("t", 1, 1, 0, 5), 3)]
    assert [(r.error.reason, r.error.field) for r in refused] == [("PROMPT_TOO_LONG", "prefix_piece")]
    assert "1000" in refused[0].error.message


def test_unfinished_opens_are_bounded() -> None:
    opens_ = assembler()
    for i in range(4):
        assert opens_.add(worker_pb2.OpenItem(identity=worker_pb2.ItemIdentity(session_id=str(i)))) is None
    with pytest.raises(InvalidArgument, match="unfinished"):
        opens_.add(worker_pb2.OpenItem(identity=worker_pb2.ItemIdentity(session_id="5")))


@pytest.mark.parametrize("length", [1, 2, 3, 5])
def test_token_bytes_of_odd_length_are_refused_by_name(length: int) -> None:
    request = target_pb2.TargetStreamRequest()
    request.verifies.add().proposal.token_ids = b"x" * length
    items, refused = wire_target.decode_items(request, assembler())
    assert items == []
    assert refused[0].error.field == "proposal.token_ids"


@pytest.mark.parametrize(
    "broken",
    [
        worker_pb2.SparseRows(row_lens=[1], token_ids=b"\0" * 4, probs=b"\0" * 4),
        worker_pb2.SparseRows(row_lens=[1, 2], token_ids=b"\0" * 4, probs=b"\0" * 12),
        worker_pb2.SparseRows(row_lens=[2**31, 2**31], token_ids=b"", probs=b""),
        worker_pb2.SparseRows(row_lens=[0, 1], token_ids=b"\0" * 5, probs=b"\0" * 5),
    ],
)
def test_rows_that_do_not_fit_become_empty_rows(broken: worker_pb2.SparseRows) -> None:
    assert wire.proposal_rows_from_proto(broken, 2) == (SparseRow((), ()), SparseRow((), ()))


def test_unset_sampling_fields_mean_no_processing() -> None:
    assert wire.sampling_from_proto(wire.sampling_to_proto(SamplingParams())) == SamplingParams()
    from outrider.v1 import sampling_pb2

    assert wire.sampling_from_proto(sampling_pb2.SamplingParams()) == SamplingParams()
    assert wire.sampling_from_proto(sampling_pb2.SamplingParams(temperature=0.0)).greedy


def test_worker_info_survives_the_wire() -> None:
    info = WorkerInfo(
        "id", "target", ModelInfo("m", "d", "v", 257, "float32", "cpu"), "", 16, 8, 4096, WorkerLoad(1), 1, 1, 2.5
    )
    info = replace(info, activity=WorkerActivity(*range(1, 13)))
    assert wire.info_from_proto(wire.info_to_proto(info)) == info
    bare = WorkerInfo("id", "draft", None, "ngram", 16, 8, 4096, wants_features=True)
    assert wire.info_from_proto(wire.info_to_proto(bare)) == bare


@fast
@given(st.lists(st.floats(width=32), max_size=10))
def test_floats_travel_bit_for_bit(values: list[float]) -> None:
    back = wire.unpack_floats(wire.pack_floats(values), "x")
    assert len(back) == len(values)
    for a, b in zip(values, back, strict=True):
        assert a == b or (math.isnan(a) and math.isnan(b))
    assert np.asarray(back, "<f4").tobytes() == wire.pack_floats(values)
