// The one place where kernels are launched.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/limits.h"

namespace mk {
namespace cuda {

#ifdef MK_EMULATED

template <auto kernel>
void ask_for_shared(size_t bytes) {
  emulator::ask_for_shared(bytes);
}

template <auto kernel, class... A>
void launch_on(Stream, unsigned blocks, int threads, size_t shared, A... arguments) {
  emulator::launch(blocks, unsigned(threads), shared, [=] { kernel(arguments...); });
}

#else

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("manifold_kernels: CUDA failed to ") + what + ": " +
                             cudaGetErrorString(error));
}

template <auto kernel>
void ask_for_shared(size_t bytes) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "set aside shared memory");
}

template <auto kernel, class... A>
void launch_on(Stream stream, unsigned blocks, int threads, size_t shared, A... arguments) {
  void* addresses[] = {&arguments...};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(unsigned(threads)), addresses, shared,
                         static_cast<cudaStream_t>(stream)),
        "launch a kernel");
}

#endif

// The arguments are of the very types that the kernel takes.
template <auto kernel, class... A>
void launch(unsigned blocks, int threads, size_t shared, Stream stream, A... arguments) {
  if (shared + declared_shared > unasked_shared) ask_for_shared<kernel>(shared);
  launch_on<kernel>(stream, blocks, threads, shared, arguments...);
}

// As the table of kernels has it.
template <auto kernel>
void start(unsigned blocks, int threads, size_t shared, Stream stream, const Tables& tables, const Tile* tiles) {
  launch<kernel>(blocks, threads, shared, stream, tables, tiles);
}

}  // namespace cuda
}  // namespace mk
