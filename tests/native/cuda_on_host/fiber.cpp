// Fibers by a dozen instructions on x86-64, by ucontext (slower: a system call a switch) elsewhere.
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace cuda_on_host {
namespace {

constexpr size_t kStackBytes = 256 * 1024;  // touched pages only take memory
constexpr size_t kGuardBytes = 64 * 1024;   // below it: an overflow is a fault, not a silent write

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<std::byte*>(memory);
}

Fiber::~Fiber() { munmap(stack_, kGuardBytes + kStackBytes); }

#ifdef CUDA_ON_HOST_UCONTEXT

void Fiber::start(void (*entry)()) {
  getcontext(&mine_);
  mine_.uc_stack.ss_sp = stack_ + kGuardBytes;
  mine_.uc_stack.ss_size = kStackBytes;
  mine_.uc_link = nullptr;
  makecontext(&mine_, entry, 0);
}
void Fiber::resume() { swapcontext(&scheduler_, &mine_); }
void Fiber::suspend() { swapcontext(&mine_, &scheduler_); }

#else

// Saves the registers a callee must keep on this stack, leaves its pointer in *from, and takes up
// the stack `to`, which was left the same way.
extern "C" void cuda_on_host_switch(void** from, void* to);
asm(R"(
.text
.globl cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");

void Fiber::start(void (*entry)()) {
  // As if entry had been called from address 0 and its first instruction were next: six registers,
  // the address to go to, and the return address, which the ABI wants 8 bytes off a multiple of 16.
  auto** top = reinterpret_cast<void**>(stack_ + kGuardBytes + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  mine_ = top;
}
void Fiber::resume() { cuda_on_host_switch(&scheduler_, mine_); }
void Fiber::suspend() { cuda_on_host_switch(&mine_, scheduler_); }

#endif

}  // namespace cuda_on_host
