// Kernels with one bug each, and the same without it: what the emulator and the sanitizers are to find. The first
// argument names the kernel, the second the schedule.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.cuh"

namespace {

struct Data {
  float* in;
  float* out;
  int count;
  float* partials;
  unsigned long long* blocks_done;
};

void none(Data d) {
  MK_SHARED_ARRAY(float, tile, 64);
  tile[threadIdx.x] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = tile[63 - threadIdx.x];
}

void missing_barrier(Data d) {
  MK_SHARED_ARRAY(float, tile, 64);
  tile[threadIdx.x] = d.in[threadIdx.x];
  d.out[threadIdx.x] = tile[63 - threadIdx.x];
}

// A shuffle brings lanes together; it does not order their memory.
void missing_warp_barrier(Data d) {
  MK_SHARED_ARRAY(float, tile, 64);
  tile[threadIdx.x] = d.in[threadIdx.x];
  const float first = __shfl_sync(~0u, d.in[threadIdx.x], 0);
  d.out[threadIdx.x] = first + tile[threadIdx.x ^ 1];
}

void divergent_barrier(Data d) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    d.out[threadIdx.x] = __shfl_sync(~0u, d.in[threadIdx.x], 0);
  }
}

void divergent_shuffle(Data d) {
  if (int(threadIdx.x) >= d.count) return;
  d.out[threadIdx.x] = d.in[threadIdx.x] + __shfl_xor_sync(~0u, d.in[threadIdx.x], 1);
}

void shuffle_outside_of_its_mask(Data d) {
  if (threadIdx.x % 32 < 8) d.out[threadIdx.x] = __shfl_sync(0xffu, d.in[threadIdx.x], 12);
}

void array_in_shared_beyond_its_end(Data d) {
  MK_SHARED_ARRAY(float, tile, 64);
  tile[threadIdx.x + 1] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = tile[threadIdx.x];
}

void dynamic_shared_beyond_its_end(Data d) {
  MK_SHARED(float, tile);
  tile[threadIdx.x + 1] = d.in[threadIdx.x];
  __syncthreads();
  d.out[threadIdx.x] = tile[threadIdx.x];
}

void global_beyond_its_end(Data d) { d.out[threadIdx.x + 1] = d.in[threadIdx.x]; }

// Every block leaves a sum of 16 numbers, and the last one to come adds them up. What it waits for is a number of
// blocks, behind which fences put their sums.
template <bool Waits, bool Fences>
void phases(Data d) {
  if (threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < 16; i++) sum += d.in[16 * blockIdx.x + unsigned(i)];
  d.partials[blockIdx.x] = sum;
  if (Fences) __threadfence();
  const unsigned long long place = Waits ? atomicAdd(d.blocks_done, 1) : blockIdx.x;
  if (place != gridDim.x - 1) return;
  if (Fences) __threadfence();
  for (unsigned b = 0; b < gridDim.x; b++) d.out[0] += d.partials[b];
}

void uninitialised_shared(Data d) {
  MK_SHARED(float, tile);
  d.out[threadIdx.x] = tile[threadIdx.x];
}

struct Kernel {
  void (*kernel)(Data);
  unsigned blocks = 1;
  size_t shared = 64 * sizeof(float);
};

const std::map<std::string, Kernel> kernels = {
    {"none", {none}},
    {"missing_barrier", {missing_barrier}},
    {"missing_warp_barrier", {missing_warp_barrier}},
    {"divergent_barrier", {divergent_barrier}},
    {"divergent_shuffle", {divergent_shuffle}},
    {"shuffle_outside_of_its_mask", {shuffle_outside_of_its_mask}},
    {"array_in_shared_beyond_its_end", {array_in_shared_beyond_its_end}},
    {"dynamic_shared_beyond_its_end", {dynamic_shared_beyond_its_end}},
    {"global_beyond_its_end", {global_beyond_its_end}},
    {"no_bug_between_phases", {phases<true, true>, 4}},
    {"missing_wait_between_phases", {phases<false, true>, 4}},
    {"missing_fence_between_phases", {phases<true, false>, 4}},
    {"uninitialised_shared", {uninitialised_shared}},
    {"no_blocks", {none, 0}},
    {"shared_that_nobody_asked_for", {none, 1, 48 << 10}},
};

}  // namespace

// Prints the sum of what the kernel has written, 2016 for 0 + 1 + ... + 63.
int main(int count, char** arguments) {
  if (count != 3) return 2;
  emulator::set_schedule(unsigned(std::atoi(arguments[2])));
  const Kernel chosen = kernels.at(arguments[1]);
  std::vector<float> in(64), out(64), partials(4);
  unsigned long long blocks_done = 0;
  for (int i = 0; i < 64; i++) in[size_t(i)] = float(i);
  const Data data{in.data(), out.data(), 20, partials.data(), &blocks_done};
  emulator::launch(chosen.blocks, 64, chosen.shared, [=] { chosen.kernel(data); });
  float sum = 0;
  for (const float x : out) sum += x;
  std::printf("%g\n", double(sum));
}
