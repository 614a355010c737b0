# cython: language_level=3, cdivision=True
# distutils: libraries = nbd
"""Exports of NBD servers as sources.

Used by source/nbd. Readers queue what they want (_requests), and one thread gets it (_nbdserve).
"""

from libc.errno cimport EINTR, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, strncpy
from cpython.exc cimport PyErr_CheckSignals

from qcowfs._nbdlink cimport link_close, link_open, link_step, link_t
from qcowfs._nbdserve cimport extents_find, nbd_serve, nbd_turn, service_t
from qcowfs._queue cimport monotonic
from qcowfs._requests cimport QueuedSource, queue_read, queue_status
from qcowfs._source cimport source_t
from qcowfs.clib.libnbd cimport nbd_aio_opt_list, nbd_completion_callback, nbd_list_callback
from qcowfs.clib.pthread cimport pthread_mutex_destroy, pthread_mutex_init

cdef enum:
    PIECE = 1 << 20  # bytes of one command
    MOST_LISTED = 32
    NAME_SIZE = 128


cdef struct listed_t:
    bint done
    uint32_t count
    char names[MOST_LISTED][NAME_SIZE]


cdef class NbdSource(QueuedSource):
    """An export of an NBD server, once `connect` returned.

    Args:
        name: for messages.
        uri: for libnbd; names no file but the socket.
        patience: seconds that one read may take, and opening.
        where: what `place` answers.
        tls: whether the connection has to be encrypted.
        certificates: a directory with ca-cert.pem in it; None: without.
        keys: a file of pre-shared keys; None: without.
    """

    def __init__(self, str name, bytes uri, double patience, where, *, bint tls, bytes certificates, bytes keys):
        QueuedSource.__init__(self, name, patience, PIECE)
        pthread_mutex_init(&self.service.extents.mutex, NULL)
        self.uri, self.certificates, self.keys, self.where = uri, certificates, keys, where
        self.service.queue = &self.queue
        self.service.server.uri = uri
        if certificates is not None:
            self.service.server.certificates = certificates
        if keys is not None:
            self.service.server.keys = keys
        self.service.server.tls = tls
        self.service.ill = -1
        self.c.state = &self.service

    def connect(self):
        """Connect.

        Raises:
            OSError: the server cannot be reached, or refuses; with its words.
        """
        cdef uint64_t largest
        self.reach(&self.service.link, False)
        largest = min(<uint64_t>PIECE, <uint64_t>self.service.link.largest)
        self.queue.largest = largest - largest % self.service.link.smallest
        self.service.size = self.c.room = self.service.link.size
        self.service.smallest = self.service.link.smallest
        self.service.tells_extents = self.service.link.tells_extents
        self.c.pread = nbd_pread
        self.c.status = nbd_status
        self.serve(nbd_serve, nbd_turn, &self.service)

    def expect_qemu(self, int event):
        """Know, before `connect`, that the server is QEMU, in a process of ours.

        Args:
            event: an eventfd that is written to when it answers a read with an error, or not at all: then another one
                is put in its place, which is asked again. -1: there is no other.
        """
        self.service.is_qemu = True
        self.service.ill = event

    @property
    def several(self):
        """Whether the server lets more than one connection read this export."""
        return self.service.link.several

    @property
    def facts(self):
        """Size of the export, and the least and the most of it that is asked for at once, in bytes."""
        return self.service.size, self.service.smallest, self.queue.largest

    def exports(self, uint32_t most):
        """Return the names of the server's exports, `most` of them at most, over a connection for just that.

        Raises:
            OSError: the server does not say.
        """
        cdef link_t link
        cdef listed_t listed
        cdef uint32_t i
        self.reach(&link, True)
        with nogil:
            list_exports(self, &link, &listed, monotonic() + self.queue.patience)
        return [(<bytes>listed.names[i]).decode("utf-8", "replace") for i in range(min(listed.count, most))]

    cdef int reach(self, link_t* link, bint listing) except -1:
        cdef int64_t deadline = monotonic() + self.queue.patience
        cdef int status = -EINTR
        while status == -EINTR:
            with nogil:
                status = link_open(link, &self.service.server, &self.queue, deadline, listing)
            PyErr_CheckSignals()
        if status < 0:
            raise OSError(-status, (<bytes>link.reason).decode("utf-8", "replace"), self.name)
        return 0

    def place(self):
        return self.where

    def __dealloc__(self):
        if self.ready:
            self.stop()
            link_close(&self.service.link)
            pthread_mutex_destroy(&self.service.extents.mutex)


cdef void list_exports(NbdSource source, link_t* link, listed_t* listed, int64_t deadline) noexcept nogil:
    cdef nbd_list_callback found
    cdef nbd_completion_callback done
    listed.count = 0
    listed.done = False
    found.callback = found_export
    found.user_data = listed
    found.free = NULL
    done.callback = found_all
    done.user_data = listed
    done.free = NULL
    if nbd_aio_opt_list(link.handle, found, done) == 0:
        while not listed.done and monotonic() < deadline and link_step(link, &source.queue, deadline) == 0:
            pass
    link_close(link)


cdef int found_export(void* argument, const char* name, const char* description) noexcept nogil:
    cdef listed_t* listed = <listed_t*>argument
    if listed.count < MOST_LISTED:
        strncpy(listed.names[listed.count], name, NAME_SIZE - 1)
        listed.names[listed.count][NAME_SIZE - 1] = 0
        listed.count += 1
    return 0


cdef int found_all(void* argument, int* error) noexcept nogil:
    (<listed_t*>argument).done = True
    return 1


cdef int64_t nbd_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef service_t* service = <service_t*>source.state
    cdef uint64_t mask = service.smallest - 1
    if offset >= source.room:
        return 0
    length = min(length, source.room - offset)
    if ((offset | length) & mask) == 0 or length == 0:
        return queue_read(service.queue, <char*>buffer, length, offset)
    return unaligned_pread(service, <char*>buffer, length, offset)


cdef int64_t unaligned_pread(service_t* service, char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """Read whole blocks, the server answers no less, and copy the part."""
    cdef uint64_t mask = service.smallest - 1
    cdef uint64_t start = offset & ~mask
    cdef uint64_t end = min((offset + length + mask) & ~mask, service.size)
    cdef char* blocks = <char*>malloc(end - start)
    cdef int64_t got = -ENOMEM
    if blocks != NULL:
        got = queue_read(service.queue, blocks, end - start, start)
    if got >= 0:
        memcpy(buffer, blocks + (offset - start), length)
        got = <int64_t>length
    free(blocks)
    return got


cdef int nbd_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef service_t* service = <service_t*>source.state
    cdef int answer
    if offset >= source.room:
        return 0
    length[0] = min(length[0], source.room - offset)
    if not service.tells_extents:
        return 1
    answer = extents_find(&service.extents, offset, length)
    if answer < 0:
        answer = queue_status(service.queue, offset, length)
    return 1 if answer < 0 else answer  # all of it data: reading it tells the truth
