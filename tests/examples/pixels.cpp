// What tests/examples/test_cpp_pixels.py compares with Python: reads a picture, writes all that is made of it.
#include <iostream>

#include "noise.hpp"
#include "picture.hpp"
#include "pixels.hpp"

template <class Value>
void put(const std::string& path, const std::vector<Value>& values) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values.data()), std::streamsize(values.size() * sizeof(Value)));
}

// pixels PICTURE HEIGHT WIDTH SIZE OUT FIT: OUT.rgb, OUT.vae, OUT.clip;   randn SEED COUNT COUNT OUT: OUT.draws
int main(int, char** words) {
  const std::string out = words[5];
  try {
    if (std::string(words[1]) == "randn") {
      put(out + ".draws", svd::torch_randn(std::stoull(words[2]), {std::stoull(words[3]), std::stoull(words[4])}));
      return 0;
    }
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
    return 0;
  } catch (const svd::Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.exit_code;
  }
}
