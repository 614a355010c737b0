from qcowfs._source import Source

class LayerMap:
    @staticmethod
    def qcow2(
        source: Source,
        data: Source,
        *,
        depth: int,
        virtual_size: int,
        version: int,
        cluster_bits: int,
        extended_l2: bool,
        external_data: bool,
        zstd: bool,
        l1_offset: int,
        l1_entries: int,
    ) -> LayerMap: ...
    @staticmethod
    def qcow1(
        source: Source, *, depth: int, virtual_size: int, cluster_bits: int, l2_bits: int, l1_offset: int
    ) -> LayerMap: ...
    @staticmethod
    def raw(source: Source, *, depth: int, virtual_size: int) -> LayerMap: ...
