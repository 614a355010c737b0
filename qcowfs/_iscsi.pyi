from collections.abc import Hashable
from typing import TypedDict

from qcowfs._requests import QueuedSource

class Login(TypedDict):
    initiator: bytes
    target: bytes
    user: bytes
    password: bytes
    target_user: bytes
    target_password: bytes
    portals: list[bytes]
    lun: int
    header_digest: str

class LunSource(QueuedSource):
    identity: Hashable
    def __init__(self, name: str, patience: float, login: Login) -> None: ...
    def begin(self, portal: int) -> None: ...
    def connect(self, seconds: float) -> bool: ...
    def start(self) -> None: ...
    @property
    def facts(self) -> tuple[int, bytes, bytes]: ...
