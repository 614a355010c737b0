# cython: language_level=3, cdivision=True
# distutils: libraries = ext2fs com_err
"""Directories of ext: their entries as record.pack_entry would pack them, and the search for a name.

Used by inside/ext.py, in a worker, in one thread. Nothing is held between two requests: a cookie is the place in the
directory where the last entry ends, and its lowest bit says that something before it could not be read. All other names
are listed before that is an error.
"""

from base64 import urlsafe_b64encode
from errno import ENOENT, ENOTDIR
from hashlib import sha256
from os import strerror

from libc.errno cimport EFBIG, EIO
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memchr, memcmp, memcpy, memset

from qcowfs._ext2 cimport (
    FLAG_ENCRYPTED, FLAG_INLINE_DATA, INODE_BLOCK, INODE_BLOCK_SIZE, INODE_FLAGS, NOKEY_BYTES, Filesystem, le16, le32,
)
from qcowfs._extmap cimport FEW_EXTENTS, few_extents, read_runs, run_t, runs_t
from qcowfs._records cimport RECORD_UNMAPPED, entry_record_t, extent_record_t, inode_record_t
from qcowfs.clib.ext2fs cimport *

from qcowfs.limits import INSIDE_WANT, MAX_EXT_DIRECTORY, MAX_LISTED_ENTRIES, MAX_PROVEN_DIRECTORY

cdef uint64_t LONGEST = MAX_EXT_DIRECTORY
cdef uint64_t MOST_ROOM = INSIDE_WANT
cdef uint64_t LONGEST_PROVEN = MAX_PROVEN_DIRECTORY
cdef uint32_t MOST_ENTRIES = MAX_LISTED_ENTRIES

cdef enum:
    DAMAGED = 1  # of a cookie; a place in a directory is a multiple of 4
    HEAD = 8  # bytes of an entry before its name: inode, length of the entry, length of the name, type
    RUNS = 64  # of a directory that are looked up at once
    INLINE_PARENT = 4  # bytes before the first entry in an inode
    INLINE_FIRST = 60  # where what does not fit into i_block begins
    LONGEST_ENTRY = 512  # bytes as it is packed, with FEW_EXTENTS and 255 of a name
    SHIFT_TYPE = 12
    DIRECTORY = 0x4
    REGULAR = 0x8
    GENERATION = 100  # where in an inode that stands, of which the checksums of its blocks are made
    SIZE_HIGH = 108
    COMPAT_DIR_INDEX = 0x20
    UNSIGNED_HASH = 0x2  # of s_flags
    FIRST_UNSIGNED = 3  # of the hashes that libext2fs knows

# S_IFMT >> 12 of the types that entries have.
cdef uint32_t[8] TYPES = [REGULAR, REGULAR, DIRECTORY, 0x2, 0x6, 0x1, 0xC, 0xA]

sha256(b"")  # what it loads from files it loads before the worker may open none


cdef bint is_dots(const uint8_t *name, uint32_t length) noexcept:
    """Return whether a name is "." or ".."."""
    return 0 < length <= 2 and name[0] == c"." and (length < 2 or name[1] == c".")


cdef bint is_name(const uint8_t *name, uint32_t length) noexcept:
    """Return whether Linux can have such a name."""
    return length > 0 and memchr(name, c"/", length) == NULL and memchr(name, 0, length) == NULL


def without_key(bytes name, uint32_t major=0, uint32_t minor=0) -> bytes:
    """Return an encrypted name or target as Linux shows it where the key is not known: fscrypt_nokey_name.

    Args:
        major, minor: the two hashes of a name in a directory with an index.
    """
    told = int(major).to_bytes(4, "little") + int(minor).to_bytes(4, "little") + name[:NOKEY_BYTES]
    if len(name) > NOKEY_BYTES:
        told += sha256(name[NOKEY_BYTES:]).digest()
    return urlsafe_b64encode(told).rstrip(b"=")


