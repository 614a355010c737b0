# futex(2): wait until a word of memory is no longer 0, by CLOCK_MONOTONIC. Unlike a condition variable it needs no
# mutex, which the thread that is woken would find taken by the one that wakes it.

from libc.stdint cimport uint32_t
from posix.time cimport timespec

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>
    static inline long qcowfs_futex_wait(const uint32_t* word, const struct timespec* until) {
        return syscall(SYS_futex, word, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, 0, until, NULL, FUTEX_BITSET_MATCH_ANY);
    }
    static inline void qcowfs_futex_wake(const uint32_t* word) {
        syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, 1, NULL, NULL, 0);
    }
    """
    # Returns -1 with errno ETIMEDOUT, once it is later than `until` (NULL: never), or for no reason at all.
    long futex_wait "qcowfs_futex_wait"(const uint32_t* word, const timespec* until) noexcept nogil
    # `word` may be gone by now: the one that was waiting may have seen before that it is not 0.
    void futex_wake "qcowfs_futex_wake"(const uint32_t* word) noexcept nogil
