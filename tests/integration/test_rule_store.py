"""The port ``RuleStore`` on real stores."""

import pytest

from agent360.mesh.metrics.ports import Document, RuleStore, Stores


@pytest.fixture
def rules(stores: Stores) -> RuleStore:
    return stores.rules


def document(name: str, body: bytes = b"1", tenant: str = "acme", kind: str = "rule") -> Document:
    return Document(tenant, kind, name, body)


async def test_documents_are_found_by_kind_and_tenant_in_order(rules: RuleStore) -> None:
    kept = [document(name, tenant=tenant) for tenant in ("acme", "globex") for name in "ab"]
    await rules.put([*reversed(kept), document("a", kind="silence")])
    assert await rules.documents("rule") == kept
    assert await rules.documents("rule", "globex") == kept[2:]
    assert await rules.documents("silence", "acme") == [document("a", kind="silence")]
    assert await rules.documents("alert") == await rules.documents("rule", "initech") == []


async def test_what_is_put_again_is_replaced_and_what_is_gone_is_removed(
    rules: RuleStore,
) -> None:
    await rules.put([document("a"), document("b"), document("a", tenant="globex")])
    await rules.put([document("a", b"2"), document("c")], [document("b")])
    assert await rules.documents("rule", "acme") == [document("a", b"2"), document("c")]
    assert await rules.documents("rule", "globex") == [document("a", tenant="globex")]
    await rules.put([document("b", b"3")])
    assert document("b", b"3") in await rules.documents("rule")


async def test_a_lease_is_kept_given_back_and_had_again(rules: RuleStore) -> None:
    assert await rules.lease("alerts", 1_000.0, 30.0)
    assert await rules.lease("alerts", 1_010.0, 30.0)
    await rules.lease("alerts", 1_020.0, 0.0)
    assert await rules.lease("alerts", 1_021.0, 30.0)
    assert await rules.lease("other", 1_021.0, 30.0)
