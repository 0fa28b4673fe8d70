"""A misspelt or mistyped notebook parameter is an error."""

import pytest

from analysis import params

DECLARED = dict(model="tiny-llava", limit=None, keep=[1.0], share=0.5, smoke=False, count=3)


@pytest.mark.parametrize("injected", [{}, dict(model="x", limit=4, keep=0.5, share=1, smoke=True, count=1)])
def test_good_values_pass(injected):
    params.check(DECLARED | injected | {"_i1": "source", "In": [], "DECLARED": DECLARED}, DECLARED)


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        (dict(modle="x"), "unknown parameter 'modle'; did you mean 'model'?.*limit, keep"),
        (dict(model=3), "'model' takes str, as in 'tiny-llava'; got int 3"),
        (dict(smoke=1), "'smoke' takes bool"),
        (dict(share="half"), "'share' takes float"),
        (dict(count=True), "'count' takes int"),
    ],
)
def test_bad_values_say_what_is_right(injected, message):
    with pytest.raises(ValueError, match=message):
        params.check(DECLARED | injected, DECLARED)


def test_declare_sees_only_what_the_cell_defined():
    assert params.declare({"pytest": pytest, "check": params.check, "_i": "", "In": [], "a": 1, "b": None}) == {
        "a": 1,
        "b": None,
    }
