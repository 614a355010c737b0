# cython: language_level=3, cdivision=True
"""The data plane: what is asked often is answered on the FUSE device itself, without Python.

Used by mount.py. Workers wait for requests on the device. What they know (a READ or LSEEK of an open file, and what
`_treeplane` knows of trees inside disks) they answer there; the rest goes through a socket to pyfuse3, which takes its
end for the device, and a relay writes pyfuse3's answers to the device. docs/decisions/0006-data-plane.md says which
thread does what and what ends it.
"""

import logging
import os
import socket

from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, ENOENT, ENOMEM, ENXIO, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from cpython.ref cimport Py_DECREF, Py_INCREF
from posix.stdlib cimport posix_memalign
from posix.unistd cimport read, write

from qcowfs._ahead cimport ahead_follow, ahead_start, ahead_stop
from qcowfs._core cimport disk_has_warning, disk_read
from qcowfs._handles cimport (
    Handles, handle_end, handle_read, handle_report, handle_t, handle_warn, handles_put, handles_take,
)
from qcowfs._interrupts cimport interrupts_answer, interrupts_hold, interrupts_pass_on
from qcowfs._mapped cimport mapped_has_warning, mapped_read, mapped_seek
from qcowfs._nodes cimport Nodes
from qcowfs._reply cimport device_reply, device_result
from qcowfs._seek cimport disk_seek
from qcowfs._tables cimport fault_t
from qcowfs._threads cimport thread_start, thread_stop
from qcowfs._treeplane cimport NOT_OURS, tree_answer, tree_list, tree_may_wait, tree_waited
from qcowfs.clib.atomic cimport (
    atomic_add, atomic_load, atomic_load_64, atomic_store, atomic_store_64, atomic_subtract,
)
from qcowfs.clib.fuse_device cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, MSG_NOSIGNAL, SHUT_RDWR, eventfd, eventfd_write, recv, send, shutdown,
)
from qcowfs.clib.fuse_kernel cimport (
    FUSE_AUTO_INVAL_DATA, FUSE_INIT, FUSE_INTERRUPT, FUSE_LSEEK, FUSE_MAX_PAGES, FUSE_READ, FUSE_READDIR,
    FUSE_READDIRPLUS, FUSE_READDIRPLUS_AUTO, fuse_in_header, fuse_init_out, fuse_lseek_in, fuse_lseek_out,
    fuse_out_header, fuse_read_in,
)
from qcowfs.clib.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from qcowfs.clib.unistd cimport SEEK_DATA, SEEK_HOLE

cdef enum:
    # Bytes of one READ. With 1 MiB one worker answers what two can share (sequential 4.0 GiB/s, with 512 KiB 5.4); with
    # 128 KiB compressed reads are cut so small that their workers wait for each other (zlib 1,000 to 800 MiB/s).
    LARGEST_READ = 512 << 10
    LARGEST_WRITE = 4096  # nothing is written here: only the kernel's least, so that requests stay small
    REQUEST_SIZE = 72 << 10  # bytes; the largest request is a SETXATTR of 64 KiB, which is refused
    LARGEST_LISTING = 128 << 10  # bytes of names in one answer: an unprivileged socket takes no message much longer
    REPLY_SIZE = 512 << 10  # bytes; larger than any answer of pyfuse3
    BACKGROUND = 64  # reads ahead that the kernel may have under way; libfuse would say 12
    FIRST_WORKERS = 2
    PAGE = 4096

logger = logging.getLogger("qcowfs.dataplane")


