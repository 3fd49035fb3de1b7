// A photograph becomes a video over a bundle of svd-export: the library half of svd_generate.  C++17.
//
// Copy this header, schema.hpp and manifest_schema.hpp.  It needs nlohmann/json, libcrypto (SHA-256) and ONNX
// Runtime's headers.  The runtime is opened with dlopen, so one binary runs on every release from the headers'
// API on.  The order of things and the float32 arithmetic are Python's: docs/embedding.md.
//
// Letters in shapes: B videos, F frames, T frames of a chunk, H W pixels, h w latent pixels, S side of CLIP's
// pixels, D embedding.
#pragma once

#include <dlfcn.h>
#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "manifest_schema.hpp"
#include "schema.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace svd {

namespace fs = std::filesystem;
using nlohmann::json;
using Floats = std::vector<float>;
using Inputs = std::map<std::string, Floats>;  // by tensor name, row-major
constexpr std::uintmax_t manifest_bytes = 4 << 20;
using OnStep = std::function<void(int)>;       // steps done

/// What is wrong and where, what was expected, what was got, what to do.  `exit_code` 2 is wrong usage.
struct Error : std::runtime_error {
  int exit_code;
  Error(const std::string& what, const std::string& expected, const std::string& got,
        const std::string& remedy, int code = 1)
      : std::runtime_error(what + ": expected " + expected + ", got " + got + ". " + remedy),
        exit_code(code) {}
};

inline std::string join(const std::vector<std::string>& parts, const std::string& between = ", ") {
  std::string all;
  for (const auto& part : parts) all += (all.empty() ? "" : between) + part;
  return all;
}

/// Text of a file that may be anything, for a message: other bytes than ASCII's as \xNN.
inline std::string printable(const std::string& text) {
  std::ostringstream all;
  all << std::hex << std::setfill('0');
  for (const unsigned char byte : text)
    if (byte >= ' ' && byte <= '~') all << char(byte);
    else all << "\\x" << std::setw(2) << int(byte);
  return all.str();
}

struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;  // of float32, always

  std::size_t size() const {
    return std::accumulate(shape.begin(), shape.end(), std::size_t{1}, std::multiplies<>());
  }
  std::string text() const { return name + " float32 " + json(shape).dump(); }
};

/// One network at one static shape; `key` is unique within a bundle.
struct Network {
  std::string name, key;
  std::vector<Tensor> inputs;
  Tensor output;

  bool takes(const std::string& input) const {
    return std::any_of(inputs.begin(), inputs.end(), [&](const Tensor& t) { return t.name == input; });
  }
  std::string text() const {
    std::vector<std::string> rows;
    for (const auto& input : inputs) rows.push_back(input.text());
    return join(rows) + " -> " + output.text();
  }
};

struct Profile {
  int frames, height, width, batch, decode_chunk;
  std::string guidance;  // batched: both halves of guidance in one call; single: one half a call
  std::string text() const {
    return std::to_string(frames) + " frames, " + std::to_string(height) + "x" + std::to_string(width) +
           ", batch " + std::to_string(batch) + ", " + guidance + " guidance, decode chunk " +
           std::to_string(decode_chunk);
  }
};

/// The manifest's `model`: what the loop needs to know of a checkpoint.
struct Model {
  int clip_size, embedding_dim, channels, scale;  // scale: pixels per latent pixel
  double sigma_min, sigma_max, rho;
  float latent_scale;
  std::array<float, 3> clip_mean, clip_std;  // of RGB in [0, 1]
  float min_guidance, max_guidance;          // of a call that names none
};

/// An opened bundle: manifest.json read, every file there.  A file is hashed when `verified` gives its path.
class Bundle {
 public:
  fs::path folder;
  json manifest;
  Model model;
  std::vector<Profile> profiles;

