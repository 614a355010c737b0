"""Every cap on what an image may ask for, with its reason. Defined here and only here.

Images are hostile until proven otherwise: no count or size that an image holds is used for arithmetic, allocation
or a loop before it was compared with its cap. "QEMU" marks a cap that QEMU has too, so that no image QEMU opens is
refused. Sizes are in bytes.
"""

MAX_CHAIN_DEPTH = 256  # layers of one chain; libvirt stops at 200, and each open layer costs a descriptor
MAX_BACKING_NAME = 1023  # QEMU: bytes of a backing file name
MAX_BACKING_FORMAT = 15  # QEMU: bytes of a recorded format name
MAX_DATA_FILE_NAME = 8192  # a path of 4096 with a json: object around it; QEMU takes what fits into a cluster
MAX_JSON_DEPTH = 16  # nested objects of one json: name; QEMU's own names nest 3 or 4 deep
MAX_CONFIGURATION = 1 << 16  # characters of a configuration file: a list of directories, by a person

MIN_CLUSTER_BITS = 9  # QEMU: 512 B
MAX_CLUSTER_BITS = 21  # QEMU: 2 MiB
MIN_CLUSTER_BITS_EXTENDED_L2 = 14  # QEMU: a subcluster is 1/32 of a cluster and at least 512 B
MAX_REFCOUNT_ORDER = 6  # specification: 64-bit refcounts
MAX_HOST_OFFSET = (1 << 63) - (1 << 30)  # QEMU: the longest file, and so where every table has to end
MAX_VIRTUAL_SIZE = 1 << 62  # file offsets are signed 64-bit; QEMU's own limit is lower still (the L1 cap)

MAX_L1_SIZE = 32 << 20  # QEMU: one L1 table, active or of a snapshot
MAX_REFCOUNT_TABLE_SIZE = 8 << 20  # QEMU
MAX_SNAPSHOTS = 65536  # QEMU
MAX_SNAPSHOT_TABLE_SIZE = 64 << 20  # QEMU: the whole snapshot table
MAX_SNAPSHOT_EXTRA_SIZE = 1024  # QEMU: extra data of one entry
MAX_BITMAPS = 65535  # QEMU
MAX_BITMAP_DIRECTORY_SIZE = MAX_BITMAPS * 1024  # QEMU
MAX_BITMAP_NAME = 1023  # specification
MAX_BITMAP_SIZE = 512 << 20  # QEMU: bytes of the bits of one bitmap
MIN_BITMAP_GRANULARITY_BITS = 9  # QEMU
MAX_BITMAP_GRANULARITY_BITS = 31  # QEMU
MAX_FEATURE_NAMES = 192  # 3 kinds of 64 bits each; more cannot name anything new

MIN_QCOW1_CLUSTER_BITS = 9  # QEMU
MAX_QCOW1_CLUSTER_BITS = 16  # QEMU
MIN_QCOW1_L2_BITS = 6  # QEMU: 9 - 3
MAX_QCOW1_L2_BITS = 13  # QEMU: 16 - 3
MAX_QCOW1_L1_SIZE = 256 << 20  # 64 TiB as QEMU makes them; it opens eight times that, and reads all of it first

MIN_CACHE_SIZE = 1 << 20  # less than this holds not even what a few reads need at once
MAX_CACHE_SIZE = 1 << 40  # what is more is a slip of the pen
DEFAULT_CACHE_SIZE = 32 << 20  # L1/L2 slices and decompressed clusters of one mount, all points together
TABLE_SLICE_SIZE = 1024  # tables are read and cached in such slices: of 20,000 L2 tables all fit that are in use
DEFAULT_PATIENCE = 30.0  # seconds that a remote source may take for one answer; a SCSI disk's timeout in Linux
MIN_PATIENCE = 0.1  # less, and a busy machine at the other end is an error
MAX_PATIENCE = 3600.0  # longer is for ever, to a person
MAX_REQUESTS = 32  # that one object store is asked at once; a thread and a connection for each
MAX_REQUEST_SIZE = 8 << 20  # bytes of one: what one costs in memory, and how soon its patience ends on a slow line
MAX_REDIRECTS = 5  # from one web server to the next; what is usual is one, and curl follows 50
DEFAULT_CACHE_DIRECTORY = 4 << 30  # bytes of --cache-dir, of all images together
MIN_CACHE_DIRECTORY = 16 << 20  # less than this is written anew all the time
DEFAULT_BLOCK_CACHE = 64 << 20  # blocks of all remote images: 16 MiB ahead of a reader, and the tables of some TiB
MAX_COUNTED_TABLES = 64 << 20  # bytes of L2 tables that one mount walks to answer st_blocks exactly; then an estimate
MAX_LISTED_TABLES = 1 << 30  # the same for `list` and `info`, which a person waits for
MAX_GRANULARITY = 1 << 30  # bytes that `diff` tells apart as one; what is coarser says nothing of a disk
MAX_LISTED_FAULTS = 1000  # ranges that `diff` says it cannot read, one by one; then only how many more there are

