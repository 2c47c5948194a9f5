// Sums of pixels and of their outer products on a CPU, called by XLA through its foreign function
// interface. Pixels are [count, channels], all float32, and are read once.
//
// Results do not depend on the number of threads: the pixels are divided into parts that depend on
// their number only, and the parts' sums are added in a fixed order.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"

namespace shiftnet {
namespace {

constexpr int64_t kChunk = 16 * 1024;       // bytes of pixels that stay in the first cache
constexpr int64_t kLeast = 64;              // pixels of a chunk
constexpr int64_t kRuns = 64, kOfRun = 16;  // pixels that are looked at before

// A value near each channel's mean: that of some pixels from everywhere. Products are those of the
// distances from it, so that few digits are lost when the mean is known and its part is taken off.
std::vector<float> NearMean(const float* x, int64_t count, int64_t channels) {
  std::vector<float> sums(channels);
  const int64_t runs = std::min(kRuns, CeilDiv(count, kOfRun)), length = std::min(kOfRun, count);
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t first = runs == 1 ? 0 : (count - length) * run / (runs - 1);
    for (int64_t i = first; i < first + length; ++i) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += x[i * channels + c];
    }
  }
  for (float& value : sums) value /= runs * length;
  return sums;
}

void Covariance(ffi::ThreadPool& pool, const float* x, int64_t count, int64_t channels,
                float* total, float* products) {
  const std::vector<float> near = NearMean(x, count, channels);
  const int64_t vectors = CeilDiv(channels, kLanes), pitch = vectors * kLanes;
  const int64_t chunk = std::max<int64_t>(kLeast, kChunk / (4 * pitch));
  const int64_t of_part = chunk * CeilDiv(CeilDiv(count, chunk), kParts);
  const int64_t parts = CeilDiv(count, of_part), size = pitch + channels * pitch;
  Buffer sums(parts * size);
  Parallel(pool, parts, [&](int64_t part) {
    float* const own = sums.get() + part * size;
    std::fill(own, own + size, 0.0f);
    Buffer centre(pitch), centred(chunk * pitch);
    std::copy(near.begin(), near.end(), centre.get());
    std::fill(centre.get() + channels, centre.get() + pitch, 0.0f);
    const int64_t end = std::min((part + 1) * of_part, count);
    for (int64_t first = part * of_part; first < end; first += chunk) {
      const int64_t pixels = std::min(chunk, end - first);
      for (int64_t v = 0; v < vectors; ++v) {
        const Vector middle = Load(centre.get() + v * kLanes);
        const int64_t left = channels - v * kLanes;
        Vector sum{};
        for (int64_t i = 0; i < pixels; ++i) {
          const Vector value = LoadPart(x + (first + i) * channels + v * kLanes, left) - middle;
          Store(centred.get() + i * pitch + v * kLanes, value);
          sum += value;
        }
        Store(own + v * kLanes, Load(own + v * kLanes) + sum);
      }
      AddOuter({pitch, 0, pitch, 0, 1, pixels, 0}, channels, vectors, centred.get(), centred.get(),
               own + pitch);
    }
  });

  std::vector<double> offset(channels);  // the sums of the distances
  const auto sum = [&](int64_t at) {
    double value = 0;
    for (int64_t part = 0; part < parts; ++part) value += sums.get()[part * size + at];
    return value;
  };
  for (int64_t c = 0; c < channels; ++c) {
    offset[c] = sum(c);
    total[c] = count * double(near[c]) + offset[c];
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t d = 0; d < channels; ++d) {
      products[c * channels + d] = sum(pitch + c * pitch + d) - offset[c] * offset[d] / count;
    }
    float& square = products[c * channels + c];
    square = square < 0 ? 0 : square;  // by rounding, where the channel is constant; NaN stays NaN
  }
}

// ------------------------------------------------------------------------------------------------
// XLA's side

ffi::Error Call(ffi::ThreadPool pool, Array x, ffi::Result<Array> total,
                ffi::Result<Array> products) {
  const int64_t repetitions = Repetitions({{&x, 2}});
  const auto sizes = x.dimensions().last(2);
  const int64_t count = sizes[0], channels = sizes[1];
  if (x.element_count() == 0 || int64_t(total->element_count()) != repetitions * channels ||
      int64_t(products->element_count()) != repetitions * channels * channels) {
    return ffi::Error::InvalidArgument("sizes of a covariance that do not fit");
  }
  for (int64_t i = 0; i < repetitions; ++i) {
    Covariance(pool, PartOf(x, i, repetitions), count, channels, PartOf(*total, i, repetitions),
               PartOf(*products, i, repetitions));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_covariance, Call, (BindArrays<1, 2>()));

}  // namespace shiftnet
