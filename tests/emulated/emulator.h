// CUDA C++ on the CPU: what kernels of csrc/cuda use of the language, as host C++ with one fiber for each thread of a
// block.
//
// A block runs alone, from barrier to barrier: each thread goes until it waits at a barrier or a warp's collective,
// then the next one's fiber goes on. set_schedule(seed) shuffles the order of blocks and threads. Blocks run one after
// the other: nothing in csrc/cuda waits for another block, which would never come here, and for ThreadSanitizer blocks
// are not ordered: what one writes and another reads in the same launch is a race, unless it lies before a
// __threadfence and the change of an atomic number there, and behind such a change and a __threadfence here.
//
// Found are: barriers and collectives that not all of their threads reach, lanes outside of their own mask, shuffles
// from lanes that have exited, and, by the sanitizers that know of the fibers, accesses out of bounds
// (AddressSanitizer) and accesses that no barrier orders (ThreadSanitizer). Not shown are real scheduling, memory
// reordering, timing and coalescing, and how CUDA's own functions round. Dynamic shared memory holds NaN where nothing
// was written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

namespace emulator {

struct Index {
  unsigned x, y, z;
};

enum class Wait { barrier, sync_warp, shuffle, ballot };

// What a running thread knows of itself.
struct Thread {
  Index index;
  int lane, warp;
  int source;                 // of a shuffle
  uint64_t given[2], got[2];  // values that a collective exchanges
};

extern Thread* current;
extern Index block_index, block_size, grid_size;

void* dynamic_shared();
void* shared_array(const void* which, size_t bytes);  // the same for all threads of a block
void fence();
void atomic(void* at);  // before the number there is changed
void block_barrier(int line);
int block_vote(bool vote, int line);  // whether any thread of the block votes so
void collective(unsigned mask, Wait kind, int line);

// For the next launch: more than the 48 KB that a block has otherwise, arrays and dynamic memory together.
void ask_for_shared(size_t bytes);

// `body` is what every thread runs.
void launch(unsigned blocks, unsigned threads, size_t shared, std::function<void()> body);

// 0: blocks and threads in their order; anything else: an order drawn from it.
void set_schedule(unsigned seed);

// The blocks of each launch since the last call.
std::vector<int64_t> launched();

// The bytes of shared memory that a block can have where it asks for them, those of an H100 at first.
extern size_t shared_memory;

// CUDA graphs: launches are kept in place of run, those before are forgotten; and all of them run.
void set_capturing(bool);
bool is_capturing();
void replay();

template <class T>
T shuffle(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(current->given) && std::is_trivially_copyable<T>::value);
  current->given[0] = current->given[1] = 0;
  std::memcpy(current->given, &value, sizeof(T));
  current->source = source;
  collective(mask, Wait::shuffle, line);
  std::memcpy(&value, current->got, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads(int line = __builtin_LINE()) { emulator::block_barrier(line); }
inline int __syncthreads_or(int vote, int line = __builtin_LINE()) { return emulator::block_vote(vote != 0, line); }
inline void __threadfence() { emulator::fence(); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emulator::collective(mask, emulator::Wait::sync_warp, line);
}
inline unsigned __ballot_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  emulator::current->given[0] = vote != 0;
  emulator::collective(mask, emulator::Wait::ballot, line);
  return unsigned(emulator::current->got[0]);
}
inline int __any_sync(unsigned mask, int vote, int line = __builtin_LINE()) {
  return __ballot_sync(mask, vote, line) != 0;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, (emulator::current->lane & ~(width - 1)) + (source & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int across, int width = 32, int line = __builtin_LINE()) {
  const int lane = emulator::current->lane, source = lane ^ across;
  return emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, line);
}

// Real atomics, so that ThreadSanitizer does not call them races. They order nothing else.
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  emulator::atomic(at);
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
