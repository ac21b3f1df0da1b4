// CUDA, or what stands in for it: with MK_EMULATED, tests/emulated/emulator.h runs the same sources on the CPU.
#pragma once

#ifdef MK_EMULATED
#include "emulator.h"
#define MK_SHARED(T, name) T* const name = static_cast<T*>(emulator::dynamic_shared())
#define MK_SHARED_ARRAY(T, name, count) \
  static const char name##_here = 0;    \
  T* const name = static_cast<T*>(emulator::shared_array(&name##_here, (count) * sizeof(T)))
#else
#include <cuda_runtime.h>
// Dynamic shared memory, and an array of it whose length is known to the compiler.
#define MK_SHARED(T, name)                                           \
  extern __shared__ __align__(16) unsigned char mk_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(mk_dynamic_shared)
#define MK_SHARED_ARRAY(T, name, count) __shared__ T name[count]
#endif

#define MK_DEVICE __device__ __forceinline__
