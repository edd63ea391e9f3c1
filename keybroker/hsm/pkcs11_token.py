"""PKCS#11 (OASIS, version 2.40 and later) through python-pkcs11. The only file that knows that library.

One process, one thread, one session: python-pkcs11 initialises the module without locks, and two threads on it crash.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pkcs11
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pkcs11 import MGF, Attribute, KeyType, Mechanism, ObjectClass, TokenFlag
from pkcs11 import exceptions as ckr
from pkcs11.util.ec import encode_named_curve_parameters

from keybroker.errors import TokenError
from keybroker.hsm import return_codes
from keybroker.hsm.pin import Pin
from keybroker.model.key import Algorithm, KeyFamily
from keybroker.model.pkcs11_uri import Pkcs11Uri
from keybroker.model.task import Alive, KeyOpened, KeyRefused, OpenKey, TaskFailed

MIN_RSA_BITS, MAX_RSA_BITS = 2_048, 4_096

_SPKI = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
_CURVES: dict[bytes, tuple[KeyFamily, ec.EllipticCurve]] = {
    bytes.fromhex("06082a8648ce3d030107"): (KeyFamily.EC_P256, ec.SECP256R1()),
    bytes.fromhex("06052b81040022"): (KeyFamily.EC_P384, ec.SECP384R1()),
    bytes.fromhex("06052b81040023"): (KeyFamily.EC_P521, ec.SECP521R1()),
}
_ED25519_PARAMETERS = (bytes.fromhex("06032b6570"), b"\x13\x0cedwards25519")  # by OID, or by name as PKCS#11 3.0 allows
_CURVE_NAMES = {KeyFamily.EC_P256: "secp256r1", KeyFamily.EC_P384: "secp384r1", KeyFamily.EC_P521: "secp521r1"}
_PSS: dict[Algorithm, tuple[Mechanism, MGF, int]] = {
    Algorithm.PS256: (Mechanism.SHA256, MGF.SHA256, 32),
    Algorithm.PS384: (Mechanism.SHA384, MGF.SHA384, 48),
    Algorithm.PS512: (Mechanism.SHA512, MGF.SHA512, 64),
}
_DIGEST_INFO = {  # RFC 8017 section 9.2, note 1: what PKCS#1 v1.5 puts before the digest
    Algorithm.RS256: bytes.fromhex("3031300d060960864801650304020105000420"),
    Algorithm.RS384: bytes.fromhex("3041300d060960864801650304020205000430"),
    Algorithm.RS512: bytes.fromhex("3051300d060960864801650304020305000440"),
}
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_HEX = re.compile(r"0x[0-9a-f]+")
_ODD_NAMES = {  # exceptions that are not called what PKCS#11 calls the code
    "AnotherUserAlreadyLoggedIn": "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    "FunctionCancelled": "CKR_FUNCTION_CANCELED",
    "SessionReadWriteSOExists": "CKR_SESSION_READ_WRITE_SO_EXISTS",
    "SlotIDInvalid": "CKR_SLOT_ID_INVALID",
    "TokenNotRecognised": "CKR_TOKEN_NOT_RECOGNIZED",
}
_TEXTS = {  # codes that have a text instead of an exception
    "Buffer was too small": "CKR_BUFFER_TOO_SMALL",
    "(already initialized)": "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    "(not initialized)": "CKR_CRYPTOKI_NOT_INITIALIZED",
    "Parallel not supported": "CKR_SESSION_PARALLEL_NOT_SUPPORTED",
    "User type invalid": "CKR_USER_TYPE_INVALID",
}
_ATTEMPTS_SPENT = TokenFlag.USER_PIN_COUNT_LOW | TokenFlag.USER_PIN_FINAL_TRY | TokenFlag.USER_PIN_LOCKED

CallError = pkcs11.PKCS11Error  # what a call into a token raises; `failure_of` says what it means


class PinRefusedError(TokenError):
    """The token refused the PIN. Trying again could lock it, so an operator has to look first.

    Attributes:
        reason: in one word, for the record.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"the token refused the PIN ({reason}); mend the PIN file, then send the hsm room SIGHUP: it tries once more")
        self.reason = reason


