# libiscsi 1.18 or later: what reads one logical unit by asynchronous calls.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "<iscsi/scsi-lowlevel.h>" nogil:
    enum:
        SCSI_RESIDUAL_NO_RESIDUAL
        SCSI_SENSE_NO_SENSE
        SCSI_SENSE_RECOVERED_ERROR
        SCSI_SENSE_NOT_READY
        SCSI_SENSE_ILLEGAL_REQUEST
        SCSI_SENSE_UNIT_ATTENTION
        SCSI_SENSE_COMMAND_ABORTED
        SCSI_SENSE_ASCQ_LOGICAL_UNIT_NOT_SUPPORTED
        SCSI_SENSE_ASCQ_CAPACITY_DATA_HAS_CHANGED
        SCSI_SENSE_ASCQ_INQUIRY_DATA_HAS_CHANGED

    struct scsi_sense:
        int key
        int ascq
        # ...
    struct scsi_data:
        int size
        unsigned char* data
    struct scsi_task:
        int residual_status
        scsi_sense sense
        scsi_data datain
        # ...
    struct scsi_iovec:
        void* iov_base
        size_t iov_len

    void scsi_free_scsi_task(scsi_task* task)
    const char* scsi_sense_key_str(int key)
    const char* scsi_sense_ascq_str(int ascq)

cdef extern from "<iscsi/iscsi.h>" nogil:
    enum:
        ISCSI_SESSION_NORMAL
        ISCSI_HEADER_DIGEST_NONE
        ISCSI_HEADER_DIGEST_NONE_CRC32C
        ISCSI_HEADER_DIGEST_CRC32C
        SCSI_STATUS_GOOD
        SCSI_STATUS_CHECK_CONDITION
        SCSI_STATUS_BUSY
        SCSI_STATUS_RESERVATION_CONFLICT
        SCSI_STATUS_TASK_SET_FULL
        SCSI_STATUS_ACA_ACTIVE
        SCSI_STATUS_TASK_ABORTED
        SCSI_STATUS_CANCELLED
        SCSI_STATUS_ERROR

    struct iscsi_context:
        pass
    ctypedef void (*iscsi_command_cb)(iscsi_context* iscsi, int status, void* command_data, void* private_data) noexcept
    ctypedef int session_type_t "enum iscsi_session_type"
    ctypedef int header_digest_t "enum iscsi_header_digest"

    iscsi_context* iscsi_create_context(const char* initiator_name)
    int iscsi_destroy_context(iscsi_context* iscsi)
    int iscsi_set_targetname(iscsi_context* iscsi, const char* targetname)
    int iscsi_set_session_type(iscsi_context* iscsi, session_type_t session_type)
    int iscsi_set_header_digest(iscsi_context* iscsi, header_digest_t header_digest)
    int iscsi_set_initiator_username_pwd(iscsi_context* iscsi, const char* user, const char* password)
    int iscsi_set_target_username_pwd(iscsi_context* iscsi, const char* user, const char* password)
    void iscsi_set_noautoreconnect(iscsi_context* iscsi, int state)
    const char* iscsi_get_error(iscsi_context* iscsi)

    int iscsi_get_fd(iscsi_context* iscsi)
    int iscsi_which_events(iscsi_context* iscsi)
    int iscsi_service(iscsi_context* iscsi, int revents)
    int iscsi_get_nops_in_flight(iscsi_context* iscsi)

    # They return 0 if `cb` will be called.
    int iscsi_full_connect_async(
        iscsi_context* iscsi, const char* portal, int lun, iscsi_command_cb cb, void* private_data)
    int iscsi_logout_async(iscsi_context* iscsi, iscsi_command_cb cb, void* private_data)
    int iscsi_nop_out_async(
        iscsi_context* iscsi, iscsi_command_cb cb, unsigned char* data, int len, void* private_data)

    # They return NULL if `cb` will not be called.
    scsi_task* iscsi_inquiry_task(
        iscsi_context* iscsi, int lun, int evpd, int page_code, int maxsize, iscsi_command_cb cb, void* private_data)
    scsi_task* iscsi_readcapacity16_task(iscsi_context* iscsi, int lun, iscsi_command_cb cb, void* private_data)
    scsi_task* iscsi_read16_iov_task(
        iscsi_context* iscsi, int lun, uint64_t lba, uint32_t datalen, int blocksize, int rdprotect, int dpo, int fua,
        int fua_nv, int group_number, iscsi_command_cb cb, void* private_data, scsi_iovec* iov, int niov)
    scsi_task* iscsi_get_lba_status_task(
        iscsi_context* iscsi, int lun, uint64_t starting_lba, uint32_t alloc_len, iscsi_command_cb cb,
        void* private_data)
    # ...
