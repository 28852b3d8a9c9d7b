// Preloaded before a program (LD_PRELOAD), a disk that takes its time where the name of a file contains one of the
// words of SLOW_FILES ("one:other"): SLOW_SECONDS for each time it is made durable.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_slow(int file) {
  char link[64], path[4096], words[256];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  const char* const named = getenv("SLOW_FILES");
  if (length < 0 || !named) return 0;
  path[length] = 0;
  snprintf(words, sizeof words, "%s", named);
  char* rest = NULL;
  for (char* word = strtok_r(words, ":", &rest); word; word = strtok_r(NULL, ":", &rest))
    if (strstr(path, word)) return 1;
  return 0;
}

static int slowly(int file, const char* name) {
  int (*const real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  if (is_slow(file)) usleep((useconds_t)(atof(getenv("SLOW_SECONDS")) * 1e6));
  return real(file);
}

int fsync(int file) { return slowly(file, "fsync"); }
int fdatasync(int file) { return slowly(file, "fdatasync"); }
