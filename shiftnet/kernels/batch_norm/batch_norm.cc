// Batch norm in training on a CPU, with the ReLU and the addition that follow, called by XLA through
// its foreign function interface.
//
// Time goes into reading and writing arrays that no cache holds, so the forward pass reads x twice,
// once for its statistics, and the backward pass goes over its arrays twice as well. Arrays are
// [pixels, channels], all float32.
//
// Results do not depend on the number of threads: the pixels are divided into parts that depend on
// their number only, and the parts' sums are added in a fixed order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "native.h"

namespace shiftnet {
namespace {

constexpr int64_t kAtOnce = 8;         // vectors of sums, so that none waits for its last addition
constexpr int64_t kChunk = 16 * 1024;  // bytes that are read twice and stay in the first cache
constexpr int64_t kLeast = 8;          // periods of a chunk
constexpr int64_t kMostParts = 64;

// How channels lie in an array: in periods, whole pixels that are whole vectors, so that the lanes of
// a period have the same channels in all of them, and fewer pixels at the end.
struct Pixels {
  int64_t count, channels;
  int64_t vectors, lanes;  // of a period
  int64_t periods, rest;   // whole ones, and the floats after them
  int64_t chunk, parts;    // periods of a chunk; parts of whole chunks

  Pixels(int64_t count, int64_t channels) : count(count), channels(channels) {
    const int64_t least = std::lcm(channels, int64_t(kLanes)) / kLanes;
    vectors = least * CeilDiv(kAtOnce, least);
    lanes = vectors * kLanes;
    periods = count * channels / lanes;
    rest = count * channels % lanes;
    chunk = std::max<int64_t>(kLeast, kChunk / (4 * lanes));
    of_part_ = chunk * std::max<int64_t>(1, CeilDiv(periods, chunk * kMostParts));
    parts = CeilDiv(periods, of_part_);
  }

  int64_t First(int64_t part) const { return std::min(part * of_part_, periods); }

  // Calls body(place, vector of the period, number of lanes) for all vectors of some periods.
  template <typename Body>
  void Each(int64_t first, int64_t last, const Body& body) const {
    for (int64_t period = first; period < last; ++period) {
      for (int64_t v = 0; v < vectors; ++v) body(period * lanes + v * kLanes, v, int64_t(kLanes));
    }
  }

  // Likewise for those after the whole periods.
  template <typename Body>
  void EachOfRest(const Body& body) const {
    for (int64_t v = 0; v * kLanes < rest; ++v) {
      body(periods * lanes + v * kLanes, v, std::min<int64_t>(kLanes, rest - v * kLanes));
    }
  }

  // Calls it for all vectors of the array, on all threads.
  template <typename Body>
  void EachOfAll(ffi::ThreadPool& pool, const Body& body) const {
    Parallel(pool, parts, [&](int64_t part) { Each(First(part), First(part + 1), body); });
    EachOfRest(body);
  }

  // Calls body(i, its channel) for the first lanes of a period.
  template <typename Body>
  void EachLane(int64_t lanes, const Body& body) const {
    for (int64_t first = 0; first < lanes; first += channels) {
      const int64_t many = std::min(channels, lanes - first);
      for (int64_t c = 0; c < many; ++c) body(first + c, c);
    }
  }

  // What a period multiplies by or adds: `values`, [channels], over and over.
  template <typename Values>
  void Repeat(const Values& values, float* to) const {
    EachLane(lanes, [&](int64_t i, int64_t c) { to[i] = values[c]; });
  }

