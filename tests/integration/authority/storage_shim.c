/* Storage that lies about one call on the store's files: it does what it was asked, and then says that it failed, or dies.
 * Preloaded. KEYBROKER_STORAGE_SHIM is "CALL INSTANCE THEN": CALL is pwrite64, fdatasync (or fsync) or ftruncate; INSTANCE counts from 1, over all
 * threads, from SIGUSR2 on; THEN is EIO or ENOSPC (done, and reported failed), SIGKILL (done, and dead), or EIO+SIGKILL (done and
 * reported failed, and dead at the next call of any of these kinds). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int armed, count, doomed;
static char call[16], then[16];
static int instance;

static void arm(int number) {
    (void)number;
    atomic_store(&armed, 1);
}

__attribute__((constructor)) static void begin(void) {
    const char *order = getenv("KEYBROKER_STORAGE_SHIM");
    if (order && sscanf(order, "%15s %d %15s", call, &instance, then) == 3) signal(SIGUSR2, arm);
}

static int is_ours(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size <= 0) return 0;
    path[size] = 0;
    return strstr(path, "/state/keybroker.db") != NULL;
}

/* Whether this is the one; a doomed process does not get past it. */
static int strikes(const char *name, int fd) {
    if (!atomic_load(&armed) || !is_ours(fd)) return 0;
    if (atomic_load(&doomed)) raise(SIGKILL);
    if (strcmp(name, call) != 0 || atomic_fetch_add(&count, 1) + 1 != instance) return 0;
    dprintf(2, "shim: %s %d %s\n", name, instance, then);
    return 1;
}

static int lie(void) {
    if (strcmp(then, "SIGKILL") == 0) raise(SIGKILL);
    if (strcmp(then, "EIO+SIGKILL") == 0) atomic_store(&doomed, 1);
    errno = strcmp(then, "ENOSPC") == 0 ? ENOSPC : EIO;
    return -1;
}

#define SHIM(type, function, name, parameters, arguments)                 \
    type function parameters {                                            \
        static type(*real) parameters;                                    \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #function); \
        int struck = strikes(name, fd);                                   \
        type done = real arguments;                                       \
        return struck ? lie() : done;                                     \
    }

SHIM(ssize_t, pwrite, "pwrite64", (int fd, const void *data, size_t size, off_t offset), (fd, data, size, offset))
SHIM(ssize_t, pwrite64, "pwrite64", (int fd, const void *data, size_t size, off64_t offset), (fd, data, size, offset))
SHIM(int, fdatasync, "fdatasync", (int fd), (fd))
SHIM(int, fsync, "fdatasync", (int fd), (fd))
SHIM(int, ftruncate, "ftruncate", (int fd, off_t size), (fd, size))
SHIM(int, ftruncate64, "ftruncate", (int fd, off64_t size), (fd, size))
