// What fibers and blocks tell the sanitizers, in programs that have them.
//
// Compile the emulator's own sources without -fsanitize=thread: they tell ThreadSanitizer by hand what CUDA orders, the
// threads of a block at barriers, the lanes of a warp at __syncwarp (shuffles and votes order no memory), a fence that
// follows an atomic number behind one that came before a change of it, and blocks of different launches. It would take
// what a block does at an address that another block had before for a race; so under it every block has shared memory
// and what stands for its barriers of its own, and other fibers than the blocks before it.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
#endif
// Weak: there only in programs with ThreadSanitizer.
extern "C" {
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
}

namespace emulator {

inline bool races_are_watched() { return __tsan_create_fiber != nullptr; }

// What came before release(at) comes before what follows acquire(at).
inline void release(void* at) {
  if (races_are_watched()) __tsan_release(at);
}
inline void acquire(void* at) {
  if (races_are_watched()) __tsan_acquire(at);
}

// Bytes that nobody may touch, until they are allowed.
inline void forbid([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(at, bytes);
#endif
}
inline void allow([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(at, bytes);
#endif
}

}  // namespace emulator
