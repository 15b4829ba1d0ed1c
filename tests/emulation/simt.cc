#include "simt.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdarg>
#include <cstdio>
#include <memory>
#include <unordered_map>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if defined(__x86_64__)
// Leaves the registers that a function must preserve on this stack, and goes on where another one
// was left. swapcontext() would also ask the system for the signal mask, twice a change.
extern "C" void emulated_switch(void** left, void* next);
asm(R"(
.text
.hidden emulated_switch
.globl emulated_switch
emulated_switch:
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
)");
#endif

namespace simt {

uint8_t* shared_memory = nullptr;

namespace {

#if defined(__x86_64__)
struct Context {
  void* top = nullptr;

  void Begin(uint8_t* stack, size_t bytes, void (*main)()) {
    // As if main had been called: the stack is 16 bytes aligned before the return address.
    uintptr_t end = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
    void** words = reinterpret_cast<void**>(end) - 8;
    std::memset(words, 0, 8 * sizeof *words);
    words[6] = reinterpret_cast<void*>(main);
    top = words;
  }
  static void Switch(Context& from, Context& to) { emulated_switch(&from.top, to.top); }
};
#else
struct Context {
  ucontext_t context;

  void Begin(uint8_t* stack, size_t bytes, void (*main)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, main, 0);
  }
  static void Switch(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

constexpr size_t kStackBytes = 32 << 10;  // AddressSanitizer clears it at every swapcontext()
constexpr uint8_t kGarbage = 0xcb;
constexpr unsigned kMaxCluster = 8;

alignas(1024) uint8_t shared_memories[kMaxCluster][(kSharedBytes + 1023) / 1024 * 1024];

struct Copy {
  uint32_t dst;
  const void* src;
  uint32_t size;
};

struct Fiber {
  Context context;
  std::unique_ptr<uint8_t[]> stack{new uint8_t[kStackBytes]};
  void* fake_stack = nullptr;
  const std::function<bool()>* waits_for = nullptr;  // it need not run before that holds
  bool done = false;
  uint64_t rendezvous = 0;    // how many of the warp's this lane has come to
  uint64_t cluster_turn = 0;  // the cluster's barrier that this thread has arrived at
  std::vector<Copy> copies;
  std::deque<std::vector<Copy>> copy_groups;
  std::vector<std::function<void()>> products;
  std::vector<std::function<void()>> stores;
  std::deque<std::vector<std::function<void()>>> product_groups;
};

struct Warp {
  uint64_t complete = 0;  // rendezvous that every living lane has come to
  int arrived = 0, living = kWarpSize;
  const char* what = nullptr;
  // Two turns: a lane may bring its next bytes while others still read the last ones.
  uint8_t bytes[2][kWarpSize * kLaneBytes];
};

struct Barrier {
  uint32_t count = 0, pending = 0, complete = 0;
  int64_t bytes = 0;
  std::deque<std::function<void()>> copies;
};

struct Block;

struct Cluster {
  Block* blocks = nullptr;
  unsigned size = 1;
  int threads = 0, at_barrier = 0;
  uint64_t barriers_passed = 0;
};

// A CTA of the cluster that runs.
struct Block {
  uint3 index;
  uint8_t* shared_memory = nullptr;
  Cluster* cluster = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unordered_map<uint32_t, Barrier> barriers;
  uint32_t shared_bytes = 0;
  int living = 0, at_barrier = 0;
  uint64_t barriers_passed = 0;
  uint64_t progress = 0;
  size_t running = 0;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  const std::function<void()>* kernel = nullptr;
};

Block* block = nullptr;   // that runs, or that it acts for
Block* acting = nullptr;  // that runs, while it acts for another one
bool failed = false;
char message[512];

Fiber& Self() { return block->fibers[block->running]; }
Warp& SelfWarp() { return block->warps[block->running / kWarpSize]; }

// AddressSanitizer has to be told of every change of stacks, by the side that leaves one and the
// side that comes to one, and of stacks that are used anew.
#if defined(__SANITIZE_ADDRESS__)
void LeaveStack(void** fake_stack, const void* next, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, next, bytes);
}
void ComeToStack(void* fake_stack, const void** last, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, last, bytes);
}
void RenewStack(const void* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
void LeaveStack(void**, const void*, size_t) {}
void ComeToStack(void*, const void**, size_t*) {}
void RenewStack(const void*) {}
#endif

void Yield() {
  Fiber& self = Self();
  LeaveStack(self.done ? nullptr : &self.fake_stack, block->scheduler_stack,
             block->scheduler_stack_bytes);
  Context::Switch(self.context, block->scheduler);
  ComeToStack(self.fake_stack, nullptr, nullptr);
}

void CompleteRendezvous(Warp& warp) {
  if (warp.arrived == 0 || warp.arrived < warp.living) return;
  warp.arrived = 0;
  warp.what = nullptr;
  ++warp.complete;
  ++block->progress;
}

void CompleteBlockBarrier() {
  if (block->at_barrier == 0 || block->at_barrier < block->living) return;
  block->at_barrier = 0;
  ++block->barriers_passed;
  ++block->progress;
}

void Main() {
  ComeToStack(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
  (*block->kernel)();
  Fiber& self = Self();
  if (!self.copies.empty() || !self.products.empty() || !self.product_groups.empty() ||
      !self.stores.empty()) {
    Fail("a thread ended with asynchronous work that nobody waits for");
  }
  self.done = true;
  --SelfWarp().living;
  --block->living;
  ++block->progress;
  CompleteRendezvous(SelfWarp());
  CompleteBlockBarrier();
  Yield();
}

void RunThreads(Block& b) {
  block = &b;
  blockIdx = b.index;
  shared_memory = b.shared_memory;
  for (b.running = 0; b.running < b.fibers.size() && !failed; ++b.running) {
    Fiber& fiber = Self();
    if (fiber.done || (fiber.waits_for != nullptr && !(*fiber.waits_for)())) continue;
    threadIdx = {static_cast<unsigned>(b.running), 0, 0};
    void* fake_stack = nullptr;
    LeaveStack(&fake_stack, fiber.stack.get(), kStackBytes);
    Context::Switch(b.scheduler, fiber.context);
    ComeToStack(fake_stack, nullptr, nullptr);
  }
  block = nullptr;
}

void RunCluster(std::vector<Block>& blocks, unsigned size) {
  const auto total = [&](auto field) {
    uint64_t sum = 0;
    for (unsigned i = 0; i < size; ++i) sum += blocks[i].*field;
    return sum;
  };
  while (total(&Block::living) > 0 && !failed) {
    const uint64_t before = total(&Block::progress);
    for (unsigned i = 0; i < size; ++i) RunThreads(blocks[i]);
    if (!failed && total(&Block::progress) == before) {
      failed = true;
      std::snprintf(message, sizeof message, "block %u: deadlock, %d threads wait for each other",
                    blocks[0].index.x, static_cast<int>(total(&Block::living)));
    }
  }
}

void Finish(std::deque<std::vector<Copy>>& groups) {
  for (const Copy& copy : groups.front()) {
    std::memcpy(SharedBytes(copy.dst, copy.size), copy.src, copy.size);
  }
  groups.pop_front();
}

Barrier& FindBarrier(uint32_t address) {
  const auto found = block->barriers.find(address);
  if (found == block->barriers.end()) Fail("no barrier was initialised at %u", address);
  return found->second;
}

// The bytes of a phase may come before all its arrivals, so both are looked at.
void CompletePhase(Barrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.count;
  ++barrier.complete;
  ++block->progress;
}

}  // namespace

const char* error() { return message; }

void Fail(const char* format, ...) {
  failed = true;
  const int prefix =
      std::snprintf(message, sizeof message, "block %u, thread %u: ", blockIdx.x, threadIdx.x);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + prefix, sizeof message - prefix, format, arguments);
  va_end(arguments);
  if (acting != nullptr) block = acting;
  while (true) Yield();  // never resumed
}

namespace {

void Begin(Fiber& fiber) {
  fiber.waits_for = nullptr;
  fiber.done = false;
  fiber.rendezvous = 0;
  fiber.copies.clear();
  fiber.copy_groups.clear();
  fiber.products.clear();
  fiber.stores.clear();
  fiber.product_groups.clear();
  RenewStack(fiber.stack.get());
  fiber.context.Begin(fiber.stack.get(), kStackBytes, Main);
}

void Begin(Block& b, unsigned x, unsigned y, unsigned threads) {
  b.index = {x, y, 0};
  std::memset(b.shared_memory, kGarbage, kSharedBytes);
  b.warps = std::vector<Warp>(threads / kWarpSize);
  b.barriers.clear();
  b.living = static_cast<int>(threads);
  b.at_barrier = 0;
  while (b.fibers.size() < threads) b.fibers.emplace_back();
  b.fibers.resize(threads);
  for (Fiber& fiber : b.fibers) Begin(fiber);
}

}  // namespace

bool Run(dim3 grid, dim3 block_size, unsigned cluster_size, uint32_t shared_bytes,
         const std::function<void()>& kernel) {
  failed = false;
  acting = nullptr;
  message[0] = '\0';
  if (shared_bytes > kSharedBytes || block_size.x % kWarpSize != 0 || block_size.y != 1 ||
      cluster_size > kMaxCluster || grid.x % cluster_size != 0) {
    std::snprintf(message, sizeof message, "a launch that this emulation does not know");
    return false;
  }
  static std::vector<Block> blocks(kMaxCluster);  // the stacks of their fibers are used again
  gridDim = grid;
  blockDim = block_size;
  for (unsigned y = 0; y < grid.y && !failed; ++y) {
    for (unsigned x = 0; x < grid.x && !failed; x += cluster_size) {
      Cluster cluster;
      cluster.blocks = blocks.data();
      cluster.size = cluster_size;
      cluster.threads = static_cast<int>(cluster_size * block_size.x);
      for (unsigned rank = 0; rank < cluster_size; ++rank) {
        Block& b = blocks[rank];
        b.cluster = &cluster;
        b.kernel = &kernel;
        b.shared_bytes = shared_bytes;
        b.shared_memory = shared_memories[rank];
        Begin(b, x + rank, y, block_size.x);
      }
      RunCluster(blocks, cluster_size);
    }
  }
  return !failed;
}

// The scheduler looks at the condition, too: a change of stacks takes long.
void WaitUntil(const std::function<bool()>& condition) {
  if (condition()) return;
  Self().waits_for = &condition;
  Yield();
  Self().waits_for = nullptr;
}

void SyncBlock() {
  const uint64_t turn = block->barriers_passed;
  ++block->at_barrier;
  CompleteBlockBarrier();
  WaitUntil([turn] { return block->barriers_passed != turn; });
}

// Of all its threads: one that ended would never come.
void ArriveAtCluster() {
  Cluster& cluster = *block->cluster;
  Self().cluster_turn = cluster.barriers_passed;
  if (++cluster.at_barrier < cluster.threads) return;
  cluster.at_barrier = 0;
  ++cluster.barriers_passed;
  ++block->progress;
}

void WaitForCluster() {
  const Cluster& cluster = *block->cluster;
  const uint64_t turn = Self().cluster_turn;
  WaitUntil([&cluster, turn] { return cluster.barriers_passed != turn; });
}

int RankInCluster() { return static_cast<int>(block - block->cluster->blocks); }

const void* InCluster(const void* p, int rank) {
  if (rank < 0 || rank >= static_cast<int>(block->cluster->size)) Fail("no CTA %d", rank);
  return shared_memories[rank] + (static_cast<const uint8_t*>(p) - shared_memory);
}

void AsCta(int rank, const std::function<void()>& action) {
  if (rank < 0 || rank >= static_cast<int>(block->cluster->size)) Fail("no CTA %d", rank);
  acting = block;
  block = &acting->cluster->blocks[rank];
  shared_memory = block->shared_memory;
  if (block->living == 0) Fail("CTA %d has ended", rank);
  action();
  block = acting;
  shared_memory = block->shared_memory;
  acting = nullptr;
}

int Lane() { return static_cast<int>(block->running) % kWarpSize; }

bool IsAlive(int lane) {
  return !block->fibers[block->running / kWarpSize * kWarpSize + lane].done;
}

const uint8_t* Exchange(const char* what, const void* bytes, size_t size) {
  Warp& warp = SelfWarp();
  if (warp.arrived > 0 && std::strcmp(warp.what, what) != 0) {
    Fail("%s, while other lanes of the warp are at %s", what, warp.what);
  }
  const uint64_t turn = Self().rendezvous++;
  uint8_t* slots = warp.bytes[turn % 2];
  if (size > 0) std::memcpy(slots + Lane() * kLaneBytes, bytes, size);
  warp.what = what;
  ++warp.arrived;
  CompleteRendezvous(warp);
  WaitUntil([&warp, turn] { return warp.complete > turn; });
  return slots;
}

uint8_t* SharedBytes(uint32_t address, uint32_t size) {
  if (address + size > block->shared_bytes) {
    Fail("shared memory at %u of %u bytes", address + size, block->shared_bytes);
  }
  if (address % (size < 16 ? size : 16) != 0) Fail("shared memory at %u is unaligned", address);
  return shared_memory + address;
}

uint32_t SharedAddressOf(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory);
}

