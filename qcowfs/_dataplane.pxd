# The data plane: threads that answer on the FUSE device what is asked often, and pass everything else on to pyfuse3.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._ahead cimport ahead_t
from qcowfs._handles cimport Handles, handles_t
from qcowfs._nodes cimport Nodes
from qcowfs._threads cimport thread_t
from qcowfs._interrupts cimport MOST_HOLDERS, interrupts_t
from qcowfs._treeplane cimport treeplane_t
from qcowfs.clib.pthread cimport pthread_mutex_t


cdef enum:
    MOST_WORKERS = MOST_HOLDERS  # more than the kernel reads ahead at once: some are left for others


cdef struct worker_t:
    plane_t* plane
    thread_t thread
    unsigned char* request  # REQUEST_SIZE bytes
    char* buffer  # what a read fills; made when the first read needs it
    uint64_t buffer_size


cdef struct plane_t:
    int device  # the FUSE device
    int socket  # our end of the pair whose other end pyfuse3 takes for the device
    int ended  # an eventfd: the mount is gone
    interrupts_t interrupts
    uint32_t stopping  # atomic
    uint32_t idle  # atomic; workers that wait for a request
    uint64_t init_unique  # atomic; of FUSE_INIT, until it is answered; 0: none
    handles_t* handles
    treeplane_t trees
    ahead_t ahead
    pthread_mutex_t lock  # of whoever adds a worker
    worker_t workers[MOST_WORKERS]
    uint32_t running  # atomic
    uint32_t most  # workers
    thread_t relay
    char* reply  # REPLY_SIZE bytes of the relay's


cdef class DataPlane:
    cdef plane_t c
    cdef Handles handles
    cdef Nodes nodes
    cdef int session_fd
    cdef uint32_t helpers
    cdef bint started

    cdef int take_device(self) except -1
    cdef int start_threads(self) except -1
