from qcowfs._handles import Handles
from qcowfs._nodes import Nodes

class DataPlane:
    def __init__(
        self,
        session_fd: int,
        handles: Handles,
        nodes: Nodes,
        workers: int,
        helpers: int,
        interruptible: bool = False,
    ) -> None: ...
    def fileno(self) -> int: ...
    @property
    def workers(self) -> int: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
