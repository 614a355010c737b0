from collections.abc import Hashable

from qcowfs._requests import QueuedSource

class NbdSource(QueuedSource):
    def __init__(
        self,
        name: str,
        uri: bytes,
        patience: float,
        where: Hashable,
        *,
        tls: bool,
        certificates: bytes | None,
        keys: bytes | None,
    ) -> None: ...
    def connect(self) -> None: ...
    def expect_qemu(self, event: int) -> None: ...
    @property
    def several(self) -> bool: ...
    @property
    def facts(self) -> tuple[int, int, int]: ...
    def exports(self, most: int) -> list[str]: ...