class LoginFailedError(TokenError):
    """No session, for another reason than the PIN, as far as the token says."""


class NoSessionLeftError(LoginFailedError):
    """The token has all the sessions that it can have. No PIN was sent."""


class Pkcs11Token:
    """One session of one token, logged in, with the private keys that were opened on it."""

    def __init__(self, token: Any, session: Any) -> None:
        self._token = token
        self._session = session
        self._keys: dict[str, Any] = {}
        self._log_key: Any = None
        self._log_spki = b""
        self._notice_key: Any = None
        self._notice_spki = b""

    @classmethod
    def log_in(cls, uri: Pkcs11Uri, *, can_write: bool = False, is_careful: bool = False) -> Pkcs11Token:
        """Load the module, find the one token that the URI names, and log in: one attempt.

        Args:
            uri: the token.
            can_write: open a session that can write.
            is_careful: the attempt before this one failed. Do not try where the token says that wrong PINs have been counted:
                some modules report a wrong PIN as something else, and trying again and again would lock the token.

        Raises:
            PinRefusedError: the token refused the PIN, or might have.
            LoginFailedError, NoSessionLeftError: the token did not give a session.
            TokenError: anything else that is wrong with module or token.
            ConfigError: the PIN file cannot be used.
        """
        pin = Pin.load(uri.pin_file)
        try:
            token = _find(pkcs11.lib(str(uri.module_path)), uri)
        except RuntimeError as err:  # PKCS11Error is one
            raise TokenError(f"{uri.module_path}: {ckr_name(err)}") from err
        if is_careful and token.flags & _ATTEMPTS_SPENT:
            raise PinRefusedError("attempts-spent")
        try:
            return cls(token, token.open(rw=can_write, user_pin=pin.text))
        except RuntimeError as err:
            name = ckr_name(err)
            if name in return_codes.PIN_REFUSED:
                raise PinRefusedError(name) from err
            kind = NoSessionLeftError if name == return_codes.NO_SESSION_LEFT else LoginFailedError
            raise kind(f"no session: {name}") from err

    def probe(self) -> Alive:
        """One cheap call into the token.

        Raises:
            pkcs11.PKCS11Error: the session is not alive.
        """
        with contextlib.suppress(ckr.RandomNoRNG, ckr.FunctionNotSupported):  # it answers, it just has no generator
            self._session.generate_random(64)
        return Alive(_text(self._token.serial), _text(self._token.label), len(self._keys))

    def open_key(self, wanted: OpenKey) -> KeyOpened | KeyRefused:
        """Find a private key and judge it; it can be used only if it was opened.

        Raises:
            pkcs11.PKCS11Error: the token did not let us look; nothing is known of the key.
        """
        self._keys.pop(wanted.ref, None)
        found = self._find_key(wanted)
        if isinstance(found, KeyRefused):
            return found
        key, opened = found
        if opened.spki == self._log_spki:
            return KeyRefused(wanted.ref, "key-is-the-log-key", "it signs checkpoints and nothing else; name another key")
        if opened.spki == self._notice_spki:
            return KeyRefused(wanted.ref, "key-is-the-notice-key", "it signs notices and nothing else; name another key")
        self._keys[wanted.ref] = key
        return opened

    def open_log_key(self, label: str, object_id: bytes) -> KeyOpened | KeyRefused:
        """Find the log's key, judge it, and keep it apart: from now on no `open_key` gives it out. Its `ref` is `log`.

        Raises:
            pkcs11.PKCS11Error: the token did not let us look; nothing is known of the key.
        """
        found = self._find_key(OpenKey("log", label, object_id))
        if isinstance(found, KeyRefused):
            return found
        key, opened = found
        if opened.family != KeyFamily.ED25519.value:
            return KeyRefused("log", "log-key-not-ed25519", "make an Ed25519 key for the log, and use it for nothing else")
        self._log_key, self._log_spki = key, opened.spki
        return opened

    def sign_log(self, text: bytes) -> bytes:
        """An Ed25519 signature of the log's key, which was opened before.

        Raises:
            pkcs11.PKCS11Error: see `failure_of`.
        """
        return bytes(self._log_key.sign(text, mechanism=Mechanism.EDDSA))

    def open_notice_key(self, label: str, object_id: bytes) -> KeyOpened | KeyRefused:
        """Find the key of notices, judge it, and keep it apart like that of the log. Its `ref` is `notices`.

        Raises:
            pkcs11.PKCS11Error: the token did not let us look; nothing is known of the key.
        """
        found = self._find_key(OpenKey("notices", label, object_id))
        if isinstance(found, KeyRefused):
            return found
        key, opened = found
        if opened.family != KeyFamily.EC_P256.value:
            return KeyRefused("notices", "notice-key-not-p256", "make a P-256 key for notices, and use it for nothing else")
        self._notice_key, self._notice_spki = key, opened.spki
        return opened

    def sign_notice(self, digest: bytes) -> bytes:
        """An ECDSA signature, r and s side by side, of the key of notices, which was opened before.

        Raises:
            pkcs11.PKCS11Error: see `failure_of`.
        """
        return bytes(self._notice_key.sign(digest, mechanism=Mechanism.ECDSA))

    def _find_key(self, wanted: OpenKey) -> tuple[Any, KeyOpened] | KeyRefused:
        template: dict[Attribute, Any] = {Attribute.CLASS: ObjectClass.PRIVATE_KEY}
        if wanted.label:
            template[Attribute.LABEL] = wanted.label
        if wanted.object_id:
            template[Attribute.ID] = wanted.object_id
        found = list(self._session.get_objects(template))
        if not found:
            return self._missing(wanted, template)
        if len(found) > 1:
            return KeyRefused(wanted.ref, "key-ambiguous", "several private keys match; name it by its CKA_ID, or delete the others")
        key = found[0]
        refusal = _judge(wanted.ref, key)
        if refusal is not None:
            return refusal
        opened = _opened(wanted.ref, key, self._public_half(key))
        return (key, opened) if isinstance(opened, KeyOpened) else opened

    def sign(self, ref: str, algorithm: Algorithm, data: bytes) -> bytes:
        """Sign a digest, or for Ed25519 a message. ECDSA signatures are r and s side by side.

        Raises:
            KeyError: the key was not opened.
            pkcs11.PKCS11Error: see `failure_of`.
        """
        key = self._keys[ref]
        if algorithm.is_ecdsa:
            signature = key.sign(data, mechanism=Mechanism.ECDSA)
        elif algorithm in _PSS:
            signature = key.sign(data, mechanism=Mechanism.RSA_PKCS_PSS, mechanism_param=_PSS[algorithm])
        elif algorithm in _DIGEST_INFO:
            signature = key.sign(_DIGEST_INFO[algorithm] + data, mechanism=Mechanism.RSA_PKCS)
        else:
            signature = key.sign(data, mechanism=Mechanism.EDDSA)
        return bytes(signature)

    def generate(self, algorithm: Algorithm, label: str, object_id: bytes, *, rsa_bits: int = MIN_RSA_BITS) -> None:
        """Make a key pair whose private half never leaves the token."""
        template = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False}
        if algorithm.family is KeyFamily.RSA:
            self._session.generate_keypair(KeyType.RSA, rsa_bits, id=object_id, label=label, store=True, private_template=template)
            return
        if algorithm.family is KeyFamily.ED25519:
            kind, curve, mechanism = KeyType.EC_EDWARDS, "1.3.101.112", Mechanism.EC_EDWARDS_KEY_PAIR_GEN
        else:
            kind, curve, mechanism = KeyType.EC, _CURVE_NAMES[algorithm.family], Mechanism.EC_KEY_PAIR_GEN
        parameters = {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}
        domain = self._session.create_domain_parameters(kind, parameters, local=True)
        domain.generate_keypair(id=object_id, label=label, store=True, mechanism=mechanism, private_template=template)

    def set_pin(self, old: str, new: str) -> None:
        """Change the user's PIN; takes a session that can write."""
        self._session.set_pin(old, new)

    def close(self) -> None:
        """Log out and end the session."""
        self._session.close()

    def _missing(self, wanted: OpenKey, template: dict[Attribute, Any]) -> KeyRefused:
        """Why no private key matched: nothing there, or something there that is no private key."""
        others = dict(template)
        del others[Attribute.CLASS]
        for other in self._session.get_objects(others):
            if other[Attribute.CLASS] is not ObjectClass.PUBLIC_KEY:
                return KeyRefused(wanted.ref, "key-wrong-class", "the object of this name is not a private key; name another")
        return KeyRefused(wanted.ref, "key-missing", "no private key matches; check `object` and `id` against the token")

    def _public_half(self, key: Any) -> Any:
        """The public key object with the same CKA_ID, or, where the token gives keys no id, the same label."""
        object_id = _attribute(key, Attribute.ID)
        match: dict[Attribute, Any] = {Attribute.ID: object_id} if object_id else {Attribute.LABEL: key.label}
        found = list(self._session.get_objects({Attribute.CLASS: ObjectClass.PUBLIC_KEY, **match}))
        return found[0] if len(found) == 1 else None


