/* A disk that fills up and a process that dies, at a chosen moment: wraps what writes below one folder.
 * Loaded with LD_PRELOAD; tests/faults.py arms it. Counters lie in shared memory, so a parent reads those of its forked child. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = 1, FULL = 2 };
struct state { long calls, bytes, at; int mode; char root[PATH_MAX]; };
static struct state *it;

__attribute__((constructor)) static void prepare(void) {
    it = mmap(NULL, sizeof *it, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
}

void fault_arm(const char *root, int mode, long at) {
    it->calls = it->bytes = 0;
    it->at = at;
    it->mode = mode;
    strncpy(it->root, root, PATH_MAX - 1);
}
void fault_disarm(void) { it->root[0] = 0; }
long fault_calls(void) { return it->calls; }
long fault_bytes(void) { return it->bytes; }

static int below(const char *path) { return it && it->root[0] && !strncmp(path, it->root, strlen(it->root)); }

static int fd_below(int fd) {
    char link[64], path[PATH_MAX];
    if (!it || !it->root[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

static int path_below(int folder, const char *path) { return path[0] == '/' || folder == AT_FDCWD ? below(path) : fd_below(folder); }

/* One more call that changes the disk; in KILL mode the process dies before call number `at`. */
static void call(void) {
    if (it->mode == KILL && it->calls == it->at) kill(getpid(), SIGKILL);
    it->calls++;
}

static int full(void) { return it->mode == FULL && it->bytes >= it->at; }

/* How much of `n` bytes still fits; -1 with ENOSPC where nothing does. */
static ssize_t fits(size_t n) {
    call();
    if (it->mode == FULL && it->bytes + (long)n > it->at) {
        if (full()) { errno = ENOSPC; return -1; }
        n = it->at - it->bytes;
    }
    it->bytes += n;
    return n;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define WRITE(name, offset_declared, offset) \
    ssize_t name(int fd, const void *data, size_t n offset_declared) { \
        REAL(name); \
        if (!fd_below(fd) || !n) return real(fd, data, n offset); \
        ssize_t some = fits(n); \
        return some < 0 ? -1 : real(fd, data, some offset); \
    }
#define COMMA ,
WRITE(write, , )
WRITE(pwrite, COMMA off_t at, COMMA at)
WRITE(pwrite64, COMMA off64_t at, COMMA at)

size_t fwrite(const void *data, size_t size, size_t n, FILE *file) {
    REAL(fwrite);
    if (!fd_below(fileno(file)) || !size || !n) return real(data, size, n, file);
    ssize_t some = fits(size * n);
    return some < 0 ? 0 : real(data, size, some / size, file);
}

#define OPEN(name, folder_declared, folder, home) \
    int name(folder_declared const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_CREAT | O_TRUNC) && path_below(home, path)) { \
            call(); \
            if (flags & O_CREAT && full() && access(path, F_OK)) { errno = ENOSPC; return -1; } \
        } \
        return real(folder path, flags, mode); \
    }
OPEN(open, , , AT_FDCWD)
OPEN(open64, , , AT_FDCWD)
OPEN(openat, int dir COMMA, dir COMMA, dir)
OPEN(openat64, int dir COMMA, dir COMMA, dir)

#define CHANGE(name, declared, given, test) int name declared { REAL(name); if (test) call(); return real given; }
CHANGE(fsync, (int fd), (fd), fd_below(fd))
CHANGE(fdatasync, (int fd), (fd), fd_below(fd))
CHANGE(ftruncate, (int fd, off_t n), (fd, n), fd_below(fd))
CHANGE(ftruncate64, (int fd, off64_t n), (fd, n), fd_below(fd))
CHANGE(rename, (const char *a, const char *b), (a, b), below(b))
CHANGE(unlink, (const char *a), (a), below(a))
CHANGE(unlinkat, (int dir, const char *a, int flags), (dir, a, flags), path_below(dir, a))
CHANGE(rmdir, (const char *a), (a), below(a))

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    if (below(path)) {
        call();
        if (full() && access(path, F_OK)) { errno = ENOSPC; return -1; }
    }
    return real(path, mode);
}
