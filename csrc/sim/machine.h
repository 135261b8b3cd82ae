#pragma once
// The simulated device: runs the blocks of one launch after another, the threads of a block as
// fibers that take turns at barriers, warp operations, fences and now and then at atomics.
#include <link.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "sim/fiber.h"

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace fastprune::sim {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kWarp;
constexpr size_t kMaxSharedBytes = size_t{227} << 10;
constexpr size_t kMaxArgumentBytes = 4096;  // what every toolkit and device accepts

// For ThreadSanitizer, accesses of one fiber are ordered, so two blocks on the same fibers would
// hide a missing global atomic from it: neighbouring blocks use different sets of fibers.
constexpr unsigned kFiberSets = kThreadSanitizer ? 2 : 1;

enum class Order { kRandom, kReversed, kForward };
enum class Wait : uint8_t { kNothing, kBarrier, kWarpOperation, kExited };
enum class WarpOperation : uint8_t {
  kSync,
  kShuffle,
  kShuffleUp,
  kShuffleDown,
  kShuffleXor,
  kBallot,
  kAny,
  kAll
};
inline const char* const kWarpOperationNames[] = {
    "__syncwarp",      "__shfl_sync",   "__shfl_up_sync", "__shfl_down_sync",
    "__shfl_xor_sync", "__ballot_sync", "__any_sync",     "__all_sync"};

struct Site {
  const char* file;
  int line;
};

struct Votes {
  int count, any, all;
};

// Groups of lanes that meet at __syncwarp each get a synchronisation object of their own, in
// turn; so many may pass before the last lane of a group has left it.
constexpr unsigned kWarpGroups = 64;
constexpr unsigned kRecentAtomics = 8;

struct CudaThread {
  Fiber fiber;
  uint3 index;
  unsigned rank;  // x fastest, as CUDA numbers lanes
  Wait wait;
  Site site;
  Votes votes;  // the outcome of the last barrier
  WarpOperation operation;
  unsigned mask;
  unsigned group;
  unsigned source_lane;
  uint64_t value;
  uint64_t result;
  bool fenced;
  unsigned num_recent;
  void* recent_atomics[kRecentAtomics];
};

struct FiberSet {
  CudaThread* threads = nullptr;
  unsigned created = 0;
  char barrier_sync[2];
  char warp_sync[kMaxWarps][kWarpGroups];
};

struct Machine {
  // The launch.
  bool running = false;
  dim3 grid, block;
  Site launch_site{"", 0};
  void (*run_kernel)(const void*) = nullptr;
  const void* bound_kernel = nullptr;
  void* dynamic_shared = nullptr;
  // The block.
  uint3 block_index{0, 0, 0};
  FiberSet* set = nullptr;
  CudaThread* threads = nullptr;
  CudaThread* current = nullptr;
  unsigned num_threads = 0;
  unsigned num_live = 0;
  unsigned live_lanes[kMaxWarps];
  unsigned waiting_lanes[kMaxWarps];
  unsigned next_group[kMaxWarps];
  // The barrier that is filling up.
  unsigned num_arrived = 0;
  unsigned barrier_parity = 0;
  Site barrier_site{"", 0};
  Votes votes{0, 0, 1};
  // A ring of threads that can run.
  unsigned ready[kMaxThreads];
  unsigned ready_head = 0;
  unsigned num_ready = 0;
  // The schedule.
  bool configured = false;
  Order order = Order::kRandom;
  uint64_t seed = 0;
  uint64_t random_state = 0;
  unsigned atomics_until_yield = 0;
  // Lasting.
  FiberSet sets[kFiberSets];
  Fiber host;
  char launch_sync = 0;
  char finish_sync = 0;
};

inline Machine machine;

// ---------------------------------------------------------------- order of execution

FASTPRUNE_SIM_HIDDEN inline uint64_t next_random() {  // splitmix64
  uint64_t z = (machine.random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

FASTPRUNE_SIM_HIDDEN inline unsigned random_below(unsigned n) {
  return static_cast<unsigned>(((next_random() >> 32) * n) >> 32);
}

// The seed also chooses the garbage in shared memory, in every mode.
inline void set_schedule(uint64_t seed, Order order = Order::kRandom) {
  machine.seed = machine.random_state = seed;
  machine.atomics_until_yield = 0;
  machine.order = order;
  machine.configured = true;
}

// FASTPRUNE_SIM_SEED=<integer>, FASTPRUNE_SIM_ORDER=random|reversed|forward, read once unless
// set_schedule() was called.
inline void configure_from_environment() {
  if (machine.configured) return;
  const char* seed = std::getenv("FASTPRUNE_SIM_SEED");
  const char* order = std::getenv("FASTPRUNE_SIM_ORDER");
  const std::string name = order ? order : "random";
  if (name != "random" && name != "reversed" && name != "forward") {
    throw std::runtime_error("FASTPRUNE_SIM_ORDER: expected random, reversed or forward, got " +
                             name);
  }
  set_schedule(seed ? std::strtoull(seed, nullptr, 10) : 0, name == "random"     ? Order::kRandom
                                                            : name == "reversed" ? Order::kReversed
                                                                                 : Order::kForward);
}

FASTPRUNE_SIM_HIDDEN inline void make_ready(CudaThread& thread) {
  thread.wait = Wait::kNothing;
  machine.ready[(machine.ready_head + machine.num_ready++) % kMaxThreads] = thread.rank;
}

// Visits the threads of the block in the order in which a barrier lets them go.
template <class Visit>
FASTPRUNE_SIM_HIDDEN inline void in_order(unsigned n, Visit visit) {
  const bool reversed = machine.order == Order::kReversed;
  for (unsigned i = 0; i < n; ++i) visit(reversed ? n - 1 - i : i);
}

FASTPRUNE_SIM_HIDDEN inline CudaThread& take_ready() {
  const unsigned head = machine.ready_head;
  if (machine.order == Order::kRandom) {
    const unsigned chosen = (head + random_below(machine.num_ready)) % kMaxThreads;
    const unsigned rank = machine.ready[chosen];
    machine.ready[chosen] = machine.ready[head];
    machine.ready[head] = rank;
  }
  machine.ready_head = (head + 1) % kMaxThreads;
  --machine.num_ready;
  return machine.threads[machine.ready[head]];
}

// ---------------------------------------------------------------- mistakes

FASTPRUNE_SIM_HIDDEN inline void print_launch(const char* mistake) {
  const Machine& m = machine;
  std::fprintf(stderr,
               "fastprune simulator: %s\n  in block (%u, %u, %u) of the kernel launched at %s:%d "
               "with grid (%u, %u, %u), block (%u, %u, %u); schedule seed %llu\n",
               mistake, m.block_index.x, m.block_index.y, m.block_index.z, m.launch_site.file,
               m.launch_site.line, m.grid.x, m.grid.y, m.grid.z, m.block.x, m.block.y, m.block.z,
               static_cast<unsigned long long>(m.seed));
}

FASTPRUNE_SIM_HIDDEN inline bool waits_alike(const CudaThread& a, const CudaThread& b) {
  if (a.wait != b.wait || a.wait == Wait::kExited) return a.wait == b.wait;
  const bool same_site = a.site.file == b.site.file && a.site.line == b.site.line;
  return same_site &&
         (a.wait == Wait::kBarrier ||
          (a.rank / kWarp == b.rank / kWarp && a.mask == b.mask && a.operation == b.operation));
}

FASTPRUNE_SIM_HIDDEN inline void print_wait(const CudaThread& thread, unsigned count) {
  std::fprintf(stderr, "  %u thread%s, the first is %u: ", count, count == 1 ? "" : "s",
               thread.rank);
  if (thread.wait == Wait::kExited) {
    std::fprintf(stderr, "exited\n");
  } else if (thread.wait == Wait::kNothing) {
    std::fprintf(stderr, "running\n");
  } else if (thread.wait == Wait::kBarrier) {
    std::fprintf(stderr, "at the barrier %s:%d\n", thread.site.file, thread.site.line);
  } else {
    std::fprintf(stderr, "at %s with mask 0x%08x, %s:%d\n",
                 kWarpOperationNames[static_cast<int>(thread.operation)], thread.mask,
                 thread.site.file, thread.site.line);
  }
}

// One line for each group of threads that wait for the same thing, then abort().
[[noreturn]] FASTPRUNE_SIM_HIDDEN inline void report(const char* mistake) {
  print_launch(mistake);
  static bool printed[kMaxThreads];
  for (unsigned i = 0; i < machine.num_threads; ++i) {
    if (printed[i]) continue;
    unsigned count = 0;
    for (unsigned j = i; j < machine.num_threads; ++j) {
      if (printed[j] || !waits_alike(machine.threads[i], machine.threads[j])) continue;
      printed[j] = true;
      ++count;
    }
    print_wait(machine.threads[i], count);
  }
  std::fflush(stderr);
  std::abort();
}

// ---------------------------------------------------------------- taking turns

// The current thread waits, is ready or has exited: go on with another one.
FASTPRUNE_SIM_HIDDEN inline void reschedule() {
  CudaThread& self = *machine.current;
  if (machine.num_ready == 0) {
    if (machine.num_live != 0) {
      report("deadlock: no thread can run, and these wait for threads that never arrive");
    }
    switch_fiber(self.fiber, machine.host);
    return;
  }
  CudaThread& next = take_ready();
  if (&next == &self) return;
  machine.current = &next;
  switch_fiber(self.fiber, next.fiber);
}

FASTPRUNE_SIM_HIDDEN inline void yield() {
  make_ready(*machine.current);
  reschedule();
}

// ---------------------------------------------------------------- barriers of the block

FASTPRUNE_SIM_HIDDEN inline void open_barrier() {
  in_order(machine.num_threads, [](unsigned rank) FASTPRUNE_SIM_HIDDEN {
    CudaThread& thread = machine.threads[rank];
    if (thread.wait != Wait::kBarrier) return;
    thread.votes = machine.votes;
    make_ready(thread);
  });
  machine.num_arrived = 0;
  machine.barrier_parity ^= 1;
  machine.votes = Votes{0, 0, 1};
}

FASTPRUNE_SIM_HIDDEN inline Votes block_barrier(int predicate, Site site) {
  Machine& m = machine;
  CudaThread& self = *m.current;
  self.wait = Wait::kBarrier;
  self.site = site;
  if (m.num_arrived == 0) m.barrier_site = site;
  if (m.barrier_site.line != site.line || m.barrier_site.file != site.file) {
    report("divergent barrier: threads of the block meet at different __syncthreads");
  }
  char* sync = &m.set->barrier_sync[m.barrier_parity];
  release(sync);
  m.votes.count += predicate != 0;
  m.votes.any |= predicate != 0;
  m.votes.all &= predicate != 0;
  if (++m.num_arrived == m.num_live) open_barrier();
  reschedule();
  acquire(sync);
  return self.votes;
}

// ---------------------------------------------------------------- warp operations

// What CUDA leaves undefined must not look like a plausible number.
constexpr uint64_t kUndefined = 0xa5a5a5a5dead7ff1ull;

FASTPRUNE_SIM_HIDDEN inline void finish_warp_operation(unsigned warp, unsigned present) {
  Machine& m = machine;
  CudaThread* lanes = m.threads + warp * kWarp;
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (present >> lane & 1) ballot |= static_cast<unsigned>(lanes[lane].value & 1) << lane;
  }
  in_order(kWarp, [=](unsigned lane) FASTPRUNE_SIM_HIDDEN {
    if (!(present >> lane & 1)) return;
    CudaThread& thread = lanes[lane];
    switch (thread.operation) {
      case WarpOperation::kSync:
        break;
      case WarpOperation::kBallot:
        thread.result = ballot;
        break;
      case WarpOperation::kAny:
        thread.result = ballot != 0;
        break;
      case WarpOperation::kAll:
        thread.result = ballot == present;
        break;
      default:
        thread.result =
            present >> thread.source_lane & 1 ? lanes[thread.source_lane].value : kUndefined;
    }
    make_ready(thread);
  });
  m.waiting_lanes[warp] &= ~present;
}

// Lanes that are named but exited, or beyond the end of the block, do not take part.
FASTPRUNE_SIM_HIDDEN inline void try_warp_operation(const CudaThread& thread) {
  const unsigned warp = thread.rank / kWarp;
  const unsigned present = thread.mask & machine.live_lanes[warp];
  if (present & ~machine.waiting_lanes[warp]) return;
  const CudaThread* lanes = machine.threads + warp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(present >> lane & 1)) continue;
    if (lanes[lane].mask != thread.mask || lanes[lane].operation != thread.operation) return;
  }
  finish_warp_operation(warp, present);
}

