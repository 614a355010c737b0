# cython: language_level=3, cdivision=True
"""Threads that never run Python code of their own.

Used by what has threads of its own: the data plane, its helpers, sources on servers. They take no signals but one,
which does nothing and is there to interrupt a system call: a thread that waits for the FUSE device has no other way to
hear that it shall end. Start and stop: any thread.
"""

from posix.time cimport nanosleep, timespec

from qcowfs.clib.atomic cimport atomic_load, atomic_store
from qcowfs.clib.malloc cimport use_one_arena
from qcowfs.clib.pthread cimport (
    SIG_SETMASK, SIGRTMAX, pthread_attr_destroy, pthread_attr_init, pthread_attr_setstacksize, pthread_attr_t,
    pthread_create, pthread_join, pthread_kill, pthread_sigmask, sigaction, sigaction_t, sigdelset, sigfillset,
    sigset_t,
)

cdef enum:
    STACK_SIZE = 256 << 10  # bytes; the deepest path, a range of a chain being resolved, takes some 12 KiB
    WAIT_NS = 1000000  # between two interruptions

# Before the first thread, which would have an arena of its own from then on. What one thread puts into a cache another
# one throws out, so an arena for each is mostly holes: 4 KiB random reads of zlib with a cache of 32 MiB took 111 MiB;
# with one arena it is 65 MiB, and no slower. And each but the first grows by just what is asked for: a system call for
# every page that a random reader got from a server, a tenth of what the page costs.
use_one_arena()

cdef void do_nothing(int number) noexcept nogil:
    pass


cdef sigaction_t action  # all zero: without SA_RESTART, which would put the interrupted call back
action.sa_handler = do_nothing
sigaction(SIGRTMAX, &action, NULL)


cdef int thread_start(thread_t* thread, void (*work)(void*) noexcept nogil, void* argument) noexcept nogil:
    cdef pthread_attr_t attributes
    cdef sigset_t blocked
    cdef sigset_t before
    cdef int status
    thread.work = work
    thread.argument = argument
    atomic_store(&thread.ended, 0)
    sigfillset(&blocked)
    sigdelset(&blocked, SIGRTMAX)
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, STACK_SIZE)
    pthread_sigmask(SIG_SETMASK, &blocked, &before)  # a thread begins with the mask of the one that makes it
    status = pthread_create(&thread.id, &attributes, run, thread)
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    pthread_attr_destroy(&attributes)
    return status


cdef void* run(void* argument) noexcept nogil:
    cdef thread_t* thread = <thread_t*>argument
    thread.work(thread.argument)
    atomic_store(&thread.ended, 1)
    return NULL


cdef void thread_stop(thread_t* thread) noexcept nogil:
    # A signal that comes just before the system call is lost, so one is not enough.
    cdef timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = WAIT_NS
    while not atomic_load(&thread.ended):
        pthread_kill(thread.id, SIGRTMAX)
        nanosleep(&pause, NULL)
    pthread_join(thread.id, NULL)
