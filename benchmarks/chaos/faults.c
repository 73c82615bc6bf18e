/* Faults in the file system, as a program meets them: loaded with LD_PRELOAD, it counts the calls of every library that
 * concern files below CHAOS_ROOT, in all processes together, and lets one of them, or all from one on, fail or kill.
 *
 * Which, says a block of memory that the file CHAOS_CONTROL maps; benchmarks/chaos/faults.py writes it.
 * Calls are of two ranges: those that write, and those that concern the inputs, CHAOS_ROOT/inputs.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITES = 1, INPUTS = 2 };
enum { ONCE = 1, FROM_THEN_ON = 2, KILL = 3 };
enum { DESCRIPTORS = 65536 };

struct control {
    long armed;     /* 0: nothing is counted */
    long action;    /* 0: only count */
    long range;     /* which calls `at` is a number of: 0 all, WRITES, INPUTS */
    long at;        /* from 1 */
    long error;     /* errno */
    long leader;    /* the first process of the command: those that read for it are in groups of their own */
    long counts[3]; /* calls so far: all, WRITES, INPUTS */
};

static struct control *control;
static char root[PATH_MAX], inputs[PATH_MAX];
static unsigned char kinds[DESCRIPTORS]; /* of each descriptor: 0 none of ours, 1 ours, 2 an input */

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("CHAOS_ROOT"), *file = getenv("CHAOS_CONTROL");
    if (!folder || !file) return;
    snprintf(root, sizeof root, "%s/", folder);
    snprintf(inputs, sizeof inputs, "%s/inputs", folder);
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    int descriptor = real_open(file, O_RDWR);
    if (descriptor < 0) return;
    void *memory = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    close(descriptor);
    if (memory != MAP_FAILED) control = memory;
}

static int kind_of_path(int folder, const char *path) {
    if (!control || !path) return 0;
    if (path[0] != '/') return folder >= 0 && folder < DESCRIPTORS ? kinds[folder] : 0;
    if (strncmp(path, inputs, strlen(inputs)) == 0) return 2;
    return strncmp(path, root, strlen(root)) == 0 ? 1 : 0;
}

static int kind_of(int descriptor) { return control && descriptor >= 0 && descriptor < DESCRIPTORS ? kinds[descriptor] : 0; }

static void remember(int descriptor, int kind) {
    if (descriptor >= 0 && descriptor < DESCRIPTORS) kinds[descriptor] = kind;
}

/* Count a call; 1 where it is to fail, with errno set. */
static int fault(int kind, int writes) {
    if (!kind || !control->armed) return 0;
    long numbers[3] = {__atomic_add_fetch(&control->counts[0], 1, __ATOMIC_SEQ_CST), 0, 0};
    if (writes) numbers[WRITES] = __atomic_add_fetch(&control->counts[WRITES], 1, __ATOMIC_SEQ_CST);
    if (kind == 2) numbers[INPUTS] = __atomic_add_fetch(&control->counts[INPUTS], 1, __ATOMIC_SEQ_CST);
    long number = numbers[control->range];
    if (!number || number < control->at) return 0;
    if (number > control->at && control->action != FROM_THEN_ON) return 0;
    if (control->action == KILL) {
        if (control->leader) kill((pid_t)control->leader, SIGKILL);
        kill(0, SIGKILL);
    }
    if (control->action == KILL || control->action == 0) return 0;
    errno = (int)control->error;
    return 1;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, name, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        int kind = kind_of_path(AT_FDCWD, path); \
        if (fault(kind, (flags & O_ACCMODE) != O_RDONLY)) return -1; \
        int descriptor = real(path, flags, mode); \
        remember(descriptor, kind); \
        return descriptor; \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(int, name, int, const char *, int, ...); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); } \
        int kind = kind_of_path(folder, path); \
        if (fault(kind, (flags & O_ACCMODE) != O_RDONLY)) return -1; \
        int descriptor = real(folder, path, flags, mode); \
        remember(descriptor, kind); \
        return descriptor; \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(FILE *, name, const char *, const char *); \
        int kind = kind_of_path(AT_FDCWD, path); \
        if (fault(kind, mode[0] != 'r')) return NULL; \
        FILE *file = real(path, mode); \
        if (file) remember(fileno(file), kind); \
        return file; \
    }
FOPEN(fopen)
FOPEN(fopen64)

int close(int descriptor) {
    REAL(int, close, int);
    remember(descriptor, 0);
    return real(descriptor);
}