def ckr_name(err: BaseException) -> str:
    """The name that PKCS#11 gives a failure, `CKR_...`; the number in hex where it has none."""
    if isinstance(err, pkcs11.PKCS11Error) and type(err) is not pkcs11.PKCS11Error:
        name = type(err).__name__
        return _ODD_NAMES.get(name) or "CKR_" + _WORD.sub("_", name).upper()
    text = str(err)
    for part, name in _TEXTS.items():
        if part in text:
            return name
    number = _HEX.search(text)
    if number:
        return return_codes.NAMES.get(int(number[0], 16), number[0])
    return text[:64] or type(err).__name__


def failure_of(err: pkcs11.PKCS11Error) -> TaskFailed:
    """A failed call, as the authority needs to know it. Codes that blame session or device end this worker, so that a fresh one logs in."""
    name = ckr_name(err)
    may_have_signed = name not in return_codes.NOTHING_SIGNED and not _failed_before_signing(err)
    return TaskFailed(name, may_have_signed=may_have_signed, is_session_lost=name in return_codes.SESSION_LOST)


def _failed_before_signing(err: BaseException) -> bool:
    """Whether C_SignInit failed, so that C_Sign was not called.

    python-pkcs11 makes both calls in one, and only the traceback says which of them it was. If a later version has other
    names, nothing is found, and the use counts as one that may have happened.
    """
    frame = err.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name.rpartition(".")[2] == "_initiate":
            return True
        frame = frame.tb_next
    return False


