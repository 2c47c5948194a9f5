// The shift block on a CPU, called by XLA through its foreign function interface.
//
// y[h, w] = sum over e of relu(x[h * s + dh_e, w * s + dw_e] . w1[:, e] + b1[e]) * w2[e], where what
// lies outside of the image adds nothing. Images are [N, H, W, C], all float32.
//
// An image's expanded tensor, relu(x @ w1 + b1), stays in the cache and is never written to memory;
// the gradients recompute it. With a stride s, a channel is read at every s-th row and column only,
// starting at one that depends on its offset: the channels of one such phase are expanded together,
// at those pixels. Within a phase channels are sorted by offset, and the expanded pixels are padded
// with zeros, so that a vector of shifted channels takes a few loads, one per offset in it. Products
// are computed in registers (products.h).
//
// Results do not depend on the number of threads: one thread computes an image, or rows of it, and
// the gradients of the weights are summed in parts that depend on the number of images only and are
// then added in a fixed order.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "products.h"

namespace shiftnet {
namespace {

typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

// ------------------------------------------------------------------------------------------------
// Products with a constant matrix

// A matrix [depth, columns], in blocks of whole vectors of columns, zeros beyond the last.
class Matrix {
 public:
  // Element (i, j) is value(i, j). It will be multiplied with lines of `pixels`.
  template <typename Value>
  Matrix(ffi::ThreadPool& pool, int64_t depth, int64_t columns, int64_t pixels, const Value& value)
      : depth_(depth), columns_(columns), vectors_(CeilDiv(columns, kLanes)),
        block_(BestVectors(std::max<int64_t>(pixels, 1), std::max<int64_t>(vectors_, 1))),
        values_(depth * vectors_ * kLanes) {
    constexpr int64_t kRows = 16;  // of a task
    Parallel(pool, CeilDiv(depth, kRows), [&](int64_t task) {
      for (int64_t v = 0; v < vectors_; v += block_) {
        const int64_t width = std::min(block_, vectors_ - v) * kLanes, first = v * kLanes;
        for (int64_t i = task * kRows; i < std::min((task + 1) * kRows, depth); ++i) {
          float* const to = values_.get() + first * depth + i * width;
          const int64_t count = std::min(width, columns - first);
          for (int64_t j = 0; j < count; ++j) to[j] = value(i, first + j);
          std::fill(to + count, to + width, 0.0f);
        }
      }
    });
  }

  // out[p] = x[p] @ matrix for a line of pixels at the given distances, and the epilogue. Writes the
  // columns that the matrix has, or whole vectors if `padded`.
  void Multiply(const float* x, int64_t x_pixel, int64_t pixels, float* out, int64_t out_pixel,
                bool padded, const Epilogue& epilogue = {}) const {
    if (pixels == 0) return;  // if a stride is larger than the image
    Tile tile{};
    tile.x_pixel = x_pixel;
    tile.rows = 1;
    tile.depth = depth_;
    tile.out_pixel = out_pixel;
    for (int64_t v = 0; v < vectors_; v += block_) {
      const int64_t block = std::min(block_, vectors_ - v), most = EvenPixels(pixels, block);
      tile.w_row = block * kLanes;
      tile.w_vector = kLanes;
      tile.out_channels = padded ? tile.w_row : std::min(tile.w_row, columns_ - v * kLanes);
      for (int64_t p = 0; p < pixels; p += most) {
        const int64_t count = std::min(most, pixels - p), at = p * out_pixel + v * kLanes;
        tile.epilogue = epilogue.At(v * kLanes, at);
        kMultiply[block - 1][count - 1](tile, x + p * x_pixel, values_.get() + v * kLanes * depth_,
                                        out + at);
      }
    }
  }

 private:
  int64_t depth_, columns_, vectors_, block_;
  Buffer values_;
};

// ------------------------------------------------------------------------------------------------
// Phases

// The lanes of a vector of channels that are read at one offset.
struct Part {
  int64_t dh, dw;
  Lanes mask;
};

// The channels that are read from rows `row`, `row + stride` ... and columns likewise.
struct Phase {
  int64_t row, column;             // the first pixel
  int64_t height, width;           // number of pixels
  int64_t first;                   // its first channel among those of all phases, padded
  std::vector<int64_t> channels;   // by offset
  std::vector<std::vector<Part>> vectors;
  int64_t top, bottom, left, right;  // the smallest and largest offsets, in pixels of the phase

