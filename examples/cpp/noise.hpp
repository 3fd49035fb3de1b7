// The draws of a video: torch's for the same seed, or a file's.
#pragma once

#include <cstring>
#include <random>

#include "svd.hpp"

namespace svd {

/// How many draws a video takes: the photograph's noise [3, H, W], then the video's [F, 4, h, w].
inline std::vector<std::size_t> draws(const Bundle& bundle, const Profile& profile) {
  const auto all = bundle.networks(profile);
  return {all[1].inputs[0].size(), all[2].output.size()};
}

/// torch.randn's draws on a CPU, float32, each count (of at least 16) a call of its own.
inline Floats torch_randn(std::uint64_t seed, const std::vector<std::size_t>& counts) {
  std::mt19937 bits(static_cast<std::uint32_t>(seed));
  Floats all;
  const auto uniform = [&](float* from, float* to) {
    std::generate(from, to, [&] { return float(bits() & 0xffffff) / 16777216; });
  };
  const auto box_muller = [](float* v) {  // eight radii, then eight angles
    for (int j = 0; j < 8; ++j) {
      const float radius = std::sqrt(-2 * std::log(1 - v[j])), angle = float(2 * M_PI) * v[j + 8];
      v[j] = radius * std::cos(angle);
      v[j + 8] = radius * std::sin(angle);
    }
  };
  for (auto count : counts) {
    Floats drawn(count);
    float* const end = drawn.data() + count;
    uniform(drawn.data(), end);
    for (float* v = drawn.data(); v + 16 <= end; v += 16) box_muller(v);
    if (count % 16) uniform(end - 16, end), box_muller(end - 16);  // the last 16 are drawn anew
    all.insert(all.end(), drawn.begin(), drawn.end());
  }
  return all;
}

/// Both draws from a file, one after the other: float32, little-endian, nothing else in it.
inline Floats read_noise(const std::string& path, const std::vector<std::size_t>& counts) {
  Floats noise(counts[0] + counts[1]);
  const auto bytes = fs::is_regular_file(path) ? fs::file_size(path) : 0;
  if (bytes != 4 * noise.size())
    throw Error("noise " + path,
                std::to_string(4 * noise.size()) + " bytes: float32, " + std::to_string(counts[0]) +
                    " for the photograph, then " + std::to_string(counts[1]) + " for the video",
                fs::exists(path) ? std::to_string(bytes) + " bytes" : "nothing at that path",
                "Write both draws for this profile.");
  std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(noise.data()), std::streamsize(bytes));
  return noise;
}

}  // namespace svd
