"""Images in buckets of a real S3 server, Ceph's, with credentials from every usual place."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.sources.opening import error_of, opened, refusal
from tests.support import need
from tests.support.badhttp import Answer, serve
from tests.support.metadata import instance_role
from tests.support.s3server import KEY, SECRET, S3Server, s3_server

pytestmark = pytest.mark.xdist_group("radosgw")  # one cluster for all

PART = 5 << 20  # the smallest of an upload in parts
CONTENT = random.Random(3).randbytes(2 * PART + 12345)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    need("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "monmaptool")
    with s3_server(tmp_path_factory.mktemp("v")) as running:
        for bucket in ("images", "public"):
            running.client.create_bucket(Bucket=bucket)
        upload_in_parts(running, "images", "disk.raw")
        running.put("public", "disk.raw", b"public")
        running.client.put_object_acl(Bucket="public", Key="disk.raw", ACL="public-read")
        yield running


@pytest.fixture
def server(cluster: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """Start from an environment in which nothing is known of any cloud but where the server is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", cluster.endpoint)
    return cluster


@pytest.fixture
def known(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    return server


def upload_in_parts(server: S3Server, bucket: str, key: str) -> None:
    upload = server.client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(CONTENT), PART), 1):
        answer = server.client.upload_part(
            Bucket=bucket, Key=key, UploadId=upload, PartNumber=number, Body=CONTENT[start : start + PART]
        )
        parts.append({"PartNumber": number, "ETag": answer["ETag"]})
    whole = {"Parts": parts}
    server.client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=whole)


def write_profile(home: Path, server: S3Server, key: str = KEY, secret: str = SECRET) -> None:
    directory = home / ".aws"
    directory.mkdir()
    (directory / "config").write_text(f"[profile qcow]\nregion = eu-west-7\nendpoint_url = {server.endpoint}\n")
    (directory / "credentials").write_text(
        f"[qcow]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        "[default]\naws_access_key_id = nobody\naws_secret_access_key = nothing\n"
    )


def test_every_byte_is_read_from_many_threads(known: S3Server) -> None:
    ranges = [(place, min(700_001, len(CONTENT) - place)) for place in range(0, len(CONTENT), 700_001)]
    with opened("s3://images/disk.raw") as remote, ThreadPoolExecutor(16) as readers:
        parts = list(readers.map(lambda place: remote.source.read_at(*place), ranges))

        assert b"".join(parts) == CONTENT
        assert len(CONTENT) == remote.source.size
        assert b"" == remote.source.read_at(len(CONTENT), 1)


def test_the_facts_are_those_of_the_object(known: S3Server) -> None:
    facts = known.client.head_object(Bucket="images", Key="disk.raw")
    with opened("s3://images/disk.raw") as remote:
        assert facts["ETag"] == remote.version
        assert int(facts["LastModified"].timestamp()) * 10**9 == remote.modified_ns
        assert remote.disk_size is None
        assert ("s3", known.endpoint, "images", "disk.raw") == remote.source.place()


@pytest.mark.parametrize("key", ["a b", "a%20b", "100%", "a?b=c", "a#b", "ü/日本.qcow2", "a+b&c=d", "~*'()", "a\\b"])
def test_a_key_is_what_stands_after_the_bucket(known: S3Server, key: str) -> None:
    known.put("images", key, key.encode())
    with opened(f"s3://images/{key}") as remote:
        assert key.encode() == remote.source.read_at(0, 100)


@pytest.mark.parametrize("key", ["/disk.raw", "disk.raw/", "a//b", "a/../disk.raw", "./disk.raw", "a\tb"])
def test_a_key_that_the_library_would_change_is_refused(known: S3Server, key: str) -> None:
    assert "such a key is not supported" in refusal(f"s3://images/{key}")


