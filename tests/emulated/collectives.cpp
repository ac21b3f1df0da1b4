// What threads of a block and lanes of a warp do together, and what orders memory.
#include <algorithm>
#include <iterator>

#include "block.h"
#include "sanitizers.h"

namespace emulator {
namespace {

int at_barrier;
unsigned barriers;
int votes[2];
int in_collective[32];  // threads of each warp that wait in one

// Threads that have exited do not hold a barrier up.
void try_barrier() {
  if (at_barrier == 0 || at_barrier + threads_done < int(threads.size())) return;
  at_barrier = 0;
  barriers++;
  for (Running& t : threads)
    if (t.state == State::waiting && t.wait == Wait::barrier) t.state = State::ready;
}

Running* lane(int warp, int lane) {
  const size_t i = size_t(warp) * 32 + size_t(lane);
  return i < threads.size() ? &threads[i] : nullptr;
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

}  // namespace

void begin_collectives() {
  at_barrier = 0;
  std::fill(std::begin(in_collective), std::end(in_collective), 0);
}

void leave_collectives(const Running& gone) {
  for (int l = 0; l < 32; l++) {
    const Running* t = lane(gone.warp, l);
    if (t && t->state == State::waiting && t->wait != Wait::barrier && (t->mask >> gone.lane & 1))
      fail("a lane exited while others wait for it", t->line);
  }
  try_barrier();
}

void explain_standstill() {
  for (const Running& t : threads)
    if (t.state == State::waiting && t.wait != Wait::barrier) try_collective(t);  // it may know what is wrong
  current = nullptr;
  fail("nothing goes on: a barrier or a collective that not all of its threads reach", 0);
}

void block_barrier(int line) {
  Running* self = running();
  self->wait = Wait::barrier;
  self->line = line;
  self->state = State::waiting;
  char* const ordered = &block().barrier_order[barriers % 2];
  at_barrier++;
  release(ordered);
  try_barrier();
  wait();
  acquire(ordered);
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
  const bool orders = kind == Wait::sync_warp;
  char* const ordered = &block().warp_order[self->warp][self->warp_barriers % 2];
  if (orders) {
    release(ordered);
    self->warp_barriers++;
  }
  // As long as fewer wait than the mask has lanes, none needs to be looked at.
  if (++in_collective[self->warp] >= __builtin_popcount(mask)) try_collective(*self);
  wait();
  if (orders) acquire(ordered);
}

void fence() {
  Running* self = running();
  self->fenced = true;
  if (self->seen) acquire(self->seen);
}

void atomic(void* at) {
  Running* self = running();
  if (self->fenced) release(at);
  self->seen = at;
}

}  // namespace emulator
