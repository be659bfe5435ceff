"""Cache salts: one for each owner and each salt of its requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.common.session_record import ANONYMOUS
from services.coordinator.plan import cache_salt

OWNERS = st.just(ANONYMOUS) | st.text(max_size=8)
REQUEST_SALTS = st.text(max_size=8)


@given(OWNERS, REQUEST_SALTS, OWNERS, REQUEST_SALTS)
def test_two_requests_share_a_salt_where_owner_and_request_salt_are_equal(
    owner: str, salt: str, other_owner: str, other_salt: str
) -> None:
    shared = cache_salt(owner, salt) == cache_salt(other_owner, other_salt)
    assert shared == ((owner, salt) == (other_owner, other_salt))


def test_whoever_names_no_salt_and_no_owner_shares_with_all_who_do_neither() -> None:
    assert cache_salt(ANONYMOUS) == b""
