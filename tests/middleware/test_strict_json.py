"""JSON that means one thing only; what is not tried through requests and replies elsewhere."""

from __future__ import annotations

import pytest

from guard_middleware.strict_json import Malformed, parse


def test_keys_that_differ_in_case_are_two_unless_a_backend_might_fold_them() -> None:
    """Log-probabilities by token have both in legitimate replies."""
    body = b'{"a":-1,"A":-2}'
    assert parse(body) == {"a": -1, "A": -2}
    with pytest.raises(Malformed, match="case"):
        parse(body, folded=True)


@pytest.mark.parametrize("body", [b'{"a":1,"a":2}', b'{"a":1,"\\u0061":2}', b'[{"a":{"":1,"":1}}]'])
@pytest.mark.parametrize("folded", [False, True])
def test_a_key_that_occurs_twice_is_malformed(body: bytes, folded: bool) -> None:
    with pytest.raises(Malformed, match="twice"):
        parse(body, folded=folded)
