// CUDA, or what stands in for it: with MK_EMULATED, tests/emulated/emulator.h runs the same sources on the CPU.
#pragma once

#ifdef MK_EMULATED
#include "emulator.h"
// Dynamic shared memory.
#define MK_SHARED(T, name) T* const name = static_cast<T*>(emulator::shared_memory())
#else
#include <cuda_runtime.h>
#define MK_SHARED(T, name)                                           \
  extern __shared__ __align__(16) unsigned char mk_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(mk_dynamic_shared)
#endif

#define MK_DEVICE __device__ __forceinline__