cdef class DataPlane:
    """Threads between the FUSE device and pyfuse3, from `start` to `stop`.

    Args:
        session_fd: the descriptor that pyfuse3 has of the device; it must have asked nothing yet.
        handles: the open files; OPEN answers with one of its numbers.
        nodes: what is known of the inodes of trees.
        workers: threads at most that answer requests; there are as many as are ever busy at once.
        helpers: threads that decompress ahead.
        interruptible: requests may take long, so that a signal ends them. Where they do not, it does not: many programs
            do not expect EINTR from a file.
    """

    def __cinit__(
            self, int session_fd, Handles handles not None, Nodes nodes not None, uint32_t workers, uint32_t helpers,
            bint interruptible=False):
        self.handles = handles
        self.nodes = nodes
        self.session_fd = session_fd
        self.c.device = self.c.socket = self.c.ended = -1
        self.c.handles = &self.handles.c
        self.c.most = max(<uint32_t>FIRST_WORKERS, min(workers, <uint32_t>MOST_WORKERS))
        self.c.trees.handles = &self.handles.c
        self.c.trees.nodes = &self.nodes.c
        self.c.trees.most_waiting = self.c.most // 2
        self.c.interrupts.wanted = interruptible
        self.helpers = helpers

    def fileno(self):
        """Return a descriptor that becomes readable when the mount is gone."""
        return self.c.ended

    @property
    def workers(self):
        """Threads that answer requests, at this moment."""
        return atomic_load(&self.c.running)

    def start(self):
        """Take the device from pyfuse3 and begin to answer.

        Raises:
            OSError: no descriptors or threads are to be had; pyfuse3 has the device as before.
        """
        try:
            self.take_device()
            self.start_threads()
        except BaseException:
            self.stop()
            raise

    def stop(self):
        """Let all threads end, whether the mount is gone or not, and give the device back to pyfuse3."""
        cdef uint32_t number
        if self.started:
            self.started = False
            with nogil:
                stop_threads(&self.c)
            Py_DECREF(self)
        for number in range(<uint32_t>MOST_WORKERS):
            free(self.c.workers[number].request)
            free(self.c.workers[number].buffer)
            self.c.workers[number].request = NULL
            self.c.workers[number].buffer = NULL
        free(self.c.reply)
        self.c.reply = NULL
        if self.c.socket >= 0:
            os.dup2(self.c.device, self.session_fd, inheritable=False)
        for descriptor in (self.c.device, self.c.socket, self.c.ended):
            if descriptor >= 0:
                os.close(descriptor)
        self.c.device = self.c.socket = self.c.ended = -1

    cdef int take_device(self) except -1:
        self.c.ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if self.c.ended < 0:
            raise OSError(errno, os.strerror(errno))
        self.c.device = self.c.trees.device = os.dup(self.session_fd)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (ours, theirs):  # the default is the administrator's, and refuses what is larger
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPLY_SIZE)
            self.c.socket = ours.detach()
            os.dup2(theirs.fileno(), self.session_fd, inheritable=False)
        return 0

    cdef int start_threads(self) except -1:
        cdef int status
        self.c.reply = <char*>malloc(REPLY_SIZE)
        if self.c.reply == NULL:
            raise MemoryError()
        pthread_mutex_init(&self.c.lock, NULL)
        status = ahead_start(&self.c.ahead, self.c.handles, self.helpers)
        if status == 0:
            status = thread_start(&self.c.relay, relay, &self.c)
            if status:
                ahead_stop(&self.c.ahead)
        if status:
            pthread_mutex_destroy(&self.c.lock)
            raise OSError(status, os.strerror(status))
        self.started = True
        Py_INCREF(self)  # for the threads
        while atomic_load(&self.c.running) < FIRST_WORKERS:
            # The first worker may have a request already, and be quicker to add the others.
            if not add_worker(&self.c) and atomic_load(&self.c.running) < FIRST_WORKERS:
                raise OSError(EAGAIN, os.strerror(EAGAIN))
        return 0


cdef void stop_threads(plane_t* plane) noexcept nogil:
    cdef uint32_t number
    pthread_mutex_lock(&plane.lock)
    atomic_store(&plane.stopping, 1)  # from now on no worker is added
    pthread_mutex_unlock(&plane.lock)
    for number in range(atomic_load(&plane.running)):
        thread_stop(&plane.workers[number].thread)
    shutdown(plane.socket, SHUT_RDWR)
    thread_stop(&plane.relay)
    ahead_stop(&plane.ahead)
    atomic_store(&plane.running, 0)
    pthread_mutex_destroy(&plane.lock)


cdef bint add_worker(plane_t* plane) noexcept nogil:
    cdef worker_t* worker
    cdef bint added = False
    pthread_mutex_lock(&plane.lock)
    if atomic_load(&plane.running) < plane.most and not atomic_load(&plane.stopping):
        worker = &plane.workers[atomic_load(&plane.running)]
        worker.plane = plane
        if worker.request == NULL:  # else it was made by the last try, which got no thread
            worker.request = <unsigned char*>malloc(REQUEST_SIZE)
        added = worker.request != NULL and thread_start(&worker.thread, work, worker) == 0
        if added:
            atomic_add(&plane.running, 1)
    pthread_mutex_unlock(&plane.lock)
    return added


