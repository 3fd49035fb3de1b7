// RGB bytes to what the two encoders read, with the resizes that Python uses.
//
// The VAE's pixels equal Pillow's bit for bit, CLIP's equal svd_engine/media/image.py to float32's last digits.
#pragma once

#include "svd.hpp"

namespace svd {

struct Picture {
  int height, width;
  std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

/// A picture in the aspect ratio height : width, not resized.  fit "crop": its centre; "pad": black beside it;
/// "stretch": as it is, for the resize to distort.
inline Picture fitted(const Picture& from, int height, int width, const std::string& fit) {
  if (fit == "stretch") return from;
  const auto side = [&](int own, double other, int a, int b) {
    const int wanted = std::max(1, int(std::nearbyint(other * a / b)));
    return fit == "crop" ? std::min(own, wanted) : std::max(own, wanted);
  };
  Picture to{side(from.height, from.width, height, width), side(from.width, from.height, width, height), {}};
  to.rgb.resize(3 * std::size_t(to.height) * to.width);
  const auto half = [](int pixels) { return pixels >= 0 ? pixels / 2 : -((1 - pixels) / 2); };  // rounded down
  const int left = half(from.width - to.width), top = half(from.height - to.height);
  const int first = std::max(left, 0), last = std::min(left + to.width, from.width);
  for (int y = std::max(top, 0); y < std::min(top + to.height, from.height); ++y) {
    const auto row = from.rgb.begin() + 3 * std::ptrdiff_t(y) * from.width;
    std::copy(row + 3 * first, row + 3 * last,
              to.rgb.begin() + 3 * (std::ptrdiff_t(y - top) * to.width + (first - left)));
  }
  return to;
}

/// For every pixel of a resized axis, the source pixels that it sums: index and weight.
template <class Weight>
using Taps = std::vector<std::vector<std::pair<int, Weight>>>;

/// Lanczos with three lobes in fixed point of 22 bits, as Pillow resizes bytes.
inline Taps<int> lanczos(int source, int target) {
  const auto sinc = [](double x) { return x == 0 ? 1.0 : std::sin(x * M_PI) / (x * M_PI); };
  const double scale = double(source) / target, stretch = std::max(scale, 1.0);
  Taps<int> taps(target);
  for (int i = 0; i < target; ++i) {
    const double centre = (i + 0.5) * scale;
    const int first = std::max(int(centre - 3 * stretch + 0.5), 0);
    const int last = std::min(int(centre + 3 * stretch + 0.5), source);
    std::vector<double> weights;
    for (int x = first; x < last; ++x) {
      const double at = (x - centre + 0.5) / stretch;
      weights.push_back(-3 <= at && at < 3 ? sinc(at) * sinc(at / 3) : 0);
    }
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (int x = first; x < last; ++x) {
      const double fixed = weights[x - first] / sum * (1 << 22);
      taps[i].push_back({x, int(fixed + (fixed < 0 ? -0.5 : 0.5))});
    }
  }
  return taps;
}

/// CLIP's resize: a Gaussian if the axis shrinks, borders reflected, then bicubic with aligned corners.
inline Taps<float> antialiased(int source, int target) {
  const double sigma = std::max((double(source) / target - 1) / 2, 0.001);
  const int reach = source > target ? int(std::max(4 * sigma, 3.0)) / 2 : 0;
  Floats blur;
  for (int o = -reach; o <= reach; ++o) blur.push_back(std::exp(-float(o * o) / float(2 * sigma * sigma)));
  const float sum = std::accumulate(blur.begin(), blur.end(), 0.0F);
  const float step = float(source - 1) / float(std::max(target - 1, 1)), a = -0.75F;
  const auto near = [a](float x) { return ((a + 2) * x - (a + 3)) * x * x + 1; };       // |x| <= 1
  const auto far = [a](float x) { return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a; };  // 1 < |x| < 2
  Taps<float> taps(target);
  for (int i = 0; i < target; ++i) {
    const float at = float(i) * step, t = at - std::floor(at);
    const std::array<float, 4> cubic{far(t + 1), near(t), near(1 - t), far(2 - t)};
    for (int k = 0; k < 4; ++k)
      for (int o = -reach; o <= reach; ++o) {
        const int x = std::abs(std::clamp(int(at) + k - 1, 0, source - 1) + o);
        const int index = std::max(source - 1 - std::abs(source - 1 - x), 0);
        taps[i].push_back({index, cubic[k] * (blur[o + reach] / sum)});
      }
  }
  return taps;
}

/// What the VAE encoder reads: [3, height, width] in [-1, 1].
inline Floats vae_pixels(const Picture& from, int height, int width) {
  const auto resize = [](const Picture& in, int target, bool rows) {  // one axis
    const auto taps = lanczos(rows ? in.height : in.width, target);
    Picture out{rows ? target : in.height, rows ? in.width : target, {}};
    for (int y = 0; y < out.height; ++y)
      for (int x = 0; x < out.width; ++x)
        for (int c = 0; c < 3; ++c) {
          int sum = 1 << 21;
          for (auto [i, weight] : taps[rows ? y : x])
            sum += weight * in.rgb[(std::size_t(rows ? i : y) * in.width + (rows ? x : i)) * 3 + c];
          out.rgb.push_back(std::clamp(sum >> 22, 0, 255));
        }
    return out;
  };
  // Bytes are rounded between the passes, so their order counts.  This is the one of Pillow 13.
  const bool rows_first = from.height - height > std::max(0, 2 * (from.width - width));
  const auto once = resize(from, rows_first ? height : width, rows_first);
  const auto rgb = resize(once, rows_first ? width : height, !rows_first).rgb;
  Floats pixels(rgb.size());
  for (std::size_t i = 0; i < rgb.size(); ++i)
    pixels[i % 3 * (rgb.size() / 3) + i / 3] = float(rgb[i]) / 255 * 2 - 1;
  return pixels;
}

/// What the image encoder reads: [3, size, size], normalised.  Sums are float64.
inline Floats clip_pixels(const Picture& from, const Model& model) {
  const std::size_t size = model.clip_size, width = from.width, height = from.height;
  const auto rows = antialiased(from.height, model.clip_size);
  const auto columns = antialiased(from.width, model.clip_size);
  Floats pixels;
  for (int c = 0; c < 3; ++c) {
    std::vector<double> across(height * size);
    for (std::size_t i = 0; i < across.size(); ++i)
      for (auto [x, weight] : columns[i % size])
        across[i] += weight * (double(float(from.rgb[(i / size * width + x) * 3 + c]) / 255) * 2 - 1);
    for (std::size_t i = 0; i < size * size; ++i) {
      double sum = 0;
      for (auto [y, weight] : rows[i / size]) sum += weight * across[y * size + i % size];
      pixels.push_back((float((sum + 1) / 2) - model.clip_mean[c]) / model.clip_std[c]);
    }
  }
  return pixels;
}

}  // namespace svd
