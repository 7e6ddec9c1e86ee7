"""Who may answer: names, tokens, and the cookie that remembers them."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Mapping, Sequence

from lightning_rlhf.collect.database import Database

SHORTEST_TOKEN = 8
LONGEST_NAME = 64


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Says who somebody is.

    Args:
        database: Keeps the secret with which cookies are signed, so that they hold when the server is started again.
        host: The address that is served on; beyond this machine tokens are required.
        token: What everybody has to know.
        annotators: Who may answer: names, or names with a token each, which says whose it is.
    """

    def __init__(
        self,
        database: Database,
        host: str = "127.0.0.1",
        token: str | None = None,
        annotators: Sequence[str] | Mapping[str, str] | None = None,
    ) -> None:
        if annotators is not None and not annotators:
            raise ValueError(f"`annotators={annotators!r}` lets nobody in: name somebody, or leave it out.")
        tokens = dict(annotators) if isinstance(annotators, Mapping) else {}
        if token is None and not tokens and not is_local(host):
            raise ValueError(
                f"`host={host!r}` can be reached from other machines: set a `token` that annotators have to know, or "
                "`annotators` with a token each. Or serve on 127.0.0.1, and let them come through SSH."
            )
        if token is not None and tokens:
            raise ValueError("`token` and `annotators` with tokens of their own exclude each other: give one of them.")
        for owner, value in {"token": token, **{f"annotators[{name!r}]": own for name, own in tokens.items()}}.items():
            if value is not None and len(value) < SHORTEST_TOKEN:
                raise ValueError(f"`{owner}` must have at least {SHORTEST_TOKEN} characters: it can be guessed.")
        if len(set(tokens.values())) < len(tokens):
            raise ValueError("`annotators`: two have the same token, which is to say who they are.")
        self.names = None if annotators is None else [self.checked(name) for name in annotators]
        self.token = token
        self.tokens = tokens
        secret = database.setting("secret", secrets.token_hex(32))
        # Another token voids the cookies that the old one got.
        self._key = hmac.digest(secret.encode(), repr((token, sorted(tokens.items()))).encode(), "sha256")

    @staticmethod
    def checked(name: str) -> str:
        """A name without spaces around it.

        Args:
            name: Of an annotator.

        Returns:
            The name.

        Raises:
            ValueError: If it is none.
        """
        name = " ".join(name.split())
        if not 0 < len(name) <= LONGEST_NAME or not name.isprintable():
            raise ValueError(f"`name={name!r}` must have 1 to {LONGEST_NAME} characters that can be printed.")
        return name

    def admit(self, name: str, token: str) -> str:
        """Lets somebody in.

        Args:
            name: Who they say they are; not looked at where tokens say so.
            token: What they know.

        Returns:
            Their name.

        Raises:
            PermissionError: If they may not.
            ValueError: If the name is none.
        """
        if self.tokens:
            owners = [owner for owner, own in self.tokens.items() if _same(own, token)]
            if not owners:
                raise PermissionError("This token is not known.")
            return self.checked(owners[0])
        if self.token is not None and not _same(self.token, token):
            raise PermissionError("This is not the token.")
        name = self.checked(name)
        if self.names is not None and name not in self.names:
            raise PermissionError("This name is not among the annotators.")
        return name

    def cookie(self, name: str) -> str:
        """What a browser keeps to show who uses it.

        Args:
            name: That was admitted.

        Returns:
            The name, signed.
        """
        return f"{base64.urlsafe_b64encode(name.encode()).decode()}.{self._signature(name)}"

    def name(self, cookie: str) -> str | None:
        """Whose a cookie is.

        Args:
            cookie: That a browser sent.

        Returns:
            The name; None if the cookie is none of ours, or the name's no longer.
        """
        encoded, _, signature = cookie.partition(".")
        try:
            name = base64.urlsafe_b64decode(encoded.encode()).decode()
        except ValueError:
            return None
        is_known = _same(self._signature(name), signature) and (self.names is None or name in self.names)
        return name if is_known else None

    def _signature(self, name: str) -> str:
        return hmac.new(self._key, name.encode(), hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    """Compares without telling by its time how much was right."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))
