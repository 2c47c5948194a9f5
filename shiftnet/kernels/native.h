// What the operations in C++ share: vectors of floats, memory and threads.
//
// Everything is compiled for the machine it runs on (see native.py), so the width of a vector is known.
// Timed with AVX-512 and AVX2; other instruction sets compile and are untimed.

#ifndef SHIFTNET_KERNELS_NATIVE_H_
#define SHIFTNET_KERNELS_NATIVE_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace shiftnet {

namespace ffi = xla::ffi;

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector Load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline void Store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }

// Keeps the compiler from loading `value` again for each of its uses, where loads are what is scarce.
inline void KeepInRegister(Vector& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;
#endif
}

// The first `count` lanes; `count` may exceed the size of a vector. Memory beyond them is not
// accessed, and lanes beyond them are read as zeros.
#if defined(__AVX512F__)
inline __mmask16 Mask(int64_t count) { return count >= kLanes ? 0xffff : (1u << count) - 1; }
inline Vector LoadPart(const float* from, int64_t count) {
  return (Vector)_mm512_maskz_loadu_ps(Mask(count), from);
}
inline void StorePart(float* to, Vector value, int64_t count) {
  _mm512_mask_storeu_ps(to, Mask(count), (__m512)value);
}
#elif defined(__AVX__)
inline __m256i Mask(int64_t count) {
  static constexpr int32_t kOnes[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const int32_t* const from = kOnes + kLanes - std::min<int64_t>(count, kLanes);
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}
inline Vector LoadPart(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  return (Vector)_mm256_maskload_ps(from, Mask(count));
}
// Not a masked store, which takes AMD's processors a dozen cycles; apart, to keep callers small.
__attribute__((noinline)) inline void StoreFew(float* to, Vector value, int64_t count) {
  __m128 rest = _mm256_castps256_ps128((__m256)value);
  if (count & 4) {
    _mm_storeu_ps(to, rest);
    rest = _mm256_extractf128_ps((__m256)value, 1);
    to += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(to), rest);
    rest = _mm_movehl_ps(rest, rest);
    to += 2;
  }
  if (count & 1) _mm_store_ss(to, rest);
}
inline void StorePart(float* to, Vector value, int64_t count) {
  if (count >= kLanes) return Store(to, value);
  StoreFew(to, value, count);
}
#else
inline Vector LoadPart(const float* from, int64_t count) {
  if (count >= kLanes) return Load(from);
  float lanes[kLanes] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return Load(lanes);
}
inline void StorePart(float* to, Vector value, int64_t count) {
  if (count >= kLanes) return Store(to, value);
  float lanes[kLanes];
  Store(lanes, value);
  std::memcpy(to, lanes, count * sizeof(float));
}
#endif

// What comes after a result: no ReLU, or one before or after an addition.
enum Relu : int64_t { kNoRelu, kReluBeforeResidual, kReluLast };
inline Vector Rectified(Vector value) { return value < 0 ? Vector{} : value; }  // preserves NaN

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

// ------------------------------------------------------------------------------------------------
// Memory and threads

// A buffer of floats from a list of unused ones, because fresh memory costs page faults.
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    size += kLanes;  // loads of whole vectors may reach beyond the end
    {
      std::lock_guard<std::mutex> lock(mutex());
      for (auto block = idle().begin(); block != idle().end(); ++block) {
        if (block->size < size) continue;
        block_ = std::move(*block);
        idle().erase(block);
        return;
      }
      if (!idle().empty()) idle().erase(idle().begin());  // replaced by a larger one
    }
    block_.size = size;
    block_.data.reset(static_cast<float*>(::operator new(size * sizeof(float), kAlignment)));
  }
  ~Buffer() {
    std::lock_guard<std::mutex> lock(mutex());
    auto larger = [&](const Block& other) { return other.size >= block_.size; };
    auto place = std::find_if(idle().begin(), idle().end(), larger);
    idle().insert(place, std::move(block_));  // sorted by size
  }
  Buffer(const Buffer&) = delete;
  float* get() const { return block_.data.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  struct Block {
    int64_t size = 0;
    std::unique_ptr<float, Free> data;
  };
  static std::mutex& mutex() {
    static auto* mutex = new std::mutex;  // never destroyed: threads may outlive main
    return *mutex;
  }
  static std::vector<Block>& idle() {
    static auto* idle = new std::vector<Block>;
    return *idle;
  }
  Block block_;
};

