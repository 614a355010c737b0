# pthread.h and signal.h: what the cache, the codec's pools, the threads of the data plane and remote sources use.

from posix.time cimport timespec

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass

    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)

    int pthread_cond_init(pthread_cond_t* condition, const void* attributes)
    int pthread_cond_destroy(pthread_cond_t* condition)
    int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex)
    int pthread_cond_timedwait(pthread_cond_t* condition, pthread_mutex_t* mutex, const timespec* until)
    int pthread_cond_signal(pthread_cond_t* condition)
    int pthread_cond_broadcast(pthread_cond_t* condition)

    int pthread_attr_init(pthread_attr_t* attributes)
    int pthread_attr_destroy(pthread_attr_t* attributes)
    int pthread_attr_setstacksize(pthread_attr_t* attributes, size_t size)
    int pthread_create(
        pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** result)
    # ...

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    enum:
        SIG_SETMASK

    int SIGRTMAX
    ctypedef struct sigaction_t "struct sigaction":
        void (*sa_handler)(int) noexcept nogil
        # ...
    int sigaction(int number, const sigaction_t* action, sigaction_t* old)
    int sigfillset(sigset_t* set)
    int sigdelset(sigset_t* set, int number)
    int pthread_sigmask(int how, const sigset_t* set, sigset_t* old)
    int pthread_kill(pthread_t thread, int number)
    # ...