  int64_t padded() const { return vectors.size() * kLanes; }
};

// Pixels of a phase, padded with zeros as far as offsets reach.
struct Grid {
  int64_t above, before, rows, columns;  // zeros above and to the left; sizes with all zeros
  int64_t pitch;

  int64_t size() const { return rows * columns * pitch; }
  int64_t At(int64_t row, int64_t column) const {
    return ((row + above) * columns + column + before) * pitch;
  }
};

struct Block {
  Images x, y;
  int64_t expanded, stride, repetitions, depth;  // depth: the channels of all phases, padded
  std::vector<Phase> phases;

  // Expanded pixels that the outputs of `rows` rows read, and gradients that these pixels read.
  Grid Expanded(const Phase& phase, int64_t rows) const {
    const int64_t above = std::max<int64_t>(0, -phase.top), before = std::max<int64_t>(0, -phase.left);
    return {above, before, above + std::max(rows + phase.bottom, rows),
            before + std::max(y.width + phase.right, phase.width), phase.padded()};
  }
  Grid Gradients(const Phase& phase) const {
    const int64_t above = std::max<int64_t>(0, phase.bottom), before = std::max<int64_t>(0, phase.right);
    return {above, before, above + std::max(phase.height - phase.top, y.height),
            before + std::max(phase.width - phase.left, y.width), phase.padded()};
  }
};

int64_t FloorDiv(int64_t a, int64_t b) { return a >= 0 ? a / b : -CeilDiv(-a, b); }

void FindPhases(Block& b, ffi::Span<const int64_t> dh, ffi::Span<const int64_t> dw) {
  b.depth = 0;
  std::vector<std::pair<int64_t, int64_t>> offsets(b.expanded);  // of each channel, in its phase
  for (int64_t row = 0; row < b.stride; ++row) {
    for (int64_t column = 0; column < b.stride; ++column) {
      Phase phase{};
      phase.row = row;
      phase.column = column;
      phase.height = row < b.x.height ? CeilDiv(b.x.height - row, b.stride) : 0;
      phase.width = column < b.x.width ? CeilDiv(b.x.width - column, b.stride) : 0;
      phase.first = b.depth;
      for (int64_t c = 0; c < b.expanded; ++c) {
        if ((dh[c] - row) % b.stride != 0 || (dw[c] - column) % b.stride != 0) continue;
        phase.channels.push_back(c);
        // Offsets beyond the image are all the same.
        offsets[c] = {std::clamp(FloorDiv(dh[c] - row, b.stride), -b.y.height, b.y.height),
                      std::clamp(FloorDiv(dw[c] - column, b.stride), -b.y.width, b.y.width)};
      }
      if (phase.channels.empty()) continue;
      std::stable_sort(phase.channels.begin(), phase.channels.end(),
                       [&](int64_t c, int64_t d) { return offsets[c] < offsets[d]; });
      phase.vectors.resize(CeilDiv(phase.channels.size(), kLanes));
      std::tie(phase.top, phase.left) = offsets[phase.channels[0]];
      phase.bottom = phase.top, phase.right = phase.left;
      for (size_t i = 0; i < phase.channels.size(); ++i) {
        const auto [h, w] = offsets[phase.channels[i]];
        std::vector<Part>& parts = phase.vectors[i / kLanes];
        if (parts.empty() || parts.back().dh != h || parts.back().dw != w) parts.push_back(Part{h, w, Lanes{}});
        parts.back().mask[i % kLanes] = -1;
        phase.top = std::min(phase.top, h), phase.bottom = std::max(phase.bottom, h);
        phase.left = std::min(phase.left, w), phase.right = std::max(phase.right, w);
      }
      b.depth += phase.padded();
      b.phases.push_back(std::move(phase));
    }
  }
}

// out[p] = lane by lane a value from one of kCount places, whose pixels are `pitch` floats apart.
template <int kCount>
void Choose(const float* const* places, const std::vector<Part>& parts, int64_t pitch,
            int64_t pixels, float* out, int64_t out_pixel) {
  Lanes masks[kCount];
  for (int i = 0; i < kCount; ++i) masks[i] = parts[i].mask;
  for (int64_t p = 0; p < pixels; ++p) {
    Vector value = Load(places[0] + p * pitch);
#pragma GCC unroll 16
    for (int i = 1; i < kCount; ++i) value = masks[i] ? Load(places[i] + p * pitch) : value;
    Store(out + p * out_pixel, value);
  }
}

using ChooseFunction = void (*)(const float* const*, const std::vector<Part>&, int64_t, int64_t,
                                float*, int64_t);
template <size_t... kIndices>
constexpr std::array<ChooseFunction, kLanes> ChooseOf(std::index_sequence<kIndices...>) {
  return {Choose<int(kIndices) + 1>...};
}
constexpr auto kChoose = ChooseOf(std::make_index_sequence<kLanes>());

// out[p, channel] = from[p, shifted], where `sign` is 1 to shift and -1 to shift back; `from` is the
// first pixel of the line.
void ShiftLine(const Phase& phase, const Grid& grid, int64_t sign, const float* from,
               int64_t pixels, float* out, int64_t out_pixel) {
  for (size_t v = 0; v < phase.vectors.size(); ++v) {
    const std::vector<Part>& parts = phase.vectors[v];
    const float* places[kLanes];
    for (size_t i = 0; i < parts.size(); ++i) {
      places[i] = from + sign * (parts[i].dh * grid.columns + parts[i].dw) * grid.pitch + v * kLanes;
    }
    kChoose[parts.size() - 1](places, parts, grid.pitch, pixels, out + v * kLanes, out_pixel);
  }
}

// ------------------------------------------------------------------------------------------------
// Forward

// The weights of the first product of each phase, padded.
struct First {
  std::vector<std::unique_ptr<Matrix>> w1;
  Buffer b1;

