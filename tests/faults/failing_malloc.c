// Preloaded, it lets one allocation of one library fail: the one with the number that fail_malloc was given.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);

static const void* library;  // where it is loaded
static long countdown;       // 0: none fails
static long calls;

void fail_malloc(const void* inside, long number) {
  Dl_info info;
  library = dladdr(inside, &info) ? info.dli_fbase : NULL;
  __atomic_store_n(&calls, 0, __ATOMIC_SEQ_CST);
  __atomic_store_n(&countdown, number, __ATOMIC_SEQ_CST);
}

long malloc_calls(void) { return calls; }

void* malloc(size_t size) {
  Dl_info info;
  if (library && dladdr(__builtin_return_address(0), &info) && info.dli_fbase == library) {
    if (__atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST) == countdown) {
      errno = ENOMEM;
      return NULL;
    }
  }
  return __libc_malloc(size);
}
