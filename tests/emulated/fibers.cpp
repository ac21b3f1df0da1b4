#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "sanitizers.h"

namespace emulator {

Fiber scheduler;

namespace {

constexpr size_t stack_bytes = 512 << 10, guard_bytes = 4096;

// Where the scheduler runs, as AddressSanitizer says.
[[maybe_unused]] const void* main_stack;
[[maybe_unused]] size_t main_stack_bytes;

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
#error "fibers.cpp: wanted x86-64 or aarch64"
#endif

}  // namespace

void switch_fibers(Fiber& from, Fiber& to) {
  if (races_are_watched()) {
    if (!scheduler.thread_sanitizer) scheduler.thread_sanitizer = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(to.thread_sanitizer, 1);  // 1: the switch itself orders nothing
  }
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

void fiber_begins() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_bytes);
#endif
}

Fiber* new_fiber(void (*body)()) {
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
  top[6] = reinterpret_cast<void*>(body);
  top[7] = nullptr;
#else
  void** top = reinterpret_cast<void**>(fiber->stack + stack_bytes) - 20;
  for (int i = 0; i < 20; i++) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(body);
#endif
  fiber->stack_pointer = top;
  if (races_are_watched()) fiber->thread_sanitizer = __tsan_create_fiber(0);
  return fiber;
}

}  // namespace emulator
