"""Which rules a broker starts with: the files on its host, or the version in its store; and how it goes from one to the other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from keybroker.authority.journal import Entry, Journal
from keybroker.authority.policy import loading
from keybroker.authority.policy.holder import LivePolicy
from keybroker.authority.policy.stored import StoredPolicy, can_be_widened, read_files
from keybroker.authority.store import policies
from keybroker.authority.store.policies import PolicyVersion
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.clock import Clock, to_rfc3339
from keybroker.config import AuthorityConfig
from keybroker.errors import ConfigError
from keybroker.model.record import Draft, RecordKind


@dataclass(frozen=True, slots=True)
class PolicyStart:
    """The rules to start with.

    Attributes:
        stored: the same, where they are in the store; else None.
        version: of the rules in the store; where they are files, the mark that they are no longer kept there.
        is_new: whether the version has to be written before anything is decided.
    """

    live: LivePolicy
    stored: StoredPolicy | None
    version: PolicyVersion | None
    is_new: bool

    async def record(self, journal: Journal) -> None:
        """Put a version that is new on record and in the store.

        Raises:
            AuditUnavailableError: it is not.
        """
        if not self.is_new or self.version is None:
            return
        body = {"change": "policy-changes", "to": "files", "revision": str(self.version.revision)}
        if self.stored is not None:
            digest = self.stored.engine.digest
            body = {"change": "policy", "from": "", "to": digest, "revision": str(self.version.revision)}
        await journal.write(Entry(Draft(kind=RecordKind.ADMIN, body=body), also=partial(policies.add, version=self.version)))


async def start(config: AuthorityConfig, store: SqliteStore, clock: Clock) -> PolicyStart:
    """Load the rules.

    Raises:
        ConfigError: they cannot be used.
    """
    known = store.policy_version()
    now = to_rfc3339(clock.now_us())
    if config.policy_changes == "files":
        holder = await loading.load(config)
        mark = PolicyVersion(known.revision + 1, "", {}, now) if known and known.files else None
        return PolicyStart(holder, None, mark, is_new=mark is not None)
    if known and known.files:
        stored = await StoredPolicy.load(known.files, config.policy.module, frozenset(config.keys))
        return PolicyStart(stored, stored, known, is_new=False)
    if config.grants is None:
        raise ConfigError("authority.grants is missing")
    version = PolicyVersion(known.revision + 1 if known else 1, "", read_files(config.grants), now)
    stored = await StoredPolicy.load(version.files, config.policy.module, frozenset(config.keys))
    if not can_be_widened(stored.rules):
        cure = "give at least one grant of `admin-policy` a quorum, or nobody could ever widen the rules"
        msg = f"{config.grants}: with `policy_changes: operations`, {cure}"
        raise ConfigError(msg)
    return PolicyStart(stored, stored, version, is_new=True)
