// Runs CUDA kernels on a CPU, for tests: the sources are compiled unchanged behind this header.
//
// A CUDA thread is a fiber with a stack of its own; the fibers of a block take turns, and blocks follow one
// another. A fiber runs until it comes to a barrier, or needs other lanes of its warp; a warp runs as far as
// it can before the next one has its turn. In which order lanes, warps and blocks take their turns is an
// argument: what depends on it is a race.
//
// What it does not show: time; a partial mask (warp operations wait for all lanes that have not ended);
// what a kernel reads where nobody wrote, except that memory is filled with NaNs before.
#pragma once
#define PHIDIAS_SHIM

#include <csetjmp>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block runs at a time
#define __constant__ static const
#define DYN_SHARED(T, name) T* name = reinterpret_cast<T*>(shim::state.shared)

namespace shim {

struct Index { unsigned x, y, z; };

const unsigned LANES = 32;
const size_t STACK = 128 << 10;

enum class Turn { Ready, Barrier, Warp, Ended };

// A copy to shared memory that is done when it is waited for, not before.
struct Copy { void* to; const void* from; unsigned bytes, group; };

struct Fiber {
  jmp_buf point;
  ucontext_t start;
  char* stack = nullptr;
  bool entered = false;
  unsigned number = 0;
  Index index{};
  Turn turn = Turn::Ended;
  unsigned exchanges = 0;
  unsigned group = 0;
  std::deque<Copy> copies;
};

// What lanes hand to each other. Two places, used by turns: a lane may be at its next exchange while
// another still reads this one.
struct Warp {
  unsigned alive = 0, waiting = 0;
  alignas(16) unsigned char place[2][LANES][32];
};

struct State {
  jmp_buf scheduler;
  ucontext_t first;
  std::deque<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber* now = nullptr;
  unsigned threads = 0, alive = 0, waiting = 0;
  int votes[2] = {0, 0};
  unsigned barrier = 0;
  void (*kernel)(void**) = nullptr;
  void** arguments = nullptr;
  unsigned char* shared = nullptr;
  Index block{}, grid{}, threads_of{};
};

static State state;

inline Warp& warp() { return state.warps[state.now->number / LANES]; }
inline unsigned lane() { return state.now->number % LANES; }

// ---- taking turns: a jump, since swapcontext enters the system to change the signal mask --------------

__attribute__((noinline)) static void leave() {
  if (!_setjmp(state.now->point)) _longjmp(state.scheduler, 1);
}

static void release_barrier() {
  if (state.alive == 0 || state.waiting != state.alive) return;
  state.waiting = 0;
  state.barrier++;
  state.votes[state.barrier & 1] = 0;
  for (unsigned i = 0; i < state.threads; i++)
    if (state.fibers[i].turn == Turn::Barrier) state.fibers[i].turn = Turn::Ready;
}

static void release_warp(unsigned number) {
  Warp& w = state.warps[number];
  if (w.alive == 0 || w.waiting != w.alive) return;
  w.waiting = 0;
  for (unsigned i = number * LANES; i < state.threads && i < (number + 1) * LANES; i++)
    if (state.fibers[i].turn == Turn::Warp) state.fibers[i].turn = Turn::Ready;
}

inline void wait_block() {
  state.now->turn = Turn::Barrier;
  state.waiting++;
  release_barrier();
  if (state.now->turn != Turn::Ready) leave();
}

inline void wait_warp() {
  state.now->turn = Turn::Warp;
  warp().waiting++;
  release_warp(state.now->number / LANES);
  if (state.now->turn != Turn::Ready) leave();
}

// Threads of all blocks and launches run on these stacks, one after the other.
static void body() {
  for (;;) {
    state.kernel(state.arguments);
    Fiber& f = *state.now;
    f.turn = Turn::Ended;
    state.alive--;
    state.warps[f.number / LANES].alive--;
    release_barrier();
    release_warp(f.number / LANES);
    leave();
  }
}

__attribute__((noinline)) static void enter() {
  if (_setjmp(state.scheduler)) return;
  if (state.now->entered) _longjmp(state.now->point, 1);
  state.now->entered = true;
  setcontext(&state.now->start);
}

// Which turn each of n takes: in order, in reverse, or shuffled (Fisher and Yates).
struct Order {
  unsigned kind;
  uint64_t random;
  unsigned below(unsigned n) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return (random >> 33) % n;
  }
  std::vector<unsigned> of(unsigned n) {
    std::vector<unsigned> turns(n);
    for (unsigned i = 0; i < n; i++) turns[i] = kind == 1 ? n - 1 - i : i;
    if (kind == 2)
      for (unsigned i = n; i > 1; i--) std::swap(turns[i - 1], turns[below(i)]);
    return turns;
  }
};