MAX_MONITOR_MESSAGE = 16 << 20  # bytes of one answer of QEMU's monitor: a chain of 256 layers takes 250 KB
MAX_MONITOR_TEXT = 8192  # characters of one name in it: QEMU cuts those of files to 4,095 bytes
MAX_AGENT_MESSAGE = 1 << 20  # bytes of one answer of a guest agent: the guest may write what it likes
MAX_DEVICES = 4096  # devices and nodes of one machine that are looked at
MAX_DEVICE_SNAPSHOTS = MAX_SNAPSHOTS  # internal snapshots of one image that the monitor tells of
MONITOR_SECONDS = 10.0  # that QEMU may take for one answer: a monitor answers between other work of QEMU
AGENT_SECONDS = 5.0  # that a guest agent may take to say that it is there: libvirt's limit
FREEZE_SECONDS = 60.0  # for freezing or thawing: the guest writes out all it has; Windows gives up by itself at 60

MAX_PARTITIONS = 255  # Linux: the most that one disk has
MAX_GPT_ARRAY = 4 << 20  # Linux: bytes of all entries; what is usual is 16 KiB
MAX_EMPTY_EBRS = 100  # Linux: links of a chain of extended boot records in a row that name no partition
MAX_LVM_AREAS = 16  # data and metadata areas of one physical volume; LVM makes 3 at most
MAX_LVM_TEXT = 4 << 20  # bytes of a volume group's metadata, some 10,000 volumes; LVM reserves 1 MiB by default
MAX_LVM_TEXTS = 8 << 20  # the same, of all groups that one disk shows: 1 MiB takes a third of a second
MAX_LVM_DEPTH = 8  # sections in sections; LVM's own nest 4 deep
MAX_LVM_NAME = 127  # LVM: bytes of the name of a group, a volume, and of both joined as device-mapper has them
MAX_LVM_VOLUMES = 4096  # logical volumes shown of one disk; LVM itself becomes slow beyond some thousand
MAX_ROOT_CLUSTERS = 100  # of a FAT or exFAT root directory that is searched for the label, as blkid searches it
MAX_ROOT_BYTES = 1 << 16  # the same in bytes: 2,048 entries take 1 ms, and there may be some thousand volumes
MAX_NOTES = 20  # sentences on what is wrong with one disk's tables; a person reads no more
INSIDE_WORKERS = 16  # processes that read trees, of one mount: 2 MiB each when idle, and 20 after long use
INSIDE_PLACE_SECONDS = 30  # how long a tree waits for one of them, while so many others are being read
INSIDE_RESTARTS = 3  # crashes of one tree's worker within INSIDE_RESTART_SECONDS; then the tree is EIO for a while
INSIDE_RESTART_SECONDS = 300  # a crash costs milliseconds, but its cause will not go away by itself
INSIDE_REQUEST_SECONDS = 8  # processor time of one request in the worker, which then dies by its own timer
INSIDE_ANSWER_SECONDS = 30  # the same by the clock, for a worker that has lost its timer; others may have the processor
INSIDE_TOTAL_SECONDS = 300  # the same with the time that its disk takes to be read, which is not the worker's fault
INSIDE_REQUEST_BYTES = 4 << 30  # read of the volume for one request; the largest journal that is replayed takes 2 GiB
INSIDE_CPU_SECONDS = 3600  # processor time of one worker: one that spins while nobody asks ends some day
INSIDE_MEMORY = 128 << 20  # address space beyond Python's own: 64 MiB of a reader, the blocks, and malloc's reserve
INSIDE_BLOCK = 64 << 10  # a worker reads and keeps its volume in blocks of this: 6 MB are 100 questions
INSIDE_BLOCKS = 256  # of them kept: 16 MiB
INSIDE_WANT = 1 << 20  # bytes that a worker may ask for at once, and that one request may return
INSIDE_ANSWER = 4 << 20  # bytes of one answer: the 1 MiB of a read, or all extended attributes of one file
INSIDE_ERROR = 300  # bytes of an error's text, which may hold names of the volume
INSIDE_EXTENTS = 65536  # extents of one answer
INSIDE_RANGES = 32768  # ranges of one message: 512 KiB
MAX_NARROWED = 8 << 20  # bytes that are compared to know better what two volumes share: 5 ms
MAX_FILE_EXTENTS = 1 << 20  # of one file that is read: 32 MiB of runs
MAX_FILE_QUESTIONS = 256  # for the extents of one file: each may cover little, if there are many blocks to look at
MAX_FILE_INLINE = 4 << 20  # bytes of one file that its reader tells instead of a place: tails, and what a journal holds
MAX_PROVEN_DIRECTORY = 16 << 20  # bytes of a directory of which one request tells what may differ: 0.3 s at the worst
MAX_EXT_DIRECTORY = 1 << 30  # bytes of one ext directory: 16 million names or more; to look through it takes seconds
EXT_BLOCKS = 8 << 20  # bytes of blocks that are held beside those of 64 KiB: inodes are not asked for in order
MAX_EXT_XATTRS = 2 << 20  # bytes of the extended attributes of one ext inode: an answer has them all
MAX_EXT_MAP = 1 << 16  # extents, and KiB of the map's blocks, of one ext file that a request looks at: 0.1 s
MAX_LISTED_ENTRIES = 1 << 20  # of one directory that is held to be sorted: 300 MB
MAX_WALKED_ENTRIES = 1 << 24  # of one directory that is not held: what fits into the largest of ext
MAX_WALKED_DIRECTORIES = 1 << 21  # that one walk remembers, so that none is entered twice: 200 MB
MAX_WALK_DEPTH = 1024  # directories in directories; a path of Linux has 2,048 components at most
MAX_FAT_RUNS = 1 << 19  # pieces of one file of FAT or exFAT, of 16 bytes each
MAX_FAT_DIRECTORY = 2 << 20  # specification: bytes of a FAT directory, 65,536 entries
MAX_EXFAT_DIRECTORY = 256 << 20  # specification: bytes of an exFAT directory
MAX_HELD_NAMES = 40 << 20  # bytes of the names of FAT, exFAT or NTFS directories that a worker holds: 200,000 names
MAX_NTFS_CLUSTER = 2 << 20  # Windows: bytes of a cluster
MAX_NTFS_RUNS = 1 << 19  # pieces of one NTFS attribute, of 24 bytes each
MAX_NTFS_ATTRIBUTE_LIST = 256 << 10  # Windows: bytes of the list of one file's attributes
MAX_NTFS_RECORDS = 4096  # of one file, of 4 KiB at most: a million pieces
MAX_NTFS_INDEX_BLOCKS = 1 << 16  # of one NTFS directory: 256 MiB, more than a million names
MAX_NTFS_STREAM = 65536  # Linux: bytes of an extended attribute, as which alternate data streams are shown
MAX_NTFS_STREAMS = 1 << 20  # bytes of all of one file; an answer has to hold them
MAX_DAMAGED_RANGES = 1000  # of one file that is restored: they are told, and each costs 256 reads to find
MAX_RESTORED_LINKS = 1 << 19  # files with further hard links that a restore remembers at a time: 130 MB
MAX_READ_FILE = 1 << 40  # bytes of one file that are read to be hashed or compared: a quarter of an hour, even of zeros
MAX_HISTORY_PATHS = 20_000  # of one pattern, whose versions are all held: a person reads no more
MAX_RENAME_CHANGES = 1 << 17  # differences of two trees that are held to find renames among them: 150 MB

