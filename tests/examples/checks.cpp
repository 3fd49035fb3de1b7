// What tests/examples compares with Python beside svd_generate: pixels, draws, and two threads over one backend.
#include <atomic>
#include <iostream>
#include <thread>

#include "noise.hpp"
#include "picture.hpp"
#include "pixels.hpp"

template <class Value>
void put(const std::string& path, const std::vector<Value>& values) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(Value)));
}

/// Reads a picture and writes all that is made of it.
void pixels(char** words) {
  const std::string out = words[5];
  const int height = std::stoi(words[2]), width = std::stoi(words[3]);
  svd::Model model{};
  model.clip_size = std::stoi(words[4]);
  model.clip_mean = {0.48145466F, 0.4578275F, 0.40821073F};
  model.clip_std = {0.26862954F, 0.26130258F, 0.27577711F};
  const auto picture = svd::read_picture(words[1]);
  const auto framed = svd::fitted(picture, height, width, words[6]);
  put(out + ".rgb", picture.rgb);
  put(out + ".vae", svd::vae_pixels(framed, height, width));
  put(out + ".clip", svd::clip_pixels(framed, model));
}

/// A runtime may have one buffer for every output.
class OneBuffer : public svd::Backend {
 public:
  std::string name() const override { return "one buffer"; }
  svd::Floats run(const svd::Network& network, const svd::Inputs& inputs) override {
    return through(network, inputs.begin()->second[0]);
  }
  svd::Floats sample(const svd::Network& network, const svd::Floats& sigmas, const svd::Inputs& inputs,
                     const svd::OnStep& done) override {
    for (std::size_t step = 1; step < sigmas.size(); ++step) done(int(step));
    return through(network, inputs.at("first_latent")[0]);
  }

 private:
  /// Writes, lets other threads do the same, and reads.
  svd::Floats through(const svd::Network& network, float value) {
    buffer_ = value;
    for (int i = 0; i < 1000; ++i) std::this_thread::yield();
    return svd::Floats(network.output.size(), buffer_);
  }
  std::atomic<float> buffer_{0};
};

/// Whether each video of two threads is that of a lone call.
bool threads(const char* folder) {
  const svd::Bundle bundle(folder);
  const auto& profile = bundle.profiles.at(0);
  const auto networks = bundle.networks(profile);
  OneBuffer backend;
  const auto video = [&](float value) {
    const svd::Floats clip(networks[0].inputs[0].size(), value), pixels(networks[1].inputs[0].size(), value);
    const svd::Floats noise(pixels.size() + networks[2].output.size(), 0);
    return svd::generate(bundle, backend, profile, svd::Settings(bundle.model), clip, pixels, noise, [](int) {});
  };
  const std::array<svd::Floats, 2> alone{video(0.02F), video(0.05F)};
  std::array<int, 2> wrong{};
  const auto again = [&](std::size_t which) {
    for (int i = 0; i < 20; ++i) wrong[which] += video(which ? 0.05F : 0.02F) != alone[which];
  };
  std::thread other(again, 1);
  again(0);
  other.join();
  std::cout << wrong[0] + wrong[1] << " of 40 videos wrong\n";
  return alone[0] != alone[1] && wrong[0] + wrong[1] == 0;
}

// checks PICTURE HEIGHT WIDTH SIZE OUT FIT: OUT.rgb, OUT.vae, OUT.clip;   checks randn SEED COUNT COUNT OUT: OUT.draws;
// checks threads BUNDLE: exit code 0 when no video is another's
int main(int, char** words) {
  const std::string what = words[1];
  try {
    if (what == "threads") return threads(words[2]) ? 0 : 1;
    if (what == "randn") {
      const auto draws = svd::torch_randn(std::stoull(words[2]), {std::stoull(words[3]), std::stoull(words[4])});
      put(words[5] + std::string(".draws"), draws);
    } else {
      pixels(words);
    }
    return 0;
  } catch (const svd::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.exit_code;
  }
}