cdef void work(void* argument) noexcept nogil:
    """A worker's life: until it is stopped, or the mount is gone."""
    cdef worker_t* worker = <worker_t*>argument
    cdef plane_t* plane = worker.plane
    cdef Py_ssize_t got
    while not atomic_load(&plane.stopping):
        atomic_add(&plane.idle, 1)
        got = read(plane.device, worker.request, REQUEST_SIZE)
        # While nobody waits for requests, one slow read could keep all others waiting.
        if atomic_subtract(&plane.idle, 1) == 0 and got > 0 and atomic_load(&plane.running) < plane.most:
            add_worker(plane)
        if got >= <Py_ssize_t>sizeof(fuse_in_header):
            if not interrupts_hold(
                    &plane.interrupts, <uint32_t>(worker - plane.workers), plane.device,
                    <fuse_in_header*>worker.request):
                answer(worker, <fuse_in_header*>worker.request, <size_t>got)
        elif got < 0 and errno != EINTR and errno != EAGAIN and errno != ENOENT:  # ENOENT: it was interrupted just now
            eventfd_write(plane.ended, 1)  # ENODEV: unmounted; ECONNABORTED: aborted by a person
            return


cdef void answer(worker_t* worker, fuse_in_header* request, size_t length) noexcept nogil:
    cdef plane_t* plane = worker.plane
    if request.opcode == FUSE_READ and length >= sizeof(fuse_in_header) + sizeof(fuse_read_in):
        if answer_read(worker, request, <fuse_read_in*>(request + 1)):
            return
    elif request.opcode == FUSE_LSEEK and length >= sizeof(fuse_in_header) + sizeof(fuse_lseek_in):
        if answer_seek(plane, request, <fuse_lseek_in*>(request + 1)):
            return
    elif request.opcode == FUSE_INTERRUPT:  # pyfuse3 does not know all requests
        interrupts_answer(&plane.interrupts, plane.device, request, length)
        return
    elif request.opcode == FUSE_INIT:
        atomic_store_64(&plane.init_unique, request.unique)
    elif (request.opcode == FUSE_READDIR or request.opcode == FUSE_READDIRPLUS) and (
            length >= sizeof(fuse_in_header) + sizeof(fuse_read_in)):
        if answer_listing(worker, request, <fuse_read_in*>(request + 1)):
            return
    elif tree_answer(&plane.trees, request, length):
        return
    interrupts_pass_on(&plane.interrupts, request)
    while send(plane.socket, request, length, MSG_NOSIGNAL) < 0:
        if errno != EINTR:  # no memory, say: who asked would wait for ever; where nobody did, the kernel drops it
            device_reply(plane.device, request, EIO, NULL, 0)
            return
        if atomic_load(&plane.stopping):
            return


cdef bint answer_read(worker_t* worker, const fuse_in_header* request, const fuse_read_in* wanted) noexcept nogil:
    """Answer, or return False: it is not for us."""
    cdef plane_t* plane = worker.plane
    cdef handle_t* handle = handles_take(plane.handles, wanted.fh)
    cdef int64_t got
    if handle == NULL:
        return False
    if handle.made and not tree_may_wait(&plane.trees):
        handles_put(plane.handles, handle)
        return False
    if wanted.size > LARGEST_READ or not have_buffer(worker, wanted.size):
        got = -ENOMEM
    elif handle.disk != NULL or handle.mapped != NULL:
        got = read_stored(plane, handle, worker.buffer, wanted.size, wanted.offset)
    else:
        got = handle_read(handle, worker.buffer, wanted.size, wanted.offset)
    if handle.made:
        tree_waited(&plane.trees)
    device_result(plane.device, request, got, worker.buffer)
    handles_put(plane.handles, handle)
    return True


cdef bint answer_listing(worker_t* worker, const fuse_in_header* request, fuse_read_in* wanted) noexcept nogil:
    """Answer, or return False: it is not for us."""
    cdef plane_t* plane = worker.plane
    cdef int64_t got = -ENOMEM
    wanted.size = min(wanted.size, <uint32_t>LARGEST_LISTING)
    if have_buffer(worker, wanted.size):
        got = tree_list(
            &plane.trees, wanted.fh, wanted.offset, request.opcode == FUSE_READDIRPLUS, worker.buffer, wanted.size)
    if got == NOT_OURS:
        return False
    device_result(plane.device, request, got, worker.buffer)
    return True


cdef bint have_buffer(worker_t* worker, uint64_t size) noexcept nogil:
    cdef void* buffer
    if worker.buffer_size >= size:
        return True
    # It begins with a page. malloc's begin 16 bytes later, and some processors copy to there at a third of the speed.
    if posix_memalign(&buffer, PAGE, size):
        return False
    free(worker.buffer)
    worker.buffer = <char*>buffer
    worker.buffer_size = size
    return True


