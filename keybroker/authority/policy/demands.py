"""What a grant demands beyond a yes, checked: moments, hours, limits, quorums. Everything here is a fault with its place, or nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable

import msgspec

from keybroker.authority.hours import zone_of
from keybroker.authority.policy.grants import CLOCK, DATE, DAYS_FORM, DURATION, MOMENT, Grant, Hours, LimitRule, Quorum, Rules, seconds_of
from keybroker.model.decision import MAX_UNITS, MAX_WINDOW_S
from keybroker.yaml_document import Step

Place = tuple[Step, ...]
Fault = Callable[[Place, str], None]

_DURATION_FORM = "a number and s, m, h or d, such as 90s or 24h"


def check(grant: Grant, fault: Fault, *, signs: bool, asks_others: bool) -> None:
    """What can be judged without the other files.

    Args:
        fault: takes a place in the grant and what is wrong there.
        signs: whether the grant has an operation that uses a key.
        asks_others: whether it has one that uses none, and that others may have to approve.
    """
    _check_moments(grant, fault)
    for index, hours in enumerate(grant.hours):
        _check_hours(hours, ("hours", index), fault)
    _check_limits(grant.limits, fault)
    if isinstance(grant.quorum, Quorum):
        _check_quorum(grant.quorum, fault)
    for name in ("hours", "limits", "quorum"):
        if getattr(grant, name) and not (signs or (asks_others and name == "quorum")):
            fault((name,), "no operation of this rule signs; `not_before` and `not_after` bind every operation")
    if grant.observe_only and not (grant.not_before or grant.not_after or grant.hours or grant.limits or grant.quorum):
        fault(("observe_only",), "there is nothing to observe: the grant has no hours, limits, quorum, `not_before` or `not_after`")


def check_people(grant: Grant, rules: Rules, fault: Fault) -> None:
    """What can be judged only when people and groups are known."""
    if not isinstance(grant.quorum, Quorum):
        return
    for index, stage in enumerate(grant.quorum.in_stages()):
        place: Place = ("quorum", "stages", index) if grant.quorum.stages else ("quorum",)
        unknown = [(number, name) for number, name in enumerate(stage.of) if name not in rules.groups]
        for number, name in unknown:
            fault((*place, "of", number), f"no group is named {name!r}; define it under `groups`")
        people = rules.people_of(stage.of)
        if not unknown and stage.approvals > len(people):
            fault((*place, "approvals"), f"{stage.approvals} of {len(people)} people can never be reached: {', '.join(people)}")


def _check_moments(grant: Grant, fault: Fault) -> None:
    moments = [(name, getattr(grant, name)) for name in ("not_before", "not_after")]
    wrong = [name for name, text in moments if text is not msgspec.UNSET and not _is_moment(text)]
    for name in wrong:
        fault((name,), "must be a moment in UTC, such as 2027-06-30T00:00:00Z")
    if not wrong and grant.not_before and grant.not_after and grant.not_before >= grant.not_after:
        fault(("not_after",), "must be later than `not_before`; as it is, the grant never holds")


def _is_moment(text: str) -> bool:
    if not MOMENT.fullmatch(text):
        return False
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _check_hours(hours: Hours, place: Place, fault: Fault) -> None:
    if not DAYS_FORM.fullmatch(hours.days):
        fault((*place, "days"), "must be days such as mon-fri, or mon,wed,sat-sun")
    for name, text in (("from", hours.opens), ("to", hours.closes)):
        if not CLOCK.fullmatch(text) or (name == "from" and text == "24:00"):
            fault((*place, name), 'must be a time of day in quotes, such as "08:00"')
    if hours.opens == hours.closes:
        fault((*place, "to"), 'must differ from `from`; a whole day is from "00:00" to "24:00"')
    try:
        zone_of(hours.zone)
    except ValueError as err:
        fault((*place, "zone"), str(err))
    for index, text in enumerate(hours.excluded):
        if not DATE.fullmatch(text) or not _is_moment(f"{text}T00:00:00Z"):
            fault((*place, "except", index), "must be a date such as 2026-12-25")
        elif text in hours.excluded[:index]:
            fault((*place, "except", index), f"{text} is named twice")


def _check_limits(limits: tuple[LimitRule, ...], fault: Fault) -> None:
    seen: set[tuple[int, str]] = set()
    for index, limit in enumerate(limits):
        place: Place = ("limits", index)
        if not 1 <= limit.max <= MAX_UNITS:
            fault((*place, "max"), f"must be from 1 to {MAX_UNITS}; to allow nothing, leave the grant out")
        window = _check_duration(limit.window, (*place, "window"), fault, least=1)
        if (window, limit.per) in seen:
            fault(place, f"another limit of this grant has the same window, per {limit.per}; write the smaller one")
        seen.add((window, limit.per))


def _check_quorum(quorum: Quorum, fault: Fault) -> None:
    place: Place = ("quorum",)
    if quorum.stages:
        for name, is_given in (("approvals", quorum.approvals is not msgspec.UNSET), ("of", bool(quorum.of))):
            if is_given:
                fault((*place, name), "either `approvals` and `of`, or `stages`")
    elif quorum.approvals is msgspec.UNSET or not quorum.of:
        fault(place, "needs `approvals` and `of`, or `stages`")
        return
    for index, stage in enumerate(quorum.in_stages()):
        at: Place = (*place, "stages", index) if quorum.stages else place
        if stage.approvals < 1:
            fault((*at, "approvals"), "must be at least 1; where nobody has to approve, leave `quorum` out")
        for number, name in enumerate(stage.of):
            if name in stage.of[:number]:
                fault((*at, "of", number), f"{name!r} is named twice")
    expires = _check_duration(quorum.expires, (*place, "expires"), fault, least=1)
    cool_off = _check_duration(quorum.cool_off, (*place, "cool_off"), fault, least=0)
    if 0 < expires <= cool_off:
        fault((*place, "cool_off"), "must be shorter than `expires`, or no use is ever possible")


def _check_duration(text: str, place: Place, fault: Fault, *, least: int) -> int:
    """The seconds; 0 where there is a fault."""
    if not DURATION.fullmatch(text):
        fault(place, f"must be {_DURATION_FORM}")
        return 0
    seconds = seconds_of(text)
    if not least <= seconds <= MAX_WINDOW_S:
        fault(place, f"must be from {least}s to 31d")
        return 0
    return seconds