 private:
  int64_t of_part_;
};

// Mean and biased variance of each channel. A chunk's squares are those of the distances from its
// own mean, so that values far from zero lose no digits.
void Moments(ffi::ThreadPool& pool, const Pixels& p, const float* x, std::vector<double>& mean,
             std::vector<double>& var) {
  Buffer sums(p.parts * 2 * p.lanes);
  Parallel(pool, p.parts, [&](int64_t part) {
    float* const means = sums.get() + part * 2 * p.lanes;
    float* const squares = means + p.lanes;
    std::fill(means, squares + p.lanes, 0.0f);
    Buffer chunk(2 * p.lanes);
    float* const centre = chunk.get();
    float* const distances = centre + p.lanes;
    const int64_t begin = p.First(part), end = p.First(part + 1);
    for (int64_t first = begin; first < end; first += p.chunk) {
      const int64_t last = std::min(first + p.chunk, end);
      std::fill(centre, distances + p.lanes, 0.0f);
      p.Each(first, last, [&](int64_t at, int64_t v, int64_t) {
        Store(centre + v * kLanes, Load(centre + v * kLanes) + Load(x + at));
      });
      const float count = last - first, before = first - begin;
      for (int64_t i = 0; i < p.lanes; ++i) centre[i] /= count;
      p.Each(first, last, [&](int64_t at, int64_t v, int64_t) {
        const Vector distance = Load(x + at) - Load(centre + v * kLanes);
        Store(distances + v * kLanes, Load(distances + v * kLanes) + distance * distance);
      });
      const float share = count / (before + count);
      for (int64_t i = 0; i < p.lanes; ++i) {
        const float step = centre[i] - means[i];
        means[i] += step * share;
        squares[i] += distances[i] + step * step * share * before;
      }
    }
  });

  mean.assign(p.channels, 0.0);
  var.assign(p.channels, 0.0);
  const float* const rest = x + p.periods * p.lanes;
  const auto each = [&](const auto& body) {  // body(channel, pixels, their mean, their squares)
    for (int64_t part = 0; part < p.parts; ++part) {
      const double count = p.First(part + 1) - p.First(part);
      const float* const means = sums.get() + part * 2 * p.lanes;
      p.EachLane(p.lanes, [&](int64_t i, int64_t c) { body(c, count, means[i], means[p.lanes + i]); });
    }
    p.EachLane(p.rest, [&](int64_t i, int64_t c) { body(c, 1.0, rest[i], 0.0); });
  };
  each([&](int64_t c, double count, double value, double) { mean[c] += count * value; });
  for (double& value : mean) value /= p.count;
  each([&](int64_t c, double count, double value, double squares) {
    const double step = value - mean[c];
    var[c] += squares + count * step * step;
  });
  for (double& value : var) value /= p.count;
}

// y = x * scale + bias, the ReLU and the addition. An array that is not used is nullptr.
template <int64_t kRelu>
void Normalize(ffi::ThreadPool& pool, const Pixels& p, const float* x, const float* scale,
               const float* bias, const float* residual, float* y) {
  p.EachOfAll(pool, [=](int64_t at, int64_t v, int64_t count) {
    Vector value = LoadPart(x + at, count) * Load(scale + v * kLanes) + Load(bias + v * kLanes);
    if (kRelu == kReluBeforeResidual) value = Rectified(value);
    if (residual != nullptr) value += LoadPart(residual + at, count);
    if (kRelu == kReluLast) value = Rectified(value);
    StorePart(y + at, value, count);
  });
}

struct Backward {
  const float *x, *out, *dout, *mean, *var, *scale, *bias;
  float *dx, *dscale, *dbias, *dresidual;
  float epsilon;
};

template <int64_t kRelu>
void Gradients(ffi::ThreadPool& pool, const Pixels& p, const Backward& b) {
  std::vector<float> inverse(p.channels), factor(p.channels), shift(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    inverse[c] = 1 / std::sqrt(b.var[c] + b.epsilon);
    factor[c] = b.scale[c] * inverse[c];
    shift[c] = b.bias[c] - b.mean[c] * factor[c];
  }
  Buffer constants(5 * p.lanes);
  float* const means = constants.get();
  float *const factors = means + p.lanes, *const shifts = factors + p.lanes;
  p.Repeat(b.mean, means);
  p.Repeat(factor, factors);
  p.Repeat(shift, shifts);

  // The gradient of the normalized value. That the ReLU passed it is seen from its result where an
  // addition came first, else computed as in the forward pass.
  const auto gradient = [=](int64_t at, int64_t v, int64_t count) {
    const Vector dout = LoadPart(b.dout + at, count);
    if (kRelu == kNoRelu) return dout;
    const Vector value = kRelu == kReluLast ? LoadPart(b.out + at, count)
                                        : LoadPart(b.x + at, count) * Load(factors + v * kLanes) +
                                              Load(shifts + v * kLanes);
    return value > 0 ? dout : Vector{};
  };

  Buffer sums(std::max<int64_t>(p.parts, 1) * 2 * p.lanes);
  const auto add = [&](float* to) {
    return [=](int64_t at, int64_t v, int64_t count) {
      const Vector g = gradient(at, v, count);
      const Vector distance = LoadPart(b.x + at, count) - Load(means + v * kLanes);
      Store(to + v * kLanes, Load(to + v * kLanes) + g);
      Store(to + p.lanes + v * kLanes, Load(to + p.lanes + v * kLanes) + g * distance);
      if (kRelu == kReluLast) StorePart(b.dresidual + at, g, count);
    };
  };
  std::fill(sums.get(), sums.get() + std::max<int64_t>(p.parts, 1) * 2 * p.lanes, 0.0f);
  Parallel(pool, p.parts, [&](int64_t part) {
    Buffer chunk(2 * p.lanes);
    float* const total = sums.get() + part * 2 * p.lanes;
    const int64_t end = p.First(part + 1);
    for (int64_t first = p.First(part); first < end; first += p.chunk) {
      std::fill(chunk.get(), chunk.get() + 2 * p.lanes, 0.0f);
      p.Each(first, std::min(first + p.chunk, end), add(chunk.get()));
      for (int64_t i = 0; i < 2 * p.lanes; ++i) total[i] += chunk.get()[i];
    }
  });
  p.EachOfRest(add(sums.get()));

  std::vector<double> dbias(p.channels), dscale(p.channels);
  for (int64_t part = 0; part < std::max<int64_t>(p.parts, 1); ++part) {
    const float* const total = sums.get() + part * 2 * p.lanes;
    p.EachLane(p.lanes, [&](int64_t i, int64_t c) {
      dbias[c] += total[i];
      dscale[c] += total[p.lanes + i];
    });
  }
  // dx = factor * (g - dbias / count - normalized * dscale / count), as factors of g and x and a rest.
  std::vector<float> by_x(p.channels), rest(p.channels);
  for (int64_t c = 0; c < p.channels; ++c) {
    b.dbias[c] = dbias[c];
    b.dscale[c] = dscale[c] * inverse[c];
    by_x[c] = -factor[c] * inverse[c] * (b.dscale[c] / p.count);
    rest[c] = factor[c] * (b.dbias[c] / p.count) + by_x[c] * b.mean[c];
  }
  float *const by = shifts + p.lanes, *const rests = by + p.lanes;
  p.Repeat(by_x, by);
  p.Repeat(rest, rests);
  p.EachOfAll(pool, [=](int64_t at, int64_t v, int64_t count) {
    const Vector g = kRelu == kReluLast ? LoadPart(b.dresidual + at, count) : gradient(at, v, count);
    const Vector dx = g * Load(factors + v * kLanes) +
                      (LoadPart(b.x + at, count) * Load(by + v * kLanes) - Load(rests + v * kLanes));
    StorePart(b.dx + at, dx, count);
  });
}

// ------------------------------------------------------------------------------------------------
// XLA's side

const ffi::Error kUnfit = ffi::Error::InvalidArgument("sizes of a batch norm that do not fit");

template <typename... Arrays>
bool HaveSize(int64_t size, const Arrays&... arrays) {
  return (... && (int64_t(arrays.element_count()) == size));
}

ffi::Error CallForward(ffi::ThreadPool pool, Array x, Array scale, Array bias, Array residual,
                       ffi::Result<Array> y, ffi::Result<Array> mean, ffi::Result<Array> var,
                       int64_t relu, float epsilon) {
  const int64_t repetitions = Repetitions({{&x, 2}, {&scale, 1}, {&bias, 1}});
  if (repetitions < 0) return kUnfit;
  const auto sizes = x.dimensions().last(2);
  const int64_t total = x.element_count();
  if (!HaveSize(repetitions * sizes[1], scale, bias, *mean, *var) || !HaveSize(total, *y) ||
      (residual.element_count() && !HaveSize(total, residual))) {
    return kUnfit;
  }
  if (total == 0) return ffi::Error::InvalidArgument("a batch norm of no pixels");
  const Pixels p(sizes[0], sizes[1]);
  const auto normalize =
      relu == kReluLast ? Normalize<kReluLast> : relu ? Normalize<kReluBeforeResidual> : Normalize<kNoRelu>;
  std::vector<double> means, vars;
  Buffer constants(2 * p.lanes);
  std::vector<float> factor(p.channels), shift(p.channels);
  for (int64_t i = 0; i < repetitions; ++i) {
    const auto part = [&](auto& array) { return PartOf(array, i, repetitions); };
    Moments(pool, p, part(x), means, vars);
    for (int64_t c = 0; c < p.channels; ++c) {
      part(*mean)[c] = means[c];
      part(*var)[c] = vars[c];
      factor[c] = part(scale)[c] * (1 / std::sqrt(part(*var)[c] + epsilon));
      shift[c] = part(bias)[c] - part(*mean)[c] * factor[c];
    }
    p.Repeat(factor, constants.get());
    p.Repeat(shift, constants.get() + p.lanes);
    normalize(pool, p, part(x), constants.get(), constants.get() + p.lanes, part(residual), part(*y));
  }
  return ffi::Error::Success();
}

ffi::Error CallBackward(ffi::ThreadPool pool, Array x, Array out, Array dout, Array mean, Array var,
                        Array scale, Array bias, ffi::Result<Array> dx, ffi::Result<Array> dscale,
                        ffi::Result<Array> dbias, ffi::Result<Array> dresidual, int64_t relu,
                        float epsilon) {
  const int64_t repetitions =
      Repetitions({{&x, 2}, {&dout, 2}, {&mean, 1}, {&var, 1}, {&scale, 1}, {&bias, 1}});
  if (repetitions < 0) return kUnfit;
  const auto sizes = x.dimensions().last(2);
  const int64_t total = x.element_count();
  if (!HaveSize(repetitions * sizes[1], mean, var, scale, bias, *dscale, *dbias) ||
      !HaveSize(total, dout, *dx) || (relu == kReluLast && !HaveSize(total, out, *dresidual))) {
    return kUnfit;
  }
  if (total == 0) return ffi::Error::InvalidArgument("a batch norm of no pixels");
  const Pixels p(sizes[0], sizes[1]);
  const auto gradients =
      relu == kReluLast ? Gradients<kReluLast> : relu ? Gradients<kReluBeforeResidual> : Gradients<kNoRelu>;
  for (int64_t i = 0; i < repetitions; ++i) {
    const auto part = [&](auto& array) { return PartOf(array, i, repetitions); };
    gradients(pool, p,
              {part(x), part(out), part(dout), part(mean), part(var), part(scale), part(bias),
               part(*dx), part(*dscale), part(*dbias), part(*dresidual), epsilon});
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_batch_norm, CallForward,
                              (BindArrays<4, 3>().Attr<int64_t>("relu").Attr<float>("epsilon")));
XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_batch_norm_gradients, CallBackward,
                              (BindArrays<7, 4>().Attr<int64_t>("relu").Attr<float>("epsilon")));

}  // namespace shiftnet
