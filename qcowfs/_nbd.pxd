# An export of an NBD server as a source.

from qcowfs._nbdlink cimport link_t
from qcowfs._nbdserve cimport service_t
from qcowfs._requests cimport QueuedSource


cdef class NbdSource(QueuedSource):
    cdef service_t service
    cdef bytes uri  # the three that service.server points to
    cdef bytes certificates
    cdef bytes keys
    cdef object where
    cdef int reach(self, link_t* link, bint listing) except -1
