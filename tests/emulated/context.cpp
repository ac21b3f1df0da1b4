// The device that csrc/cuda/context.h asks of, where it is the emulator: an H100's shared memory, no streams and no
// graphs.
#include "cuda/context.h"

namespace mk {
namespace cuda {

Stream current_stream(at::Device) { return nullptr; }

bool is_capturing(at::Device) { return false; }

size_t shared_memory_of_block(at::Device) { return 226 * 1024; }

}  // namespace cuda
}  // namespace mk
