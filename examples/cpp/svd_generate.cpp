// svd_generate: a photograph and a bundle in, a video out.  The command around svd.hpp.

#include <cerrno>
#include <cstdlib>
#include <iostream>

#include "noise.hpp"
#include "picture.hpp"
#include "pixels.hpp"
#ifdef SVD_TENSORRT
namespace svd {
std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle);  // svd_tensorrt.cu
}
#endif

namespace {

using svd::Error;
using svd::Floats;
namespace fs = std::filesystem;

constexpr const char* usage =
    R"(svd_generate BUNDLE PHOTO -o OUT [options]

PHOTO is a PNG or JPEG.  OUT is a file .y4m (4:4:4, BT.601),
a file .f32 (float32 [F, 3, H, W] in [0, 1], nothing else in it), or a new folder of PNG frames.

  --steps N                 denoising steps, 25
  --seed N                  0; draws what torch draws on a CPU for the same seed
  --noise FILE              draws from a file instead: float32, little-endian, [3, H, W] and then [F, 4, h, w]
  --frames, --height, --width N   which profile of the bundle; the first one's if left out
  --decode-chunk-size N     a profile that decodes so many frames at once; the most if left out
  --fit F                   stretch; or crop or pad: what becomes of a photograph of another aspect
  --fps N                   7, shown and told to the network
  --motion-bucket-id X      127, from 0 to 1023
  --noise-aug-strength X    0.02, noise on the photograph
  --min-guidance-scale X    the bundle's own (SVD: 1), of the first frame
  --max-guidance-scale X    the bundle's own (SVD: 3), of the last frame; guidance acts if one is above 1
  --provider P              cpu, cuda or tensorrt
  --runtime FILE            ONNX Runtime's library, libonnxruntime.so.1
)";

Error wrong(const std::string& name, const std::string& expected, const std::string& got) {
  return {name, expected, "'" + got + "'", "--help lists the options and their ranges.", 2};
}

struct Arguments {
  std::vector<std::string> places;  // BUNDLE, PHOTO
  std::map<std::string, std::string> options;

  Arguments(int count, char** values) {
    const std::vector<std::string> known{
        "-o", "--steps", "--seed", "--noise", "--frames", "--height", "--width", "--fps",
        "--motion-bucket-id", "--noise-aug-strength", "--min-guidance-scale", "--max-guidance-scale",
        "--decode-chunk-size", "--fit", "--provider", "--runtime"};
    for (int i = 1; i < count; ++i) {
      const std::string word = values[i];
      if (word.size() < 2 || word[0] != '-') {
        places.push_back(word);
      } else {
        if (!std::count(known.begin(), known.end(), word)) throw wrong("option", svd::join(known), word);
        if (++i == count) throw Error("option " + word, "a value", "nothing", "Pass one after it.", 2);
        options[word] = values[i];
      }
    }
    if (places.size() != 2 || !options.count("-o"))
      throw Error("arguments", "BUNDLE PHOTO -o OUT", svd::join(places, " "), "See --help.", 2);
  }

  std::string text(const std::string& name, const std::string& otherwise) const {
    const auto found = options.find(name);
    return found == options.end() ? otherwise : found->second;
  }
  std::uint64_t whole(const std::string& name, std::uint64_t otherwise, std::uint64_t low,
                      std::uint64_t high) const {
    const auto given = text(name, std::to_string(otherwise));
    errno = 0;
    const auto value = std::strtoull(given.c_str(), nullptr, 10);
    const bool digits = !given.empty() && given.find_first_not_of("0123456789") == std::string::npos;
    if (!digits || errno || value < low || value > high)
      throw wrong(name, "a whole number from " + std::to_string(low) + " to " + std::to_string(high), given);
    return value;
  }
  int count(const std::string& name, int otherwise, int low, int high = 1'000'000) const {  // 7.0 is 7
    const auto expected = "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
    const auto value = number<double>(name, otherwise, expected, std::strtod);
    if (value != std::floor(value) || value < low || value > high) throw wrong(name, expected, options.at(name));
    return int(value);
  }
  float real(const std::string& name, float otherwise, float low, float high = INFINITY) const {
    const auto expected = high < INFINITY ? "a number from 0 to " + std::to_string(int(high))
                                          : low == 0 ? "a finite number of 0 or more" : "a finite number";
    const auto value = number<float>(name, otherwise, expected, std::strtof);
    if (value < low || value > high) throw wrong(name, expected, options.at(name));
    return value;
  }
  template <class Real>
  Real number(const std::string& name, Real otherwise, const std::string& expected,
              Real (*parse)(const char*, char**)) const {
    if (!options.count(name)) return otherwise;
    const auto& given = options.at(name);
    char* end = nullptr;
    const Real value = parse(given.c_str(), &end);
    if (*end || end == given.c_str() || !std::isfinite(value)) throw wrong(name, expected, given);
    return value;
  }
};