  explicit Bundle(const fs::path& path) : folder(path) {
    const auto file = folder / "manifest.json";
    if (fs::is_symlink(file) || (fs::is_regular_file(file) && fs::file_size(file) > manifest_bytes))
      throw bad("a regular file of at most 4 MiB", fs::is_symlink(file) ? "a link" : "more");
    if (!fs::is_regular_file(file))
      throw Error("bundle " + folder.string(), "a folder with manifest.json",
                  fs::is_directory(folder) ? "no such file" : "no such folder",
                  "Make one with: svd-export onnx CHECKPOINT -o BUNDLE");
    try {
      manifest = parse(file);
      if (!manifest.at("format").is_number_integer() || manifest["format"] != 3)
        throw bad("bundle format 3", "format " + manifest["format"].dump());
      if (const auto fault = Schema(manifest_schema).fault(manifest))
        throw Error(file.string() + ", field " + printable(fault->field), fault->expected,
                    printable(fault->got).substr(0, 100), "Export the bundle again.");
      read_model();
      std::set<std::string> keys;
      for (const auto& one : manifest.at("networks"))
        if (!keys.insert(one.at("spec").at("key")).second)
          throw bad("every network once", one.at("spec").at("key").dump() + " twice");
      for (const auto& [name, entry] : manifest.at("files").items()) check_present(name, entry.at("bytes"));
      for (const auto& plan : manifest.value("plans", json::array()))
        if (!keys.count(plan.at("network")) || !manifest["files"].contains(plan.at("file")))
          throw bad("plans of its networks, in its files",
                    printable(plan.at("network").dump() + " in " + plan.at("file").dump()));
      for (const auto& p : profiles) for (const auto& network : networks(p)) check_listed(network);
    } catch (const json::exception& error) {
      throw bad("JSON that follows manifest.schema.json", printable(error.what()));
    }
  }

  /// The profile that does this call.  `guided` prefers batched guidance; `chunk` 0 the most frames at once.
  const Profile& profile_for(int frames, int height, int width, bool guided, int chunk) const {
    const Profile* best = nullptr;
    std::vector<std::string> all;
    const auto rank = [&](auto& p) { return std::pair((p.guidance == "batched") == guided, p.decode_chunk); };
    for (const auto& p : profiles) {
      all.push_back(p.text());
      const bool fits = p.frames == frames && p.height == height && p.width == width && p.batch == 1 &&
                        (!chunk || p.decode_chunk == std::min(chunk, frames));
      if (fits && (!best || rank(p) > rank(*best))) best = &p;
    }
    if (best) return *best;
    const auto decoded = chunk ? ", decode chunk " + std::to_string(chunk) : "";
    throw Error("bundle " + folder.string(), "one of its profiles of batch 1 (" + join(all, "; ") + ")",
                std::to_string(frames) + " frames of " + std::to_string(height) + "x" + std::to_string(width) +
                    decoded,
                "Ask for one of these, or export this size with svd-export onnx.", 2);
  }

  /// What `profile` needs, in the order of the calls: image encoder, VAE encoder, denoiser, VAE decoders.
  std::vector<Network> networks(const Profile& p) const {
    const std::int64_t b = p.batch, f = p.frames, H = p.height, W = p.width, h = H / model.scale,
                       w = W / model.scale, c = model.channels, s = model.clip_size;
    const auto size = std::to_string(H) + "x" + std::to_string(W), rows = "-b" + std::to_string(b);
    const Tensor embedding{"embedding", {b, 1, model.embedding_dim}};
    std::vector<Network> all{
        {"image_encoder", "image_encoder" + rows, {{"pixels", {b, 3, s, s}}}, embedding},
        {"vae_encoder", "vae_encoder" + rows + "-" + size,
         {{"pixels", {b, 3, H, W}}}, {"latent", {b, c, h, w}}},
        {"denoiser", "denoiser" + rows + "-f" + std::to_string(f) + "-" + size + "-" + p.guidance,
         {{"x", {b, f, c, h, w}}, {"sigma", {}}, {"first_latent", {b, c, h, w}}, embedding,
          {"time_ids", {b, 3}}},
         {"denoised", {b, f, c, h, w}}}};
    if (p.guidance == "batched") all[2].inputs.push_back({"guidance", {b, f}});
    const std::int64_t chunk = std::min(p.decode_chunk, p.frames);
    for (auto t = chunk; t; t = t == chunk ? f % chunk : 0)
      all.push_back({"vae_decoder", "vae_decoder-t" + std::to_string(t) + "-" + size,
                     {{"latent", {t, c, h, w}}}, {"frames", {t, 3, H, W}}});
    return all;
  }

