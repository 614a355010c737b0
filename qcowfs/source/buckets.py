"""Objects in buckets: s3://BUCKET/KEY, gs://BUCKET/KEY and az://CONTAINER/BLOB, through obstore.

Used by objects. The library signs, speaks HTTP and gives the GIL back; asking again is the requester's business, so
that one rule holds for all servers. What the library says of an error may hold a URL with its signature: only numbers
and single words of it are shown. Any thread.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from qcowfs import limits
from qcowfs.errors import UnsupportedImage
from qcowfs.source.answer import Answer, Content, Failure, Replaced, Temporary

if TYPE_CHECKING:
    from qcowfs.source.url import Url

try:
    import obstore
    import obstore.exceptions
    import obstore.store
except ImportError:
    obstore = None  # type: ignore[assignment]

__all__ = ["open_bucket"]

_PIECE = 1 << 20  # bytes; the library joins what comes until there are so many
_STATUS = re.compile(r"status code: (\d{3})\b", re.ASCII)
_CODE = re.compile(r"<Code>(\w{1,64})</Code>", re.ASCII)
_KIND = re.compile(r"\bkind: (Connect|Timeout|Interrupted|Request|Decode)\b")
_UNKNOWN = '"dns error"'
_LIE = re.compile(r"\b(UnexpectedRange|NoContentRange|ParseContentRange|MissingContentLength|InvalidLastModified)\b")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_EPOCH = 0.0  # what the library puts where the server sent no date

_CREDENTIALS = {
    "s3": "credentials and region are those of the AWS tools: environment, ~/.aws, AWS_PROFILE, instance role",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for what is public",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or an identity, or "
    "AZURE_SKIP_SIGNATURE=true for what is public",
}


def open_bucket(url: Url, patience: float) -> Bucket:
    """Return what reads the object that `url` names; nothing is sent yet.

    Raises:
        Failure: the URL names no object, or what is needed to sign requests cannot be had.
        UnsupportedImage: the library is not installed.
    """
    if obstore is None:
        raise lacking(url, "obstore")
    bucket, key = url.authority, _key(url)
    _check_names(url.scheme, bucket, key)
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=patience),
        "connect_timeout": timedelta(seconds=max(patience / 3, 0.1)),
        "read_timeout": timedelta(seconds=max(patience / 3, 0.1)),
    }
    try:
        store, server = _STORES[url.scheme](url, bucket, client)
    except obstore.exceptions.BaseError:
        raise Failure("the settings for this kind of store are wrong", hint=_CREDENTIALS[url.scheme]) from None
    return Bucket(url.scheme, store, (url.scheme, server, bucket, key))


def lacking(url: Url, package: str) -> UnsupportedImage:
    """Return the error for a library that is not there."""
    hint = "pip install 'qcowfs[objects]'"
    return UnsupportedImage(url.shown, f"the protocol {url.scheme}", f"{package} is not installed", hint=hint)


class Bucket:
    """One object in a bucket.

    Args:
        place: what names it; the key is the last of it.
    """

    def __init__(self, scheme: str, store: Any, place: tuple[str, ...]) -> None:
        self._scheme = scheme
        self._store = store
        self.place = place

    def get(self, start: int, length: int, held: Content | None, deadline: float) -> Answer:
        """Ask once (see Transport)."""
        options: Any = {"range": (start, start + length)}
        if held is not None and held.condition is not None:
            options["if_match"] = held.condition
        try:
            result = obstore.get(self._store, self.place[-1], options=options)
            return _answer(result, start, length)
        except (obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise _translated(error, self._scheme, held) from None

    def close(self) -> None:
        """Nothing: the library's requests cannot be broken off; their time is bounded."""


def _answer(result: Any, start: int, length: int) -> Answer:
    meta = result.meta
    size = int(meta["size"])
    expected = min(length, size - start)
    if tuple(result.range) != (start, start + expected) or size > limits.MAX_HOST_OFFSET:
        raise Failure(f"the server sent the bytes of {result.range} of {size} for those from {start} on")
    if result.attributes.get("Content-Encoding", "identity") not in ("identity", ""):
        raise Failure("it is kept compressed there (Content-Encoding), so that its bytes cannot be read in parts")
    pieces, done = [], 0
    for piece in result.stream(_PIECE):
        view = memoryview(piece)
        pieces.append(view)
        done += len(view)
        if done > expected:
            break
    if done != expected:
        raise Failure(f"the server sent {'more' if done > expected else 'less'} than the {expected} bytes it announced")
    modified = meta["last_modified"].timestamp()
    generation = meta["version"]
    content = Content(
        size=size, etag=meta["e_tag"], modified=None if modified == _EPOCH else modified, generation=generation
    )
    return Answer(content, pieces)