// The lanes already waiting for this one share its synchronisation object.
FASTPRUNE_SIM_HIDDEN inline unsigned join_group(const CudaThread& self, unsigned warp) {
  const CudaThread* lanes = machine.threads + warp * kWarp;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (machine.waiting_lanes[warp] >> lane & 1 && lanes[lane].mask == self.mask &&
        lanes[lane].operation == self.operation) {
      return lanes[lane].group;
    }
  }
  return machine.next_group[warp]++ % kWarpGroups;
}

FASTPRUNE_SIM_HIDDEN inline uint64_t warp_operation(WarpOperation operation, unsigned mask,
                                                    uint64_t value, unsigned source_lane,
                                                    Site site) {
  CudaThread& self = *machine.current;
  const unsigned warp = self.rank / kWarp;
  const unsigned lane = self.rank % kWarp;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source_lane = source_lane;
  self.site = site;
  self.wait = Wait::kWarpOperation;
  if (!(mask >> lane & 1)) report("a lane calls a warp operation whose mask does not name it");
  // CUDA promises an order of memory accesses for __syncwarp, not for shuffles and votes.
  const bool orders_memory = kThreadSanitizer && operation == WarpOperation::kSync;
  char* sync = nullptr;
  if (orders_memory) {
    self.group = join_group(self, warp);
    sync = &machine.set->warp_sync[warp][self.group];
    release(sync);
  }
  machine.waiting_lanes[warp] |= 1u << lane;
  try_warp_operation(self);
  reschedule();
  if (orders_memory) acquire(sync);
  return self.result;
}

