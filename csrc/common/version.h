// The version of the package. Python looks for this text in the file of a library before it loads it: a kernel of
// another version may take other arguments.
#pragma once

#define VISATTN_VERSION "0.1.0"

#define VISATTN_MARK_LIBRARY                                                           \
  extern "C" __attribute__((visibility("default"))) const char visattn_fast_version[]; \
  const char visattn_fast_version[] = "visattn_fast library " VISATTN_VERSION;
