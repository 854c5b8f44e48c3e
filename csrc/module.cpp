// s1kernels._C: the CPU kernels for Python. Tensors come as addresses (0: not given) with their sizes; shapes, types
// and contiguity were checked in Python. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/decode_frame.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;
namespace s1 {
void bind_cuda(py::module_& m);  // csrc/cuda/bindings.cpp
}
using namespace s1;

namespace {

using Address = std::uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
using Int32 = const std::int32_t;

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  if (name == "float16") return DType::float16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

template <class Args>
void run(void (*Kernels::*op)(const Args&, int, int), const Args& args, int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be 1 or more, got " + std::to_string(threads));
  const py::gil_scoped_release released;
  const auto slice = kernels(current_isa()).*op;
  parallel(threads, [&](int thread, Barrier&) { slice(args, thread, threads); });
}

void embed_frame(const std::string& dtype, Address tokens, Address text_embedding, Address codebook_embedding,
                 Address out, int rows, int codebooks, int codebook_size, int dim, int text_rows, int semantic_begin,
                 int semantic_end, bool scale, int threads) {
  check_tokens("embed_frame", at<Int32>(tokens), rows, codebooks, codebook_size, text_rows, semantic_begin,
               semantic_end);
  run(&Kernels::embed_frame,
      {dtype_of(dtype), at<Int32>(tokens), at(text_embedding), at(codebook_embedding), at(out), rows, codebooks,
       codebook_size, dim, semantic_begin, semantic_end, scale},
      threads);
}

void rms_norm_qkv(const std::string& dtype, Address x, Address norm_weight, Address weight, Address bias, Address out,
                  int rows, int dim, int out_dim, float eps, int threads) {
  run(&Kernels::rms_norm_qkv,
      {dtype_of(dtype), at(x), at(norm_weight), at(weight), at(bias), at(out), rows, dim, out_dim, eps, nullptr},
      threads);
}

void qk_norm_rotary_append(const std::string& dtype, Address qkv, Address q_norm_weight, Address k_norm_weight,
                           Address cos_sin, Address position, Address k_cache, Address v_cache, Address out, int rows,
                           int caches, int heads, int kv_heads, int head_dim, int capacity, int rotary_rows, float eps,
                           int threads) {
  const char* op = "qk_norm_rotary_append";
  check_range(op, "position", at<Int32>(position), rows, 0, capacity - 1, "the capacity of the caches");
  check_range(op, "position", at<Int32>(position), rows, 0, rotary_rows - 1, "the rows of cos_sin");
  run(&Kernels::qk_norm_rotary_append,
      {dtype_of(dtype), at(qkv), at(q_norm_weight), at(k_norm_weight), at(cos_sin), at<Int32>(position), at(k_cache),
       at(v_cache), at(out), rows, caches, heads, kv_heads, head_dim, capacity, eps},
      threads);
}

void attention_decode(const std::string& dtype, Address q, Address k_cache, Address v_cache, Address length,
                      Address out, int rows, int caches, int heads, int kv_heads, int head_dim, int capacity,
                      int threads) {
  check_range("attention_decode", "length", at<Int32>(length), rows, 1, capacity, "the capacity of the caches");
  run(&Kernels::attention_decode,
      {dtype_of(dtype), at(q), at(k_cache), at(v_cache), at<Int32>(length), at(out), rows, caches, heads, kv_heads,
       head_dim, capacity, nullptr},
      threads);
}

void linear_residual(const std::string& dtype, Address x, Address weight, Address bias, Address residual, Address out,
                     int rows, int in_dim, int out_dim, int threads) {
  run(&Kernels::linear_residual,
      {dtype_of(dtype), at(x), at(weight), at(bias), at(residual), at(out), rows, in_dim, out_dim, nullptr}, threads);
}

void rms_norm_swiglu(const std::string& dtype, Address x, Address norm_weight, Address w1, Address w3, Address out,
                     int rows, int dim, int intermediate, float eps, int threads) {
  run(&Kernels::rms_norm_swiglu,
      {dtype_of(dtype), at(x), at(norm_weight), at(w1), at(w3), at(out), rows, dim, intermediate, eps, nullptr},
      threads);
}

void rms_norm_logits(const std::string& dtype, Address x, Address norm_weight, Address weight, Address logits,
                     Address normed, int rows, int dim, int vocabulary, float eps, int threads) {
  run(&Kernels::rms_norm_logits,
      {dtype_of(dtype), at(x), at(norm_weight), at(weight), nullptr, at<float>(logits), at(normed), rows, dim,
       vocabulary, dim, vocabulary, eps, nullptr},
      threads);
}

void rms_norm(const std::string& dtype, Address x, Address weight, Address out, int rows, int dim, float eps,
              int threads) {
  run(&Kernels::rms_norm, {dtype_of(dtype), at(x), at(weight), at(out), rows, dim, eps}, threads);
}

void swiglu(const std::string& dtype, Address gate, Address up, Address out, int rows, int intermediate, int threads) {
  run(&Kernels::swiglu, {dtype_of(dtype), at(gate), at(up), at(out), rows, intermediate}, threads);
}

void snake(const std::string& dtype, Address x, Address bias, Address alpha, Address past_cache, Address turn,
           Address out, int steps, int channels, int reach, int taps, int dilation, int stride, int threads) {
  run(&Kernels::snake,
      {dtype_of(dtype), at(x), at(bias), at(alpha), at(past_cache), at<Int32>(turn), at(out), steps, channels, reach,
       taps, dilation, stride},
      threads);
}

void sample_token(Address logits, Address noise, Address ras_noise, Address window, Address ids, Address out, int rows,
                  int vocabulary, int window_length, float temperature, float top_p, float repetition_penalty,
                  int top_k, int semantic_begin, int semantic_end, int threads) {
  const py::gil_scoped_release released;
  std::vector<char> scratch(sample_token_scratch_bytes(rows, vocabulary));
  const auto slice = kernels(current_isa()).sample_token;
  parallel(threads, [&](int thread, Barrier& barrier) {
    slice({at<float>(logits),
           at<float>(noise),
           at<float>(ras_noise),
           at<Int32>(window),
           at<Int32>(ids),
           at<std::int32_t>(out),
           rows,
           vocabulary,
           window_length,
           vocabulary,
           window_length,
           1,
           temperature,
           top_p,
           repetition_penalty,
           top_k,
           semantic_begin,
           semantic_end,
           scratch.data(),
           &barrier},
          thread, threads);
  });
}

StackConfig stack_of(const py::dict& d) {
  const auto number = [&](const char* key) { return d[key].cast<int>(); };
  return {number("layers"),   number("dim"),      number("heads"),
          number("kv_heads"), number("head_dim"), number("intermediate")};
}

std::unique_ptr<Frame> make_frame(const py::dict& config, const py::dict& weights) {
  const auto number = [&](const char* key) { return config[key].cast<int>(); };
  const FrameConfig c{dtype_of(config["dtype"].cast<std::string>()),
                      stack_of(config["slow"]),
                      stack_of(config["fast"]),
                      config["norm_eps"].cast<float>(),
                      number("text_rows"),
                      number("head_rows"),
                      number("fast_rows"),
                      number("rotary_rows"),
                      number("codebooks"),
                      number("codebook_size"),
                      number("semantic_begin"),
                      number("semantic_end"),
                      config["scale_codebook_embeddings"].cast<bool>(),
                      config["norm_fast_input"].cast<bool>()};
  const auto tensor = [&](const char* key) -> const void* { return at(weights[key].cast<Address>()); };
  const auto layers = [&](const char* key) {
    std::vector<LayerWeights> result;
    for (const py::handle item : weights[key]) {
      const py::dict layer = py::cast<py::dict>(item);
      const auto part = [&](const char* name) -> const void* { return at(layer[name].cast<Address>()); };
      result.push_back({part("attention_norm"), part("wqkv"), part("qkv_bias"), part("q_norm"), part("k_norm"),
                        part("wo"), part("o_bias"), part("ffn_norm"), part("w1"), part("w3"), part("w2")});
    }
    return result;
  };
  return std::make_unique<Frame>(
      c, FrameWeights{tensor("text_embedding"), tensor("codebook_embedding"), tensor("norm"), tensor("head"),
                      tensor("project_weight"), tensor("project_bias"), tensor("fast_embedding"), tensor("fast_norm"),
                      tensor("fast_head"), tensor("cos_sin"), tensor("fast_cos_sin"), layers("slow"), layers("fast")});
}

void set_caches(Frame& frame, const std::vector<Address>& k, const std::vector<Address>& v, int rows, int capacity) {
  const auto pointers = [](const std::vector<Address>& addresses) {
    std::vector<void*> result;
    for (Address address : addresses) result.push_back(at(address));
    return result;
  };
  frame.set_caches(pointers(k), pointers(v), rows, capacity);
}

// The four sampling parameters are addresses of 0-dim tensors.
void decode(Frame& frame, Address tokens, Address position, Address main_window, Address fast_window,
            Address main_noise, Address ras_noise, Address fast_noise, Address ids, Address logit_bias,
            Address main_logits, Address fast_logits, Address out, int rows, int main_window_length,
            int fast_window_length, Address temperature, Address top_p, Address repetition_penalty, Address top_k,
            int threads) {
  const py::gil_scoped_release released;
  frame.decode(
      {at<Int32>(tokens), at<Int32>(position), at<Int32>(main_window), at<Int32>(fast_window), at<float>(main_noise),
       at<float>(ras_noise), at<float>(fast_noise), at<Int32>(ids), at<float>(logit_bias), at<float>(main_logits),
       at<float>(fast_logits), at<std::int32_t>(out), rows, main_window_length, fast_window_length,
       *at<float>(temperature), *at<float>(top_p), *at<float>(repetition_penalty), *at<Int32>(top_k)},
      threads);
}

void slow_step(Frame& frame, Address tokens, Address position, Address logits, Address hidden, Address normed, int rows,
               int threads) {
  const py::gil_scoped_release released;
  frame.slow_step(at<Int32>(tokens), at<Int32>(position), rows, at<float>(logits), at(hidden), at(normed), threads);
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Hand-written CPU kernels; see s1kernels/backends/cpu.py.";
  m.def("embed_frame", &embed_frame);
  m.def("rms_norm_qkv", &rms_norm_qkv);
  m.def("qk_norm_rotary_append", &qk_norm_rotary_append);
  m.def("attention_decode", &attention_decode);
  m.def("linear_residual", &linear_residual);
  m.def("rms_norm_swiglu", &rms_norm_swiglu);
  m.def("rms_norm_logits", &rms_norm_logits);
  m.def("rms_norm", &rms_norm);
  m.def("swiglu", &swiglu);
  m.def("snake", &snake);
  m.def("sample_token", &sample_token);
  py::class_<Frame>(m, "Frame")
      .def(py::init(&make_frame), py::arg("config"), py::arg("weights"))
      .def("set_caches", &set_caches, py::arg("k_ptrs"), py::arg("v_ptrs"), py::arg("rows"), py::arg("capacity"))
      .def("decode", &decode)
      .def("slow_step", &slow_step);
  m.def("isa_available", [] {
    std::vector<std::string> names;
    for (Isa isa : available_isas()) names.push_back(name_of(isa));
    return names;
  });
  m.def("isa", [] { return name_of(current_isa()); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.attr("compiler") = compiler();
  bind_cuda(m);
}
