// Products of matrices whose sums stay in registers, for the operations written in C++.

#ifndef SHIFTNET_KERNELS_PRODUCTS_H_
#define SHIFTNET_KERNELS_PRODUCTS_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "native.h"

namespace shiftnet {

// The least number of parts that a gradient of weights is divided into, if there are enough pixels.
// Each part is summed separately, and parts are added in a fixed order, for any number of threads.
constexpr int64_t kParts = 16;

// What is done to a sum before it is stored, each optional: scale, bias, (ReLU,) addition (, ReLU).
// Pointers are those of the first channel and the first output pixel; pixels of `residual` are as
// far apart as those of the output.
struct Epilogue {
  const float *scale = nullptr, *bias = nullptr, *residual = nullptr;
  int64_t relu = kNoRelu;

  bool IsEmpty() const { return !scale && !bias && !residual && relu == kNoRelu; }
  // The epilogue of channels from `channel` and of pixels from `offset`, in floats.
  Epilogue At(int64_t channel, int64_t offset) const {
    return {scale ? scale + channel : nullptr, bias ? bias + channel : nullptr,
            residual ? residual + offset : nullptr, relu};
  }
};

// The geometry of `MultiplyTile`: distances in x between pixels and between rows of the kernel, the
// number of rows of the kernel and of values under each, distances between rows and vectors of the
// weights, the distance between pixels of the output, its channels, and what is done to it.
struct Tile {
  int64_t x_pixel, x_row, rows, depth, w_row, w_vector, out_pixel, out_channels;
  Epilogue epilogue;
};

// The scale and bias of a vector of channels, of which `left` exist from `first`.
struct Finish {
  const Epilogue& after;
  int64_t first, left;
  Vector scale, bias;

  Finish(const Epilogue& after, int64_t first, int64_t channels)
      : after(after), first(first), left(channels - first),
        scale(after.scale ? LoadPart(after.scale + first, left) : Vector{}),
        bias(after.bias ? LoadPart(after.bias + first, left) : Vector{}) {}

  // Stores the sums of the pixel at `offset`; kWhole says that it has as many channels as a vector.
  template <bool kWhole = false>
  void Write(Vector value, float* out, int64_t offset) const {
    const int64_t at = offset + first, count = kWhole ? kLanes : left;
    if (after.scale) value *= scale;
    if (after.bias) value += bias;
    if (after.relu == kReluBeforeResidual) value = Rectified(value);
    if (after.residual) value += LoadPart(after.residual + at, count);
    if (after.relu == kReluLast) value = Rectified(value);
    StorePart(out + at, value, count);
  }
};

// As `StoreTile`; kWhole says that all vectors are whole, so that stores need no test.
template <bool kWhole, int kPixels, int kVectors>
inline void StoreVectors(const Tile& tile, const Vector (&sums)[kPixels][kVectors], float* out) {
  if (tile.epilogue.IsEmpty()) {
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p, out += tile.out_pixel) {
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q) {
        const int64_t left = kWhole ? kLanes : tile.out_channels - q * kLanes;
        StorePart(out + q * kLanes, sums[p][q], left);
      }
    }
    return;
  }
#pragma GCC unroll 4
  for (int q = 0; q < kVectors; ++q) {
    const Finish finish(tile.epilogue, q * kLanes, tile.out_channels);
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      finish.template Write<kWhole>(sums[p][q], out, p * tile.out_pixel);
    }
  }
}

// Stores the sums of kPixels pixels and kVectors vectors of channels.
template <int kPixels, int kVectors>
inline void StoreTile(const Tile& tile, const Vector (&sums)[kPixels][kVectors], float* out) {
  if (tile.out_channels >= kVectors * kLanes) {
    StoreVectors<true>(tile, sums, out);
  } else {
    StoreVectors<false>(tile, sums, out);
  }
}

// out[p, :] = sum over r, j of x[r * x_row + p * x_pixel + j] * w[r, j, :], for kPixels pixels and
// kVectors vectors of channels.
template <int kPixels, int kVectors>
void MultiplyTile(const Tile& tile, const float* x, const float* w, float* out) {
  Vector sums[kPixels][kVectors] = {};
  const int64_t pixel = tile.x_pixel, w_row = tile.w_row, w_vector = tile.w_vector;
  for (int64_t r = 0; r < tile.rows; ++r, x += tile.x_row) {
    const float* a = x;
    for (const float* const end = a + tile.depth; a != end; ++a, w += w_row) {
      Vector b[kVectors];
      for (int q = 0; q < kVectors; ++q) {
        b[q] = Load(w + q * w_vector);
        KeepInRegister(b[q]);
      }
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        for (int q = 0; q < kVectors; ++q) sums[p][q] += b[q] * a[p * pixel];
      }
    }
  }
  StoreTile<kPixels, kVectors>(tile, sums, out);
}

using MultiplyFunction = void (*)(const Tile&, const float*, const float*, float*);

constexpr int kMaxPixels = 16, kMaxVectors = 4;

// The most pixels whose sums fit the registers together with a row of weights and a value of x.
constexpr int PixelsFor(int vectors) {
  return std::min(kMaxPixels, (kRegisters - 1 - vectors) / vectors);
}