/// A place beside the target that is renamed when whole: whatever fails, the target is as it was.
class Output {
 public:
  explicit Output(const fs::path& target)
      : target_(target.has_filename() ? target : target.parent_path()), what_("output " + target.string()) {
    const auto suffix = target_.extension().string();
    if (!(suffix.empty() || suffix == ".y4m" || suffix == ".f32"))
      throw Error(what_, ".y4m, .f32, or no suffix for a folder of PNG frames", suffix, "Rename it.", 2);
    const bool folder = fs::is_directory(target_), empty = folder && fs::is_empty(target_);
    if (suffix.empty() ? fs::exists(target_) && !empty : folder)
      throw Error(what_, suffix.empty() ? "an empty folder, or nothing yet" : "a file, or nothing yet",
                  "something of that name", "Choose another name.");
    const auto parent = fs::absolute(target_).parent_path();
    auto scratch = (parent / ".svd_generate-XXXXXX").string();
    if (!mkdtemp(scratch.data()))
      throw Error(what_, "a folder " + parent.string() + " that can be written", std::strerror(errno),
                  "Make the folder first, or write elsewhere.");
    scratch_ = scratch;
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    std::error_code ignored;
    fs::remove_all(scratch_, ignored);
  }

  void write(const Floats& frames, const svd::Profile& profile, int fps) const {
    const auto whole = scratch_ / "whole";
    try {
      if (target_.extension() == ".f32")
        save(whole, reinterpret_cast<const char*>(frames.data()), frames.size() * sizeof(float));
      else if (target_.extension() == ".y4m") {
        const auto video = y4m(frames, profile, fps);
        save(whole, video.data(), video.size());
      } else {
        fs::create_directory(whole);
        const auto bytes = interleaved(frames, profile);
        for (int f = 0; f < profile.frames; ++f) {
          auto number = std::to_string(f);
          number.insert(0, std::max(4 - int(number.size()), 0), '0');
          svd::write_png(whole / ("frame_" + number + ".png"), &bytes[bytes.size() / profile.frames * f],
                         profile.height, profile.width);
        }
      }
      fs::rename(whole, target_);
    } catch (const fs::filesystem_error& error) {
      throw Error(what_, "to write it", error.what(), "Make room there, or write elsewhere.");
    }
  }

 private:
  static void save(const fs::path& path, const char* data, std::size_t size) {
    std::ofstream file(path, std::ios::binary);
    if (!file.write(data, static_cast<std::streamsize>(size)) || !file.flush())
      throw fs::filesystem_error(std::strerror(errno), path, std::make_error_code(std::errc::io_error));
  }

  /// [F, H, W, 3] bytes, ties to even as torch rounds.
  static std::vector<std::uint8_t> interleaved(const Floats& frames, const svd::Profile& profile) {
    const std::size_t area = std::size_t(profile.height) * profile.width;
    std::vector<std::uint8_t> bytes(frames.size());
    for (std::size_t i = 0; i < frames.size(); ++i)
      bytes[i / area / 3 * area * 3 + i % area * 3 + i / area % 3] = std::nearbyint(frames[i] * 255);
    return bytes;
  }

