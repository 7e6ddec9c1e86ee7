import pytest

from lightning_rlhf.collect.access import Access, is_local
from lightning_rlhf.collect.database import Database

TOKENS = {"ann": "ann's secret", "bob": "bob's secret"}


@pytest.fixture
def database(tmp_path):
    return Database(tmp_path / "x.sqlite")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.2", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_what_only_this_machine_reaches(host, expected):
    assert is_local(host) == expected


def test_beyond_this_machine_a_token_is_needed(database):
    with pytest.raises(ValueError, match=r"`host='0.0.0.0'` can be reached from other machines: set a `token`"):
        Access(database, "0.0.0.0", annotators=["ann"])
    Access(database, "0.0.0.0", token="long enough")
    Access(database, "0.0.0.0", annotators=TOKENS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "short"}, "`token` must have at least 8 characters"),
        ({"annotators": {"ann": ""}}, r"`annotators\['ann'\]` must have at least 8"),
        ({"annotators": TOKENS, "token": "long enough"}, "exclude each other"),
        ({"annotators": {"a": "the same one", "b": "the same one"}}, "two have the same token"),
        ({"annotators": []}, r"`annotators=\[\]` lets nobody in"),
        ({"annotators": {}}, "`annotators={}` lets nobody in"),
        ({"annotators": ["a", " "]}, "`name=''` must have 1 to 64 characters"),
    ],
)
def test_weak_or_unclear_tokens_are_refused(database, arguments, message):
    with pytest.raises(ValueError, match=message):
        Access(database, **arguments)


def test_anybody_gives_a_name_where_nothing_is_asked(database):
    access = Access(database)
    assert access.admit("  Ann \t Lee ", "") == "Ann Lee"
    for name in ("", " ", "x" * 65, "a\x00b"):
        with pytest.raises(ValueError, match="must have 1 to 64 characters"):
            access.admit(name, "")


def test_a_token_is_asked_of_everybody_or_says_who_somebody_is(database):
    shared = Access(database, token="long enough", annotators=["ann"])
    assert shared.admit("ann", "long enough") == "ann"
    for name, token in [("ann", "long"), ("ann", ""), ("eve", "long enough")]:
        with pytest.raises(PermissionError):
            shared.admit(name, token)
    own = Access(database, annotators=TOKENS)
    assert own.admit("whatever", "bob's secret") == "bob"
    with pytest.raises(PermissionError, match="not known"):
        own.admit("ann", "eve's secret")


def test_a_cookie_holds_over_a_restart_but_not_over_another_token(database):
    cookie = Access(database, token="long enough").cookie("Ann Ü")
    assert Access(database, token="long enough").name(cookie) == "Ann Ü"
    assert Access(database, token="another one").name(cookie) is None
    assert Access(database, token="long enough", annotators=["bob"]).name(cookie) is None


def test_a_cookie_of_ones_own_making_is_none(database, tmp_path):
    access = Access(database)
    cookie, other = access.cookie("ann"), access.cookie("bob")
    made_up = [
        other.split(".")[0] + "." + cookie.split(".")[1],
        cookie + "0",
        cookie.split(".")[0],
        "",
        ".",
        "ü.ü",
        "a",
    ]
    assert [access.name(one) for one in made_up] == [None] * len(made_up)
    assert Access(Database(tmp_path / "y.sqlite")).name(cookie) is None
