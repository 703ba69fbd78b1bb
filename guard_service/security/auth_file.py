"""The auth file: YAML to tenants and credentials; every mistake at once, with its line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time
from pathlib import Path

from yaml.nodes import MappingNode, Node, SequenceNode

from guard_policies.loader import read_bytes
from guard_policies.positions import Entry, PolicyError, Reader
from guard_policies.syntax import NAME
from guard_service.security.jwts import ALGORITHMS, Issuer
from guard_service.security.keys import Key, KeysError, read_keys
from guard_service.security.tenants import INF, Bounds, Tenant
from guard_service.security.tokens import DIGEST, Token

TOP = ("tenants", "jwt", "metrics")
TENANT = ("policies", "default_policy", "limits", "tokens", "certificates")
TOKEN = ("digest", "name", "expires")
KINDS = ("dns", "uri", "email", "cn")  # of names in a certificate
JWT = ("issuer", "audience", "algorithms", "keys", "leeway_s", "max_lifetime_s", "once")
WHOSE = ("tenant", "tenant_claim", "subjects")
LIMITS: Mapping[str, tuple[float, float]] = {
    "verdicts_per_s": (0.001, 1e6),
    "burst": (1, 1e6),
    "characters_per_minute": (1, 1e12),
    "images_per_minute": (1, 1e9),
    "calls": (1, 1e6),
    "streams": (0, 1e6),
    "batch_items": (1, 1e5),
}
DEFAULT_ALGORITHMS = ("RS256", "ES256", "EdDSA")
MOST_TEXT = 2_000
MOST_LEEWAY_S = 300.0
MOST_LIFETIME_S = 366 * 86_400.0
NOBODY = ""  # the tenant of tokens for the metrics


@dataclass(frozen=True, slots=True)
class AuthFile:
    """What the file says. `certificates` has tenants by kind and name: ("dns", "a.example")."""

    tenants: tuple[Tenant, ...]
    tokens: tuple[Token, ...]
    certificates: Mapping[tuple[str, str], str]
    issuers: tuple[Issuer, ...]
    metrics: tuple[Token, ...]  # of who may read /metrics; empty: anyone
    files: tuple[Path, ...]  # of keys, which belong to it


def read_auth_file(path: Path, default_policy: str) -> AuthFile:
    """Read it, and the files of keys that it names. Raises PolicyError with every mistake.

    `default_policy` is the service's. Messages never quote what may be a secret.
    """
    reader = Reader(str(path))
    return _Reading(reader, path.parent, default_policy).whole(reader.compose(read_bytes(path)))


class _Reading:
    """One pass through the file; what is wrong goes to the reader."""

    def __init__(self, reader: Reader, folder: Path, default_policy: str) -> None:
        self.reader, self._folder, self._default_policy = reader, folder, default_policy
        self._tokens: dict[str, Token] = {}
        self._certificates: dict[tuple[str, str], str] = {}
        self._files: list[Path] = []

    def whole(self, root: MappingNode) -> AuthFile:
        reader = self.reader
        entries = reader.table(root, "an auth file", TOP)
        tenants: tuple[Tenant, ...] = ()
        if (named := entries.get("tenants")) is None:
            reader.report(root, "'tenants' is missing")
        else:
            tenants = tuple(self._tenants(named.value))
        names = {one.name for one in tenants}
        issuers = tuple(self._issuers(entries.get("jwt"), names))
        metrics = tuple(self._metrics(entries.get("metrics")))
        if not (self._tokens or self._certificates or issuers):
            reader.report(root, "nobody could call: no tenant has tokens or certificates, no 'jwt'")
        reader.check()
        known = tuple(one for one in self._tokens.values() if one.tenant != NOBODY)
        files = tuple(dict.fromkeys(self._files))
        return AuthFile(tenants, known, self._certificates, issuers, metrics, files)

    def _tenants(self, node: Node) -> Iterator[Tenant]:
        reader = self.reader
        for name, entry in reader.table(node, "'tenants'", None).items():
            if not NAME.fullmatch(name):
                reader.report(entry.key, "a tenant's name has a-z, 0-9, '.', '_', '-'; 64 at most")
                continue
            found = reader.table(entry.value, f"tenant {name}", TENANT)
            policies = self._policies(found.get("policies"))
            self._listed(found.get("tokens"), name)
            for one in self._items(found.get("certificates"), "'certificates'"):
                self._certificate(one, name)
            default = self._default(entry, found.get("default_policy"), policies)
            yield Tenant(name, policies, default, self._bounds(found.get("limits")))

    def _policies(self, entry: Entry | None) -> frozenset[str] | None:
        if entry is None:
            return None
        found = {
            self.reader.text(one, "a policy's name", 64) for one in self._items(entry, "'policies'")
        }
        if not found:
            self.reader.report(entry.value, "'policies' is empty; leave it out to allow all")
        return frozenset(filter(None, found))

    def _default(self, tenant: Entry, entry: Entry | None, policies: Collection[str] | None) -> str:
        reader, name = self.reader, self._default_policy
        if entry is not None:
            name = reader.text(entry.value, "'default_policy'", 64) or ""
        if policies is not None and name and name not in policies:
            said = "'default_policy'" if entry else "'default_policy' is missing: the service's"
            where = entry.value if entry else tenant.key
            reader.report(where, f"{said} ({name!r}) is not among the tenant's 'policies'")
        return name if entry is not None else ""

    def _bounds(self, entry: Entry | None) -> Bounds:
        if entry is None:
            return Bounds()
        reader, found = self.reader, {}
        for name, one in reader.table(entry.value, "'limits'", LIMITS).items():
            low, high = LIMITS[name]
            number = reader.number(one.value, f"{name!r}", low, high)
            found[name] = INF if number is None else number
        if "burst" in found and "verdicts_per_s" not in found:
            reader.report(entry.value, "'burst' needs 'verdicts_per_s'")
        found.setdefault("burst", max(found.get("verdicts_per_s", INF), 1.0))
        return Bounds(**found)

    def _listed(self, entry: Entry | None, tenant: str) -> list[Token]:
        if entry is None:
            return []
        if not isinstance(entry.value, SequenceNode):  # perhaps a token: not quoted
            self.reader.report(entry.value, "'tokens' must be a list")
            return []
        return list(filter(None, (self._token(one, tenant) for one in entry.value.value)))

    def _token(self, node: Node, tenant: str) -> Token | None:
        reader = self.reader
        entries, digest = {}, ""
        if isinstance(node, MappingNode):
            entries = reader.table(node, "a token", TOKEN)
        if "digest" in entries:
            digest = reader.text(entries["digest"].value, "'digest'", MOST_TEXT) or ""
        if not DIGEST.fullmatch(digest):  # what stands there instead may be the token: not quoted
            reader.report(
                node, "'digest' must be sha256: and 64 hex digits; guardctl token makes one"
            )
            return None
        if digest in self._tokens:
            reader.report(node, "this token's digest is in the file twice")
            return None
        name, expires = "", None
        if (one := entries.get("name")) is not None:
            name = reader.text(one.value, "'name'", 64) or ""
        if (one := entries.get("expires")) is not None:
            expires = self._moment(one.value)
        self._tokens[digest] = Token(digest, tenant, name, expires)
        return self._tokens[digest]

    def _moment(self, node: Node) -> datetime | None:
        said = self.reader.text(node, "'expires'", 64) or ""
        try:
            moment = datetime.fromisoformat(said)
        except ValueError:
            self.reader.report(node, "'expires' must be like 2027-01-31 or 2027-01-31T12:00:00Z")
            return None
        if re.fullmatch(r"[0-9-]+", said):  # a day counts to its end
            moment = datetime.combine(moment.date(), time.max)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    def _certificate(self, node: Node, tenant: str) -> None:
        reader = self.reader
        entries = reader.table(node, "a certificate", KINDS)
        if len(entries) != 1:
            reader.report(node, f"a certificate is told by one of {', '.join(KINDS)}")
            return
        ((kind, entry),) = entries.items()
        name = reader.text(entry.value, f"{kind!r}", MOST_TEXT)
        if name is None:
            return
        key = (kind, name.lower() if kind == "dns" else name)
        if (other := self._certificates.get(key)) is not None:
            reader.report(entry.value, f"this certificate is tenant {other}'s already")
        self._certificates[key] = tenant

    def _issuers(self, entry: Entry | None, tenants: Collection[str]) -> Iterator[Issuer]:
        names: set[str] = set()
        for node in self._items(entry, "'jwt'"):
            found = self._issuer(node, tenants)
            if found is not None and found.issuer in names:
                self.reader.report(node, "this issuer is in the file twice")
            elif found is not None:
                names.add(found.issuer)
                yield found

    def _issuer(self, node: Node, tenants: Collection[str]) -> Issuer | None:
        reader = self.reader
        entries = reader.table(node, "an issuer", (*JWT, *WHOSE))
        for key in ("issuer", "audience", "keys"):
            if key not in entries:
                reader.report(node, f"{key!r} is missing")
        if sum(key in entries for key in WHOSE) != 1:
            reader.report(node, f"needs exactly one of {', '.join(WHOSE)}")
        texts = {key: self._text(entries.get(key)) for key in ("issuer", "keys", *WHOSE[:2])}
        audiences = self._texts(entries.get("audience"))
        algorithms: tuple[str, ...] = DEFAULT_ALGORITHMS
        if (one := entries.get("algorithms")) is not None:
            items = self._items(one, "'algorithms'")
            words = [reader.word(item, "an algorithm", ALGORITHMS) for item in items]
            algorithms = tuple(filter(None, words))
        subjects = {}
        if (one := entries.get("subjects")) is not None:
            for subject, to in reader.table(one.value, "'subjects'", None).items():
                subjects[subject] = self._known(to, tenants)
        if texts["tenant"]:
            self._known(entries["tenant"], tenants)
        keys = self._keys(entries["keys"].value, texts["keys"]) if texts["keys"] else ()
        once = entries.get("once")
        return Issuer(
            texts["issuer"],
            audiences,
            algorithms,
            keys,
            self._seconds(entries.get("leeway_s"), 30.0, 0.0, MOST_LEEWAY_S),
            self._seconds(entries.get("max_lifetime_s"), 86_400.0, 1.0, MOST_LIFETIME_S),
            bool(once and reader.flag(once.value, "'once'")),
            texts["tenant"],
            texts["tenant_claim"],
            subjects,
        )

    def _keys(self, node: Node, name: str) -> tuple[Key, ...]:
        path = self._folder / name
        self._files.append(path)
        try:
            return read_keys(read_bytes(path))
        except PolicyError as error:
            self.reader.report(node, f"'keys': {error.problems[0]}")
        except KeysError as error:
            self.reader.report(node, f"'keys': {path} {error}")
        return ()

    def _known(self, entry: Entry, tenants: Collection[str]) -> str:
        name = self.reader.text(entry.value, "a tenant", 64) or ""
        if name and name not in tenants:
            self.reader.report(entry.value, f"there is no tenant {name!r}")
        return name

    def _metrics(self, entry: Entry | None) -> Iterator[Token]:
        if entry is None:
            return
        found = self.reader.table(entry.value, "'metrics'", ("tokens",)).get("tokens")
        if found is None:
            self.reader.report(entry.value, "'metrics' needs 'tokens'")
        yield from self._listed(found, NOBODY)

    def _items(self, entry: Entry | None, what: str) -> Iterator[Node]:
        return self.reader.items(entry.value, what) if entry is not None else iter(())

    def _text(self, entry: Entry | None) -> str:
        if entry is None:
            return ""
        return self.reader.text(entry.value, f"{entry.key.value!r}", MOST_TEXT) or ""

    def _texts(self, entry: Entry | None) -> tuple[str, ...]:
        """One text, or a list of them."""
        if entry is None:
            return ()
        if not isinstance(entry.value, SequenceNode):
            return (self._text(entry),)
        items = self.reader.items(entry.value, f"{entry.key.value!r}")
        return tuple(filter(None, (self.reader.text(one, "a name", MOST_TEXT) for one in items)))

    def _seconds(self, entry: Entry | None, default: float, low: float, high: float) -> float:
        if entry is None:
            return default
        found = self.reader.number(entry.value, f"{entry.key.value!r}", low, high)
        return default if found is None else found