// ---------------------------------------------------------------- atomics and fences

// Atomics are relaxed. A fence before one publishes what was written before the fence; a fence
// after one makes what others published there visible (the fence-fence pattern of the CUDA
// memory model, here for ThreadSanitizer, which does not understand fences).
FASTPRUNE_SIM_HIDDEN inline void before_atomic() {
  if (machine.atomics_until_yield-- != 0) return;
  machine.atomics_until_yield = random_below(32);
  yield();
}

FASTPRUNE_SIM_HIDDEN inline void after_atomic(void* address) {
  if (!kThreadSanitizer) return;
  CudaThread& self = *machine.current;
  if (self.fenced) release(address);
  self.recent_atomics[self.num_recent++ % kRecentAtomics] = address;
}

FASTPRUNE_SIM_HIDDEN inline void fence() {
  CudaThread& self = *machine.current;
  yield();
  if (!kThreadSanitizer) return;
  const unsigned n = self.num_recent < kRecentAtomics ? self.num_recent : kRecentAtomics;
  for (unsigned i = 0; i < n; ++i) acquire(self.recent_atomics[i]);
  self.num_recent = 0;
  self.fenced = true;
}

// ---------------------------------------------------------------- life of a thread

FASTPRUNE_SIM_HIDDEN inline void exit_thread() {
  CudaThread& self = *machine.current;
  const unsigned warp = self.rank / kWarp;
  self.wait = Wait::kExited;
  machine.live_lanes[warp] &= ~(1u << self.rank % kWarp);
  --machine.num_live;
  // An exited thread no longer holds up the others.
  if (machine.num_arrived != 0 && machine.num_arrived == machine.num_live) open_barrier();
  for (unsigned lane = 0; lane < kWarp && machine.waiting_lanes[warp] != 0; ++lane) {
    if (machine.waiting_lanes[warp] >> lane & 1) {
      try_warp_operation(machine.threads[warp * kWarp + lane]);
    }
  }
}

