"""Bodies of requests: JSON bytes in, typed values or a refusal out. RFC 8259, with I-JSON's strictness (RFC 7493 section 2). No I/O.

Two readers of one body must never see two requests: no member twice, no lone surrogate, no second spelling of the same base64.
"""

from __future__ import annotations

import json
import re
from binascii import b2a_base64
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from keybroker.audit.dsse import MAX_ENVELOPE_BYTES, Envelope
from keybroker.audit.leaf import canonical
from keybroker.errors import InvalidError, MalformedError, UnsupportedMediaTypeError
from keybroker.model.glass import MAX_SECONDS
from keybroker.model.key import Algorithm
from keybroker.model.request import MAX_BATCH_ITEMS, MAX_MESSAGE_BYTES, SignBody

MAX_SIGN_BODY_BYTES = MAX_MESSAGE_BYTES * 4 // 3 + 40 * 1024  # the message in base64, the rest escaped as badly as JSON allows
MAX_APPROVAL_BODY_BYTES = MAX_ENVELOPE_BYTES
_MAX_NAME_CHARACTERS = 64


class _Batch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    items: Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1, max_length=MAX_BATCH_ITEMS)]


class Redemption(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a redemption. `message` is what is signed, where the token needs it whole; an operation keeps digests only."""

    message: bytes | msgspec.UnsetType = msgspec.UNSET


_decode_sign = msgspec.json.Decoder(SignBody).decode
_decode_batch = msgspec.json.Decoder(_Batch).decode
_JSON = re.compile(rb'application/json(?:[ \t]*;[ \t]*charset="?utf-8"?)?', re.IGNORECASE)
_FIELD_FAULT = re.compile(r"Object (contains unknown|missing required) field `(.*)`", re.DOTALL)
_PLACED_FAULT = re.compile(r"(.*?)(?: - at `\$\.?([a-z_]*)`)?", re.DOTALL)
_CHOICES = {"algorithm": ", ".join(each.value for each in Algorithm), "format": "der, p1363"}
_NOT_BASE64 = "not base64 (RFC 4648 section 4, with padding)"


def sign_body(data: bytes) -> SignBody:
    """The body of `sign` and `sign/explain`, or one item of a batch.

    Raises:
        MalformedError: not JSON, or JSON that could be read in two ways.
        InvalidError: JSON, but not a sign request; with a JSON pointer for each fault.
    """
    try:
        body = _decode_sign(data)
    except msgspec.ValidationError as err:
        _read_strictly(data)  # whether it is JSON at all comes first
        _refuse(err)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as err:
        raise _malformed() from err
    if not _is_plain(data, body):
        _refuse_second_spellings(_read_strictly(data), body)
    body.check()
    return body


T = TypeVar("T")


def json_body(data: bytes, type_: type[T]) -> T:
    """A body of any other route, as strict: unknown members, members given twice and wrong types are refused.

    Raises:
        MalformedError: not JSON, or JSON that could be read in two ways.
        InvalidError: JSON, but not of this type.
    """
    return _strictly(data, type_)[1]


def require_json(types: Sequence[bytes]) -> None:
    """Check the values of `Content-Type`.

    Raises:
        UnsupportedMediaTypeError: not one, or not JSON.
    """
    if len(types) != 1 or not _JSON.fullmatch(types[0]):
        raise UnsupportedMediaTypeError("Send `Content-Type: application/json`.")


def batch_items(data: bytes) -> list[SignBody | InvalidError]:
    """The items of a batch, in order; a faulty one as the refusal of that item alone.

    Raises:
        MalformedError: the body, or anything in it, is not JSON or could be read in two ways.
        InvalidError: JSON, but not a batch.
    """
    try:
        batch = _decode_batch(data)
    except msgspec.ValidationError as err:
        _read_strictly(data)
        _refuse(err)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as err:
        raise _malformed() from err
    if b"\\" in data or data.count(b'"items"') != 1:
        _read_strictly(data)
    return [_item(bytes(raw)) for raw in batch.items]


def _item(data: bytes) -> SignBody | InvalidError:
    try:
        return sign_body(data)
    except InvalidError as err:
        return err


def approval(data: bytes) -> bytes:
    """The body of an approval: a DSSE envelope, in canonical JSON whatever white space it came with. It is not judged here.

    Raises:
        MalformedError: not JSON, or JSON that could be read in two ways.
        InvalidError: JSON, but not an envelope.
    """
    return canonical(json_body(data, Envelope))


def redemption(data: bytes) -> bytes | None:
    """The body of a redemption: the message, where the algorithm signs messages.

    Raises:
        MalformedError: not JSON, or JSON that could be read in two ways.
        InvalidError: JSON, but not a redemption.
    """
    value, body = _strictly(data, Redemption)
    if not isinstance(body.message, bytes):
        return None
    _refuse_second_spelling("message", value, body.message)
    return body.message


def _is_plain(data: bytes, body: SignBody) -> bool:
    """True where the bytes can say nothing that the decoded body does not; false where that takes a closer look.

    Every member is text, so a body without escapes has four quotation marks for each member, and one more member than the
    decoded body has is one that was given twice. The bits that a final base64 quantum leaves over show in its last digits.
    """
    given = (body.message, body.digest, body.format)
    members = 1 + sum(each is not msgspec.UNSET for each in given) + bool(body.reason) + bool(body.media_type)
    if data.count(b'"') != 4 * members or b"\\" in data:
        return False
    content = body.content
    left_over = len(content) % 3
    return left_over == 0 or (data.count(b'="') == 1 and _last_quantum(content) + b'"' in data)


def _refuse_second_spellings(value: dict[str, Any], body: SignBody) -> None:
    """Raises InvalidError where base64 has bits after its end that are not zero (RFC 4648 section 3.5)."""
    for name, content in (("message", body.message), ("digest", body.digest)):
        if isinstance(content, bytes):
            _refuse_second_spelling(name, value, content)


def _refuse_second_spelling(name: str, value: dict[str, Any], content: bytes) -> None:
    if content and value[name][-4:].encode() != _last_quantum(content):
        raise InvalidError("A field is not what it should be.", pointers=((f"/{name}", _NOT_BASE64),))


def _last_quantum(content: bytes) -> bytes:
    """The last four digits of the base64 of some bytes."""
    return b2a_base64(content[-(len(content) % 3 or 3) :], newline=False)


def _strictly(data: bytes, type_: type[T]) -> tuple[Any, T]:
    """A body as JSON that can be read in one way only, and as its type."""
    value = _read_strictly(data)
    try:
        return value, msgspec.json.decode(data, type=type_)
    except msgspec.ValidationError as err:
        _refuse(err)


def _read_strictly(data: bytes) -> Any:
    """Any JSON, read by two parsers: one knows surrogates and depth, the other sees members that are given twice.

    Raises:
        MalformedError: one of the two refuses it.
    """
    try:
        msgspec.json.decode(data)
    except msgspec.ValidationError:
        pass  # a number that is out of msgspec's range is JSON all the same
    except (msgspec.DecodeError, UnicodeError, RecursionError) as err:
        raise _malformed() from err
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_int=float)
    except (ValueError, RecursionError) as err:
        raise _malformed() from err


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a member is given twice")
    return made


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _malformed() -> MalformedError:
    return MalformedError("The body is not JSON in UTF-8, or has a member twice.")


def _refuse(err: msgspec.ValidationError) -> NoReturn:
    """Say what msgspec found as a JSON pointer (RFC 6901) and words that do not repeat any value."""
    text = str(err)
    field = _FIELD_FAULT.fullmatch(text)
    if field:
        fault = (pointer_to(field[2]), "unknown" if field[1].startswith("contains") else "missing")
    else:
        placed = _PLACED_FAULT.fullmatch(text)
        what, name = (placed[1], placed[2] or "") if placed else (text, "")
        fault = (f"/{name}" if name else "", _describe(what, name))
    raise InvalidError("The body is not what this route takes.", pointers=(fault,)) from err


def _describe(what: str, name: str) -> str:
    if name in _CHOICES:
        return f"one of {_CHOICES[name]}"
    if name == "seconds":
        return f"a whole number from 1 to {MAX_SECONDS}"
    if name == "items":
        return f"an array of 1 to {MAX_BATCH_ITEMS} sign requests"
    if "base64" in what:
        return _NOT_BASE64
    return "must be text" if name else "must be an object"


def pointer_to(name: str) -> str:
    """The JSON pointer to a member of the whole body; a very long name is cut."""
    return "/" + name[:_MAX_NAME_CHARACTERS].replace("~", "~0").replace("/", "~1")