cdef class Listing:
    """Entries of a directory that end after a place in it, one after the other.

    `child`, `kind`, `name`, `length` and `end` are of the entry that `next` found; `shown` holds a name that is not
    what is stored.
    """

    cdef Filesystem volume
    cdef uint32_t ino
    cdef bint encrypted, damaged
    cdef uint64_t after
    cdef uint64_t block  # of the directory, that is read next
    cdef runs_t runs
    cdef run_t found[RUNS]
    cdef uint64_t index  # in `found`
    cdef bytes inline
    cdef uint8_t *content  # of a block, or of one of the two pieces of what is inline
    cdef uint64_t start, size, at  # of `content` in the directory; where in it the next entry is
    cdef uint32_t child, kind, length
    cdef const uint8_t *name
    cdef bytes shown
    cdef uint64_t end

    def __cinit__(self, Filesystem volume, uint32_t ino, uint64_t cookie):
        cdef inode_record_t told
        cdef uint32_t flags, unit = volume.fs.blocksize
        self.volume = volume
        self.ino = ino
        self.damaged = cookie & <uint64_t>DAMAGED
        self.after = cookie & ~<uint64_t>DAMAGED
        volume.read(ino, &told)
        if told.mode >> SHIFT_TYPE != DIRECTORY:
            raise NotADirectoryError(ENOTDIR, strerror(ENOTDIR))
        flags = le32(volume.raw + INODE_FLAGS)
        self.encrypted = flags & <uint32_t>FLAG_ENCRYPTED
        self.content = <uint8_t *>malloc(unit)
        if self.content == NULL:
            raise MemoryError
        if flags & <uint32_t>FLAG_INLINE_DATA:
            self.inline = volume.inline(ino)
        else:
            self.block = self.after // unit
        if told.size > LONGEST or (self.inline is not None and <uint64_t>len(self.inline) > unit):
            raise OSError(EFBIG, f"directory {ino}: longer than can be looked through")
        self.runs.found, self.runs.limit = self.found, <uint64_t>RUNS
        self.runs.end = told.size // unit + (told.size % unit != 0)

    def __dealloc__(self):
        free(self.content)

    cdef bint next(self) except -1:
        """Go on to the next entry; return whether there is one."""
        while self.at < self.size or self.load():
            if not self.take():
                self.damaged = True
                self.at = self.size
            elif self.child and self.end > self.after and self.length and not is_dots(self.name, self.length):
                if self.encrypted:
                    self.shown = self.hashed()
                    self.name, self.length = <const uint8_t *><const char *>self.shown, <uint32_t>len(self.shown)
                if is_name(self.name, self.length):
                    return True
        return False

    cdef bint take(self) noexcept:
        """Take the entry at `at` apart; return whether it is as it should be."""
        cdef const uint8_t *at = self.content + self.at
        cdef uint64_t left = self.size - self.at
        cdef uint32_t size
        if left < HEAD + 4:
            return False
        size = le16(at + 4)
        if self.volume.fs.blocksize == 65536:
            if size == 65535 or size == 0:
                size = 65536
            else:
                size = (size & <uint32_t>65532) | (size & <uint32_t>3) << 16
        self.child, self.length, self.kind, self.name = le32(at), at[6], at[7], at + HEAD
        if size % 4 or size < HEAD + 4 or size < HEAD + self.length or size > left:
            return False
        if size < left < size + HEAD + 4:
            return False
        if self.child > self.volume.fs.super.s_inodes_count:
            return False
        self.at += size
        self.end = self.start + self.at
        return True

    cdef bint load(self) except -1:
        """Read the next piece to `content`; return whether there is one. A piece that cannot be read is empty."""
        self.at = self.size = 0
        if self.inline is not None:
            return self.load_inline()
        if not self.seek():
            return False
        self.start = self.block * self.volume.fs.blocksize
        self.block += 1
        cdef run_t *run = &self.found[self.index]
        try:
            self.volume.read_block(run.block + self.block - 1 - run.start, self.content)
            if ext2fs_dir_block_csum_verify(self.volume.fs, self.ino, <ext2_dir_entry *>self.content):
                self.size = self.volume.fs.blocksize
        except OSError:
            pass
        self.damaged = self.damaged or not self.size
        return True

    cdef bint load_inline(self) except -1:
        cdef uint64_t total = <uint64_t>len(self.inline)
        cdef uint64_t start = <uint64_t>INLINE_PARENT if self.block == 0 else <uint64_t>INLINE_FIRST
        cdef uint64_t end = min(total, <uint64_t>INLINE_FIRST) if self.block == 0 else total
        if self.block > 1 or start >= end:
            return False
        self.block += 1
        self.start, self.size = start, end - start
        memcpy(self.content, <const char *>self.inline + start, self.size)
        return True

    cdef bint seek(self) except -1:
        """Go on to `block`, or to the next one that there is; return whether there is one."""
        cdef inode_record_t told
        while self.block < self.runs.end:
            while self.index < self.runs.count:
                if self.block < self.found[self.index].start:
                    self.block = self.found[self.index].start
                if self.block < self.found[self.index].start + self.found[self.index].length:
                    return self.block < self.runs.end
                self.index += 1
            self.block = max(self.block, self.runs.known)
            if self.block < self.runs.end:
                self.runs.first = self.block
                self.volume.read(self.ino, &told)
                read_runs(self.volume, self.ino, &self.runs)
                self.index = 0
                if self.runs.known <= self.runs.first and self.runs.count == 0:
                    raise OSError(EIO, f"directory {self.ino}: its map has no end")
        return False

    cdef bytes hashed(self):
        """Return the encrypted name as Linux shows it: with the hash that it would be found by."""
        cdef uint32_t major = 0, minor = 0
        cdef int version = self.volume.fs.super.s_def_hash_version
        cdef bytes name = self.name[:self.length]
        if self.volume.fs.super.s_feature_compat & <uint32_t>COMPAT_DIR_INDEX:
            if version < FIRST_UNSIGNED and self.volume.fs.super.s_flags & <uint32_t>UNSIGNED_HASH:
                version += FIRST_UNSIGNED
            ext2fs_dirhash(version, name, <int>self.length, self.volume.fs.super.s_hash_seed, &major, &minor)
        return without_key(name, major, minor)

    cdef uint64_t pack(self, char *to):
        """Pack the entry to LONGEST_ENTRY bytes at `to`; return how many it takes."""
        cdef entry_record_t entry
        cdef inode_record_t told
        cdef extent_record_t extents[FEW_EXTENTS]
        cdef uint64_t used = sizeof(entry) + sizeof(told)
        entry.extents = RECORD_UNMAPPED
        if self.volume.load(self.child, &told) != NULL:
            memset(&told, 0, sizeof(told))
            told.ino = self.child
            told.mode = TYPES[self.kind & 7] << SHIFT_TYPE
            told.error = <uint32_t>EIO
        elif told.mode >> SHIFT_TYPE == REGULAR:
            entry.extents = <uint16_t>few_extents(self.volume, &told, extents)
        if entry.extents != RECORD_UNMAPPED:
            memcpy(to + used, extents, entry.extents * sizeof(extent_record_t))
            used += entry.extents * sizeof(extent_record_t)
        memcpy(to + used, self.name, self.length)
        used += self.length
        memset(to + used, 0, 8)
        entry.cookie = self.end | (<uint64_t>DAMAGED if self.damaged else 0)
        entry.name_length = <uint16_t>self.length
        entry.length = <uint32_t>(used + 7 & ~<uint64_t>7)
        memcpy(to, &entry, sizeof(entry))
        memcpy(to + sizeof(entry), &told, sizeof(told))
        return entry.length

    cdef bint add_unproven(self, bytearray page, bint *same) except -1:
        """Pack the entry to the end of `page` if `unproven` tells it; return False if that cannot tell anything."""
        cdef char packed[LONGEST_ENTRY]
        cdef inode_record_t told
        cdef uint64_t length
        if self.volume.met_suspect or self.volume.load(self.child, &told) != NULL:
            return False
        if self.volume.is_suspect_inode(self.child):
            same[0] = False
        elif told.mode >> SHIFT_TYPE != DIRECTORY:
            return True
        length = self.pack(packed)
        page += packed[:<Py_ssize_t>length]
        return <uint64_t>len(page) <= MOST_ROOM