MAX_JOURNAL_BLOCKS = 10_240_000  # mke2fs: blocks of an ext3/ext4 journal
MAX_JOURNAL_RUNS = 1 << 15  # contiguous pieces of a journal: mke2fs makes a handful, and each costs 170 bytes here
MAX_JOURNAL_MAP_DEPTH = 5  # EXT4_MAX_EXTENT_DEPTH: levels of an extent tree
MAX_JOURNAL_RECORDS = 1 << 20  # descriptors, commits and revokes of one log; walking them takes two seconds
MAX_JOURNAL_TAGS = 1 << 19  # block images of one log: 2 GiB of 4 KiB blocks; sorting them takes 24 MB of a worker's 64
MAX_JOURNAL_REVOKES = 1 << 22  # revoked blocks of one log, with repetitions: they cost a second to look through
MAX_FAST_COMMIT_TAGS = 1 << 16  # mke2fs reserves 256 blocks for them, 1 MiB; a tag takes 8 bytes or more
MAX_FAST_COMMIT_BLOCKS = 2048  # blocks that the replay of fast commits may change: 8 MiB of 4 KiB, of a worker's 64
MAX_FAST_COMMIT_WORK = 1 << 21  # entries of directories and extents that the replay may look at: two seconds

MAX_VMDK_DESCRIPTOR = 1 << 20  # QEMU: bytes of the text in a vmdk image
MAX_CHILD_LINE = 4096  # bytes of a line that a program of QEMU says