  /// 4:4:4, limited range, BT.601: what players take an unmarked video of this size to be.
  static std::string y4m(const Floats& frames, const svd::Profile& profile, int fps) {
    auto video = "YUV4MPEG2 W" + std::to_string(profile.width) + " H" + std::to_string(profile.height) +
                 " F" + std::to_string(fps) + ":1 Ip A1:1 C444 XCOLORRANGE=LIMITED\n";
    const std::size_t area = std::size_t(profile.height) * profile.width;
    for (const float* rgb = frames.data(); rgb < frames.data() + frames.size(); rgb += 3 * area) {
      video += "FRAME\n";
      const auto plane = [&](float offset, float scale, std::array<float, 3> of) {
        for (std::size_t i = 0; i < area; ++i)
          video += char(std::lround(
              offset + scale * (of[0] * rgb[i] + of[1] * rgb[area + i] + of[2] * rgb[2 * area + i])));
      };
      plane(16, 219, {0.299F, 0.587F, 0.114F});
      plane(128, 224 / 1.772F, {-0.299F, -0.587F, 0.886F});
      plane(128, 224 / 1.402F, {0.701F, -0.587F, -0.114F});
    }
    return video;
  }

  fs::path target_, scratch_;
  std::string what_;
};

std::unique_ptr<svd::Backend> open(const svd::Bundle& bundle, const std::string& provider,
                                   const std::string& runtime) {
  if (provider != "tensorrt") return std::make_unique<svd::OnnxRuntime>(bundle, provider, runtime);
#ifdef SVD_TENSORRT
  return svd::open_tensorrt(bundle);
#else
  throw Error("provider tensorrt", "a program built with TensorRT", "one without",
              "Configure again with -DCMAKE_PREFIX_PATH=TENSORRT and a CUDA compiler.");
#endif
}

void run(const Arguments& arguments) {
  const auto provider = arguments.text("--provider", "cpu");
  if (provider != "cpu" && provider != "cuda" && provider != "tensorrt")
    throw wrong("--provider", "cpu, cuda or tensorrt", provider);
  const svd::Bundle bundle(arguments.places[0]);
  svd::Settings settings(bundle.model);
  settings.steps = arguments.count("--steps", settings.steps, 1);
  settings.fps = arguments.count("--fps", settings.fps, 1);
  settings.motion_bucket = arguments.real("--motion-bucket-id", settings.motion_bucket, 0, 1023);
  settings.noise_aug = arguments.real("--noise-aug-strength", settings.noise_aug, 0);
  constexpr auto any = std::numeric_limits<float>::lowest();
  settings.min_guidance = arguments.real("--min-guidance-scale", settings.min_guidance, any);
  settings.max_guidance = arguments.real("--max-guidance-scale", settings.max_guidance, any);
  const auto seed = arguments.whole("--seed", 0, 0, UINT64_MAX);
  const auto chunk = arguments.options.count("--decode-chunk-size") ? arguments.count("--decode-chunk-size", 0, 1) : 0;
  const auto fit = arguments.text("--fit", "stretch");
  if (fit != "stretch" && fit != "crop" && fit != "pad") throw wrong("--fit", "stretch, crop or pad", fit);

  const Output output(arguments.options.at("-o"));
  const auto photograph = svd::read_picture(arguments.places[1]);
  const auto& own = bundle.profiles[0];
  const auto& profile = bundle.profile_for(arguments.count("--frames", own.frames, 1),
                                           arguments.count("--height", own.height, 1),
                                           arguments.count("--width", own.width, 1), settings.guided(), chunk);
  const auto draws = svd::draws(bundle, profile);
  const auto file = arguments.text("--noise", "");
  const auto noise = file.empty() ? svd::torch_randn(seed, draws) : svd::read_noise(file, draws);
  const auto backend = open(bundle, provider, arguments.text("--runtime", "libonnxruntime.so.1"));
  const auto done = [&](int step) {
    std::cerr << "\rstep " << step << " of " << settings.steps << (step < settings.steps ? "" : "\n");
  };
  const auto framed = svd::fitted(photograph, profile.height, profile.width, fit);
  const auto clip = svd::clip_pixels(framed, bundle.model);
  const auto pixels = svd::vae_pixels(framed, profile.height, profile.width);
  const auto frames = svd::generate(bundle, *backend, profile, settings, clip, pixels, noise, done);
  output.write(frames, profile, settings.fps);
  std::cout << "wrote " << arguments.options.at("-o") << ": " << profile.text() << "; " << backend->name()
            << " on " << provider << "\n";
}

}  // namespace

int main(int count, char** values) {
  if (count < 2 || std::string(values[1]) == "--help") {
    std::cout << usage;
    return count < 2 ? 2 : 0;
  }
  try {
    run(Arguments(count, values));
    return 0;
  } catch (const Error& error) {
    std::cerr << "error: " << error.what() << "\n";
    return error.exit_code;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
