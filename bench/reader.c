/* Reads a file past the kernel's cache as fast as one or several threads can, and looks at what it gets.

   reader prepare FILE LIST BLOCK
       LIST holds pairs of 64 bits, (offset, witness). Fill in the witnesses from FILE, which is right.
   reader measure FILE LIST BLOCK JOBS SECONDS START PASSES
       Read BLOCK bytes at each offset in turn until SECONDS are over, or PASSES passes over the list (0: no limit).
       Job J begins at entry START + J * entries / JOBS. Prints {"reads": N, "seconds": S, "wrong": W}.

   A witness is a sum over one page of the block: summing whole blocks of 1 MiB would be a tenth of what is measured.
   A page costs 0.1 us, of the 10 us and more that a FUSE request takes. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, LANES = 4, MOST_JOBS = 64 };

struct entry {
    uint64_t offset;
    uint64_t witness;
};

struct job {
    pthread_t thread;
    int descriptor;
    char *buffer;
    size_t first;
    uint64_t reads;
    uint64_t wrong;
};

static struct entry *entries;
static size_t count, block, limit; /* limit: reads of one job, 0 for none */
static double end_time;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

/* Which page of a block is looked at depends on the offset, so that all pages of a block get their turn. */
static const char *witness_page(const char *buffer, uint64_t offset) {
    return buffer + (offset / block * 2654435761U) % (block / PAGE) * PAGE;
}

/* Fletcher's sum in four lanes: words that change places change it. */
static uint64_t witness(const char *buffer, uint64_t offset) {
    uint64_t words[PAGE / 8], low[LANES] = {0}, high[LANES] = {0}, sum = 0;
    memcpy(words, witness_page(buffer, offset), PAGE);
    for (size_t place = 0; place < PAGE / 8; place += LANES)
        for (size_t lane = 0; lane < LANES; lane++) {
            low[lane] += words[place + lane];
            high[lane] += low[lane];
        }
    for (size_t lane = 0; lane < LANES; lane++)
        sum = sum * 31 + high[lane] * 7 + low[lane];
    return sum;
}

static char *aligned_buffer(void) {
    void *buffer;
    if (posix_memalign(&buffer, PAGE, block) != 0)
        fail("memory");
    memset(buffer, 0, block);
    return buffer;
}

static void *measure_job(void *argument) {
    struct job *job = argument;
    size_t place = job->first % count;
    for (size_t done = 0; (limit == 0 || done < limit) && now() < end_time; done++) {
        const struct entry *entry = &entries[place];
        if (pread(job->descriptor, job->buffer, block, (off_t)entry->offset) != (ssize_t)block)
            fail("pread");
        job->wrong += witness(job->buffer, entry->offset) != entry->witness;
        job->reads++;
        place = place + 1 == count ? 0 : place + 1;
    }
    return NULL;
}

static void measure(const char *file, size_t jobs, double seconds, size_t start) {
    static struct job job[MOST_JOBS];
    uint64_t reads = 0, wrong = 0;
    for (size_t number = 0; number < jobs; number++) {
        job[number].descriptor = open(file, O_RDONLY | O_DIRECT | O_CLOEXEC);
        if (job[number].descriptor < 0)
            fail(file);
        job[number].buffer = aligned_buffer();
        job[number].first = start + number * count / jobs;
    }
    double started = now();
    end_time = started + seconds;
    for (size_t number = 0; number < jobs; number++)
        if (pthread_create(&job[number].thread, NULL, measure_job, &job[number]) != 0)
            fail("thread");
    for (size_t number = 0; number < jobs; number++) {
        pthread_join(job[number].thread, NULL);
        reads += job[number].reads;
        wrong += job[number].wrong;
    }
    printf("{\"reads\": %" PRIu64 ", \"seconds\": %.6f, \"wrong\": %" PRIu64 "}\n", reads, now() - started, wrong);
}

static void prepare(const char *file) {
    char *buffer = aligned_buffer();
    int descriptor = open(file, O_RDONLY | O_CLOEXEC);
    if (descriptor < 0)
        fail(file);
    for (size_t place = 0; place < count; place++) {
        if (pread(descriptor, buffer, block, (off_t)entries[place].offset) != (ssize_t)block)
            fail("pread");
        entries[place].witness = witness(buffer, entries[place].offset);
    }
}

static void map_list(const char *name, int writable) {
    struct stat status;
    int descriptor = open(name, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (descriptor < 0 || fstat(descriptor, &status) < 0)
        fail(name);
    count = (size_t)status.st_size / sizeof(struct entry);
    int protection = writable ? PROT_READ | PROT_WRITE : PROT_READ;
    entries = mmap(NULL, (size_t)status.st_size, protection, MAP_SHARED | MAP_POPULATE, descriptor, 0);
    if (entries == MAP_FAILED)
        fail(name);
}

int main(int argc, char **argv) {
    int preparing = argc == 5 && strcmp(argv[1], "prepare") == 0;
    if (!preparing && (argc != 9 || strcmp(argv[1], "measure") != 0)) {
        fputs("usage: reader prepare FILE LIST BLOCK | measure FILE LIST BLOCK JOBS SECONDS START PASSES\n", stderr);
        return 2;
    }
    block = strtoul(argv[4], NULL, 10);
    map_list(argv[3], preparing);
    if (preparing) {
        prepare(argv[2]);
        return 0;
    }
    size_t jobs = strtoul(argv[5], NULL, 10);
    if (jobs < 1 || jobs > MOST_JOBS)
        return 2;
    limit = strtoul(argv[8], NULL, 10) * count / jobs;
    measure(argv[2], jobs, strtod(argv[6], NULL), strtoul(argv[7], NULL, 10));
    return 0;
}
