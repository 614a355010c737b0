# malloc.h

cdef extern from *:
    """
    #include <malloc.h>
    static int qcowfs_use_one_arena(void) {
    #ifdef M_ARENA_MAX
        return mallopt(M_ARENA_MAX, 1);
    #else
        return 1; /* not the GNU C library: no arenas */
    #endif
    }
    """
    int use_one_arena "qcowfs_use_one_arena"() noexcept nogil
