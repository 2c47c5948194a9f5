// Two-dimensional convolutions on a CPU, called by XLA through its foreign function interface.
//
// Images are [N, H, W, C], weights [k, k, C / groups, K], float32. The kernel's side k is odd, the
// padding k / 2 zeros on every side, the output [N, ceil(H / stride), ceil(W / stride), K].
//
// A dense convolution copies a band of an image's rows into a zero-padded buffer that stays in the
// cache, so that no loop knows about borders; one of 1x1 needs no copy. In such a buffer the k * C
// values under one row of the kernel are contiguous, as are the weights they meet. Hence it is, for
// each row of the kernel, a product of a matrix [pixels, k * C] whose rows overlap, and one of
// [k * C, K]: `MultiplyTile` computes it for a few pixels and a few vectors of output channels,
// whose sums stay in registers. The gradient of the input is the same operation with the kernel
// turned around; with a stride it is stride * stride of them, each with a part of the kernel. The
// gradient of the weights keeps a tile of [k * C, K] in registers while it runs over the pixels.
// Where all of this is 3x3 at stride 1, Winograd's algorithm, below, needs fewer multiplications.
// Depthwise convolutions run over vectors of channels.
//
// Results do not depend on the number of threads: each value is summed by one thread in a fixed
// order. Where that would leave threads idle, the gradient of the weights is summed in parts that
// depend on the shapes only and are then added in a fixed order.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "products.h"

namespace shiftnet {
namespace {

// Sizes in floats of a padded band, and of the weights that a task uses. Both should fit a core's L2
// cache.
constexpr int64_t kBand = 24 * 1024, kWeights = 192 * 1024;

// ------------------------------------------------------------------------------------------------
// Padded bands

// The part of an image that is copied to `band`: `rows` rows from `top` and `columns` columns from
// `left`, which may be negative, `channels` channels from `first`, and zeros outside the image.
// Pixels are `pitch` floats apart; those beyond `channels` are zeros.
struct Window {
  int64_t top, left, rows, columns, first, channels, pitch;
};

void CopyWindow(const float* image, const Images& images, const Window& window, float* band) {
  const int64_t row_size = window.columns * window.pitch;
  const int64_t begin = std::clamp<int64_t>(-window.left, 0, window.columns);
  const int64_t end = std::clamp<int64_t>(images.width - window.left, begin, window.columns);
  const bool whole = window.channels == images.channels && window.pitch == window.channels;
  for (int64_t row = 0; row < window.rows; ++row, band += row_size) {
    const int64_t from_row = window.top + row;
    if (from_row < 0 || from_row >= images.height) {
      std::memset(band, 0, row_size * sizeof(float));
      continue;
    }
    const float* from = image + (from_row * images.width + window.left + begin) * images.channels +
                        window.first;
    float* to = band + begin * window.pitch;
    std::memset(band, 0, begin * window.pitch * sizeof(float));
    if (whole) {
      std::memcpy(to, from, (end - begin) * window.pitch * sizeof(float));
    } else {
      for (int64_t i = begin; i < end; ++i, from += images.channels, to += window.pitch) {
        int64_t c = 0;
        for (; c + kLanes <= window.pitch; c += kLanes) {
          Store(to + c, LoadPart(from + c, window.channels - c));
        }
        for (; c < window.pitch; ++c) to[c] = c < window.channels ? from[c] : 0;
      }
    }
    std::memset(band + end * window.pitch, 0, (window.columns - end) * window.pitch * sizeof(float));
  }
}

// ------------------------------------------------------------------------------------------------
// Correlations: the convolution itself, and the gradient of its input

// Along one axis: target index start + i * step, for i < count, is the sum over t < taps of source
// index i * stride + t + first times kernel index tap_start + t * tap_step.
struct Axis {
  int64_t start, step, count, taps, first, stride, tap_start, tap_step;
};

Axis ForwardAxis(int64_t target, int64_t kernel, int64_t stride) {
  return {0, 1, target, kernel, -(kernel / 2), stride, 0, 1};
}

// The kernel indices that contribute to the target indices of one phase: source index o and kernel
// index k contribute to target index o * stride + k - kernel / 2.
Axis GradientAxis(int64_t target, int64_t kernel, int64_t stride, int64_t phase) {
  const int64_t smallest = (phase + kernel / 2) % stride;
  const int64_t taps = smallest < kernel ? (kernel - 1 - smallest) / stride + 1 : 0;
  const int64_t count = phase < target ? CeilDiv(target - phase, stride) : 0;
  const int64_t first = (phase + kernel / 2 - smallest) / stride - (taps - 1);
  return {phase, stride, count, taps, first, 1, smallest + (taps - 1) * stride, -stride};
}

struct Phase {
  Axis rows, columns;
};

// A correlation without its data. `in` and `out` are the channels of a group.
struct Correlation {
  Images source, target;
  std::vector<Phase> phases;
  int64_t kernel, groups, in, out;
  bool transposed;  // whether the weights are [k, k, out, in]

  // Whether a target pixel is the sum over the 3x3 source pixels around it.
  bool IsSame3x3() const {
    const auto fits = [](const Axis& axis) {
      return axis.taps == 3 && axis.first == -1 && axis.stride == 1 && axis.step == 1;
    };
    return phases.size() == 1 && fits(phases[0].rows) && fits(phases[0].columns);
  }