  First(ffi::ThreadPool& pool, const Block& b, const float* w, const float* bias) : b1(b.depth) {
    std::memset(b1.get(), 0, b.depth * sizeof(float));
    for (const Phase& phase : b.phases) {
      const auto& channels = phase.channels;
      for (size_t j = 0; j < channels.size(); ++j) b1.get()[phase.first + j] = bias[channels[j]];
      w1.push_back(std::make_unique<Matrix>(
          pool, b.x.channels, channels.size(), phase.width,
          [&](int64_t i, int64_t j) { return w[i * b.expanded + channels[j]]; }));
    }
  }
};

// Writes zeros around the pixels of a grid's row `row`, or all of it where the row is outside.
void ZeroRow(const Grid& grid, int64_t row, bool inside, int64_t width, float* values) {
  float* const begin = values + grid.At(row, -grid.before);
  if (!inside) {
    std::memset(begin, 0, grid.columns * grid.pitch * sizeof(float));
    return;
  }
  std::memset(begin, 0, grid.before * grid.pitch * sizeof(float));
  const int64_t after = grid.columns - grid.before - width;
  std::memset(begin + (grid.before + width) * grid.pitch, 0, after * grid.pitch * sizeof(float));
}

// Writes row `first + i` of the phase's pixels to row i of the grid.
void Expand(const Block& b, size_t index, const First& first, const float* image, int64_t from,
            const Grid& grid, float* values) {
  const Phase& phase = b.phases[index];
  for (int64_t i = -grid.above; i < grid.rows - grid.above; ++i) {
    const int64_t row = from + i;
    const bool inside = row >= 0 && row < phase.height;
    ZeroRow(grid, i, inside, phase.width, values);
    if (!inside) continue;
    const float* const x = image + ((phase.row + row * b.stride) * b.x.width + phase.column) * b.x.channels;
    float* const to = values + grid.At(i, 0);
    first.w1[index]->Multiply(x, b.stride * b.x.channels, phase.width, to, grid.pitch, true);
    for (int64_t v = 0; v < grid.pitch; v += kLanes) {
      const Vector bias = Load(first.b1.get() + phase.first + v);
      for (int64_t p = 0; p < phase.width; ++p) {
        const Vector value = Load(to + p * grid.pitch + v) + bias;
        Store(to + p * grid.pitch + v, value < 0 ? Vector{} : value);  // preserves NaN
      }
    }
  }
}

constexpr int64_t kExpanded = 256 * 1024;  // floats of the expanded tensor per task

void Forward(ffi::ThreadPool& pool, const Block& b, const float* x, const float* w1,
             const float* b1, const float* w2, const Epilogue& epilogue, float* y) {
  const First first(pool, b, w1, b1);
  std::vector<int64_t> channels(b.depth, -1);
  for (const Phase& phase : b.phases) {
    std::copy(phase.channels.begin(), phase.channels.end(), channels.begin() + phase.first);
  }
  const Matrix second(pool, b.depth, b.y.channels, b.y.width, [&](int64_t i, int64_t k) {
    return channels[i] < 0 ? 0 : w2[channels[i] * b.y.channels + k];
  });
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t fitting = kExpanded / std::max<int64_t>(b.y.width * b.depth, 1);
  const int64_t sharing = CeilDiv(b.y.count * b.y.height, 4 * threads);
  const int64_t rows = std::clamp<int64_t>(std::min(fitting, sharing), 1, b.y.height);
  const int64_t bands = CeilDiv(b.y.height, rows);
  std::vector<Grid> grids;
  std::vector<int64_t> starts;
  int64_t size = 0;
  for (const Phase& phase : b.phases) {
    grids.push_back(b.Expanded(phase, rows));
    starts.push_back(size);
    size += grids.back().size();
  }

  Parallel(pool, b.y.count * bands, [&](int64_t task) {
    const int64_t image = task / bands, row = task % bands * rows;
    Buffer values(size), line(b.y.width * b.depth);
    for (size_t i = 0; i < b.phases.size(); ++i) {
      Expand(b, i, first, x + image * b.x.height * b.x.width * b.x.channels, row, grids[i],
             values.get() + starts[i]);
    }
    for (int64_t r = 0; r < std::min(rows, b.y.height - row); ++r) {
      for (size_t i = 0; i < b.phases.size(); ++i) {
        ShiftLine(b.phases[i], grids[i], 1, values.get() + starts[i] + grids[i].At(r, 0),
                  b.y.width, line.get() + b.phases[i].first, b.depth);
      }
      const int64_t pixel = (image * b.y.height + row + r) * b.y.width;
      float* const out = y + pixel * b.y.channels;
      second.Multiply(line.get(), b.depth, b.y.width, out, b.y.channels, false,
                      epilogue.At(0, pixel * b.y.channels));
    }
  });
}

// ------------------------------------------------------------------------------------------------
// Gradients

struct Gradients {
  float *dx, *dw1, *db1, *dw2;
};

void Backward(ffi::ThreadPool& pool, const Block& b, const float* x, const float* w1,
              const float* b1, const float* w2, const float* dy, const Gradients& gradients) {
  const int64_t in = b.x.channels, out = b.y.channels, out_vectors = CeilDiv(out, kLanes);
  const First first(pool, b, w1, b1);
  std::vector<std::unique_ptr<Matrix>> w1_turned, w2_turned;
  std::vector<Grid> grids, back;
  std::vector<int64_t> starts, back_starts;
  int64_t size = 0, back_size = 0;
  bool all_pixels = false;  // whether every pixel of x belongs to a phase
  for (const Phase& phase : b.phases) {
    const auto& channels = phase.channels;
    const int64_t count = channels.size();
    w1_turned.push_back(std::make_unique<Matrix>(
        pool, phase.padded(), in, phase.width,
        [&](int64_t j, int64_t i) { return j < count ? w1[i * b.expanded + channels[j]] : 0; }));
    w2_turned.push_back(std::make_unique<Matrix>(
        pool, out, count, b.y.width,
        [&](int64_t k, int64_t j) { return w2[channels[j] * out + k]; }));
    grids.push_back(b.Expanded(phase, b.y.height));
    back.push_back(b.Gradients(phase));
    starts.push_back(size);
    back_starts.push_back(back_size);
    size += grids.back().size();
    back_size += back.back().size();
  }
  all_pixels = int64_t(b.phases.size()) == b.stride * b.stride;

  // Sums of a part: dw2 [depth, out], padded; for each phase dw1 [in, channels], padded; db1.
  const int64_t dw2_size = b.depth * out_vectors * kLanes, dw1_size = in * b.depth;
  const int64_t total = dw2_size + dw1_size + b.depth;
  const int64_t images = CeilDiv(b.x.count, std::min(kParts, b.x.count));
  const int64_t parts = CeilDiv(b.x.count, images);
  Buffer sums(parts * total);
  const bool copied = out % kLanes != 0;  // whole vectors would reach beyond the last pixel
  const int64_t pixels = b.y.height * b.y.width, dy_pitch = out_vectors * kLanes;

  Parallel(pool, parts, [&](int64_t part) {
    float* const dw2 = sums.get() + part * total;
    float *const dw1 = dw2 + dw2_size, *const db1 = dw1 + dw1_size;
    std::memset(dw2, 0, total * sizeof(float));
    Buffer expanded(size), shifted(pixels * b.depth), dshifted(back_size);
    Buffer dy_copy(copied ? pixels * dy_pitch : 0);
    for (int64_t n = part * images; n < std::min((part + 1) * images, b.x.count); ++n) {
      const float* const image = x + n * b.x.height * b.x.width * in;
      const float* const dy_image = dy + n * pixels * out;
      float* const dx = gradients.dx + n * b.x.height * b.x.width * in;
      if (!all_pixels) std::memset(dx, 0, b.x.height * b.x.width * in * sizeof(float));

      for (size_t i = 0; i < b.phases.size(); ++i) {
        const Phase& phase = b.phases[i];
        float* const values = expanded.get() + starts[i];
        Expand(b, i, first, image, 0, grids[i], values);
        for (int64_t r = 0; r < b.y.height; ++r) {
          ShiftLine(phase, grids[i], 1, values + grids[i].At(r, 0), b.y.width,
                    shifted.get() + r * b.y.width * b.depth + phase.first, b.depth);
        }
        float* const dvalues = dshifted.get() + back_starts[i];
        for (int64_t r = -back[i].above; r < back[i].rows - back[i].above; ++r) {
          const bool inside = r >= 0 && r < b.y.height;
          ZeroRow(back[i], r, inside, b.y.width, dvalues);
          if (!inside) continue;
          w2_turned[i]->Multiply(dy_image + r * b.y.width * out, out, b.y.width,
                                 dvalues + back[i].At(r, 0), back[i].pitch, true);
        }
      }
      const float* dy_padded = dy_image;
      if (copied) {
        for (int64_t p = 0; p < pixels; ++p) {
          float* const to = dy_copy.get() + p * dy_pitch;
          std::copy(dy_image + p * out, dy_image + (p + 1) * out, to);
          std::fill(to + out, to + dy_pitch, 0.0f);
        }
        dy_padded = dy_copy.get();
      }
      AddOuter({b.depth, 0, copied ? dy_pitch : out, 0, 1, pixels, 0}, b.depth, out_vectors,
               shifted.get(), dy_padded, dw2);

      for (size_t i = 0; i < b.phases.size(); ++i) {
        const Phase& phase = b.phases[i];
        const int64_t padded = phase.padded();
        float* const values = expanded.get() + starts[i];  // later overwritten by their gradients
        Buffer line(phase.width * padded);
        for (int64_t r = 0; r < phase.height; ++r) {
          ShiftLine(phase, back[i], -1, dshifted.get() + back_starts[i] + back[i].At(r, 0),
                    phase.width, line.get(), padded);
          float* const row = values + grids[i].At(r, 0);
          for (int64_t v = 0; v < padded; v += kLanes) {
            Vector sum = Load(db1 + phase.first + v);
            for (int64_t p = 0; p < phase.width; ++p) {
              const Vector value = Load(row + p * padded + v);
              const Vector gradient = value > 0 ? Load(line.get() + p * padded + v) : Vector{};
              Store(row + p * padded + v, gradient);
              sum += gradient;
            }
            Store(db1 + phase.first + v, sum);
          }
          w1_turned[i]->Multiply(
              row, padded, phase.width,
              dx + ((phase.row + r * b.stride) * b.x.width + phase.column) * in, b.stride * in, false);
        }
        const float* const pixel = image + (phase.row * b.x.width + phase.column) * in;
        AddOuter({b.stride * in, b.stride * b.x.width * in, padded, grids[i].columns * padded,
                  phase.height, phase.width, 0},
                 in, padded / kLanes, pixel, values + grids[i].At(0, 0), dw1 + in * phase.first);
      }
    }
  });

  // Adds up the parts, in order, and stores the sums in the result's layout.
  const auto sum = [&](int64_t at) {
    float value = sums.get()[at];
    for (int64_t part = 1; part < parts; ++part) value += sums.get()[part * total + at];
    return value;
  };
  Parallel(pool, b.phases.size(), [&](int64_t index) {
    const Phase& phase = b.phases[index];
    for (size_t j = 0; j < phase.channels.size(); ++j) {
      const int64_t channel = phase.channels[j], place = phase.first + j;
      for (int64_t k = 0; k < out; ++k) {
        gradients.dw2[channel * out + k] = sum(place * out_vectors * kLanes + k);
      }
      for (int64_t i = 0; i < in; ++i) {
        gradients.dw1[i * b.expanded + channel] =
            sum(dw2_size + in * phase.first + i * phase.padded() + j);
      }
      gradients.db1[channel] = sum(dw2_size + dw1_size + place);
    }
  });
}

// ------------------------------------------------------------------------------------------------
// XLA's side

using Offsets = ffi::Span<const int64_t>;

// The block from x to y. Sizes are checked here too, since programs may come from elsewhere than
// Python.
ffi::ErrorOr<Block> Describe(const Array& x, const Array& w1, const Array& b1, const Array& w2,
                             const Array& y, Offsets dh, Offsets dw, int64_t stride) {
  const ffi::Error error = ffi::Error::InvalidArgument("sizes of a shift block that do not fit");
  Block b;
  b.repetitions = Repetitions({{&x, 4}, {&w1, 2}, {&b1, 1}, {&w2, 2}, {&y, 4}});
  if (b.repetitions < 0 || stride < 1) return ffi::Unexpected(error);
  b.x = ImagesOf(x);
  b.y = ImagesOf(y);
  b.stride = stride;
  const auto sizes1 = w1.dimensions().last(2), sizes2 = w2.dimensions().last(2);
  b.expanded = sizes1[1];
  const bool fits = sizes1[0] == b.x.channels && b1.dimensions().back() == b.expanded &&
                    sizes2[0] == b.expanded && sizes2[1] == b.y.channels &&
                    int64_t(dh.size()) == b.expanded && int64_t(dw.size()) == b.expanded &&
                    b.x.count == b.y.count && b.y.height == CeilDiv(b.x.height, stride) &&
                    b.y.width == CeilDiv(b.x.width, stride);
  if (!fits) return ffi::Unexpected(error);
  FindPhases(b, dh, dw);
  return b;
}

ffi::Error CallForward(ffi::ThreadPool pool, Array x, Array w1, Array b1, Array w2, Array bias,
                       Array residual, ffi::Result<Array> y, Offsets dh, Offsets dw,
                       int64_t stride, bool relu) {
  const auto b = Describe(x, w1, b1, w2, *y, dh, dw, stride);
  if (b.has_error()) return b.error();
  if ((bias.element_count() && int64_t(bias.element_count()) != b->repetitions * b->y.channels) ||
      (residual.element_count() && residual.element_count() != y->element_count())) {
    return ffi::Error::InvalidArgument("a bias or residual of a shift block that does not fit");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  for (int64_t i = 0; i < b->repetitions; ++i) {
    const auto part = [&](auto& array) { return PartOf(array, i, b->repetitions); };
    const Epilogue epilogue = {nullptr, part(bias), part(residual),
                               relu ? kReluBeforeResidual : kNoRelu};
    Forward(pool, *b, part(x), part(w1), part(b1), part(w2), epilogue, part(*y));
  }
  return ffi::Error::Success();
}

ffi::Error CallBackward(ffi::ThreadPool pool, Array x, Array w1, Array b1, Array w2, Array dy,
                        ffi::Result<Array> dx, ffi::Result<Array> dw1, ffi::Result<Array> db1,
                        ffi::Result<Array> dw2, Offsets dh, Offsets dw, int64_t stride) {
  const auto b = Describe(x, w1, b1, w2, dy, dh, dw, stride);
  if (b.has_error()) return b.error();
  if (dx->element_count() != x.element_count() || dw1->element_count() != w1.element_count() ||
      db1->element_count() != b1.element_count() || dw2->element_count() != w2.element_count()) {
    return ffi::Error::InvalidArgument("gradients of a shift block that do not fit");
  }
  if (x.element_count() == 0) {
    for (Array* array : {&*dw1, &*db1, &*dw2}) {
      std::memset(array->typed_data(), 0, array->size_bytes());
    }
    return ffi::Error::Success();
  }
  for (int64_t i = 0; i < b->repetitions; ++i) {
    const auto part = [&](auto& array) { return PartOf(array, i, b->repetitions); };
    Backward(pool, *b, part(x), part(w1), part(b1), part(w2), part(dy),
             {part(*dx), part(*dw1), part(*db1), part(*dw2)});
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_shift_block, CallForward,
                              (BindArrays<6, 1>()
                               .Attr<Offsets>("dh")
                               .Attr<Offsets>("dw")
                               .Attr<int64_t>("stride")
                               .Attr<bool>("relu")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_shift_block_gradients, CallBackward,
                              (BindArrays<5, 4>()
                               .Attr<Offsets>("dh")
                               .Attr<Offsets>("dw")
                               .Attr<int64_t>("stride")));

}  // namespace shiftnet
