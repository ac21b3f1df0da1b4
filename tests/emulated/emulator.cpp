// The fibers behind emulator.h.
//
// Compile this file without -fsanitize=thread: it tells ThreadSanitizer by hand what CUDA orders, the threads of a
// block at barriers, the lanes of a warp at __syncwarp (shuffles and votes order no memory), a fence that follows
// an atomic number behind one that came before a change of it, and blocks of different launches. It would take what a
// block does at an address that another block had before for a race; so under it every block has shared memory and
// what stands for its barriers of its own, and other fibers than the blocks before it.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
extern "C" void __sanitizer_start_switch_fiber(void**, const void*, size_t);
extern "C" void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
#endif
// Weak: there only in programs with ThreadSanitizer.
extern "C" {
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
}

namespace emulator {

Thread* current;
Index block_index, block_size, grid_size;

namespace {

enum class State { fresh, ready, waiting, done };

constexpr size_t stack_bytes = 512 << 10, guard_bytes = 4096, array_bytes = 4096;
constexpr size_t blocks_apart = 4;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* address_sanitizer = nullptr;
  void* thread_sanitizer = nullptr;
};

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

// The memory of a block, and addresses that stand for what ThreadSanitizer is told.
struct Block {
  char* dynamic = nullptr;
  char* arrays = nullptr;
  std::vector<Running> threads;  // once it has run
  char barrier_order[2], warp_order[32][2];
};

Fiber scheduler;
std::vector<Fiber*> idle;
std::vector<Fiber*> apart[blocks_apart];  // under ThreadSanitizer, in place of it
size_t next_apart;
std::vector<Block*> blocks;                         // of the launch: the only one, or under ThreadSanitizer all of them
std::vector<std::pair<const void*, char*>> arrays;  // of the running block, by where they are declared
size_t array_end;
std::vector<Running> threads;
std::vector<int> order;
size_t next_fresh;
int done, at_barrier;
unsigned barriers;
int votes[2];
int in_collective[32];  // threads of each warp that wait in one
void (*kernel)(void*);
void* kernel_context;
size_t dynamic_bytes;
std::vector<int64_t> launches;
unsigned schedule;
std::mt19937 random_order;
const void* main_stack;
size_t main_stack_bytes;
char launch_order, end_order;

bool races_are_watched() { return __tsan_create_fiber != nullptr; }

Running* running() { return static_cast<Running*>(current); }

[[noreturn]] void fail(const char* what, int line) {
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

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#elif defined(__aarch64__)
extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,%function
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "emulator.cpp: wanted x86-64 or aarch64"
#endif

void switch_fibers(Fiber& from, Fiber& to) {
  if (races_are_watched()) __tsan_switch_to_fiber(to.thread_sanitizer, 1);  // 1: the switch itself orders nothing
#if defined(__SANITIZE_ADDRESS__)
  const bool home = &to == &scheduler;
  __sanitizer_start_switch_fiber(&from.address_sanitizer, home ? main_stack : to.stack,
                                 home ? main_stack_bytes : stack_bytes);
#endif
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(from.address_sanitizer, &stack, &bytes);
#endif
}

// Threads that have exited do not hold a barrier up.
void try_barrier() {
  if (at_barrier == 0 || at_barrier + done < int(threads.size())) return;
  at_barrier = 0;
  barriers++;
  for (Running& t : threads)
    if (t.state == State::waiting && t.wait == Wait::barrier) t.state = State::ready;
}

Running* lane(int warp, int lane) {
  const size_t i = size_t(warp) * 32 + size_t(lane);
  return i < threads.size() ? &threads[i] : nullptr;
}

void thread_ends(const Running& gone) {
  for (int l = 0; l < 32; l++) {
    const Running* t = lane(gone.warp, l);
    if (t && t->state == State::waiting && t->wait != Wait::barrier && (t->mask >> gone.lane & 1))
      fail("a lane exited while others wait for it", t->line);
  }
  try_barrier();
}

Fiber* starting;

void fiber_body() {
  Fiber* self = starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
  for (;;) {
    while (next_fresh < threads.size()) {  // thread after thread on one stack, as long as none of them waits
      Running& t = threads[size_t(order[next_fresh++])];
      current = &t;
      t.fiber = self;
      t.state = State::ready;
      if (races_are_watched()) __tsan_acquire(&launch_order);
      kernel(kernel_context);
      if (races_are_watched()) __tsan_release(&end_order);
      t.state = State::done;
      done++;
      thread_ends(t);
      if (races_are_watched()) break;
    }
    if (!races_are_watched()) idle.push_back(self);
    switch_fibers(*self, scheduler);
  }
}

Fiber* new_fiber() {
  Fiber* fiber = new Fiber;
  void* memory = mmap(nullptr, stack_bytes + guard_bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulator: mmap");
    std::abort();
  }
  mprotect(memory, guard_bytes, PROT_NONE);
  fiber->stack = static_cast<char*>(memory) + guard_bytes;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(fiber->stack + stack_bytes) - 8;
  for (int i = 0; i < 6; i++) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&fiber_body);
  top[7] = nullptr;
#else
  void** top = reinterpret_cast<void**>(fiber->stack + stack_bytes) - 20;
  for (int i = 0; i < 20; i++) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(&fiber_body);
#endif
  fiber->stack_pointer = top;
  if (races_are_watched()) fiber->thread_sanitizer = __tsan_create_fiber(0);
  return fiber;
}

void wait() {
  Running* self = running();
  switch_fibers(*self->fiber, scheduler);
  current = self;
}

// To ThreadSanitizer what runs on one fiber is ordered: neither do two threads of a block, nor those of blocks that
// follow each other.
Fiber* fiber_for_a_thread() {
  if (races_are_watched()) {
    std::vector<Fiber*>& own = apart[blocks.size() % blocks_apart];
    if (next_apart == own.size()) own.push_back(new_fiber());
    return own[next_apart++];
  }
  if (idle.empty()) return new_fiber();
  Fiber* fiber = idle.back();
  idle.pop_back();
  return fiber;
}

// Dynamic shared memory to the byte, so that a step beyond its end is seen.
Block* new_block() {
  Block* block = new Block;
  if (dynamic_bytes) block->dynamic = static_cast<char*>(std::aligned_alloc(16, (dynamic_bytes + 15) / 16 * 16));
  block->arrays = static_cast<char*>(std::aligned_alloc(16, array_bytes));
  return block;
}

void delete_blocks() {
  for (Block* block : blocks) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block->arrays, array_bytes);
#endif
    std::free(block->dynamic);
    std::free(block->arrays);
    delete block;
  }
  blocks.clear();
}