void CopyAsync(uint32_t dst, const void* src, uint32_t size) {
  std::memset(SharedBytes(dst, size), kGarbage, size);
  Self().copies.push_back({dst, src, size});
}

void CommitCopies() {
  Self().copy_groups.push_back(std::move(Self().copies));
  Self().copies.clear();
}

void WaitForCopies(size_t pending_groups) {
  while (Self().copy_groups.size() > pending_groups) Finish(Self().copy_groups);
}

void StartProduct(std::function<void()> product) { Self().products.push_back(std::move(product)); }

void CommitProducts() {
  Self().product_groups.push_back(std::move(Self().products));
  Self().products.clear();
}

void WaitForProducts(size_t pending_groups) {
  while (Self().product_groups.size() > pending_groups) {
    for (const auto& product : Self().product_groups.front()) product();
    Self().product_groups.pop_front();
  }
}

void StartStore(std::function<void()> store) { Self().stores.push_back(std::move(store)); }

void FinishStores() {
  for (const auto& store : Self().stores) store();
  Self().stores.clear();
}

void InitBarrier(uint32_t address, uint32_t count) {
  SharedBytes(address, 8);
  Barrier& barrier = block->barriers[address] = Barrier{};
  barrier.count = barrier.pending = count;
}

void ArriveAtBarrier(uint32_t address, uint32_t expected_bytes) {
  Barrier& barrier = FindBarrier(address);
  if (barrier.pending == 0) Fail("more arrivals than barrier %u expects", address);
  barrier.bytes += expected_bytes;
  --barrier.pending;
  CompletePhase(barrier);
}

void WaitForBarrier(uint32_t address, uint32_t parity) {
  Barrier& barrier = FindBarrier(address);
  while ((barrier.complete & 1) == parity) {
    WaitUntil(
        [&barrier, parity] { return (barrier.complete & 1) != parity || !barrier.copies.empty(); });
    if (barrier.copies.empty()) continue;
    const auto copy = std::move(barrier.copies.front());
    barrier.copies.pop_front();
    copy();
  }
}

void CopyWithBarrier(uint32_t address, uint32_t dst, uint32_t size, std::function<void()> copy) {
  Barrier& barrier = FindBarrier(address);
  std::memset(SharedBytes(dst, size), kGarbage, size);
  barrier.copies.push_back([&barrier, size, copy = std::move(copy)] {
    copy();
    barrier.bytes -= size;
    CompletePhase(barrier);
  });
}

}  // namespace simt