def _translated(error: Exception, scheme: str, held: Content | None) -> Failure:
    text = str(error)
    found = _CODE.search(text)
    named = f" ({found[1]})" if found else ""
    status = int(match[1]) if (match := _STATUS.search(text)) else 0
    if isinstance(error, obstore.exceptions.PreconditionError) and held is not None:
        return Replaced()
    if status == 416:
        return Failure("it is empty") if held is None else Replaced("it was cut")
    if isinstance(error, FileNotFoundError):
        no_bucket = found is not None and found[1] in ("NoSuchBucket", "ContainerNotFound")
        return Failure(f"there is no such {'bucket' if no_bucket else 'object'}")
    if isinstance(error, obstore.exceptions.PermissionDeniedError | obstore.exceptions.UnauthenticatedError):
        return Failure(f"access denied{named}", hint=_CREDENTIALS[scheme])
    if status in (408, 429) or (500 <= status and status not in (501, 505)):
        return Temporary(f"the server answered {status}{named}")
    if status:
        wrong_region = status == 301 or "AuthorizationHeaderMalformed" in named
        hint = "set AWS_REGION to the region of the bucket" if wrong_region else None
        return Failure(f"the server answered {status}{named}", hint=hint)
    return _without_status(text, scheme)


def _without_status(text: str, scheme: str) -> Failure:
    """Return what it means that no answer came, or one that the library does not accept."""
    if "NotPartial" in text:
        return Failure("the server does not serve parts of it (it does not honour Range)")
    if lie := _LIE.search(text):
        return Failure(f"what the server says of the part that it sent is wrong ({lie[1]})")
    kind = match[1] if (match := _KIND.search(text)) else ""
    if kind == "Timeout":
        return Temporary("the server does not answer")
    if kind == "Interrupted":
        return Temporary("the connection broke off")
    if kind == "Decode":
        return Temporary("what the server answered cannot be understood")
    if kind == "Connect":
        why = "no address of the server is known" if _UNKNOWN in text else "cannot connect to the server"
        return Temporary(why, unreachable=True)
    return Temporary("the request failed before there was an answer", unreachable=True, hint=_CREDENTIALS[scheme])


def _key(url: Url) -> str:
    """Return the key that `url` names: escapes stand for what they say, as in every URL.

    Raises:
        Failure: there is a query or a fragment, or the escapes are no UTF-8.
    """
    if url.query or url.text.endswith("?") or "#" in url.text:
        raise Failure("it names more than an object: in a key, ? is written as %3F, # as %23 and % as %25")
    try:
        return unquote(url.path.removeprefix("/"), errors="strict")
    except UnicodeDecodeError:
        raise Failure("the key is not UTF-8") from None


def _check_names(scheme: str, bucket: str, key: str) -> None:
    """Refuse what the library would take for another name: it drops slashes at both ends of a key.

    Raises:
        Failure: always with the reason.
    """
    if not bucket or not key:
        raise Failure(f"it names no object ({scheme}://{'CONTAINER/BLOB' if scheme == 'az' else 'BUCKET/KEY'})")
    if "@" in bucket or ":" in bucket:
        raise Failure("no bucket is called like that: user, password and server are not part of such a URL")
    if any(part in ("", ".", "..") for part in key.split("/")) or _CONTROL.search(key):
        raise Failure("such a key is not supported: it has an empty part, '.', '..' or a control character")


def _s3(url: Url, bucket: str, client: dict[str, Any]) -> tuple[Any, str]:
    try:
        from qcowfs.source.aws import aws_settings
    except ImportError:
        raise lacking(url, "botocore") from None
    settings = aws_settings()
    endpoint = settings.endpoint
    options: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    if settings.credentials is None:
        options["skip_signature"] = True
    else:
        options["credential_provider"] = settings.credentials
    client["allow_http"] = bool(endpoint and endpoint.startswith("http://"))
    store = obstore.store.S3Store(bucket, region=settings.region, **options, **_once(client))
    return store, endpoint or "aws"


def _gs(url: Url, bucket: str, client: dict[str, Any]) -> tuple[Any, str]:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")  # as Google's own clients have it
    if not emulator:
        return obstore.store.GCSStore(bucket, **_once(client)), "google"
    server = emulator if "://" in emulator else f"http://{emulator}"
    client["allow_http"] = server.startswith("http://")
    return obstore.store.GCSStore(bucket, base_url=server, skip_signature=True, **_once(client)), server


def _az(url: Url, bucket: str, client: dict[str, Any]) -> tuple[Any, str]:
    server = os.environ.get("AZURE_STORAGE_ENDPOINT", os.environ.get("AZURE_ENDPOINT", ""))
    emulated = os.environ.get("AZURE_STORAGE_USE_EMULATOR", "").lower() in ("1", "true")
    client["allow_http"] = emulated or server.startswith("http://")
    return obstore.store.AzureStore(bucket, **_once(client)), server or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")


def _once(client: dict[str, Any]) -> dict[str, Any]:
    return {"client_options": client, "retry_config": {"max_retries": 0}}


_STORES: dict[str, Callable[[Any, str, dict[str, Any]], tuple[Any, str]]] = {"s3": _s3, "gs": _gs, "az": _az}
