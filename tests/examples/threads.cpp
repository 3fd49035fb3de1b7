// Two threads make videos over one backend that, as a runtime may, has one buffer for every output.
// threads BUNDLE: exit code 0 when each video is that of a lone call.
#include <atomic>
#include <iostream>
#include <thread>

#include "svd.hpp"

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

int main(int, char** words) {
  const svd::Bundle bundle(words[1]);
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
  return alone[0] != alone[1] && wrong[0] + wrong[1] == 0 ? 0 : 1;
}