cdef int64_t read_stored(
    plane_t* plane, handle_t* handle, char* buffer, uint64_t size, uint64_t offset) noexcept nogil:
    cdef uint64_t end = handle.disk.virtual_size if handle.disk != NULL else handle.mapped.size
    cdef fault_t fault
    cdef uint32_t number = 0
    cdef int status
    cdef bint warning
    if offset >= end:
        return 0
    size = min(size, end - offset)
    if handle.disk != NULL:
        if atomic_load(&handle.disk.compressed):
            ahead_follow(&plane.ahead, handle, offset, offset + size)
        status = disk_read(handle.disk, buffer, offset, size, &fault)
        warning = disk_has_warning(handle.disk)
    else:
        status = mapped_read(handle.mapped, buffer, offset, size, &fault, &number)
        warning = mapped_has_warning(handle.mapped)
    if warning:
        handle_warn(handle)
    if status == 0:
        return <int64_t>size
    handle_report(handle, &fault, number)
    return -fault.error if fault.error > 0 else -EIO


cdef bint answer_seek(plane_t* plane, const fuse_in_header* request, const fuse_lseek_in* wanted) noexcept nogil:
    """Answer, or return False: it is not for us.

    ENOSYS must never be the answer: the kernel would not ask again, of no file of this mount.
    """
    cdef handle_t* handle = handles_take(plane.handles, wanted.fh)
    cdef fuse_lseek_out found
    cdef bint data = wanted.whence == <uint32_t>SEEK_DATA
    cdef int error
    if handle == NULL:
        return False
    if not data and wanted.whence != <uint32_t>SEEK_HOLE:
        error = EINVAL
    elif handle.disk != NULL:
        error = disk_seek(handle.disk, wanted.offset, handle.disk.virtual_size, data, &found.offset)
    elif handle.mapped != NULL:
        error = mapped_seek(handle.mapped, wanted.offset, data, &found.offset)
    else:
        error = seek_in_data(handle, wanted.offset, data, &found.offset)
    if error:
        device_reply(plane.device, request, error, NULL, 0)
    else:
        device_reply(plane.device, request, 0, &found, sizeof(found))
    handles_put(plane.handles, handle)
    return True


cdef int seek_in_data(handle_t* handle, uint64_t offset, bint data, uint64_t* found) noexcept nogil:
    """A disk that another process is writing has no holes: they could be filled before they are used."""
    cdef int64_t end = handle_end(handle)
    if end < 0:
        return <int>-end
    if offset >= <uint64_t>end:
        return ENXIO
    found[0] = offset if data else <uint64_t>end
    return 0


cdef void relay(void* argument) noexcept nogil:
    """Write to the device what pyfuse3 says, until the socket is shut down."""
    cdef plane_t* plane = <plane_t*>argument
    cdef fuse_out_header* header = <fuse_out_header*>plane.reply
    cdef Py_ssize_t got
    while True:
        got = recv(plane.socket, plane.reply, REPLY_SIZE, 0)
        if got <= 0:
            if got < 0 and errno == EINTR and not atomic_load(&plane.stopping):
                continue
            return
        if got >= <Py_ssize_t>(sizeof(fuse_out_header) + sizeof(fuse_init_out)) and header.error == 0 and (
                header.unique == atomic_load_64(&plane.init_unique)):
            atomic_store_64(&plane.init_unique, 0)
            amend_init(<fuse_init_out*>(header + 1))
        write(plane.device, plane.reply, <size_t>got)


cdef void amend_init(fuse_init_out* answer) noexcept nogil:
    """Say of this mount what libfuse cannot know: reads are large and many, writes are none, files do not change."""
    answer.flags &= ~<uint32_t>FUSE_AUTO_INVAL_DATA  # with it the kernel asks for attributes before it reads
    answer.flags &= ~<uint32_t>FUSE_READDIRPLUS_AUTO  # with it the kernel looks every second name up by itself
    answer.max_write = LARGEST_WRITE
    answer.max_background = BACKGROUND
    answer.congestion_threshold = BACKGROUND * 3 // 4
    if answer.flags & FUSE_MAX_PAGES:
        answer.max_pages = <uint16_t>(LARGEST_READ // page_size)


cdef int64_t page_size = os.sysconf("SC_PAGESIZE")