  // Offset of the weight for kernel row and column 0 and for a group's first channels.
  int64_t WeightOffset(int64_t group) const { return group * (transposed ? in : out); }
  int64_t WeightStride() const { return transposed ? groups * in : groups * out; }
};

// The rows of a phase that form a task: a band that fits, but so few that all threads have a task.
int64_t RowsOfTask(const Phase& phase, int64_t pitch, int64_t images, int64_t threads) {
  const int64_t columns = (phase.columns.count - 1) * phase.columns.stride + phase.columns.taps;
  const int64_t fitting = (kBand / std::max<int64_t>(columns * pitch, 1) - phase.rows.taps) /
                              phase.rows.stride + 1;
  const int64_t sharing = CeilDiv(images * phase.rows.count, 4 * threads);
  return std::clamp<int64_t>(std::min(fitting, sharing), 1, std::max<int64_t>(phase.rows.count, 1));
}

Window WindowOf(const Phase& phase, int64_t row, int64_t rows, int64_t first, int64_t channels,
                int64_t pitch) {
  const Axis &down = phase.rows, &across = phase.columns;
  return {row * down.stride + down.first,
          across.first,
          (rows - 1) * down.stride + down.taps,
          (across.count - 1) * across.stride + across.taps,
          first,
          channels,
          pitch};
}

// A correlation's weights, and the same as its function packs them, or null.
struct Weights {
  const float *values, *packed;
};

constexpr int64_t kVectorsOfTask = 4;  // that are packed at a time

// Writes the weights of one phase and group for `vectors` vectors of output channels from vector
// `begin`, [taps of rows][taps of columns][in][kLanes] each, to `packed`, which are `size` floats.
void PackVectors(const Correlation& c, const Phase& phase, int64_t group, int64_t begin,
                 int64_t vectors, int64_t size, const float* weights, float* packed) {
  const int64_t row_stride = c.WeightStride(), tap = (c.transposed ? c.out : c.in) * row_stride;
  const int64_t first = begin * kLanes, channels = std::min(vectors * kLanes, c.out - first);
  for (int64_t r = 0; r < phase.rows.taps; ++r) {
    for (int64_t t = 0; t < phase.columns.taps; ++t, packed += c.in * kLanes) {
      const int64_t row = phase.rows.tap_start + r * phase.rows.tap_step;
      const int64_t column = phase.columns.tap_start + t * phase.columns.tap_step;
      const float* from = weights + c.WeightOffset(group) + (row * c.kernel + column) * tap +
                          first * (c.transposed ? row_stride : 1);
      if (c.transposed) {  // reads are contiguous; what is written stays in the cache
        for (int64_t o = 0; o < vectors * kLanes; ++o) {
          float* const to = packed + o / kLanes * size + o % kLanes;
          for (int64_t i = 0; i < c.in; ++i) {
            to[i * kLanes] = o < channels ? from[o * row_stride + i] : 0;
          }
        }
      } else {
        for (int64_t i = 0; i < c.in; ++i) {
          for (int64_t v = 0; v < vectors; ++v) {
            Store(packed + v * size + i * kLanes,
                  LoadPart(from + i * row_stride + v * kLanes, channels - v * kLanes));
          }
        }
      }
    }
  }
}

void CorrelateDense(ffi::ThreadPool& pool, const Correlation& c, const float* source,
                    const Weights& weights, const Epilogue& epilogue, float* target) {
  const int64_t vectors = CeilDiv(c.out, kLanes), threads = std::max<int64_t>(pool.num_threads(), 1);
  struct Plan {
    int64_t depth, size, block, slice, slices, rows, bands, packed, tasks;
  };
  std::vector<Plan> plans;
  int64_t packed_size = 0, tasks = 0, band_size = 0;
  for (const Phase& phase : c.phases) {
    Plan plan;
    plan.depth = phase.columns.taps * c.in;
    plan.size = phase.rows.taps * plan.depth * kLanes;  // of one vector of channels
    plan.block = BestVectors(std::max<int64_t>(phase.columns.count, 1), vectors);
    // A slice is several blocks whose weights fit the cache.
    const int64_t fitting = kWeights / std::max<int64_t>(plan.size * plan.block, 1);
    plan.slice = std::min(std::max<int64_t>(fitting, 1) * plan.block, vectors);
    plan.slices = CeilDiv(vectors, plan.slice);
    plan.rows = RowsOfTask(phase, c.in, c.source.count * c.groups * plan.slices, threads);
    plan.bands = CeilDiv(phase.rows.count, plan.rows);
    plan.packed = packed_size;
    plan.tasks = phase.columns.count > 0 ? c.groups * plan.slices * c.source.count * plan.bands : 0;
    packed_size += c.groups * vectors * plan.size;
    tasks += plan.tasks;
    const Window window = WindowOf(phase, 0, plan.rows, 0, c.in, c.in);
    band_size = std::max(band_size, window.rows * window.columns * window.pitch);
    plans.push_back(plan);
  }

  Buffer packed(weights.packed ? 0 : packed_size);
  const float* const all_packed = weights.packed ? weights.packed : packed.get();
  auto packed_from = [&](int64_t phase, int64_t group, int64_t vector) {
    return plans[phase].packed + (group * vectors + vector) * plans[phase].size;
  };
  struct Vectors {
    int64_t phase, group, begin;
  };
  std::vector<Vectors> to_pack;
  for (int64_t phase = 0; !weights.packed && phase < int64_t(plans.size()); ++phase) {
    for (int64_t group = 0; group < c.groups; ++group) {
      for (int64_t v = 0; v < vectors; v += kVectorsOfTask) to_pack.push_back({phase, group, v});
    }
  }
  Parallel(pool, to_pack.size(), [&](int64_t task) {
    const auto [phase, group, begin] = to_pack[task];
    PackVectors(c, c.phases[phase], group, begin, std::min(kVectorsOfTask, vectors - begin),
                plans[phase].size, weights.values,
                packed.get() + packed_from(phase, group, begin));
  });

  Parallel(pool, tasks, [&](int64_t task) {
    int64_t index = 0;
    while (task >= plans[index].tasks) task -= plans[index++].tasks;
    const Plan& plan = plans[index];
    const Phase& phase = c.phases[index];
    const int64_t band_index = task % plan.bands, image = task / plan.bands % c.source.count;
    const int64_t slice = task / plan.bands / c.source.count % plan.slices;
    const int64_t group = task / plan.bands / c.source.count / plan.slices;
    const int64_t row = band_index * plan.rows, rows = std::min(plan.rows, phase.rows.count - row);
    const Window window = WindowOf(phase, row, rows, group * c.in, c.in, c.in);
    const float* x = source + image * c.source.height * c.source.width * c.source.channels;
    const bool copied = c.kernel != 1 || phase.rows.taps * phase.columns.taps != 1;  // or no border
    Buffer band(copied ? band_size : 0);
    Tile tile{};
    if (copied) {
      CopyWindow(x, c.source, window, band.get());
      x = band.get();
      tile.x_pixel = phase.columns.stride * c.in;
      tile.x_row = window.columns * c.in;
    } else {
      tile.x_pixel = phase.columns.stride * c.source.channels;
      tile.x_row = c.source.width * c.source.channels;
      x += window.top * tile.x_row + window.left * c.source.channels + window.first;
    }
    tile.rows = phase.rows.taps;
    tile.depth = plan.depth;
    tile.w_row = kLanes;
    tile.w_vector = plan.size;
    tile.out_pixel = phase.columns.step * c.target.channels;
    const int64_t out_row = phase.rows.step * c.target.width * c.target.channels;
    const int64_t out = group * c.out +
                        ((image * c.target.height + phase.rows.start + row * phase.rows.step) *
                             c.target.width + phase.columns.start) * c.target.channels;
    const int64_t last = std::min((slice + 1) * plan.slice, vectors);
    for (int64_t v = slice * plan.slice; v < last; v += plan.block) {
      const int64_t block = std::min(plan.block, last - v);
      tile.out_channels = std::min(block * kLanes, c.out - v * kLanes);
      const int64_t pixels = EvenPixels(phase.columns.count, block);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t p = 0; p < phase.columns.count; p += pixels) {
          const int64_t count = std::min(pixels, phase.columns.count - p);
          const int64_t at = out + r * out_row + p * tile.out_pixel + v * kLanes;
          tile.epilogue = epilogue.At(group * c.out + v * kLanes, at);
          kMultiply[block - 1][count - 1](
              tile, x + r * phase.rows.stride * tile.x_row + p * tile.x_pixel,
              all_packed + packed_from(index, group, v), target + at);
        }
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------
// Winograd's F(2x2, 3x3), Lavin and Gray, arXiv:1509.09308: 3x3 windows at stride 1
//
// A tile is 2x2 pixels of the target, which read 4x4 of the source. With
//       1  0 -1  0          1    0    0
//   B = 0  1  1  0      G = 1/2  1/2  1/2      A = 1  1  1  0
//       0 -1  1  0          1/2 -1/2  1/2          0  1 -1 -1
//       0  1  0 -1          0    0    1
// the tile is A [(G g G') * (B d B')] A', g being the kernel's 3x3 values and d the source's 4x4: for
// each of the 16 places a product of matrices [tiles, in] and [in, out], 4 multiplications per pixel
// instead of 9. All tiles of a few rows are computed at a time, so that both transforms of them stay
// in the cache.

constexpr int64_t kPlaces = 16;
// Size in floats of the transforms of a task's tiles, and its least and greatest number of tiles.
constexpr int64_t kTransforms = 192 * 1024, kLeastTiles = 48, kMostTiles = 256;

// Whether the correlation is computed in this way. Small images would mostly be padding.
bool IsWinograd(const Correlation& c) {
  if (!c.IsSame3x3()) return false;
  const Phase& phase = c.phases[0];
  const int64_t pixels = phase.rows.count * phase.columns.count;
  const int64_t covered = RoundUp(phase.rows.count, 2) * RoundUp(phase.columns.count, 2);
  return c.groups == 1 && c.in >= 16 && c.out >= 16 && 2 * covered <= 3 * pixels;
}

// G g G' of a kernel packed by `PackVectors`, [9][in][kLanes], to [16][in][kLanes].
void TransformKernel(int64_t in, const float* g, float* transformed) {
  const int64_t size = in * kLanes;
  for (int64_t i = 0; i < size; i += kLanes) {
    Vector half[4][3];
    for (int t = 0; t < 3; ++t) {
      const Vector a = Load(g + t * size + i), b = Load(g + (3 + t) * size + i),
                   c = Load(g + (6 + t) * size + i);
      half[0][t] = a;
      half[1][t] = 0.5f * ((a + c) + b);
      half[2][t] = 0.5f * ((a + c) - b);
      half[3][t] = c;
    }
    for (int r = 0; r < 4; ++r) {
      const Vector a = half[r][0], b = half[r][1], c = half[r][2];
      float* const to = transformed + 4 * r * size + i;
      Store(to, a);
      Store(to + size, 0.5f * ((a + c) + b));
      Store(to + 2 * size, 0.5f * ((a + c) - b));
      Store(to + 3 * size, c);
    }
  }
}

// B d B' for a vector of channels, or `left` of them; `pixels` are the 16 of the source, `plane` is
// the distance between places in `out`.
template <bool kWhole>
inline void TransformSource(const float* const* pixels, int64_t channel, int64_t left,
                            int64_t plane, float* out) {
  Vector half[4][4];
  for (int t = 0; t < 4; ++t) {
    Vector d[4];
    for (int r = 0; r < 4; ++r) d[r] = LoadPart(pixels[4 * r + t] + channel, kWhole ? kLanes : left);
    half[0][t] = d[0] - d[2];
    half[1][t] = d[1] + d[2];
    half[2][t] = d[2] - d[1];
    half[3][t] = d[1] - d[3];
  }
  for (int r = 0; r < 4; ++r) {
    const Vector* d = half[r];
    float* const to = out + 4 * r * plane + channel;
    const int64_t count = kWhole ? kLanes : left;
    StorePart(to, d[0] - d[2], count);
    StorePart(to + plane, d[1] + d[2], count);
    StorePart(to + 2 * plane, d[2] - d[1], count);
    StorePart(to + 3 * plane, d[1] - d[3], count);
  }
}

// A m A' for a vector of channels.
inline void TransformTarget(const float* m, int64_t plane, Vector (&out)[2][2]) {
  Vector half[2][4];
  for (int t = 0; t < 4; ++t) {
    Vector v[4];
    for (int r = 0; r < 4; ++r) v[r] = Load(m + (4 * r + t) * plane);
    half[0][t] = v[0] + v[1] + v[2];
    half[1][t] = v[1] - v[2] - v[3];
  }
  for (int r = 0; r < 2; ++r) {
    const Vector* v = half[r];
    out[r][0] = v[0] + v[1] + v[2];
    out[r][1] = v[1] - v[2] - v[3];
  }
}

int64_t WinogradSize(const Correlation& c) {  // of a vector of output channels
  return kPlaces * c.in * kLanes;
}

// Packs a few vectors of output channels from vector `first`, [16][in][kLanes] each.
void PackWinograd(const Correlation& c, int64_t first, const float* weights, float* packed) {
  const int64_t size = 9 * c.in * kLanes;
  const int64_t count = std::min(kVectorsOfTask, CeilDiv(c.out, kLanes) - first);
  Buffer kernel(count * size);
  PackVectors(c, c.phases[0], 0, first, count, size, weights, kernel.get());
  for (int64_t v = 0; v < count; ++v) {
    TransformKernel(c.in, kernel.get() + v * size, packed + (first + v) * WinogradSize(c));
  }
}

// A tile of the target: its image, and its first row and column.
struct Place {
  int64_t image, row, column;

  static Place Of(int64_t tile, int64_t across, int64_t down) {
    return {tile / (across * down), tile / across % down * 2, tile % across * 2};
  }
  void Advance(int64_t height, int64_t width) {
    if ((column += 2) < width) return;
    column = 0;
    if ((row += 2) < height) return;
    row = 0;
    ++image;
  }
};

// B d B' of `count` tiles from `at` on, [16][count][channels], `plane` floats per place.
void TransformTiles(const float* source, const Images& images, Place at, int64_t count,
                    int64_t plane, float* out) {
  const int64_t height = images.height, width = images.width, channels = images.channels;
  Buffer zeros(channels);
  std::memset(zeros.get(), 0, channels * sizeof(float));
  for (int64_t tile = 0; tile < count; ++tile, at.Advance(height, width)) {
    const float* pixels[kPlaces];
    for (int64_t r = 0; r < 4; ++r) {
      const int64_t y = at.row - 1 + r;
      const int64_t line = ((at.image * height + y) * width + at.column - 1) * channels;
      for (int64_t s = 0; s < 4; ++s) {
        const int64_t x = at.column - 1 + s;
        const bool inside = y >= 0 && y < height && x >= 0 && x < width;
        pixels[4 * r + s] = inside ? source + line + s * channels : zeros.get();
      }
    }
    float* const to = out + tile * channels;
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) TransformSource<true>(pixels, i, 0, plane, to);
    if (i < channels) TransformSource<false>(pixels, i, channels - i, plane, to);
  }
}

void CorrelateWinograd(ffi::ThreadPool& pool, const Correlation& c, const float* source,
                       const Weights& weights, const Epilogue& epilogue, float* target) {
  const int64_t vectors = CeilDiv(c.out, kLanes), threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t across = CeilDiv(c.target.width, 2), down = CeilDiv(c.target.height, 2);
  const int64_t tiles = c.target.count * down * across, transformed = WinogradSize(c);

  Buffer own(weights.packed ? 0 : vectors * transformed);
  if (!weights.packed) {
    Parallel(pool, CeilDiv(vectors, kVectorsOfTask), [&](int64_t task) {
      PackWinograd(c, task * kVectorsOfTask, weights.values, own.get());
    });
  }
  const float* const packed = weights.packed ? weights.packed : own.get();

  const int64_t block = BestVectors(kLeastTiles, vectors), width = block * kLanes;
  const int64_t fitting = kTransforms / (kPlaces * (c.in + width));
  // Few tiles are divided over the output channels first: each task reads its weights but once.
  const int64_t wanted = 2 * threads, blocks = CeilDiv(vectors, block);
  const int64_t slices = tiles < wanted * kLeastTiles ? std::min(blocks, threads) : 1;
  const int64_t slice = CeilDiv(blocks, slices) * block;
  const int64_t most = std::min(std::clamp(fitting, kLeastTiles, kMostTiles),
                                std::max<int64_t>(CeilDiv(tiles * slices, wanted), 8 * slices));
  const int64_t parts = CeilDiv(tiles, most), of_task = CeilDiv(tiles, parts);

  Parallel(pool, parts * slices, [&](int64_t task) {
    const int64_t begin = task % parts * of_task, count = std::min(of_task, tiles - begin);
    const int64_t first_vector = task / parts * slice;
    const int64_t last_vector = std::min(first_vector + slice, vectors);
    if (count <= 0) return;
    // Distances between places, so that not all of them have the same address in a cache.
    const int64_t plane = count * c.in + 16, product_plane = count * width + 16;
    Buffer read(kPlaces * plane), products(kPlaces * product_plane);
    const int64_t height = c.target.height, row_length = c.target.width;
    const Place start = Place::Of(begin, across, down);
    TransformTiles(source, c.source, start, count, plane, read.get());
    Tile tile{};
    tile.x_pixel = c.in;
    tile.rows = 1;
    tile.depth = c.in;
    tile.w_row = kLanes;
    tile.w_vector = transformed;
    for (int64_t v = first_vector; v < last_vector; v += block) {
      const int64_t now = std::min(block, last_vector - v), most = EvenPixels(count, now);
      tile.out_pixel = tile.out_channels = now * kLanes;
      for (int64_t place = 0; place < kPlaces; ++place) {
        const float* const w = packed + v * transformed + place * c.in * kLanes;
        for (int64_t t = 0; t < count; t += most) {
          const int64_t pixels = std::min(most, count - t);
          kMultiply[now - 1][pixels - 1](tile, read.get() + place * plane + t * c.in, w,
                                         products.get() + place * product_plane + t * tile.out_pixel);
        }
      }
      for (int64_t q = 0; q < now; ++q) {
        const Finish finish(epilogue, (v + q) * kLanes, c.out);
        Place at = start;
        for (int64_t t = 0; t < count; ++t, at.Advance(height, row_length)) {
          Vector out[2][2];
          TransformTarget(products.get() + t * tile.out_pixel + q * kLanes, product_plane, out);
          const int64_t first = ((at.image * height + at.row) * row_length + at.column) * c.out;
          for (int64_t r = 0; r < 2; ++r) {
            for (int64_t s = 0; s < 2; ++s) {
              if (at.row + r >= height || at.column + s >= row_length) continue;
              finish.Write(out[r][s], target, first + (r * row_length + s) * c.out);
            }
          }
        }
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------
// One channel per group

// As `MultiplyTile`; x, w and out are vectors of channels.
template <int kPixels>
void DepthwiseTile(const Tile& tile, const float* x, const float* w, float* out) {
  Vector sums[kPixels][1] = {};
  const int64_t pixel = tile.x_pixel;
  for (int64_t r = 0; r < tile.rows; ++r, x += tile.x_row) {
    const float* a = x;
    for (int64_t t = 0; t < tile.depth; ++t, a += tile.w_row, w += tile.w_row) {
      const Vector b = Load(w);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) sums[p][0] += b * Load(a + p * pixel);
    }
  }
  StoreTile<kPixels, 1>(tile, sums, out);
}

constexpr int kDepthwisePixels = 8;
template <size_t... kIndices>
constexpr std::array<MultiplyFunction, kDepthwisePixels> DepthwiseRow(std::index_sequence<kIndices...>) {
  return {DepthwiseTile<int(kIndices) + 1>...};
}
constexpr auto kDepthwise = DepthwiseRow(std::make_index_sequence<kDepthwisePixels>());

constexpr int64_t kLine = 16;  // floats of a cache line

// kRows rows of the target of a 3x3 window at stride 1, for a vector of channels. A column of the
// source is loaded once, for the three columns of the target that read it; there are `channels`
// channels, the weights are [3][3][pitch], and `out` is the offset of the first pixel. Meanwhile
// what follows from `ahead` on, a cache line per column, is fetched.
template <int kRows>
void DepthwiseRows(const std::array<const float*, kRows + 2>& rows, const float* ahead,
                   int64_t columns, int64_t channels, const float* weights, int64_t pitch,
                   Finish finish, float* target, int64_t out) {
  Vector w[3][3], before[kRows] = {}, here[kRows] = {};
  for (int r = 0; r < 3; ++r) {
    for (int t = 0; t < 3; ++t) w[r][t] = Load(weights + (3 * r + t) * pitch);
  }
  for (int64_t x = 0; x <= columns; ++x) {  // the last one completes the last column
    Vector d[kRows + 2] = {}, after[kRows];
    if (x < columns) {
      __builtin_prefetch(ahead + x * kLine);
      for (int r = 0; r < kRows + 2; ++r) {
        d[r] = LoadPart(rows[r] + x * channels + finish.first, finish.left);
      }
    }
    for (int o = 0; o < kRows; ++o) {
      const Vector complete = before[o] + w[0][2] * d[o] + w[1][2] * d[o + 1] + w[2][2] * d[o + 2];
      if (x > 0) finish.Write(complete, target, out + (o * columns + x - 1) * channels);
      before[o] = here[o] + w[0][1] * d[o] + w[1][1] * d[o + 1] + w[2][1] * d[o + 2];
      after[o] = w[0][0] * d[o] + w[1][0] * d[o + 1] + w[2][0] * d[o + 2];
    }
    for (int o = 0; o < kRows; ++o) here[o] = after[o];
  }
}

void CorrelateDepthwise3x3(ffi::ThreadPool& pool, const Correlation& c, const float* source,
                           const float* packed, const Epilogue& epilogue, float* target) {
  const int64_t channels = c.groups, height = c.source.height, width = c.source.width;
  const int64_t line = width * channels, threads = std::max<int64_t>(pool.num_threads(), 1);
  const int64_t pairs = CeilDiv(height, 2);  // of rows
  const int64_t of_task = std::clamp<int64_t>(c.source.count * pairs / (4 * threads), 1, pairs);
  const int64_t tasks = CeilDiv(pairs, of_task);
  Buffer zeros(line);
  std::memset(zeros.get(), 0, line * sizeof(float));
  Parallel(pool, c.source.count * tasks, [&](int64_t task) {
    const float* const image = source + task / tasks * height * line;
    const int64_t begin = task % tasks * of_task * 2, end = std::min(begin + 2 * of_task, height);
    const auto row_at = [&](int64_t row) {
      return row >= 0 && row < height ? image + row * line : zeros.get();
    };
    for (int64_t row = begin; row < end; row += 2) {
      const int64_t out = (task / tasks * height + row) * line;
      const std::array<const float*, 4> rows = {row_at(row - 1), row_at(row), row_at(row + 1),
                                                row_at(row + 2)};
      const float* const next = row_at(row + 3);
      for (int64_t first = 0; first < channels; first += kLanes) {
        const Finish finish(epilogue, first, channels);
        if (row + 1 < end) {
          DepthwiseRows<2>(rows, next + first / kLanes * width * kLine, width, channels,
                           packed + first, RoundUp(channels, kLanes), finish, target, out);
        } else {
          DepthwiseRows<1>({rows[0], rows[1], rows[2]}, next, width, channels, packed + first,
                           RoundUp(channels, kLanes), finish, target, out);
        }
      }
    }
  });
}

void CorrelateDepthwise(ffi::ThreadPool& pool, const Correlation& c, const float* source,
                        const Weights& weights, const Epilogue& epilogue, float* target) {
  const int64_t channels = c.groups, pitch = RoundUp(channels, kLanes);
  const int64_t threads = std::max<int64_t>(pool.num_threads(), 1);
  struct Plan {
    int64_t rows, bands, packed, tasks;
  };
  std::vector<Plan> plans;
  int64_t packed_size = 0, tasks = 0, band_size = 0;
  for (const Phase& phase : c.phases) {
    Plan plan;
    plan.rows = RowsOfTask(phase, pitch, c.source.count, threads);
    plan.bands = CeilDiv(phase.rows.count, plan.rows);
    plan.packed = packed_size;
    plan.tasks = phase.columns.count > 0 ? c.source.count * plan.bands : 0;
    packed_size += phase.rows.taps * phase.columns.taps * pitch;
    tasks += plan.tasks;
    const Window window = WindowOf(phase, 0, plan.rows, 0, channels, pitch);
    band_size = std::max(band_size, window.rows * window.columns * window.pitch);
    plans.push_back(plan);
  }
  Buffer packed(packed_size);
  float* to = packed.get();
  for (const Phase& phase : c.phases) {
    for (int64_t r = 0; r < phase.rows.taps; ++r) {
      for (int64_t t = 0; t < phase.columns.taps; ++t, to += pitch) {
        const int64_t row = phase.rows.tap_start + r * phase.rows.tap_step;
        const int64_t column = phase.columns.tap_start + t * phase.columns.tap_step;
        const float* from = weights.values + (row * c.kernel + column) * channels;
        std::copy(from, from + channels, to);
        std::fill(to + channels, to + pitch, 0.0f);
      }
    }
  }

  if (c.IsSame3x3()) {
    return CorrelateDepthwise3x3(pool, c, source, packed.get(), epilogue, target);
  }
  Parallel(pool, tasks, [&](int64_t task) {
    int64_t index = 0;
    while (task >= plans[index].tasks) task -= plans[index++].tasks;
    const Plan& plan = plans[index];
    const Phase& phase = c.phases[index];
    const int64_t image = task / plan.bands, row = task % plan.bands * plan.rows;
    const int64_t rows = std::min(plan.rows, phase.rows.count - row);
    const Window window = WindowOf(phase, row, rows, 0, channels, pitch);
    Buffer band(band_size);
    CopyWindow(source + image * c.source.height * c.source.width * channels, c.source, window,
               band.get());
    Tile tile{};
    tile.x_pixel = phase.columns.stride * pitch;
    tile.x_row = window.columns * pitch;
    tile.rows = phase.rows.taps;
    tile.depth = phase.columns.taps;
    tile.w_row = pitch;
    tile.out_pixel = phase.columns.step * channels;
    const int64_t pixels = CeilDiv(phase.columns.count, CeilDiv(phase.columns.count, kDepthwisePixels));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t out = ((image * c.target.height + phase.rows.start +
                            (row + r) * phase.rows.step) *
                               c.target.width + phase.columns.start) * channels;
      const float* const x = band.get() + r * phase.rows.stride * tile.x_row;
      for (int64_t p = 0; p < phase.columns.count; p += pixels) {
        const int64_t count = std::min(pixels, phase.columns.count - p);
        for (int64_t first = 0; first < channels; first += kLanes) {
          const int64_t at = out + p * tile.out_pixel + first;
          tile.out_channels = channels - first;
          tile.epilogue = epilogue.At(first, at);
          kDepthwise[count - 1](tile, x + p * tile.x_pixel + first,
                                packed.get() + plan.packed + first, target + at);
        }
      }
    }
  });
}

void Correlate(ffi::ThreadPool& pool, const Correlation& c, const float* source,
               const Weights& weights, const Epilogue& epilogue, float* target) {
  const bool depthwise = c.in == 1 && c.out == 1 && c.groups > 1;
  const auto correlate = depthwise        ? CorrelateDepthwise
                         : IsWinograd(c) ? CorrelateWinograd
                                         : CorrelateDense;
  correlate(pool, c, source, weights, epilogue, target);
}

// ------------------------------------------------------------------------------------------------
// The gradient of the weights

struct Convolution {
  Images x, y;
  int64_t kernel, stride, groups, in, out, repetitions;
};

// The division of the sum over all pixels: bands of `rows` output rows, `bands` of them per image,
// in `parts` parts of `bands_of_part` bands each.
struct Division {
  int64_t rows, bands, parts, bands_of_part;
};

Division Divide(const Convolution& c, int64_t floats_of_row, int64_t parts) {
  Division d;
  d.rows = std::clamp<int64_t>(kBand / std::max<int64_t>(floats_of_row, 1), 1, c.y.height);
  d.bands = CeilDiv(c.y.height, d.rows);
  d.rows = CeilDiv(c.y.height, d.bands);
  const int64_t all = c.y.count * d.bands;
  d.bands_of_part = CeilDiv(all, std::clamp<int64_t>(parts, 1, all));
  d.parts = CeilDiv(all, d.bands_of_part);
  return d;
}

void WeightGradientDense(ffi::ThreadPool& pool, const Convolution& c, const float* x,
                         const float* dy, float* dw) {
  const int64_t depth = c.kernel * c.in, vectors = CeilDiv(c.out, kLanes);
  const int64_t block = BestVectors(depth, vectors);
  const int64_t size = c.kernel * depth * kLanes;  // of one vector of channels
  const int64_t slice = std::min(std::max<int64_t>(kWeights / (size * block), 1) * block, vectors);
  const int64_t slices = CeilDiv(vectors, slice);
  const int64_t columns = (c.y.width - 1) * c.stride + c.kernel;
  const Division d = Divide(c, columns * c.in * c.stride + c.y.width * c.out,
                            CeilDiv(kParts, slices * c.groups));
  const int64_t total = c.groups * vectors * size;
  Buffer sums(d.parts * total);
  const Phase phase = {ForwardAxis(c.y.height, c.kernel, c.stride),
                       ForwardAxis(c.y.width, c.kernel, c.stride)};
  const int64_t band_size = ((d.rows - 1) * c.stride + c.kernel) * columns * c.in;
  const bool copied = c.out % kLanes != 0;  // whole vectors would reach beyond the last pixel

  Parallel(pool, c.groups * slices * d.parts, [&](int64_t task) {
    const int64_t part = task % d.parts, slice_index = task / d.parts % slices;
    const int64_t group = task / d.parts / slices;
    const int64_t first = slice_index * slice, last = std::min(first + slice, vectors);
    const int64_t width = (last - first) * kLanes;
    float* const own = sums.get() + part * total + (group * vectors + first) * size;
    std::memset(own, 0, (last - first) * size * sizeof(float));
    Buffer band(band_size), dy_band(copied ? d.rows * c.y.width * width : 0);
    const int64_t end = std::min((part + 1) * d.bands_of_part, c.y.count * d.bands);
    for (int64_t b = part * d.bands_of_part; b < end; ++b) {
      const int64_t image = b / d.bands, row = b % d.bands * d.rows;
      const int64_t rows = std::min(d.rows, c.y.height - row);
      if (rows <= 0) continue;
      CopyWindow(x + image * c.x.height * c.x.width * c.x.channels, c.x,
                 WindowOf(phase, row, rows, group * c.in, c.in, c.in), band.get());
      GradientTile tile;
      tile.x_pixel = c.stride * c.in;
      tile.x_row = c.stride * columns * c.in;
      tile.dy_pixel = c.y.channels;
      tile.rows = rows;
      tile.columns = c.y.width;
      tile.sums_row = width;
      const float* dy_rows = dy + (image * c.y.height + row) * c.y.width * c.y.channels +
                             group * c.out + first * kLanes;
      if (copied) {
        const int64_t pixels = rows * c.y.width, channels = std::min(width, c.out - first * kLanes);
        CopyWindow(dy_rows, {1, 1, pixels, c.y.channels}, {0, 0, 1, pixels, 0, channels, width},
                   dy_band.get());
        dy_rows = dy_band.get();
        tile.dy_pixel = width;
      }
      tile.dy_row = c.y.width * tile.dy_pixel;
      for (int64_t v = first; v < last; v += block) {
        const int64_t count = std::min(block, last - v), length = EvenPixels(depth, count);
        for (int64_t k = 0; k < c.kernel; ++k) {
          for (int64_t j = 0; j < depth; j += length) {
            kGradient[count - 1][std::min(length, depth - j) - 1](
                tile, band.get() + k * columns * c.in + j, dy_rows + (v - first) * kLanes,
                own + (k * depth + j) * width + (v - first) * kLanes);
          }
        }
      }
    }
  });

  // Adds up the parts, in order, and stores the sums in the result's layout.
  Parallel(pool, c.groups * slices * c.kernel, [&](int64_t task) {
    const int64_t k = task % c.kernel, slice_index = task / c.kernel % slices;
    const int64_t group = task / c.kernel / slices;
    const int64_t first = slice_index * slice, last = std::min(first + slice, vectors);
    const int64_t width = (last - first) * kLanes;
    const int64_t channels = std::min(width, c.out - first * kLanes);
    const float* from = sums.get() + (group * vectors + first) * size + k * depth * width;
    float* to = dw + k * depth * c.groups * c.out + group * c.out + first * kLanes;
    for (int64_t j = 0; j < depth; ++j, from += width, to += c.groups * c.out) {
      for (int64_t o = 0; o < channels; o += kLanes) {
        Vector sum = Load(from + o);
        for (int64_t part = 1; part < d.parts; ++part) sum += Load(from + part * total + o);
        StorePart(to + o, sum, channels - o);
      }
    }
  });
}

// Winograd's algorithm turned around: with u = sum over tiles of (B d B') (A' dy A), place by place a
// product of matrices [in, tiles] and [tiles, out], the gradient is G' u G.

// A' dy A for the vector of channels at `channel`, of which `left` exist: 2x2 pixels, or fewer at the
// border, to 16 places.
inline void TransformGradient(const float* dy, const Images& images, const Place& at,
                              int64_t channel, int64_t left, int64_t plane, float* out) {
  Vector half[4][2];
  for (int t = 0; t < 2; ++t) {
    Vector d[2] = {};
    for (int r = 0; r < 2; ++r) {
      if (at.row + r >= images.height || at.column + t >= images.width) continue;
      const int64_t pixel = (at.image * images.height + at.row + r) * images.width + at.column + t;
      d[r] = LoadPart(dy + pixel * images.channels + channel, left);
    }
    half[0][t] = d[0];
    half[1][t] = d[0] + d[1];
    half[2][t] = d[0] - d[1];
    half[3][t] = -d[1];
  }
  for (int r = 0; r < 4; ++r) {
    float* const to = out + 4 * r * plane;
    Store(to, half[r][0]);
    Store(to + plane, half[r][0] + half[r][1]);
    Store(to + 2 * plane, half[r][0] - half[r][1]);
    Store(to + 3 * plane, -half[r][1]);
  }
}

bool IsWinogradGradient(const Convolution& c) {
  const int64_t covered = RoundUp(c.x.height, 2) * RoundUp(c.x.width, 2);
  return c.kernel == 3 && c.stride == 1 && c.groups == 1 && c.in >= 24 && c.out >= 24 &&
         2 * covered <= 3 * c.x.height * c.x.width;
}

void WeightGradientWinograd(ffi::ThreadPool& pool, const Convolution& c, const float* x,
                            const float* dy, float* dw) {
  constexpr int64_t kSums = 512 * 1024, kTiles = 64;  // of a task, in floats; at a time
  const int64_t vectors = CeilDiv(c.out, kLanes), block = BestVectors(c.in, vectors);
  const int64_t size = kPlaces * c.in * kLanes;  // of one vector of channels
  const int64_t slice = std::min(std::max<int64_t>(kSums / (size * block), 1) * block, vectors);
  const int64_t slices = CeilDiv(vectors, slice), total = vectors * size;
  const int64_t across = CeilDiv(c.y.width, 2), down = CeilDiv(c.y.height, 2);
  const int64_t tiles = c.y.count * down * across;
  const int64_t of_part = CeilDiv(tiles, std::min(CeilDiv(kParts, slices), CeilDiv(tiles, kTiles)));
  const int64_t parts = CeilDiv(tiles, of_part);
  Buffer sums(parts * total);

  Parallel(pool, slices * parts, [&](int64_t task) {
    const int64_t part = task % parts, first = task / parts * slice;
    const int64_t last = std::min(first + slice, vectors), width = (last - first) * kLanes;
    float* const own = sums.get() + part * total + first * size;
    std::memset(own, 0, (last - first) * size * sizeof(float));
    const int64_t plane = kTiles * c.in + 16, dy_plane = kTiles * width + 16;
    Buffer read(kPlaces * plane), turned(kPlaces * dy_plane);
    const int64_t end = std::min((part + 1) * of_part, tiles);
    for (int64_t begin = part * of_part; begin < end; begin += kTiles) {
      const int64_t count = std::min(kTiles, end - begin);
      const Place start = Place::Of(begin, across, down);
      TransformTiles(x, c.x, start, count, plane, read.get());
      Place at = start;
      for (int64_t t = 0; t < count; ++t, at.Advance(c.y.height, c.y.width)) {
        for (int64_t v = first; v < last; ++v) {
          TransformGradient(dy, c.y, at, v * kLanes, c.out - v * kLanes, dy_plane,
                            turned.get() + t * width + (v - first) * kLanes);
        }
      }
      const GradientTile tile = {c.in, 0, width, 0, 1, count, width};
      for (int64_t v = first; v < last; v += block) {
        const int64_t now = std::min(block, last - v), length = EvenPixels(c.in, now);
        const int64_t column = (v - first) * kLanes;
        for (int64_t place = 0; place < kPlaces; ++place) {
          for (int64_t i = 0; i < c.in; i += length) {
            kGradient[now - 1][std::min(length, c.in - i) - 1](
                tile, read.get() + place * plane + i, turned.get() + place * dy_plane + column,
                own + (place * c.in + i) * width + column);
          }
        }
      }
    }
  });

  constexpr int64_t kRows = 8;  // of a task
  const int64_t chunks = CeilDiv(c.in, kRows);
  Parallel(pool, slices * chunks, [&](int64_t task) {
    const int64_t first = task / chunks * slice, last = std::min(first + slice, vectors);
    const int64_t width = (last - first) * kLanes, row = task % chunks * kRows;
    for (int64_t i = row; i < std::min(row + kRows, c.in); ++i) {
      for (int64_t o = 0; o < width; o += kLanes) {
        Vector half[3][4];
        for (int t = 0; t < 4; ++t) {
          Vector u[4];
          for (int r = 0; r < 4; ++r) {
            const float* from = sums.get() + first * size + ((4 * r + t) * c.in + i) * width + o;
            u[r] = Load(from);
            for (int64_t part = 1; part < parts; ++part) u[r] += Load(from + part * total);
          }
          half[0][t] = u[0] + 0.5f * (u[1] + u[2]);
          half[1][t] = 0.5f * (u[1] - u[2]);
          half[2][t] = u[3] + 0.5f * (u[1] + u[2]);
        }
        const int64_t channel = first * kLanes + o, left = c.out - channel;
        for (int r = 0; r < 3; ++r) {
          const Vector* u = half[r];
          float* const to = dw + (3 * r * c.in + i) * c.out + channel;
          StorePart(to, u[0] + 0.5f * (u[1] + u[2]), left);
          StorePart(to + c.in * c.out, 0.5f * (u[1] - u[2]), left);
          StorePart(to + 2 * c.in * c.out, u[3] + 0.5f * (u[1] + u[2]), left);
        }
      }
    }
  });
}

// sums[r, t, :] += sum over pixels of x[pixel + (r, t), :] * dy[pixel, :], for a vector of channels.
// `x_row` is the distance between rows of x, of which there are `stride` per row of dy, `pitch` that
// between its pixels, and `channels` the number of remaining channels of dy.
template <int kRows, int kColumns>
void DepthwiseGradientTile(const GradientTile& tile, int64_t stride, int64_t pitch,
                           int64_t channels, const float* x, const float* dy, float* sums) {
  Vector total[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kColumns; ++t) total[r][t] = Load(sums + r * tile.sums_row + t * pitch);
  }
  for (int64_t i = 0; i < tile.rows; ++i, x += stride * tile.x_row, dy += tile.dy_row) {
    const float *a = x, *b = dy;
    for (int64_t j = 0; j < tile.columns; ++j, a += tile.x_pixel, b += tile.dy_pixel) {
      const Vector v = LoadPart(b, channels);
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kColumns; ++t) total[r][t] += v * Load(a + r * tile.x_row + t * pitch);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int t = 0; t < kColumns; ++t) Store(sums + r * tile.sums_row + t * pitch, total[r][t]);
  }
}

void WeightGradientDepthwise(ffi::ThreadPool& pool, const Convolution& c, const float* x,
                             const float* dy, float* dw) {
  const int64_t channels = c.groups, pitch = RoundUp(channels, kLanes);
  const int64_t columns = (c.y.width - 1) * c.stride + c.kernel;
  const Division d = Divide(c, (columns * c.stride + c.y.width) * pitch, kParts);
  const int64_t size = c.kernel * c.kernel * pitch;
  Buffer sums(d.parts * size);
  const Phase phase = {ForwardAxis(c.y.height, c.kernel, c.stride),
                       ForwardAxis(c.y.width, c.kernel, c.stride)};
  const int64_t band_size = ((d.rows - 1) * c.stride + c.kernel) * columns * pitch;

  Parallel(pool, d.parts, [&](int64_t part) {
    float* const own = sums.get() + part * size;
    std::memset(own, 0, size * sizeof(float));
    Buffer band(band_size);
    const int64_t end = std::min((part + 1) * d.bands_of_part, c.y.count * d.bands);
    for (int64_t b = part * d.bands_of_part; b < end; ++b) {
      const int64_t image = b / d.bands, row = b % d.bands * d.rows;
      const int64_t rows = std::min(d.rows, c.y.height - row);
      if (rows <= 0) continue;
      CopyWindow(x + image * c.x.height * c.x.width * channels, c.x,
                 WindowOf(phase, row, rows, 0, channels, pitch), band.get());
      GradientTile tile;
      tile.x_pixel = c.stride * pitch;
      tile.x_row = columns * pitch;
      tile.dy_pixel = channels;
      tile.dy_row = c.y.width * channels;
      tile.rows = rows;
      tile.columns = c.y.width;
      tile.sums_row = c.kernel * pitch;
      const float* const dy_rows = dy + (image * c.y.height + row) * c.y.width * channels;
      for (int64_t first = 0; first < channels; first += kLanes) {
        if (c.kernel == 3) {
          DepthwiseGradientTile<3, 3>(tile, c.stride, pitch, channels - first, band.get() + first,
                                      dy_rows + first, own + first);
          continue;
        }
        for (int64_t k = 0; k < c.kernel; ++k) {
          for (int64_t t = 0; t < c.kernel; ++t) {
            DepthwiseGradientTile<1, 1>(tile, c.stride, pitch, channels - first,
                                        band.get() + k * tile.x_row + t * pitch + first,
                                        dy_rows + first,
                                        own + (k * c.kernel + t) * pitch + first);
          }
        }
      }
    }
  });
  for (int64_t tap = 0; tap < c.kernel * c.kernel; ++tap) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      float sum = sums.get()[tap * pitch + channel];
      for (int64_t part = 1; part < d.parts; ++part) {
        sum += sums.get()[part * size + tap * pitch + channel];
      }
      dw[tap * channels + channel] = sum;
    }
  }
}

// ------------------------------------------------------------------------------------------------
// XLA's side

// The convolution from x to y. Leading axes, beyond four, come from jax.vmap: both arguments and the
// result have them. Sizes are checked here too, since programs may come from elsewhere than Python.
ffi::ErrorOr<Convolution> Describe(const Array& x, const Array& w, const Array& y, int64_t stride,
                                   int64_t groups) {
  const ffi::Error error = ffi::Error::InvalidArgument("sizes of a convolution that do not fit");
  Convolution c;
  c.repetitions = Repetitions({{&x, 4}, {&w, 4}, {&y, 4}});
  if (c.repetitions < 0) return ffi::Unexpected(error);
  c.x = ImagesOf(x);
  c.y = ImagesOf(y);
  const auto sizes = w.dimensions().last(4);
  c.kernel = sizes[0];
  c.stride = stride;
  c.groups = groups;
  c.in = sizes[2];
  const bool fits = stride > 0 && groups > 0 && c.kernel % 2 == 1 &&
                    sizes[1] == c.kernel && c.x.channels == groups * c.in &&
                    c.y.channels == sizes[3] && sizes[3] % groups == 0 &&
                    c.x.count == c.y.count && c.y.height == CeilDiv(c.x.height, stride) &&
                    c.y.width == CeilDiv(c.x.width, stride);
  if (!fits) return ffi::Unexpected(error);
  c.out = sizes[3] / groups;
  return c;
}

// Calls compute(a, b, result) for each index of the leading axes; an empty sum is zero.
template <typename Compute>
ffi::Error Each(const Convolution& c, const Array& a, const Array& b, Array& result,
                const Compute& compute) {
  if (a.element_count() == 0 || b.element_count() == 0) {
    if (result.element_count() > 0) std::memset(result.typed_data(), 0, result.size_bytes());
    return ffi::Error::Success();
  }
  for (int64_t i = 0; i < c.repetitions; ++i) {
    compute(PartOf(a, i, c.repetitions), PartOf(b, i, c.repetitions),
            PartOf(result, i, c.repetitions));
  }
  return ffi::Error::Success();
}

Correlation ForwardOf(const Convolution& c) {
  const Phase phase = {ForwardAxis(c.y.height, c.kernel, c.stride),
                       ForwardAxis(c.y.width, c.kernel, c.stride)};
  return {c.x, c.y, {phase}, c.kernel, c.groups, c.in, c.out, false};
}

// The size in floats of the packed weights of a convolution.
int64_t PackedSize(const Correlation& forward) {
  const int64_t places = IsWinograd(forward) ? kPlaces : forward.kernel * forward.kernel;
  return forward.groups * RoundUp(forward.out, kLanes) * places * forward.in;
}

// Arrays of the epilogue may be empty, if that part of it is left out, and so may `packed`. Packed
// weights for larger images, where the other algorithm is used, are ignored.
ffi::Error Forward(ffi::ThreadPool pool, Array x, Array w, Array packed, Array scale, Array bias,
                   Array residual, ffi::Result<Array> y, int64_t stride, int64_t groups,
                   int64_t relu) {
  const auto c = Describe(x, w, *y, stride, groups);
  if (c.has_error()) return c.error();
  const auto fits = [](const Array& array, int64_t size) {
    return array.element_count() == 0 || int64_t(array.element_count()) == size;
  };
  const int64_t channels = c->repetitions * c->y.channels;
  if (!fits(scale, channels) || !fits(bias, channels) || !fits(residual, y->element_count())) {
    return ffi::Error::InvalidArgument("an epilogue of a convolution that does not fit");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  const Correlation forward = ForwardOf(*c);
  const int64_t size = c->repetitions * PackedSize(forward);
  const bool is_packed = size > 0 && int64_t(packed.element_count()) == size;
  for (int64_t i = 0; i < c->repetitions; ++i) {
    const auto part = [&](auto& array) { return PartOf(array, i, c->repetitions); };
    Correlate(pool, forward, part(x), {part(w), is_packed ? part(packed) : nullptr},
              {part(scale), part(bias), part(residual), relu}, part(*y));
  }
  return ffi::Error::Success();
}

ffi::Error InputGradient(ffi::ThreadPool pool, Array dy, Array w, ffi::Result<Array> dx,
                         int64_t stride, int64_t groups) {
  const auto c = Describe(*dx, w, dy, stride, groups);
  if (c.has_error()) return c.error();
  std::vector<Phase> phases;
  for (int64_t row = 0; row < std::min(stride, c->x.height); ++row) {
    for (int64_t column = 0; column < std::min(stride, c->x.width); ++column) {
      phases.push_back({GradientAxis(c->x.height, c->kernel, stride, row),
                        GradientAxis(c->x.width, c->kernel, stride, column)});
    }
  }
  const Correlation gradient = {c->y, c->x, phases, c->kernel, groups, c->out, c->in, true};
  return Each(*c, dy, w, *dx, [&](const float* dy, const float* w, float* dx) {
    Correlate(pool, gradient, dy, {w, nullptr}, {}, dx);
  });
}

ffi::Error WeightGradient(ffi::ThreadPool pool, Array x, Array dy, ffi::Result<Array> dw,
                          int64_t stride, int64_t groups) {
  const auto c = Describe(x, *dw, dy, stride, groups);
  if (c.has_error()) return c.error();
  const bool depthwise = c->in == 1 && c->out == 1 && groups > 1;
  const auto gradient = depthwise                ? WeightGradientDepthwise
                        : IsWinogradGradient(*c) ? WeightGradientWinograd
                                                 : WeightGradientDense;
  return Each(*c, x, dy, *dw, [&](const float* x, const float* dy, float* dw) {
    gradient(pool, *c, x, dy, dw);
  });
}

auto Gradient() { return BindArrays<2, 1>().Attr<int64_t>("stride").Attr<int64_t>("groups"); }

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_conv, Forward,
                              (BindArrays<6, 1>()
                               .Attr<int64_t>("stride")
                               .Attr<int64_t>("groups")
                               .Attr<int64_t>("relu")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_conv_input_gradient, InputGradient, Gradient());
XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_conv_weight_gradient, WeightGradient, Gradient());

// Packs the weights of a convolution of images that are not small, for `Forward`, and returns their
// number; with null it returns the number alone.
extern "C" int64_t shiftnet_conv_pack(const float* w, int64_t kernel, int64_t in, int64_t out,
                                      int64_t stride, float* packed) {
  const Images x = {1, 64 * stride, 64 * stride, in}, y = {1, 64, 64, out};
  const Correlation c = ForwardOf({x, y, kernel, stride, 1, in, out, 1});
  const int64_t vectors = CeilDiv(out, kLanes), size = PackedSize(c) / std::max<int64_t>(vectors, 1);
  for (int64_t v = 0; packed && v < vectors; v += kVectorsOfTask) {
    if (IsWinograd(c)) {
      PackWinograd(c, v, w, packed);
    } else {
      PackVectors(c, c.phases[0], 0, v, std::min(kVectorsOfTask, vectors - v), size, w,
                  packed + v * size);
    }
  }
  return vectors * size;
}

}  // namespace shiftnet