def test_an_object_that_is_replaced_is_stale_and_one_log_line(
    known: S3Server, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> None:
    request.node.add_marker(pytest.mark.expect_warnings)
    known.put("images", "replaced", CONTENT[:PART])
    with opened("s3://images/replaced") as remote:
        assert CONTENT[:9] == remote.source.read_at(0, 9)
        known.put("images", "replaced", bytes(PART))

        assert ["ESTALE"] * 3 == [error_of(remote.source, place) for place in (0, 100, PART - 1)]
    line = "s3://images/replaced: it was replaced or changed since it was opened: every read is an error from now on"
    assert [line] == [record.getMessage() for record in caplog.records]


@pytest.mark.expect_warnings
def test_an_object_that_is_deleted_is_an_error(known: S3Server) -> None:
    known.put("images", "deleted", b"x" * 100)
    with opened("s3://images/deleted") as remote:
        known.client.delete_object(Bucket="images", Key="deleted")

        assert "EIO" == error_of(remote.source)


def test_a_presigned_url_is_read_like_any_other(known: S3Server) -> None:
    url = known.client.generate_presigned_url("get_object", Params={"Bucket": "images", "Key": "disk.raw"})
    with opened(url) as remote:
        assert remote.source.read_at(PART - 100, 200) == CONTENT[PART - 100 : PART + 100]
        assert "Signature" in url and SECRET not in remote.source.name
        assert remote.source.name.endswith("/images/disk.raw?AWSAccessKeyId=...&Signature=...&Expires=...")


def test_credentials_come_from_a_profile(server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_profile(tmp_path, server)
    monkeypatch.setenv("AWS_PROFILE", "qcow")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with opened("s3://images/disk.raw") as remote:
        assert CONTENT[:9] == remote.source.read_at(0, 9)


def test_credentials_come_from_files_that_are_named(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "elsewhere"
    file.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint + "/")
    with opened("s3://images/disk.raw") as remote:
        assert CONTENT[:9] == remote.source.read_at(0, 9)


def test_credentials_come_from_the_role_of_the_machine(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    with instance_role(KEY, SECRET) as service:
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service)
        with opened("s3://images/disk.raw") as remote:
            assert CONTENT[:9] == remote.source.read_at(0, 9)


def test_without_credentials_what_is_public_is_read(server: S3Server) -> None:
    with opened("s3://public/disk.raw") as remote:
        assert b"public" == remote.source.read_at(0, 9)
    assert "s3://images/disk.raw: cannot open: access denied (AccessDenied)" == refusal("s3://images/disk.raw")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://images/none", "there is no such object"),
        ("s3://no-such-bucket/none", "there is no such bucket"),
        ("s3://images", "it names no object (s3://BUCKET/KEY)"),
        ("s3://images/", "it names no object (s3://BUCKET/KEY)"),
    ],
)
def test_what_cannot_be_opened_says_why(known: S3Server, url: str, why: str) -> None:
    assert f"{url}: cannot open: {why}" == refusal(url)


def test_what_is_wrong_with_credentials_is_said_without_them(known: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-one")
    assert "s3://images/disk.raw: cannot open: access denied (SignatureDoesNotMatch)" == refusal("s3://images/disk.raw")
    monkeypatch.setenv("AWS_PROFILE", "none")
    why = "no AWS credentials: The config profile (none) could not be found"
    assert f"s3://images/disk.raw: cannot open: {why}" == refusal("s3://images/disk.raw")


def test_a_server_that_nobody_runs_is_told_at_once(known: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert "s3://images/disk.raw: cannot open: cannot connect to the server" == refusal("s3://images/disk.raw")


@pytest.mark.expect_warnings
@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (Answer(body=lambda part: part + b"!"), "EIO"),
        (Answer(body=lambda part: part[:-1]), "EIO"),
        (Answer(ranges=False), "EIO"),
        (Answer(headers={"Content-Range": "bytes 1-10/100"}), "EIO"),
        (Answer(headers={"Content-Encoding": "gzip"}), "EIO"),
        (Answer(headers={"ETag": '"second"'}), "ESTALE"),
        (Answer(status=416, body=lambda part: b"<Error/>"), "ESTALE"),
    ],
)
def test_a_store_that_lies_is_an_error(
    known: S3Server, monkeypatch: pytest.MonkeyPatch, lie: Answer, error: str
) -> None:
    with serve(CONTENT[:100]) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bad.port}")
        with opened("s3://images/disk.raw", patience=2) as remote:
            bad.answers = [lie]
            assert error == error_of(remote.source)


@pytest.mark.parametrize("fault", [Answer(status=503), Answer(status=429), Answer(reset=3)])
def test_what_passes_is_asked_again(known: S3Server, monkeypatch: pytest.MonkeyPatch, fault: Answer) -> None:
    with serve(CONTENT[:100]) as bad:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{bad.port}")
        with opened("s3://images/disk.raw") as remote:
            bad.answers = [fault, fault, Answer()]
            assert CONTENT[:10] == remote.source.read_at(0, 10)
