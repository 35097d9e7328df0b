// SPDX-License-Identifier: Apache-2.0
// A compiler takes this flag of glibc 2.32 for granted, and asks it before it counts references atomically. Wheels run
// on glibc 2.28: their own flag says that there may always be other threads.
#if defined(__x86_64__) && defined(__linux__)
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif
