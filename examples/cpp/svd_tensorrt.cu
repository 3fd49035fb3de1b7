// The same networks as TensorRT plans: every step of the loop is one launch of one CUDA graph.
//
// Built only where CMake finds TensorRT (10 or newer) and a CUDA compiler.  Compiled, but never run so far.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "svd.hpp"

namespace svd {
namespace {

void checked(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess)
    throw Error("CUDA, " + what, "success", cudaGetErrorString(status),
                "Check the driver; if memory ran out, export a smaller profile (--decode-chunk, --guidance single).");
}

/// Values on the device.  cudaMalloc aligns to 256 bytes, which TensorRT asks of its tensors.
class Buffer {
 public:
  explicit Buffer(std::size_t count) : count_(count) { checked(cudaMalloc(&data_, count * 4), "cudaMalloc"); }
  explicit Buffer(const Floats& values) : Buffer(values.size()) { put(values); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  float* data() const { return static_cast<float*>(data_); }
  int count() const { return int(count_); }
  void put(const Floats& values) const {
    checked(cudaMemcpy(data_, values.data(), values.size() * 4, cudaMemcpyHostToDevice), "copy to the GPU");
  }
  Floats get() const {
    Floats values(count_);
    checked(cudaMemcpy(values.data(), data_, count_ * 4, cudaMemcpyDeviceToHost), "copy to the host");
    return values;
  }

 private:
  std::size_t count_;
  void* data_ = nullptr;
};

__global__ void pick_sigma(float* sigma, const float* sigmas, const int* step) { *sigma = sigmas[*step]; }

/// denoised = D_u + g (D_c - D_u), with g of each frame of `frame` values.
__global__ void guide(float* denoised, const float* without, const float* guidance, int frame, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) denoised[i] = without[i] + guidance[i / frame] * (denoised[i] - without[i]);
}

__global__ void euler(float* x, const float* denoised, const float* sigmas, const int* step, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float sigma = sigmas[*step];
  if (i < count) x[i] += (sigmas[*step + 1] - sigma) * ((x[i] - denoised[i]) / sigma);
}

__global__ void next_step(int* step) { ++*step; }

struct Logger : nvinfer1::ILogger {
  std::string last;  // error
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) last = message;
  }
};

class TensorRt : public Backend {
 public:
  explicit TensorRt(const Bundle& bundle) : bundle_(bundle), runtime_(nvinfer1::createInferRuntime(logger_)) {
    checked(cudaGetDeviceProperties(&gpu_, 0), "the first GPU");
    checked(cudaStreamCreate(&stream_), "a stream");  // one that waits for the copies of the default stream
    if (!runtime_) failed("createInferRuntime");
  }
  TensorRt(const TensorRt&) = delete;
  TensorRt& operator=(const TensorRt&) = delete;
  ~TensorRt() override { cudaStreamDestroy(stream_); }

  std::string name() const override { return "TensorRT " + version(); }

  Floats run(const Network& network, const Inputs& inputs) override {
    auto& opened = open(network);
    for (const auto& input : network.inputs) opened.tensors.at(input.name)->put(inputs.at(input.name));
    enqueue(opened);
    checked(cudaStreamSynchronize(stream_), network.key);
    return opened.tensors.at(network.output.name)->get();
  }

