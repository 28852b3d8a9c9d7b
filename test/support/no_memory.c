// Preloaded before a program (LD_PRELOAD), a machine that never has room for a piece of just NO_MEMORY_BYTES.
#include <errno.h>
#include <stdlib.h>

extern void* __libc_malloc(size_t bytes);

void* malloc(size_t bytes) {
  const char* const refused = getenv("NO_MEMORY_BYTES");
  if (!refused || bytes != strtoull(refused, NULL, 10)) return __libc_malloc(bytes);
  errno = ENOMEM;
  return NULL;
}