// Runs a task, by the same instructions on whatever thread. Of two copies of its code, inlined into
// what this thread runs and into what the others run, a compiler may fuse a multiplication with an
// addition in one and not in the other, and then the bits depend on who was faster.
#if defined(__GNUC__) && !defined(__clang__)
#define SHIFTNET_ONE_COPY __attribute__((noipa))
#else
#define SHIFTNET_ONE_COPY __attribute__((noinline))
#endif
template <typename Task>
SHIFTNET_ONE_COPY void RunTask(const Task& task, int64_t i) {
  task(i);
}

// Spends a moment waiting for another thread, in a way that leaves it the core's resources.
inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How often that is done, 10 to 50 microseconds, before a thread sleeps: to be woken takes as long, and
// what it waits for is mostly the rest of a task of that length.
constexpr int kPauses = 1000;

// Calls task(0) to task(count - 1) on XLA's threads and on this one, and returns when all are done.
// This thread runs tasks too and waits only for tasks that other threads have started, so that there
// is no deadlock even if all of XLA's threads are in this function.
template <typename Task>
void Parallel(ffi::ThreadPool& pool, int64_t count, const Task& task) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  auto work = [state, count, &task] {  // `task` is used only until this function returns
    int64_t finished = 0;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; ++finished) {
      RunTask(task, i);
    }
    if (finished > 0 && state->done.fetch_add(finished) + finished == count) {
      std::lock_guard<std::mutex> lock(state->mutex);
      state->all_done.notify_all();
    }
  };
  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  for (int i = 0; i < kPauses && state->done.load() < count; ++i) Pause();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done.load() == count; });
}

// ------------------------------------------------------------------------------------------------
// Arguments from XLA

using Array = ffi::Buffer<ffi::F32>;

template <int kArguments, int kResults, typename Binding>
auto BindArrays(Binding&& binding) {
  if constexpr (kArguments > 0) {
    return BindArrays<kArguments - 1, kResults>(std::move(binding).template Arg<Array>());
  } else if constexpr (kResults > 1) {
    return BindArrays<0, kResults - 1>(std::move(binding).template Ret<Array>());
  } else {  // bindings cannot be moved, so the last step makes what is returned
    return std::move(binding).template Ret<Array>();
  }
}

// The binding of a function of XLA's threads, so many arrays and so many results.
template <int kArguments, int kResults>
auto BindArrays() {
  return BindArrays<kArguments, kResults>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>());
}

struct Images {
  int64_t count, height, width, channels;
};

inline Images ImagesOf(const Array& array) {
  const auto sizes = array.dimensions().last(4);
  return {sizes[0], sizes[1], sizes[2], sizes[3]};
}

// An array, and the number of its axes without the leading ones that come from jax.vmap.
struct Ranked {
  const Array* array;
  size_t rank;
};

// The product of the leading axes' sizes: the number of repetitions; -1 if the arrays' leading axes
// differ.
inline int64_t Repetitions(std::initializer_list<Ranked> arrays) {
  const auto leading = [](const Ranked& ranked) {
    return ranked.array->dimensions().first(ranked.array->dimensions().size() - ranked.rank);
  };
  for (const Ranked& ranked : arrays) {
    if (ranked.array->dimensions().size() < ranked.rank) return -1;
    const auto one = leading(*arrays.begin()), other = leading(ranked);
    if (!std::equal(one.begin(), one.end(), other.begin(), other.end())) return -1;
  }
  int64_t product = 1;
  for (const int64_t size : leading(*arrays.begin())) product *= size;
  return product;
}

// The part of an array that belongs to index `i` of the leading axes; null if the array is empty.
template <typename T>
auto PartOf(T& array, int64_t i, int64_t repetitions) -> decltype(array.typed_data()) {
  const int64_t size = array.element_count() / repetitions;
  return size == 0 ? nullptr : array.typed_data() + i * size;
}

}  // namespace shiftnet

#endif  // SHIFTNET_KERNELS_NATIVE_H_