def entries(Filesystem volume, uint32_t ino, uint64_t cookie, uint64_t room) -> bytes:
    """Return entries after `cookie`, about `room` bytes of them and at least one; b"" after the last.

    Raises:
        OSError: EIO after the last, if some could not be read.
    """
    cdef char packed[LONGEST_ENTRY]
    cdef uint64_t length, used = 0
    cdef Listing listing = Listing(volume, ino, cookie)
    room = min(room, MOST_ROOM)
    cdef char *page = <char *>malloc(room + LONGEST_ENTRY)
    if page == NULL:
        raise MemoryError
    try:
        while listing.next():
            length = listing.pack(packed)
            if used and used + length > room:
                break
            memcpy(page + used, packed, length)
            used += length
        if not used and listing.damaged:
            raise OSError(EIO, f"directory {ino}: some of its blocks cannot be read")
        return page[:<Py_ssize_t>used]
    except OSError:
        if not used:
            raise
        return page[:<Py_ssize_t>used]
    finally:
        free(page)


cdef bytes map_of(Filesystem volume):
    """Return a digest of all that the entries of the directory depend on whose inode is loaded, but for its blocks.

    Its times are not in it: whoever lists a directory changes one.
    """
    cdef const uint8_t *raw = volume.raw
    cdef bytes told = raw[:2] + raw[4:8] + raw[INODE_FLAGS:INODE_FLAGS + 4] + raw[GENERATION:GENERATION + 4]
    return sha256(told + raw[SIZE_HIGH:SIZE_HIGH + 4] + raw[INODE_BLOCK:INODE_BLOCK + INODE_BLOCK_SIZE]).digest()


