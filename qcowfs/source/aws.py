"""What the AWS tools would use here: credentials, region and endpoint from the environment, ~/.aws, and roles.

Used by buckets. botocore decides, because it is what the AWS tools go by: obstore itself reads neither ~/.aws nor a
profile. Any thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.exceptions
import botocore.session
from botocore.configprovider import ConfiguredEndpointProvider

from qcowfs.source.answer import Failure

__all__ = ["AwsSettings", "aws_settings"]

_KEPT = timedelta(minutes=5)  # botocore renews credentials 10 to 15 minutes before they end
_DEFAULT_REGION = "us-east-1"  # what servers other than Amazon's expect, unless they are told another one


@dataclass(frozen=True, slots=True)
class AwsSettings:
    """What a store is opened with.

    Attributes:
        endpoint: the URL of a server other than Amazon's, None: Amazon's.
        credentials: returns them as obstore takes them; None: there are none, and requests are not signed.
    """

    region: str
    endpoint: str | None
    credentials: Credentials | None


class Credentials:
    """Credentials, renewed when they are about to end."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def __call__(self) -> dict[str, Any]:
        frozen = self._found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _KEPT,
        }


def aws_settings() -> AwsSettings:
    """Return what the AWS tools would use, started in this environment.

    Raises:
        Failure: the profile that is asked for is not there, or its credentials cannot be had.
    """
    session = botocore.session.Session()
    try:
        region = session.get_config_variable("region") or _DEFAULT_REGION
        endpoint = None
        if not session.get_config_variable("ignore_configured_endpoint_urls"):
            scoped = session.get_scoped_config()
            named = ConfiguredEndpointProvider(session.full_config, scoped, "s3").provide()
            endpoint = named.rstrip("/") if named else None
        unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true")
        found = None if unsigned else session.get_credentials()
        if found is not None:
            found.get_frozen_credentials()
    except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
        raise Failure(f"no AWS credentials: {_reason(error)}") from None
    return AwsSettings(region, endpoint, None if found is None else Credentials(found))


def _reason(error: Exception) -> str:
    """Return what botocore says where its words are known to be harmless, otherwise only what it calls the error."""
    harmless = (
        botocore.exceptions.ProfileNotFound,
        botocore.exceptions.PartialCredentialsError,
        botocore.exceptions.SSOTokenLoadError,
        botocore.exceptions.UnauthorizedSSOTokenError,
        botocore.exceptions.InvalidConfigError,
    )
    return str(error).rstrip(".") if isinstance(error, harmless) else type(error).__name__