// Each lane that can goes on to where it has to wait. Whether there was one.
static bool run_lanes(unsigned warp, const std::vector<unsigned>& lanes) {
  bool ran = false;
  for (unsigned l : lanes) {
    unsigned i = warp * LANES + l;
    if (i >= state.threads || state.fibers[i].turn != Turn::Ready) continue;
    state.now = &state.fibers[i];
    enter();
    ran = true;
  }
  return ran;
}

static bool run_block(Order& order) {
  unsigned n = state.threads, n_warps = (n + LANES - 1) / LANES;
  state.alive = n;
  state.waiting = 0;
  state.votes[0] = state.votes[1] = 0;
  state.warps.assign(n_warps, Warp{});
  for (unsigned i = 0; i < n; i++) {
    Fiber& f = state.fibers[i];
    f.turn = Turn::Ready;
    f.number = i;
    f.index = {i % state.threads_of.x, i / state.threads_of.x % state.threads_of.y, i / state.threads_of.x / state.threads_of.y};
    f.exchanges = f.group = 0;
    f.copies.clear();
    state.warps[i / LANES].alive++;
  }
  std::vector<unsigned> lanes = order.of(LANES), warps = order.of(n_warps);
  while (state.alive) {
    bool ran = false;
    for (unsigned w : warps) {
      // Shuffled, a warp may be overtaken anywhere.
      unsigned steps = order.kind == 2 ? 1 + order.below(4) : ~0u;
      while (steps-- > 0 && run_lanes(w, lanes)) ran = true;
    }
    if (!ran) return false;
  }
  return true;
}

// ---- between lanes and threads --------------------------------------------------------------------------

// Shows a value to the other lanes; what they showed is at the result, one place a lane.
template <class T>
inline const unsigned char (*show(const T& v))[32] {
  static_assert(sizeof(T) <= 32 && std::is_trivially_copyable<T>::value, "fits a place");
  unsigned char(*places)[32] = warp().place[state.now->exchanges++ & 1];
  memcpy(places[lane()], &v, sizeof v);
  wait_warp();
  return places;
}

template <class T>
inline T shuffle(T v, unsigned from) {
  auto places = show(v);
  T got;
  memcpy(&got, places[from % LANES], sizeof got);
  return got;
}

inline unsigned ballot(bool v) {
  // Lanes that had ended before did not vote: what is in their place is of an earlier exchange.
  struct Vote { unsigned exchange, set; } own = {state.now->exchanges + 1, v}, other;
  auto places = show(own);
  unsigned all = 0;
  for (unsigned l = 0; l < LANES; l++) {
    memcpy(&other, places[l], sizeof other);
    if (other.exchange == own.exchange && other.set) all |= 1u << l;
  }
  return all;
}

inline int vote_or(bool v) {
  // Two counts, used by turns: the barrier clears the one that nobody reads any more.
  int& votes = state.votes[state.barrier & 1];
  votes |= v;
  wait_block();
  return votes;
}

// d += a b of a warp; the fragments are in common.cuh. `element(register, i)` is the i-th value in it.
template <unsigned PER, class Sum, class A, class B>
inline void mma(Sum d[4], const unsigned a[4], const unsigned b[2], A a_element, B b_element) {
  struct Registers { unsigned a[4], b[2]; } own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  auto places = show(own);
  unsigned g = lane() / 4, t = lane() % 4;
  for (unsigned i = 0; i < 4; i++) {
    unsigned high = i / 2, column = 2 * t + i % 2;
    Sum sum = d[i];
    for (unsigned half = 0; half < 2; half++)
      for (unsigned of = 0; of < 4; of++) {
        unsigned ra, rb;
        memcpy(&ra, places[g * 4 + of] + offsetof(Registers, a) + 4 * (high + 2 * half), 4);
        memcpy(&rb, places[column * 4 + of] + offsetof(Registers, b) + 4 * half, 4);
        for (unsigned k = 0; k < PER; k++) sum += a_element(ra, k) * b_element(rb, k);
      }
    d[i] = sum;
  }
}