// A fiber serves one thread of one block after another.
FASTPRUNE_SIM_HIDDEN inline void fiber_main() {
  finish_first_switch();
  for (;;) {
    acquire(&machine.launch_sync);
    machine.run_kernel(machine.bound_kernel);
    release(&machine.finish_sync);
    exit_thread();
    reschedule();
  }
}

// ---------------------------------------------------------------- shared memory

struct Range {
  void* begin = nullptr;
  size_t bytes = 0;
};

// New contents, and for ThreadSanitizer new memory: what an earlier block did there is no race.
FASTPRUNE_SIM_HIDDEN inline void refill(Range range) {
  if (range.begin == nullptr || range.bytes == 0) return;
  static constexpr unsigned char kGarbage[] = {0xff, 0xa5, 0x7f, 0x80, 0x5a};
  const unsigned char garbage = kGarbage[random_below(sizeof kGarbage)];
#if defined(__SANITIZE_THREAD__)
  const auto begin = reinterpret_cast<unsigned long>(range.begin) & ~7ul;
  const auto end = (reinterpret_cast<unsigned long>(range.begin) + range.bytes + 7) & ~7ul;
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  std::memset(range.begin, garbage, range.bytes);
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  __tsan_java_free(begin, end - begin);
  __tsan_java_alloc(begin, end - begin);
#else
  std::memset(range.begin, garbage, range.bytes);
#endif
}

