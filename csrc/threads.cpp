#include "threads.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

namespace paroattn {
namespace {

constexpr int64_t kChunk = 256;  // tokens per task of statistics; fixed, so that sums never depend on the threads

Kernel kernel_for(Capability capability, const Head& head) {
  switch (capability) {
#ifdef PAROATTN_X86
    case Capability::kAvx512Bf16:
      return avx512_bf16_kernel(head.qk, head.pv, head.head_dim);
    case Capability::kAvx512Vnni:
      return avx512_vnni_kernel(head.qk, head.pv, head.head_dim);
    case Capability::kAvx2:
      return avx2_kernel(head.qk, head.pv, head.head_dim);
#endif
    default:
      return baseline_kernel(head.qk, head.pv, head.head_dim);
  }
}

// Memory for the packed heads, handed out in pieces that start on cache lines.
class Workspace {
 public:
  // Every part is asked for twice in the same order: first to learn the size, then, after `allocate`, to get memory.
  template <class T>
  void take(T*& piece, size_t count) {
    piece = memory_ ? reinterpret_cast<T*>(memory_.get() + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
  }

  void allocate() {
    memory_.reset(static_cast<char*>(std::aligned_alloc(64, used_)));
    if (!memory_) throw std::bad_alloc();
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  size_t used_ = 0;
};

void take_buffers(Head& head, const Kernel& kernel, Workspace& workspace) {
  const size_t token_blocks = block_count(head.tokens), mean_blocks = mean_block_count(head);
  const size_t blocks = token_blocks + mean_blocks;
  workspace.take(head.packed_key, blocks * kernel.key_bytes);
  workspace.take(head.packed_value, blocks * kernel.value_bytes);
  workspace.take(head.score_start, blocks * kBlock);
  workspace.take(head.key_scale, blocks);
  workspace.take(head.shown, blocks);
  workspace.take(head.token_sums, head.compensate ? token_blocks * 2 * head.head_dim : 0);
  workspace.take(head.mean_value_scale, mean_blocks);
  workspace.take(head.mean_log_share, mean_blocks * kBlock);
}

// Means and channel scales from the moments of all chunks, added in the order of the tokens.
void combine(Head& head, const Moments* chunks, int64_t count) {
  for (int d = 0; d < kMaxHeadDim; ++d) {
    head.key_mean[d] = head.value_mean[d] = 0;
    head.value_scale[d] = 1;
    if (d >= head.head_dim) continue;
    double key = 0, value = 0;
    float smallest = chunks[0].value_min[d], largest = chunks[0].value_max[d];
    for (int64_t i = 0; i < count; ++i) {
      key += chunks[i].key_sum[d];
      value += chunks[i].value_sum[d];
      smallest = std::min(smallest, chunks[i].value_min[d]);
      largest = std::max(largest, chunks[i].value_max[d]);
    }
    if (is_integer(head.qk)) head.key_mean[d] = float(key / head.tokens);
    if (!is_integer(head.pv)) continue;
    const float mean = head.value_mean[d] = float(value / head.tokens);
    const float scale = std::max(largest - mean, mean - smallest) / symmetric_steps(head.pv);
    head.value_scale[d] = std::isnan(mean) ? mean : std::max(scale, 1.17549435e-38f);
  }
}

}  // namespace

Capability best_capability() {
#ifdef PAROATTN_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Bf16;
  if (avx512) return Capability::kAvx512Vnni;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

Report run(std::vector<Head>& heads, Capability capability, int threads) {
  if (heads.empty()) return {};  // no batch elements
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  auto packed = start;
  std::vector<Kernel> kernels;
  for (const Head& head : heads) kernels.push_back(kernel_for(capability, head));
  Workspace workspace;
  for (size_t h = 0; h < heads.size(); ++h) take_buffers(heads[h], kernels[h], workspace);
  workspace.allocate();
  for (size_t h = 0; h < heads.size(); ++h) take_buffers(heads[h], kernels[h], workspace);

  const int64_t tokens = heads[0].tokens, blocks = block_count(tokens), chunks = (tokens + kChunk - 1) / kChunk;
  const int64_t head_count = int64_t(heads.size());
  int64_t mean_blocks = 0;  // of one head, at most
  for (const Head& head : heads) mean_blocks = std::max(mean_blocks, mean_block_count(head));
  // A few heads at a time, so that their k and v are still in the cache when they are read again to be packed.
  const int64_t together = std::max(1, threads / 8);
  std::vector<Moments> moments(head_count * chunks);
  int64_t visited = 0;
#pragma omp parallel num_threads(threads)
  {
    for (int64_t first = 0; first < head_count; first += together) {
      const int64_t count = std::min(together, head_count - first);
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * chunks; ++task) {
        const int64_t head = first + task / chunks, chunk = task % chunks;
        const int64_t end = std::min((chunk + 1) * kChunk, tokens);
        kernels[head].measure(heads[head], chunk * kChunk, end, moments[head * chunks + chunk]);
      }
#pragma omp for schedule(static)
      for (int64_t head = first; head < first + count; ++head) combine(heads[head], &moments[head * chunks], chunks);
#pragma omp for schedule(dynamic, 4)
      for (int64_t task = 0; task < count * blocks; ++task) {
        const int64_t head = first + task / blocks;
        kernels[head].pack(heads[head], task % blocks);
      }
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < head_count * mean_blocks; ++task) {
      const int64_t head = task / mean_blocks;
      if (heads[head].compensate) kernels[head].pack_means(heads[head], task % mean_blocks);
    }
#pragma omp single nowait
    packed = Clock::now();
    // Rows of blocks differ in their number of kept blocks: a thread takes the next one when it is done.
#pragma omp for schedule(dynamic, 1) reduction(+ : visited)
    for (int64_t task = 0; task < head_count * blocks; ++task) {
      visited += kernels[task / blocks].attend(heads[task / blocks], task % blocks);
    }
  }
  return {visited, std::chrono::duration<double>(packed - start).count()};
}

}  // namespace paroattn
