// Blocks one after the other, and the threads of each by turns.
#include "block.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

#include "sanitizers.h"

namespace emulator {

Thread* current;
Index block_index, block_size, grid_size;
std::vector<Running> threads;
int threads_done;

namespace {

constexpr size_t array_bytes = 4096, blocks_apart = 4;

std::vector<Fiber*> idle;
std::vector<Fiber*> apart[blocks_apart];  // under ThreadSanitizer, in place of it
size_t next_apart;
Fiber* starting;

std::vector<Block*> blocks;                         // of the launch: the only one, or under ThreadSanitizer all of them
std::vector<std::pair<const void*, char*>> arrays;  // of the running block, by where they are declared
size_t array_end, taken, dynamic_bytes, most_bytes;  // of shared memory
std::vector<int> order;
size_t next_fresh;
const std::function<void()>* kernel;
unsigned schedule;
std::mt19937 random_order;
char launch_order, end_order;

void fiber_body() {
  Fiber* self = starting;
  fiber_begins();
  for (;;) {
    while (next_fresh < threads.size()) {  // thread after thread on one stack, as long as none of them waits
      Running& t = threads[size_t(order[next_fresh++])];
      current = &t;
      t.fiber = self;
      t.state = State::ready;
      acquire(&launch_order);
      (*kernel)();
      release(&end_order);
      t.state = State::done;
      threads_done++;
      leave_collectives(t);
      if (races_are_watched()) break;
    }
    if (!races_are_watched()) idle.push_back(self);
    switch_fibers(*self, scheduler);
  }
}

// To ThreadSanitizer what runs on one fiber is ordered: neither do two threads of a block, nor those of blocks that
// follow each other.
Fiber* fiber_for_a_thread() {
  if (races_are_watched()) {
    std::vector<Fiber*>& own = apart[blocks.size() % blocks_apart];
    if (next_apart == own.size()) own.push_back(new_fiber(fiber_body));
    return own[next_apart++];
  }
  if (idle.empty()) return new_fiber(fiber_body);
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

// Dynamic shared memory to the byte, so that a step beyond its end is seen.
Block* new_block() {
  Block* made = new Block;
  if (dynamic_bytes) made->dynamic = static_cast<char*>(std::aligned_alloc(16, (dynamic_bytes + 15) / 16 * 16));
  made->arrays = static_cast<char*>(std::aligned_alloc(16, array_bytes));
  return made;
}

void delete_blocks() {
  for (Block* gone : blocks) {
    allow(gone->arrays, array_bytes);
    std::free(gone->dynamic);
    std::free(gone->arrays);
    delete gone;
  }
  blocks.clear();
}

void take(size_t bytes) {
  taken += bytes;
  if (taken > most_bytes) fail("more shared memory than a block has, or more than was asked for", 0);
}

// Nothing is in shared memory that the block has not written.
void clear(Block& next) {
  arrays.clear();
  array_end = taken = 0;
  take(dynamic_bytes);
  allow(next.arrays, array_bytes);
  std::memset(next.arrays, 0xff, array_bytes);
  forbid(next.arrays, array_bytes);
  if (dynamic_bytes) std::memset(next.dynamic, 0xff, dynamic_bytes);
}

void run_block(unsigned index) {
  const int count = int(threads.size());
  block_index = {index, 0, 0};
  if (blocks.empty() || races_are_watched()) blocks.push_back(new_block());
  clear(block());
  for (int i = 0; i < count; i++) {
    threads[size_t(i)] = Running{};
    threads[size_t(i)].index = {unsigned(i), 0, 0};
    threads[size_t(i)].lane = i % 32;
    threads[size_t(i)].warp = i / 32;
    order[size_t(i)] = i;
  }
  if (schedule) std::shuffle(order.begin(), order.end(), random_order);
  next_fresh = next_apart = 0;
  threads_done = 0;
  begin_collectives();
  release(&launch_order);
  while (threads_done < count) {
    bool moved = false;
    while (next_fresh < size_t(count)) {
      starting = fiber_for_a_thread();
      moved = true;
      // A fiber that is new begins in fiber_body, an idle one goes on there.
      switch_fibers(scheduler, *starting);
    }
    for (const int i : order) {
      if (threads[size_t(i)].state != State::ready) continue;
      moved = true;
      current = &threads[size_t(i)];
      switch_fibers(scheduler, *threads[size_t(i)].fiber);
    }
    if (!moved) explain_standstill();
  }
  if (races_are_watched()) {
    block().threads = std::move(threads);
    threads.assign(size_t(count), Running{});
  }
}

}  // namespace

Block& block() { return *blocks.back(); }

void wait() {
  Running* self = running();
  switch_fibers(*self->fiber, scheduler);
  current = self;
}

void fail(const char* what, int line) {
  static const char* const names[] = {"__syncthreads", "__syncwarp", "a shuffle", "a vote"};
  std::fprintf(stderr, "emulator: ERROR: %s, line %d, block %u", what, line, block_index.x);
  if (current) std::fprintf(stderr, ", thread %u", current->index.x);
  std::fprintf(stderr, "\n");
  int shown = 0;
  for (const Running& t : threads)
    if (t.state == State::waiting && shown++ < 12)
      std::fprintf(stderr, "  thread %u waits in line %d at %s, mask %08x\n", t.index.x, t.line, names[int(t.wait)],
                   t.mask);
  std::fflush(stderr);
  std::abort();
}

void* dynamic_shared() { return block().dynamic; }

void* shared_array(const void* which, size_t bytes) {
  for (const auto& [known, at] : arrays)
    if (known == which) return at;
  char* at = block().arrays + array_end;
  array_end += (bytes + 31) / 32 * 32 + 32;
  if (array_end > array_bytes) fail("more arrays in shared memory than the emulator has room for", 0);
  take(bytes);
  allow(at, bytes);
  arrays.emplace_back(which, at);
  return at;
}

void set_schedule(unsigned seed) {
  schedule = seed;
  random_order.seed(seed);
}

void run_blocks(unsigned number, unsigned count, size_t shared, size_t limit, const std::function<void()>& body) {
  block_size = {count, 1, 1};
  grid_size = {number, 1, 1};
  kernel = &body;
  threads.assign(count, Running{});
  order.resize(count);
  idle.reserve(2048);
  dynamic_bytes = shared;
  most_bytes = limit;
  std::vector<unsigned> sequence(number);
  for (unsigned b = 0; b < number; b++) sequence[b] = b;
  if (schedule) std::shuffle(sequence.begin(), sequence.end(), random_order);
  release(&launch_order);
  for (const unsigned b : sequence) run_block(b);
  acquire(&end_order);
  delete_blocks();
  current = nullptr;
}

}  // namespace emulator
