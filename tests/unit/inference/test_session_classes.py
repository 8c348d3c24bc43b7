"""A session moves up, never down, and is forgotten in time."""

from hypothesis import given
from hypothesis import strategies as st

from agent360.mesh.inference.sessions import Sessions
from agent360.mesh.inference.settings import SessionSettings

steps = st.lists(
    st.tuples(
        st.sampled_from(["acme", "globex"]),
        st.sampled_from(["1", "2", "3"]),
        st.sampled_from(["simple", "complex"]),
    ),
    max_size=60,
)


@given(steps)
def test_a_session_never_moves_down(taken):
    sessions = Sessions(SessionSettings(), lambda: 0.0)
    been_complex = set()
    for tenant, session, task_class in taken:
        if task_class == "complex":
            been_complex.add((tenant, session))
        expected = "complex" if (tenant, session) in been_complex else "simple"
        assert sessions.highest(tenant, session, task_class) == expected


def test_a_silent_session_is_forgotten_and_a_busy_one_is_not():
    now = [0.0]
    sessions = Sessions(SessionSettings(ttl_s=10), lambda: now[0])
    sessions.highest("acme", "1", "complex")
    now[0] = 9.0
    assert sessions.highest("acme", "1", "simple") == "complex"
    now[0] = 18.0
    assert sessions.highest("acme", "1", "simple") == "complex"
    now[0] = 28.0
    assert sessions.highest("acme", "1", "simple") == "simple"


def test_many_sessions_of_one_tenant_displace_their_own_and_nobody_elses():
    sessions = Sessions(SessionSettings(max_per_tenant=3), lambda: 0.0)
    sessions.highest("globex", "theirs", "complex")
    for number in range(10):
        sessions.highest("acme", str(number), "complex")
    assert sessions.highest("globex", "theirs", "simple") == "complex"
    kept = [n for n in range(10) if sessions.highest("acme", str(n), "simple") == "complex"]
    assert kept == [7, 8, 9]


def test_the_number_of_tenants_is_bounded():
    sessions = Sessions(SessionSettings(max_tenants=2), lambda: 0.0)
    for tenant in ("a", "b", "c"):
        sessions.highest(tenant, "s", "complex")
    kept = [t for t in ("a", "b", "c") if sessions.highest(t, "s", "simple") == "complex"]
    assert kept == ["b", "c"]


def test_what_was_silent_longest_is_displaced_first():
    sessions = Sessions(SessionSettings(max_per_tenant=2, max_tenants=2), lambda: 0.0)
    for session in ("1", "2", "1", "3"):
        sessions.highest("acme", session, "complex")
    assert sessions.highest("acme", "1", "simple") == "complex"
    assert sessions.highest("acme", "2", "simple") == "simple"
    for tenant in ("globex", "acme", "umbrella"):
        sessions.highest(tenant, "1", "complex")
    assert sessions.highest("acme", "1", "simple") == "complex"
    assert sessions.highest("globex", "1", "simple") == "simple"
