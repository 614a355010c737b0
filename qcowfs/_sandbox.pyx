# cython: language_level=3
"""Takes every right from the calling process but to compute and to talk over the sockets that it has.

Used by inside, daemon and source/launch.py. Each step works without the others: where the kernel, a container or
the lack of root withholds one, the rest still holds. There is no way back.

The filter answers EPERM to what a library may ask in good faith (a file that it opens if it is there), and kills for
what only an attacker asks (a program, a socket, another process).
"""

import os
import resource

from qcowfs.clib.sandbox cimport (
    PR_SET_DUMPABLE, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, SIGKILL, prctl, qcowfs_drop_capabilities,
    qcowfs_landlock, qcowfs_seccomp,
)

cdef int NOBODY = 65534


def die_with_parent(bytes name):
    """Have the kernel kill this process when the thread that forked it ends; `name` is shown by ps, 15 bytes of it."""
    prctl(PR_SET_PDEATHSIG, <long>SIGKILL, 0, 0, 0)
    prctl(PR_SET_NAME, <char*>name, 0, 0, 0)


def hear_of_parents_end(int number):
    """Have the kernel send this process a signal when the thread that forked it ends; 0: none any more."""
    prctl(PR_SET_PDEATHSIG, <long>number, 0, 0, 0)


def see_only(list descriptors):
    """Have the kernel refuse this process, and the program that it becomes, every file but some.

    Args:
        descriptors: of the files and directories that may be read, and executed, with all below them; 16 at most.

    Returns whether the kernel can do that; if not, nothing happens.
    """
    cdef int places[16]
    cdef int count = <int>len(descriptors)
    cdef int i
    if count > 16:
        raise ValueError("too many places")
    for i in range(count):
        places[i] = descriptors[i]
    return prctl(PR_SET_NO_NEW_PRIVS, 1L, 0, 0, 0) == 0 and qcowfs_landlock(places, count) > 0


def confine(unsigned long long memory, unsigned long long cpu_seconds):
    """Confine this process, which has one thread and dies with its parent; return the words for what could be done.

    Args:
        memory: bytes of address space, those that are mapped already among them.
        cpu_seconds: processor time that it may take in its life.
    """
    done = []
    parent = os.getppid()
    if prctl(PR_SET_NO_NEW_PRIVS, 1L, 0, 0, 0) == 0:
        done.append("no-new-privs")
    done.extend(become_nobody())
    # Becoming somebody else has cleared the one, and given the other back, so they come after it.
    prctl(PR_SET_PDEATHSIG, <long>SIGKILL, 0, 0, 0)
    prctl(PR_SET_DUMPABLE, 0L, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)  # it ended in between, unnoticed
    abi = qcowfs_landlock(NULL, 0)
    if abi > 0:
        done.append(f"landlock-{abi}")
    done.append(limit(memory, cpu_seconds))
    if qcowfs_seccomp() == 0:
        done.append("seccomp")
    return done


cdef list become_nobody():
    done = []
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            done.append("nobody")
        except OSError:
            pass  # a user namespace that has no such user: the capabilities go all the same
    if qcowfs_drop_capabilities() == 0:
        done.append("no-capabilities")
    return done


cdef str limit(object memory, object cpu_seconds):
    limits = (
        (resource.RLIMIT_CORE, 0),  # a dump would hold the guest's data
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),  # the socket stays
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, cpu_seconds),
    )
    for name, most in limits:
        hard = resource.getrlimit(name)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))
    return "limits"