def _find(library: Any, uri: Pkcs11Uri) -> Any:
    """The one token that a URI names. A slot that cannot be read is passed over: it may be another token's."""
    found, trouble = [], ""
    for slot in library.get_slots(token_present=True):
        try:
            token = slot.get_token()
        except pkcs11.PKCS11Error as err:
            trouble = f" (and a slot answers {ckr_name(err)})"
            continue
        if _matches(token, uri):
            found.append(token)
    if len(found) != 1:
        count = "no token" if not found else f"{len(found)} tokens"
        raise TokenError(f"{count} of {uri.module_path} match the URI; name exactly one, by `token` or `serial`{trouble}")
    return found[0]


def _matches(token: Any, uri: Pkcs11Uri) -> bool:
    pairs = (
        (uri.token, token.label),
        (uri.serial, token.serial),
        (uri.manufacturer, token.manufacturer_id),
        (uri.model, token.model),
    )
    return all(not wanted or wanted == _text(shown) for wanted, shown in pairs)


def _text(shown: Any) -> str:
    """Token information is padded with blanks, and bytes in some fields."""
    return (shown.decode(errors="replace") if isinstance(shown, bytes) else str(shown)).rstrip(" \0")


def _attribute(key: Any, attribute: Attribute) -> Any:
    """An attribute, or None where the token does not know it or does not tell. Any other failure says nothing about the key."""
    try:
        return key[attribute]
    except (ckr.AttributeTypeInvalid, ckr.AttributeSensitive):
        return None