struct StaticSharedQuery {
  uintptr_t kernel;
  Range found;
};

inline int match_module(dl_phdr_info* info, size_t, void* data) {
  auto& query = *static_cast<StaticSharedQuery*>(data);
  bool holds_kernel = false;
  size_t tls_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    if (segment.p_type == PT_TLS) tls_bytes = segment.p_memsz;
    holds_kernel |= segment.p_type == PT_LOAD && query.kernel - begin < segment.p_memsz;
  }
  if (!holds_kernel) return 0;
  query.found = {info->dlpi_tls_data, info->dlpi_tls_data ? tls_bytes : 0};
  return 1;
}

// __shared__ variables are thread-local ones of the host thread: the compiler gathers those of
// all functions and templates, so the thread-local block of the module that holds the kernel is
// the static shared memory.
inline Range static_shared_of(const void* kernel) {
  StaticSharedQuery query{reinterpret_cast<uintptr_t>(kernel), {}};
  dl_iterate_phdr(match_module, &query);
  return query.found;
}

#if defined(__SANITIZE_THREAD__)

// Part of the static shared memory, so that one range is declared new for each block: a stray
// index in it is AddressSanitizer's to find.
class DynamicShared {
 public:
  explicit DynamicShared(size_t) {}
  Range range() const { return {}; }
  void* begin() const {
    alignas(128) static thread_local unsigned char memory[kMaxSharedBytes];
    return memory;
  }
};

// ThreadSanitizer knows a single heap whose memory may be declared new, and searches all of it
// when it reports a race there: the heap is the shared memory and nothing else.
inline void prepare_sanitizer(Range shared) {
  static void* prepared = nullptr;
  if (prepared == shared.begin) return;
  if (prepared != nullptr) {
    throw std::runtime_error(
        "under ThreadSanitizer all kernels must be in one module and "
        "launched from one host thread");
  }
  prepared = shared.begin;
  const auto begin = reinterpret_cast<unsigned long>(shared.begin) & ~7ul;
  __tsan_java_init(begin, (shared.bytes + 15) & ~7ul);
}

#else

// Of exactly the requested size, so that AddressSanitizer sees an access beyond its end.
class DynamicShared {
 public:
  explicit DynamicShared(size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&memory_, 128, bytes) != 0) throw std::bad_alloc();
  }
  DynamicShared(const DynamicShared&) = delete;
  DynamicShared& operator=(const DynamicShared&) = delete;
  ~DynamicShared() { std::free(memory_); }
  Range range() const { return {memory_, bytes_}; }
  void* begin() const { return memory_; }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
};

inline void prepare_sanitizer(Range) {}

#endif

// ---------------------------------------------------------------- blocks and launches

FASTPRUNE_SIM_HIDDEN inline void prepare_set(FiberSet& set, unsigned num_threads) {
  if (set.threads == nullptr) set.threads = new CudaThread[kMaxThreads]();
  for (; set.created < num_threads; ++set.created) {
    create_fiber(set.threads[set.created].fiber, fiber_main);
  }
}

FASTPRUNE_SIM_HIDDEN inline void prepare_threads() {
  Machine& m = machine;
  for (unsigned rank = 0; rank < m.num_threads; ++rank) {
    CudaThread& thread = m.threads[rank];
    thread.rank = rank;
    thread.index = {rank % m.block.x, rank / m.block.x % m.block.y, rank / (m.block.x * m.block.y)};
    thread.fenced = false;
    thread.num_recent = 0;
    m.live_lanes[rank / kWarp] |= 1u << rank % kWarp;
  }
  in_order(m.num_threads,
           [](unsigned rank) FASTPRUNE_SIM_HIDDEN { make_ready(machine.threads[rank]); });
}