def unproven(Filesystem volume, uint32_t ino):
    """Return entries of a directory that is the same in another state of the volume, whether they are, and its map.

    They are those that are directories, and those whose inode is suspect: only if there are such, they may differ.
    The map is b"" if it is proven; else the directory is the same where it has an equal one.
    None: the directory itself may differ; or it is damaged, or too long to say so in one answer.

    Raises:
        OSError: what cannot be read of it.
    """
    cdef Listing listing
    cdef bytearray page = bytearray()
    cdef uint32_t count = 0
    cdef bint same = True
    if volume.suspects is None:
        return None
    volume.met_suspect = False
    listing = Listing(volume, ino, 0)
    cdef bytes told = map_of(volume) if volume.is_suspect_inode(ino) else b""
    # What is inline may go on in another block, which only the library knows.
    if listing.inline is not None or listing.runs.end * volume.fs.blocksize > LONGEST_PROVEN:
        return None
    while listing.next():
        count += 1
        if count > MOST_ENTRIES or not listing.add_unproven(page, &same):
            return None
    return None if listing.damaged or volume.met_suspect else (bytes(page), same, told)


def lookup(Filesystem volume, uint32_t ino, bytes name) -> int:
    """Return the inode number of `name` in a directory.

    Raises:
        OSError: ENOENT, it is not there; EIO, it may be where the directory cannot be read.
    """
    cdef Listing listing = Listing(volume, ino, 0)
    cdef const char *wanted = name
    cdef size_t length = <size_t>len(name)
    while listing.next():
        if listing.length == length and memcmp(listing.name, wanted, length) == 0:
            return listing.child
    if listing.damaged:
        raise OSError(EIO, f"directory {ino}: some of its blocks cannot be read")
    raise FileNotFoundError(ENOENT, strerror(ENOENT))
