# Atomics of the compiler (GCC and Clang). The names are the builtins', the memory order is always the strongest: no
# counter here is hot enough for a weaker one to show.

from libc.stdint cimport uint32_t, uint64_t

cdef extern from *:
    """
    #define qcowfs_atomic_load(place) __atomic_load_n(place, __ATOMIC_SEQ_CST)
    #define qcowfs_atomic_store(place, value) __atomic_store_n(place, value, __ATOMIC_SEQ_CST)
    #define qcowfs_atomic_add(place, value) __atomic_add_fetch(place, value, __ATOMIC_SEQ_CST)
    #define qcowfs_atomic_subtract(place, value) __atomic_sub_fetch(place, value, __ATOMIC_SEQ_CST)
    #define qcowfs_atomic_exchange(place, value) __atomic_exchange_n(place, value, __ATOMIC_SEQ_CST)
    """
    uint32_t atomic_load "qcowfs_atomic_load"(const uint32_t* place) noexcept nogil
    void atomic_store "qcowfs_atomic_store"(uint32_t* place, uint32_t value) noexcept nogil
    uint32_t atomic_exchange "qcowfs_atomic_exchange"(uint32_t* place, uint32_t value) noexcept nogil  # the old value
    # Both return the new value.
    uint32_t atomic_add "qcowfs_atomic_add"(uint32_t* place, uint32_t value) noexcept nogil
    uint32_t atomic_subtract "qcowfs_atomic_subtract"(uint32_t* place, uint32_t value) noexcept nogil

    uint64_t atomic_load_64 "qcowfs_atomic_load"(const uint64_t* place) noexcept nogil
    void atomic_store_64 "qcowfs_atomic_store"(uint64_t* place, uint64_t value) noexcept nogil
    uint64_t atomic_add_64 "qcowfs_atomic_add"(uint64_t* place, uint64_t value) noexcept nogil