  const json& entry(const Network& network) const {
    std::vector<std::string> keys;
    for (const auto& entry : manifest.at("networks")) {
      keys.push_back(entry.at("spec").at("key"));
      if (keys.back() == network.key) return entry;
    }
    throw Error("network " + network.key + " of bundle " + folder.string(), network.text(),
                "only " + join(keys), "Export the bundle again.");
  }

  /// Path of a file of the bundle, after its SHA-256 is found to be the manifest's.
  std::string verified(const std::string& name) const {
    const std::string expected = manifest.at("files").at(name).at("sha256"), got = sha256(folder / name);
    if (got != expected)
      throw Error("file " + name + " of bundle " + folder.string(), "sha256 " + expected, "sha256 " + got,
                  "The file was altered or damaged: copy or export the bundle again.");
    return (folder / name).string();
  }

 private:
  Error bad(const std::string& expected, const std::string& got) const {
    return {(folder / "manifest.json").string(), expected, got, "Export the bundle again."};
  }

  /// Strict JSON without a byte order mark; readers differ in which of two equal keys they take.
  json parse(const fs::path& path) const {
    std::ifstream file(path, std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(file), {}};
    if (content.rfind("\xef\xbb\xbf", 0) == 0) throw bad("JSON", "a byte order mark");
    std::vector<std::set<std::string>> keys;  // of the objects that are open
    return json::parse(content, [&](int, json::parse_event_t event, json& value) {
      if (event == json::parse_event_t::object_start) keys.emplace_back();
      if (event == json::parse_event_t::object_end) keys.pop_back();
      if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second)
        throw bad("every key once in an object", value.dump() + " twice");
      return true;
    });
  }

  void read_model() {
    const auto &m = manifest.at("model"), &a = m.at("architecture");
    model = {a.at("clip_size"), a.at("embedding_dim"), a.at("latent_channels"), a.at("vae_scale"),
             m.at("sigma_min"), m.at("sigma_max"), m.at("rho"), m.at("latent_scale"), m.at("clip_mean"),
             m.at("clip_std"), m.value("min_guidance_scale", 1.0f), m.value("max_guidance_scale", 3.0f)};
    check_conditioning(a.at("conditioning").at("fields"));
    if (model.sigma_min >= model.sigma_max) throw bad("sigma_min below sigma_max", m.at("sigma_min").dump());
    for (const auto& p : manifest.at("profiles")) {
      profiles.push_back({p.at("frames"), p.at("height"), p.at("width"), p.at("batch"), p.at("decode_chunk"),
                          p.at("guidance")});
      const auto& made = profiles.back();
      if (std::int64_t(made.batch) * made.frames * made.height * made.width > std::int64_t{1} << 30)
        throw bad("at most 1,073,741,824 pixels in one call", made.text());
    }
  }

  /// `generate` tells the denoiser SVD's three numbers, one of each a video, frames per second less one.
  void check_conditioning(const json& fields) const {
    std::vector<std::string> told;
    for (const auto& field : fields) {
      const auto name = field.at("name").get<std::string>();
      const auto less = field.value("offset", 0.0);
      const bool known = field.value("per", "video") == "video" && field.value("scale", 1.0) == 1 &&
                         less == (name == "fps" ? -1.0 : 0.0);
      told.push_back(known ? name : name + " (per " + field.value("per", "video") + ", offset " +
                                        json(less).dump() + ")");
    }
    if (told != std::vector<std::string>{"fps", "motion_bucket_id", "noise_aug_strength"})
      throw Error("conditioning of bundle " + folder.string(), "fps, motion_bucket_id, noise_aug_strength",
                  join(told), "This host runs SVD's bundles; run another model's with svd-engine.");
  }

  void check_present(const std::string& name, std::uintmax_t bytes) const {
    const auto path = folder / name;
    std::string got;
    if (fs::path(name).filename() != name) got = "a path that leaves the bundle";
    else if (fs::is_symlink(path)) got = "a link";
    else if (!fs::is_regular_file(path)) got = "no such file";
    else if (fs::file_size(path) != bytes) got = std::to_string(fs::file_size(path)) + " bytes";
    if (!got.empty())
      throw Error("file " + name + " of bundle " + folder.string(),
                  "a regular file inside the bundle of " + std::to_string(bytes) + " bytes", got,
                  "Copy the whole bundle again, links resolved, or export it again.");
  }

  void check_listed(const Network& network) const {
    const auto& found = entry(network);
    const auto table = [&](const char* side) {
      std::vector<std::string> rows;
      for (const auto& t : found.at("spec").at(side)) rows.push_back(Tensor{t.at("name"), t.at("shape")}.text());
      return join(rows);
    };
    if (const auto listed = table("inputs") + " -> " + table("outputs"); listed != network.text())
      throw Error("network " + network.key + " of bundle " + folder.string(), network.text(), listed,
                  "Export the bundle again.");
    std::vector<std::string> files;
    files.push_back(found.at("weights").get<std::string>());
    for (const auto& graph : found.at("graphs")) files.push_back(graph.get<std::string>());
    for (const auto& file : files)
      if (!manifest.at("files").contains(file))
        throw bad("files of " + network.key + " that it lists with their hash", file + " without one");
  }

  static std::string sha256(const fs::path& path) {
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> hash(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    EVP_DigestInit_ex(hash.get(), EVP_sha256(), nullptr);
    std::ifstream file(path, std::ios::binary);
    for (std::vector<char> part(1 << 20); file.read(part.data(), 1 << 20), file.gcount();)
      EVP_DigestUpdate(hash.get(), part.data(), file.gcount());
    std::array<unsigned char, 32> digest{};
    EVP_DigestFinal_ex(hash.get(), digest.data(), nullptr);
    std::string hex;
    for (auto byte : digest) hex += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
    return hex;
  }
};

