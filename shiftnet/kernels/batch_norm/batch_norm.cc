// Batch normalisation in training on a CPU, and the ReLU behind it, called by XLA through its foreign
// function interface.
//
// Arrays are [..., C], float32. Forward and backward each go over the images twice: once for sums
// over all pixels, once for the result. Whether a value was above zero is computed again backward,
// from what is read anyway. A sum is taken over a few pixels in float32 and over those in float64, in
// parts that depend on shapes only and are added in their order, so results do not depend on the number
// of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "native.h"

namespace shiftnet {
namespace {

// Parts of a sum, at most; and floats of a few pixels, which are to stay in the first level of cache.
constexpr int64_t kParts = 64, kStep = 8 * 1024;

// How the pixels of [pixels, channels] are divided into parts, and these into steps.
struct Division {
  int64_t pixels, channels, vectors, step, part, parts;

  Division(int64_t pixels, int64_t channels) : pixels(pixels), channels(channels) {
    vectors = CeilDiv(channels, kLanes);
    step = std::clamp<int64_t>(kStep / channels, 8, 256);
    part = RoundUp(CeilDiv(pixels, kParts), step);
    parts = CeilDiv(pixels, part);
  }

  int64_t Padded() const { return vectors * kLanes; }
};

// One value of each channel, padded to whole vectors by zeros.
class PerChannel {
 public:
  explicit PerChannel(const Division& d) : values_(d.Padded()) {}
  PerChannel(const Division& d, const float* values) : values_(d.Padded()) {
    std::copy(values, values + d.channels, values_.begin());
  }
  float& operator[](int64_t channel) { return values_[channel]; }
  Vector At(int64_t vector) const { return Load(values_.data() + vector * kLanes); }