// ---- kernels by name ------------------------------------------------------------------------------------

// What an argument is: p pointer, u unsigned, i signed, f float.
template <class T>
constexpr char kind() {
  static_assert(std::is_pointer<T>::value || sizeof(T) == 4, "a pointer or four bytes");
  return std::is_pointer<T>::value ? 'p' : std::is_floating_point<T>::value ? 'f' : std::is_unsigned<T>::value ? 'u' : 'i';
}

template <auto K>
struct Called;
template <class... A, void (*K)(A...)>
struct Called<K> {
  static constexpr char kinds[] = {kind<A>()..., 0};
  template <size_t... I>
  static void with(void** arguments, std::index_sequence<I...>) {
    K(*reinterpret_cast<std::remove_cv_t<A>*>(arguments[I])...);
  }
  static void call(void** arguments) { with(arguments, std::index_sequence_for<A...>{}); }
};

struct Entry { const char* name; const char* kinds; void (*call)(void**); };
extern const Entry entries[];

}  // namespace shim

#define SHIM_ENTRY(name) {#name, shim::Called<name>::kinds, shim::Called<name>::call}

// Runs a kernel: 0 done, 1 no such kernel, 2 other arguments than `kinds` (written to `message`), 3 some
// threads wait at a barrier for ever.
extern "C" __attribute__((visibility("default"))) int phidias_shim_launch(
    const char* name, const char* kinds, const unsigned grid[3], const unsigned block[3], unsigned char* shared,
    size_t shared_bytes, void** arguments, unsigned order, unsigned seed, char* message, size_t message_bytes) {
  using shim::state;
  const shim::Entry* entry = shim::entries;
  while (entry->name && strcmp(entry->name, name)) entry++;
  if (!entry->name) return 1;
  if (strcmp(entry->kinds, kinds)) {
    snprintf(message, message_bytes, "%s", entry->kinds);
    return 2;
  }
  state.kernel = entry->call;
  state.arguments = arguments;
  state.shared = shared;
  state.threads = block[0] * block[1] * block[2];
  state.threads_of = {block[0], block[1], block[2]};
  state.grid = {grid[0], grid[1], grid[2]};
  while (state.fibers.size() < state.threads) {
    state.fibers.emplace_back();
    shim::Fiber& f = state.fibers.back();
    f.stack = static_cast<char*>(malloc(shim::STACK));
    if (!f.stack) abort();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = shim::STACK;
    f.start.uc_link = nullptr;
    makecontext(&f.start, shim::body, 0);
  }
  shim::Order turns{order, seed};
  for (unsigned b : turns.of(grid[0] * grid[1] * grid[2])) {
    state.block = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
    memset(shared, 0xFF, shared_bytes);
    if (!shim::run_block(turns)) {
      // Their stacks are in the middle of the kernel: new ones for the next launch.
      for (shim::Fiber& f : state.fibers) free(f.stack);
      state.fibers.clear();
      snprintf(message, message_bytes, "block %u, %u, %u", state.block.x, state.block.y, state.block.z);
      return 3;
    }
  }
  return 0;
}

// ---- the language -------------------------------------------------------------------------------------

#define threadIdx (shim::state.now->index)
#define blockIdx (shim::state.block)
#define blockDim (shim::state.threads_of)
#define gridDim (shim::state.grid)

static inline void __syncthreads() { shim::wait_block(); }
static inline int __syncthreads_or(int v) { return shim::vote_or(v != 0); }
static inline void __syncwarp(unsigned = ~0u) { shim::wait_warp(); }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <class T> inline T __shfl_sync(unsigned, T v, int from) { return shim::shuffle(v, from); }
template <class T> inline T __shfl_xor_sync(unsigned, T v, int mask) { return shim::shuffle(v, shim::lane() ^ mask); }
template <class T> inline T __shfl_up_sync(unsigned, T v, unsigned by) { return shim::shuffle(v, shim::lane() < by ? shim::lane() : shim::lane() - by); }
template <class T> inline T __shfl_down_sync(unsigned, T v, unsigned by) { return shim::shuffle(v, shim::lane() + by < shim::LANES ? shim::lane() + by : shim::lane()); }
static inline unsigned __ballot_sync(unsigned, int v) { return shim::ballot(v != 0); }
static inline int __any_sync(unsigned, int v) { return shim::ballot(v != 0) != 0; }
static inline int __all_sync(unsigned, int v) { return shim::ballot(v == 0) == 0; }