/// What runs the networks, for one `generate` at a time.  At this boundary tensors are in host memory.
class Backend {
 public:
  std::mutex turn;  // held by `generate`
  virtual ~Backend() = default;
  virtual std::string name() const = 0;
  virtual Floats run(const Network& network, const Inputs& inputs) = 0;
  /// The EDM loop from inputs["x"] along `sigmas`; the latent stays on the device until the last step's end.
  /// A denoiser that takes no `guidance` but is given it runs both halves: D_u + g (D_c - D_u).
  virtual Floats sample(const Network& denoiser, const Floats& sigmas, const Inputs& inputs,
                        const OnStep& done) = 0;
};

using Lines = std::vector<std::array<std::string, 4>>;  // {operator, a, b, result}

/// Element-wise lines as an ONNX graph, so that they run where the networks do; the last gives its output.
inline std::string onnx_graph(const std::vector<std::string>& inputs, const Lines& lines) {
  const auto field = [](int number, const std::string& content) {  // of protobuf, with its length before it
    std::string out(1, char(number << 3 | 2));
    auto n = content.size();
    for (; n > 127; n >>= 7) out += char((n & 127) | 128);
    return out + char(n) + content;
  };
  const auto value = [&](const std::string& name) { return field(1, name) + field(2, field(1, "\x08\x01")); };
  std::string graph = field(2, "lines");
  for (const auto& [op, a, b, result] : lines)
    graph += field(1, field(1, a) + field(1, b) + field(2, result) + field(4, op));
  for (const auto& input : inputs) graph += field(11, value(input));  // float32 of any shape
  graph += field(12, value(lines.back()[3]));
  return "\x08\x08" + field(7, graph) + field(8, "\x10\x11");  // IR version 8, opset 17
}

