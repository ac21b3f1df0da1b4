// The one place where kernels are launched.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace mk {
namespace cuda {

#ifdef MK_EMULATED

template <auto kernel>
void start(unsigned blocks, int threads, size_t shared, Stream, const Tables& tables, const Tile* tiles) {
  struct Arguments {
    Tables tables;
    const Tile* tiles;
  } arguments{tables, tiles};
  const auto body = [](void* given) {
    const Arguments& a = *static_cast<Arguments*>(given);
    kernel(a.tables, a.tiles);
  };
  emulator::launch(blocks, unsigned(threads), shared, body, &arguments);
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("manifold_kernels: CUDA failed to ") + what + ": " +
                             cudaGetErrorString(error));
}

template <auto kernel>
void start(unsigned blocks, int threads, size_t shared, Stream stream, const Tables& tables, const Tile* tiles) {
  // More than 48 KB of a block have to be asked for.
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "set aside shared memory");
  Tables given = tables;
  void* arguments[] = {&given, &tiles};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(unsigned(threads)), arguments, shared,
                         static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

#endif

}  // namespace cuda
}  // namespace mk
