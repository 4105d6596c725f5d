"""Tenants by their bearer tokens."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from flows.serving.requests import RequestError


def read_tokens(path: Path) -> dict[bytes, str]:
    """Return tenants by the hash of their token; each line of the file is `tenant:token`, # begins a comment."""
    found: dict[bytes, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            tenant, _, token = line.strip().partition(":")
            if not tenant or not token:
                raise ValueError(f"{path}: a line is not tenant:token")
            if _hash(token) in found:
                raise ValueError(
                    f"{path}: tenants {found[_hash(token)]} and {tenant} have one token; give each its own"
                )
            found[_hash(token)] = tenant
    if not found:
        raise ValueError(f"{path} has no tokens; write lines of tenant:token")
    return found


def tenant_of(authorization: str, tokens: Mapping[bytes, str]) -> str:
    """Return the tenant of an Authorization header; raise RequestError with status 401."""
    scheme, _, token = authorization.partition(" ")
    found = tokens.get(_hash(token.strip())) if scheme.lower() == "bearer" else None
    if found is None:
        raise RequestError(401, "invalid_api_key", "give a valid token: Authorization: Bearer TOKEN")
    return found


def _hash(token: str) -> bytes:
    # A lookup by hash takes no longer for a token that is nearly right.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