/// ONNX Runtime on the CPU, or on the first CUDA device.
class OnnxRuntime : public Backend {
 public:
  OnnxRuntime(const Bundle& bundle, const std::string& provider, const std::string& library)
      : bundle_(bundle), version_(load(library)), env_(ORT_LOGGING_LEVEL_ERROR, "svd") {
    if (provider == "cuda") use_cuda();
    euler_ = session({"x", "denoised", "sigma", "next"},
                     {{"Sub", "x", "denoised", "noise"}, {"Div", "noise", "sigma", "slope"},
                      {"Sub", "next", "sigma", "step"}, {"Mul", "step", "slope", "move"},
                      {"Add", "x", "move", "y"}});
    guide_ = session({"without", "with", "guidance"}, {{"Sub", "with", "without", "d"},
                     {"Mul", "guidance", "d", "e"}, {"Add", "without", "e", "y"}});
  }

  std::string name() const override { return "ONNX Runtime " + version_; }

  Floats run(const Network& network, const Inputs& inputs) override {
    return checked(network.key, [&] {
      Ort::IoBinding bound(session(network));
      for (const auto& input : network.inputs) bind(bound, input, inputs);
      return floats(run(session(network), bound, network.output.name.c_str(), host_), network.output);
    });
  }

  /// Values of the host are copied to the device when they are bound: all but sigma once, before the loop.
  Floats sample(const Network& denoiser, const Floats& sigmas, const Inputs& inputs,
                const OnStep& done) override {
    return checked(denoiser.key, [&] {
      const bool halves = inputs.count("guidance") && !denoiser.takes("guidance");
      auto& network = session(denoiser);
      Ort::IoBinding with(network), without(network), guide(guide_), euler(euler_);
      Inputs none = inputs;  // what the unconditional half sees
      for (const auto name : {"first_latent", "embedding"}) none[name].assign(none[name].size(), 0);
      for (const auto& input : denoiser.inputs) {
        if (input.name == "x" || input.name == "sigma") continue;
        bind(with, input, inputs);
        bind(without, input, none);
      }
      const auto& video = denoiser.inputs[0];  // x [1, F, 4, h, w]
      if (halves) bind(guide, {"guidance", {1, video.shape[1], 1, 1, 1}}, inputs);
      auto x = host(inputs.at("x").data(), video);
      for (std::size_t i = 0; i + 1 < sigmas.size(); ++i) {
        for (auto* bound : {&with, &without, &euler}) {
          bound->BindInput("x", x);
          bound->BindInput("sigma", host(&sigmas[i], {}));
        }
        auto denoised = run(network, with, "denoised", device_);
        if (halves) {
          guide.BindInput("with", denoised);
          guide.BindInput("without", run(network, without, "denoised", device_));
          denoised = run(guide_, guide, "y", device_);
        }
        euler.BindInput("denoised", denoised);
        euler.BindInput("next", host(&sigmas[i + 1], {}));
        x = run(euler_, euler, "y", i + 2 < sigmas.size() ? device_ : host_);
        done(int(i) + 1);
      }
      return floats(x, video);
    });
  }

 private:
  /// One run over what is bound, its output in new memory at `where`.
  static Ort::Value run(Ort::Session& session, Ort::IoBinding& bound, const char* output,
                        const Ort::MemoryInfo& where) {
    bound.BindOutput(output, where);
    bound.SynchronizeInputs();
    session.Run(Ort::RunOptions{nullptr}, bound);
    bound.SynchronizeOutputs();
    return std::move(bound.GetOutputValues().front());
  }

