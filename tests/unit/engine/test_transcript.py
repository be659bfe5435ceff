"""Own ids that grow by commits, against encoding the whole text at once; proposals by text, against their bytes."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.transcript import Transcript, continuation, rewrite
from services.engine.vocabulary_pair import VocabularyPair, match_vocabularies
from tests import vocabularies
from tests.vocabularies import vocabulary

MARKERS = ("<|im_start|>", "<|im_end|>")
GPT2 = vocabulary(vocabularies.byte_level("code", 330), bos="<eos>")
OPT = vocabulary(vocabularies.with_markers(vocabularies.byte_level("sea", 300, ["</s>"]), *MARKERS), "</s>", "</s>")
LLAMA = vocabulary(vocabularies.byte_fallback("sea"), "<s>", "</s>")
METASPACE = vocabulary(vocabularies.metaspace("code"), "<s>", "</s>")
MARKED = vocabulary(vocabularies.with_markers(vocabularies.byte_level("code", 290), "<|im_end|>"))
PAIRS = {
    "gpt2 for opt": match_vocabularies(GPT2, OPT),
    "llama for opt": match_vocabularies(LLAMA, OPT),
    "opt for llama": match_vocabularies(OPT, LLAMA),
    "metaspace for opt": match_vocabularies(METASPACE, OPT),
    "marked for opt": match_vocabularies(MARKED, OPT),
}
TEXTS = st.lists(
    st.sampled_from(
        ["the sea ", "add(a, b)\n", " sing", "über", " €", "🙂", "日本語", " ", "  ", "\n", "land12", "<eos>"]
    ),
    max_size=30,
).map("".join)


def encoded_at_once(pair: VocabularyPair, target_ids: list[int]) -> list[int]:
    """The slow way: all text between special tokens, encoded as a whole."""
    ids, data, has_text = list(pair.draft.prefix_ids), b"", False

    def flush() -> list[int]:
        nonlocal data
        text, data = data.decode(errors="replace"), b""
        return pair.draft.encode(text)

    for position, token_id in enumerate(target_ids):
        if token_id not in pair.target.special:
            strips = pair.target.strips_space and not has_text
            data += pair.target.bytes_of[token_id].removeprefix(b" " if strips else b"")
            has_text = True
        elif token_id in pair.draft_id_of:
            is_told = not position and token_id in pair.target.roles.bos and pair.draft_id_of[token_id] in ids
            ids += [*flush(), *([] if is_told else [pair.draft_id_of[token_id]])]
        elif position or token_id not in pair.target.roles.bos:
            data += pair.target.special[token_id].encode()
            has_text = True
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data)
    return ids + pair.draft.encode(text) + pair.draft.match(decoder.getstate()[0])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(PAIRS)), st.integers(0, 3), TEXTS, st.lists(st.integers(1, 40)), st.data())
def test_own_ids_that_grow_are_those_of_the_whole_text(name, num_sentences, text, sizes, data) -> None:
    pair = PAIRS[name]
    ids = pair.target.encode("the sailors add(land) to the sea, 12 € naïve " * num_sentences + text)
    for token_id in data.draw(st.lists(st.sampled_from(sorted(pair.target.special)), max_size=3)):
        ids.insert(data.draw(st.integers(0, len(ids))), token_id)
    transcript, own, start, num_stable = Transcript(pair), [], 0, 0
    for size in [*sizes, len(ids)]:
        change = transcript.extend(ids[start : start + size])
        start += size
        assert change.start == num_stable
        own[change.start :] = change.token_ids
        num_stable = transcript.num_stable
        assert own == encoded_at_once(pair, ids[:start])


def test_only_the_tail_of_a_long_text_is_encoded_anew() -> None:
    pair = PAIRS["gpt2 for opt"]
    transcript = Transcript(pair)
    transcript.extend(OPT.encode("the sea and the sailors sing " * 50))
    change = transcript.extend(OPT.encode("land"))
    assert change.start == transcript.num_stable > 400
    assert len(change.token_ids) < 80


def test_unfinished_characters_are_held_back_where_the_draft_has_no_bytes() -> None:
    letters = vocabulary(vocabularies.characters(["?", "a", "€"]))
    pair = match_vocabularies(letters, OPT)
    transcript = Transcript(pair)
    first, *rest = OPT.match("€".encode())
    assert rest
    assert transcript.extend([*OPT.encode("a"), first]).token_ids == [1]
    assert not transcript.can_continue
    assert transcript.extend(rest).token_ids == [1, 2]
    assert transcript.can_continue


def test_a_template_marker_that_the_draft_lacks_becomes_text() -> None:
    start, end = (OPT._tokenizer.token_to_id(marker) for marker in MARKERS)
    ids = [0, start, *OPT.encode("sing"), end]
    assert rewrite(PAIRS["gpt2 for opt"], ids) == [0, *GPT2.encode("<|im_start|>sing<|im_end|>")]
    own_end = MARKED._tokenizer.token_to_id("<|im_end|>")
    assert rewrite(PAIRS["marked for opt"], ids) == [0, *MARKED.encode("<|im_start|>sing"), own_end]
    assert rewrite(PAIRS["llama for opt"], ids)[:1] == [1], "a begin of sequence is not told twice"


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(PAIRS)), TEXTS, TEXTS, st.integers(0, 3), st.integers(0, 3))
def test_proposals_by_text_are_the_bytes_that_were_drafted(name, context, drafted, num_unfinished, num_cut) -> None:
    target = PAIRS[name].target
    data = ("€" + drafted).encode()
    unfinished, data = data[: num_unfinished % 3], data[num_unfinished % 3 :]
    data = data[: len(data) - num_cut]
    context = context[-32:]
    ids = continuation(target, context, unfinished, data)
    proposed = b"".join(target.bytes_of.get(i, target.special.get(i, "").encode()) for i in ids)
    whole = (unfinished + data).decode(errors="ignore").encode()
    assert proposed == whole[len(unfinished) :]


@pytest.mark.parametrize("drafted", ["er the sea", " the sailors"])
def test_proposals_by_text_end_up_in_the_targets_own_encoding(drafted: str) -> None:
    committed = OPT.encode("The ships sail ov") if drafted.startswith("er") else OPT.encode("The ships sail")
    context = OPT._tokenizer.decode(committed)
    ids = continuation(OPT, context, b"", drafted.encode())
    assert ids[-len(OPT.encode(drafted.removeprefix("er"))) :] == OPT.encode(drafted.removeprefix("er"))


def test_nothing_is_proposed_before_a_character_is_whole() -> None:
    first, second, third = "€".encode()
    assert continuation(OPT, "a", b"", bytes([first, second])) == []
    assert OPT.bytes_of[continuation(OPT, "a", bytes([first]), bytes([second, third]))[0]][0] == second