def _judge(ref: str, key: Any) -> KeyRefused | None:
    """Whether a private key is one that an HSM protects and that can sign unattended."""
    rules = (
        (_attribute(key, Attribute.EXTRACTABLE) is False, "key-extractable", "CKA_EXTRACTABLE must be false; make a new key in the token"),
        (_attribute(key, Attribute.SENSITIVE) is True, "key-not-sensitive", "CKA_SENSITIVE must be true; make a new key in the token"),
        (
            not _attribute(key, Attribute.ALWAYS_AUTHENTICATE),
            "key-always-authenticate",
            "CKA_ALWAYS_AUTHENTICATE asks for the PIN at each use; make a key without it",
        ),
        (_attribute(key, Attribute.SIGN) is True, "key-cannot-sign", "CKA_SIGN must be true"),
    )
    for holds, rule, cure in rules:
        if not holds:
            return KeyRefused(ref, rule, cure)
    return None


def _opened(ref: str, key: Any, public: Any) -> KeyOpened | KeyRefused:
    """Family and public half of a key that has been judged."""
    kind = _attribute(key, Attribute.KEY_TYPE)
    try:
        if kind == KeyType.RSA:
            return _opened_rsa(ref, key)
        if public is None:
            return KeyRefused(ref, "key-no-public-half", "the token must hold exactly one public key object with the same CKA_ID")
        parameters, point = public[Attribute.EC_PARAMS], public[Attribute.EC_POINT]
        if kind == KeyType.EC and parameters in _CURVES:
            family, curve = _CURVES[parameters]
            spki = ec.EllipticCurvePublicKey.from_encoded_point(curve, _octets(point)).public_bytes(*_SPKI)
            return KeyOpened(ref, family.value, curve.key_size, spki)
        if kind == KeyType.EC_EDWARDS and parameters in _ED25519_PARAMETERS:
            spki = ed25519.Ed25519PublicKey.from_public_bytes(_octets(point)).public_bytes(*_SPKI)
            return KeyOpened(ref, KeyFamily.ED25519.value, 256, spki)
    except (ckr.AttributeTypeInvalid, ckr.AttributeSensitive, ValueError):
        return KeyRefused(ref, "key-no-public-half", "the token's public key object cannot be read")
    return KeyRefused(ref, "key-unsupported", "use RSA of 2048 to 4096 bits, P-256, P-384, P-521 or Ed25519")


def _opened_rsa(ref: str, key: Any) -> KeyOpened | KeyRefused:
    """Modulus and exponent are not secret, so the private object itself tells them."""
    modulus, exponent = (int.from_bytes(key[each]) for each in (Attribute.MODULUS, Attribute.PUBLIC_EXPONENT))
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
        return KeyRefused(ref, "key-unsupported", f"use an RSA key of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits")
    spki = rsa.RSAPublicNumbers(exponent, modulus).public_key().public_bytes(*_SPKI)
    return KeyOpened(ref, KeyFamily.RSA.value, modulus.bit_length(), spki)


def _octets(point: bytes) -> bytes:
    """CKA_EC_POINT is a DER OCTET STRING; some modules leave the wrapping out."""
    if point[:1] == b"\x04" and len(point) > 2:
        if point[1] < 0x80 and len(point) == 2 + point[1]:
            return point[2:]
        if point[1] == 0x81 and len(point) == 3 + point[2]:
            return point[3:]
    return point
