// The Python module: turns arrays into heads. Shapes are checked by the caller, paroattn/ops/cpu.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace paroattn;

namespace {

using Tensor = nb::ndarray<nb::ndim<4>, nb::device::cpu>;                                     // [B, H, N, D]
using Lse = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;                   // [B, H, N]
using Permutation = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;   // [H, N]
using Mask = nb::ndarray<const uint8_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;          // [H, rows, bytes]
using Compensate = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;    // [H]
using KeyMask = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;       // [B, N]

const char* const kCapabilities[] = {"baseline", "avx2", "avx512_vnni", "avx512_bf16"};
const char* const kFormats[] = {"exact", "bf16", "int8", "int4"};

template <class Enum, size_t COUNT>
Enum parse(const char* const (&names)[COUNT], const std::string& name) {
  for (size_t i = 0; i < COUNT; ++i) {
    if (name == names[i]) return Enum(i);
  }
  throw std::invalid_argument("unknown name " + name);
}

Rows rows_of(const Tensor& tensor, size_t batch, size_t head) {
  const DataType type = tensor.dtype() == nb::dtype<float>() ? DataType::kFloat32
                        : tensor.dtype().code == uint8_t(nb::dlpack::dtype_code::Bfloat) ? DataType::kBfloat16
                                                                                         : DataType::kFloat16;
  const int64_t first = int64_t(batch) * tensor.stride(0) + int64_t(head) * tensor.stride(1);
  char* data = static_cast<char*>(const_cast<void*>(tensor.data()));
  return {data + first * tensor.dtype().bits / 8, tensor.stride(2), type};
}

// An index out of range would read and write outside the tensors.
void check_range(const Permutation& permutation) {
  const int64_t tokens = int64_t(permutation.shape(1));
  for (size_t i = 0; i < permutation.size(); ++i) {
    if (permutation.data()[i] < 0 || permutation.data()[i] >= tokens) {
      const std::string found = "permutation holds " + std::to_string(permutation.data()[i]);
      throw nb::value_error((found + "; expected numbers from 0 to " + std::to_string(tokens - 1)).c_str());
    }
  }
}

nb::tuple attend(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output, const Lse& lse,
                 const std::optional<Permutation>& permutation, const std::optional<Mask>& mask, int mask_block_q,
                 int mask_block_kv, const std::optional<Compensate>& compensate, const std::optional<KeyMask>& key_mask,
                 const std::vector<std::string>& qk, const std::vector<std::string>& pv, float scale,
                 const std::string& capability, int threads) {
  const size_t batch = query.shape(0), heads = query.shape(1), tokens = query.shape(2);
  const size_t group = heads / key.shape(1);
  if (permutation) check_range(*permutation);
  std::vector<Head> all(batch * heads);
  for (size_t i = 0; i < all.size(); ++i) {
    const size_t b = i / heads, h = i % heads;
    Head& head = all[i];
    head.query = rows_of(query, b, h);
    head.key = rows_of(key, b, h / group);
    head.value = rows_of(value, b, h / group);
    head.output = rows_of(output, b, h);
    head.lse = lse.data() + i * tokens;
    head.order = permutation ? permutation->data() + h * tokens : nullptr;
    head.mask = mask ? mask->data() + h * mask->shape(1) * mask->shape(2) : nullptr;
    head.mask_row_bytes = mask ? int64_t(mask->shape(2)) : 0;
    head.mask_block_q = mask_block_q / kBlock;
    head.mask_block_kv = mask_block_kv / kBlock;
    head.compensate = mask && compensate && compensate->data()[h];
    head.key_mask = key_mask ? key_mask->data() + b * tokens : nullptr;
    head.tokens = int64_t(tokens);
    head.head_dim = int(query.shape(3));
    head.scale = scale;
    head.qk = parse<Format>(kFormats, qk[h]);
    head.pv = parse<Format>(kFormats, pv[h]);
  }
  const Capability chosen = parse<Capability>(kCapabilities, capability);
  Report report;
  {
    nb::gil_scoped_release release;
    report = run(all, chosen, threads);
  }
  return nb::make_tuple(report.visited_blocks, report.prologue_seconds);
}

}  // namespace

NB_MODULE(_cpu, module) {
  module.attr("CAPABILITIES") = nb::make_tuple(kCapabilities[0], kCapabilities[1], kCapabilities[2], kCapabilities[3]);
  module.def("best_capability", [] { return kCapabilities[int(best_capability())]; });
  module.def("attend", &attend, "query"_a, "key"_a, "value"_a, "output"_a, "lse"_a, "permutation"_a.none(),
             "mask"_a.none(), "mask_block_q"_a, "mask_block_kv"_a, "compensate"_a.none(), "key_mask"_a.none(), "qk"_a,
             "pv"_a, "scale"_a, "capability"_a, "threads"_a);
}
