import collections
import functools
import operator

import pytest

from lightning_rlhf.dotted import dotted_name, imported


def test_a_dotted_name_is_imported():
    assert imported("operator.itemgetter", "reward") is operator.itemgetter


@pytest.mark.parametrize("name", ["no_such_module.score", "operator.no_such_name", "plain", ""])
def test_a_name_that_cannot_be_imported_is_an_error_that_quotes_it(name):
    with pytest.raises(ValueError, match=f"`optimizer='{name}'` must be a callable or the dotted name"):
        imported(name, "optimizer")


@pytest.mark.parametrize("value", [collections.OrderedDict, functools.reduce])
def test_what_has_a_dotted_name_is_had_again_by_it(value):
    assert imported(dotted_name(value), "reward") is value


@pytest.mark.parametrize("value", [lambda: None, functools.partial(print), 3, "text", pytest.Class.collect])
def test_what_cannot_be_had_again_has_none(value):
    assert dotted_name(value) is None