  Floats sample(const Network& denoiser, const Floats& sigmas, const Inputs& inputs,
                const OnStep& done) override {
    auto& opened = open(denoiser);
    const bool halves = inputs.count("guidance") && !denoiser.takes("guidance");
    for (const auto& input : denoiser.inputs)
      if (input.name != "sigma") opened.tensors.at(input.name)->put(inputs.at(input.name));
    const auto &x = *opened.tensors.at("x"), &denoised = *opened.tensors.at("denoised");
    const Buffer levels(sigmas), step(1), without(halves ? x.count() : 1);
    const Buffer guidance(halves ? inputs.at("guidance") : Floats(1));
    const Buffer no_latent(Floats(inputs.at("first_latent").size()));
    const Buffer no_image(Floats(inputs.at("embedding").size()));
    auto* const index = reinterpret_cast<int*>(step.data());
    const int blocks = (x.count() + 255) / 256;

    const auto one_step = [&] {
      pick_sigma<<<1, 1, 0, stream_>>>(opened.tensors.at("sigma")->data(), levels.data(), index);
      enqueue(opened);
      if (halves) {
        enqueue(opened, {{"first_latent", &no_latent}, {"embedding", &no_image}, {"denoised", &without}});
        guide<<<blocks, 256, 0, stream_>>>(denoised.data(), without.data(), guidance.data(),
                                           x.count() / guidance.count(), x.count());
      }
      euler<<<blocks, 256, 0, stream_>>>(x.data(), denoised.data(), levels.data(), index, x.count());
      next_step<<<1, 1, 0, stream_>>>(index);
    };
    checked(cudaMemset(index, 0, 4), "the step");
    one_step();  // TensorRT allocates in its first call, which a graph cannot hold
    checked(cudaStreamSynchronize(stream_), denoiser.key);
    x.put(inputs.at("x"));
    checked(cudaMemset(index, 0, 4), "the step");

    cudaGraph_t captured = nullptr;
    cudaGraphExec_t graph = nullptr;
    checked(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    one_step();
    checked(cudaStreamEndCapture(stream_, &captured), "capture");
    const std::shared_ptr<CUgraph_st> capture_freed(captured, cudaGraphDestroy);
    checked(cudaGraphInstantiateWithFlags(&graph, captured, 0), "the graph");
    const std::shared_ptr<CUgraphExec_st> graph_freed(graph, cudaGraphExecDestroy);
    for (int i = 0; i + 1 < int(sigmas.size()); ++i) {
      checked(cudaGraphLaunch(graph, stream_), "a step");
      checked(cudaStreamSynchronize(stream_), "a step");
      done(i + 1);
    }
    return x.get();
  }

 private:
  using Tensors = std::map<std::string, std::unique_ptr<Buffer>>;
  struct Opened {
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    Tensors tensors;
  };

  [[noreturn]] void failed(const std::string& what) const {
    throw Error(name() + ", " + what, "success", logger_.last.empty() ? "no message" : logger_.last,
                "Build the plan again on this machine with: svd-export tensorrt " + bundle_.folder.string());
  }

  /// One call on `stream_`, over the network's own tensors but for those given.
  void enqueue(Opened& opened, const std::map<std::string, const Buffer*>& instead = {}) {
    for (const auto& [tensor, own] : opened.tensors) {
      const auto other = instead.find(tensor);
      const auto& buffer = other == instead.end() ? *own : *other->second;
      if (!opened.context->setTensorAddress(tensor.c_str(), buffer.data())) failed(tensor);
    }
    if (!opened.context->enqueueV3(stream_)) failed("enqueueV3");
  }

  static std::string version() {
    const auto n = getInferLibVersion();  // 10000 major + 100 minor + patch
    return std::to_string(n / 10000) + "." + std::to_string(n / 100 % 100) + "." + std::to_string(n % 100);
  }

  /// Why a plan cannot run here; empty if it can.
  std::string misfit(const json& plan, const json& entry) const {
    const auto& files = bundle_.manifest.at("files");
    const std::string made = plan.at("version");
    const auto& target = plan.at("target");
    const std::string gpu = target.at("gpu");
    if (plan.at("flavour") != "tensorrt") return "built by TensorRT for RTX, which this program does not load";
    if ((made + ".").rfind(version() + ".", 0) != 0) return "built by TensorRT " + made;
    if (!gpu.empty() && gpu != gpu_.name) return "built for " + gpu;
    const std::pair<int, int> here{gpu_.major, gpu_.minor};
    const auto cards = target.at("capabilities").get<std::vector<std::pair<int, int>>>();
    const bool named = std::find(cards.begin(), cards.end(), here) != cards.end();
    const bool newer = target.at("or_newer").get<bool>() && here >= *std::min_element(cards.begin(), cards.end());
    if (!named && !newer) return "built for " + target.at("label").get<std::string>();
    const auto same = [&](const std::string& file, const char* hash) {
      return plan.at(hash) == files.at(file).at("sha256");
    };
    if (!entry.at("graphs").contains("tensorrt") || !same(entry["graphs"]["tensorrt"], "graph_sha256"))
      return "built from another graph";
    if (!same(entry.at("weights"), "weights_sha256")) return "built from other weights";
    return plan.at("stripped").get<bool>() ? "holds no weights, which this program does not refit" : "";
  }

  Opened& open(const Network& network) {
    const auto found = opened_.find(network.key);
    if (found != opened_.end()) return found->second;
    std::vector<std::string> refused;
    for (const auto& plan : bundle_.manifest.value("plans", json::array())) {
      if (plan.at("network") != network.key) continue;
      const std::string file = plan.at("file"), reason = misfit(plan, bundle_.entry(network));
      if (reason.empty()) return opened_[network.key] = load(network, bundle_.verified(file));
      refused.push_back(file + ": " + reason);
    }
    throw Error("TensorRT plan of " + network.key + " in bundle " + bundle_.folder.string(),
                "one for " + name() + " on " + gpu_.name, refused.empty() ? "none" : join(refused, "; "),
                "Run: svd-export tensorrt " + bundle_.folder.string());
  }

  Opened load(const Network& network, const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> plan{std::istreambuf_iterator<char>(file), {}};
    Opened made;
    made.engine.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    if (!made.engine) failed("deserialising " + path);
    made.context.reset(made.engine->createExecutionContext());
    if (!made.context) failed("an execution context of " + path);
    auto tensors = network.inputs;
    tensors.push_back(network.output);
    for (const auto& tensor : tensors) {
      const auto* name = tensor.name.c_str();
      const auto dims = made.engine->getTensorShape(name);
      const std::vector<std::int64_t> shape(dims.d, dims.d + std::max(dims.nbDims, 0));
      if (made.engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kNONE || shape != tensor.shape ||
          made.engine->getTensorDataType(name) != nvinfer1::DataType::kFLOAT)
        throw Error("tensor " + tensor.name + " of " + path, tensor.text(), "another type or shape, or none",
                    "Build the plan again with: svd-export tensorrt " + bundle_.folder.string());
      made.tensors[tensor.name] = std::make_unique<Buffer>(tensor.size());
    }
    return made;
  }

  const Bundle& bundle_;
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  cudaDeviceProp gpu_{};
  cudaStream_t stream_ = nullptr;
  std::map<std::string, Opened> opened_;  // freed before the runtime
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Bundle& bundle) { return std::make_unique<TensorRt>(bundle); }

}  // namespace svd