 private:
  std::vector<float> values_;
};

// For each channel the sums over all pixels of two values, add(pixel, vector, first, second) adding
// those of a vector of channels to two sums.
template <typename Add>
void Sum(ffi::ThreadPool& pool, const Division& d, std::vector<double>& first,
         std::vector<double>& second, const Add& add) {
  std::vector<double> parts(d.parts * 2 * d.Padded());
  Parallel(pool, d.parts, [&](int64_t part) {
    double* const own = parts.data() + part * 2 * d.Padded();
    const int64_t end = std::min((part + 1) * d.part, d.pixels);
    for (int64_t begin = part * d.part; begin < end; begin += d.step) {
      const int64_t last = std::min(begin + d.step, end);
      for (int64_t v = 0; v < d.vectors; ++v) {
        constexpr int kChains = 4;  // sums side by side, since each waits for its last addition
        Vector sums[2][kChains] = {};
        int64_t pixel = begin;
        for (; pixel + kChains <= last; pixel += kChains) {
          for (int i = 0; i < kChains; ++i) add(pixel + i, v, sums[0][i], sums[1][i]);
        }
        for (; pixel < last; ++pixel) add(pixel, v, sums[0][0], sums[1][0]);
        for (int which = 0; which < 2; ++which) {
          float lanes[kLanes];
          Store(lanes, (sums[which][0] + sums[which][1]) + (sums[which][2] + sums[which][3]));
          double* const to = own + which * d.Padded() + v * kLanes;
          for (int lane = 0; lane < kLanes; ++lane) to[lane] += lanes[lane];
        }
      }
    }
  });
  first.assign(d.channels, 0), second.assign(d.channels, 0);
  for (int64_t part = 0; part < d.parts; ++part) {
    const double* const own = parts.data() + part * 2 * d.Padded();
    for (int64_t channel = 0; channel < d.channels; ++channel) {
      first[channel] += own[channel];
      second[channel] += own[d.Padded() + channel];
    }
  }
}

// Calls write(pixel, vector) for every pixel and vector of channels.
template <typename Write>
void ForEach(ffi::ThreadPool& pool, const Division& d, const Write& write) {
  Parallel(pool, d.parts, [&](int64_t part) {
    const int64_t end = std::min((part + 1) * d.part, d.pixels);
    for (int64_t pixel = part * d.part; pixel < end; ++pixel) {
      for (int64_t v = 0; v < d.vectors; ++v) write(pixel, v);
    }
  });
}

// scale / sqrt(var + epsilon), and what is to be added, which make x * factor + offset.
void Affine(const Division& d, const float* mean, const float* var, const float* scale,
            const float* bias, float epsilon, PerChannel& factor, PerChannel& offset) {
  for (int64_t channel = 0; channel < d.channels; ++channel) {
    factor[channel] = scale[channel] / std::sqrt(var[channel] + epsilon);
    offset[channel] = bias[channel] - mean[channel] * factor[channel];
  }
}

template <bool kRelu>
void Forward(ffi::ThreadPool& pool, const Division& d, const float* x, const float* scale,
             const float* bias, float epsilon, float* y, float* mean, float* var) {
  const int64_t channels = d.channels;
  // Less the first pixel, squares are not much larger than the variance.
  const PerChannel base(d, x);
  std::vector<double> sums, squares;
  Sum(pool, d, sums, squares, [&](int64_t pixel, int64_t v, Vector& sum, Vector& square) {
    const Vector value = LoadPart(x + pixel * channels + v * kLanes, channels - v * kLanes);
    const Vector less = value - base.At(v);
    sum += less;
    square += less * less;
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double less = sums[channel] / d.pixels;
    mean[channel] = static_cast<float>(x[channel] + less);
    var[channel] = static_cast<float>(std::max(squares[channel] / d.pixels - less * less, 0.0));
  }
  PerChannel factor(d), offset(d);
  Affine(d, mean, var, scale, bias, epsilon, factor, offset);
  ForEach(pool, d, [&](int64_t pixel, int64_t v) {
    const int64_t place = pixel * channels + v * kLanes, left = channels - v * kLanes;
    Vector value = LoadPart(x + place, left) * factor.At(v) + offset.At(v);
    if (kRelu) value = value > 0 ? value : Vector{};
    StorePart(y + place, value, left);
  });
}

template <bool kRelu>
void Gradient(ffi::ThreadPool& pool, const Division& d, const float* x, const float* dy,
              const float* mean, const float* var, const float* scale, const float* bias,
              float epsilon, float* dx, float* dscale, float* dbias) {
  const int64_t channels = d.channels;
  PerChannel factor(d), offset(d), by_x(d), rest(d);
  const PerChannel means(d, mean);
  Affine(d, mean, var, scale, bias, epsilon, factor, offset);
  const auto passed = [&](Vector value, Vector gradient, int64_t v) {
    if (!kRelu) return gradient;
    return value * factor.At(v) + offset.At(v) > 0 ? gradient : Vector{};
  };
  std::vector<double> sums, products;
  Sum(pool, d, sums, products, [&](int64_t pixel, int64_t v, Vector& sum, Vector& product) {
    const int64_t place = pixel * channels + v * kLanes, left = channels - v * kLanes;
    const Vector value = LoadPart(x + place, left);
    const Vector gradient = passed(value, LoadPart(dy + place, left), v);
    sum += gradient;
    product += gradient * (value - means.At(v));
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double inverse = 1 / std::sqrt(double{var[channel]} + epsilon);
    dbias[channel] = static_cast<float>(sums[channel]);
    dscale[channel] = static_cast<float>(products[channel] * inverse);
    by_x[channel] = static_cast<float>(-scale[channel] * inverse * inverse * inverse *
                                       products[channel] / d.pixels);
    rest[channel] = static_cast<float>(-scale[channel] * inverse * sums[channel] / d.pixels) -
                    by_x[channel] * mean[channel];
  }
  ForEach(pool, d, [&](int64_t pixel, int64_t v) {
    const int64_t place = pixel * channels + v * kLanes, left = channels - v * kLanes;
    const Vector value = LoadPart(x + place, left);
    const Vector gradient = passed(value, LoadPart(dy + place, left), v);
    StorePart(dx + place, gradient * factor.At(v) + (value * by_x.At(v) + rest.At(v)), left);
  });
}

// ------------------------------------------------------------------------------------------------
// XLA's side

using Array = ffi::Buffer<ffi::F32>;
using Values = ffi::BufferR1<ffi::F32>;

// Whether `images` are [..., C] with at least one value, and `values` are [C] each.
bool Fits(const Array& images, std::initializer_list<const Values*> values) {
  const auto sizes = images.dimensions();
  if (sizes.size() < 1 || images.element_count() == 0) return false;
  return std::all_of(values.begin(), values.end(), [&](const Values* array) {
    return array->dimensions()[0] == sizes[sizes.size() - 1];
  });
}

ffi::Error NoFit() {
  return ffi::Error::InvalidArgument("sizes of a batch normalisation that do not fit");
}

Division DivisionOf(const Array& images, const Values& values) {
  const int64_t channels = values.element_count();
  return Division(images.element_count() / channels, channels);
}

ffi::Error CallForward(ffi::ThreadPool pool, Array x, Values scale, Values bias,
                       ffi::Result<Array> y, ffi::Result<Values> mean, ffi::Result<Values> var,
                       bool relu, float epsilon) {
  const bool same = x.element_count() == y->element_count();
  if (!same || !Fits(x, {&scale, &bias, &*mean, &*var})) return NoFit();
  (relu ? Forward<true> : Forward<false>)(
      pool, DivisionOf(x, scale), x.typed_data(), scale.typed_data(), bias.typed_data(), epsilon,
      y->typed_data(), mean->typed_data(), var->typed_data());
  return ffi::Error::Success();
}

ffi::Error CallGradient(ffi::ThreadPool pool, Array x, Array dy, Values mean, Values var,
                        Values scale, Values bias, ffi::Result<Array> dx,
                        ffi::Result<Values> dscale, ffi::Result<Values> dbias, bool relu,
                        float epsilon) {
  const bool same = x.element_count() == dy.element_count() &&
                    x.element_count() == dx->element_count();
  if (!same || !Fits(x, {&mean, &var, &scale, &bias, &*dscale, &*dbias})) return NoFit();
  (relu ? Gradient<true> : Gradient<false>)(
      pool, DivisionOf(x, scale), x.typed_data(), dy.typed_data(), mean.typed_data(),
      var.typed_data(), scale.typed_data(), bias.typed_data(), epsilon, dx->typed_data(),
      dscale->typed_data(), dbias->typed_data());
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_batch_norm, CallForward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Values>()
                                  .Arg<Values>()
                                  .Ret<Array>()
                                  .Ret<Values>()
                                  .Ret<Values>()
                                  .Attr<bool>("relu")
                                  .Attr<float>("epsilon"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(shiftnet_batch_norm_gradient, CallGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Values>()
                                  .Arg<Values>()
                                  .Arg<Values>()
                                  .Arg<Values>()
                                  .Ret<Array>()
                                  .Ret<Values>()
                                  .Ret<Values>()
                                  .Attr<bool>("relu")
                                  .Attr<float>("epsilon"));

}  // namespace shiftnet