FASTPRUNE_SIM_HIDDEN inline void run_block(uint64_t number, uint64_t turn) {
  Machine& m = machine;
  m.block_index = {static_cast<unsigned>(number % m.grid.x),
                   static_cast<unsigned>(number / m.grid.x % m.grid.y),
                   static_cast<unsigned>(number / (uint64_t{m.grid.x} * m.grid.y))};
  m.num_threads = m.num_live = m.block.x * m.block.y * m.block.z;
  m.set = &m.sets[turn % kFiberSets];
  prepare_set(*m.set, m.num_threads);
  m.threads = m.set->threads;
  for (unsigned warp = 0; warp < kMaxWarps; ++warp) m.live_lanes[warp] = m.waiting_lanes[warp] = 0;
  m.num_arrived = m.num_ready = m.ready_head = 0;
  m.votes = Votes{0, 0, 1};
  prepare_threads();
  CudaThread& first = take_ready();
  m.current = &first;
  switch_fiber(m.host, first.fiber);
  m.current = nullptr;
}

inline std::string describe(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

inline void check_launch(dim3 grid, dim3 block, size_t shared_bytes, Site site) {
  const char* wrong = nullptr;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (machine.running) wrong = "a launch inside a kernel";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) wrong = "an empty grid";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) wrong = "the grid is too large";
  if (threads == 0) wrong = "an empty block";
  if (threads > kMaxThreads || block.z > 64) wrong = "the block has too many threads";
  if (shared_bytes > kMaxSharedBytes) wrong = "too much dynamic shared memory";
  if (wrong == nullptr) return;
  throw std::runtime_error(std::string("kernel launch at ") + site.file + ":" +
                           std::to_string(site.line) + " failed: invalid configuration argument: " +
                           wrong + " (grid " + describe(grid) + ", block " + describe(block) +
                           ", " + std::to_string(shared_bytes) + " bytes of shared memory)");
}

inline std::vector<uint64_t> block_order(uint64_t num_blocks) {
  std::vector<uint64_t> order(num_blocks);
  const bool reversed = machine.order == Order::kReversed;
  for (uint64_t i = 0; i < num_blocks; ++i) order[i] = reversed ? num_blocks - 1 - i : i;
  if (machine.order != Order::kRandom) return order;
  for (uint64_t i = num_blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  return order;
}

inline void run_launch(const void* kernel, void (*run_kernel)(const void*), const void* bound,
                       dim3 grid, dim3 block, size_t dynamic_shared_bytes, Site site) {
  check_launch(grid, block, dynamic_shared_bytes, site);
  configure_from_environment();
  prepare_sanitizer(static_shared_of(kernel));
  const DynamicShared dynamic_shared(dynamic_shared_bytes);
  const std::vector<uint64_t> order = block_order(uint64_t{grid.x} * grid.y * grid.z);
  Machine& m = machine;
  m.running = true;
  m.grid = grid;
  m.block = block;
  m.launch_site = site;
  m.run_kernel = run_kernel;
  m.bound_kernel = bound;
  m.dynamic_shared = dynamic_shared.begin();
  adopt_host(m.host);
  release(&m.launch_sync);
  for (uint64_t turn = 0; turn < order.size(); ++turn) {
    refill(static_shared_of(kernel));
    refill(dynamic_shared.range());
    run_block(order[turn], turn);
  }
  acquire(&m.finish_sync);
  m.running = false;
}

template <class... Parameters>
struct BoundKernel {
  void (*kernel)(Parameters...);
  std::tuple<Parameters...> arguments;
  static void run(const void* self) {
    const auto& bound = *static_cast<const BoundKernel*>(self);
    std::apply(bound.kernel, bound.arguments);
  }
};

// Every thread gets its own copy of the arguments, converted once, as on the device.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            Site site, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "wrong number of arguments");
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "copied bytewise to the GPU");
  static_assert((sizeof(Parameters) + ... + 0) <= kMaxArgumentBytes, "too many bytes of arguments");
  using Bound = BoundKernel<Parameters...>;
  const Bound bound{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  run_launch(reinterpret_cast<const void*>(kernel), Bound::run, &bound, grid, block,
             dynamic_shared_bytes, site);
}

}  // namespace fastprune::sim
