#pragma once
// A fiber: a stack of its own that is entered and left without a system call, and that
// AddressSanitizer and ThreadSanitizer are told about.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(FASTPRUNE_SIM_UCONTEXT)
#define FASTPRUNE_SIM_UCONTEXT 1
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_java_init(unsigned long heap_begin, unsigned long heap_bytes);
void __tsan_java_alloc(unsigned long address, unsigned long bytes);
void __tsan_java_free(unsigned long address, unsigned long bytes);
}
#endif

// The simulator's own bookkeeping is neither kernel memory nor synchronisation, so sanitizers
// must not see it: an instrumented access here would add reports or hide them.
#define FASTPRUNE_SIM_HIDDEN __attribute__((noinline, no_sanitize("address", "thread")))

namespace fastprune::sim {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Pages are only committed when touched, so a generous stack costs address space alone.
constexpr size_t kStackBytes = size_t{128} << 10;

// Happens-before edges for ThreadSanitizer; nothing elsewhere. `object` is any address.
FASTPRUNE_SIM_HIDDEN inline void acquire(void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(object);
#endif
  (void)object;
}

FASTPRUNE_SIM_HIDDEN inline void release(void* object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(object);
#endif
  (void)object;
}

struct Fiber {
  void* stack_pointer = nullptr;  // where the fiber resumes
  const void* stack_base = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
#if defined(FASTPRUNE_SIM_UCONTEXT)
  ucontext_t context;
#endif
};

// The fiber that gave up the processor last: an entered fiber learns the host's stack from it.
inline Fiber* last_left = nullptr;

#if !defined(FASTPRUNE_SIM_UCONTEXT)
// Saves the callee-saved registers on the current stack, and restores them from the other.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*saved*/, void* /*resumed*/) {
  asm volatile(
      "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

FASTPRUNE_SIM_HIDDEN inline void switch_fiber(Fiber& from, Fiber& to) {
  last_left = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_base, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(FASTPRUNE_SIM_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// To be called first thing in a new fiber.
FASTPRUNE_SIM_HIDDEN inline void finish_first_switch() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &last_left->stack_base, &last_left->stack_bytes);
#endif
}

// Gives `fiber` a stack with a guard page below it; its first switch enters `entry`, which must
// never return. Fibers live until the process ends.
FASTPRUNE_SIM_HIDDEN inline void create_fiber(Fiber& fiber, void (*entry)()) {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, kStackBytes + guard, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) {
    std::perror("fastprune simulator: no memory for the stack of a CUDA thread");
    std::abort();
  }
  char* base = static_cast<char*>(memory) + guard;
  fiber.stack_base = base;
  fiber.stack_bytes = kStackBytes;
#if defined(__SANITIZE_THREAD__)
  fiber.tsan = __tsan_create_fiber(0);
#endif
#if defined(FASTPRUNE_SIM_UCONTEXT)
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = base;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // Six zero registers, the entry as return address on a 16-byte boundary, and a null caller.
  void** top = reinterpret_cast<void**>(base + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 8;
#endif
}

// The calling host thread, as the fiber to come back to.
FASTPRUNE_SIM_HIDDEN inline void adopt_host(Fiber& fiber) {
#if defined(__SANITIZE_THREAD__)
  fiber.tsan = __tsan_get_current_fiber();
#endif
  (void)fiber;
}

}  // namespace fastprune::sim