// Nothing is in shared memory that the block has not written.
void clear(Block* block) {
  arrays.clear();
  array_end = 0;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(block->arrays, array_bytes);
#endif
  std::memset(block->arrays, 0xff, array_bytes);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(block->arrays, array_bytes);
#endif
  if (dynamic_bytes) std::memset(block->dynamic, 0xff, dynamic_bytes);
}

// Completes a collective once every lane of its mask waits in it.
void try_collective(const Running& self) {
  const unsigned mask = self.mask;
  unsigned ballot = 0;
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    const Running* t = lane(self.warp, l);
    if (!t || t->state == State::done) fail("a mask names a lane that has exited or does not exist", self.line);
    if (t->state != State::waiting || t->wait == Wait::barrier) return;
    if (t->mask != mask) {
      if (t->mask >> self.lane & 1) fail("lanes of one collective give different masks", self.line);
      return;
    }
    if (t->wait != self.wait) fail("lanes of one mask are in different collectives", self.line);
    if (t->given[0]) ballot |= 1u << l;
  }
  for (int l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    Running* t = lane(self.warp, l);
    if (t->wait == Wait::shuffle) {
      if (!(mask >> t->source & 1)) fail("a shuffle reads a lane outside of its mask", t->line);
      const Running* source = lane(self.warp, t->source);
      // Word by word: ThreadSanitizer takes a memmove for an access of the thread that is running.
      t->got[0] = source->given[0];
      t->got[1] = source->given[1];
    } else if (t->wait == Wait::ballot) {
      t->got[0] = ballot;
    }
    t->state = State::ready;
    in_collective[self.warp]--;
  }
}

