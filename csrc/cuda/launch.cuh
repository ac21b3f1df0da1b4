// The one place where kernels are launched.
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace mk {
namespace cuda {

#ifdef MK_EMULATED

template <auto kernel, class... A>
void launch(unsigned blocks, int threads, size_t shared, Stream, A... arguments) {
  std::tuple<A...> given(arguments...);
  const auto body = [](void* tuple) { std::apply(kernel, *static_cast<std::tuple<A...>*>(tuple)); };
  emulator::launch(blocks, unsigned(threads), shared, body, &given);
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("manifold_kernels: CUDA failed to ") + what + ": " +
                             cudaGetErrorString(error));
}

// The arguments are of the very types that the kernel takes.
template <auto kernel, class... A>
void launch(unsigned blocks, int threads, size_t shared, Stream stream, A... arguments) {
  // More than 48 KB of a block have to be asked for.
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
          "set aside shared memory");
  void* addresses[] = {&arguments...};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(unsigned(threads)), addresses, shared,
                         static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

#endif

// As the table of kernels has it.
template <auto kernel>
void start(unsigned blocks, int threads, size_t shared, Stream stream, const Tables& tables, const Tile* tiles) {
  launch<kernel>(blocks, threads, shared, stream, tables, tiles);
}

}  // namespace cuda
}  // namespace mk