template <class T> inline T atomicAdd(T* at, T v) { T old = *at; *at += v; return old; }
template <class T> inline T atomicMax(T* at, T v) { T old = *at; if (v > old) *at = v; return old; }
template <class T> inline T atomicExch(T* at, T v) { T old = *at; *at = v; return old; }

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
static inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static inline int __float_as_int(float f) { return (int)__float_as_uint(f); }
static inline float __int_as_float(int i) { return __uint_as_float((unsigned)i); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }
static inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned out = 0;
  for (unsigned i = 0; i < 4; i++) {
    unsigned s = selector >> 4 * i & 15, byte = bytes >> 8 * (s & 7) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}
template <class T> inline T __ldg(const T* at) { return *at; }

// ---- what common.cuh has as PTX --------------------------------------------------------------------------

// An exponent of all ones stays; all else is shifted into place and divided by 2^-112, which is exact.
static inline float f16_to_f32(unsigned short h) {
  float magnitude = __uint_as_float((h & 0x7FFFu) << 13) * __uint_as_float(0x77800000u);
  unsigned special = (h & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0;
  return __uint_as_float(__float_as_uint(magnitude) | special | (h & 0x8000u) << 16);
}

static inline unsigned short f32_to_f16(float f) {
  unsigned bits = __float_as_uint(f), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return 0x7FFFu;  // as cvt gives it, whatever the NaN was
  if (magnitude >= 0x477FF000u) return (unsigned short)(sign | 0x7C00u);  // 65520, halfway to the next, and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14 one unit in the last place is 2^-24: added to 2^-1, the adder rounds to it.
    unsigned rounded = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
    return (unsigned short)(sign | rounded);
  }
  unsigned rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
  return (unsigned short)(sign | (rounded - 0x38000000u) >> 13);
}

static inline int dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> 8 * i) * (int)(int8_t)(b >> 8 * i);
  return c;
}
static inline int __dp4a(int a, int b, int c) { return dp4a(a, b, c); }

static inline void mma_s8(int d[4], const unsigned a[4], const unsigned b[2]) {
  auto element = [](unsigned r, unsigned i) { return (int)(int8_t)(r >> 8 * i); };
  shim::mma<4>(d, a, b, element, element);
}
static inline void mma_u8s8(int d[4], const unsigned a[4], const unsigned b[2]) {
  shim::mma<4>(d, a, b, [](unsigned r, unsigned i) { return (int)(uint8_t)(r >> 8 * i); }, [](unsigned r, unsigned i) { return (int)(int8_t)(r >> 8 * i); });
}
static inline void mma_u8s8(int d[4], const unsigned a[4], const unsigned b[2], const int c[4]) {
  for (int i = 0; i < 4; i++) d[i] = c[i];
  mma_u8s8(d, a, b);
}
static inline void mma_bf16(float d[4], const unsigned a[4], const unsigned b[2]) {
  auto element = [](unsigned r, unsigned i) { return __uint_as_float(i ? r & 0xFFFF0000u : r << 16); };
  shim::mma<2>(d, a, b, element, element);
}
static inline void mma_f16(float d[4], const unsigned a[4], const unsigned b[2]) {
  auto element = [](unsigned r, unsigned i) { return f16_to_f32((unsigned short)(r >> 16 * i)); };
  shim::mma<2>(d, a, b, element, element);
}

template <unsigned BYTES>
inline void cp_async(void* shared, const void* global) {
  if (((uintptr_t)shared | (uintptr_t)global) % BYTES) abort();
  shim::state.now->copies.push_back({shared, global, BYTES, shim::state.now->group});
}
static inline void cp_async16(void* shared, const void* global) { cp_async<16>(shared, global); }
static inline void cp_async8(void* shared, const void* global) { cp_async<8>(shared, global); }
static inline void cp_async_commit() { shim::state.now->group++; }
template <int N>
inline void cp_async_wait() {
  shim::Fiber& f = *shim::state.now;
  while (!f.copies.empty() && f.copies.front().group + N < f.group) {
    memcpy(f.copies.front().to, f.copies.front().from, f.copies.front().bytes);
    f.copies.pop_front();
  }
}

static inline float exp2_approx(float x) { return exp2f(x); }
