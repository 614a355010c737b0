from qcowfs._source import Source

class QueuedSource(Source):
    def news(self) -> tuple[str, str] | None: ...