template <int kVectors, size_t... kIndices>
constexpr std::array<MultiplyFunction, kMaxPixels> MultiplyRow(std::index_sequence<kIndices...>) {
  return {MultiplyTile<int(kIndices) + 1, kVectors>...};
}
template <int kVectors>
constexpr std::array<MultiplyFunction, kMaxPixels> MultiplyRow() {
  return MultiplyRow<kVectors>(std::make_index_sequence<PixelsFor(kVectors)>());
}
// By vectors and pixels, less one.
constexpr std::array<std::array<MultiplyFunction, kMaxPixels>, kMaxVectors> kMultiply = {
    MultiplyRow<1>(), MultiplyRow<2>(), MultiplyRow<3>(), MultiplyRow<4>()};

// The pixels per tile if `pixels` are divided evenly into the fewest tiles that fit the registers.
inline int64_t EvenPixels(int64_t pixels, int64_t vectors) {
  return CeilDiv(pixels, CeilDiv(pixels, PixelsFor(vectors)));
}

// The number of vectors per tile that takes the fewest cycles for rows of `pixels` pixels of
// `vectors` vectors each, with two loads and two multiplications per cycle and a latency of four.
inline int64_t BestVectors(int64_t pixels, int64_t vectors) {
  auto tile_cycles = [](int64_t p, int64_t q) {
    return std::max<int64_t>({p * q, p + q, 8});
  };
  int64_t best = 1, least = INT64_MAX;
  for (int64_t q = 1; q <= std::min<int64_t>(kMaxVectors, vectors); ++q) {
    const int64_t p = EvenPixels(pixels, q), rest = vectors % q;
    int64_t cycles = tile_cycles(p, q) * (vectors / q) + (rest ? tile_cycles(p, rest) : 0);
    cycles *= CeilDiv(pixels, p);
    if (cycles < least) least = cycles, best = q;
  }
  return best;
}

// sums[j, :] += sum over pixels of x[pixel, j] * dy[pixel, :], for kDepth values of x and kVectors
// vectors of channels.
struct GradientTile {
  int64_t x_pixel, x_row, dy_pixel, dy_row, rows, columns, sums_row;
};

template <int kDepth, int kVectors>
void GradientOfTile(const GradientTile& tile, const float* x, const float* dy, float* sums) {
  Vector total[kDepth][kVectors];
  for (int j = 0; j < kDepth; ++j) {
    for (int q = 0; q < kVectors; ++q) total[j][q] = Load(sums + j * tile.sums_row + q * kLanes);
  }
  for (int64_t r = 0; r < tile.rows; ++r, x += tile.x_row, dy += tile.dy_row) {
    const float *a = x, *b = dy;
    for (int64_t i = 0; i < tile.columns; ++i, a += tile.x_pixel, b += tile.dy_pixel) {
      Vector v[kVectors];
      for (int q = 0; q < kVectors; ++q) {
        v[q] = Load(b + q * kLanes);
        KeepInRegister(v[q]);
      }
#pragma GCC unroll 16
      for (int j = 0; j < kDepth; ++j) {
        for (int q = 0; q < kVectors; ++q) total[j][q] += v[q] * a[j];
      }
    }
  }
  for (int j = 0; j < kDepth; ++j) {
    for (int q = 0; q < kVectors; ++q) Store(sums + j * tile.sums_row + q * kLanes, total[j][q]);
  }
}

using GradientFunction = void (*)(const GradientTile&, const float*, const float*, float*);

template <int kVectors, size_t... kIndices>
constexpr std::array<GradientFunction, kMaxPixels> GradientRow(std::index_sequence<kIndices...>) {
  return {GradientOfTile<int(kIndices) + 1, kVectors>...};
}
template <int kVectors>
constexpr std::array<GradientFunction, kMaxPixels> GradientRow() {
  return GradientRow<kVectors>(std::make_index_sequence<PixelsFor(kVectors)>());
}
constexpr std::array<std::array<GradientFunction, kMaxPixels>, kMaxVectors> kGradient = {
    GradientRow<1>(), GradientRow<2>(), GradientRow<3>(), GradientRow<4>()};

// sums [depth, vectors * kLanes] += sum over pixels of x[pixel, :]^T y[pixel, :]. The caller sets
// all of `tile` except `sums_row`.
inline void AddOuter(GradientTile tile, int64_t depth, int64_t vectors, const float* x,
                     const float* y, float* sums) {
  tile.sums_row = vectors * kLanes;
  const int64_t block = BestVectors(depth, vectors);
  for (int64_t v = 0; v < vectors; v += block) {
    const int64_t count = std::min(block, vectors - v), length = EvenPixels(depth, count);
    for (int64_t j = 0; j < depth; j += length) {
      kGradient[count - 1][std::min(length, depth - j) - 1](
          tile, x + j, y + v * kLanes, sums + j * tile.sums_row + v * kLanes);
    }
  }
}

}  // namespace shiftnet

#endif  // SHIFTNET_KERNELS_PRODUCTS_H_
