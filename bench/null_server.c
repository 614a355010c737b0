/* The limit: a FUSE file system in C that shows one raw file and does nothing but pread(2) it. No qcow2 here.

   null_server RAW MOUNTPOINT      serves MOUNTPOINT/disk.raw in the foreground until it is unmounted

   Ten threads, each with its own queue in the kernel (clone_fd) and a buffer of its own; reads of up to 1 MiB. Replies are
   copied: spliced ones were slower. */

#define FUSE_USE_VERSION 312
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_INODE = 2, LARGEST_READ = 1 << 20, THREADS = 10 };
static const char file_name[] = "disk.raw";
static const double forever = 86400.0;
static struct stat raw_status;
static int raw;
static __thread char buffer[LARGEST_READ] __attribute__((aligned(4096)));

static void attributes(fuse_ino_t inode, struct stat *status) {
    memset(status, 0, sizeof *status);
    status->st_ino = inode;
    status->st_nlink = 1;
    status->st_mode = S_IFDIR | 0555;
    if (inode == FILE_INODE) {
        status->st_mode = S_IFREG | 0444;
        status->st_size = raw_status.st_size;
        status->st_blocks = raw_status.st_blocks;
    }
}

static void init(void *data, struct fuse_conn_info *connection) {
    (void)data;
    connection->max_read = LARGEST_READ; /* the mount option says the same, and libfuse wants to hear both */
    connection->max_background = 64;
    connection->max_readahead = LARGEST_READ;
}

static void lookup(fuse_req_t request, fuse_ino_t parent, const char *name) {
    struct fuse_entry_param entry = {.ino = FILE_INODE, .attr_timeout = forever, .entry_timeout = forever};
    if (parent != FUSE_ROOT_ID || strcmp(name, file_name) != 0) {
        fuse_reply_err(request, ENOENT);
        return;
    }
    attributes(FILE_INODE, &entry.attr);
    fuse_reply_entry(request, &entry);
}

static void getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    struct stat status;
    (void)info;
    attributes(inode, &status);
    fuse_reply_attr(request, &status, forever);
}

static void open_file(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *info) {
    (void)inode;
    info->keep_cache = 1;
    fuse_reply_open(request, info);
}

static void read_file(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *info) {
    (void)inode, (void)info;
    ssize_t got = pread(raw, buffer, size < LARGEST_READ ? size : LARGEST_READ, offset);
    if (got < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_buf(request, buffer, (size_t)got);
}

static void seek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info) {
    (void)inode, (void)info;
    off_t found = lseek(raw, offset, whence);
    if (found < 0)
        fuse_reply_err(request, errno);
    else
        fuse_reply_lseek(request, found);
}

static const struct fuse_lowlevel_ops operations = {
    .init = init,
    .lookup = lookup,
    .getattr = getattr,
    .open = open_file,
    .read = read_file,
    .lseek = seek,
};

static int serve(struct fuse_session *session) {
    struct fuse_loop_config *config = fuse_loop_cfg_create();
    fuse_loop_cfg_set_clone_fd(config, 1);
    fuse_loop_cfg_set_max_threads(config, THREADS);
    fuse_loop_cfg_set_idle_threads(config, THREADS);
    int done = fuse_session_loop_mt(session, config);
    fuse_loop_cfg_destroy(config);
    return done;
}

int main(int argc, char **argv) {
    char *words[] = {argv[0], "-o", "ro,max_read=1048576,fsname=null_server", NULL};
    struct fuse_args args = FUSE_ARGS_INIT(3, words);
    if (argc != 3) {
        fputs("usage: null_server RAW MOUNTPOINT\n", stderr);
        return 2;
    }
    raw = open(argv[1], O_RDONLY | O_CLOEXEC);
    if (raw < 0 || fstat(raw, &raw_status) < 0) {
        perror(argv[1]);
        return 1;
    }
    struct fuse_session *session = fuse_session_new(&args, &operations, sizeof operations, NULL);
    if (session == NULL || fuse_set_signal_handlers(session) != 0 || fuse_session_mount(session, argv[2]) != 0)
        return 1;
    int done = serve(session);
    fuse_session_unmount(session);
    fuse_remove_signal_handlers(session);
    fuse_session_destroy(session);
    fuse_opt_free_args(&args);
    return done != 0;
}
