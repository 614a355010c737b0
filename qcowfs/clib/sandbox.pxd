# System calls and constants that take rights away from the calling process. Used by _sandbox.pyx.
# Landlock has no functions in the C library, and its newer bits none in older headers: numbers of the kernel's ABI.

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, ...)
    int PR_SET_PDEATHSIG
    int PR_SET_DUMPABLE
    int PR_SET_NAME
    int PR_SET_NO_NEW_PRIVS

cdef extern from "<signal.h>" nogil:
    int SIGKILL

cdef extern from *:
    """
    #include <stddef.h>
    #include <stdint.h>
    #include <unistd.h>
    #include <errno.h>
    #include <sys/syscall.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <sys/prctl.h>
    #include <linux/audit.h>
    #include <linux/capability.h>
    #include <linux/filter.h>
    #include <linux/seccomp.h>

    #if defined(__x86_64__)
    #define QCOWFS_ARCH AUDIT_ARCH_X86_64
    #elif defined(__aarch64__)
    #define QCOWFS_ARCH AUDIT_ARCH_AARCH64
    #else
    #define QCOWFS_ARCH 0
    #endif
    #ifndef SECCOMP_RET_KILL_PROCESS
    #define SECCOMP_RET_KILL_PROCESS 0x80000000U
    #endif

    #define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, (uint32_t)offsetof(struct seccomp_data, field))
    #define END(action) BPF_STMT(BPF_RET | BPF_K, (action))
    #define ON(name, action) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)SYS_##name, 0, 1), END(action)
    #define ALLOW(name) ON(name, SECCOMP_RET_ALLOW)
    #define KILL(name) ON(name, SECCOMP_RET_KILL_PROCESS)
    /* The third argument's low word: memory may be had, but none that code could be put into. */
    #define ALLOW_WITHOUT_EXEC(name) \
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (uint32_t)SYS_##name, 0, 4), \
        LOAD(args[2]), \
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 0, 1), \
        END(SECCOMP_RET_ERRNO | EPERM), \
        END(SECCOMP_RET_ALLOW)

    static struct sock_filter qcowfs_filter[] = {
        LOAD(arch),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, QCOWFS_ARCH, 1, 0),
        END(SECCOMP_RET_KILL_PROCESS),
        LOAD(nr),
        BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, 0x40000000U, 0, 1), /* x32: other numbers for the same calls */
        END(SECCOMP_RET_KILL_PROCESS),
        ALLOW(read), ALLOW(write), ALLOW(recvfrom), ALLOW(recvmsg), ALLOW(sendto), ALLOW(sendmsg),
        ALLOW(close), ALLOW(munmap), ALLOW(mremap), ALLOW(brk), ALLOW(madvise), ALLOW(futex),
        ALLOW_WITHOUT_EXEC(mmap), ALLOW_WITHOUT_EXEC(mprotect),
        ALLOW(clock_gettime), ALLOW(clock_getres), ALLOW(gettimeofday), ALLOW(getrandom), ALLOW(setitimer),
        ALLOW(rt_sigaction), ALLOW(rt_sigprocmask), ALLOW(rt_sigreturn), ALLOW(restart_syscall),
        ALLOW(exit), ALLOW(exit_group),
        KILL(execve), KILL(execveat), KILL(ptrace), KILL(process_vm_readv), KILL(process_vm_writev),
        KILL(socket), KILL(clone), KILL(clone3),
    #ifdef SYS_fork
        KILL(fork), KILL(vfork),
    #endif
        KILL(kill), KILL(tkill), KILL(mount), KILL(unshare), KILL(setns), KILL(bpf), KILL(io_uring_setup),
        END(SECCOMP_RET_ERRNO | EPERM),
    };

    static int qcowfs_seccomp(void)
    {
        struct sock_fprog program = {
            (unsigned short)(sizeof qcowfs_filter / sizeof qcowfs_filter[0]), qcowfs_filter,
        };
        return QCOWFS_ARCH == 0 ? -1 : prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0);
    }

    static int qcowfs_drop_capabilities(void)
    {
        struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
        struct __user_cap_data_struct none[2] = { { 0, 0, 0 }, { 0, 0, 0 } };
        (void)prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        return (int)syscall(SYS_capset, &head, none);
    }

    struct qcowfs_ruleset { uint64_t fs, net, scoped; };

    struct qcowfs_beneath { uint64_t access; int32_t parent; } __attribute__((packed));

    /* Handle all rights that the kernel's ABI knows, and grant none but to read and execute what the descriptors stand
       for, and what is below those that are directories. Returns the ABI, or -1. */
    static int qcowfs_landlock(const int *places, int count)
    {
        static const unsigned fs_bits[] = { 13, 14, 15, 15, 16 };
        static const uint64_t execute = 1, read_file = 4, read_directory = 8, ioctl_device = 1 << 15;
        int abi = (int)syscall(444, NULL, (size_t)0, 1U);
        if (abi < 1)
            return -1;
        struct qcowfs_ruleset rules = {
            ((uint64_t)1 << fs_bits[abi < 5 ? abi - 1 : 4]) - 1, abi >= 4 ? 3 : 0, abi >= 6 ? 3 : 0,
        };
        size_t size = abi >= 6 ? 24 : abi >= 4 ? 16 : 8;
        int ruleset = (int)syscall(444, &rules, size, 0U);
        if (ruleset < 0)
            return -1;
        int failed = 0;
        for (int i = 0; i < count; i++) {
            struct stat status;
            failed |= fstat(places[i], &status);
            uint64_t more = S_ISDIR(status.st_mode) ? read_directory : ioctl_device;
            struct qcowfs_beneath rule = { rules.fs & (execute | read_file | more), places[i] };
            failed |= (int)syscall(445, ruleset, 1, &rule, 0U);
        }
        if (!failed)
            failed = (int)syscall(446, ruleset, 0U);
        close(ruleset);
        return failed ? -1 : abi;
    }
    """
    int qcowfs_seccomp() nogil
    int qcowfs_drop_capabilities() nogil
    int qcowfs_landlock(const int* places, int count) nogil
