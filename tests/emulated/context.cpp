// The device that csrc/cuda/context.h asks of, where it is the emulator, which has one stream.
#include "cuda/context.h"

#include "cuda/limits.h"
#include "emulator.h"

namespace mk {
namespace cuda {

Stream current_stream(at::Device) { return nullptr; }

bool is_capturing(at::Device) { return emulator::is_capturing(); }

size_t shared_memory_of_block(at::Device) { return emulator::shared_memory - declared_shared; }

}  // namespace cuda
}  // namespace mk
