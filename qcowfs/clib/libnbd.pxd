# libnbd.h: a client of NBD servers. A handle is used by one thread at a time, and its last error is that thread's.

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from "<libnbd.h>" nogil:
    struct nbd_handle:
        pass
    enum:
        LIBNBD_TLS_DISABLE
        LIBNBD_TLS_REQUIRE
        LIBNBD_ALLOW_TRANSPORT_TCP
        LIBNBD_ALLOW_TRANSPORT_UNIX
        LIBNBD_SIZE_MINIMUM
        LIBNBD_SIZE_MAXIMUM
        LIBNBD_AIO_DIRECTION_READ
        LIBNBD_AIO_DIRECTION_WRITE
        LIBNBD_STATE_ZERO
        LIBNBD_CMD_FLAG_DF
    const char* LIBNBD_CONTEXT_BASE_ALLOCATION

    ctypedef struct nbd_completion_callback:
        int (*callback)(void* user_data, int* error) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil
    ctypedef struct nbd_extent_callback:
        int (*callback)(
            void* user_data, const char* context, uint64_t offset, uint32_t* entries, size_t count, int* error,
        ) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil
    ctypedef struct nbd_chunk_callback:
        int (*callback)(
            void* user_data, const void* piece, size_t count, uint64_t offset, unsigned status, int* error,
        ) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil
    ctypedef struct nbd_list_callback:
        int (*callback)(void* user_data, const char* name, const char* description) noexcept nogil
        void* user_data
        void (*free)(void* user_data) noexcept nogil

    nbd_handle* nbd_create()
    void nbd_close(nbd_handle* handle)
    const char* nbd_get_error()
    int nbd_get_errno()
    int nbd_set_debug(nbd_handle* handle, bint debug)
    int nbd_set_tls_certificates(nbd_handle* handle, const char* directory)
    int nbd_set_tls_psk_file(nbd_handle* handle, const char* file)
    int nbd_set_opt_mode(nbd_handle* handle, bint enable)
    int nbd_set_uri_allow_transports(nbd_handle* handle, uint32_t mask)
    int nbd_set_uri_allow_tls(nbd_handle* handle, int tls)
    int nbd_set_uri_allow_local_file(nbd_handle* handle, bint allow)
    int nbd_add_meta_context(nbd_handle* handle, const char* name)

    int64_t nbd_get_size(nbd_handle* handle)
    int64_t nbd_get_block_size(nbd_handle* handle, int which)
    int nbd_can_df(nbd_handle* handle)
    int nbd_can_multi_conn(nbd_handle* handle)
    int nbd_can_meta_context(nbd_handle* handle, const char* name)

    int nbd_aio_connect_uri(nbd_handle* handle, const char* uri)
    int nbd_aio_opt_list(nbd_handle* handle, nbd_list_callback found, nbd_completion_callback done)
    int64_t nbd_aio_pread(
        nbd_handle* handle, void* buffer, size_t count, uint64_t offset, nbd_completion_callback done, uint32_t flags)
    int64_t nbd_aio_pread_structured(
        nbd_handle* handle, void* buffer, size_t count, uint64_t offset, nbd_chunk_callback came,
        nbd_completion_callback done, uint32_t flags)
    int64_t nbd_aio_block_status(
        nbd_handle* handle, uint64_t count, uint64_t offset, nbd_extent_callback found, nbd_completion_callback done,
        uint32_t flags)
    int nbd_aio_disconnect(nbd_handle* handle, uint32_t flags)
    int nbd_aio_get_fd(nbd_handle* handle)
    unsigned nbd_aio_get_direction(nbd_handle* handle)
    int nbd_aio_notify_read(nbd_handle* handle)
    int nbd_aio_notify_write(nbd_handle* handle)
    int nbd_aio_is_ready(nbd_handle* handle)
    int nbd_aio_is_negotiating(nbd_handle* handle)
    int nbd_aio_is_processing(nbd_handle* handle)
    int nbd_aio_is_dead(nbd_handle* handle)
    int nbd_aio_is_closed(nbd_handle* handle)
    # ...