int fclose(FILE *file) {
    REAL(int, fclose, FILE *);
    int descriptor = fileno(file), kind = kind_of(descriptor);
    remember(descriptor, 0);
    int failed = fault(kind, 1), error = errno; /* what is still in the buffer is written now */
    int result = real(file);
    if (failed) errno = error;
    return failed ? EOF : result;
}

size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *);
    return fault(kind_of(fileno(file)), 1) ? 0 : real(data, size, count, file);
}

size_t fread(void *data, size_t size, size_t count, FILE *file) {
    REAL(size_t, fread, void *, size_t, size_t, FILE *);
    return fault(kind_of(fileno(file)), 0) ? 0 : real(data, size, count, file);
}

#define BY_DESCRIPTOR(type, name, writes, declared, given) \
    type name declared { \
        static type(*real) declared; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (fault(kind_of(descriptor), writes)) return -1; \
        return real given; \
    }
BY_DESCRIPTOR(ssize_t, read, 0, (int descriptor, void *data, size_t size), (descriptor, data, size))
BY_DESCRIPTOR(ssize_t, readv, 0, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
BY_DESCRIPTOR(ssize_t, pread, 0, (int descriptor, void *data, size_t size, off_t at), (descriptor, data, size, at))
BY_DESCRIPTOR(ssize_t, pread64, 0, (int descriptor, void *data, size_t size, off64_t at), (descriptor, data, size, at))
BY_DESCRIPTOR(ssize_t, preadv, 0, (int descriptor, const struct iovec *parts, int count, off_t at), (descriptor, parts, count, at))
BY_DESCRIPTOR(ssize_t, preadv64v2, 0, (int descriptor, const struct iovec *parts, int count, off64_t at, int flags), (descriptor, parts, count, at, flags))
BY_DESCRIPTOR(ssize_t, preadv64, 0, (int descriptor, const struct iovec *parts, int count, off64_t at), (descriptor, parts, count, at))
BY_DESCRIPTOR(ssize_t, write, 1, (int descriptor, const void *data, size_t size), (descriptor, data, size))
BY_DESCRIPTOR(ssize_t, writev, 1, (int descriptor, const struct iovec *parts, int count), (descriptor, parts, count))
BY_DESCRIPTOR(ssize_t, pwrite, 1, (int descriptor, const void *data, size_t size, off_t at), (descriptor, data, size, at))
BY_DESCRIPTOR(ssize_t, pwrite64, 1, (int descriptor, const void *data, size_t size, off64_t at), (descriptor, data, size, at))
BY_DESCRIPTOR(int, fsync, 1, (int descriptor), (descriptor))
BY_DESCRIPTOR(int, fdatasync, 1, (int descriptor), (descriptor))
BY_DESCRIPTOR(int, ftruncate, 1, (int descriptor, off_t size), (descriptor, size))
BY_DESCRIPTOR(int, ftruncate64, 1, (int descriptor, off64_t size), (descriptor, size))

#define BY_PATH(type, failure, name, writes, declared, given) \
    type name declared { \
        static type(*real) declared; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (fault(kind_of_path(AT_FDCWD, path), writes)) return failure; \
        return real given; \
    }
BY_PATH(int, -1, mkdir, 1, (const char *path, mode_t mode), (path, mode))
BY_PATH(int, -1, unlink, 1, (const char *path), (path))
BY_PATH(int, -1, rmdir, 1, (const char *path), (path))
BY_PATH(int, -1, rename, 1, (const char *path, const char *new), (path, new))
BY_PATH(int, -1, link, 1, (const char *path, const char *new), (path, new))
BY_PATH(int, -1, stat, 0, (const char *path, struct stat *facts), (path, facts))
BY_PATH(int, -1, stat64, 0, (const char *path, struct stat64 *facts), (path, facts))
BY_PATH(int, -1, lstat, 0, (const char *path, struct stat *facts), (path, facts))
BY_PATH(int, -1, lstat64, 0, (const char *path, struct stat64 *facts), (path, facts))
BY_PATH(DIR *, NULL, opendir, 0, (const char *path), (path))

#define AT_FOLDER(name, writes, declared, given) \
    int name declared { \
        static int(*real) declared; \
        if (!real) real = dlsym(RTLD_NEXT, #name); \
        if (fault(kind_of_path(folder, path), writes)) return -1; \
        return real given; \
    }
AT_FOLDER(fstatat, 0, (int folder, const char *path, struct stat *facts, int flags), (folder, path, facts, flags))
AT_FOLDER(fstatat64, 0, (int folder, const char *path, struct stat64 *facts, int flags), (folder, path, facts, flags))
AT_FOLDER(unlinkat, 1, (int folder, const char *path, int flags), (folder, path, flags))
