// The block that runs: its threads and its shared memory.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "emulator.h"
#include "fibers.h"

namespace emulator {

enum class State { fresh, ready, waiting, done };

struct Running : Thread {
  State state;
  Wait wait;
  unsigned mask;
  int line;
  unsigned warp_barriers;
  bool fenced;
  void* seen;  // the last atomic number that it changed
  Fiber* fiber;
};

// Shared memory, and addresses that stand for what ThreadSanitizer is told.
struct Block {
  char* dynamic = nullptr;
  char* arrays = nullptr;
  std::vector<Running> threads;  // once it has run
  char barrier_order[2], warp_order[32][2];
};

extern std::vector<Running> threads;
extern int threads_done;

Block& block();
inline Running* running() { return static_cast<Running*>(current); }

// Goes on with another thread until this one is ready.
void wait();

// collectives.cpp: before the first thread of a block; behind one that has ended; where no thread is ready.
void begin_collectives();
void leave_collectives(const Running& gone);
[[noreturn]] void explain_standstill();

// Says what is wrong, who waits where, and ends the program.
[[noreturn]] void fail(const char* what, int line);

// All blocks of a launch. `limit`: the bytes of a block's shared memory, of which `shared` are dynamic.
void run_blocks(unsigned blocks, unsigned threads, size_t shared, size_t limit, const std::function<void()>& body);

}  // namespace emulator