  static std::string load(const std::string& library) {
    void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);  // never closed: its threads live on
    void* symbol = opened ? dlsym(opened, "OrtGetApiBase") : nullptr;
    if (!symbol)
      throw Error("ONNX Runtime " + library, "a library that opens", dlerror(),
                  "Install onnxruntime, and pass its onnxruntime/capi/libonnxruntime.so.VERSION as the runtime.");
    const auto* base = reinterpret_cast<const OrtApiBase* (*)()>(symbol)();
    const auto* api = base->GetApi(ORT_API_VERSION);
    if (!api)
      throw Error("ONNX Runtime " + library, "release 1." + std::to_string(ORT_API_VERSION) + " or newer",
                  base->GetVersionString(), "Pass a newer one as the runtime.");
    Ort::InitApi(api);
    return base->GetVersionString();
  }

  void use_cuda() {
    const auto available = Ort::GetAvailableProviders();
    if (!std::count(available.begin(), available.end(), "CUDAExecutionProvider"))
      throw Error(name() + " on cuda", "CUDAExecutionProvider", join(available),
                  "Pass the library of onnxruntime-gpu as the runtime, or use the provider cpu.");
    checked("the CUDA provider", [&] {
      OrtCUDAProviderOptionsV2* cuda = nullptr;
      Ort::ThrowOnError(Ort::GetApi().CreateCUDAProviderOptions(&cuda));
      const std::shared_ptr<OrtCUDAProviderOptionsV2> freed(cuda, Ort::GetApi().ReleaseCUDAProviderOptions);
      options_.AppendExecutionProvider_CUDA_V2(*cuda);
      device_ = Ort::MemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault);
    });
  }

  template <class Work>
  auto checked(const std::string& what, const Work& work) -> decltype(work()) {
    try {
      return work();
    } catch (const Ort::Exception& error) {
      throw Error(name() + ", " + what, "a run without error", error.what(),
                  "Try a newer runtime; if memory ran out, export a smaller decode chunk.");
    }
  }

  Ort::Session& session(const Network& network) {
    if (!sessions_.count(network.key)) {
      const auto& entry = bundle_.entry(network);
      bundle_.verified(entry.at("weights"));
      const auto graph = bundle_.verified(entry.at("graphs").at("onnxruntime"));
      sessions_.emplace(network.key, Ort::Session(env_, graph.c_str(), options_));
    }
    return sessions_.at(network.key);
  }

  Ort::Session session(const std::vector<std::string>& inputs, const Lines& lines) {
    const auto graph = onnx_graph(inputs, lines);
    return checked("the sampler", [&] { return Ort::Session(env_, graph.data(), graph.size(), options_); });
  }

  Ort::Value host(const float* data, const Tensor& t) const {  // a view: `data` outlives it
    auto* values = const_cast<float*>(data);
    return Ort::Value::CreateTensor<float>(host_, values, t.size(), t.shape.data(), t.shape.size());
  }

  void bind(Ort::IoBinding& to, const Tensor& tensor, const Inputs& inputs) const {
    to.BindInput(tensor.name.c_str(), host(inputs.at(tensor.name).data(), tensor));
  }

  static Floats floats(const Ort::Value& value, const Tensor& tensor) {
    const auto shape = value.GetTensorTypeAndShapeInfo().GetShape();
    if (shape != tensor.shape)
      throw Error("output of a graph", tensor.text(), json(shape).dump(), "Export the bundle again.");
    const auto* data = value.GetTensorData<float>();
    return {data, data + tensor.size()};
  }

  const Bundle& bundle_;
  std::string version_;
  Ort::Env env_;
  Ort::SessionOptions options_;
  Ort::MemoryInfo host_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  Ort::MemoryInfo device_ = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  std::map<std::string, Ort::Session> sessions_;
  Ort::Session euler_{nullptr}, guide_{nullptr};
};

/// Defaults are diffusers', guidance is the model's own.
struct Settings {
  explicit Settings(const Model& model)
      : min_guidance(model.min_guidance), max_guidance(model.max_guidance) {}

  int steps = 25, fps = 7;
  float min_guidance, max_guidance;              // of the first and the last frame; guided if one is above 1
  float motion_bucket = 127, noise_aug = 0.02F;  // 0 to 1023; deviation of the noise on pixels in [-1, 1]
  bool guided() const { return std::max(min_guidance, max_guidance) > 1; }
};