void run_block(unsigned index) {
  const int count = int(threads.size());
  block_index = {index, 0, 0};
  if (blocks.empty() || races_are_watched()) blocks.push_back(new_block());
  clear(blocks.back());
  for (int i = 0; i < count; i++) {
    threads[size_t(i)] = Running{};
    threads[size_t(i)].index = {unsigned(i), 0, 0};
    threads[size_t(i)].lane = i % 32;
    threads[size_t(i)].warp = i / 32;
    order[size_t(i)] = i;
  }
  if (schedule) std::shuffle(order.begin(), order.end(), random_order);
  next_fresh = next_apart = 0;
  done = at_barrier = 0;
  std::fill(std::begin(in_collective), std::end(in_collective), 0);
  if (races_are_watched()) __tsan_release(&launch_order);
  while (done < count) {
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
    if (!moved) {
      for (const Running& t : threads)
        if (t.state == State::waiting && t.wait != Wait::barrier) try_collective(t);  // it may know what is wrong
      current = nullptr;
      fail("nothing goes on: a barrier or a collective that not all of its threads reach", 0);
    }
  }
  if (races_are_watched()) {
    blocks.back()->threads = std::move(threads);
    threads.assign(size_t(count), Running{});
  }
}

}  // namespace

void* shared_memory() { return blocks.back()->dynamic; }

void* shared_array(const void* which, size_t bytes) {
  for (const auto& [known, at] : arrays)
    if (known == which) return at;
  char* at = blocks.back()->arrays + array_end;
  array_end += (bytes + 31) / 32 * 32 + 32;
  if (array_end > array_bytes) fail("more arrays in shared memory than the emulator has room for", 0);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(at, bytes);
#endif
  arrays.emplace_back(which, at);
  return at;
}

void fence() {
  Running* self = running();
  self->fenced = true;
  if (self->seen && races_are_watched()) __tsan_acquire(self->seen);
}

void atomic(void* at) {
  Running* self = running();
  if (self->fenced && races_are_watched()) __tsan_release(at);
  self->seen = at;
}

void set_schedule(unsigned seed) {
  schedule = seed;
  random_order.seed(seed);
}

std::vector<int64_t> launched() { return std::exchange(launches, {}); }

void block_barrier(int line) {
  Running* self = running();
  self->wait = Wait::barrier;
  self->line = line;
  self->state = State::waiting;
  const unsigned number = barriers;
  at_barrier++;
  if (races_are_watched()) __tsan_release(&blocks.back()->barrier_order[number % 2]);
  try_barrier();
  wait();
  if (races_are_watched()) __tsan_acquire(&blocks.back()->barrier_order[number % 2]);
}

int block_vote(bool vote, int line) {
  const unsigned number = barriers % 2;
  if (at_barrier == 0) votes[number] = 0;
  votes[number] |= vote;
  block_barrier(line);
  return votes[number];
}

void collective(unsigned mask, Wait kind, int line) {
  Running* self = running();
  if (!(mask >> self->lane & 1)) fail("a lane is outside of its own mask", line);
  self->wait = kind;
  self->mask = mask;
  self->line = line;
  self->state = State::waiting;
  const bool orders = kind == Wait::sync_warp && races_are_watched();
  char* order_of = &blocks.back()->warp_order[self->warp][self->warp_barriers % 2];
  if (orders) {
    __tsan_release(order_of);
    self->warp_barriers++;
  }
  // As long as fewer wait than the mask has lanes, none needs to be looked at.
  if (++in_collective[self->warp] >= __builtin_popcount(mask)) try_collective(*self);
  wait();
  if (orders) __tsan_acquire(order_of);
}

void launch(unsigned number, unsigned count, size_t bytes, void (*body)(void*), void* context) {
  launches.push_back(number);
  current = nullptr;
  if (count < 1 || count > 1024) fail("wanted 1 to 1024 threads in a block", 0);
  block_size = {count, 1, 1};
  grid_size = {number, 1, 1};
  kernel = body;
  kernel_context = context;
  threads.assign(count, Running{});
  order.resize(count);
  idle.reserve(2048);
  dynamic_bytes = bytes;
  std::vector<unsigned> sequence(number);
  for (unsigned b = 0; b < number; b++) sequence[b] = b;
  if (schedule) std::shuffle(sequence.begin(), sequence.end(), random_order);
  if (races_are_watched()) {
    if (!scheduler.thread_sanitizer) scheduler.thread_sanitizer = __tsan_get_current_fiber();
    __tsan_release(&launch_order);
  }
  for (const unsigned b : sequence) run_block(b);
  if (races_are_watched()) __tsan_acquire(&end_order);
  delete_blocks();
  current = nullptr;
}

}  // namespace emulator
