#include "cuda/context.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/limits.h"

namespace mk {
namespace cuda {

Stream current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

bool is_capturing(at::Device) {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

size_t shared_memory_of_block(at::Device device) {
  int bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index()));
  return size_t(bytes) - declared_shared;
}

}  // namespace cuda
}  // namespace mk