/// n values from first to last, counted from both ends as torch.linspace counts.
template <class Real>
std::vector<Real> linspace(Real first, Real last, int n) {
  const Real step = n > 1 ? (last - first) / Real(n - 1) : 0;
  std::vector<Real> values(n, first);
  for (int i = 1; i < n; ++i) values[i] = i < n / 2 ? first + step * Real(i) : last - step * Real(n - 1 - i);
  return values;
}

/// Noise levels sigma_max .. sigma_min, then 0.  [steps + 1]  Karras et al. 2022, eq. 5.
inline Floats karras(int steps, const Model& model) {
  const auto root = [&](double sigma) { return std::pow(sigma, 1 / model.rho); };
  const double low = root(model.sigma_min), high = root(model.sigma_max);
  Floats sigmas;
  for (auto ramp : linspace(0.0, 1.0, steps))
    sigmas.push_back(float(std::pow(high + ramp * (low - high), model.rho)));
  sigmas.push_back(0);
  return sigmas;
}

inline Floats finite(Floats values, const Network& network, const Backend& backend) {
  const auto bad = std::count_if(values.begin(), values.end(), [](float v) { return !std::isfinite(v); });
  if (bad)
    throw Error("output of " + network.name + " (" + backend.name() + ")", "finite numbers",
                "NaN or infinity in " + std::to_string(bad) + " of " + std::to_string(values.size()),
                "Export the bundle in bf16 or fp32, and check it with `svd-export verify`.");
  return values;
}

/// Frames [F, 3, H, W] in [0, 1].  `clip` is [3, S, S] and normalised, `pixels` [3, H, W] in [-1, 1], as
/// pixels.hpp makes them; `noise` has as many values as `draws` says.
inline Floats generate(const Bundle& bundle, Backend& backend, const Profile& profile,
                       const Settings& settings, const Floats& clip, Floats pixels, const Floats& noise,
                       const OnStep& done) {
  const std::lock_guard<std::mutex> one_at_a_time(backend.turn);
  const auto networks = bundle.networks(profile);
  const auto run = [&](const Network& network, Inputs inputs) {
    return finite(backend.run(network, inputs), network, backend);
  };
  const auto embedding = run(networks[0], {{"pixels", clip}});  // [1, 1, D]
  for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] += settings.noise_aug * noise[i];
  const auto first_latent = run(networks[1], {{"pixels", pixels}});  // [1, 4, h, w]

  const auto sigmas = karras(settings.steps, bundle.model);
  Floats x(noise.begin() + std::ptrdiff_t(pixels.size()), noise.end());  // [1, F, 4, h, w]
  for (auto& value : x) value *= std::sqrt(sigmas[0] * sigmas[0] + 1);
  Inputs inputs{{"x", x}, {"first_latent", first_latent}, {"embedding", embedding},
                {"time_ids", {float(settings.fps - 1), settings.motion_bucket, settings.noise_aug}}};
  if (settings.guided())
    inputs["guidance"] = linspace(settings.min_guidance, settings.max_guidance, profile.frames);
  else if (networks[2].takes("guidance"))
    inputs["guidance"] = Floats(profile.frames, 1.0F);
  auto latents = finite(backend.sample(networks[2], sigmas, inputs, done), networks[2], backend);
  for (auto& value : latents) value /= bundle.model.latent_scale;

  Floats frames;
  for (auto from = latents.begin(); from != latents.end();) {  // chunks of T frames, the last may have fewer
    const auto chunk = std::ptrdiff_t(networks[3].inputs[0].size());
    const auto& decoder = latents.end() - from < chunk ? networks.back() : networks[3];
    const auto to = from + std::ptrdiff_t(decoder.inputs[0].size());
    for (auto value : run(decoder, {{"latent", Floats(from, to)}}))
      frames.push_back(std::clamp(value / 2 + 0.5F, 0.0F, 1.0F));
    from = to;
  }
  return frames;
}

}  // namespace svd
