// Stacks that take turns on one thread of the operating system.
#pragma once

namespace emulator {

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* address_sanitizer = nullptr;
  void* thread_sanitizer = nullptr;
};

// The stack that the others are started from.
extern Fiber scheduler;

// Runs `body`, which must never return, once it is switched to; that calls fiber_begins() first.
Fiber* new_fiber(void (*body)());
void fiber_begins();

void switch_fibers(Fiber& from, Fiber& to);

}  // namespace emulator
